"""Clips of a training, decoded ahead of the step that needs them and kept in bounded memory."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

MOVING_LEVELS = 24  # of 255: above what H.264 and slow changes of light do to a pixel at rest


@dataclass(frozen=True)
class Clip:
    """pixels: uint8 [T,H,W,3]. moving: int64 [n,3], as `moving_pixels` gives."""

    pixels: np.ndarray
    moving: np.ndarray


def moving_pixels(clip: np.ndarray, most: int = 512) -> np.ndarray:
    """(t, y, x) of up to `most` pixels, evenly picked, that differ from the clip's median over time: int64 [n,3]."""
    away = np.abs(clip.astype(np.int16) - np.median(clip, axis=0).astype(np.int16)).max(axis=-1) > MOVING_LEVELS
    found = np.argwhere(away)
    return found[np.linspace(0, len(found) - 1, min(most, len(found))).astype(int)]


class ClipCache:
    """Clips by number, decoded by threads when they are asked for; those not asked for longest are forgotten first.

    Args:
        load: number -> uint8 [T,H,W,3]; called in the threads. What it raises is kept, and raised at each use.
        limit_bytes: of the pixels that are kept. Those that a caller still holds come on top.
        threads: clips that are decoded at the same time.
    """

    def __init__(self, load: Callable[[int], np.ndarray], limit_bytes: int, threads: int) -> None:
        self.load, self.limit_bytes, self.decoded = load, limit_bytes, 0
        self._kept: OrderedDict[int, Future[Clip]] = OrderedDict()
        self._bytes = 0  # of those that are decoded
        self._lock = threading.Lock()
        self._pool = ThreadPoolExecutor(threads)

    def __enter__(self) -> ClipCache:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    def ask(self, i: int) -> Future[Clip]:
        """The clip of that number, now or soon."""
        with self._lock:
            future = self._kept.pop(i, None)
            if future is None:
                self.decoded += 1
                future = self._pool.submit(self._decode, i)
            self._kept[i] = future
            self._forget()
            return future

    def _decode(self, i: int) -> Clip:
        pixels = self.load(i)
        clip = Clip(pixels, moving_pixels(pixels))
        with self._lock:
            self._bytes += pixels.nbytes
        return clip

    def _forget(self) -> None:
        """What was not asked for longest, down to the limit; not what is being decoded, nor what can't be."""
        for i, future in list(self._kept.items()) if self._bytes > self.limit_bytes else ():
            if self._bytes <= self.limit_bytes:
                return
            if future.done() and not future.exception():
                self._bytes -= future.result().pixels.nbytes
                del self._kept[i]
