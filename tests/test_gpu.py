"""The same code on a CUDA device: bf16, one varlen attention kernel, the same losses as on the CPU."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_parallel_parity import CHANNELS, MODEL, TEXT_DIM, TRAIN, _batch, _wake, as_pack

from sorahpc.config import TrainConfig
from sorahpc.models.attention import pack_attention

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dim", [64, 36])  # 36: the demo's, no multiple of 8
def test_varlen_attention_is_attention_within_each_sample(dim: int) -> None:
    g = torch.Generator("cuda").manual_seed(0)
    q_lens, k_lens = [64, 64, 1, 130], [7, 7, 3, 1]
    q = torch.randn(sum(q_lens), 4, dim, generator=g, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    k, v = (torch.randn(sum(k_lens), 4, dim, generator=g, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    out = pack_attention(q, k, v, q_lens, k_lens)
    reference = pack_attention(q.float(), k.float(), v.float(), q_lens, k_lens)
    assert (out.float() - reference).norm() < 0.01 * reference.norm()
    (gradient,) = torch.autograd.grad(out.float().square().sum(), q, retain_graph=True)
    (expected,) = torch.autograd.grad(reference.square().sum(), q)
    assert F.cosine_similarity(gradient.float().flatten(), expected.float().flatten(), dim=0) > 0.99


def _steps(dtype: torch.dtype, steps: int, name: str) -> list[float]:
    from sorahpc.distributed import megatron
    from sorahpc.distributed.ema import Ema
    from sorahpc.jobs.train import accumulate_gradients
    from sorahpc.models.dit import DiT

    mesh = megatron.start()
    try:
        assert mesh.device.type == "cuda"
        model = DiT(MODEL, mesh, channels=CHANNELS, text_dim=TEXT_DIM, dtype=dtype, seed=3)
        ddp = megatron.wrap_ddp(model, model.config)
        optimizer = megatron.make_optimizer(ddp, TRAIN.model_copy(update={"optimizer": name}), mesh, dtype)
        ema = Ema(model, optimizer, mesh, 0.9)
        batch: dict[str, Any] = _batch(0)
        target = torch.randn(batch["tokens"].shape, generator=torch.Generator().manual_seed(1))
        moved = {k: v.cuda() if torch.is_tensor(v) and k != "grids" else v for k, v in batch.items()}
        pack = as_pack(moved, target.cuda())
        losses = []
        for _ in range(steps):
            losses.append(accumulate_gradients(ddp, [pack], target.numel(), mesh))
            megatron.clip_and_step(optimizer, megatron.gradient_norm(optimizer), 1.0)
            ema.update()
        assert next(iter(ema.slices.values())).dtype == torch.float32
        assert {x.device.type for x in ema.gather().values()} == {"cpu"}
        return losses
    finally:
        megatron.stop()


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_bf16_training_follows_fp32(optimizer: str) -> None:
    fp32, bf16 = _steps(torch.float32, 40, optimizer), _steps(torch.bfloat16, 40, optimizer)
    assert all(math.isfinite(loss) for loss in fp32 + bf16)
    assert fp32[-1] < 0.9 * fp32[0]
    for a, b in zip(fp32, bf16, strict=True):
        assert a == pytest.approx(b, rel=0.05)


def test_bf16_output_is_that_of_float32() -> None:
    from sorahpc.distributed import megatron
    from sorahpc.models.dit import DiT

    mesh = megatron.start()
    try:
        model = DiT(MODEL, mesh, channels=CHANNELS, text_dim=TEXT_DIM, dtype=torch.float32)
        _wake_on(model)
        batch = _batch(0)
        moved = {k: v.cuda() if torch.is_tensor(v) and k != "grids" else v for k, v in batch.items()}
        with torch.no_grad():
            bf16 = model.to(torch.bfloat16)
            bf16.dtype = torch.bfloat16
            low = bf16(**moved)
            full = model.to(torch.float32)
            full.dtype = torch.float32
            high = full(**moved)
        assert high.dtype == low.dtype == torch.float32
        assert (low - high).norm() < 0.03 * high.norm()
    finally:
        megatron.stop()


def _wake_on(model: torch.nn.Module) -> None:
    model.cpu()
    _wake(model)
    model.cuda()


def test_precision_auto_is_bf16_on_cuda() -> None:
    from sorahpc.jobs.train import pick_dtype

    auto = TrainConfig(steps=1, tokens_per_pack=1, warmup_steps=0)
    assert pick_dtype(auto, torch.device("cuda")) is torch.bfloat16
    assert pick_dtype(auto, torch.device("cpu")) is torch.float32
