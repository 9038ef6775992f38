"""Checkpoints: committed whole or not at all, verified before anything in them is unpickled.

    checkpoints/
        step-00000500/
            *.distcp .metadata common.pt metadata.json    Megatron's shards: model, EMA, optimizer
            meta.json                                     step, samples consumed, config, cache, latent statistics
            MANIFEST.json                                 sha256 and size of every other file
        latest                                            name of the newest committed folder

Committing: write into a stage folder, hash, write the manifest, fsync every file and the folder, rename, fsync the
parent, replace `latest`, and only then prune. A crash leaves the old state or the new, and a stage folder that the
next save removes.

Megatron's format holds pickles. A checkpoint is refused unless every file matches the manifest and every pickle in it
names nothing beyond an allow-list; torch.save parts are read by torch's own weights-only unpickler first.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import re
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from sorahpc.config import ModelConfig
from sorahpc.distributed import megatron
from sorahpc.distributed.ema import Ema
from sorahpc.distributed.mesh import Mesh
from sorahpc.errors import CheckpointError, SetupError
from sorahpc.runs import atomic_write, fsync_dir, write_json

FORMAT = 1
MANIFEST = "MANIFEST.json"
META = "meta.json"
_NAME = re.compile(r"step-\d{8,}")


@dataclass(frozen=True)
class Meta:
    """What a checkpoint is: enough to rebuild the model and to refuse a cache or an encoder that is not its own."""

    step: int
    consumed: int  # samples of the stream
    config: dict[str, Any]  # resolved
    channels: int
    text_dim: int
    latent_mean: list[float]
    latent_std: list[float]
    samples: int  # in the cache it was trained on
    cache: dict[str, Any]  # the cache's cache.json: VAE and text encoder with their weights' sha256
    world: dict[str, int]  # layout that wrote it
    clip_text_dim: int = 0  # 0 without CLIP
    clip_pooled_dim: int = 0
    format: int = FORMAT


# ---------------------------------------------------------------------------------------------------------------------
# Commit


def save(root: Path, meta: Meta, model: nn.Module, optimizer: Any, ema: Ema, mesh: Mesh, *, keep: int) -> Path:
    """Write and commit a checkpoint. Collective.

    Args:
        root: the run's `checkpoints/`.
        keep: newest checkpoints that stay.

    Returns:
        The committed folder.
    """
    final = root / f"step-{meta.step:08d}"
    stage = root / f".stage-{meta.step:08d}"
    if mesh.rank == 0:
        root.mkdir(parents=True, exist_ok=True)
        for left_over in root.glob(".stage-*"):
            shutil.rmtree(left_over)
        stage.mkdir()
    dist.barrier()
    megatron.save_sharded(_state(model, optimizer, ema, mesh, loading=False), stage)
    dist.barrier()  # every rank's shards are written
    if mesh.rank == 0:
        _commit(stage, final, meta, keep)
    dist.barrier()
    return final


def _commit(stage: Path, final: Path, meta: Meta, keep: int) -> None:
    root = final.parent
    try:
        write_json(stage / META, asdict(meta))
        files = {p.name: {"sha256": _sha256(p), "bytes": p.stat().st_size} for p in sorted(stage.iterdir())}
        write_json(stage / MANIFEST, {"format": FORMAT, "files": files})
        for path in stage.iterdir():
            _fsync(path)
        fsync_dir(stage)
        if final.exists():  # a resumed run reached this step again; the old one was refused or is the same
            shutil.rmtree(final)
        os.rename(stage, final)
        fsync_dir(root)
        atomic_write(root / "latest", final.name + "\n")
        for old in committed(root)[:-keep]:
            shutil.rmtree(old)
    except OSError as error:
        raise SetupError(
            f"{final}: the checkpoint can't be written: {error.strerror}; the ones before it are kept; free space or "
            f"move runs_dir, and start the job again"
        ) from None


def committed(root: Path) -> list[Path]:
    """Committed checkpoint folders, oldest first. A folder gets its name with its manifest inside, never before."""
    if not root.is_dir():
        return []
    return sorted(p for p in root.iterdir() if _NAME.fullmatch(p.name))


def latest(root: Path) -> Path | None:
    """The newest committed checkpoint under `root`, or None. `latest` is for people; a commit does not depend on it."""
    return found[-1] if (found := committed(root)) else None


def _state(model: nn.Module, optimizer: Any, ema: Ema, mesh: Mesh, *, loading: bool) -> dict[str, Any]:
    sharded = megatron.sharded_parameters(model, mesh, "model")
    averages = ema.gather()
    return {
        **sharded,
        **{
            f"ema.{name}": megatron.replace_data(sharded[f"model.{name}"], f"ema.{name}", averages[name])
            for name in averages
        },
        "optimizer": megatron.optimizer_state(optimizer, sharded, loading=loading),
    }


def _sha256(path: Path) -> str:
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def _fsync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


# ---------------------------------------------------------------------------------------------------------------------
# Load


def load(folder: Path, model: nn.Module, optimizer: Any, ema: Ema, mesh: Mesh) -> None:
    """Restore weights, EMA and optimizer of a checkpoint that `verify` has passed, on any layout. Collective."""
    state = megatron.load_sharded(_state(model, optimizer, ema, mesh, loading=True), folder)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(state[f"model.{name}"])
    ema.load({name: state[f"ema.{name}"] for name in ema.names.values()})
    optimizer.load_state_dict(state["optimizer"])


def load_ema(folder: Path, model: nn.Module, mesh: Mesh) -> None:
    """Fill a float32 model with the averaged weights of a checkpoint that `verify` has passed. Collective."""
    state = megatron.load_sharded(megatron.sharded_parameters(model, mesh, "ema"), folder)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(state[f"ema.{name}"])


def verify(folder: Path, mesh: Mesh) -> Meta:
    """Check a checkpoint before it is loaded; rank 0 reads it all, and every rank gets the verdict. Collective."""
    verdict: list[Any] = [None]
    if mesh.rank == 0:
        try:
            verdict = [check_files(folder)]
        except CheckpointError as error:
            verdict = [str(error)]
    if dist.get_world_size() > 1:
        dist.broadcast_object_list(verdict, src=0)
    if isinstance(verdict[0], str):
        raise CheckpointError(verdict[0])
    return verdict[0]


def check_files(folder: Path) -> Meta:
    """Compare every file with the manifest, and refuse pickles that name anything unexpected.

    Raises:
        CheckpointError: with the file, what was expected, and what was found.
    """
    manifest = _read_json(folder / MANIFEST)
    files = manifest.get("files") if isinstance(manifest, dict) else None
    if not isinstance(files, dict) or manifest.get("format") != FORMAT:
        raise CheckpointError(
            f"{folder / MANIFEST}: not a manifest of checkpoint format {FORMAT}; the checkpoint is refused"
        )
    present = {p.name for p in folder.iterdir()} - {MANIFEST}
    for name in sorted(present ^ set(files)):
        what = "missing" if name in files else "not in the manifest"
        raise CheckpointError(f"{folder / name}: {what}; the checkpoint is refused")
    for name, entry in files.items():
        path = folder / name
        if path.is_symlink() or not path.is_file():
            raise CheckpointError(f"{path}: not a regular file; the checkpoint is refused")
        size = path.stat().st_size
        if size != entry["bytes"]:
            raise CheckpointError(f"{path}: expected {entry['bytes']} bytes, found {size}; the checkpoint is refused")
        if _sha256(path) != entry["sha256"]:
            raise CheckpointError(f"{path}: content differs from its sha256 in {MANIFEST}; the checkpoint is refused")
    _check_pickles(folder)
    meta = _read_json(folder / META)
    try:
        return Meta(**meta)
    except TypeError as error:
        raise CheckpointError(f"{folder / META}: {error}; the checkpoint is refused") from None


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise CheckpointError(f"{path}: can't be read: {reason}; the checkpoint is refused") from None


# What the metadata of torch's distributed checkpoints is made of: dataclasses, enums, sizes and dtypes.
_ALLOWED = {
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.planner": {"SavePlan", "TensorWriteData", "WriteItem", "WriteItemType"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size", "float32", "bfloat16", "float16", "float64", "int64", "int32"},
    "collections": {"OrderedDict"},
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name in _ALLOWED.get(module, ()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"names {module}.{name}")


def _check_pickles(folder: Path) -> None:
    try:
        with open(folder / ".metadata", "rb") as f:
            metadata = _Unpickler(f).load()
    except (OSError, pickle.UnpicklingError, EOFError, AttributeError, ValueError, TypeError, IndexError) as error:
        raise CheckpointError(f"{folder / '.metadata'}: {error}; the checkpoint is refused") from None
    parts: list[tuple[str, Any]] = [("common.pt", None)]
    for index, info in metadata.storage_data.items():
        if "/" in info.relative_path or not (folder / info.relative_path).is_file():
            raise CheckpointError(
                f"{folder / '.metadata'}: points at {info.relative_path!r}, not a file of it; the checkpoint is refused"
            )
        if not isinstance(metadata.state_dict_metadata.get(index.fqn), TensorStorageMetadata):
            parts.append((info.relative_path, info))  # torch reads tensors weights-only, but other entries with pickle
    for name, info in parts:
        path = folder / name
        data = path.read_bytes() if info is None else _slice(path, info.offset, info.length)
        try:
            torch.load(io.BytesIO(data), weights_only=True, map_location="cpu")
        except Exception as error:  # whatever a hostile file provokes in the reader
            reason = str(error).splitlines()[0][:200]
            raise CheckpointError(f"{path}: not safe to load: {reason}; the checkpoint is refused") from None


def _slice(path: Path, offset: int, length: int) -> bytes:
    with open(path, "rb") as f:
        f.seek(offset)
        return f.read(length)


def check_model(meta: Meta, model: ModelConfig, channels: int, dims: Mapping[str, int], folder: Path) -> None:
    """Refuse a checkpoint of another model, by field. Raises CheckpointError."""
    now = {f"model.{name}": value for name, value in model.model_dump(mode="json").items()}
    before = {f"model.{name}": value for name, value in meta.config["model"].items()}
    now |= {"latent channels": channels, "text dim": dims["text"]}
    now |= {"CLIP text dim": dims.get("clip_text", 0), "CLIP pooled dim": dims.get("clip_pooled", 0)}
    before |= {"latent channels": meta.channels, "text dim": meta.text_dim}
    before |= {"CLIP text dim": meta.clip_text_dim, "CLIP pooled dim": meta.clip_pooled_dim}
    for field, value in now.items():
        if before.get(field) != value:
            raise CheckpointError(
                f"{field}: the checkpoint {folder} has {before.get(field)}, this run {value}; "
                f"use the checkpoint's, or another run name"
            )
