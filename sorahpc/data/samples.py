"""A sample as a shard stores it: its values, its captions, and where its pieces lie."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from sorahpc.data.manifest import shown
from sorahpc.data.texts import DETAILED, TEXTS
from sorahpc.errors import DataError

MAX_CAPTION_CHARS = 16_384
MAX_SIDE = 1 << 20  # of a latent axis, so that products stay far inside int64
KEY = re.compile(r"[0-9a-f]{16}")
BITS = {"float16": "<f2", "bfloat16": "<u2"}  # how values are stored; bf16 as its bits


def clean_caption(text: str) -> str:
    """A caption as it is stored and embedded: valid UTF-8, control characters as spaces, at most MAX_CAPTION_CHARS."""
    text = text.encode("utf-8", "replace").decode("utf-8")
    return "".join(c if c.isprintable() else " " for c in text[:MAX_CAPTION_CHARS]).strip()


def to_bits(x: torch.Tensor, dtype: str, what: str) -> np.ndarray:
    """float32 -> '<f2', or bf16 as '<u2'. Raises DataError for what doesn't fit."""
    if not bool(torch.isfinite(x).all()):
        raise DataError(f"{what} has values that are not finite")
    rounded = x.to(getattr(torch, dtype))
    if not bool(torch.isfinite(rounded).all()):
        raise DataError(
            f"{what} reaches {x.abs().max().item():.6g}, beyond the range of encode.dtype={dtype}"
            + ("; use encode.dtype=bfloat16" if dtype == "float16" else "")
        )
    rounded = rounded.contiguous()
    if dtype == "float16":
        return rounded.numpy().astype("<f2", copy=False)
    return rounded.view(torch.int16).numpy().view(np.uint16).astype("<u2", copy=False)


def sums_of(z: np.ndarray, dtype: str) -> dict[str, Any]:
    """sum, sumsq and count of a `Sample`: of the values as stored, since training sees those. In float64 they are good
    to 1e-9 for any clip."""
    stored = from_bits(z.tobytes(), dtype).reshape(z.shape).double().flatten(1)
    return {"sum": stored.sum(1).numpy(), "sumsq": stored.square().sum(1).numpy(), "count": stored.shape[1]}


def from_bits(data: bytes | bytearray, dtype: str) -> torch.Tensor:
    """Little-endian bytes of fp16 or bf16 -> float32, flat."""
    writable = data if isinstance(data, bytearray) else bytearray(data)
    return torch.frombuffer(writable, dtype=getattr(torch, dtype)).float()


@dataclass(frozen=True)
class Sample:
    """A clip as a shard stores it, its big arrays perhaps not in memory.

    Attributes:
        key, caption, detailed, fps, source, decoder: as of `ShardWriter.pack`; captions clean, source as shown.
        shape: of the latent, [C,T,H,W]; lengths: rows of each text that it has, by name.
        crc: crc32 of the bytes of `latent` and of each text.
        sum, sumsq: float64 [C], of the latent as stored; count: values a channel.
        bits: by name, ``"latent"`` or a text's, the array: '<f2', or bf16 as '<u2'.
    """

    key: str
    caption: str
    detailed: str
    fps: float
    source: str
    decoder: str
    shape: tuple[int, ...]
    lengths: dict[str, int]
    crc: dict[str, int]
    sum: np.ndarray
    sumsq: np.ndarray
    count: int
    bits: Callable[[str], np.ndarray] = field(repr=False)


def rejection(key: str, source: str, reason: str) -> dict[str, str]:
    """What is kept of a clip that can't be encoded."""
    return {"key": key, "source": shown(source), "reason": clean_caption(reason)}


def pieces_of(dims: Mapping[str, int]) -> list[str]:
    """Names of all texts that a sample may have in a cache whose texts have these dims."""
    return [prefix + name for prefix in ("", DETAILED) for name in TEXTS if name in dims]


def text_pieces(row: Mapping[str, Any]) -> list[tuple[str, int, int, int]]:
    """(name, offset, length, crc32) of the texts that a sample has, by its row of the index; length in rows of dim."""
    names = [prefix + name for prefix in ("", DETAILED) for name in TEXTS if row.get(f"{prefix}{name}_len")]
    return [(name, row[f"{name}_offset"], row[f"{name}_len"], row[f"{name}_crc32"]) for name in names]


def pieces(row: Mapping[str, Any], dims: Mapping[str, int]) -> list[tuple[str, int, int, int]]:
    """(name, offset, number of bytes, crc32) of all that a sample has, its latent first, by its row of the index."""
    nbytes = 2 * row["channels"] * row["frames"] * row["height"] * row["width"]
    texts = [(name, at, 2 * n * dims[name.removeprefix(DETAILED)], crc) for name, at, n, crc in text_pieces(row)]
    return [("latent", row["latent_offset"], nbytes, row["latent_crc32"]), *texts]
