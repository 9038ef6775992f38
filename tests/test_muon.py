"""Muon: what it does to a matrix, and that neither the layout nor a resume changes it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_on_ranks
from test_checkpoint import _equal, train_and_save
from test_parallel_parity import CHANNELS, MODEL, TEXT_DIM, TRAIN, _batch, _wake, as_pack

from sorahpc.distributed.muon import MOMENTUM, UPDATE_RMS, Matrix, Muon, orthogonalize

MUON = TRAIN.model_copy(update={"optimizer": "muon", "weight_decay": 0.1})


@pytest.mark.parametrize("shape", [(3, 32, 32), (2, 16, 64), (2, 64, 16), (1, 1, 8)])
def test_orthogonalize_keeps_the_directions_and_levels_the_singular_values(shape: tuple[int, int, int]) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 1e-3
    y = orthogonalize(x)
    values = torch.linalg.svdvals(y)
    assert y.shape == x.shape and values.max() < 1.25
    kept = torch.linalg.svdvals(x) > 0.1 * torch.linalg.svdvals(x).max()  # the smallest take more than five steps
    assert values[kept].min() > 0.6
    u, _, vh = torch.linalg.svd(x, full_matrices=False)
    cosine = (y * (u @ vh)).flatten(1).sum(1) / (y.flatten(1).norm(dim=1) * (u @ vh).flatten(1).norm(dim=1))
    assert cosine.min() > 0.95


def test_orthogonalize_leaves_zeros() -> None:
    assert torch.equal(orthogonalize(torch.zeros(2, 4, 8)), torch.zeros(2, 4, 8))


def three_steps(rank: int, world_size: int) -> dict[str, Any]:
    """Weights before each of three steps of one rank, and the gradients of the step."""
    from sorahpc.distributed import megatron
    from sorahpc.jobs.train import accumulate_gradients
    from sorahpc.models.dit import DiT

    mesh = megatron.start(rank, world_size)
    model = DiT(MODEL, mesh, channels=CHANNELS, text_dim=TEXT_DIM, dtype=torch.float32)
    _wake(model)
    ddp = megatron.wrap_ddp(model, model.config)
    optimizer = megatron.make_optimizer(ddp, MUON, mesh, torch.float32)
    weights, gradients = [], []
    for step in range(3):
        weights.append({n: p.detach().clone() for n, p in model.named_parameters()})
        batch = _batch(step)
        target = torch.randn(batch["tokens"].shape, generator=torch.Generator().manual_seed(step))
        accumulate_gradients(ddp, [as_pack(batch, target)], target.numel(), mesh)
        gradients.append({n: p.main_grad.clone() for n, p in model.named_parameters()})
        megatron.clip_and_step(optimizer, megatron.gradient_norm(optimizer), float("inf"))
    megatron.stop()
    return {"weights": weights, "gradients": gradients}


def _orthogonal_parts(name: str, direction: torch.Tensor) -> torch.Tensor:
    """By the names: q, k and v of each head lie together in the fused projections, and are matrices of their own."""
    fused = {"linear_qkv": 3, "linear_kv": 2}.get(name.split(".")[-2], 1)
    heads = MODEL.num_heads if fused > 1 else 1
    rows = direction.unflatten(0, (heads, fused, -1))
    out = torch.empty_like(rows)
    for part in range(fused):
        matrix = rows[:, part].flatten(0, 1)
        out[:, part] = (orthogonalize(matrix[None])[0] * UPDATE_RMS * max(matrix.shape) ** 0.5).view_as(rows[:, part])
    return out.flatten(0, 2)


def test_the_step_is_that_of_the_definition() -> None:
    result = run_on_ranks(1, three_steps)[0]
    weights, gradients = result["weights"], result["gradients"]
    names = [n for n in weights[0] if "linear" in n and n.endswith("weight")]
    assert len(names) == MODEL.depth * 7
    for name in names:
        momentum = torch.zeros_like(weights[0][name])
        for step in range(2):
            gradient = gradients[step][name]
            momentum = MOMENTUM * momentum + (1 - MOMENTUM) * gradient
            nesterov = MOMENTUM * momentum + (1 - MOMENTUM) * gradient
            decayed = weights[step][name] * (1 - MUON.lr * MUON.weight_decay)
            expected = decayed - MUON.lr * _orthogonal_parts(name, nesterov)
            torch.testing.assert_close(weights[step + 1][name], expected, atol=1e-6, rtol=1e-4)
        update = weights[1][name] - weights[0][name] * (1 - MUON.lr * MUON.weight_decay)
        assert 0.3 < update.square().mean().sqrt() / (MUON.lr * UPDATE_RMS) < 1.5
    others = [n for n in weights[0] if n not in names]
    first = (weights[1]["x_embed.weight"] - weights[0]["x_embed.weight"] * (1 - MUON.lr * MUON.weight_decay)).abs()
    assert len(others) > 10 and first.median() == pytest.approx(MUON.lr, rel=1e-2), "AdamW's first step is lr"


def layout_cases(rank: int, world_size: int, root: Path) -> dict[str, dict[str, Any]]:
    """Four steps at once; 2 + 2 on the same layout; and, of two ranks, 2 with tp and 2 with dp, or of one, bfloat16."""

    def run(name: str, tp: int, steps: int, start: bool, dtype: str = "float32") -> dict[str, Any]:
        return train_and_save(rank, world_size, tp, root / name, steps, start, dtype, "muon")

    results = {"whole": run("whole", world_size, 4, True)}
    run("parts", world_size, 2, True)
    results["parts"] = run("parts", world_size, 2, False)
    if world_size > 1:
        run("mixed", world_size, 2, True)
        results["mixed"] = run("mixed", 1, 2, False)
    else:
        results["bf16 whole"] = run("bf16", 1, 3, True, "bfloat16")
        run("bf16 parts", 1, 2, True, "bfloat16")
        results["bf16 parts"] = run("bf16 parts", 1, 1, False, "bfloat16")
    return results


def check_same_steps(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Of two layouts: matrices differ by a fiftieth of one step at most."""
    assert found["losses"] == pytest.approx(expected["losses"][-len(found["losses"]) :], rel=1e-4)
    for name, weight in expected["model"].items():
        if "linear" in name and name.endswith("weight"):
            error = (found["model"][name] - weight).square().mean().sqrt()
            assert error < 0.02 * MUON.lr * UPDATE_RMS, f"{name}: {error:.1e}"
        else:
            torch.testing.assert_close(found["model"][name], weight, atol=1e-4, rtol=1e-3)


@pytest.mark.slow
def test_layout_and_resume_change_nothing(tmp_path: Path) -> None:
    one = run_on_ranks(1, layout_cases, tmp_path / "1")[0]
    first, second = run_on_ranks(2, layout_cases, tmp_path / "2")
    resumed = [(ranks["whole"], ranks["parts"]) for ranks in (one, first, second)]
    for whole, parts in [*resumed, (one["bf16 whole"], one["bf16 parts"])]:
        assert parts["losses"] == whole["losses"][-len(parts["losses"]) :]
        assert _equal(parts["model"], whole["model"])
        assert _equal(parts["ema"], whole["ema"])
    for case in ("whole", "mixed"):
        assert first[case]["losses"] == second[case]["losses"]
        assert _equal(first[case]["model"], second[case]["model"])
        check_same_steps(first[case], one["whole"])


def test_four_ranks_of_tp_and_dp(tmp_path: Path) -> None:
    one = run_on_ranks(1, train_and_save, 1, tmp_path / "1", 3, True, "float32", "muon")[0]
    for result in run_on_ranks(4, train_and_save, 2, tmp_path / "4", 3, True, "float32", "muon"):
        check_same_steps(result, one)


def gap(rank: int, world_size: int) -> str:
    from sorahpc.distributed import megatron

    mesh = megatron.start(rank, world_size)
    main = torch.zeros(12, requires_grad=True)
    try:
        Muon([Matrix((4, 4), 0, (1, 1), main, 0, 12)], mesh, torch.float32)
    except ValueError as error:
        return str(error)
    finally:
        megatron.stop()
    return "accepted"


def test_slices_that_do_not_make_up_their_matrix_are_refused() -> None:
    assert run_on_ranks(1, gap) == ["muon: slices [(0, 12)] don't make up a matrix of (4, 4)"]
