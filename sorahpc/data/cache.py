"""The latent cache, version 1: what `encode` writes once and `train` reads at random, millions of times.

    cache.json            what made it: VAE, text encoder, dtype, clip settings; created once, by the first worker
    shard-<16 hex>.h5     immutable HDF5; one writer each
    empty_text.h5         the empty caption's embedding, for classifier-free guidance
    index.parquet         a row a sample: where its bytes lie, their crc32, caption; statistics of the latents
    rejected.json         clips that could not be encoded, with their reasons

A shard is written under a temporary name, closed, opened again and verified, fsynced, renamed, and its folder fsynced:
a shard that exists is done, and a kill leaves at worst a `.part` file that nobody reads. Its name is a hash of its
clips' keys, so the plan of a cache is a pure function of the manifest, for any number of workers. Shards are cut by
rows of the manifest, which keep their places: a change of one row makes one shard anew. The one that it replaces is
left alone, out of the index; it may be deleted.

Inside a shard there is one dataset a latent shape, `latents/CxTxHxW` [N,C,T,H,W], chunk = one sample, no filter, so
that a sample is one run of bytes; `text` [sum of L_i, dim], embeddings without padding; and one-dimensional datasets
with a value a sample (`keys`, `captions`, `shapes`, ...). Values are fp16, or bf16 as uint16 with the attribute
`torch_dtype`. Any HDF5 tool reads them. Offsets are resolved through HDF5 once, into the index; from then on a read is
two `preadv` calls without HDF5 and without its global lock.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import re
import socket
import threading
import time
import zlib
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from sorahpc.data.manifest import REJECTED, shown
from sorahpc.errors import DataError, SetupError
from sorahpc.runs import atomic_write, fsync_dir, write_json

VERSION = 1
INFO, INDEX, EMPTY_TEXT = "cache.json", "index.parquet", "empty_text.h5"
MAX_CAPTION_CHARS = 16_384
MAX_OPEN_SHARDS = 256  # file descriptors a process keeps; the usual limit is 1024
STALE_PART_S = 3600.0
MAX_INFO_BYTES = 1 << 20
_MAX_SAMPLES = 1 << 20  # a shard; more is not ours
_MAX_SIDE = 1 << 20  # of a latent axis, so that products stay far inside int64
_KEY = re.compile(r"[0-9a-f]{16}")
_SHARD = re.compile(r"shard-[0-9a-f]{16}\.h5")
_META = b"sorahpc.cache"

_INDEX_SCHEMA = pa.schema(
    [
        pa.field(name, kind, nullable=False)
        for name, kind in {
            "key": pa.string(), "shard": pa.string(), "channels": pa.int64(), "frames": pa.int64(),
            "height": pa.int64(), "width": pa.int64(), "latent_offset": pa.int64(), "latent_crc32": pa.uint32(),
            "text_offset": pa.int64(), "text_len": pa.int64(), "text_crc32": pa.uint32(), "fps": pa.float64(),
            "caption": pa.string(), "source": pa.string(),
        }.items()
    ]
)  # fmt: skip


def _h5py() -> Any:
    try:
        import h5py  # 0.2 s: not where only the index is read
    except ImportError as error:
        raise SetupError(f"cache: h5py can't be imported ({error}); pip install 'h5py>=3.14,<4'") from None
    return h5py


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
        aside = path.with_name(f".{INFO}.{socket.gethostname()}.{os.getpid()}.{threading.get_ident()}.tmp")
        write_json(aside, info)
        try:
            os.link(aside, path)  # unlike rename it fails where the name exists: one worker is first
            fsync_dir(folder)
        except FileExistsError:
            pass
        finally:
            aside.unlink()
    check_info(path, read_info(folder), info)


def read_info(folder: Path) -> dict[str, Any]:
    """cache.json. Raises DataError where it is missing, unreadable, or of another version."""
    path = folder / INFO
    try:
        if path.stat().st_size > MAX_INFO_BYTES:
            raise DataError(f"{shown(path)}: more than {MAX_INFO_BYTES} bytes; not a cache of ours")
        info = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"{shown(folder)}: no latent cache here ({INFO} is missing); run `sorahpc encode`") from None
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{shown(path)}: can't be read: {getattr(error, 'strerror', None) or 'not JSON'}") from None
    if not isinstance(info, dict) or info.get("version") != VERSION:
        found = info.get("version") if isinstance(info, dict) else type(info).__name__
        raise DataError(f"{shown(path)}: field `version`: expected {VERSION}, found {found!r}; encode again")
    return info


def check_info(path: Path, found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Hold the fields of `expected` against those of a cache; fields that `expected` leaves out pass.

    Raises:
        DataError: one line a field that differs.
    """
    there, wanted = dict(_flat(found)), dict(_flat(expected))
    faults = [
        f"{shown(path)}: field `{name}`: expected {json.dumps(value)}, found {json.dumps(there.get(name))}; "
        "use the settings that made this cache, or another folder (encode.cache)"
        for name, value in wanted.items()
        if there.get(name) != value
    ]
    if faults:
        raise DataError("\n".join(faults))


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


def remove_stale_parts(folder: Path) -> list[str]:
    """Delete `.part` files of writers that are gone: dead on this host, or silent for an hour. Returns their names."""
    removed = []
    for part in sorted(folder.glob(".*.part")):
        host, _, pid = part.name.removesuffix(".part").rpartition(".")
        try:
            stale = time.time() - part.stat().st_mtime > STALE_PART_S
            if not stale and host.endswith(f".{socket.gethostname()}") and pid.isascii() and pid.isdigit():
                stale = not _alive(int(pid))
            if stale:
                part.unlink()
                removed.append(part.name)
        except FileNotFoundError:  # its writer was quicker
            continue
    return removed


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


# ---------------------------------------------------------------------------------------------------------------------
# Writing


def clean_caption(text: str) -> str:
    """A caption as it is stored and embedded: valid UTF-8, control characters as spaces, at most MAX_CAPTION_CHARS."""
    text = text.encode("utf-8", "replace").decode("utf-8")
    return "".join(c if c.isprintable() else " " for c in text[:MAX_CAPTION_CHARS]).strip()


def _to_bits(x: torch.Tensor, dtype: str, what: str) -> np.ndarray:
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


@dataclass
class ShardWriter:
    """One shard in the making. Samples are held in memory until `commit`: a killed task loses a shard's work anyway.

    Args:
        folder, name: where to, and the name from the plan.
        dtype: storage dtype, ``"float16"`` or ``"bfloat16"``.
        channels, text_dim: what every sample must have.
    """

    folder: Path
    name: str
    dtype: str
    channels: int
    text_dim: int
    samples: list[dict[str, Any]] = field(default_factory=list)
    rejected: list[dict[str, str]] = field(default_factory=list)

    def add(self, key: str, latent: torch.Tensor, text: torch.Tensor, caption: str, fps: float, source: str) -> None:
        """Take a sample.

        Args:
            key: 16 hex digits.
            latent: float32 [C,T,H,W], raw.
            text: float32 [L,dim], L >= 1.

        Raises:
            DataError: naming the clip: values that are not finite, or beyond the storage dtype.
        """
        assert _KEY.fullmatch(key) and latent.ndim == 4 and latent.shape[0] == self.channels, (key, latent.shape)
        assert text.ndim == 2 and len(text) >= 1 and text.shape[1] == self.text_dim, text.shape
        what = f"{shown(source)}: sample {key}:"
        z = _to_bits(latent.float(), self.dtype, f"{what} latent")
        e = _to_bits(text.float(), self.dtype, f"{what} text embedding")
        # Of the values as stored, since training sees those. In float64 the sums are good to 1e-9 for any clip.
        stored = _from_bits(z.tobytes(), self.dtype).reshape(z.shape).double().flatten(1)
        self.samples.append(
            {
                "key": key, "z": z, "e": e, "caption": clean_caption(caption), "fps": float(fps),
                "source": shown(source), "z_crc": zlib.crc32(z.tobytes()), "e_crc": zlib.crc32(e.tobytes()),
                "sum": stored.sum(1).numpy(), "sumsq": stored.square().sum(1).numpy(), "count": stored.shape[1],
            }
        )  # fmt: skip

    def reject(self, key: str, source: str, reason: str) -> None:
        self.rejected.append({"key": key, "source": shown(source), "reason": clean_caption(reason)})

    def commit(self) -> Path:
        """Write, verify and publish the shard; with no sample at all too, so that its clips count as done.

        Raises:
            DataError: it can't be written (a full disk, say), or what was written doesn't read back.
        """
        final = self.folder / self.name
        part = self.folder / f".{self.name}.{socket.gethostname()}.{os.getpid()}.part"
        try:
            self._write(part)
            rows = read_shard(part, self.channels, self.text_dim, self.dtype).rows
            self._verify(part, rows)
            fd = os.open(part, os.O_RDONLY)
            try:
                os.fsync(fd)
            finally:
                os.close(fd)
            os.replace(part, final)
            fsync_dir(self.folder)
        except OSError as error:
            raise DataError(f"{shown(final)}: can't write the shard: {error.strerror or error}; run again") from None
        finally:
            part.unlink(missing_ok=True)
        return final

    def _write(self, part: Path) -> None:
        h5py = _h5py()
        shapes = sorted({s["z"].shape for s in self.samples})
        text = h5py.string_dtype("utf-8")
        # No lock files: parallel file systems often lack them, and a shard has one writer by design.
        with h5py.File(part, "w", libver=("v110", "v110"), locking=False) as f:
            f.attrs.update({"sorahpc_cache": VERSION, "torch_dtype": self.dtype})
            rows, offsets = {}, {}
            for shape in shapes:
                members = [s for s in self.samples if s["z"].shape == shape]
                data = f.create_dataset(
                    "latents/" + "x".join(map(str, shape)),
                    (len(members), *shape),
                    members[0]["z"].dtype,
                    chunks=(1, *shape),
                )
                data.attrs["torch_dtype"] = self.dtype
                for row, sample in enumerate(members):
                    data.id.write_direct_chunk((row, 0, 0, 0, 0), sample["z"].tobytes())
                    rows[sample["key"]] = row
                    offsets[sample["key"]] = data.id.get_chunk_info_by_coord((row, 0, 0, 0, 0)).byte_offset
            lengths = [len(s["e"]) for s in self.samples]
            if self.samples:
                f.create_dataset("text", data=np.concatenate([s["e"] for s in self.samples]))
                f["text"].attrs["torch_dtype"] = self.dtype
            column = {
                "keys": np.array([s["key"].encode() for s in self.samples], "S16"),
                "shapes": np.array([s["z"].shape for s in self.samples], "<i8").reshape(-1, 4),
                "rows": np.array([rows[s["key"]] for s in self.samples], "<i8"),
                "byte_offsets": np.array([offsets[s["key"]] for s in self.samples], "<i8"),
                "latent_crc32": np.array([s["z_crc"] for s in self.samples], "<u4"),
                "text_offsets": np.cumsum([0, *lengths], dtype="<i8"),
                "text_crc32": np.array([s["e_crc"] for s in self.samples], "<u4"),
                "fps": np.array([s["fps"] for s in self.samples], "<f8"),
                "stats/sum": np.sum([s["sum"] for s in self.samples], axis=0)
                if self.samples
                else np.zeros(self.channels),
                "stats/sumsq": np.sum([s["sumsq"] for s in self.samples], axis=0)
                if self.samples
                else np.zeros(self.channels),
                "stats/count": np.array(sum(s["count"] for s in self.samples), "<i8"),  # values a channel
            }
            for name, values in column.items():
                f.create_dataset(name, data=values)
            for name in ("caption", "source"):
                f.create_dataset(
                    f"{name}s", data=[s[name] for s in self.samples], shape=(len(self.samples),), dtype=text
                )
            f.create_dataset(
                "rejected", data=[json.dumps(r) for r in self.rejected], shape=(len(self.rejected),), dtype=text
            )

    def _verify(self, part: Path, rows: list[dict[str, Any]]) -> None:
        expected = [(s["key"], s["z_crc"], s["e_crc"], s["caption"]) for s in self.samples]
        if [(r["key"], r["latent_crc32"], r["text_crc32"], r["caption"]) for r in rows] != expected:
            raise DataError(f"{shown(part)}: the shard doesn't read back as it was written; run again")
        with open(part, "rb") as f:
            for row in rows:
                nbytes = 2 * row["channels"] * row["frames"] * row["height"] * row["width"]
                for start, count, crc in (
                    (row["latent_offset"], nbytes, row["latent_crc32"]),
                    (row["text_offset"], 2 * row["text_len"] * self.text_dim, row["text_crc32"]),
                ):
                    f.seek(start)
                    if zlib.crc32(f.read(count)) != crc:
                        raise DataError(
                            f"{shown(part)}: sample {row['key']} doesn't read back as it was written; run again"
                        )


def write_empty_text(folder: Path, text: torch.Tensor, dtype: str) -> None:
    """Store the empty caption's embedding [L,dim] once; a file that exists is kept."""
    path = folder / EMPTY_TEXT
    if path.exists():
        return
    bits = _to_bits(text.float(), dtype, "embedding of the empty caption:")
    buffer = io.BytesIO()
    with _h5py().File(buffer, "w", libver=("v110", "v110")) as f:
        f.create_dataset("text", data=bits).attrs.update({"torch_dtype": dtype, "crc32": zlib.crc32(bits.tobytes())})
    atomic_write(path, buffer.getvalue())


# ---------------------------------------------------------------------------------------------------------------------
# From shards to the index


@dataclass(frozen=True)
class Shard:
    rows: list[dict[str, Any]]  # of the index, without `shard`
    rejected: list[dict[str, str]]
    sum: np.ndarray  # float64 [C]
    sumsq: np.ndarray  # float64 [C]
    count: int


def read_shard(path: Path, channels: int, text_dim: int, dtype: str) -> Shard:
    """Resolve a shard through HDF5, trusting none of its values. Sample bytes are not read.

    Raises:
        DataError: it can't be opened, or a value is out of its bounds.
    """
    h5py = _h5py()

    def need(condition: Any, what: str) -> None:
        if not condition:
            raise DataError(f"{shown(path)}: {what}; delete the shard and run `sorahpc encode` again")

    try:
        size = path.stat().st_size
        with h5py.File(path, "r", locking=False) as f:
            need(f.attrs.get("sorahpc_cache") == VERSION, f"not a shard of cache version {VERSION}")
            found = f.attrs.get("torch_dtype")
            need(found == dtype, f"torch_dtype: expected {dtype}, found {found!r}")

            def column(name: str, shape: tuple[int | None, ...], kind: str) -> np.ndarray:
                data = f.get(name)
                need(isinstance(data, h5py.Dataset), f"`{name}` is missing")
                need(data.dtype == np.dtype(kind), f"`{name}`: dtype {kind} expected, found {data.dtype}")
                fits = data.ndim == len(shape) and all(w in (None, n) for n, w in zip(data.shape, shape, strict=True))
                need(
                    fits and data.size <= 4 * _MAX_SAMPLES,
                    f"`{name}`: shape {list(shape)} expected, found {data.shape}",
                )
                return np.asarray(data[()])

            def strings(name: str, count: int | None) -> list[str]:
                data = f.get(name)
                need(isinstance(data, h5py.Dataset) and h5py.check_string_dtype(data.dtype), f"`{name}`: no strings")
                need(
                    data.ndim == 1 and data.size <= _MAX_SAMPLES and count in (None, data.size),
                    f"`{name}`: {data.shape}",
                )
                return [bytes(v)[: 8 * MAX_CAPTION_CHARS].decode("utf-8", "replace") for v in data[()]]

            keys = [k.decode("ascii", "replace") for k in column("keys", (None,), "S16")]
            n = len(keys)
            need(all(_KEY.fullmatch(k) for k in keys) and len(set(keys)) == n, "`keys`: 16 hex digits each, once")
            shapes = column("shapes", (n, 4), "<i8")
            need(
                ((shapes >= 1) & (shapes <= _MAX_SIDE)).all() and (shapes[:, 0] == channels).all(),
                "`shapes`: out of range",
            )
            rows_of, stored = column("rows", (n,), "<i8"), column("byte_offsets", (n,), "<i8")
            crc, text_crc = column("latent_crc32", (n,), "<u4"), column("text_crc32", (n,), "<u4")
            bounds, fps = column("text_offsets", (n + 1,), "<i8"), column("fps", (n,), "<f8")
            need(bounds[0] == 0 and (n == 0 or np.diff(bounds).min() >= 1), "`text_offsets`: must rise from 0")
            captions, sources = strings("captions", n), strings("sources", n)
            total, squares = column("stats/sum", (channels,), "<f8"), column("stats/sumsq", (channels,), "<f8")
            count = int(column("stats/count", (), "<i8"))
            need(np.isfinite(total).all() and np.isfinite(squares).all() and count >= 0, "`stats`: out of range")

            text_at = 0
            if n:
                text = f.get("text")
                need(
                    isinstance(text, h5py.Dataset) and text.shape == (int(bounds[-1]), text_dim), "`text`: wrong shape"
                )
                need(
                    text.dtype.itemsize == 2 and text.chunks is None, "`text`: two bytes a value, contiguous, expected"
                )
                found_at = text.id.get_offset()
                need(found_at is not None, "`text`: has no bytes in the file")
                text_at = int(found_at)
                need(text_at + 2 * text_dim * int(bounds[-1]) <= size, "`text`: ends after the file")
            tables: dict[tuple[int, ...], dict[int, int]] = {}
            for shape in {tuple(int(v) for v in s) for s in shapes}:
                data = f.get("latents/" + "x".join(map(str, shape)))
                need(isinstance(data, h5py.Dataset) and data.shape[1:] == shape, f"latents of {shape}: missing")
                plain = data.chunks == (1, *shape) and data.id.get_create_plist().get_nfilters() == 0
                need(plain and data.dtype.itemsize == 2, f"latents of {shape}: one unfiltered sample a chunk expected")
                chunks: list[Any] = []
                data.id.chunk_iter(chunks.append)
                tables[shape] = {
                    int(c.chunk_offset[0]): int(c.byte_offset) for c in chunks if c.size == 2 * math.prod(shape)
                }
            rows = []
            for i, key in enumerate(keys):
                shape = tuple(int(v) for v in shapes[i])
                offset = tables[shape].get(int(rows_of[i]), -1)
                inside = offset >= 0 and offset + 2 * math.prod(shape) <= size and offset == int(stored[i])
                need(inside, f"sample {key}: its latent has no bytes in the file, or not where `byte_offsets` says")
                rows.append(
                    {
                        "key": key, "channels": shape[0], "frames": shape[1], "height": shape[2], "width": shape[3],
                        "latent_offset": offset, "latent_crc32": int(crc[i]),
                        "text_offset": text_at + 2 * text_dim * int(bounds[i]),
                        "text_len": int(bounds[i + 1] - bounds[i]), "text_crc32": int(text_crc[i]),
                        "fps": float(fps[i]), "caption": captions[i], "source": sources[i],
                    }
                )  # fmt: skip
            rejected = [json.loads(line) for line in strings("rejected", None)]
            fields = {"key", "source", "reason"}
            need(
                all(isinstance(r, dict) and set(r) == fields for r in rejected),
                "`rejected`: fields key, source, reason",
            )
            return Shard(rows, rejected, total, squares, count)
    except FileNotFoundError:
        raise DataError(f"{shown(path)}: no such shard; run `sorahpc encode`") from None
    except DataError:
        raise
    # What HDF5 raises on damaged structures is any of these, by the place of the damage.
    except (OSError, RuntimeError, ValueError, KeyError, TypeError, ArithmeticError, MemoryError) as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(f"{shown(path)}: damaged shard: {first}; delete it and run `sorahpc encode` again") from None


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
        DataError: a shard is damaged, or a key comes twice.
    """
    # A listing, not a look-up of each name: on NFS a name that was missing a moment ago is remembered as missing.
    there = {name for name in os.listdir(folder) if _SHARD.fullmatch(name)}
    if not set(shards) <= there:
        return None
    info = read_info(folder)
    channels, dim, dtype = info["channels"], info["text_dim"], info["dtype"]
    rows: list[dict[str, Any]] = []
    rejected: list[dict[str, str]] = []
    sizes: dict[str, int] = {}
    total, squares, count = np.zeros(channels), np.zeros(channels), 0
    for name in shards:
        shard = read_shard(folder / name, channels, dim, dtype)
        rows += [{**row, "shard": name} for row in shard.rows]
        rejected += shard.rejected
        total, squares, count = total + shard.sum, squares + shard.sumsq, count + shard.count
        sizes[name] = (folder / name).stat().st_size
    if len({row["key"] for row in rows}) != len(rows):
        raise DataError(f"{shown(folder)}: a key is in two shards; delete the folder and run `sorahpc encode` again")
    mean = total / max(count, 1)
    std = np.sqrt(np.maximum(squares / max(count, 1) - mean**2, 0))
    # A channel that never varies carries nothing; dividing its zeros by 1 keeps them zeros.
    std = np.where(std > 1e-6, std, 1.0)
    meta = {"version": VERSION, "mean": mean.tolist(), "std": std.tolist(), "count": count, "shards": sizes}
    table = pa.table({n: [r[n] for r in rows] for n in _INDEX_SCHEMA.names}, schema=_INDEX_SCHEMA)
    table = table.replace_schema_metadata({_META: json.dumps(meta).encode()})
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd")
    data = buffer.getvalue()
    if not (folder / INDEX).exists() or (folder / INDEX).read_bytes() != data:
        write_json(folder / REJECTED, rejected)
        atomic_write(folder / INDEX, data)
    return Summary(len(rows), rejected, len(there - set(shards)))


# ---------------------------------------------------------------------------------------------------------------------
# Reading


def _from_bits(data: bytes | bytearray, dtype: str) -> torch.Tensor:
    """Little-endian bytes of fp16 or bf16 -> float32, flat."""
    writable = data if isinstance(data, bytearray) else bytearray(data)
    return torch.frombuffer(writable, dtype=getattr(torch, dtype)).float()


class _File:
    """An open shard, closed when the last thread that reads it lets go."""

    def __init__(self, path: Path) -> None:
        self.fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        if hasattr(self, "fd"):
            os.close(self.fd)


class LatentCache:
    """A finished cache, for reading at random from any thread or process.

    Files are opened when first read, per process: an instance may be pickled, and used on both sides of a fork.

    Attributes:
        info: cache.json.
        keys, captions: list[str]; fps: float64 [N]; shapes: int64 [N,4] (C,T,H,W); text_lens: int64 [N].
        ids: int64 [N], a sample's stable id: the upper 63 bits of its key.
        mean, std: float32 [C], of the raw latents; std > 0.
        empty_text: float32 [L,dim], the empty caption's embedding.
        channels, text_dim: int.
    """

    _files: OrderedDict[str, _File]
    _pid: int
    _lock: threading.Lock

    def __init__(self, path: str | Path, expect: dict[str, Any] | None = None) -> None:
        """
        Args:
            path: the cache folder.
            expect: fields of cache.json (nested as there) that must agree.

        Raises:
            DataError: no finished cache here, another key, or an index that doesn't fit its shards.
        """
        self.path = Path(path)
        self.info = read_info(self.path)
        if expect:
            check_info(self.path / INFO, self.info, json.loads(json.dumps(expect)))
        where = shown(self.path / INFO)
        for name, kind in (("channels", int), ("text_dim", int), ("dtype", str)):
            if not isinstance(self.info.get(name), kind):
                raise DataError(f"{where}: field `{name}`: expected {kind.__name__}, found {self.info.get(name)!r}")
        self.channels: int = self.info["channels"]
        self.text_dim: int = self.info["text_dim"]
        self.dtype: str = self.info["dtype"]
        if self.dtype not in ("float16", "bfloat16"):
            raise DataError(f"{where}: field `dtype`: expected float16 or bfloat16, found {self.dtype!r}")
        self._read_index()
        self.empty_text = self._read_empty_text()
        self._forget_files()

    def __len__(self) -> int:
        return len(self.keys)

    def read(self, i: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Sample i: (raw latent float32 [C,T,H,W], text embedding float32 [L,dim]).

        The crc32 of both is checked: 0.6 ms for a latent of 2.2 MB, nothing beside the training step it feeds.

        Raises:
            DataError: naming shard and sample: the bytes are not those that were written, or can't be read.
        """
        shape = tuple(int(v) for v in self.shapes[i])
        z = self._bytes(i, int(self._latent_offset[i]), 2 * math.prod(shape), int(self._latent_crc[i]), "latent")
        length = int(self.text_lens[i])
        e = self._bytes(i, int(self._text_offset[i]), 2 * length * self.text_dim, int(self._text_crc[i]), "text")
        return _from_bits(z, self.dtype).view(shape), _from_bits(e, self.dtype).view(length, self.text_dim)

    def _bytes(self, i: int, offset: int, nbytes: int, crc: int, what: str) -> bytearray:
        name = self._shards[self._shard_of[i]]
        data = bytearray(nbytes)
        view, done = memoryview(data), 0
        try:
            file = self._file(name)
            while done < nbytes:
                got = os.preadv(file.fd, [view[done:]], offset + done)
                if not got:
                    break
                done += got
        except OSError as error:
            raise DataError(
                f"{shown(self.path / name)}: sample {self.keys[i]}: can't read its {what}: {error.strerror}"
            ) from None
        if done < nbytes or zlib.crc32(data) != crc:
            why = f"{done} of {nbytes} bytes" if done < nbytes else "crc32 differs"
            raise DataError(
                f"{shown(self.path / name)}: sample {self.keys[i]}: its {what} is damaged ({why}); "
                "delete the shard and run `sorahpc encode` again"
            )
        return data

    def _file(self, name: str) -> _File:
        with self._lock:
            if self._pid != os.getpid():  # after a fork: positions aren't shared by pread, but let each own its files
                self._files.clear()
                self._pid = os.getpid()
            file = self._files.pop(name, None) or _File(self.path / name)
            self._files[name] = file
            if len(self._files) > MAX_OPEN_SHARDS:
                self._files.popitem(last=False)
            return file

    def _forget_files(self) -> None:
        self._files = OrderedDict()
        self._pid = os.getpid()
        self._lock = threading.Lock()
        # A fork while another thread holds the lock would leave the child's locked for ever.
        os.register_at_fork(after_in_child=_renew_lock(self))

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k not in ("_files", "_pid", "_lock")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget_files()

    def _read_index(self) -> None:
        path = self.path / INDEX
        name = shown(path)
        if not path.exists():
            raise DataError(f"{name}: missing, so the cache isn't complete; run `sorahpc encode` again")
        try:
            table = pq.ParquetFile(pa.BufferReader(path.read_bytes())).read(use_threads=False)  # as in manifest.py
            meta = json.loads((table.schema.metadata or {}).get(_META, b"{}"))
        except (OSError, ValueError, RecursionError) as error:
            first = (str(error).splitlines() or ["unreadable"])[0]
            raise DataError(f"{name}: damaged: {first}; delete it and run `sorahpc encode` again") from None

        def need(condition: Any, what: str) -> None:
            if not condition:
                raise DataError(f"{name}: {what}; delete it and run `sorahpc encode` again")

        need(table.schema.equals(_INDEX_SCHEMA), f"columns {_INDEX_SCHEMA.names} expected, found {table.schema.names}")
        need(not any(column.null_count for column in table.columns), "a value is missing")
        need(isinstance(meta, dict) and meta.get("version") == VERSION, f"version {VERSION} expected")
        need(isinstance(meta.get("shards"), dict), "no list of shards")
        self._shards = sorted(meta["shards"])
        need(all(_SHARD.fullmatch(s) for s in self._shards), "a shard's name is not shard-<16 hex>.h5")
        sizes = np.empty(len(self._shards), np.int64)
        for k, shard in enumerate(self._shards):
            try:
                sizes[k] = (self.path / shard).stat().st_size
            except OSError as error:
                raise DataError(f"{shown(self.path / shard)}: {error.strerror}; run `sorahpc encode` again") from None
            if sizes[k] != meta["shards"][shard]:
                raise DataError(
                    f"{shown(self.path / shard)}: {meta['shards'][shard]} bytes expected, found {sizes[k]}; "
                    "delete the shard and run `sorahpc encode` again"
                )

        def column(field_name: str, dtype: Any = np.int64) -> np.ndarray:
            return table.column(field_name).to_numpy().astype(dtype)

        self.keys: list[str] = table.column("key").to_pylist()
        need(self.keys, "no sample in it")
        need(
            all(_KEY.fullmatch(k) for k in self.keys) and len(set(self.keys)) == len(self.keys),
            "keys: 16 hex, once each",
        )
        self.captions: list[str] = table.column("caption").to_pylist()
        self.sources: list[str] = table.column("source").to_pylist()
        self.fps = column("fps", np.float64)
        self.shapes = np.stack([column(n) for n in ("channels", "frames", "height", "width")], axis=1)
        self.text_lens = column("text_len")
        self.ids = np.array([int(k, 16) >> 1 for k in self.keys], np.int64)
        self._latent_offset, self._latent_crc = column("latent_offset"), column("latent_crc32")
        self._text_offset, self._text_crc = column("text_offset"), column("text_crc32")
        order = {s: k for k, s in enumerate(self._shards)}
        self._shard_of = np.array([order.get(s, -1) for s in table.column("shard").to_pylist()], np.int64)
        need((self._shard_of >= 0).all(), "a sample of a shard that is not listed")
        small = (self.shapes >= 1) & (self.shapes <= _MAX_SIDE)
        need(small.all() and (self.shapes[:, 0] == self.channels).all(), f"shapes: [{self.channels},T,H,W] expected")
        # In float64: a product of hostile sizes must not wrap around.
        ends = self._latent_offset + 2.0 * self.shapes.astype(float).prod(axis=1)
        text_ends = self._text_offset + 2.0 * self.text_lens * self.text_dim
        need(
            (self._latent_offset >= 0).all() and (ends <= sizes[self._shard_of]).all(), "a latent ends after its shard"
        )
        need((self.text_lens >= 1).all() and (self._text_offset >= 0).all(), "text: length or offset out of range")
        need((text_ends <= sizes[self._shard_of]).all(), "a text embedding ends after its shard")
        stats = [meta.get(n) for n in ("mean", "std")]
        for values in stats:
            fits = isinstance(values, list) and len(values) == self.channels
            need(
                fits and all(isinstance(v, float) and math.isfinite(v) for v in values), "statistics: a float a channel"
            )
        self.mean, self.std = (torch.tensor(values, dtype=torch.float32) for values in stats)
        need(bool((self.std > 0).all()), "statistics: std must be above 0")

    def _read_empty_text(self) -> torch.Tensor:
        path = self.path / EMPTY_TEXT
        try:
            with _h5py().File(path, "r", locking=False) as f:
                data = f["text"]
                if (
                    data.ndim != 2
                    or data.shape[1] != self.text_dim
                    or not 1 <= data.shape[0] <= 65_536
                    or data.dtype.itemsize != 2
                ):
                    raise ValueError(
                        f"[L,{self.text_dim}] of two bytes a value expected, found {data.shape} {data.dtype}"
                    )
                bits, crc = np.ascontiguousarray(data[()]).tobytes(), int(data.attrs["crc32"])
        except (OSError, RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
            first = (str(error).splitlines() or ["unreadable"])[0]
            raise DataError(f"{shown(path)}: {first}; delete it and run `sorahpc encode` again") from None
        if zlib.crc32(bits) != crc:
            raise DataError(f"{shown(path)}: damaged (crc32 differs); delete it and run `sorahpc encode` again")
        return _from_bits(bits, self.dtype).view(-1, self.text_dim)


def _renew_lock(cache: LatentCache) -> Any:
    import weakref

    ref = weakref.ref(cache)  # the hook lives as long as the process; the cache must not

    def renew() -> None:
        alive = ref()
        if alive is not None:
            alive._lock = threading.Lock()

    return renew
