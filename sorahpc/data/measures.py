"""What is measured of a video's pictures, in numpy alone: its scenes, and of each how dark it is, how much of it moves,
and what it looks like.

This runs in the child process that decodes (sorahpc.data.frames). Pictures come as small RGB ones, in their order, each
with the time it comes on screen and the time it leaves it; none is kept but the last.

Scenes are found as PySceneDetect does (https://www.scenedetect.com, version 0.7): its ContentDetector, whose score is
the mean over pixels of the absolute change of hue, saturation and value from one frame to the next, in OpenCV's 8 bits;
and fades through black as its ThresholdDetector sees them, by the mean of R, G and B. The arithmetic is ours: it is 30
lines, where the package brings OpenCV with its windows and its own FFmpeg (60 MB, and libGL on every node).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

SAMPLES_PER_S = 4.0  # pictures a second that are measured. Scenes are cut by all frames
BLACK_LEVEL = 20.0  # a pixel of at most this luma, of 255, is black; what encoders make of black is up to about 5
STATIC_LEVELS = 0.3  # a mean change of luma below this is no motion: what encoders make of a frozen picture is 0 to 0.2
FADED_LEVEL = 12.0  # a frame of a mean R, G and B below this is between two scenes: ThresholdDetector's default
HASHES = 3  # pictures of a clip that are hashed: the middles of its thirds
HASH_BITS = 64 * HASHES
TIME_DIGITS = 6  # times are kept to the microsecond; containers round them to more

# A row for each clip. luma, black, motion and static as in `Video`; hash: 64 bits of each picture.
CLIP = np.dtype(
    [("start_s", "<f8"), ("end_s", "<f8"), ("frames", "<i8"), ("luma", "<f8"), ("black", "<f8"), ("motion", "<f8"),
     ("static", "<f8"), ("hash", "<u8", (HASHES,))]
)  # fmt: skip


def size_of(height: int, width: int, area_px: int = 96 * 54) -> tuple[int, int]:
    """Height and width that pictures are measured at: about `area_px`, never scaled up, the aspect kept."""
    scale = min(1.0, math.sqrt(area_px / (height * width)))
    return max(8, round(height * scale)), max(8, round(width * scale))


def luma(rgb: np.ndarray) -> np.ndarray:
    """float32 [H,W] of 0 to 255, by BT.601, of uint8 [H,W,3]."""
    return rgb @ np.array([0.299, 0.587, 0.114], np.float32)


# ---------------------------------------------------------------------------------------------------------------------
# What a picture looks like

_low: dict[int, np.ndarray] = {}


def _low_frequencies(size: int) -> np.ndarray:
    """float64 [8, size]: the first eight rows of the DCT-II, orthonormal."""
    if size not in _low:
        k, n = np.arange(8)[:, None], np.arange(size)[None, :]
        rows = np.cos(math.pi * k * (2 * n + 1) / (2 * size)) * math.sqrt(2 / size)
        rows[0] /= math.sqrt(2)
        _low[size] = rows
    return _low[size]


def phash(luma_HW: np.ndarray) -> int:
    """64 bits: which of the 8x8 lowest frequencies of the picture are above their median.

    The perceptual hash of Zauner (2010) and of `imagehash.phash`, without their detour over 32x32 px: pictures here are
    small, and their lowest frequencies are the same. Of a picture of one colour it is 0 but for the bit of the mean.
    """
    h, w = luma_HW.shape
    low = _low_frequencies(h) @ luma_HW.astype(np.float64) @ _low_frequencies(w).T
    low = np.round(low / math.sqrt(h * w), 3)  # of one colour: zeros, and not what rounding left
    return int.from_bytes(np.packbits(low > np.median(low)).tobytes(), "big")


# ---------------------------------------------------------------------------------------------------------------------
# How much of the content changes

with np.errstate(divide="ignore"):
    _OF = np.where(np.arange(256) > 0, 1 / np.arange(256), 0).astype(np.float32)


def hsv(rgb: np.ndarray) -> np.ndarray:
    """Hue (0 to 179, two degrees each), saturation and value (0 to 255) of uint8 [H,W,3], as OpenCV's COLOR_RGB2HSV has
    them to within 1: float32 [3,H,W], of whole numbers."""
    r, g, b = np.ascontiguousarray(rgb.transpose(2, 0, 1)).astype(np.int16)
    value = np.maximum(np.maximum(r, g), b)
    spread = value - np.minimum(np.minimum(r, g), b)
    sector = np.where(value == r, g - b, np.where(value == g, b - r + 2 * spread, r - g + 4 * spread))
    out = np.empty((3, *value.shape), np.float32)
    np.rint(np.float32(30) * sector * _OF[spread], out=out[0])
    out[0] += 180 * (out[0] < 0)
    np.rint(np.float32(255) * spread * _OF[value], out=out[1])
    out[2] = value
    return out


def content_score(now: np.ndarray, before: np.ndarray) -> float:
    """0 to about 230: the mean absolute change of hue, saturation and value, of two results of `hsv`."""
    change = now - before
    return float(np.abs(change, out=change).mean())


# ---------------------------------------------------------------------------------------------------------------------
# The clips of a video


@dataclass
class _Scene:
    """What is known of a scene so far."""

    start_s: float
    end_s: float = 0.0
    frames: int = 0
    lumas: list[float] = field(default_factory=list)
    blacks: list[float] = field(default_factory=list)
    motions: list[float] = field(default_factory=list)
    hashes: list[int] = field(default_factory=list)
    sampled: np.ndarray | None = None  # luma of the picture that was measured last
    last: np.ndarray | None = None  # the last frame, as long as only one was measured

    def add(self, picture: Callable[[], np.ndarray], until_s: float) -> None:
        """A frame that is on screen until then. Measured is what is on screen every 1 / SAMPLES_PER_S s."""
        self.frames += 1
        self.end_s = max(self.end_s, until_s)
        if len(self.lumas) <= 1:
            self.last = picture()
        measured = False
        while not self.lumas or self.start_s + len(self.lumas) / SAMPLES_PER_S < until_s - 1e-6:
            if measured:  # still on screen
                self.motions.append(0.0)
                self.lumas.append(self.lumas[-1])
                self.blacks.append(self.blacks[-1])
                self.hashes.append(self.hashes[-1])
            else:
                self._measure(luma(picture()))
                measured = True

    def _measure(self, picture: np.ndarray) -> None:
        if self.sampled is not None:
            self.motions.append(float(np.abs(picture - self.sampled).mean()))
        self.sampled = picture
        self.lumas.append(float(picture.mean()))
        self.blacks.append(float((picture <= BLACK_LEVEL).mean()))
        self.hashes.append(phash(picture))

    def row(self) -> np.ndarray:
        """CLIP [1]."""
        motions = self.motions
        if not motions and self.frames > 1:  # shorter than from sample to sample
            assert self.last is not None and self.sampled is not None
            motions = [float(np.abs(luma(self.last) - self.sampled).mean())]
        count = len(self.hashes)
        hashes = [self.hashes[min(count - 1, (2 * i + 1) * count // (2 * HASHES))] for i in range(HASHES)]
        values = (
            round(self.start_s, TIME_DIGITS), round(self.end_s, TIME_DIGITS), self.frames,
            float(np.mean(self.lumas)), float(np.mean(self.blacks)),
            float(np.mean(motions)) if motions else 0.0,
            float(np.mean(np.less(motions, STATIC_LEVELS))) if motions else 1.0, hashes,
        )  # fmt: skip
        return np.array([values], CLIP)


class Scenes:
    """Cuts a video into its scenes while it is decoded.

    Args:
        threshold: a frame whose content score against the one before is at least this begins a scene; None: the video
            is one clip, whatever happens in it.
        min_s: a shorter scene is left out.
    """

    def __init__(self, threshold: float | None = None, min_s: float = 0.0) -> None:
        self.threshold = threshold
        self.min_s = min_s
        self.clips: list[np.ndarray] = []
        self.too_short = 0  # scenes that were left out
        self.frames = 0  # of the video
        self._scene: _Scene | None = None
        self._before: np.ndarray | None = None
        self._all_black = True

    def add(self, picture: Callable[[], np.ndarray], begins_s: float, until_s: float) -> None:
        """A frame, on screen from `begins_s` to `until_s`, in seconds. `picture` gives its pixels, uint8 [H,W,3], all
        of one size; without cuts they are asked for only where they are measured, since scaling takes its time."""
        self.frames += 1
        if self.threshold is not None:
            rgb = picture()
            picture = lambda: rgb  # noqa: E731
            now = hsv(rgb)
            faded = float(rgb.mean()) < FADED_LEVEL
            changed = self._before is not None and content_score(now, self._before) >= self.threshold
            self._before = now
            if self._all_black and not faded:
                self._all_black = False
                self._scene = None  # a fade in from black
            if (changed or faded) and not self._all_black:
                self._end()
            if faded and not self._all_black:
                return
        if self._scene is None:
            self._scene = _Scene(begins_s)
        self._scene.add(picture, until_s)

    def _end(self) -> None:
        if self._scene is not None:
            if self._scene.end_s - self._scene.start_s >= self.min_s - 1e-6:
                self.clips.append(self._scene.row())
            else:
                self.too_short += 1
            self._scene = None

    def end(self) -> np.ndarray:
        """The clips in their order, CLIP [N]. A video that is black throughout is one."""
        self._end()
        return np.concatenate([np.empty(0, CLIP), *self.clips])
