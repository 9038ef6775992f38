"""A shard of the latent cache: an immutable HDF5 file of latents and text embeddings, and how it is written and read.

A shard is written under a temporary name, closed, opened again and verified, fsynced, renamed, and its folder fsynced:
a shard that exists is done, and a kill leaves at worst a `.part` file that nobody reads.

Inside there is one dataset a latent shape, `latents/CxTxHxW` [N,C,T,H,W], chunk = one sample, no filter, so that a
sample is one run of bytes; `text` [sum of L_i, dim], embeddings without padding, and the others of texts.py where
there are any; and one-dimensional datasets with a value a sample (`keys`, `captions`, `shapes`, ...). Values are fp16,
or bf16 as uint16 with the attribute `torch_dtype`. Any HDF5 tool reads them. Where a sample's bytes lie is resolved
through HDF5 once, by `read_shard`.

`empty_text.h5` holds the empty caption's embeddings in the same way.

After the end of the HDF5 file, where its readers don't look, both have a seal of 24 bytes: the crc32 of all before it.
So any flipped bit is found, those between the samples too, at the price of one read of the file by its writer.
"""

from __future__ import annotations

import io
import json
import math
import os
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sorahpc.config import MAX_FPS, MIN_FPS
from sorahpc.data import hdf5
from sorahpc.data.manifest import shown
from sorahpc.data.samples import (
    BITS,
    KEY,
    MAX_CAPTION_CHARS,
    MAX_SIDE,
    Sample,
    clean_caption,
    from_bits,
    pieces,
    pieces_of,
    rejection,
    sums_of,
    text_pieces,
    to_bits,
)
from sorahpc.data.seal import SEAL, SEAL_BYTES, check_seal, crc32, seal_of
from sorahpc.data.texts import DETAILED, Texts
from sorahpc.errors import DataError
from sorahpc.files import open_regular
from sorahpc.runs import aside, atomic_write, fsync_dir

VERSION = 2  # of the cache: of its shards, cache.json and index
EMPTY_TEXT = "empty_text.h5"
_MAX_SAMPLES = 1 << 20  # a shard; more is not ours
_STORED = {"float16": np.dtype("<f2"), "bfloat16": np.dtype("<u2")}
_ONE = ("clip_pooled", DETAILED + "clip_pooled")  # of the whole caption: one row each


# ---------------------------------------------------------------------------------------------------------------------
# Writing


@dataclass
class ShardWriter:
    """One shard in the making. Nothing is on disk before `commit`.

    Args:
        folder, name: where to, and the name from the plan.
        dtype: storage dtype, ``"float16"`` or ``"bfloat16"``.
        channels, dims: what every sample must have; dims of its texts, by name (texts.py).
    """

    folder: Path
    name: str
    dtype: str
    channels: int
    dims: Mapping[str, int]
    samples: list[Sample] = field(default_factory=list)
    rejected: list[dict[str, str]] = field(default_factory=list)

    def pack(
        self,
        key: str,
        latent: torch.Tensor,
        texts: Texts,
        caption: str,
        fps: float,
        source: str,
        decoder: str = "pyav",
        detailed: str = "",
    ) -> Sample:
        """Make a sample as it is stored, for `samples`.

        Args:
            key: 16 hex digits.
            latent: float32 [C,T,H,W], raw.
            texts: float32 [L,dim] by name, L >= 1.
            decoder: who read the video.
            detailed: its second caption, whose texts are in `texts` too, after `detailed_`.

        Raises:
            DataError: naming the clip: values that are not finite, or beyond the storage dtype.
        """
        assert KEY.fullmatch(key) and latent.ndim == 4 and latent.shape[0] == self.channels, (key, latent.shape)
        expected = {name for name in pieces_of(self.dims) if detailed or not name.startswith(DETAILED)}
        assert set(texts) == expected, (set(texts), expected)
        for name, text in texts.items():
            dim = self.dims[name.removeprefix(DETAILED)]
            assert text.ndim == 2 and len(text) >= 1 and text.shape[1] == dim, (name, text.shape, dim)
        what = f"{shown(source)}: sample {key}:"
        z = to_bits(latent.float(), self.dtype, f"{what} latent")
        bits = {name: to_bits(text.float(), self.dtype, f"{what} {name} embedding") for name, text in texts.items()}
        return Sample(
            key=key,
            caption=clean_caption(caption),
            detailed=clean_caption(detailed),
            fps=float(fps),
            source=shown(source),
            decoder=decoder,
            shape=tuple(z.shape),
            lengths={name: len(text) for name, text in bits.items()},
            crc={name: crc32(piece.reshape(-1).view(np.uint8)) for name, piece in {"latent": z, **bits}.items()},
            **sums_of(z, self.dtype),
            bits={"latent": z, **bits}.__getitem__,
        )

    def add(self, *sample: Any) -> None:
        """Take a sample, from the arguments of `pack`. Raises DataError as that does."""
        self.samples.append(self.pack(*sample))

    def reject(self, key: str, source: str, reason: str) -> None:
        self.rejected.append(rejection(key, source, reason))

    def commit(self) -> Path:
        """Write, verify and publish the shard; with no sample at all too, so that its clips count as done.

        Raises:
            DataError: it can't be written (a full disk, say), or what was written doesn't read back.
        """
        final = self.folder / self.name
        part = aside(final, ".part")
        # In memory first: HDF5 that meets a full disk tells it in an error of its own kind and can't close its file any
        # more.
        image = io.BytesIO()
        self._write(image)
        try:
            with open(part, "wb") as file:
                file.write(image.getbuffer())
                file.write(seal_of(crc32(image.getbuffer())))
                file.flush()
                os.fsync(file.fileno())
            del image
            rows = read_shard(part, self.channels, self.dims, self.dtype).rows
            self._verify(part, rows)
            os.replace(part, final)
            fsync_dir(self.folder)
        except OSError as error:
            raise DataError(
                f"{shown(final)}: can't write the shard: {error.strerror or error}; shards that are there are kept: "
                "see to it, and run again"
            ) from None
        finally:
            part.unlink(missing_ok=True)
        return final

    def _write(self, image: io.BytesIO) -> None:
        h5py = hdf5.h5py()
        shapes = sorted({s.shape for s in self.samples})
        text = h5py.string_dtype("utf-8")
        with h5py.File(image, "w", libver=("v110", "v110")) as f:
            f.attrs.update({"sorahpc_cache": VERSION, "torch_dtype": self.dtype})
            rows, offsets = {}, {}
            for shape in shapes:
                members = [s for s in self.samples if s.shape == shape]
                data = f.create_dataset(
                    "latents/" + "x".join(map(str, shape)),
                    (len(members), *shape),
                    BITS[self.dtype],
                    chunks=(1, *shape),
                )
                data.attrs["torch_dtype"] = self.dtype
                for row, sample in enumerate(members):
                    data.id.write_direct_chunk((row, 0, 0, 0, 0), sample.bits("latent").tobytes())
                    rows[sample.key] = row
                    offsets[sample.key] = data.id.get_chunk_info_by_coord((row, 0, 0, 0, 0)).byte_offset
            column = {
                "keys": np.array([s.key.encode() for s in self.samples], "S16"),
                "shapes": np.array([s.shape for s in self.samples], "<i8").reshape(-1, 4),
                "rows": np.array([rows[s.key] for s in self.samples], "<i8"),
                "byte_offsets": np.array([offsets[s.key] for s in self.samples], "<i8"),
                "latent_crc32": np.array([s.crc["latent"] for s in self.samples], "<u4"),
                "fps": np.array([s.fps for s in self.samples], "<f8"),
                "stats/sum": np.sum([s.sum for s in self.samples], axis=0) if self.samples else np.zeros(self.channels),
                "stats/sumsq": np.sum([s.sumsq for s in self.samples], axis=0)
                if self.samples
                else np.zeros(self.channels),
                "stats/count": np.array(sum(s.count for s in self.samples), "<i8"),  # values a channel
            }
            for name in pieces_of(self.dims):
                found = [s.bits(name) for s in self.samples if name in s.lengths]
                if found:
                    f.create_dataset(name, data=np.concatenate(found)).attrs["torch_dtype"] = self.dtype
                if found or not name.startswith(DETAILED):
                    lengths = [s.lengths.get(name, 0) for s in self.samples]
                    column[f"{name}_offsets"] = np.cumsum([0, *lengths], dtype="<i8")
                    column[f"{name}_crc32"] = np.array([s.crc.get(name, 0) for s in self.samples], "<u4")
            for name, values in column.items():
                f.create_dataset(name, data=values)
            # Who read each video; without it all were read by PyAV, as before there was a choice.
            told = {"decoders": "decoder"} if any(s.decoder != "pyav" for s in self.samples) else {}
            if any(s.detailed for s in self.samples):
                told["detailed_captions"] = "detailed"
            for dataset, name in {"captions": "caption", "sources": "source", **told}.items():
                each = [getattr(s, name) for s in self.samples]
                f.create_dataset(dataset, data=each, shape=(len(each),), dtype=text)
            f.create_dataset(
                "rejected", data=[json.dumps(r) for r in self.rejected], shape=(len(self.rejected),), dtype=text
            )

    def _verify(self, part: Path, rows: list[dict[str, Any]]) -> None:
        expected = [(s.key, s.crc, s.caption, s.detailed) for s in self.samples]
        found = [
            (r["key"], {name: crc for name, _, _, crc in pieces(r, self.dims)}, r["caption"], r["detailed"])
            for r in rows
        ]
        if found != expected:
            raise DataError(f"{shown(part)}: the shard doesn't read back as it was written; run again")
        check_seal(part)
        with open(part, "rb") as f:
            for row in rows:
                for _, start, count, crc in pieces(row, self.dims):
                    f.seek(start)
                    if zlib.crc32(f.read(count)) != crc:
                        raise DataError(
                            f"{shown(part)}: sample {row['key']} doesn't read back as it was written; run again"
                        )


def write_empty_text(folder: Path, texts: Texts, dtype: str) -> None:
    """Store the empty caption's embeddings, [L,dim] by name, once; a file that exists is kept."""
    path = folder / EMPTY_TEXT
    if path.exists():
        return
    buffer = io.BytesIO()
    with hdf5.h5py().File(buffer, "w", libver=("v110", "v110")) as f:
        for name, text in texts.items():
            bits = to_bits(text.float(), dtype, f"{name} embedding of the empty caption:")
            f.create_dataset(name, data=bits).attrs["torch_dtype"] = dtype
    data = buffer.getvalue()
    try:
        atomic_write(path, data + seal_of(crc32(data)))
    except OSError as error:
        raise DataError(f"{shown(path)}: can't be written: {error.strerror or error}; run again") from None


# ---------------------------------------------------------------------------------------------------------------------
# Reading


# What a value of a dataset of texts is: bytes in an object of a heap, by their number, the heap's place in the file and
# the object's index.


@dataclass(frozen=True)
class Shard:
    rows: list[dict[str, Any]]  # of the index, without `shard`
    rejected: list[dict[str, str]]
    sum: np.ndarray  # float64 [C]
    sumsq: np.ndarray  # float64 [C]
    count: int


def read_shard(path: Path, channels: int, dims: Mapping[str, int], dtype: str) -> Shard:
    """Resolve a shard through HDF5, trusting none of its values. Sample bytes are not read, nor held against the seal.

    A row has `decoder`, which the index leaves out, `detailed`, and the offset, len and crc32 of each of
    `pieces_of(dims)`, empty where it has no such text.

    Raises:
        DataError: it can't be opened, or a value is out of its bounds.
    """
    h5py = hdf5.h5py()

    def need(condition: Any, what: str) -> None:
        if not condition:
            raise DataError(f"{shown(path)}: {what}; delete the shard and run `sorahpc encode` again")

    try:
        with open_regular(path) as file:
            size = file.seek(0, os.SEEK_END) - SEAL_BYTES
            file.seek(max(size, 0))
            need(size >= 0 and SEAL.fullmatch(file.read()), "no seal at its end: the file was cut, or damaged there")
        with h5py.File(path, "r", locking=False) as f:
            # No attribute or value that is a text is read through HDF5: see hdf5.heap_objects.
            mark = f.attrs.get_id("sorahpc_cache") if "sorahpc_cache" in f.attrs else None
            number = mark is not None and mark.dtype.kind == "i" and mark.shape == ()
            need(number and f.attrs["sorahpc_cache"] == VERSION, f"not a shard of cache version {VERSION}")
            kind_of = _STORED[dtype]
            need(f.id.get_create_plist().get_sizes() == (8, 8), "addresses of 8 bytes expected")

            def column(name: str, shape: tuple[int | None, ...], kind: str) -> np.ndarray:
                data = hdf5.own_dataset(f, name)
                need(data is not None, f"`{name}` is missing")
                need(data.dtype == np.dtype(kind), f"`{name}`: dtype {kind} expected, found {data.dtype}")
                fits = data.ndim == len(shape) and all(w in (None, n) for n, w in zip(data.shape, shape, strict=True))
                need(
                    fits and data.size <= 4 * _MAX_SAMPLES,
                    f"`{name}`: shape {list(shape)} expected, found {data.shape}",
                )
                return np.asarray(data[()])

            def strings(name: str, count: int | None) -> list[str]:
                data = hdf5.own_dataset(f, name)
                need(data is not None and h5py.check_string_dtype(data.dtype), f"`{name}`: no strings")
                need(
                    data.ndim == 1 and data.size <= _MAX_SAMPLES and count in (None, data.size) and data.chunks is None,
                    f"`{name}`: {data.shape}",
                )
                if not data.size:
                    return []
                with open(path, "rb") as file:
                    file.seek(data.id.get_offset() or 0)
                    places = np.frombuffer(file.read(hdf5.PLACE.itemsize * data.size), hdf5.PLACE)
                    need(len(places) == data.size, f"`{name}`: ends after the file")
                    need(int(places["length"].sum(dtype=np.int64)) <= size, f"`{name}`: longer than the file")
                    heaps, left = dict[int, dict[int, bytes]](), size
                    found = []
                    for length, heap, index in places.tolist():
                        if length and heap not in heaps:
                            heaps[heap], used = hdf5.heap_objects(file, heap, left)
                            left -= used
                        value = heaps[heap].get(index, b"") if length else b""
                        need(len(value) >= length, f"`{name}`: a text has no bytes in the file")
                        found.append(value[:length])
                return [v[: 8 * MAX_CAPTION_CHARS].decode("utf-8", "replace") for v in found]

            keys = [k.decode("ascii", "replace") for k in column("keys", (None,), "S16")]
            n = len(keys)
            need(all(KEY.fullmatch(k) for k in keys) and len(set(keys)) == n, "`keys`: 16 hex digits each, once")
            shapes = column("shapes", (n, 4), "<i8")
            need(
                ((shapes >= 1) & (shapes <= MAX_SIDE)).all() and (shapes[:, 0] == channels).all(),
                "`shapes`: out of range",
            )
            rows_of, stored = column("rows", (n,), "<i8"), column("byte_offsets", (n,), "<i8")
            crc, fps = column("latent_crc32", (n,), "<u4"), column("fps", (n,), "<f8")
            need(((fps >= MIN_FPS) & (fps <= MAX_FPS)).all(), f"`fps`: {MIN_FPS} to {MAX_FPS} expected")
            captions, sources = strings("captions", n), strings("sources", n)
            detailed = strings("detailed_captions", n) if "detailed_captions" in f else [""] * n
            decoders = strings("decoders", n) if "decoders" in f else ["pyav"] * n
            total, squares = column("stats/sum", (channels,), "<f8"), column("stats/sumsq", (channels,), "<f8")
            count = int(column("stats/count", (), "<i8"))
            need(np.isfinite(total).all() and np.isfinite(squares).all() and count >= 0, "`stats`: out of range")

            texts: list[dict[str, int]] = [{} for _ in range(n)]
            for name in pieces_of(dims):
                second = name.startswith(DETAILED)
                dim = dims[name.removeprefix(DETAILED)]
                if second and not any(detailed):
                    for place in texts:
                        place |= {f"{name}_offset": 0, f"{name}_len": 0, f"{name}_crc32": 0}
                    continue
                bounds, sums = column(f"{name}_offsets", (n + 1,), "<i8"), column(f"{name}_crc32", (n,), "<u4")
                lengths = np.diff(bounds)
                there = np.array([bool(d) for d in detailed] if second else [True] * n, bool)
                need(bounds[0] == 0 and (lengths >= 0).all(), f"`{name}_offsets`: must rise from 0")
                need(((lengths > 0) == there).all(), f"`{name}_offsets`: a caption without embedding, or the reverse")
                need(name not in _ONE or (lengths[there] == 1).all(), f"`{name}_offsets`: one row a sample expected")
                at = 0
                if n:
                    text = hdf5.own_dataset(f, name)
                    fits = text is not None and text.shape == (int(bounds[-1]), dim)
                    need(fits, f"`{name}`: wrong shape")
                    plain = text.dtype == kind_of and text.chunks is None
                    need(plain, f"`{name}`: {dtype}, contiguous, expected, found {text.dtype}")
                    found_at = text.id.get_offset()
                    need(found_at is not None, f"`{name}`: has no bytes in the file")
                    at = int(found_at)
                    need(at + 2 * dim * int(bounds[-1]) <= size, f"`{name}`: ends after the file")
                for i, place in enumerate(texts):
                    place[f"{name}_offset"] = at + 2 * dim * int(bounds[i]) if there[i] else 0
                    place[f"{name}_len"], place[f"{name}_crc32"] = int(lengths[i]), int(sums[i])
            tables: dict[tuple[int, ...], dict[int, int]] = {}
            for shape in {tuple(int(v) for v in s) for s in shapes}:
                data = hdf5.own_dataset(f, "latents/" + "x".join(map(str, shape)))
                need(data is not None and data.shape[1:] == shape, f"latents of {shape}: missing")
                plain = data.chunks == (1, *shape) and data.id.get_create_plist().get_nfilters() == 0
                fits = plain and data.dtype == kind_of
                need(fits, f"latents of {shape}: {dtype}, one unfiltered sample a chunk, expected, found {data.dtype}")
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
                        "fps": float(fps[i]), "caption": captions[i], "source": sources[i], "detailed": detailed[i],
                        "decoder": decoders[i], **texts[i],
                    }
                )  # fmt: skip
            rejected = [json.loads(line) for line in strings("rejected", None)]
            fields = {"key", "source", "reason"}
            need(
                all(isinstance(r, dict) and set(r) == fields for r in rejected)
                and all(isinstance(v, str) for r in rejected for v in r.values()),
                "`rejected`: texts key, source, reason",
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


def read_samples(path: Path, shard: Shard, dims: Mapping[str, int], dtype: str) -> Iterator[Sample]:
    """The samples of a shard that `read_shard` has resolved, one in memory at a time.

    Raises:
        DataError: one is damaged. OSError: it can't be read.
    """
    with open(path, "rb") as file:
        for row in shard.rows:
            bits, crc = {}, {}
            lengths = {name: length for name, _, length, _ in text_pieces(row)}
            shape = (row["channels"], row["frames"], row["height"], row["width"])
            for name, offset, nbytes, crc[name] in pieces(row, dims):
                file.seek(offset)
                data = file.read(nbytes)
                if crc32(data) != crc[name]:
                    raise DataError(f"{shown(path)}: sample {row['key']}: its {name} is damaged")
                piece = (lengths[name], dims[name.removeprefix(DETAILED)]) if name in lengths else shape
                bits[name] = np.frombuffer(data, BITS[dtype]).reshape(piece)
            told = {name: row[name] for name in ("key", "caption", "detailed", "fps", "source", "decoder")}
            sums = sums_of(bits["latent"], dtype)
            yield Sample(**told, shape=shape, lengths=lengths, crc=crc, **sums, bits=bits.__getitem__)


def read_empty_text(folder: Path, dims: Mapping[str, int], dtype: str) -> dict[str, torch.Tensor]:
    """The empty caption's embeddings, float32 [L,dim] by name. Raises DataError where one is missing or damaged."""
    path = folder / EMPTY_TEXT
    out = {}
    try:
        check_seal(path)
        size = path.stat().st_size
        with hdf5.h5py().File(path, "r", locking=False) as f:
            if others := set(f) - set(dims):  # a shard has a dataset `text` too, and a seal
                raise ValueError(f"{', '.join(sorted(dims))} expected, found {shown(sorted(others)[0])} too")
            for name, dim in dims.items():
                data = hdf5.own_dataset(f, name)
                fits = data is not None and data.ndim == 2 and data.shape[1] == dim and 1 <= data.shape[0]
                if not fits or data.dtype != _STORED[dtype] or 2 * data.size > size:
                    found = "none" if data is None else f"{data.shape} {data.dtype}"
                    raise ValueError(f"`{name}`: [L,{dim}] of two bytes a value expected, found {found}")
                out[name] = from_bits(np.ascontiguousarray(data[()]).tobytes(), dtype).view(-1, dim)
    except DataError as error:
        raise DataError(f"{error}; delete it and run `sorahpc encode` again") from None
    except FileNotFoundError:
        raise DataError(f"{shown(path)}: missing; run `sorahpc encode` again, which writes it") from None
    except (OSError, RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
        first = (str(error).splitlines() or ["unreadable"])[0]
        raise DataError(f"{shown(path)}: {first}; delete it and run `sorahpc encode` again") from None
    return out
