"""Small latent caches for tests."""

from __future__ import annotations

from pathlib import Path

import torch

from sorahpc.data.cache import build_index, pin_info, plan_shards
from sorahpc.data.shards import ShardWriter, write_empty_text

C, D = 4, 8
SHAPES = [(C, 3, 8, 8), (C, 1, 6, 10), (C, 5, 10, 6), (C, 3, 8, 8), (C, 2, 1, 1)]


def info(dtype: str = "float16") -> dict:
    """A cache.json."""
    return {
        "vae": {"id": "V", "weights_sha256": "a" * 64},
        "text": {"id": "T", "weights_sha256": "b" * 64},
        "dtype": dtype,
        "channels": C,
        "text_dim": D,
        "stride": [4, 8, 8],
        "patch_hw": [1, 1],
        "clip": {"fps": 8.0, "max_frames": 17},
    }


def samples(count: int = 10) -> list[tuple]:
    """Arguments of ShardWriter.add: clips of five shapes."""
    g = torch.Generator().manual_seed(0)
    out = []
    for i in range(count):
        latent = torch.randn(SHAPES[i % len(SHAPES)], generator=g) * 2 + torch.arange(C)[:, None, None, None]
        text = torch.randn(1 + i % 3, D, generator=g)
        out.append(
            (f"{(i + 1) * 0x9E3779B97F4A7C15 % 2**64:016x}", latent, text, f"clip {i} ü🎈", 8.0, f"/videos/{i}.mp4")
        )
    return out


def write(folder: Path, dtype: str = "float16", count: int = 10, per_shard: int = 4) -> list[tuple]:
    """A finished cache of `samples(count)`, which are returned."""
    rows = samples(count)
    pin_info(folder, info(dtype))
    write_empty_text(folder, torch.ones(1, D), dtype)
    plan = plan_shards([r[0] for r in rows], per_shard)
    for shard in plan:
        writer = ShardWriter(folder, shard.name, dtype, C, D)
        for i in shard.rows:
            writer.add(*rows[i])
        writer.commit()
    assert build_index(folder, [s.name for s in plan]).samples == count
    return rows
