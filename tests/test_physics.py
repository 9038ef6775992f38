from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from sorahpc.data.decode import ClipPlan, decode
from sorahpc.data.mp4 import write_mp4
from sorahpc.data.toyworld import COLOURS, Scene, caption, render, scene_of
from sorahpc.metrics.physics import Judgement, judge, score

SCENES = [scene_of(11, i) for i in range(288)]  # every combination of colour, shape, direction, size and speed once
CLIPS = [render(s) for s in SCENES]


def blurred(frames: np.ndarray, sigma: float) -> np.ndarray:
    """Gaussian blur of height and width, as a small VAE does it."""
    radius = int(3 * sigma) + 1
    kernel = np.exp(-(np.arange(-radius, radius + 1) ** 2) / (2 * sigma**2))
    out = frames.astype(np.float32)
    for axis in (1, 2):
        pad = [(radius, radius) if a == axis else (0, 0) for a in range(4)]
        padded, length = np.pad(out, pad, mode="edge"), out.shape[axis]
        out = sum(k * np.take(padded, range(i, i + length), axis) for i, k in enumerate(kernel / kernel.sum()))
    return np.rint(out).clip(0, 255).astype(np.uint8)


def noisy(frames: np.ndarray, sigma: float, seed: int) -> np.ndarray:
    return np.rint(frames + np.random.default_rng(seed).normal(0, sigma, frames.shape)).clip(0, 255).astype(np.uint8)


def scored(scenes: list[Scene], clips: list[np.ndarray]) -> dict[str, float]:
    return score([judge(clip, caption(scene)) for scene, clip in zip(scenes, clips, strict=True)])


def test_every_clean_render_is_judged_right() -> None:
    shares = scored(SCENES, CLIPS)
    assert shares == dict.fromkeys(("visible", "colour", "shape", "direction", "size", "speed"), 1.0)


@pytest.mark.parametrize("size", [(64, 64), (48, 80), (80, 48), (128, 128), (160, 96)])
@pytest.mark.parametrize("frames", [9, 17])
def test_the_judge_is_right_at_every_size_and_length(size: tuple[int, int], frames: int) -> None:
    scenes = [scene_of(12, i, frames=(frames,), sizes=[size]) for i in range(24)]
    shares = scored(scenes, [render(s) for s in scenes])
    assert shares["visible"] == shares["colour"] == 1
    assert min(shares.values()) >= 0.95, shares


@pytest.mark.parametrize(
    ("name", "sigma", "noise"), [("soft", 1.0, 0), ("softer", 1.5, 0), ("noisy", 0, 16), ("soft and noisy", 1.0, 8)]
)
def test_blur_and_noise_do_not_change_the_verdict(name: str, sigma: float, noise: float) -> None:
    scenes, clips = SCENES[:48], CLIPS[:48]
    if sigma:
        clips = [blurred(c, sigma) for c in clips]
    if noise:
        clips = [noisy(c, noise, i) for i, c in enumerate(clips)]
    shares = scored(scenes, clips)
    assert shares["visible"] == shares["colour"] == 1
    assert min(shares.values()) >= 0.95, shares


@pytest.mark.parametrize("crf", [18, 35])
def test_compression_does_not_change_the_verdict(tmp_path: Path, crf: int) -> None:
    clips = []
    for scene, frames in zip(SCENES[:48], CLIPS, strict=False):
        write_mp4(tmp_path / "a.mp4", frames, scene.fps, crf, durable=False)
        times = tuple(float(Fraction(t, 8)) for t in range(scene.frames))
        clips.append(decode(tmp_path / "a.mp4", ClipPlan(times, scene.height, scene.width)))
    shares = scored(SCENES[:48], clips)
    assert shares["visible"] == shares["colour"] == 1
    assert min(shares.values()) >= 0.95, shares


def empty_clips(seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    grey = np.full((9, 64, 64, 3), int(rng.integers(20, 230)), np.uint8)
    bar = grey.copy()
    bar[:, :, 28:35] = 120
    coarse = np.kron(rng.integers(0, 256, (9, 4, 4, 3)), np.ones((1, 16, 16, 1)))
    specks = grey.copy()
    specks[:, rng.integers(0, 64, 30), rng.integers(0, 64, 30)] = COLOURS["red"]
    return {
        "plain": grey,
        "a bar": bar,
        "noise on grey": noisy(grey, 16, seed),
        "a faint tint": np.clip(grey.astype(int) + (12, 0, -12), 0, 255).astype(np.uint8),
        "noise": rng.integers(0, 256, grey.shape).astype(np.uint8),
        "blurred noise": blurred(rng.integers(0, 256, grey.shape).astype(np.uint8), 2),
        "coarse noise": coarse.astype(np.uint8),
        "one colour everywhere": np.broadcast_to(np.array(COLOURS["red"], np.uint8), grey.shape).copy(),
        "black": np.zeros_like(grey),
        "specks": specks,
    }


@pytest.mark.parametrize("name", list(empty_clips(0)))
def test_nothing_is_seen_where_nothing_is(name: str) -> None:
    for seed in range(10):
        judgement = judge(empty_clips(seed)[name], "a small red circle moves right slowly")
        assert judgement == Judgement(False, None, False, None, False, None, False, None, False, None, False)


def test_an_object_that_is_there_half_of_the_time_is_not_visible() -> None:
    scene = next(s for s in SCENES if s.frames == 17 and not s.occluder)
    frames = render(scene)
    frames[4:11] = scene.background[0]
    assert not judge(frames, caption(scene)).visible
    frames = render(scene)
    frames[4:8] = scene.background[0]
    assert judge(frames, caption(scene)).visible


def test_each_word_of_the_prompt_is_held_against_the_pixels() -> None:
    i = next(i for i, s in enumerate(SCENES) if not s.bounce and not s.occluder)
    scene, frames = SCENES[i], CLIPS[i]
    text = caption(scene)
    swaps = {
        "colour": (scene.colour, "blue" if scene.colour != "blue" else "red"),
        "shape": (scene.shape, "square" if scene.shape != "square" else "circle"),
        "direction": (scene.direction, "left" if scene.direction != "left" else "up"),
        "size": (scene.size, "small" if scene.size == "large" else "large"),
        "speed": (scene.speed, "fast" if scene.speed == "slowly" else "slowly"),
    }
    for field, (true, false) in swaps.items():
        judgement = judge(frames, text.replace(true, false))
        wrong = [f for f in swaps if not getattr(judgement, f"{f}_ok")]
        assert judgement.visible and wrong == [field] and getattr(judgement, field) == true


def test_direction_is_that_before_the_bounce_and_backwards_is_the_opposite() -> None:
    opposite = {"left": "right", "right": "left", "up": "down", "down": "up"}
    straight = [i for i, s in enumerate(SCENES) if not s.bounce][:20]
    for i in straight:
        seen = judge(CLIPS[i][::-1].copy(), caption(SCENES[i]))
        assert seen.direction == opposite[SCENES[i].direction] and not seen.direction_ok
    bounces = [i for i, s in enumerate(SCENES) if s.bounce][:30]
    assert len(bounces) == 30
    assert all(judge(CLIPS[i], caption(SCENES[i])).direction_ok for i in bounces)


def test_what_stands_still_has_no_direction() -> None:
    frames = np.repeat(CLIPS[0][:1], 9, axis=0)
    judgement = judge(frames, caption(SCENES[0]))
    assert judgement.visible and judgement.direction is None and not judgement.direction_ok
    assert judge(frames[:1], caption(SCENES[0])).direction is None


def test_what_can_not_be_judged_is_refused() -> None:
    with pytest.raises(ValueError, match="not a toy-world caption"):
        judge(CLIPS[0], "a cat")
    for bad in (CLIPS[0].astype(np.float32), CLIPS[0][0], CLIPS[0][:0]):
        with pytest.raises(ValueError, match="uint8"):
            judge(bad, caption(SCENES[0]))
    with pytest.raises(ValueError, match="at least one"):
        score([])
