"""The DiT computes each sample of a pack as if it were alone, and starts at the loss that theory gives."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_parallel_parity import CHANNELS, CLIP_DIMS, GRIDS, MODEL, TEXT_DIM, TEXT_LENS, _batch, _wake
from torch.utils._python_dispatch import TorchDispatchMode

from sorahpc import ops
from sorahpc.config import ModelConfig, TrainConfig
from sorahpc.distributed import megatron
from sorahpc.distributed.ema import Ema
from sorahpc.models import attention
from sorahpc.models.attention import pack_attention
from sorahpc.models.dit import DiT
from sorahpc.ops.rope import MAX_HEAD_DIM
from sorahpc.profiling.record import layer_spans


@pytest.fixture(scope="module")
def mesh() -> Iterator[Any]:
    yield megatron.start()
    megatron.stop()


def _model(mesh: Any, model: ModelConfig = MODEL, *, wake: bool = True) -> DiT:
    dit = DiT(model, mesh, channels=CHANNELS, text_dim=TEXT_DIM, dtype=torch.float32)
    if wake:
        _wake(dit)
    return dit


@pytest.mark.parametrize("position", ["rope3d", "sincos3d", "both"])
def test_a_sample_does_not_feel_its_neighbours_in_the_pack(mesh: Any, position: str) -> None:
    model = ModelConfig(depth=2, dim=96, num_heads=4, position=position)
    dit, batch = _model(mesh, model), _batch(0)
    whole = dit(**batch)
    token, word = 0, 0
    for i, (grid, words) in enumerate(zip(GRIDS, TEXT_LENS, strict=True)):
        count = grid[0] * grid[1] * grid[2]
        alone = dit(
            batch["tokens"][token : token + count],
            batch["t"][i : i + 1],
            batch["grids"][i : i + 1],
            batch["text"][word : word + words],
            [words],
        )
        torch.testing.assert_close(alone, whole[token : token + count], atol=2e-5, rtol=1e-4)
        token, word = token + count, word + words


def test_clip_reaches_its_own_sample_alone_by_its_tokens_and_by_its_pooled_embedding(mesh: Any) -> None:
    dit = DiT(MODEL, mesh, channels=CHANNELS, text_dim=TEXT_DIM, dtype=torch.float32, **CLIP_DIMS)
    _wake(dit)
    batch = _batch(0, clip=True)
    whole = dit(**batch)
    sizes = batch["grids"].prod(-1).tolist()
    for name, rows in (("clip_text", slice(2, 7)), ("clip_pooled", slice(1, 2))):  # those of the second sample
        changed = batch[name].clone()
        changed[rows] += 1
        moved = [float((a - b).abs().max()) for a, b in zip(
            dit(**{**batch, name: changed}).split(sizes), whole.split(sizes), strict=True
        )]  # fmt: skip
        assert moved[1] > 1e-3 and max(moved[:1] + moved[2:]) < 1e-5, (name, moved)
    with pytest.raises(ValueError, match="CLIP's texts: expected all three"):
        dit(**_batch(0))
    with pytest.raises(ValueError, match="CLIP's texts: expected none"):
        _model(mesh)(**batch)
    with pytest.raises(ValueError, match="17 CLIP tokens, lengths of 16"):
        dit(**{**batch, "clip_lens": [1, *batch["clip_lens"][1:]]})


def test_output_depends_on_time_text_and_place(mesh: Any) -> None:
    dit, batch = _model(mesh), _batch(0)
    out = dit(**batch)
    assert not torch.allclose(dit(**{**batch, "t": batch["t"] * 0.5}), out, atol=1e-3)
    assert not torch.allclose(dit(**{**batch, "text": batch["text"].flip(0)}), out, atol=1e-3)
    swapped = batch["grids"][:, [0, 2, 1]]
    assert not torch.allclose(dit(**{**batch, "grids": swapped}), out, atol=1e-4)


def test_untrained_model_predicts_zero_so_the_first_loss_is_one_plus_the_variance(mesh: Any) -> None:
    dit = _model(mesh, wake=False)
    g = torch.Generator().manual_seed(0)
    grids = torch.tensor([[4, 16, 16]])
    x0 = 0.7 * torch.randn(1024, CHANNELS * 4, generator=g)
    eps = torch.randn(x0.shape, generator=g)
    out = dit(0.5 * x0 + 0.5 * eps, torch.tensor([0.5]), grids, torch.randn(3, TEXT_DIM, generator=g), [3])
    assert torch.equal(out, torch.zeros_like(out))
    assert float(F.mse_loss(out, eps - x0)) == pytest.approx(1 + 0.7**2, rel=0.03)


def test_weights_are_those_of_the_seed(mesh: Any) -> None:
    def weights(seed: int) -> torch.Tensor:
        dit = DiT(MODEL, mesh, channels=CHANNELS, text_dim=TEXT_DIM, dtype=torch.float32, seed=seed)
        return torch.cat([p.flatten() for p in dit.parameters()])

    state = torch.get_rng_state()
    assert torch.equal(weights(1), weights(1))
    assert not torch.equal(weights(1), weights(2))
    assert torch.equal(torch.get_rng_state(), state), "building a model must not disturb the global generator"


def test_a_profiles_spans_leave_the_gradients_in_megatrons_buffers_as_they_are(mesh: Any) -> None:
    """Both hang on the nodes that accumulate gradients. Two packs a step."""
    dit = _model(mesh)
    ddp = megatron.wrap_ddp(dit, dit.config)

    def gradients() -> dict[str, Any]:
        ddp.zero_grad_buffer()
        for seed in (0, 1):
            ddp(**_batch(seed)).square().sum().backward()
        megatron.finalize_grads(ddp)
        assert all(parameter.grad is None for parameter in dit.parameters())
        return {name: parameter.main_grad.clone() for name, parameter in dit.named_parameters()}  # type: ignore

    before = gradients()
    with layer_spans(dit.parts()):
        spanned = gradients()
    after = gradients()
    for name, gradient in before.items():
        assert gradient.any() and torch.equal(gradient, spanned[name]) and torch.equal(gradient, after[name]), name


def test_lengths_that_do_not_fit_are_one_error_with_the_numbers(mesh: Any) -> None:
    dit, batch = _model(mesh), _batch(0)
    with pytest.raises(ValueError, match="102 tokens, grids of 103"):
        dit(**{**batch, "tokens": batch["tokens"][1:]})
    with pytest.raises(ValueError, match="5 timesteps, 6 grids, 6 texts"):
        dit(**{**batch, "t": batch["t"][1:]})


def test_the_config_takes_the_head_dims_that_rope3d_takes() -> None:
    ModelConfig(depth=1, dim=MAX_HEAD_DIM, num_heads=1)
    with pytest.raises(ValueError, match=f"at most {MAX_HEAD_DIM} for rope3d, not {MAX_HEAD_DIM + 2} / 1"):
        ModelConfig(depth=1, dim=MAX_HEAD_DIM + 2, num_heads=1)


def test_pack_attention_is_dense_attention_with_a_block_mask() -> None:
    g = torch.Generator().manual_seed(0)
    q_lens, k_lens = [3, 3, 1, 5], [2, 2, 4, 1]
    q = torch.randn(sum(q_lens), 2, 8, generator=g)
    k, v = (torch.randn(sum(k_lens), 2, 8, generator=g) for _ in range(2))
    rows = torch.repeat_interleave(torch.arange(4), torch.tensor(q_lens))
    columns = torch.repeat_interleave(torch.arange(4), torch.tensor(k_lens))
    mask = rows[:, None] == columns[None]
    dense = F.scaled_dot_product_attention(*(x.transpose(0, 1) for x in (q, k, v)), attn_mask=mask).transpose(0, 1)
    torch.testing.assert_close(pack_attention(q, k, v, q_lens, k_lens), dense)


@pytest.mark.parametrize("dim", [36, 16])  # the demo's, and one that the kernel takes as it is
def test_the_varlen_kernel_gets_what_it_takes_and_each_pack_is_described_to_the_gpu_once(
    monkeypatch: pytest.MonkeyPatch, dim: int
) -> None:
    """With a stand-in for the kernel: what torch's flash attention checks, and SDPA for what it computes."""
    starts = []

    def kernel(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_q: torch.Tensor, cu_k: torch.Tensor,
        max_q: int, max_k: int, *, scale: float | None = None,
    ) -> torch.Tensor:  # fmt: skip
        assert q.shape[2] % 8 == 0 and q.shape[2] == k.shape[2] == v.shape[2] <= 256
        assert all(x.stride(-1) == 1 for x in (q, k, v))
        assert cu_q.dtype == cu_k.dtype == torch.int32 and cu_q.is_contiguous() and cu_k.is_contiguous()
        assert (max_q, max_k) == (max(cu_q.diff()), max(cu_k.diff()))
        starts.append((cu_q, cu_k))
        out = []
        for a, b, c, d in zip(cu_q, cu_q[1:], cu_k, cu_k[1:], strict=False):
            one = (x.transpose(0, 1) for x in (q[a:b], k[c:d], v[c:d]))
            out.append(F.scaled_dot_product_attention(*one, scale=scale).transpose(0, 1))
        return torch.cat(out)

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", kernel)
    attention._starts.cache_clear()
    g = torch.Generator().manual_seed(0)
    q_lens, k_lens = [5, 5, 1, 7], [3, 3, 2, 1]
    q = torch.randn(sum(q_lens), 2, dim, generator=g, requires_grad=True)
    k, v = torch.randn(sum(k_lens), 2, 2, dim, generator=g).unbind(2)  # as of a fused projection
    expected = pack_attention(q, k, v, q_lens, k_lens)
    with torch.inference_mode():
        attention._varlen(q, k, v, q_lens, k_lens)
    found = attention._varlen(q, k, v, q_lens, k_lens)
    torch.testing.assert_close(found, expected)
    gradients = [torch.autograd.grad(x.square().sum(), q)[0] for x in (found, expected)]
    torch.testing.assert_close(*gradients)
    assert all(a is b for a, b in zip(*starts, strict=True)) and not starts[0][0].is_inference()


def test_rope_scores_depend_on_relative_position_along_each_axis() -> None:
    grid, axes = torch.tensor([[3, 4, 5]]), (4, 8, 4)
    g = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, 1, 16, generator=g).expand(60, 1, 16) for _ in range(2))
    q, k = ops.rope3d(q, k, grid, axes)
    scores = (q[:, 0] @ k[:, 0].T).view(3, 4, 5, 3, 4, 5)
    torch.testing.assert_close(scores[0, 0, 0, 1, 2, 3], scores[1, 1, 1, 2, 3, 4])
    assert not torch.allclose(scores[0, 0, 0, 1, 0, 0], scores[0, 0, 0, 0, 1, 0])
    torch.testing.assert_close(q.norm(dim=-1), torch.full((60, 1), float(q[0].norm())))


def test_rope_far_positions_keep_accuracy() -> None:
    grid, axes = torch.tensor([[4001, 1, 1]]), (8, 0, 0)
    x = torch.ones(4001, 1, 8)
    out = ops.rope3d(x, x, grid, axes)[0][4000, 0].double()
    angles = 4000 * 1e4 ** -(torch.arange(0, 8, 2, dtype=torch.float64) / 8)
    expected = torch.stack((angles.cos() - angles.sin(), angles.cos() + angles.sin()), -1).flatten()
    torch.testing.assert_close(out, expected, atol=1e-6, rtol=0)


def test_sincos_and_timestep_embeddings_match_their_formulas() -> None:
    table = ops.sincos3d(torch.tensor([[2, 1, 3]]), 12)
    assert table.shape == (6, 12)
    last = table[-1].double()  # token (1, 0, 2)
    f = torch.tensor([1.0, 1e-2], dtype=torch.float64)
    expected = torch.cat([torch.cat(((p * f).sin(), (p * f).cos())) for p in (1, 0, 2)])
    torch.testing.assert_close(last, expected, atol=1e-6, rtol=0)
    emb = ops.timestep_embedding(torch.tensor([0.0, 0.25]), 8)
    assert torch.equal(emb[0], torch.tensor([1.0] * 4 + [0.0] * 4))
    torch.testing.assert_close(emb[1, 0], torch.tensor(250.0).cos())


def test_the_gradient_norm_asks_the_device_for_one_number_alone(mesh: Any) -> None:
    """On a GPU each is a wait, and Megatron's own norm asks for one a parameter."""
    dit = _model(mesh)
    ddp = megatron.wrap_ddp(dit, dit.config)
    optimizer = megatron.make_optimizer(ddp, TrainConfig(steps=1, tokens_per_pack=1, warmup_steps=0), mesh, dit.dtype)
    ddp.zero_grad_buffer()
    ddp(**_batch(0)).square().sum().backward()
    megatron.finalize_grads(ddp)

    class Counter(TorchDispatchMode):
        asked = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.asked += func is torch.ops.aten._local_scalar_dense.default
            return func(*args, **(kwargs or {}))

    with Counter() as counter:
        norm = megatron.gradient_norm(optimizer)
    assert counter.asked == 1
    grads = torch.cat([p.main_grad.flatten() for p in dit.parameters()])  # type: ignore[attr-defined]
    assert norm == pytest.approx(float(grads.double().norm()), rel=1e-5)
    megatron.clip_and_step(optimizer, norm, norm / 4)
    mains = [main.grad for _, main, _, _ in megatron.main_shards(optimizer) if main.grad is not None]
    if mains:  # not taken away by the step
        assert float(torch.cat([g.flatten() for g in mains]).norm()) == pytest.approx(norm / 4, rel=1e-4)


def test_averages_are_gathered_on_the_cpu_one_parameter_at_a_time(mesh: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    dit = _model(mesh)
    ddp = megatron.wrap_ddp(dit, dit.config)
    optimizer = megatron.make_optimizer(ddp, TrainConfig(steps=1, tokens_per_pack=1, warmup_steps=0), mesh, dit.dtype)
    ema, on_cpu = Ema(dit, optimizer, mesh, 0.9), []
    monkeypatch.setattr(torch.Tensor, "cpu", lambda x: on_cpu.append(x) or x)
    gathered = ema.gather()
    assert [id(x) for x in gathered.values()] == [id(x) for x in on_cpu] and len(on_cpu) > 10
    assert all(torch.equal(gathered[name], p) for name, p in dit.named_parameters())
