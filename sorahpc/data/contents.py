"""What is in a finished cache: its samples, their distributions, and a clip as it would be decoded."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import ValidationError

from sorahpc.config import VaeConfig
from sorahpc.data.cache import (
    INFO,
    check_info,
)
from sorahpc.data.latents import LatentCache
from sorahpc.data.manifest import shown
from sorahpc.data.shards import read_shard
from sorahpc.data.texts import DETAILED
from sorahpc.errors import DataError
from sorahpc.models.lengths import Lengths

READ_AT_ONCE_BYTES = 64 << 20


def list_samples(folder: Path) -> list[dict[str, Any]]:
    """A row a sample: key, shard, shape (C,T,H,W), frames (of the clip), duration_s, tokens, text_len, caption,
    detailed, source, decoder (who read the clip: "pyav" or "dali").

    `tokens` is of patches of `patch_t` latent frames (1 where cache.json has none) and `patch_hw`; `frames` and
    `duration_s` are the clip's, as it was encoded.

    Raises:
        DataError: no finished cache here, or a shard of DALI's is damaged.
    """
    cache = LatentCache(folder)
    (stride_t, *_), (ph, pw) = (_ints(folder, cache.info, name, n) for name, n in (("stride", 3), ("patch_hw", 2)))
    pt = cache.info.get("patch_t") or 1
    if type(pt) is not int or pt < 1:
        raise DataError(f"{shown(folder / INFO)}: field `patch_t`: expected a size or null, found {pt!r}")
    restart = cache.info.get("restart_frames")
    if restart is not None and (type(restart) is not int or restart < 1 or (restart - 1) % stride_t):
        raise DataError(
            f"{shown(folder / INFO)}: field `restart_frames`: expected {stride_t}k+1 frames or null, found {restart!r}"
        )
    lengths = Lengths(stride_t, stride_t, restart)
    by = _decoders(folder, cache)
    rows = []
    for i, key in enumerate(cache.keys):
        c, t, h, w = (int(v) for v in cache.shapes[i])
        frames = lengths.clip(t)
        rows.append(
            {
                "key": key, "shard": cache.index.shards[cache.index.shard_of[i]], "shape": [c, t, h, w],
                "frames": frames, "duration_s": frames / float(cache.fps[i]),
                "tokens": (t // pt) * (h // ph) * (w // pw), "text_len": int(cache.text_lens[i]),
                "caption": cache.captions[i], "detailed": cache.detailed[i], "source": cache.sources[i],
                "decoder": by.get(key, "pyav"),
            }
        )  # fmt: skip
    return rows


def _decoders(folder: Path, cache: LatentCache) -> dict[str, str]:
    """Who read each clip of a cache that was made with DALI, which leaves to PyAV what it can't read. Training doesn't
    ask, so the index leaves it out: a look into each shard."""
    if cache.info.get("decoder", "pyav") == "pyav":
        return {}
    shards = (read_shard(folder / name, cache.channels, cache.dims, cache.dtype) for name in cache.index.shards)
    return {row["key"]: row["decoder"] for shard in shards for row in shard.rows}


def _ints(folder: Path, info: dict[str, Any], name: str, length: int) -> list[int]:
    value = info.get(name)
    if not (isinstance(value, list) and len(value) == length and all(type(v) is int and v >= 1 for v in value)):
        raise DataError(f"{shown(folder / INFO)}: field `{name}`: expected {length} sizes, found {value!r}")
    return value


def stats(folder: Path, read: int) -> dict[str, Any]:
    """How much there is, how it is distributed, what it takes on disk, and whether normalising makes it normal.

    Args:
        read: read this many samples, spread evenly over the cache, for their mean and std after normalising; all of
            them if there are fewer. Of all samples they are 0 and 1 to rounding; of some, near that.

    Returns:
        samples, shards, bytes_on_disk (of shards), latent_bytes, text_bytes, disk_ratio (bytes on disk over latents
        and unpadded text); of frames, duration_s, tokens, aspect and text_len: min, p10, median, mean, p90, max;
        shapes: numbers by TxHxW; normalised: samples read, mean and std a channel.

    Raises:
        DataError: no finished cache here, or a sample that is read is damaged.
    """
    rows, cache = list_samples(folder), LatentCache(folder)
    values = {name: [row[name] for row in rows] for name in ("frames", "duration_s", "tokens", "text_len")}
    values["aspect"] = [row["shape"][3] / row["shape"][2] for row in rows]
    latent = int(2 * cache.shapes.prod(axis=1).sum())
    text = sum(
        int(2 * at.length.sum() * cache.dims[name.removeprefix(DETAILED)]) for name, at in cache.index.texts.items()
    )
    disk = sum((folder / name).stat().st_size for name in cache.index.shards)
    shapes = Counter("x".join(map(str, row["shape"][1:])) for row in rows)
    return {
        "samples": len(rows),
        "shards": len(cache.index.shards),
        "bytes_on_disk": disk,
        "latent_bytes": latent,
        "text_bytes": text,
        "disk_ratio": disk / (latent + text),
        **{name: _distribution(v) for name, v in values.items()},
        "shapes": dict(shapes.most_common()),
        "normalised": _normalised(cache, min(read, len(cache))),
    }


def _distribution(values: list[float]) -> dict[str, float]:
    low, p10, median, p90, high = np.quantile(np.array(values, np.float64), [0, 0.1, 0.5, 0.9, 1]).tolist()
    return {"min": low, "p10": p10, "median": median, "mean": float(np.mean(values)), "p90": p90, "max": high}


def _normalised(cache: LatentCache, count: int) -> dict[str, Any]:
    total, squares, values = (torch.zeros(cache.channels, dtype=torch.float64) for _ in range(3))
    mean, std = cache.mean[:, None], cache.std[:, None]
    todo = [i * len(cache) // count for i in range(count)]
    while todo:
        batch = [todo.pop()]
        while todo and cache.nbytes([*batch, todo[-1]]) <= READ_AT_ONCE_BYTES:
            batch.append(todo.pop())
        for latent, _ in cache.read_bits(batch, torch.empty(cache.nbytes(batch), dtype=torch.uint8)):
            x = ((latent.flatten(1).float() - mean) / std).double()
            total, squares, values = total + x.sum(1), squares + x.square().sum(1), values + x.shape[1]
    m = total / values
    return {"samples": count, "mean": m.tolist(), "std": (squares / values - m**2).clamp(min=0).sqrt().tolist()}


def show(folder: Path, key: str, vae_path: Path, out: Path) -> dict[str, Any]:
    """Decode a sample back to an mp4 file.

    Args:
        vae_path: folder of the autoencoder that the cache was made with; it decodes in the dtype that it encoded in,
            and in the same tiles and chunks: a clip that is too large to be encoded whole is so to be decoded.

    Returns:
        The sample's row of `list_samples`, and path.

    Raises:
        DataError: no such sample, or another autoencoder. ConfigError: no autoencoder there.
    """
    from sorahpc.data.mp4 import write_mp4
    from sorahpc.models.vae import load_vae

    cache = LatentCache(folder)
    if key not in cache.keys:
        raise DataError(f"{shown(folder)}: no sample {shown(key)} among {len(cache)}; see `sorahpc cache ls`")
    i = cache.keys.index(key)
    latent, _ = cache.read(i)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    vae_dtype, tiling = cache.info.get("vae_dtype", "float32"), cache.info.get("tiling")
    try:
        how = VaeConfig.model_validate({"path": vae_path, "dtype": vae_dtype, "tiling": tiling})
    except ValidationError as error:
        raise DataError(
            f"{shown(folder / INFO)}: fields `vae_dtype` and `tiling`: {vae_dtype!r} and {tiling!r} are not what "
            f"`encode` writes ({error.error_count()} faults); see `sorahpc cache verify`"
        ) from None
    vae = load_vae(how.path, how.dtype, device, how.tiling)
    check_info(folder / INFO, cache.info, {"vae": vae.identity})
    write_mp4(out, vae.decode(latent), float(cache.fps[i]))
    return {**list_samples(folder)[i], "path": str(out.absolute())}
