"""What a clip is known by: 16 hex digits of sha256 of its file's bytes and caption, of a scene also of its times."""

from __future__ import annotations

import functools
import hashlib
import os
import threading

from sorahpc.data.decode import CHANGED, VideoError, open_regular
from sorahpc.data.manifest import Video


def digest_of(path: str) -> hashlib._Hash:
    """sha256 of a file. Raises VideoError, OSError: it can't be read."""
    digest = hashlib.sha256()
    with open_regular(path) as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest


def key_of(digest: hashlib._Hash, caption: str, start_s: float | None = None, end_s: float | None = None) -> str:
    """Of a whole video without times: as it was when there were no scenes, so that caches of then stay right."""
    digest = digest.copy()
    digest.update(caption.encode())
    if start_s is not None:
        digest.update(f"\0{start_s:.6f}\0{end_s:.6f}".encode())
    return digest.hexdigest()[:16]


def check_unchanged(video: Video) -> None:
    """Hold a file against its row of the manifest: another one of that name would be kept under this one's key.

    A file that has only another time, as copies do, is read through and passes.

    Raises:
        VideoError: it can't be read, or is not the one that the row is of.
    """
    try:
        status = os.stat(video.path)
    except OSError:
        return  # who opens it says why
    if (status.st_size, status.st_mtime_ns) == (video.size_bytes, video.mtime_ns):
        return
    if status.st_size == video.size_bytes:
        try:
            with _READING[hash(video.path) % len(_READING)]:
                digest = _digest_at(video.path, status.st_mtime_ns)
        except OSError as error:
            raise VideoError(video.path, f"can't read: {error.strerror}") from None
        if video.key in (key_of(digest, video.caption), key_of(digest, video.caption, video.start_s, video.end_s)):
            return
    raise VideoError(video.path, CHANGED)


_READING = [threading.Lock() for _ in range(64)]  # threads with scenes of one video wait for the one that reads it


@functools.lru_cache(1 << 16)  # a training takes the scenes of all videos in any order; 30 MB at the most
def _digest_at(path: str, mtime_ns: int) -> hashlib._Hash:
    return digest_of(path)
