"""What a clip of the toy world shows, judged from its pixels alone, against its prompt.

The background is grey, so the object is where a pixel's largest and smallest channel differ. From that map of coverage:

- visible: in at least 70 % of the frames one compact blob of sensible area;
- colour: the hue of the blob's middle, nearest of the six;
- shape: three- and four-fold moments of the coverage, sum of w (x + iy)^3 and ^4 about its centre. These are moments of
  harmonic polynomials, which isotropic blur leaves as they are, so a soft VAE does not turn squares into circles;
- direction and speed: the track of the blob's centre; direction is that of the first leg, before any bounce;
- size: the area, for the shape that was found.
"""

from __future__ import annotations

import colorsys
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sorahpc.data.toyworld import COLOURS, FPS, HALF_EXTENTS, SIZES, SPEEDS, parse_caption

MIN_CHROMA = 40.0  # largest minus smallest channel, of 255, from which a pixel can be part of the object
MIN_AREA, MAX_AREA = 0.006, 0.30  # of the frame; the toy world has 0.02 to 0.12
MIN_COMPACT = 0.55  # area over that of the ellipse with the same second moments; a triangle has 0.83
MIN_SHARE_IN_BLOB = 0.75  # of the coverage of a frame
MIN_VISIBLE_FRAMES = 0.7
MIN_TRAVEL = 0.03  # of the frame's side: less is standing still

# Thresholds between the exact moments of the shapes, over area^2.5 and area^3:
# three-fold 0 for circle and square, 0.068 for the triangle; four-fold 0 for the circle, -1/60 for the square.
_THREE_FOLD, _FOUR_FOLD = 0.035, 1 / 120


@dataclass(frozen=True)
class Judgement:
    """What was seen, and whether the prompt asked for it. Nothing is seen of an object that is not visible."""

    visible: bool
    colour: str | None
    colour_ok: bool
    shape: str | None
    shape_ok: bool
    direction: str | None  # None: it does not move
    direction_ok: bool
    size: str | None
    size_ok: bool
    speed: str | None
    speed_ok: bool


def judge(frames: np.ndarray, prompt: str, fps: float = FPS) -> Judgement:
    """Judge a clip against a caption of the toy world.

    Args:
        frames: uint8 [T, H, W, 3], RGB.
        prompt: a caption as `toyworld.caption` writes it. Its direction is that of the first leg.
        fps: frames a second, for the speed.

    Raises:
        ValueError: the prompt is not such a caption, or the frames are of another shape or dtype.
    """
    asked = parse_caption(prompt)
    if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != np.uint8 or 0 in frames.shape:
        raise ValueError(f"frames must be uint8 [T, H, W, 3], not {frames.dtype} {list(frames.shape)}")
    seen = _see(frames, fps)
    if seen is None:
        return Judgement(False, None, False, None, False, None, False, None, False, None, False)
    colour, shape, direction, size, speed = seen
    return Judgement(
        True,
        colour, colour == asked["colour"],
        shape, shape == asked["shape"],
        direction, direction == asked["direction"],
        size, size == asked["size"],
        speed, speed == asked["speed"],
    )  # fmt: skip


def score(judgements: Sequence[Judgement]) -> dict[str, float]:
    """Shares of clips that show what was asked for: visible, colour, shape, direction, size, speed, each in [0, 1].

    Raises:
        ValueError: no judgements.
    """
    if not judgements:
        raise ValueError("at least one judgement expected, found none")
    names = {"visible": "visible"} | {n: f"{n}_ok" for n in ("colour", "shape", "direction", "size", "speed")}
    return {name: sum(getattr(j, field) for j in judgements) / len(judgements) for name, field in names.items()}


@dataclass(frozen=True)
class _Blob:
    area: float  # px
    x: float
    y: float
    three_fold: float
    four_fold: float
    rgb: np.ndarray  # float [3], of its middle


def _see(frames: np.ndarray, fps: float) -> tuple[str, str, str | None, str, str] | None:
    """Colour, shape, direction, size and speed of the object, or None where there is none."""
    num_frames, height, width, _ = frames.shape
    smooth = _box3(frames.astype(np.float32))
    red, green, blue = smooth[..., 0], smooth[..., 1], smooth[..., 2]  # max(axis=-1) of an axis of 3 is 5 times slower
    chroma = np.maximum(np.maximum(red, green), blue) - np.minimum(np.minimum(red, green), blue)
    # A blurred object has a weaker middle: its own peak is what full coverage means. The area of the peak is that of
    # the smallest object, so that single bright pixels do not set it.
    few = max(4, round(MIN_AREA * height * width))
    peaks = np.partition(chroma.reshape(num_frames, -1), -few, axis=1)[:, -few]
    peak = float(np.median(peaks))
    if peak < MIN_CHROMA:
        return None
    blobs = [_blob(smooth[t], chroma[t] / peak) for t in range(num_frames)]
    times = [t for t, b in enumerate(blobs) if b is not None]
    found = [b for b in blobs if b is not None]
    if len(found) < MIN_VISIBLE_FRAMES * num_frames:
        return None
    colour = _nearest_colour(np.median([b.rgb for b in found], axis=0))
    # Behind a bar the outline is cut: only frames with (nearly) the whole of it say something about shape and size.
    full = float(np.percentile([b.area for b in found], 90))
    uncut = np.array([b.area > 0.92 * full for b in found])
    whole = [b for b, is_whole in zip(found, uncut, strict=True) if is_whole]
    shape = _shape(whole)
    half_w, half_h = HALF_EXTENTS[shape]
    unit_area = {"circle": math.pi, "square": 4.0, "triangle": 2.0}[shape] * half_w * half_h
    scale = math.sqrt(float(np.median([b.area for b in whole])) / unit_area) / min(height, width)
    size = _nearest_log(scale, SIZES)
    track = np.array([(b.x / width, b.y / height) for b in found])
    rate = _rate(np.array(times)[uncut] / fps, track[uncut])
    return colour, shape, _direction(track), size, _nearest_log(rate, SPEEDS)


def _box3(frames: np.ndarray) -> np.ndarray:
    """Mean over 3 x 3 px, edges repeated: takes the noise of single pixels and of 4:2:0 chroma away."""
    padded = np.pad(frames, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="edge")
    rows = padded[:, :-2] + padded[:, 1:-1] + padded[:, 2:]
    return (rows[:, :, :-2] + rows[:, :, 1:-1] + rows[:, :, 2:]) / 9


def _blob(rgb: np.ndarray, coverage: np.ndarray) -> _Blob | None:
    """The object in a frame, if there is one. `coverage`: [H, W], 1 in its middle, 0 on the background."""
    height, width = coverage.shape
    mask = coverage > 0.5
    count = int(mask.sum())
    if not MIN_AREA * height * width <= count <= MAX_AREA * height * width:
        return None
    ys, xs = np.nonzero(mask)
    y, x = float(np.median(ys)), float(np.median(xs))
    for _ in range(3):  # the middle of what is near the middle: specks elsewhere do not pull
        near = np.hypot(ys - y, xs - x) <= 1.9 * math.sqrt(count / math.pi)
        if near.sum() < MIN_SHARE_IN_BLOB * count:
            return None
        y, x = float(ys[near].mean()), float(xs[near].mean())
    spread = np.cov(np.stack([xs[near], ys[near]]), bias=True) + np.eye(2) / 12  # + a pixel's own extent
    if near.sum() / (4 * math.pi * math.sqrt(float(np.linalg.det(spread)))) < MIN_COMPACT:
        return None

    # Again with soft edges, for a centre and an outline finer than a pixel.
    radius = 1.9 * math.sqrt(count / math.pi) + 1
    top, bottom = max(0, math.floor(y - radius)), min(height, math.ceil(y + radius) + 1)
    left, right = max(0, math.floor(x - radius)), min(width, math.ceil(x + radius) + 1)
    grid_y, grid_x = np.mgrid[top:bottom, left:right].astype(np.float64)
    soft = np.clip((coverage[top:bottom, left:right] - 0.2) / 0.6, 0, 1)
    soft = np.where(np.hypot(grid_y - y, grid_x - x) <= radius, soft, 0)
    area = float(soft.sum())
    y, x = float((soft * grid_y).sum() / area), float((soft * grid_x).sum() / area)
    z = (grid_x - x) + 1j * (grid_y - y)
    third, fourth = (soft * z**3).sum(), (soft * z**4).sum()
    middle = coverage[top:bottom, left:right] >= np.quantile(coverage[mask], 0.5)
    return _Blob(
        area=area,
        x=x + 0.5,
        y=y + 0.5,
        three_fold=float(abs(third)) / area**2.5,
        four_fold=float(fourth.real) / area**3,
        rgb=np.median(rgb[top:bottom, left:right][middle], axis=0),
    )


def _shape(blobs: Sequence[_Blob]) -> str:
    if float(np.median([b.three_fold for b in blobs])) > _THREE_FOLD:
        return "triangle"
    return "square" if float(np.median([b.four_fold for b in blobs])) < -_FOUR_FOLD else "circle"


def _nearest_colour(rgb: np.ndarray) -> str:
    def hue(red: float, green: float, blue: float) -> float:
        return colorsys.rgb_to_hsv(red / 255, green / 255, blue / 255)[0]

    mine = hue(*(float(c) for c in rgb))
    return min(COLOURS, key=lambda name: abs((hue(*COLOURS[name]) - mine + 0.5) % 1 - 0.5))


def _nearest_log(value: float, choices: dict[str, float]) -> str:
    return min(choices, key=lambda name: abs(math.log(max(value, 1e-6) / choices[name])))


def _rate(times_s: np.ndarray, track: np.ndarray) -> float:
    """Speed in frame sides a second of a track [T, 2] in frame sides: the median over time, so that the moments of a
    bounce do not count. Gaps, where the object was behind a bar, count as long as they are."""
    if len(track) < 2:
        return 0.0
    axis = int(np.argmax(np.ptp(track, axis=0)))
    spans = np.diff(times_s)
    rates = np.abs(np.diff(track[:, axis])) / spans
    order = np.argsort(rates)
    half = np.searchsorted(np.cumsum(spans[order]), spans.sum() / 2)
    return float(rates[order[half]])


def _direction(track: np.ndarray) -> str | None:
    """Direction of the first leg of a track [T, 2] in frame sides; None where it stands still."""
    reach = np.ptp(track, axis=0)
    axis = int(np.argmax(reach))
    if reach[axis] < MIN_TRAVEL:
        return None
    # The first leg is what first takes it a quarter of its reach away from the start; less is noise, or a bar's edge.
    ahead = track[:, axis] - track[0, axis]
    leg = ahead[np.argmax(np.abs(ahead) >= 0.25 * reach[axis])]
    return (("left", "right"), ("up", "down"))[axis][int(leg > 0)]
