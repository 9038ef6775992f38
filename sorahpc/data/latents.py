"""Latents and text embeddings out of a finished cache, at random, by any thread or process: `preadv`, no HDF5."""

from __future__ import annotations

import json
import math
import os
import threading
import weakref
import zlib
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sorahpc.data.cache import INFO, check_info, read_index, read_info
from sorahpc.data.manifest import shown
from sorahpc.data.shards import from_bits, read_empty_text
from sorahpc.errors import DataError

MAX_OPEN_SHARDS = 256  # file descriptors a process keeps; the usual limit is 1024


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
        keys, captions, sources: list[str]; fps: float64 [N]; shapes: int64 [N,4] (C,T,H,W); text_lens: int64 [N].
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
        index = self._index = read_index(self.path, self.channels, self.text_dim)
        self.keys, self.captions, self.sources = index.keys, index.captions, index.sources
        self.fps, self.shapes, self.text_lens = index.fps, index.shapes, index.text_lens
        self.ids = np.array([int(k, 16) >> 1 for k in self.keys], np.int64)
        self.mean, self.std = index.mean, index.std
        self.empty_text = read_empty_text(self.path, self.text_dim, self.dtype)
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
        length = int(self.text_lens[i])
        at = self._index
        z = self._bytes(i, int(at.latent_offset[i]), 2 * math.prod(shape), int(at.latent_crc[i]), "latent")
        e = self._bytes(i, int(at.text_offset[i]), 2 * length * self.text_dim, int(at.text_crc[i]), "text")
        return from_bits(z, self.dtype).view(shape), from_bits(e, self.dtype).view(length, self.text_dim)

    def _bytes(self, i: int, offset: int, nbytes: int, crc: int, what: str) -> bytearray:
        name = self._index.shards[self._index.shard_of[i]]
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


def _renew_lock(cache: LatentCache) -> Any:
    ref = weakref.ref(cache)  # the hook lives as long as the process; the cache must not

    def renew() -> None:
        alive = ref()
        if alive is not None:
            alive._lock = threading.Lock()

    return renew
