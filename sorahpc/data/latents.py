"""Latents and text embeddings out of a finished cache, at random, by any thread or process, without HDF5.

The bytes of many samples are read at once, at the offsets of the index: by threads in C++ (csrc/reader.h) where that is
built, else by `read_batch` here. This is the one place that chooses.
"""

from __future__ import annotations

import json
import math
import os
import threading
import weakref
import zlib
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sorahpc.data.cache import INFO, check_info, check_kinds, read_index, read_info
from sorahpc.data.manifest import shown
from sorahpc.data.shards import read_empty_text
from sorahpc.data.texts import DETAILED
from sorahpc.errors import DataError
from sorahpc.ops._library import native as _native

MAX_OPEN_SHARDS = 256  # file descriptors a process keeps; the usual limit is 1024
READ_THREADS = 4  # of a batch, beside whatever else the process computes; a file system with latency wants several


@dataclass(frozen=True)
class _Piece:
    """A run of bytes of a sample: where it lies in its shard, and where it goes in the caller's buffer."""

    sample: int
    what: str
    offset: int
    nbytes: int
    place: int
    crc: int


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
        info: cache.json. index: index.parquet; what of it is used most is an attribute here too:
        keys, captions, sources: list[str]; fps: float64 [N]; shapes: int64 [N,4] (C,T,H,W).
        detailed: list[str], a sample's detailed caption, or "". text_lens: int64 [N], T5 tokens of its caption.
        ids: int64 [N], a sample's stable id: the upper 63 bits of its key.
        mean, std: float32 [C], of the raw latents; std > 0.
        empty_texts: float32 [L,dim] by name, the empty caption's embeddings.
        channels: int; dims: of the texts, by name; dtype: ``"float16"`` or ``"bfloat16"``.
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
        self.channels, self.dims, self.dtype = check_kinds(self.path, self.info)
        index = self.index = read_index(self.path, self.channels, self.dims)
        self.keys, self.captions, self.sources = index.keys, index.captions, index.sources
        self.detailed, self.fps, self.shapes = index.detailed, index.fps, index.shapes
        self.text_lens = index.texts["text"].length
        self.ids = np.array([int(k, 16) >> 1 for k in self.keys], np.int64)
        self.mean, self.std = index.mean, index.std
        self.empty_texts = read_empty_text(self.path, self.dims, self.dtype)
        self._forget_files()

    def __len__(self) -> int:
        return len(self.keys)

    def nbytes(self, samples: Sequence[int], detailed: Sequence[bool] | None = None) -> int:
        """Bytes that `read_bits` writes for these samples: their latents and texts, two bytes a value."""
        return sum(piece.nbytes for _, parts in self._plan(samples, detailed) for _, piece, _ in parts)

    def read(self, i: int, detailed: bool = False) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Sample i: (raw latent float32 [C,T,H,W], its texts float32 [L,dim] by name).

        Raises:
            DataError: as `read_bits`.
        """
        out = torch.empty(self.nbytes([i], [detailed]), dtype=torch.uint8)
        ((z, texts),) = self.read_bits([i], out, [detailed])
        return z.float(), {name: e.float() for name, e in texts.items()}

    def read_bits(
        self, samples: Sequence[int], out: torch.Tensor, detailed: Sequence[bool] | None = None
    ) -> list[tuple[torch.Tensor, dict[str, torch.Tensor]]]:
        """Read samples as they are stored, over `READ_THREADS` threads, and check the crc32 of each piece.

        Args:
            samples: indices; one may come more than once.
            out: uint8 [n] on the CPU, n >= ``nbytes(samples, detailed)``: where the bytes go. Pinned memory is the
                caller's to ask for.
            detailed: for each sample, whether to read the texts of its detailed caption, if it has one, in place of its
                caption's; None: of none.

        Returns:
            A sample each: (latent [C,T,H,W], texts [L,dim] by name), float16 or bfloat16, all views of `out`.

        Raises:
            DataError: naming shard and sample: the bytes are not those that were written, or can't be read.
        """
        plan = self._plan(samples, detailed)
        pieces = [piece for _, parts in plan for _, piece, _ in parts]
        end = pieces[-1].place + pieces[-1].nbytes if pieces else 0
        assert out.dtype == torch.uint8 and out.ndim == 1 and out.is_contiguous() and len(out) >= end, out.shape
        self._read_pieces(pieces, out.numpy())
        bits = out[:end].view(getattr(torch, self.dtype))
        results = []
        for _, parts in plan:
            views = {
                name: bits[piece.place // 2 : (piece.place + piece.nbytes) // 2].view(shape)
                for name, piece, shape in parts
            }
            results.append((views.pop("latent"), views))
        return results

    def _plan(
        self, samples: Sequence[int], detailed: Sequence[bool] | None
    ) -> list[tuple[int, list[tuple[str, _Piece, tuple[int, ...]]]]]:
        """(sample, its pieces: (name, piece, shape)) of each sample, one after the other in the caller's buffer."""
        at = self.index
        plan, place = [], 0
        for k, i in enumerate(map(int, samples)):
            prefix = DETAILED if detailed is not None and detailed[k] and at.detailed[i] else ""
            shape = tuple(int(v) for v in self.shapes[i])
            found = [("latent", int(at.latent_offset[i]), shape, int(at.latent_crc[i]))]
            for name, dim in self.dims.items():
                text = at.texts[prefix + name]
                found.append((name, int(text.offset[i]), (int(text.length[i]), dim), int(text.crc[i])))
            parts = []
            for name, offset, size, crc in found:
                parts.append((name, _Piece(i, name, offset, 2 * math.prod(size), place, crc), size))
                place += 2 * math.prod(size)
            plan.append((i, parts))
        return plan

    def _read_pieces(self, pieces: list[_Piece], out: np.ndarray) -> None:
        at = self.index
        files: dict[str, _File] = {}  # held until all is read: the least recently used may be closed meanwhile
        requests = np.empty((len(pieces), 4), np.int64)
        for row, piece in zip(requests, pieces, strict=True):
            name = at.shards[at.shard_of[piece.sample]]
            if name not in files:
                try:
                    files[name] = self._file(name)
                except OSError as error:
                    raise self._cannot_read(piece, error.errno) from None
            row[:] = files[name].fd, piece.offset, piece.nbytes, piece.place
        results = np.empty((len(pieces), 3), np.int64)
        native = _native()
        if native is None:
            read_batch(requests, results, out)
        else:
            native.read_batch(requests, results, out, READ_THREADS, True)
        for piece, (failure, done, crc) in zip(pieces, results.tolist(), strict=True):
            if failure:
                raise self._cannot_read(piece, failure)
            if done < piece.nbytes or crc != piece.crc:
                short = f"{piece.nbytes} bytes expected, found {done}"
                why = short if done < piece.nbytes else f"crc32 {piece.crc:08x} expected, found {crc:08x}"
                raise DataError(
                    f"{self._where(piece)}: its {piece.what} is damaged ({why}); see `sorahpc cache verify`, "
                    "or delete the shard and run `sorahpc encode` again"
                )

    def _where(self, piece: _Piece) -> str:
        name = self.index.shards[self.index.shard_of[piece.sample]]
        return f"{shown(self.path / name)}: sample {self.keys[piece.sample]}"

    def _cannot_read(self, piece: _Piece, error: int | None) -> DataError:
        why = os.strerror(error or 0)
        return DataError(f"{self._where(piece)}: can't read its {piece.what}: {why}; is the file system there?")

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


def read_batch(requests: np.ndarray, results: np.ndarray, out: np.ndarray) -> None:
    """What ``sorahpc._C.read_batch`` does, with its crc32s, in Python and one thread: the reference.

    Args:
        requests: int64 [n,4], a row a piece: (file descriptor, offset, number of bytes, place in `out`).
        results: int64 [n,3], written: (errno or 0, bytes read, their crc32).
        out: uint8 [m], written.
    """
    view = out.data
    for row, (fd, offset, nbytes, place) in enumerate(requests.tolist()):
        done = failure = 0
        try:
            while done < nbytes:  # Python itself goes on after a signal
                got = os.preadv(fd, [view[place + done : place + nbytes]], offset + done)
                if not got:
                    break
                done += got
        except OSError as error:
            failure = error.errno or 0
        results[row] = failure, done, zlib.crc32(view[place : place + done])


def _renew_lock(cache: LatentCache) -> Any:
    ref = weakref.ref(cache)  # the hook lives as long as the process; the cache must not

    def renew() -> None:
        alive = ref()
        if alive is not None:
            alive._lock = threading.Lock()

    return renew
