"""Which clips of a manifest are left out, by what was measured of them: no file is opened here.

A reason is ``kind: number, what is wrong with it and the threshold's dotted key``. Filters are applied anew at each
prepare, so a reason of one of KINDS is lifted first.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np

from sorahpc.config import FiltersConfig
from sorahpc.data.manifest import Video
from sorahpc.data.measures import HASH_BITS

KINDS = (
    "small picture", "short clip", "long clip", "black", "little motion", "much motion", "static", "near duplicate"
)  # fmt: skip
_WORD_BITS = 64
_BAND_BITS = 16
_BANDS = HASH_BITS // _BAND_BITS
_BLOCK = 2048  # compared each with each
_MAX_PAIRS = 1 << 22  # compared at a time: 100 MB


def lifted(video: Video) -> Video:
    """A clip as it was before the filters."""
    if video.ok or video.reason.split(":")[0] not in KINDS:
        return video
    return dataclasses.replace(video, status="ok", reason="")


def filtered(videos: Sequence[Video], wanted: FiltersConfig) -> list[Video]:
    """The manifest with the clips rejected that a filter leaves out; where several would, the first says why. A clip
    that was not measured passes what would need it."""
    out = []
    for video in videos:
        reason = next(_reasons(video, wanted), None) if video.ok else None
        out.append(video if reason is None else dataclasses.replace(video, status="rejected", reason=reason))
    if wanted.near_duplicate_bits is None:
        return out
    rows = [i for i, video in enumerate(out) if video.ok and video.hash is not None]
    hashes = np.array([[int(out[i].hash[k : k + 16], 16) for k in (0, 16, 32)] for i in rows], np.uint64)  # type: ignore[index]
    for i, first, bits in near_duplicates(hashes.reshape(-1, 3), wanted.near_duplicate_bits):
        like = out[rows[first]]
        where = f" at {like.start_s:.2f} s" if like.start_s else ""
        reason = f"near duplicate: {bits} bits from {like.path}{where}, {_limit(wanted, 'near_duplicate_bits')}"
        out[rows[i]] = dataclasses.replace(out[rows[i]], status="rejected", reason=reason)
    return out


def _limit(wanted: FiltersConfig, name: str) -> str:
    return f"prepare.filters.{name}={getattr(wanted, name):g}"


def _reasons(video: Video, wanted: FiltersConfig) -> Iterator[str]:
    side = min(video.width, video.height)
    checks: list[tuple[str, str, float | None, str]] = [
        ("small picture", f"{side} px", side, "min_side_px"),
        ("short clip", f"{video.duration_s:.3g} s", video.duration_s, "min_duration_s"),
        ("long clip", f"{video.duration_s:.3g} s", video.duration_s, "max_duration_s"),
        ("black", f"{video.black or 0:.3f} of its pixels", video.black, "max_black"),
        ("little motion", f"{video.motion or 0:.3g} levels", video.motion, "min_motion"),
        ("much motion", f"{video.motion or 0:.3g} levels", video.motion, "max_motion"),
        ("static", f"{video.static or 0:.3f} of it", video.static, "max_static"),
    ]
    for kind, told, value, name in checks:
        limit = getattr(wanted, name)
        if limit is None or value is None:
            continue
        if name.startswith("min_") and value < limit:
            yield f"{kind}: {told}, under {_limit(wanted, name)}"
        if name.startswith("max_") and value > limit:
            yield f"{kind}: {told}, over {_limit(wanted, name)}"


# ---------------------------------------------------------------------------------------------------------------------
# Near duplicates


def near_duplicates(hashes: np.ndarray, bits: int) -> list[tuple[int, int, int]]:
    """Those of a list of hashes that are near an earlier one which is not itself near one before it.

    Multi-index hashing (Norouzi et al. 2012): hashes of 12 bands of 16 bits that differ in at most `bits` bits differ
    in at most bits // 12 in some band, so only those that share such a band are compared. Measured on random hashes: a
    million take 3 minutes up to 11 bits; 200,000 half a minute up to 23. Only what is kept is compared with: a thousand
    copies of one clip cost a comparison each.

    Args:
        hashes: uint64 [N,3]. bits: 0 to 23.

    Returns:
        (index, index of the first one that is near it, bits between them), by index.
    """
    hashes = np.ascontiguousarray(hashes, np.uint64)
    flips = [0] + ([1 << k for k in range(_BAND_BITS)] if bits >= _BANDS else [])
    found: list[tuple[int, int, int]] = []
    kept: list[np.ndarray] = []  # indices of those that are kept, a block each, increasing
    for start in range(0, len(hashes), _BLOCK):
        block = hashes[start : start + _BLOCK]
        before = np.concatenate(kept) if kept else np.empty(0, np.int64)
        near = _nearest_before(block, hashes[before], bits, flips)
        here = np.empty((block.shape[1], len(block)), np.uint64)  # of this block, those that are kept
        numbers = np.empty(len(block), np.int64)
        count = 0
        for i, code in enumerate(block):
            if i in near:
                at, distance = near[i]
                found.append((start + i, int(before[at]), distance))
                continue
            distances = _distances(here[:, :count], code)
            close = distances <= bits
            if close.any():
                at = int(close.argmax())
                found.append((start + i, int(numbers[at]), int(distances[at])))
                continue
            here[:, count], numbers[count] = code, start + i
            count += 1
        kept.append(numbers[:count])
    return found


def _nearest_before(block: np.ndarray, kept: np.ndarray, bits: int, flips: Sequence[int]) -> dict[int, tuple[int, int]]:
    """For rows of `block` that are within `bits` of a row of `kept`: (the first such row, bits between them)."""
    first: dict[int, tuple[int, int]] = {}
    if not len(kept):
        return first
    queries, table = (codes.view(np.uint16).reshape(len(codes), _BANDS) for codes in (block, kept))
    for band in range(_BANDS):
        order = np.argsort(table[:, band], kind="stable")
        counts = np.bincount(table[:, band], minlength=1 << _BAND_BITS)
        starts = np.concatenate([[0], np.cumsum(counts)])  # where the places of each value begin in `order`
        for flip in flips:
            wanted = queries[:, band] ^ np.uint16(flip)
            begins, ends = starts[wanted], starts[wanted.astype(np.int64) + 1]
            for rows, places in _pairs(begins, ends):
                at = order[places]
                distances = _distances(block.T[:, rows], kept.T[:, at])
                for k in np.flatnonzero(distances <= bits):
                    row, place = int(rows[k]), int(at[k])
                    if row not in first or place < first[row][0]:
                        first[row] = (place, int(distances[k]))
    return first


def _distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Bits between hashes, uint8 [N]: of uint64 [3,N] and [3,N] or [3]."""
    first, second, third = (np.bitwise_count(x ^ y) for x, y in zip(a, b, strict=True))
    total: np.ndarray = first + second + third
    return total


def _pairs(begins: np.ndarray, ends: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Each row with each place in its range [begin, end), at most about _MAX_PAIRS at a time."""
    counts = ends - begins
    totals = np.cumsum(counts)
    row = 0
    while row < len(counts):
        done = totals[row] - counts[row]
        last = max(row + 1, int(np.searchsorted(totals, done + _MAX_PAIRS, side="right")))
        some = counts[row:last]
        rows = np.repeat(np.arange(row, last), some)
        offsets = np.arange(int(some.sum())) - np.repeat(np.cumsum(some) - some, some)
        yield rows, np.repeat(begins[row:last], some) + offsets
        row = last
