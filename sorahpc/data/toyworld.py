"""The toy world: captioned clips of one moving object, with known physics.

A circle, square or triangle in one of six colours moves at constant speed along an axis over a plain grey background.
In some clips it bounces off a wall, in some it passes behind a bar. Every clip is a function of (seed, index) alone;
the centre of the object at any time is known in closed form (`Scene.position`), and the caption can be read back
(`parse_caption`). It is the demo's data and the ground truth of evaluation.

Axes as in an image: x to the right, y down, in px from the top left corner; time in seconds from the first frame.
"""

from __future__ import annotations

import dataclasses
import json
import math
import multiprocessing
import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sorahpc.data.mp4 import write_mp4
from sorahpc.errors import DataError
from sorahpc.runs import atomic_write

# Saturated, about 60 degrees of hue apart: 4:2:0 chroma and a small VAE blur them, but do not turn one into another.
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (230, 30, 30),
    "yellow": (230, 220, 20),
    "green": (30, 190, 50),
    "cyan": (20, 200, 220),
    "blue": (40, 60, 235),
    "magenta": (225, 40, 215),
}
SHAPES = ("circle", "square", "triangle")
SIZES: dict[str, float] = {"small": 0.26, "large": 0.38}  # of the frame's shorter side
DIRECTIONS: dict[str, tuple[int, int]] = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
SPEEDS: dict[str, float] = {"slowly": 0.13, "fast": 0.27}  # of the frame's side along the motion, a second

# Half width and half height of a shape of size 1, chosen so that the three look equally large. The triangle points up.
HALF_EXTENTS = {"circle": (0.5, 0.5), "square": (0.45, 0.45), "triangle": (0.55, 0.5)}

FRAMES = (9, 13, 17)
SIZES_PX = ((64, 64), (48, 80), (80, 48))  # height x width: square, landscape, portrait
FPS = 8.0
BAR_SHARE = 0.10  # thickness of the bar, of the side along the motion
_CRF = 12
_SUPERSAMPLING = 4

_CAPTION = re.compile(
    rf"a (?P<size>{'|'.join(SIZES)}) (?P<colour>{'|'.join(COLOURS)}) (?P<shape>{'|'.join(SHAPES)}) "
    rf"moves (?P<direction>{'|'.join(DIRECTIONS)}) (?P<speed>{'|'.join(SPEEDS)})"
    r"(?P<bounce>, bounces off the wall)?(?P<occluder>, passes behind a bar)?"
)


@dataclass(frozen=True)
class Scene:
    """One clip, completely. `direction` is the direction at the first frame, before any bounce."""

    colour: str
    shape: str
    size: str
    direction: str
    speed: str
    bounce: bool
    occluder: bool
    frames: int
    height: int
    width: int
    fps: float
    seed: int
    index: int
    start: tuple[float, float]  # centre of the object at time 0, (x, y) in px
    bar: tuple[float, float] | None  # from and to along the motion, in px
    background: tuple[int, float, float]  # grey level in the middle, and its rise from edge to edge along x and y

    @property
    def axis(self) -> int:
        """0 where the object moves along x, 1 along y."""
        return 0 if DIRECTIONS[self.direction][0] else 1

    @property
    def half_extents(self) -> tuple[float, float]:
        """Half width and half height of the object in px."""
        scale = SIZES[self.size] * min(self.height, self.width)
        half_w, half_h = HALF_EXTENTS[self.shape]
        return half_w * scale, half_h * scale

    @property
    def velocity(self) -> tuple[float, float]:
        """Velocity at time 0, (x, y) in px a second."""
        dx, dy = DIRECTIONS[self.direction]
        rate = SPEEDS[self.speed]
        return dx * rate * self.width, dy * rate * self.height

    def position(self, time_s: float) -> tuple[float, float]:
        """Centre of the object, (x, y) in px: uniform motion, reflected elastically where an edge meets a wall."""
        axis, half = self.axis, self.half_extents
        side = (self.width, self.height)[axis]
        low, high = half[axis], side - half[axis]
        place = list(self.start)
        span = high - low
        phase = (self.start[axis] + self.velocity[axis] * time_s - low) % (2 * span)
        place[axis] = low + (phase if phase <= span else 2 * span - phase)
        return place[0], place[1]


def scene_of(
    seed: int,
    index: int,
    *,
    frames: Sequence[int] = FRAMES,
    sizes: Sequence[tuple[int, int]] = SIZES_PX,
    fps: float = FPS,
) -> Scene:
    """The scene of clip `index` of world `seed`: a pure function of its arguments.

    Any 6 clips in a row from a multiple of 6 hold every colour once, and any 288 from a multiple of 288 every
    combination of colour, shape, direction, size and speed once. Length, size, bounce and bar are drawn at random.

    Args:
        frames, sizes, fps: what to choose from; sizes are (height, width), even and at least 32 px.

    Raises:
        ValueError: a negative seed or index, or lengths, sizes or an fps that no clip can have.
    """
    if seed < 0 or index < 0:
        raise ValueError(f"seed and index are at least 0, not {seed} and {index}")
    if not frames or min(frames) < 1 or not fps > 0:
        raise ValueError(f"at least one frame and an fps above 0, not frames={list(frames)} fps={fps}")
    if not sizes or any(h < 32 or w < 32 or h % 2 or w % 2 for h, w in sizes):
        raise ValueError(f"sizes: pairs (height, width), even and at least 32 px, not {list(sizes)}")
    colour, shape, direction, size, speed = _attributes(seed, index)
    rng = np.random.default_rng([seed, 1, index])
    num_frames = int(frames[int(rng.integers(len(frames)))])
    height, width = sizes[int(rng.integers(len(sizes)))]
    scene = Scene(
        colour, shape, size, direction, speed, bounce=False, occluder=False, frames=num_frames, height=int(height),
        width=int(width), fps=float(fps), seed=seed, index=index, start=(0.0, 0.0), bar=None,
        background=_background(rng),
    )  # fmt: skip
    axis, half = scene.axis, scene.half_extents
    side, across = ((width, height), (height, width))[axis]
    sign = DIRECTIONS[direction][axis]
    low, high = half[axis], side - half[axis]
    travel = SPEEDS[speed] * side * (num_frames - 1) / fps
    bar_px = BAR_SHARE * side

    wants_bar, wants_bounce = rng.random() < 0.35, rng.random() < 0.3
    occluder = wants_bar and 2 * half[axis] + bar_px <= travel <= high - low  # free of the bar at both ends
    bounce = not occluder and num_frames > 1 and (wants_bounce or travel > high - low)
    if bounce:  # meets the wall at 40 to 65 % of the clip, so that the first leg is the longer way from the start
        run = min(travel * rng.uniform(0.40, 0.65), high - low)
        along = high - run if sign > 0 else low + run
    else:
        first = rng.uniform(low, high - travel)
        along = first if sign > 0 else low + high - first
    bar = None
    if occluder:
        middle = along + sign * travel / 2
        bar = (middle - bar_px / 2, middle + bar_px / 2)
    off = rng.uniform(half[1 - axis], across - half[1 - axis])
    start = (along, off) if axis == 0 else (off, along)
    return dataclasses.replace(
        scene, bounce=bounce, occluder=occluder, bar=bar, start=(float(start[0]), float(start[1]))
    )


def _attributes(seed: int, index: int) -> tuple[str, str, str, str, str]:
    """Balanced by counting in mixed radix; each digit is rotated by a random amount for every value of those below it,
    so that short runs are mixed too, and the whole block stays a permutation of all combinations."""
    choices = (tuple(COLOURS), SHAPES, tuple(DIRECTIONS), tuple(SIZES), tuple(SPEEDS))
    block, rest = divmod(index, math.prod(len(c) for c in choices))
    rng = np.random.default_rng([seed, 0, block])
    below, num_below, words = 0, 1, []
    for words_of in choices:
        radix = len(words_of)
        shift = rng.integers(radix, size=num_below)
        rest, digit = divmod(rest, radix)
        words.append(words_of[int(digit + shift[below]) % radix])
        below += digit * num_below
        num_below *= radix
    return words[0], words[1], words[2], words[3], words[4]


def _background(rng: np.random.Generator) -> tuple[int, float, float]:
    level = int(rng.integers(28, 60) if rng.random() < 0.5 else rng.integers(185, 216))
    rise_x, rise_y = rng.uniform(-16, 16, size=2) if rng.random() < 0.5 else (0.0, 0.0)
    return level, round(float(rise_x), 3), round(float(rise_y), 3)


def render(scene: Scene) -> np.ndarray:
    """Frames of a scene, uint8 [T, H, W, 3], RGB. Edges are anti-aliased by 4 x 4 samples a pixel."""
    height, width = scene.height, scene.width
    level, rise_x, rise_y = scene.background
    ramp_x = rise_x * ((np.arange(width) + 0.5) / width - 0.5)
    ramp_y = rise_y * ((np.arange(height) + 0.5) / height - 0.5)
    grey = (level + ramp_y[:, None] + ramp_x[None, :]).astype(np.float32)
    frames = np.repeat(np.repeat(grey[None, :, :, None], scene.frames, axis=0), 3, axis=3)

    half_w, half_h = scene.half_extents
    n_w, n_h = math.ceil(2 * half_w) + 2, math.ceil(2 * half_h) + 2  # box that holds the object at any subpixel place
    colour = np.array(COLOURS[scene.colour], np.float32)
    sub = (np.arange(max(n_w, n_h) * _SUPERSAMPLING) + 0.5) / _SUPERSAMPLING
    inside = _INSIDE[scene.shape]
    for t in range(scene.frames):
        x, y = scene.position(t / scene.fps)
        x0, y0 = math.floor(x - half_w), math.floor(y - half_h)
        u = (x0 + sub[: n_w * _SUPERSAMPLING] - x) / half_w
        v = (y0 + sub[: n_h * _SUPERSAMPLING] - y) / half_h
        covered = inside(u[None, :], v[:, None]).reshape(n_h, _SUPERSAMPLING, n_w, _SUPERSAMPLING)
        alpha = covered.mean(axis=(1, 3), dtype=np.float32)[:, :, None]
        top, left = max(y0, 0), max(x0, 0)
        alpha = alpha[top - y0 : height - y0, left - x0 : width - x0]
        box = frames[t, top : top + alpha.shape[0], left : left + alpha.shape[1]]
        box += alpha * (colour - box)

    if scene.bar is not None:
        bar = 120.0
        cells = np.arange(width if scene.axis == 0 else height)
        cover = np.clip(np.minimum(scene.bar[1], cells + 1) - np.maximum(scene.bar[0], cells), 0, 1).astype(np.float32)
        alpha = cover[None, None, :, None] if scene.axis == 0 else cover[None, :, None, None]
        frames += alpha * (bar - frames)
    return np.rint(frames).astype(np.uint8)


# Whether points of the box [-1, 1] x [-1, 1] (v down) are inside the shape.
_INSIDE: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "circle": lambda u, v: u * u + v * v <= 1,
    "square": lambda u, v: (np.abs(u) <= 1) & (np.abs(v) <= 1),
    "triangle": lambda u, v: (np.abs(v) <= 1) & (2 * np.abs(u) <= v + 1),
}


def caption(scene: Scene) -> str:
    """``a small red circle moves right slowly``, with ``, bounces off the wall`` or ``, passes behind a bar``."""
    text = f"a {scene.size} {scene.colour} {scene.shape} moves {scene.direction} {scene.speed}"
    if scene.bounce:
        text += ", bounces off the wall"
    if scene.occluder:
        text += ", passes behind a bar"
    return text


def parse_caption(text: str) -> dict[str, Any]:
    """The words of a caption: colour, shape, size, direction, speed (str), bounce, occluder (bool).

    Raises:
        ValueError: not a caption of the toy world.
    """
    match = _CAPTION.fullmatch(text.strip())
    if not match:
        raise ValueError(
            f"not a toy-world caption: {text[:200]!r}; expected like 'a small red circle moves right slowly' "
            "with ', bounces off the wall' or ', passes behind a bar'"
        )
    words: dict[str, Any] = match.groupdict()
    return {**words, "bounce": words["bounce"] is not None, "occluder": words["occluder"] is not None}


def write_world(
    folder: Path | str,
    num_clips: int,
    seed: int = 0,
    *,
    frames: Sequence[int] = FRAMES,
    sizes: Sequence[tuple[int, int]] = SIZES_PX,
    fps: float = FPS,
    workers: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> int:
    """Write clips 0 .. num_clips-1 of a world: ``000000.mp4``, its caption ``000000.txt``, and ``scenes.jsonl``.

    Clips that exist are left as they are, so running it again after a kill writes what is missing, and a larger
    `num_clips` extends the world.

    Args:
        folder: where to; made if missing.
        seed, frames, sizes, fps: the world, as for `scene_of`.
        workers: processes that render; the files do not depend on it.
        progress: called with (clips done, clips in all) as they get ready.

    Returns:
        Number of clips written now.

    Raises:
        ValueError: as `scene_of`, or num_clips or workers below 1.
        DataError: the folder holds another world (its first differing clip is named), or can't be written.
    """
    folder = Path(folder)
    if num_clips < 1 or workers < 1:
        raise ValueError(f"num_clips and workers are at least 1, not {num_clips} and {workers}")
    scenes = [scene_of(seed, i, frames=frames, sizes=sizes, fps=fps) for i in range(num_clips)]
    lines = [json.dumps({"name": _name(s), "caption": caption(s), **dataclasses.asdict(s)}) for s in scenes]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        listing = folder / "scenes.jsonl"
        known = listing.read_text(encoding="utf-8").splitlines() if listing.exists() else []
        for i, (old, new) in enumerate(zip(known, lines, strict=False)):
            if old != new:
                raise DataError(
                    f"{listing}: line {i + 1} is of another world than seed={seed} frames={list(frames)} "
                    f"sizes={[tuple(s) for s in sizes]} fps={fps}; delete the folder, or choose another"
                )
        if len(lines) > len(known):  # first: from now on the folder is known to be this world's
            atomic_write(listing, "\n".join(lines) + "\n")
        missing = [s for s in scenes if not ((folder / _name(s)).exists() and _caption_path(folder, s).exists())]
        done = num_clips - len(missing)
        if progress:
            progress(done, num_clips)
        for _ in _written(folder, missing, workers):
            done += 1
            if progress:
                progress(done, num_clips)
    except OSError as error:
        raise DataError(f"{folder}: can't write the toy world: {error.strerror or error}") from None
    return len(missing)


def _written(folder: Path, scenes: list[Scene], workers: int) -> Iterator[None]:
    jobs = [(folder, scene) for scene in scenes]
    workers = min(workers, len(jobs) // 32 + 1)  # a process costs 0.3 s to start: as much as 60 clips
    if workers == 1:
        yield from map(_write_clip, jobs)
        return
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield from pool.map(_write_clip, jobs, chunksize=16)


def _write_clip(job: tuple[Path, Scene]) -> None:
    folder, scene = job
    # Not durable: a world is made again in seconds, and fsync of 2,000 small files takes longer than rendering them.
    atomic_write(_caption_path(folder, scene), caption(scene) + "\n", durable=False)
    write_mp4(folder / _name(scene), render(scene), scene.fps, crf=_CRF, durable=False)


def _name(scene: Scene) -> str:
    return f"{scene.index:06d}.mp4"


def _caption_path(folder: Path, scene: Scene) -> Path:
    return folder / f"{scene.index:06d}.txt"
