"""Small latent caches for tests."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from sorahpc.data import cache
from sorahpc.data.cache import build_index, pin_info, plan_shards
from sorahpc.data.latents import LatentCache
from sorahpc.data.seal import sealed_parquet
from sorahpc.data.shards import ShardWriter, write_empty_text

C, D = 4, 8
CLIP = {"clip_text": 6, "clip_pooled": 10}
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


def dims(clip: bool = False) -> dict[str, int]:
    return {"text": D, **(CLIP if clip else {})}


def forge(folder: Path, meta: dict | None = None, drop: str | None = None, **cells: object) -> None:
    """Change an index, without its column `drop` and with `cells` in its third row, and give it the right sha256, and
    seal where it says that it has one."""
    table = pq.read_table(folder / cache.INDEX)
    told = json.loads(table.schema.metadata[cache._META])
    told = {k: v for k, v in (told | (meta or {})).items() if k != "sha256" and v is not None}
    rows = table.to_pylist()
    rows[2] |= cells
    schema = table.schema.remove(table.schema.get_field_index(drop)) if drop else table.schema
    forged = pa.Table.from_pylist(rows, schema=schema)
    told["sha256"] = cache._digest(forged, told)
    buffer = io.BytesIO()
    pq.write_table(forged.replace_schema_metadata({cache._META: json.dumps(told)}), buffer)
    data = buffer.getvalue()
    (folder / cache.INDEX).write_bytes(sealed_parquet(data) if told.get("sealed") else data)


def samples(count: int = 10, clip: bool = False, detailed: bool = False) -> list[tuple]:
    """Arguments of ShardWriter.add: clips of five shapes; `detailed`: two of three have a second caption."""
    g = torch.Generator().manual_seed(0)
    out = []
    for i in range(count):
        latent = torch.randn(SHAPES[i % len(SHAPES)], generator=g) * 2 + torch.arange(C)[:, None, None, None]
        texts = {"text": torch.randn(1 + i % 3, D, generator=g)}
        second = f"clip {i} in detail 🎈" if detailed and i % 3 else ""
        for prefix in ("", "detailed_") if second else ("",):
            for name, dim in dims(clip).items():
                length = 1 if name == "clip_pooled" else 2 + (i + len(prefix)) % 4
                if prefix or name != "text":
                    texts[prefix + name] = torch.randn(length, dim, generator=g)
        key = f"{(i + 1) * 0x9E3779B97F4A7C15 % 2**64:016x}"
        out.append((key, latent, texts, f"clip {i} ü🎈", 8.0, f"/videos/{i}.mp4", "pyav", second))
    return out


def write(
    folder: Path,
    dtype: str = "float16",
    count: int = 10,
    per_shard: int = 4,
    clip: bool = False,
    detailed: bool = False,
) -> list[tuple]:
    """A finished cache of `samples(count)`, which are returned."""
    rows = samples(count, clip, detailed)
    more = {"clip_text": {"id": "K", "weights_sha256": "d" * 64}, **{f"{k}_dim": n for k, n in CLIP.items()}}
    pin_info(folder, info(dtype) | (more if clip else {}))
    write_empty_text(folder, {name: torch.ones(1, dim) for name, dim in dims(clip).items()}, dtype)
    plan = plan_shards([r[0] for r in rows], per_shard)
    for shard in plan:
        writer = ShardWriter(folder, shard.name, dtype, C, dims(clip))
        for i in shard.rows:
            writer.add(*rows[i])
        writer.commit()
    assert build_index(folder, [s.name for s in plan]).samples == count
    return rows


def content(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir()) if not p.name.startswith(".")}


def everything(folder: Path) -> list[bytes]:
    """All that a reader gets from a cache."""
    cache = LatentCache(folder)
    read = [cache.read(i, second) for i in range(len(cache)) for second in (False, True)]
    pairs = [x.numpy().tobytes() for latent, texts in read for x in (latent, *texts.values())]
    rest = [cache.mean, cache.std, cache.empty_texts["text"]]
    words = json.dumps([cache.keys, cache.captions, cache.sources, cache.fps.tolist(), cache.shapes.tolist()])
    return [*pairs, *(x.numpy().tobytes() for x in rest), words.encode()]


def part_of(folder: Path, where: slice, name: str, per_shard: int = 4, **made: object) -> Path:
    """A finished cache of some of the samples, in whose cache.json is `made`."""
    rows = samples(12)[where]
    pin_info(folder / name, {**info(), **made})
    write_empty_text(folder / name, {"text": torch.ones(1, D)}, "float16")
    plan = plan_shards([r[0] for r in rows], per_shard)
    for shard in plan:
        writer = ShardWriter(folder / name, shard.name, "float16", C, {"text": D})
        for i in shard.rows:
            writer.add(*rows[i])
        writer.commit()
    build_index(folder / name, [s.name for s in plan])
    return folder / name
