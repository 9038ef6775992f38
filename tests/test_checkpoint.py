"""Checkpoints: committed whole, verified before anything is unpickled, loaded on any layout."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_on_ranks
from test_parallel_parity import CHANNELS, MODEL, TEXT_DIM, TRAIN, _batch, _wake, _whole, as_pack

from sorahpc.config import Config
from sorahpc.distributed import checkpoint
from sorahpc.distributed.checkpoint import MANIFEST, Meta, check_files
from sorahpc.errors import CheckpointError


def _meta(step: int) -> Meta:
    config = Config(run="x", model=MODEL, train=TRAIN).model_dump(mode="json")
    return Meta(
        step, 10 * step, config, CHANNELS, TEXT_DIM, [0.0] * CHANNELS, [1.0] * CHANNELS, 7, {}, {"tp": 1, "dp": 1}
    )


def train_and_save(
    rank: int,
    world_size: int,
    tp: int,
    root: Path,
    steps: int,
    start: bool,
    dtype: str = "float32",
    name: str = "adamw",
) -> dict[str, Any]:
    """From scratch or from the newest checkpoint: train, save, and return whole parameters, EMA and losses."""
    from sorahpc.distributed import megatron
    from sorahpc.distributed.ema import Ema
    from sorahpc.jobs.train import accumulate_gradients
    from sorahpc.models.dit import DiT

    mesh = megatron.start(rank, world_size, tp=tp, sp=True)
    torch_dtype = getattr(torch, dtype)
    model = DiT(MODEL, mesh, channels=CHANNELS, text_dim=TEXT_DIM, dtype=torch_dtype)
    _wake(model)  # every parameter has a gradient, and a moment to lose, from the first step
    ddp = megatron.wrap_ddp(model, model.config)
    train = TRAIN.model_copy(update={"optimizer": name, "weight_decay": 0.1})
    optimizer = megatron.make_optimizer(ddp, train, mesh, torch_dtype)
    ema = Ema(model, optimizer, mesh, 0.9)
    step = 0
    if not start:
        folder = checkpoint.latest(root)
        assert folder is not None
        step = checkpoint.verify(folder, mesh).step
        checkpoint.load(folder, model, optimizer, ema, mesh)
    losses = []
    end = step + steps
    for step in range(step, end):  # noqa: B020 - goes on from the resumed step
        packs = []
        for i in range(2):  # two packs a step, shared out over dp
            batch = _batch(2 * step + i)
            target = torch.randn(batch["tokens"].shape, generator=torch.Generator().manual_seed(step))
            packs.append(as_pack(batch, target))
        elements = sum(p.tokens.numel() for p in packs)
        share = 2 // mesh.dp_size
        losses.append(accumulate_gradients(ddp, packs[mesh.dp_rank * share :][:share], elements, mesh))
        norm = megatron.gradient_norm(optimizer)
        megatron.clip_and_step(optimizer, norm, 1.0)
        ema.update()
    checkpoint.save(root, _meta(end), model, optimizer, ema, mesh, keep=2)
    averages = ema.gather()
    result = {
        "losses": losses,
        "model": {n: _whole(p.detach(), p, mesh) for n, p in model.named_parameters()},
        "ema": {n: _whole(averages[n], p, mesh) for n, p in model.named_parameters()},
    }
    return result


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    root = tmp_path_factory.mktemp("saved")
    result = run_on_ranks(1, train_and_save, 1, root, 4, True)[0]
    return root, result


def _equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


def test_resume_is_bit_equal(saved: Any, tmp_path: Path) -> None:
    _, result = saved
    run_on_ranks(1, train_and_save, 1, tmp_path, 2, True)
    resumed = run_on_ranks(1, train_and_save, 1, tmp_path, 2, False)[0]
    assert resumed["losses"] == result["losses"][2:]
    assert _equal(resumed["model"], result["model"])
    assert _equal(resumed["ema"], result["ema"])


def test_another_layout_resumes_with_the_same_weights(saved: Any, tmp_path: Path) -> None:
    """tp2 -> dp2 -> tp1: losses follow the uninterrupted run to float32 accuracy."""
    _, result = saved
    run_on_ranks(2, train_and_save, 2, tmp_path, 2, True)
    first = run_on_ranks(2, train_and_save, 1, tmp_path, 1, False)
    assert first[0]["losses"] == first[1]["losses"] == pytest.approx(result["losses"][2:3], rel=1e-5)
    assert _equal(first[0]["model"], first[1]["model"])
    last = run_on_ranks(1, train_and_save, 1, tmp_path, 1, False)[0]
    assert last["losses"] == pytest.approx(result["losses"][3:4], rel=1e-5)
    for name, expected in result["ema"].items():
        torch.testing.assert_close(last["ema"][name], expected, atol=1e-5, rtol=1e-4)


def bf16_cases(rank: int, world_size: int, root: Path) -> list[dict[str, Any]]:
    whole = train_and_save(rank, world_size, 1, root / "a", 3, True, "bfloat16")
    train_and_save(rank, world_size, 1, root / "b", 2, True, "bfloat16")
    return [whole, train_and_save(rank, world_size, 1, root / "b", 1, False, "bfloat16")]


def test_bf16_keeps_float32_masters_and_resumes_bit_equal(tmp_path: Path) -> None:
    whole, resumed = run_on_ranks(1, bf16_cases, tmp_path)[0]
    assert resumed["losses"] == whole["losses"][2:]
    assert _equal(resumed["model"], whole["model"])
    assert _equal(resumed["ema"], whole["ema"])
    assert resumed["ema"]["x_embed.weight"].dtype == torch.float32


def test_sampling_loads_the_average_not_the_weights(saved: Any) -> None:
    from sorahpc.distributed import megatron
    from sorahpc.models.dit import load_ema_for_sampling

    root, result = saved
    model, meta = load_ema_for_sampling(checkpoint.latest(root))
    try:
        assert meta.step == 4
        assert not model.training
        assert _equal(dict(model.named_parameters()), result["ema"])
        assert not _equal(result["model"], result["ema"])
    finally:
        megatron.stop()


def test_only_the_newest_are_kept_and_latest_names_the_last(tmp_path: Path, saved: Any) -> None:
    root, _ = saved
    for step in (1, 2, 3):
        shutil.copytree(checkpoint.latest(root), tmp_path / f"step-{step:08d}")
    (tmp_path / ".stage-00000009").mkdir()  # what a killed save leaves
    assert [p.name for p in checkpoint.committed(tmp_path)] == ["step-00000001", "step-00000002", "step-00000003"]
    assert checkpoint.latest(tmp_path) == tmp_path / "step-00000003"
    assert (root / "latest").read_text() == "step-00000004\n"


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def _truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


@pytest.mark.parametrize("harm", [_flip, _truncate, Path.unlink])
@pytest.mark.parametrize("name", [".metadata", "common.pt", "__0_0.distcp", "meta.json", "metadata.json"])
def test_an_altered_file_is_refused_by_name(
    saved: Any, tmp_path: Path, harm: Callable[[Path], None], name: str
) -> None:
    folder = Path(shutil.copytree(checkpoint.latest(saved[0]), tmp_path / "step-00000004"))
    check_files(folder)
    harm(folder / name)
    with pytest.raises(CheckpointError, match=f"{name}: .*refused"):
        check_files(folder)


def test_an_extra_file_a_symlink_and_a_bad_manifest_are_refused(saved: Any, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(checkpoint.latest(saved[0]), tmp_path / "step-00000004"))
    (folder / "extra").write_text("")
    with pytest.raises(CheckpointError, match="extra: not in the manifest"):
        check_files(folder)
    (folder / "extra").unlink()
    real = folder / "common.pt"
    real.rename(tmp_path / "elsewhere")
    real.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match=r"common\.pt: not a regular file"):
        check_files(folder)
    (folder / MANIFEST).write_text("[1")
    with pytest.raises(CheckpointError, match=MANIFEST):
        check_files(folder)
    (folder / MANIFEST).unlink()
    assert checkpoint.latest(tmp_path) == folder, "it is refused, not passed over for an older one"
    with pytest.raises(CheckpointError, match=MANIFEST):
        check_files(folder)


class _Payload:
    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.canary),)


def _plant(folder: Path, name: str, payload: bytes) -> None:
    """Replace a file and make the manifest agree, as an attacker would."""
    import hashlib

    (folder / name).write_bytes(payload)
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["files"][name] = {"sha256": hashlib.sha256(payload).hexdigest(), "bytes": len(payload)}
    (folder / MANIFEST).write_text(json.dumps(manifest))


@pytest.mark.parametrize("name", [".metadata", "common.pt"])
def test_a_pickle_that_would_run_code_is_refused_unrun(saved: Any, tmp_path: Path, name: str) -> None:
    folder = Path(shutil.copytree(checkpoint.latest(saved[0]), tmp_path / "step-00000004"))
    canary = tmp_path / "canary"
    payload = pickle.dumps(_Payload(canary))
    if name == "common.pt":
        torch.save(_Payload(canary), tmp_path / "evil.pt")
        payload = (tmp_path / "evil.pt").read_bytes()
    _plant(folder, name, payload)
    with pytest.raises(CheckpointError, match=f"{name}: .*refused"):
        check_files(folder)
    assert not canary.exists()


def test_a_shard_entry_that_torch_would_unpickle_is_refused_unrun(saved: Any, tmp_path: Path) -> None:
    from torch.distributed.checkpoint.metadata import BytesStorageMetadata

    folder = Path(shutil.copytree(checkpoint.latest(saved[0]), tmp_path / "step-00000004"))
    canary = tmp_path / "canary"
    torch.save(_Payload(canary), tmp_path / "evil.pt")
    evil = (tmp_path / "evil.pt").read_bytes()
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    index, info = next(iter(metadata.storage_data.items()))
    metadata.state_dict_metadata[index.fqn] = BytesStorageMetadata()
    shard = folder / info.relative_path
    info.offset, info.length = shard.stat().st_size, len(evil)
    _plant(folder, info.relative_path, shard.read_bytes() + evil)
    _plant(folder, ".metadata", pickle.dumps(metadata))
    with pytest.raises(CheckpointError, match="not safe to load"):
        check_files(folder)
    assert not canary.exists()


def test_another_model_is_refused_by_field() -> None:
    other = MODEL.model_copy(update={"depth": 3})
    with pytest.raises(CheckpointError, match=r"model\.depth: the checkpoint .* has 2, this run 3"):
        checkpoint.check_model(_meta(1), other, CHANNELS, {"text": TEXT_DIM}, Path("c"))
    with pytest.raises(CheckpointError, match="latent channels: the checkpoint c has 6, this run 16"):
        checkpoint.check_model(_meta(1), MODEL, 16, {"text": TEXT_DIM}, Path("c"))
