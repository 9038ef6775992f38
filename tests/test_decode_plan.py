"""decode: a clip is planned with the size and length that its video, the VAE and the budget of tokens allow."""

from __future__ import annotations

import math
from typing import Any

import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from plans import plan, row
from pydantic import ValidationError

from sorahpc.config import ClipConfig
from sorahpc.configfile import parse_config
from sorahpc.data.decode import ClipPlan, VideoError, plan_clip
from sorahpc.errors import ConfigError
from sorahpc.models.lengths import Lengths


def floor4(n: int) -> int:
    return (n - 1) // 4 * 4 + 1


@given(
    width=st.integers(1, 5000),
    height=st.integers(1, 5000),
    area=st.integers(256, 400_000),
    unit_h=st.sampled_from([1, 4, 8, 16, 32]),
    unit_w=st.sampled_from([1, 4, 8, 16, 32]),
    duration=st.floats(0, 1e6),
    fps=st.floats(0.1, 240),
    max_frames=st.integers(1, 129),
    min_frames=st.integers(1, 129),
)
@settings(max_examples=300, deadline=None)
def test_a_plan_keeps_every_promise(
    width: int, height: int, area: int, unit_h: int, unit_w: int, duration: float, fps: float, max_frames: int,
    min_frames: int,
) -> None:  # fmt: skip
    video = row(width=width, height=height, duration_s=duration)
    clip = ClipConfig(fps=fps, max_frames=max_frames, min_frames=min(min_frames, max_frames), max_area_px=area)
    try:
        made = plan_clip(video, clip, stride=(4, unit_h, unit_w), patch=(1, 1, 1), lengths=Lengths(4, 4))
    except ConfigError as error:
        assert unit_h * unit_w > area and "clip.max_area_px" in str(error)
        return
    except VideoError as error:
        if error.reason.startswith("too short"):
            assert floor4(min(max_frames, max(1, math.ceil((duration - 1e-3) * fps)))) < clip.min_frames
        else:
            assert error.reason.startswith("too small") and (height < unit_h or width < unit_w)
        return
    assert made.height % unit_h == 0 and made.width % unit_w == 0
    assert unit_h <= made.height <= height and unit_w <= made.width <= width
    assert made.height * made.width <= area
    n = len(made.times_s)
    assert floor4(n) == n and clip.min_frames <= n <= max_frames
    assert made.times_s[0] == 0 and all(b > a for a, b in zip(made.times_s, made.times_s[1:], strict=False))
    assert made.times_s[-1] < max(duration, 1e-9)


@given(
    width=st.integers(16, 2000),
    height=st.integers(16, 2000),
    duration=st.floats(0.1, 30),
    max_tokens=st.integers(1, 3000),
    min_area=st.none() | st.integers(1, 65_536),
    min_frames=st.integers(1, 40),
    pt=st.sampled_from([1, 2]),
)
@settings(max_examples=300, deadline=None)
def test_a_clip_over_its_tokens_is_made_smaller_then_shorter(
    width: int, height: int, duration: float, max_tokens: int, min_area: int | None, min_frames: int, pt: int
) -> None:
    """Against every length and every size there is."""
    video = row(width=width, height=height, duration_s=duration)
    wishes = {"fps": 8, "max_frames": 97, "min_frames": min_frames, "max_area_px": 65_536}
    how: dict[str, Any] = {"stride": (4, 8, 8), "patch": (pt, 2, 2), "lengths": Lengths(4, 4)}

    def tokens(made: ClipPlan) -> int:
        return ((len(made.times_s) - 1) // 4 + 1) // pt * (made.height // 16) * (made.width // 16)

    def attempt(**more: object) -> ClipPlan | None:
        try:
            return plan_clip(video, ClipConfig(**{**wishes, **more}), **how)
        except VideoError as error:
            assert error.reason.startswith(("too short", "too many tokens"))
            return None

    free = attempt()
    made = attempt(max_tokens=max_tokens, min_area_px=min_area)
    if free is None:
        assert made is None
        return
    assert ((len(free.times_s) - 1) // 4 + 1) % pt == 0
    least = min(min_area or 1, free.height * free.width)
    possible = []  # (frames, its best size) of each shorter length within the budget
    for frames in range(min_frames, len(free.times_s) + 1):
        layers = (frames - 1) // 4 + 1
        if floor4(frames) == frames and layers % pt == 0 and (area := max_tokens // (layers // pt) * 256) >= 256:
            best = attempt(max_area_px=min(area, 65_536))
            if best is not None and best.height * best.width >= least:
                possible.append((frames, best.height, best.width))
    if made is None:
        assert not possible
    else:
        assert tokens(made) <= max_tokens
        assert (len(made.times_s), made.height, made.width) == possible[-1]


def test_a_budget_of_tokens_that_a_clip_keeps_changes_nothing() -> None:
    video = row(width=1280, height=720, duration_s=2.2)
    free = plan(video, max_area_px=65_536)
    tokens = 5 * (free.height // 16) * (free.width // 16)
    assert plan(video, max_area_px=65_536, max_tokens=tokens) == free
    less = plan(video, max_area_px=65_536, max_tokens=tokens - 1)
    assert len(less.times_s) == 17 and less.height * less.width < free.height * free.width
    kept = plan(video, max_area_px=65_536, max_tokens=tokens - 1, min_area_px=65_536)
    assert (kept.height, kept.width, len(kept.times_s)) == (free.height, free.width, 13)
    with pytest.raises(VideoError, match=r"too many tokens: over clip.max_tokens=3 with clip.min_frames=17 at 256 px"):
        plan(video, max_area_px=65_536, max_tokens=3, min_frames=17)
    with pytest.raises(ConfigError, match=r"clip.max_tokens: expected at most train.tokens_per_pack = 8, .* not 9"):
        parse_config(tiny.config_data(clip={"max_tokens": 9}))
    with pytest.raises(ValidationError, match="min_area_px: only with max_tokens"):
        ClipConfig(min_area_px=256)


@given(st.integers(16, 3000), st.integers(16, 3000), st.integers(256, 300_000))
@settings(max_examples=100, deadline=None)
def test_no_other_size_would_keep_more_of_the_picture(width: int, height: int, area: int) -> None:
    def worth(h: int, w: int) -> float:
        ratio = (w * height) / (h * width)
        return min(ratio, 1 / ratio) * math.sqrt(h * w)

    made = plan(row(width=width, height=height), max_area_px=area)
    best = max(
        worth(h, w)
        for h in range(16, height + 1, 16)
        for w in range(16, min(width, area // h) + 1, 16)
    )  # fmt: skip
    assert worth(made.height, made.width) == pytest.approx(best)


@pytest.mark.parametrize(
    ("width", "height", "area", "size"),
    [
        (64, 64, 4096, (64, 64)),
        (80, 48, 4096, (48, 80)),
        (48, 80, 4096, (80, 48)),
        (320, 240, 4096, (48, 64)),
        (1920, 1080, 65536, (192, 336)),
        (1080, 1920, 65536, (336, 192)),
        (50, 50, 65536, (48, 48)),  # never scaled up
    ],
)
def test_sizes_of_usual_videos(width: int, height: int, area: int, size: tuple[int, int]) -> None:
    made = plan(row(width=width, height=height), max_area_px=area)
    assert (made.height, made.width) == size


@pytest.mark.parametrize(
    ("duration", "fps", "frames"),
    [
        (17 / 8, 8, 17),
        (16 / 8, 8, 13),
        (13 / 8, 8, 13),
        (9 / 8, 8, 9),
        (0.0, 8, 1),
        (1e9, 8, 17),
        (4.004, 4, 17),
        (0.4, 8, 1),
    ],
)
def test_the_number_of_frames_is_what_the_video_lasts_and_the_vae_takes(
    duration: float, fps: float, frames: int
) -> None:
    assert len(plan(row(duration_s=duration), fps=fps).times_s) == frames


def test_a_rejected_video_has_no_plan() -> None:
    with pytest.raises(VideoError, match=r"^/v\.mp4: no caption$"):
        plan(row(status="rejected", reason="no caption"))
    with pytest.raises(VideoError, match=r"too short: 1 s, 5 frames at clip\.fps=8; clip\.min_frames=9"):
        plan(row(duration_s=1.0), min_frames=9)
