"""Tensor and sequence parallelism change where the numbers are computed, not the numbers."""

from __future__ import annotations

import hashlib
from typing import Any

import pytest
import torch
from ranks import run_on_ranks
from torch import Tensor

from sorahpc.config import ModelConfig, TrainConfig
from sorahpc.data.texts import PackTexts

MODEL = ModelConfig(depth=2, dim=64, num_heads=4, patch=(1, 2, 2))
TRAIN = TrainConfig(steps=1000, tokens_per_pack=4096, warmup_steps=0, lr=1e-3)
CHANNELS, TEXT_DIM = 6, 24
# Odd counts on purpose: 103 tokens in all, which no tp divides; one token; one frame; repeated and distinct lengths.
GRIDS = [[2, 3, 5], [2, 3, 5], [1, 4, 4], [3, 1, 7], [1, 1, 1], [1, 5, 1]]
TEXT_LENS = [3, 3, 1, 7, 2, 4]
CLIP_DIMS, CLIP_LENS = {"clip_text_dim": 20, "clip_pooled_dim": 12}, [2, 5, 2, 1, 3, 4]


def _batch(seed: int, clip: bool = False) -> dict[str, Any]:
    """Arguments of DiT.forward."""
    g = torch.Generator().manual_seed(seed)
    grids = torch.tensor(GRIDS)
    length = int(grids.prod(1).sum())
    batch = {
        "tokens": torch.randn(length, CHANNELS * 4, generator=g),
        "t": torch.rand(len(GRIDS), generator=g),
        "grids": grids,
        "text": torch.randn(sum(TEXT_LENS), TEXT_DIM, generator=g),
        "text_lens": TEXT_LENS,
    }
    if clip:
        batch["clip_text"] = torch.randn(sum(CLIP_LENS), CLIP_DIMS["clip_text_dim"], generator=g)
        batch["clip_lens"] = CLIP_LENS
        batch["clip_pooled"] = torch.randn(len(GRIDS), CLIP_DIMS["clip_pooled_dim"], generator=g)
    return batch


def as_pack(batch: dict[str, Any], target: Tensor) -> Any:
    """A `PackBatch` of `_batch`."""
    from sorahpc.jobs.train import PackBatch

    own = ("tokens", "t", "grids")
    texts = PackTexts(**{name: value for name, value in batch.items() if name not in own})
    return PackBatch(target=target, texts=texts, **{name: batch[name] for name in own})


def _wake(model: torch.nn.Module) -> None:
    """Fill the zero-initialised layers, the same on every layout, so that every gradient is of the same order."""
    for name, parameter in sorted(model.named_parameters()):
        if any(part in name for part in ("ada_ln", "final.", "cross_attention.linear_proj", "layernorm", "text_norm")):
            g = torch.Generator().manual_seed(int(hashlib.sha256(name.encode()).hexdigest()[:8], 16))
            whole = list(parameter.shape)
            axis = getattr(parameter, "partition_dim", -1) if getattr(parameter, "tensor_model_parallel", False) else -1
            if axis >= 0:
                whole[axis] *= model.mesh.tp_size
            noise = torch.randn(whole, generator=g) * 0.05
            if axis >= 0:
                noise = noise.chunk(model.mesh.tp_size, axis)[model.mesh.tp_rank]
            with torch.no_grad():
                parameter.add_(noise)


def _whole(tensor: Tensor, parameter: Tensor, mesh: Any) -> Tensor:
    """The parameter-shaped tensor of all tp ranks put together."""
    if not getattr(parameter, "tensor_model_parallel", False):
        return tensor.clone()
    parts = [torch.empty_like(tensor) for _ in range(mesh.tp_size)]
    torch.distributed.all_gather(parts, tensor.contiguous(), group=mesh.tp_group)
    return torch.cat(parts, parameter.partition_dim)


def parity_cases(rank: int, world_size: int, tp: int) -> dict[str, Any]:
    """Loss and whole gradients for this tp size, without and with sp; then 50 steps, and hashes of replicas."""
    from sorahpc.distributed import megatron
    from sorahpc.jobs.train import accumulate_gradients, learning_rate
    from sorahpc.models.dit import DiT

    results = {}
    for sp in (False, True) if tp > 1 else (False,):
        mesh = megatron.start(rank, world_size, tp=tp, sp=sp)
        assert mesh.sp == sp
        model = DiT(MODEL, mesh, channels=CHANNELS, text_dim=TEXT_DIM, dtype=torch.float32, seed=3, **CLIP_DIMS)
        _wake(model)
        ddp = megatron.wrap_ddp(model, model.config)
        optimizer = megatron.make_optimizer(ddp, TRAIN, mesh, torch.float32)

        def pack(seed: int) -> Any:
            batch = _batch(seed, clip=True)
            target = torch.randn(batch["tokens"].shape, generator=torch.Generator().manual_seed(seed + 1000))
            return as_pack(batch, target)

        packs = [pack(0), pack(1)]
        elements = sum(p.tokens.numel() for p in packs)
        loss = accumulate_gradients(ddp, packs, elements, mesh)
        gradients = {n: _whole(p.main_grad, p, mesh) for n, p in model.named_parameters()}
        norm = megatron.gradient_norm(optimizer)

        for step in range(50):
            losses = accumulate_gradients(ddp, [pack(step)], elements // 2, mesh)
            norm_now = megatron.gradient_norm(optimizer)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, TRAIN)
            megatron.clip_and_step(optimizer, norm_now, TRAIN.clip_grad)
        replicas = {
            n: hashlib.sha256(p.detach().numpy().tobytes()).hexdigest()
            for n, p in model.named_parameters()
            if not getattr(p, "tensor_model_parallel", False)
        }
        results[f"tp{tp}{'+sp' if sp else ''}"] = {
            "loss": loss,
            "norm": norm,
            "gradients": gradients,
            "replicas": replicas,
            "last_loss": losses,
        }
    megatron.stop()
    return results


@pytest.fixture(scope="module")
def layouts() -> dict[str, list[dict[str, Any]]]:
    one = run_on_ranks(1, parity_cases, 1)
    two = run_on_ranks(2, parity_cases, 2)
    return {"tp1": [one[0]["tp1"]], "tp2": [r["tp2"] for r in two], "tp2+sp": [r["tp2+sp"] for r in two]}


@pytest.mark.parametrize("layout", ["tp2", "tp2+sp"])
def test_loss_and_every_gradient_equal_those_of_one_rank(layouts: Any, layout: str) -> None:
    reference = layouts["tp1"][0]
    for result in layouts[layout]:
        assert result["loss"] == pytest.approx(reference["loss"], rel=1e-5)
        assert result["norm"] == pytest.approx(reference["norm"], rel=1e-5)
        assert result["gradients"].keys() == reference["gradients"].keys()
        for name, expected in reference["gradients"].items():
            assert expected.norm() > 1e-6, f"{name} gets no gradient: the test would prove nothing"
            error = (result["gradients"][name] - expected).norm() / expected.norm()
            assert error < 1e-5, f"{name}: {error:.2e}"


@pytest.mark.parametrize("layout", ["tp2", "tp2+sp"])
def test_replicated_parameters_hold_equal_bits_after_50_steps(layouts: Any, layout: str) -> None:
    first, second = layouts[layout]
    assert len(first["replicas"]) > 10
    assert first["replicas"] == second["replicas"]
    assert first["last_loss"] == second["last_loss"] == pytest.approx(layouts["tp1"][0]["last_loss"], rel=1e-3)
