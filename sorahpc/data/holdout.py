"""Which clips are kept out of a training, so that it can be measured on what it never saw.

A clip's place is a hash of its file's size and of the time at which it begins in the file: of its pixels, not of its
name or its caption, which may change while they don't. Clips whose place is under a limit are held out, all others are
trained on. The limit is kept with what was trained, and never rises. So a clip that was once trained on, its place not
under the limit of then, is never held out later, whichever videos come, go and come back. New ones are held out where
their place is under it; where those would be too many, the limit falls, and clips over it are trained on from then.

Clips that begin at the same time in files of the same size, copies for one, are held out together or not at all.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from sorahpc.data.manifest import Video


def place_of(video: Video) -> str:
    """16 hex digits, in an order that has nothing to do with that of the manifest."""
    return hashlib.sha256(f"{video.size_bytes} {video.start_s:.6f}".encode()).hexdigest()[:16]


def limit_of(videos: Sequence[Video], most: int, before: str | None = None) -> str:
    """The limit under which clips are held out: at most `most` of them, and a fifth of all.

    Args:
        videos: one or more, all that can be used.
        before: the limit of what is trained further; None: nothing was trained yet.
    """
    places = sorted(map(place_of, videos))
    limit = places[min(most, len(places) // 5)]
    return limit if before is None else min(limit, before)
