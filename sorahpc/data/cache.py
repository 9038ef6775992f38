"""The latent cache, version 2: what `encode` writes once and `train` reads at random, millions of times.

    cache.json            what made it: VAE, text encoder, dtype, clip settings; created once, by the first worker
    shard-<16 hex>.h5     immutable HDF5; one writer each (shards.py)
    empty_text.h5         the empty caption's embedding, for classifier-free guidance
    index.parquet         a row a sample: where its bytes lie, their crc32, captions; statistics of the latents;
                          a copy of cache.json; a sha256 of it all, and a seal of the file's bytes (seal.py)
    rejected.json         clips that could not be encoded, with their reasons
    .work/                who makes which shard now, and the clips of it so far (claims.py); empty once all are there

A shard's name is a hash of its clips' keys, so the plan of a cache is a pure function of the manifest, for any number
of workers. Shards are cut by rows of the manifest, which keep their places: a change of one row makes one shard anew.
The one that it replaces is left alone, out of the index; it may be deleted.

Offsets are resolved through HDF5 once, into the index; from then on a read (latents.py) is two `preadv` calls without
HDF5 and without its global lock.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from sorahpc.config import MAX_FPS, MIN_FPS
from sorahpc.data.manifest import REJECTED, ROWS_AT_ONCE, shown
from sorahpc.data.parquet import read_table
from sorahpc.data.samples import KEY, MAX_SIDE, pieces_of
from sorahpc.data.seal import sealed_parquet
from sorahpc.data.shards import VERSION, Shard, read_shard
from sorahpc.data.texts import DETAILED, TEXTS
from sorahpc.errors import DataError
from sorahpc.files import read_text
from sorahpc.runs import aside, atomic_write, fsync_dir, write_json

INFO, INDEX = "cache.json", "index.parquet"
MAX_INFO_BYTES = 1 << 20
SHARD = re.compile(r"shard-[0-9a-f]{16}\.h5")
_META = b"sorahpc.cache"
_YOUNGER = frozenset({"vae.config_sha256"})  # fields that a cache from before them lacks: any value passes for it
_ANEW = "run `sorahpc cache repair`, or delete it and run `sorahpc encode` again"

_COLUMNS = {
    "key": pa.string(), "shard": pa.string(), "channels": pa.int64(), "frames": pa.int64(),
    "height": pa.int64(), "width": pa.int64(), "latent_offset": pa.int64(), "latent_crc32": pa.uint32(),
    "text_offset": pa.int64(), "text_len": pa.int64(), "text_crc32": pa.uint32(), "fps": pa.float64(),
    "caption": pa.string(), "source": pa.string(),
}  # fmt: skip
Kinds = tuple[int, dict[str, int], str]  # channels, dims of the texts by name, dtype


def _schema(texts: Collection[str]) -> pa.Schema:
    """Of the index: other texts than `text` have columns where a sample has them."""
    more: dict[str, pa.DataType] = {"detailed": pa.string()} if any(t.startswith(DETAILED) for t in texts) else {}
    for name in texts:
        if name != "text":
            more |= {f"{name}_offset": pa.int64(), f"{name}_len": pa.int64(), f"{name}_crc32": pa.uint32()}
    return pa.schema([pa.field(name, kind, nullable=False) for name, kind in (_COLUMNS | more).items()])


# ---------------------------------------------------------------------------------------------------------------------
# What made the cache


def pin_info(folder: Path, info: dict[str, Any]) -> None:
    """Create cache.json with `info`, or hold `info` against the one that is there. The first worker creates it.

    Raises:
        DataError: the cache was made with another key; one line a field: its name, expected, found.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / INFO
    info = json.loads(json.dumps({"version": VERSION, **info}))  # tuples to lists, as it will be read back
    if not path.exists():
        new = aside(path)
        write_json(new, info)
        try:
            os.link(new, path)  # unlike rename it fails where the name exists: one worker is first
            fsync_dir(folder)
        except FileExistsError:
            pass
        finally:
            new.unlink()
    check_info(path, read_info(folder), info)


def read_info(folder: Path) -> dict[str, Any]:
    """cache.json. Raises DataError where it is missing, unreadable, or of another version."""
    path = folder / INFO
    try:
        if path.stat().st_size > MAX_INFO_BYTES:
            raise DataError(f"{shown(path)}: more than {MAX_INFO_BYTES} bytes; not a cache of ours")
        info = json.loads(read_text(path))
    except FileNotFoundError:
        raise DataError(f"{shown(folder)}: no latent cache here ({INFO} is missing); run `sorahpc encode`") from None
    except (OSError, ValueError, RecursionError) as error:
        why = getattr(error, "strerror", None) or "not JSON; see `sorahpc cache repair`"
        raise DataError(f"{shown(path)}: can't be read: {why}") from None
    if not isinstance(info, dict) or info.get("version") != VERSION:
        found = info.get("version") if isinstance(info, dict) else type(info).__name__
        raise DataError(f"{shown(path)}: field `version`: expected {VERSION}, found {found!r}; encode again")
    return info


def check_kinds(folder: Path, info: dict[str, Any]) -> Kinds:
    """What of cache.json its bytes can't be read without.

    Raises:
        DataError: one is missing, or not what it must be.
    """
    dims = {"text": "text_dim"}
    if "clip_text_dim" in info or "clip_pooled_dim" in info:
        dims |= {"clip_text": "clip_text_dim", "clip_pooled": "clip_pooled_dim"}
    for name, kind in (("channels", int), *((name, int) for name in dims.values()), ("dtype", str)):
        if type(info.get(name)) is not kind or (kind is int and not 1 <= info[name] <= MAX_SIDE):
            raise DataError(
                f"{shown(folder / INFO)}: field `{name}`: expected {kind.__name__}, found {info.get(name)!r}; "
                "see `sorahpc cache repair`"
            )
    if info["dtype"] not in ("float16", "bfloat16"):
        raise DataError(
            f"{shown(folder / INFO)}: field `dtype`: expected float16 or bfloat16, found {info['dtype']!r}; "
            "see `sorahpc cache repair`"
        )
    return info["channels"], {text: info[name] for text, name in dims.items()}, info["dtype"]


def check_info(path: Path, found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Hold the fields of `expected` against those of a cache; fields that `expected` leaves out pass.

    Raises:
        DataError: one line a field that differs.
    """
    faults = [
        f"{shown(path)}: field `{name}`: expected {json.dumps(value)}, found {json.dumps(other)}; "
        "use the settings that made this cache, or another folder (encode.cache)"
        for name, value, other in differences(found, expected)
    ]
    if faults:
        raise DataError("\n".join(faults))


def differences(found: dict[str, Any], expected: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """(dotted name, its value in `expected`, that in `found`) of the fields of `expected` that differ in `found`."""
    fields = [(name, value, _at(found, name)) for name, value in _flat(expected)]
    return [field for field in fields if field[1] != field[2] and not (field[2] is None and field[0] in _YOUNGER)]


def _at(value: Any, name: str) -> Any:
    """The value at a dotted name; a whole mapping where the name is not of a leaf, None where there is nothing."""
    for word in name.split("."):
        value = value.get(word) if isinstance(value, dict) else None
    return value


def _flat(value: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    out: list[tuple[str, Any]] = []
    for name, item in value.items():
        out += _flat(item, f"{prefix}{name}.") if isinstance(item, dict) else [(prefix + name, item)]
    return out


# ---------------------------------------------------------------------------------------------------------------------
# The plan


@dataclass(frozen=True)
class PlannedShard:
    name: str
    rows: tuple[int, ...]  # of the manifest: its clips


def plan_shards(keys: Sequence[str | None], rows_per_shard: int) -> list[PlannedShard]:
    """Cut the rows of the manifest into shards. A pure function of its arguments.

    Cut by rows, which keep their places, and not by clips: a row that becomes usable, or stops being so, changes its
    own shard and none after it. The price is that a shard may hold fewer clips than it could.

    Args:
        keys: a key a row, in the order of the manifest; None where the row can't be used.
        rows_per_shard: shard c holds the clips among rows ``[c * rows_per_shard, (c + 1) * rows_per_shard)``; there is
            none where no row can be used.
    """
    plan = []
    for start in range(0, len(keys), rows_per_shard):
        clips = {i: key for i, key in enumerate(keys[start : start + rows_per_shard], start) if key is not None}
        if clips:
            digest = hashlib.sha256("\n".join(clips.values()).encode()).hexdigest()
            plan.append(PlannedShard(f"shard-{digest[:16]}.h5", tuple(clips)))
    return plan


# ---------------------------------------------------------------------------------------------------------------------
# The index


@dataclass(frozen=True)
class Summary:
    samples: int
    rejected: list[dict[str, str]]
    superseded: int  # shards in the folder that are not of the plan


def build_index(folder: Path, shards: Sequence[str]) -> Summary | None:
    """(Re)build index.parquet and rejected.json from the planned shards; None while one of them is missing.

    Any worker may do it, several at once too: the same shards give the same bytes. Shards that are not in the plan
    (of an earlier manifest, say) are left alone and out of the index; the summary counts them.

    Raises:
        DataError: a shard is damaged, a key comes twice, or it can't be written.
    """
    # A listing, not a look-up of each name: on NFS a name that was missing a moment ago is remembered as missing.
    there = {name for name in os.listdir(folder) if SHARD.fullmatch(name)}
    if not set(shards) <= there:
        return None
    info = read_info(folder)
    kinds = check_kinds(folder, info)
    made = assemble(folder, {name: read_shard(folder / name, *kinds) for name in shards}, kinds[1])
    buffer = io.BytesIO()
    pq.write_table(made.table, buffer, compression="zstd", row_group_size=ROWS_AT_ONCE)
    data = sealed_parquet(buffer.getvalue())
    try:
        if not (folder / INDEX).is_file() or (folder / INDEX).read_bytes() != data:
            write_json(folder / REJECTED, made.rejected)
            atomic_write(folder / INDEX, data)
    except OSError as error:
        raise DataError(
            f"{shown(folder / INDEX)}: can't write it or {REJECTED}: {error.strerror or error}; the shards are kept: "
            "see to it, and run again"
        ) from None
    return Summary(made.table.num_rows, made.rejected, len(there - set(shards)))


@dataclass(frozen=True)
class Assembled:
    table: pa.Table  # with `meta` and its sha256 in its own metadata
    meta: dict[str, Any]  # as of `load_index`
    rejected: list[dict[str, str]]


def assemble(folder: Path, shards: dict[str, Shard], dims: Mapping[str, int]) -> Assembled:
    """What index.parquet and rejected.json hold, from resolved shards in the order of the plan.

    Raises:
        DataError: a key comes twice.
    """
    rows: list[dict[str, Any]] = []
    rejected: list[dict[str, str]] = []
    total, squares, count = np.zeros(1), np.zeros(1), 0
    owner: dict[str, str] = {}
    for name, shard in shards.items():
        for row in shard.rows:
            if row["key"] in owner:
                raise DataError(
                    f"{shown(folder)}: sample {row['key']} is in {owner[row['key']]} and in {name}, expected in one; "
                    "move one of them away and run `sorahpc encode` again"
                )
            owner[row["key"]] = name
        rows += [{**row, "shard": name} for row in shard.rows]
        rejected += shard.rejected
        total, squares, count = total + shard.sum, squares + shard.sumsq, count + shard.count
    mean = total / max(count, 1)
    std = np.sqrt(np.maximum(squares / max(count, 1) - mean**2, 0))
    # A channel that never varies carries nothing; dividing its zeros by 1 keeps them zeros.
    std = np.where(std > 1e-6, std, 1.0)
    meta = {
        "version": VERSION,
        "sealed": True,  # an index from before there was a seal has none; one that says so must have it
        "mean": mean.tolist(),
        "std": std.tolist(),
        "count": count,
        "shards": {name: (folder / name).stat().st_size for name in shards},
        "info": (folder / INFO).read_bytes().decode(),  # so that a damaged one is found, and can be put back
    }
    detailed = any(row["detailed"] for row in rows)
    schema = _schema([name for name in pieces_of(dims) if detailed or not name.startswith(DETAILED)])
    table = pa.table({n: [r[n] for r in rows] for n in schema.names}, schema=schema)
    signed = json.dumps({**meta, "sha256": _digest(table, meta)})
    return Assembled(table.replace_schema_metadata({_META: signed.encode()}), meta, rejected)


@dataclass(frozen=True)
class Places:
    """Where the texts of one name lie: offset, length in rows of dim (0: this sample has none), crc; int64 [N] each."""

    offset: np.ndarray
    length: np.ndarray
    crc: np.ndarray


@dataclass(frozen=True)
class Index:
    """index.parquet, with every value checked: a row a sample, in the order of the plan.

    Attributes:
        shards: names of the shard files; shard_of: int64 [N], a sample's place in them.
        keys, captions, sources: list[str]; fps: float64 [N]; shapes: int64 [N,4] (C,T,H,W).
        detailed: list[str], "" where a sample has no detailed caption.
        latent_offset: int64 [N], bytes from the start of the shard; latent_crc: int64 [N].
        texts: by name, those of the detailed captions after `detailed_`, which are there if any sample has one.
        mean, std: float32 [C], of the raw latents; std > 0.
    """

    shards: list[str]
    shard_of: np.ndarray
    keys: list[str]
    captions: list[str]
    sources: list[str]
    detailed: list[str]
    fps: np.ndarray
    shapes: np.ndarray
    latent_offset: np.ndarray
    latent_crc: np.ndarray
    texts: dict[str, Places]
    mean: torch.Tensor
    std: torch.Tensor


def _digest(table: pa.Table, meta: dict[str, Any]) -> str:
    """sha256 of an index's values, in hex, whatever version of Parquet they lie in."""
    digest = hashlib.sha256(json.dumps(meta, sort_keys=True).encode())
    for name in table.schema.names:
        column = table.column(name)
        text = pa.types.is_string(column.type)
        digest.update(json.dumps(column.to_pylist()).encode() if text else column.to_numpy().tobytes())
    return digest.hexdigest()


def load_index(folder: Path) -> tuple[pa.Table, dict[str, Any]]:
    """The rows of index.parquet and what it says of the whole (version, sealed, mean, std, count, shards: bytes by name
    in the order of the plan, info: the text of cache.json), as `build_index` wrote them: held against their sha256.

    Raises:
        DataError: there is none, or it is damaged.
    """
    path = folder / INDEX
    name = shown(path)
    try:
        table = read_table(path, name, _ANEW)
        meta = json.loads((table.schema.metadata or {}).get(_META, b"{}"))
    except FileNotFoundError:
        raise DataError(f"{name}: missing, so the cache isn't complete; run `sorahpc encode` again") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{name}: damaged: {str(error).splitlines()[0]}; {_ANEW}") from None
    schema = _schema([t for t in pieces_of(dict.fromkeys(TEXTS, 0)) if f"{t}_offset" in table.schema.names])
    if not table.schema.equals(schema):
        raise DataError(f"{name}: columns {schema.names} expected, found {table.schema.names}; {_ANEW}")
    if any(column.null_count for column in table.columns):
        raise DataError(f"{name}: a value is missing; {_ANEW}")
    if not isinstance(meta, dict) or meta.get("version") != VERSION:
        raise DataError(f"{name}: version {VERSION} expected; {_ANEW}")
    if fault := _wrong_in(meta):
        raise DataError(f"{name}: {fault}; {_ANEW}")
    expected = meta.pop("sha256", None)
    try:
        found = _digest(table, meta)
    except (ValueError, pa.ArrowException) as error:  # text that is not UTF-8
        raise DataError(f"{name}: damaged: {(str(error).splitlines() or ['text'])[0]}; {_ANEW}") from None
    if expected != found:
        raise DataError(f"{name}: damaged: sha256 of its values {expected} expected, found {found}; {_ANEW}")
    return table, meta


def _wrong_in(meta: dict[str, Any]) -> str:
    """What is not as `build_index` writes it, whatever the sha256 says; "" if all is."""
    shards = meta.get("shards")
    if not isinstance(shards, dict) or not all(SHARD.fullmatch(s) and type(n) is int for s, n in shards.items()):
        return "shards: names shard-<16 hex>.h5 with their bytes expected"
    for stat in ("mean", "std"):
        values = meta.get(stat)
        if not isinstance(values, list) or not all(isinstance(v, float) and math.isfinite(v) for v in values):
            return f"statistics: {stat}: a float for each channel expected"
    if type(meta.get("count")) is not int or meta["count"] < 0:
        return "statistics: count: a number expected"
    try:
        info = json.loads(meta["info"].encode())
    except (KeyError, AttributeError, ValueError, RecursionError):
        info = None
    return "" if isinstance(info, dict) else f"no copy of {INFO} in it"


def read_index(folder: Path, channels: int, dims: Mapping[str, int]) -> Index:
    """Read index.parquet, trusting none of its values: each sample's bytes lie inside a shard that is there.

    Raises:
        DataError: there is none, a value is out of its bounds, cache.json is not the one that it was built with, or a
        shard is missing or of another size.
    """
    name = shown(folder / INDEX)
    table, meta = load_index(folder)
    info, pinned = read_info(folder), json.loads(meta["info"])
    if info != pinned:  # else a bit flipped in a stride or clip setting would be taken for true
        fields = sorted({field for field, *_ in differences(info, pinned) + differences(pinned, info)})
        raise DataError(
            f"{shown(folder / INFO)}: is not the one that {INDEX} was built with: {', '.join(fields) or 'its fields'} "
            "changed; run `sorahpc cache repair`, which puts it back"
        )

    def need(condition: Any, what: str) -> None:
        if not condition:
            raise DataError(f"{name}: {what}; {_ANEW}")

    shards = sorted(meta["shards"])
    sizes = np.empty(len(shards), np.int64)
    for k, shard in enumerate(shards):
        try:
            sizes[k] = (folder / shard).stat().st_size
        except OSError as error:
            raise DataError(f"{shown(folder / shard)}: {error.strerror}; run `sorahpc encode` again") from None
        if sizes[k] != meta["shards"][shard]:
            raise DataError(
                f"{shown(folder / shard)}: {meta['shards'][shard]} bytes expected, found {sizes[k]}; "
                "delete the shard and run `sorahpc encode` again"
            )

    def column(of: str, dtype: Any = np.int64) -> np.ndarray:
        return table.column(of).to_numpy().astype(dtype)

    keys, captions, sources = (table.column(n).to_pylist() for n in ("key", "caption", "source"))
    need(keys, "no sample in it")
    need(all(KEY.fullmatch(k) for k in keys) and len(set(keys)) == len(keys), "keys: 16 hex, once each")
    order = {s: k for k, s in enumerate(shards)}
    shard_of = np.array([order.get(s, -1) for s in table.column("shard").to_pylist()], np.int64)
    need((shard_of >= 0).all(), "a sample of a shard that is not listed")
    shapes = np.stack([column(n) for n in ("channels", "frames", "height", "width")], axis=1)
    small = (shapes >= 1) & (shapes <= MAX_SIDE)
    need(small.all() and (shapes[:, 0] == channels).all(), f"shapes: [{channels},T,H,W] expected")
    latent_offset = column("latent_offset")
    # In float64: a product of hostile sizes must not wrap around.
    ends = latent_offset + 2.0 * shapes.astype(float).prod(axis=1)
    need((latent_offset >= 0).all() and (ends <= sizes[shard_of]).all(), "a latent ends after its shard")
    second = "detailed" in table.schema.names
    detailed = table.column("detailed").to_pylist() if second else [""] * len(keys)
    has = {"": np.ones(len(keys), bool), DETAILED: np.array([bool(d) for d in detailed], bool)}
    texts = {}
    for text in pieces_of(dims):
        prefix = DETAILED if text.startswith(DETAILED) else ""
        if prefix and not second:
            continue
        need(f"{text}_offset" in table.schema.names, f"{text}: no columns")
        at = texts[text] = Places(column(f"{text}_offset"), column(f"{text}_len"), column(f"{text}_crc32"))
        one = text.endswith("clip_pooled")
        fits = (at.length >= 0) & ((at.length > 0) == has[prefix]) & ((at.length <= 1) | (not one))
        need(fits.all() and (at.offset >= 0).all(), f"{text}: length or offset out of range")
        text_ends = at.offset + 2.0 * at.length * dims[text.removeprefix(DETAILED)]
        need((text_ends <= sizes[shard_of]).all(), f"a {text} embedding ends after its shard")
    need(len(meta["mean"]) == len(meta["std"]) == channels, f"statistics: {channels} channels expected")
    fps = column("fps", np.float64)
    need(((fps >= MIN_FPS) & (fps <= MAX_FPS)).all(), f"fps: {MIN_FPS} to {MAX_FPS} expected")
    mean, std = (torch.tensor(meta[n], dtype=torch.float32) for n in ("mean", "std"))
    need(bool((std > 0).all()), "statistics: std must be above 0")
    return Index(
        shards=shards,
        shard_of=shard_of,
        keys=keys,
        captions=captions,
        sources=sources,
        detailed=detailed,
        fps=fps,
        shapes=shapes,
        latent_offset=latent_offset,
        latent_crc=column("latent_crc32"),
        texts=texts,
        mean=mean,
        std=std,
    )
