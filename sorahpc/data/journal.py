"""The journal of a shard in work: each clip as soon as it is encoded, so that who goes on loses none of them.

    .work/shard-<16 hex>.<nonce>.journal

A journal has one writer ever, whose lease has that nonce; who takes its shard over copies what is whole into a journal
of its own and goes on behind it. So a writer that was only asleep can't spoil what others add meanwhile. The clips are
in any order. The journal goes when the shard is there.

A record: 20 bytes (magic, length of the JSON, length of the pieces, crc32 of these and of the JSON), the JSON, and the
bytes of the latent and the texts, each of which has its crc32 in the JSON. The first record says which shard it is of,
and by its sha256 which cache.json; the others hold a sample or a rejected clip each. What is behind the first record
that is not whole is nobody's: a write that was cut, or a damaged disk.

A record is written at once and not synced, so that the death of the task, in whatever way, costs nothing of it; of its
node, what the system has not written yet. Whoever writes it calls `sync` beside the next clip.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from sorahpc.config import MAX_FPS, MIN_FPS
from sorahpc.data.cache import INFO
from sorahpc.data.manifest import shown
from sorahpc.data.samples import BITS, KEY, MAX_SIDE, Sample, pieces_of
from sorahpc.data.seal import crc32
from sorahpc.data.texts import DETAILED
from sorahpc.errors import DataError
from sorahpc.files import open_regular

_HEAD = struct.Struct("<4sIQI")
_MAGIC = b"SHJ1"
_MAX_JSON_BYTES = 1 << 24
Record = Sample | dict[str, str]  # of a rejected clip: key, source, reason
_REJECTED = {"key", "source", "reason"}


def cache_sha256(folder: Path) -> str:
    """Of cache.json, as the journals of the cache's shards have it."""
    return hashlib.sha256((folder / INFO).read_bytes()).hexdigest()


def head_of(shard: str, cache_sha256: str) -> dict[str, str]:
    """What the first record of a shard's journal says."""
    return {"shard": shard, "cache_sha256": cache_sha256}


class Journal:
    """A new journal, open for writing.

    Args:
        path: must not exist. head: what the first record says.

    Raises:
        DataError: it can't be written.
    """

    def __init__(self, path: Path, head: Mapping[str, Any]) -> None:
        self.path = path
        self._end = 0
        try:
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise self._fault(error) from None
        try:
            self._append(dict(head), [])
        except DataError:
            self.close()
            path.unlink(missing_ok=True)
            raise

    def add(self, record: Record) -> Record:
        """Append a record. Returns it with its arrays left to the file. Raises DataError: it can't be written."""
        if isinstance(record, dict):
            self._append({"rejected": record}, [])
            return record
        names = ["latent", *record.lengths]
        arrays = [np.ascontiguousarray(record.bits(name)) for name in names]
        text = {name: value for name, value in vars(record).items() if name not in ("bits", "sum", "sumsq")}
        text |= {"sum": record.sum.tolist(), "sumsq": record.sumsq.tolist()}  # JSON keeps every bit of a float64
        start = self._append({"sample": text}, arrays)
        places = {}
        for name, array in zip(names, arrays, strict=True):
            places[name] = (start, array.shape, array.dtype)
            start += array.nbytes
        return replace(record, bits=lambda name: self._read(record, name, *places[name]))

    def sync(self) -> None:
        """Have the disk hold what was added. Raises DataError."""
        try:
            os.fdatasync(self._fd)
        except OSError as error:  # a full disk may only be told here
            raise self._fault(error) from None

    def close(self) -> None:
        os.close(self._fd)

    def _append(self, text: dict[str, Any], arrays: list[np.ndarray]) -> int:
        data = json.dumps(text, allow_nan=False).encode()
        sizes = len(data), sum(array.nbytes for array in arrays)
        crc = crc32(data, crc32(_HEAD.pack(_MAGIC, *sizes, 0)))
        try:
            blocks = [memoryview(_HEAD.pack(_MAGIC, *sizes, crc) + data)]
            for left in blocks + [array.reshape(-1).view(np.uint8).data for array in arrays]:
                while left:
                    left = left[os.write(self._fd, left) :]
        except OSError as error:
            with contextlib.suppress(OSError):  # a tail that is not whole harms nobody
                os.ftruncate(self._fd, self._end)
            raise self._fault(error) from None
        start = self._end + _HEAD.size + len(data)
        self._end = start + sizes[1]
        return start

    def _read(self, sample: Sample, name: str, start: int, shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray:
        data = bytearray(math.prod(shape) * dtype.itemsize)
        done = 0
        while done < len(data):
            try:
                got = os.preadv(self._fd, [memoryview(data)[done:]], start + done)
            except OSError as error:
                raise DataError(
                    f"{shown(self.path)}: can't read the journal: {error.strerror or error}; run again"
                ) from None
            if not got:
                break
            done += got
        if done < len(data) or crc32(data) != sample.crc[name]:
            raise DataError(f"{shown(self.path)}: sample {sample.key} doesn't read back as it was written; run again")
        return np.frombuffer(data, dtype).reshape(shape)

    def _fault(self, error: OSError) -> DataError:
        return DataError(
            f"{shown(self.path)}: can't write the journal: {error.strerror or error}; shards and clips that are there "
            "are kept: see to it, and run again"
        )


def replay(path: Path, head: Mapping[str, Any], dtype: str, channels: int, dims: Mapping[str, int]) -> Iterator[Record]:
    """The whole records of a journal in their order, one in memory at a time, trusting nothing of it.

    Args:
        head: what its first record must say; of another, no record is given.
        dtype, channels, dims: as of the shard.

    Raises:
        OSError: it can't be read.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        found = _next(file, size)
        if found is None or found[0] != head:
            return
        while (found := _next(file, size)) is not None:
            record = _record(*found, dtype, channels, dims)
            if record is None:
                return
            yield record


def _next(file: Any, size: int) -> tuple[dict[str, Any], bytes] | None:
    """JSON and bytes of the pieces of the next record, if it is whole but for these."""
    block = file.read(_HEAD.size)
    if len(block) < _HEAD.size:
        return None
    magic, num_text, num_bytes, crc = _HEAD.unpack(block)
    if magic != _MAGIC or num_text > _MAX_JSON_BYTES or num_text + num_bytes > size - file.tell():
        return None
    data = file.read(num_text)
    if crc32(data, crc32(_HEAD.pack(magic, num_text, num_bytes, 0))) != crc:
        return None
    try:
        text = json.loads(data)
    except (ValueError, RecursionError):
        return None
    return (text, file.read(num_bytes)) if isinstance(text, dict) else None


def _record(text: dict[str, Any], data: bytes, dtype: str, channels: int, dims: Mapping[str, int]) -> Record | None:
    """A record from its JSON and the bytes of its pieces; None where it is not one of a shard like this."""
    rejected = text.get("rejected")
    if rejected is not None:
        fits = isinstance(rejected, dict) and set(rejected) == _REJECTED
        return rejected if fits and all(isinstance(v, str) for v in rejected.values()) else None
    try:
        told = dict(text["sample"])
        told |= {name: np.array(told[name], np.float64) for name in ("sum", "sumsq")}
        told["shape"] = tuple(told["shape"])
        arrays: dict[str, np.ndarray] = {}
        get: Callable[[str], np.ndarray] = arrays.__getitem__
        sample = Sample(**told, bits=get)
        expected = {name for name in pieces_of(dims) if sample.detailed or not name.startswith(DETAILED)}
        shapes: dict[str, tuple[int, ...]] = {"latent": sample.shape}
        shapes |= {name: (length, dims[name.removeprefix(DETAILED)]) for name, length in sample.lengths.items()}
        whole = all(type(n) is int and 1 <= n <= MAX_SIDE for shape in shapes.values() for n in shape)
        fits = len(sample.shape) == 4 and sample.shape[0] == channels == len(sample.sum) == len(sample.sumsq)
        words = (sample.key, sample.caption, sample.detailed, sample.source, sample.decoder)
        fits = fits and all(isinstance(word, str) for word in words) and bool(KEY.fullmatch(sample.key))
        numbers = isinstance(sample.fps, float) and MIN_FPS <= sample.fps <= MAX_FPS and type(sample.count) is int
        if not (whole and fits and numbers and set(sample.lengths) == expected and set(sample.crc) == set(shapes)):
            return None
        at = 0
        for name, shape in shapes.items():
            num_bytes = 2 * math.prod(shape)
            piece = data[at : at + num_bytes]
            if len(piece) != num_bytes or crc32(piece) != sample.crc[name]:
                return None
            arrays[name] = np.frombuffer(piece, BITS[dtype]).reshape(shape)
            at += num_bytes
        return sample if at == len(data) else None
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError):
        return None
