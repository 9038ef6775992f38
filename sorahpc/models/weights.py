"""The files of a model's folder: its config.json, its safetensors, whole or in shards, and their hash."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from sorahpc.errors import ConfigError

MAX_JSON_BYTES = 64 << 20  # an index of shards is some hundred kB; more is not ours


def read_config(path: Path, where: str) -> dict[str, Any]:
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise ConfigError(f"{where}: {path} is larger than {MAX_JSON_BYTES} bytes")
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or f"not JSON ({error})"
        raise ConfigError(f"{where}: can't read {path}: {reason}") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{where}: {path} holds {type(value).__name__}, a mapping expected")
    return value


def weight_files(folder: Path, name: str, where: str) -> list[Path]:
    """The safetensors files of a model folder: `name`, or the shards that `name`.index.json lists.

    Raises:
        ConfigError: naming `where` (the dotted key of the folder) and the file that is missing.
    """
    index = folder / f"{name}.index.json"
    if (folder / name).is_file():
        if index.is_file():  # diffusers would read the one, transformers the other
            raise ConfigError(f"{where}: {folder} holds {name} and {index.name}: one of them expected; move one away")
        return [folder / name]
    if not index.is_file():
        raise ConfigError(f"{where}: no {name} in {folder}; weights are read from safetensors only")
    weight_map = read_config(index, where).get("weight_map")
    names = sorted(set(weight_map.values())) if isinstance(weight_map, dict) else []
    for shard in names:
        if not isinstance(shard, str) or Path(shard).name != shard or not (folder / shard).is_file():
            raise ConfigError(f"{where}: {index} lists {shard!r}, which is no file in {folder}")
    if not names:
        raise ConfigError(f"{where}: {index} lists no weights")
    return [folder / shard for shard in names]


def sha256_files(paths: list[Path]) -> str:
    """Hex sha256 of the files' bytes, one after the other."""
    digest = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as f:
            while block := f.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()
