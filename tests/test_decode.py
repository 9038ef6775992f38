from __future__ import annotations

import dataclasses
import errno
import io
import math
import os
import socket
import threading
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import tiny
from av.filter import Graph
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from videos import NOTHING, claim_dolby_vision, claim_matrix, cut, numbered, numbers, recording, remuxed, write_video

from sorahpc.config import ClipConfig
from sorahpc.configfile import parse_config
from sorahpc.data import child, container
from sorahpc.data import decode as decode_module
from sorahpc.data import frames as frames_module
from sorahpc.data.decode import ClipPlan, VideoError, decode, may_pass, plan_clip, probe
from sorahpc.data.manifest import Video
from sorahpc.data.mp4 import _yuv420p, write_mp4
from sorahpc.data.toyworld import COLOURS, render, scene_of
from sorahpc.errors import ConfigError
from sorahpc.models.lengths import Lengths


def row(path: Path | str = "/v.mp4", **fields: object) -> Video:
    video = Video("0" * 16, str(path), "a clip", 17, 8.0, 64, 64, "h264", 2.125, 1, 1, "ok", "")
    return dataclasses.replace(video, **fields)  # type: ignore[arg-type]


def probed(path: Path) -> Video:
    return row(path, **dataclasses.asdict(probe(path)))


def floor4(n: int) -> int:
    return (n - 1) // 4 * 4 + 1


def plan(video: Video, **clip: object) -> ClipPlan:
    return plan_clip(video, ClipConfig(**clip), stride=(4, 8, 8), patch=(1, 2, 2), lengths=Lengths(4, 4))


def at(height: int, width: int, *times: float) -> ClipPlan:
    return ClipPlan(times, height, width)


# --- probing ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "frames", "fps", "width", "height"),
    [
        ("bigbuckbunny", 132, 25, 1280, 720),
        ("bikes", 250, 25, 640, 272),
        ("carphone_pristine", 120, 30000 / 1001, 193, 144),  # 176 px wide, each 128/117 as wide as high
        ("carphone_distorted", 120, 30000 / 1001, 193, 144),
    ],
)
def test_real_recordings_are_probed_and_decoded(name: str, frames: int, fps: float, width: int, height: int) -> None:
    video = probed(recording(name))
    assert (video.frames, video.width, video.height, video.codec) == (frames, width, height, "h264")
    assert video.fps == pytest.approx(fps) and video.duration_s == pytest.approx(frames / fps)
    wish = plan(video, max_area_px=96 * 96, max_frames=17)
    clip = decode(video.path, wish)
    assert clip.shape == (17, wish.height, wish.width, 3) and clip.dtype == np.uint8
    assert clip.std() > 10 and not (clip[0] == clip[-1]).all()
    assert (decode(video.path, wish) == clip).all()


@pytest.mark.parametrize(
    ("name", "codec", "pix_fmt", "canonical"),
    [
        ("a.mp4", "libx264", "yuv420p", "h264"),
        ("a.mov", "libx264", "yuv444p", "h264"),
        ("a.mkv", "libx264", "yuv420p10le", "h264"),
        ("a.webm", "libvpx-vp9", "yuv420p", "vp9"),
        ("a.avi", "mpeg4", "yuv420p", "mpeg4"),
        ("a.avi", "mjpeg", "yuvj420p", "mjpeg"),
        ("a.mkv", "ffv1", "bgr0", "ffv1"),
        ("a.mpg", "mpeg2video", "yuv420p", "mpeg2video"),
    ],
)
@pytest.mark.parametrize("audio", [False, True])
def test_containers_codecs_and_sound_do_not_matter(
    tmp_path: Path, name: str, codec: str, pix_fmt: str, canonical: str, audio: bool
) -> None:
    if audio and name == "a.mpg":
        pytest.skip("an MPEG program stream takes no AAC")
    path = write_video(tmp_path / name, numbered(26), fps=25, codec=codec, pix_fmt=pix_fmt, audio=audio)
    video = probed(path)
    assert (video.frames, video.width, video.height, video.codec) == (26, 64, 64, canonical)
    assert video.fps == pytest.approx(25, rel=0.05) and video.duration_s == pytest.approx(26 / 25, abs=0.05)
    # An AVI with sound, as FFmpeg writes it, holds its first frame for two: then so do we.
    late = int(audio and name == "a.avi")
    assert numbers(decode(path, at(64, 64, 0, 0.2, 0.4, 0.8, 1.0))) == [0, *(n - late for n in (5, 10, 20, 25))]


def test_an_image_that_is_one_frame_is_a_clip_of_one_frame(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", numbered(1), fps=8)
    video = probed(path)
    assert video.frames == 1
    assert plan(video).times_s == (0.0,)
    assert decode(path, plan(video)).shape == (1, 64, 64, 3)


def broken_files(folder: Path) -> dict[str, tuple[Path, str]]:
    """Name -> (file, start of the reason)."""
    whole = write_video(folder / "whole.mp4", numbered(96), faststart=True)
    plain = write_video(folder / "plain.mp4", numbered(96))
    mkv = write_video(folder / "whole.mkv", numbered(96))
    webm = write_video(folder / "whole.webm", numbered(96), codec="libvpx-vp9", audio=True)
    files = {
        "truncated faststart": (cut(whole, folder / "1.mp4", 0.6), "truncated or corrupt: "),
        "nearly whole": (cut(whole, folder / "2.mp4", 0.99), "truncated or corrupt: "),
        "no index": (cut(plain, folder / "3.mp4", 0.6), "corrupt or truncated: an mp4 without its index"),
        "truncated mkv": (cut(mkv, folder / "4.mkv", 0.6), "truncated"),
        "truncated webm": (cut(webm, folder / "5.webm", 0.5), "truncated"),
        "truncated avi": (
            cut(write_video(folder / "whole.avi", numbered(96), codec="mpeg4"), folder / "8.avi", 0.5),
            "truncated",
        ),
        "audio only mp4": (write_video(folder / "6.mp4", NOTHING, audio=True), "no video stream: only audio"),
        "audio only webm": (write_video(folder / "7.webm", NOTHING, audio=True), "no video stream: only audio"),
    }
    for name, data, reason in [
        ("empty", b"", "empty file"),
        ("text", b"not a video\n" * 20, "not a video: a text file"),
        ("html", b"<!DOCTYPE html><title>404</title>" + "é".encode() * 400, "not a video: a text file"),
        ("playlist", f"#EXTM3U\n#EXTINF:1,\n{whole}\n#EXT-X-ENDLIST\n".encode(), "not a video: a text file"),
        ("concat", f"ffconcat version 1.0\nfile {whole.name}\n".encode(), "not a video: a text file"),
        ("zip", b"PK\3\4" + b"\0" * 500, "not a video: a zip archive"),
        ("zeros", b"\0" * 5000, "not a video"),
        ("noise", np.random.default_rng(0).bytes(5000), "not a video"),
        ("one byte", b"\0", "not a video"),
    ]:
        path = folder / f"{name}.mp4"
        path.write_bytes(data)
        files[name] = (path, reason)
    return files


def test_broken_files_are_refused_with_their_reason(tmp_path: Path) -> None:
    for name, (path, reason) in broken_files(tmp_path).items():
        with pytest.raises(VideoError) as caught:
            probe(path)
        assert caught.value.reason.startswith(reason), (name, caught.value.reason)
        assert str(caught.value) == f"{path}: {caught.value.reason}" and "\n" not in str(caught.value)


@pytest.mark.timeout(20)
def test_what_is_no_regular_file_is_refused_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo.mp4")
    (tmp_path / "dangling.mp4").symlink_to("nowhere")
    (tmp_path / "loop.mp4").symlink_to("loop.mp4")
    (tmp_path / "folder.mp4").mkdir()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "s.mp4"))
        for name, reason in [
            ("fifo.mp4", "not a regular file: a FIFO"),
            ("dangling.mp4", "dangling link"),
            ("loop.mp4", "link that leads back to itself"),
            ("folder.mp4", "not a regular file: a folder"),
            ("s.mp4", "not a regular file: a socket"),
            ("missing.mp4", "no such file"),
        ]:
            for use in (probe, lambda p: decode(p, at(64, 64, 0))):
                with pytest.raises(VideoError) as caught:
                    use(tmp_path / name)
                assert caught.value.reason == reason
    with pytest.raises(VideoError, match="not a regular file: a device"):
        probe("/dev/zero")


def test_a_file_that_may_not_be_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(*_: object) -> int:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(decode_module.os, "open", denied)
    with pytest.raises(VideoError, match="can't read: Permission denied"):
        probe(tmp_path / "a.mp4")


@pytest.mark.parametrize("reads", [0, 1, 2])
def test_what_the_file_system_does_not_give_is_not_told_as_a_fault_of_the_video(tmp_path: Path, reads: int) -> None:
    """Reading fails at the first bytes, while FFmpeg opens the file, and in the middle of it."""
    noise = np.random.default_rng(0).integers(0, 255, (20, 128, 128, 3), dtype=np.uint8)
    left = [reads]

    class Away(io.FileIO):
        def read(self, size: int | None = -1) -> bytes:
            left[0] -= 1
            if left[0] < 0:
                raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
            return super().read(size)

    with Away(write_video(tmp_path / "noise.mp4", noise)) as file:
        answer = child.serve({"what": "probe"}, file, None)
    assert answer == {"unusable": "can't read: Stale file handle"}
    assert may_pass(answer["unusable"]) and not may_pass("corrupt: frame 3 has errors")


def test_a_name_is_a_file_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    whole = write_video(tmp_path / "whole.mp4", numbered(3)).read_bytes()
    for name in ["http:x.mp4", "concat:a|b.mp4", "%03d.mp4", "-i.mp4", "a'b\"c d\n.mp4", "é☃.mp4", "pipe:0.mp4"]:
        Path(name).write_bytes(whole)
        assert probe(name).frames == 3
        assert numbers(decode(Path(name), at(64, 64, 0, 0.25))) == [0, 2]
    os.write(os.open(b"\xff.mp4", os.O_CREAT | os.O_WRONLY), whole)
    assert probe(os.fsdecode(b"\xff.mp4")).frames == 3


def test_hostile_sizes_are_refused_before_anything_is_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_video(tmp_path / "a.mp4", numbered(3))
    clip = np.empty((1, 64, 64, 3), np.uint8)
    monkeypatch.setattr(container, "MAX_PIXELS", 64 * 64 - 1)
    for use in (frames_module.probe, lambda f: frames_module.decode(f, at(64, 64, 0), clip)):
        with path.open("rb") as file, pytest.raises(container.Unusable, match="too large: 64x64 px, at most 4095"):
            use(file)
    monkeypatch.setattr(container, "MAX_PIXELS", 64 * 64)
    monkeypatch.setattr(frames_module, "MAX_FRAMES", 2)
    with path.open("rb") as file, pytest.raises(container.Unusable, match="too long: more than 2 frames"):
        frames_module.probe(file)


@pytest.mark.parametrize(("name", "codec"), [("a.mov", "png"), ("a.mov", "qtrle"), ("a.avi", "cinepak")])
def test_decoders_that_nobody_uses_look_at_no_file(tmp_path: Path, name: str, codec: str) -> None:
    path = write_video(tmp_path / name, numbered(3), 25, codec=codec, pix_fmt="rgb24")
    for use in (probe, lambda p: decode(p, at(64, 64, 0))):
        with pytest.raises(VideoError, match=f"no decoder: {codec} is not among those trusted with files of others"):
            use(path)


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.webm", "a.avi"])
def test_no_damage_breaks_more_than_the_file(tmp_path: Path, name: str) -> None:
    codec = {"a.webm": "libvpx-vp9", "a.avi": "mpeg4"}.get(name, "libx264")
    whole = write_video(tmp_path / name, numbered(20), codec=codec, audio=True).read_bytes()
    rng = np.random.default_rng(1)
    path = tmp_path / f"broken-{name}"
    for trial in range(60):
        data = bytearray(whole)
        if trial % 2:
            data = data[: rng.integers(1, len(data))]
        else:
            for where in rng.integers(0, len(data), size=1 + trial % 7):
                data[where] ^= 1 << int(rng.integers(8))
        path.write_bytes(data)
        try:
            video = probed(path)
            clip = decode(path, plan(video))
        except VideoError as error:
            assert "\n" not in str(error)
        else:
            assert clip.shape[1:] == (64, 64, 3)


def test_files_are_closed_whatever_happens(tmp_path: Path) -> None:
    whole = write_video(tmp_path / "a.mp4", numbered(9))
    text = tmp_path / "b.mp4"
    text.write_text("text")
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        decode(whole, at(64, 64, 0, 0.5))
        probe(whole)
        with pytest.raises(VideoError):
            probe(text)
    assert len(os.listdir("/proc/self/fd")) == before


# --- planning --------------------------------------------------------------------------------------------------------


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


# --- decoding --------------------------------------------------------------------------------------------------------


def test_frames_are_those_on_screen_at_their_times(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", numbered(50), fps=25)
    assert numbers(decode(path, plan(probed(path), fps=8, max_frames=13))) == [i * 25 // 8 for i in range(13)]
    path = write_video(tmp_path / "b.mp4", numbered(60), fps=30000 / 1001)
    fast = plan(probed(path), fps=30000 / 1001, max_frames=17)
    assert numbers(decode(path, fast)) == list(range(17))
    path = write_video(tmp_path / "c.mkv", numbered(10), fps=5)  # slower than the clip: repeated, not sped up
    assert numbers(decode(path, plan(probed(path), fps=10, max_frames=17))) == [i // 2 for i in range(17)]


def test_a_variable_rate_is_followed(tmp_path: Path) -> None:
    times = [Fraction(t, 1000) for t in (0, 40, 80, 1000, 1040, 1900, 2500, 2540)]
    path = write_video(tmp_path / "a.mkv", numbered(8), times=times, options={"bf": "0"})
    video = probed(path)
    assert video.frames == 8 and 2.5 < video.duration_s < 2.7
    assert numbers(decode(path, at(64, 64, 0, 0.04, 0.5, 0.999, 1.0, 1.8, 2.0, 2.51))) == [0, 1, 2, 3, 3, 4, 5, 6]


@pytest.mark.parametrize("codec", ["libx264", "libx265"])
def test_a_variable_rate_with_reordered_frames_lasts_as_long_as_its_frames_are_shown(
    tmp_path: Path, codec: str
) -> None:
    # An mp4 holds how long it is from packet to packet, which is 400 ms here for some that are shown near the end.
    for ms in ((0, 400, 800, 1200, 1240, 1280), (0, 400, 440, 840, 880, 920, 1400, 1440, 1480, 1520)):
        times = [Fraction(t, 1000) for t in ms]
        quiet = {"x265-params": "log-level=none"} if codec == "libx265" else {}
        path = write_video(tmp_path / "a.mp4", numbered(len(ms)), times=times, codec=codec, options=quiet)
        video = probed(path)
        last = plan(video, fps=50, max_frames=1000).times_s
        assert last[-1] > video.duration_s - 0.1
        assert numbers(decode(path, at(64, 64, *last)))[-1] == len(ms) - 1


def test_an_avi_with_reordered_frames_shows_each_at_its_time(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.avi", numbered(30), fps=25, options={"bf": "3"})
    assert numbers(decode(path, at(64, 64, *(i / 25 for i in range(30))))) == list(range(30))


def test_frames_whose_times_go_back_are_refused_and_not_shown_in_another_order(tmp_path: Path) -> None:
    parts = [write_video(tmp_path / f"{i}.ts", numbered(20), fps=25, codec="mpeg2video") for i in range(2)]
    path = tmp_path / "a.ts"
    path.write_bytes(b"".join(p.read_bytes() for p in parts))
    assert numbers(decode(path, at(64, 64, 0, 0.4))) == [0, 10]
    with pytest.raises(VideoError, match=r"out of order: frame 20 at .* s comes after one at .* s$"):
        decode(path, at(64, 64, 0, 0.4, 0.9))


def test_times_count_from_the_first_frame_wherever_the_file_begins(tmp_path: Path) -> None:
    times = [Fraction(5) + Fraction(i, 8) for i in range(9)]
    path = write_video(tmp_path / "a.mkv", numbered(9), times=times, options={"bf": "0"})
    assert numbers(decode(path, plan(probed(path)))) == list(range(9))


@pytest.mark.parametrize(
    ("matrix", "turns"),
    [((0, 1, -1, 0), -1), ((-1, 0, 0, -1), 2), ((0, -1, 1, 0), 1)],  # counter-clockwise quarter turns of the display
)
def test_a_turned_recording_is_shown_upright(tmp_path: Path, matrix: tuple[int, int, int, int], turns: int) -> None:
    frames = numbered(5, height=48, width=80)
    frames[:, :16] = (230, 40, 40)
    path = write_video(tmp_path / "a.mp4", frames, options={"crf": "6"})
    before = decode(path, at(48, 80, 0, 0.25))
    claim_matrix(path, matrix)
    video = probed(path)
    assert (video.width, video.height) == ((48, 80) if turns % 2 else (80, 48))
    made = plan(video)
    after = decode(path, made)
    assert after.shape[1:3] == (video.height, video.width)
    assert (after[0] == np.rot90(before[0], turns)).all()


@pytest.mark.parametrize("matrix", [(-1, 0, 0, 1), (1, 0, 0, -1), (0, 1, 1, 0), (0, -1, -1, 0)])
def test_a_mirrored_recording_is_shown_as_its_matrix_says(tmp_path: Path, matrix: tuple[int, int, int, int]) -> None:
    frames = numbered(5, height=48, width=80)
    frames[:, :16, :32] = (230, 40, 40)
    path = write_video(tmp_path / "a.mp4", frames, options={"crf": "6"})
    before = decode(path, at(48, 80, 0.25))[0]
    claim_matrix(path, matrix)
    a, b, c, d = matrix
    y, x = np.mgrid[:48, :80]
    to_x, to_y = a * x + c * y, b * x + d * y  # ISO 14496-12, 6.2.2, moved so that all is right of and below 0
    expected = np.empty((48, 80, 3) if a else (80, 48, 3), np.uint8)
    expected[to_y - to_y.min(), to_x - to_x.min()] = before
    video = probed(path)
    assert (video.height, video.width) == expected.shape[:2]
    assert (decode(path, at(video.height, video.width, 0.25))[0] == expected).all()


def interlaced(path: Path, count: int, size: int = 96) -> Path:
    """A bar that moves by 3 px a field: field i shows it from 3 i on, at 2 fields a frame."""
    frames = np.zeros((count, size, size, 3), np.uint8)
    for i in range(2 * count):
        frames[i // 2, i % 2 :: 2, :, :][:, 3 * i : 3 * i + 24] = 255
    options = {"flags": "+ildct+ilme", "x264-params": "tff=1", "crf": "6"}
    return write_video(path, frames, fps=25, pix_fmt="yuv444p", options=options)


@pytest.mark.parametrize("count", [2, 8])
def test_fields_of_interlaced_frames_are_made_whole(tmp_path: Path, count: int) -> None:
    path = interlaced(tmp_path / "a.mp4", count)
    with av.open(str(path)) as container:
        woven = [f.to_ndarray(format="rgb24")[..., 0].astype(int) for f in container.decode(video=0)]
    assert len(woven) == count and np.abs(np.diff(woven[-1], axis=0)).mean() > 10  # combs
    clip = decode(path, at(96, 96, *(i / 25 for i in range(count))))[..., 0].astype(int)
    for i, picture in enumerate(clip):
        assert np.abs(np.diff(picture[8:-8], axis=0)).mean() < 1
        begins = int(np.argmax(picture[48] > 128))
        assert abs(begins - 6 * i) <= 3, (i, begins)  # at the time of one of its fields


def _pq(nits: np.ndarray) -> np.ndarray:
    """SMPTE ST 2084, the inverse EOTF."""
    y = (nits / 10_000) ** (2610 / 16384)
    return ((3424 / 4096 + 2413 / 128 * y) / (1 + 2392 / 128 * y)) ** (2523 / 32)


def _hlg(nits: np.ndarray) -> np.ndarray:
    """ITU-R BT.2100, the inverse OOTF and the OETF of a grey on a display of 1,000 cd/m2."""
    e = (nits / 1000) ** (1 / 1.2)
    return np.where(
        e <= 1 / 12, np.sqrt(3 * e), 0.17883277 * np.log(np.maximum(12 * e - 0.28466892, 1e-9)) + 0.55991073
    )


def flagged(path: Path, levels: np.ndarray, trc: int, primaries: int, matrix: int = 9) -> Path:
    """One frame of 64 x 64 px of Y'CbCr [3] in [0, 1] and [-0.5, 0.5], in 10 bits, limited range, flagged so."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=8)
        stream.height = stream.width = 64
        stream.pix_fmt = "yuv444p10le"
        context = stream.codec_context
        context.colorspace, context.color_range, context.color_trc, context.color_primaries = matrix, 1, trc, primaries
        frame = av.VideoFrame(64, 64, "yuv444p10le")
        codes = np.rint(levels * (876, 896, 896) + (64, 512, 512)).astype(np.uint16)
        for plane, code in zip(frame.planes, codes, strict=True):
            plane.update(np.full(plane.buffer_size // 2, code, np.uint16).tobytes())
        frame.colorspace, frame.color_range, frame.color_trc, frame.color_primaries = matrix, 1, trc, primaries
        frame.pts, frame.time_base = 0, Fraction(1, 8)
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


@pytest.mark.parametrize("trc", [16, 18])
@pytest.mark.parametrize("nits", [0, 1, 10, 50, 100, 180, 203, 600])
def test_hdr_is_shown_as_on_a_display_whose_white_is_the_reference_white(tmp_path: Path, trc: int, nits: int) -> None:
    code = float((_pq if trc == 16 else _hlg)(np.float64(nits)))
    path = flagged(tmp_path / "a.mkv", np.array([code, 0, 0]), trc, 9)
    assert probe(path).frames == 1
    expected = 255 * min(1, nits / 203) ** (1 / 2.4)  # BT.1886, the display of BT.709
    assert np.abs(decode(path, at(64, 64, 0)) - expected).max() <= 1.5  # a code of 10 bits is up to 1.3 levels wide


@pytest.mark.parametrize(("trc", "primaries"), [(16, 9), (18, 9), (1, 9), (16, 2)])
def test_hdr_and_the_widest_gamut_are_of_bt2020_where_no_matrix_is_flagged(
    tmp_path: Path, trc: int, primaries: int
) -> None:
    colour = np.array([0.45, -0.08, 0.12])
    said, unsaid = (flagged(tmp_path / f"{m}.mkv", colour, trc, primaries, m) for m in (9, 2))
    assert (decode(unsaid, at(64, 64, 0)) == decode(said, at(64, 64, 0))).all()


def test_colours_of_a_wide_gamut_keep_their_place_in_the_narrow_one(tmp_path: Path) -> None:
    to_2020 = np.array(  # ITU-R BT.2087, linear BT.709 to linear BT.2020
        [[0.6274, 0.3293, 0.0433], [0.0691, 0.9195, 0.0114], [0.0164, 0.0880, 0.8956]]
    )
    for rgb in [(0.7, 0.3, 0.2), (0.2, 0.7, 0.3), (0.25, 0.3, 0.7), (0.5, 0.5, 0.5)]:
        r, g, b = (to_2020 @ np.power(rgb, 2.4)) ** (1 / 2.4)
        y = 0.2627 * r + 0.6780 * g + 0.0593 * b
        path = flagged(tmp_path / "a.mkv", np.array([y, (b - y) / 1.8814, (r - y) / 1.4746]), 14, 9)
        assert np.abs(decode(path, at(64, 64, 0))[0, 9, 9] - 255 * np.array(rgb)).max() <= 1, rgb


@pytest.mark.parametrize(
    ("suffix", "codec", "profile", "compatibility", "refused"),
    [
        ("mp4", "libx265", 5, 0, True), ("mkv", "libx265", 5, 0, True), ("mp4", "libsvtav1", 10, 0, True),
        ("mp4", "libx265", 8, 1, False), ("mkv", "libx265", 8, 1, False), ("mp4", "libx265", 8, 4, False),
        ("mp4", "libx265", 7, 6, False), ("mp4", "libsvtav1", 10, 1, False),
        ("mp4", "libx265", 7, 0, False),  # as records were written before they told it
    ],
)  # fmt: skip
def test_dolby_vision_is_read_by_its_base_layer_or_refused_where_there_is_none(
    tmp_path: Path, suffix: str, codec: str, profile: int, compatibility: int, refused: bool
) -> None:
    path = write_video(tmp_path / "a.mp4", numbered(3), codec=codec, pix_fmt="yuv420p10le", audio=True)
    expected = decode(path, at(64, 64, 0, 0.25))
    claim_dolby_vision(path, profile, compatibility)
    if suffix == "mkv":
        path = remuxed(path, tmp_path / "a.mkv")
    for use in (probe, lambda p: decode(p, at(64, 64, 0, 0.25))):
        if refused:
            with pytest.raises(VideoError, match=rf"^{path}: Dolby Vision profile {profile}: no picture for other dec"):
                use(path)
    if not refused:
        assert probe(path).frames == 3 and (decode(path, at(64, 64, 0, 0.25)) == expected).all()


def test_colours_that_can_not_be_converted_are_refused_by_prepare_already(tmp_path: Path) -> None:
    path = flagged(tmp_path / "a.mkv", np.array([0.5, 0.1, 0.1]), 1, 1, matrix=8)  # YCgCo
    with pytest.raises(VideoError, match="can't convert yuv444p10le of matrix 8 to RGB: "):
        probe(path)


def test_pixels_that_are_not_square_are_made_square(tmp_path: Path) -> None:
    frames = np.zeros((5, 64, 64, 3), np.uint8)
    y, x = np.mgrid[:64, :64]
    frames[:, ((y - 31.5) / 24) ** 2 + ((x - 31.5) / 12) ** 2 <= 1] = 255  # shown: a circle
    path = write_video(tmp_path / "a.mp4", frames, aspect=Fraction(2))
    video = probed(path)
    assert (video.width, video.height) == (128, 64)
    lit = decode(path, plan(video, max_area_px=8192))[0, :, :, 0] > 128
    assert abs(np.ptp(np.nonzero(lit)[0]) - np.ptp(np.nonzero(lit)[1])) <= 2


def test_the_picture_is_scaled_to_cover_and_cropped_in_the_middle(tmp_path: Path) -> None:
    frames = np.zeros((1, 96, 192, 3), np.uint8)
    frames[:, :, 48:144] = 200  # the middle square
    frames[:, 32:64, 80:112] = 90
    path = write_video(tmp_path / "a.mp4", frames, options={"crf": "4"})
    clip = decode(path, at(48, 48, 0))[0, :, :, 0].astype(int)
    assert np.abs(clip[2:12, 2:-2] - 200).max() < 12  # the black sides are cropped away
    assert abs(clip[24, 24] - 90) < 6 and abs(clip[24, 4] - 200) < 6 and abs(clip[4, 24] - 200) < 6


@pytest.mark.parametrize(("colorspace", "size"), [(1, 64), (5, 64), (None, 64)])
def test_colours_are_converted_as_the_stream_flags_them(tmp_path: Path, colorspace: int | None, size: int) -> None:
    for name, rgb in COLOURS.items():
        frames = np.tile(np.array(rgb, np.uint8), (2, size, size, 1))
        path = write_video(tmp_path / f"{name}.mp4", frames, colorspace=colorspace, options={"crf": "1"})
        error = np.abs(decode(path, at(64, 64, 0)).astype(int) - frames[0]).max()
        assert error <= 4, (name, error)


# (Kr, Kb) of H.273's MatrixCoefficients, by their numbers there.
MATRICES = {1: (0.2126, 0.0722), 4: (0.30, 0.11), 5: (0.299, 0.114), 6: (0.299, 0.114), 7: (0.212, 0.087),
            9: (0.2627, 0.0593)}  # fmt: skip


def lossless(path: Path, planes: list[np.ndarray], pix_fmt: str, matrix: int, full: bool) -> Path:
    """One frame of these planes, uint8 [H, W] each, flagged so."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=8)
        stream.height, stream.width = planes[0].shape
        stream.pix_fmt = pix_fmt
        stream.codec_context.colorspace, stream.codec_context.color_range = matrix, 2 if full else 1
        frame = av.VideoFrame(stream.width, stream.height, pix_fmt)
        for plane, values in zip(frame.planes, planes, strict=True):
            padded = np.zeros((plane.height, plane.line_size), np.uint8)
            padded[:, : values.shape[1]] = values
            plane.update(padded.tobytes())
        frame.colorspace, frame.color_range = matrix, 2 if full else 1
        frame.pts, frame.time_base = 0, Fraction(1, 8)
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("matrix", MATRICES)
def test_every_matrix_and_range_is_converted_as_its_formula_says(tmp_path: Path, matrix: int, full: bool) -> None:
    rng = np.random.default_rng(0)
    y, u, v = (rng.integers(16, top, (64, 64), np.uint8) for top in (236, 241, 241))
    got = decode(lossless(tmp_path / "a.mkv", [y, u, v], "yuv444p", matrix, full), at(64, 64, 0))[0]
    kr, kb = MATRICES[matrix]
    luma, blue, red = (y.astype(float), u - 128.0, v - 128.0)
    if not full:
        luma, blue, red = (luma - 16) * 255 / 219, blue * 255 / 224, red * 255 / 224
    r, b = luma + 2 * (1 - kr) * red, luma + 2 * (1 - kb) * blue
    g = (luma - kr * r - kb * b) / (1 - kr - kb)
    assert np.abs(got - np.clip(np.stack([r, g, b], -1), 0, 255)).max() <= 0.6  # half is rounding


@pytest.mark.parametrize("size", [(272, 640), (128, 304), (96, 96)])
@pytest.mark.parametrize(("matrix", "name"), [(1, "bt709"), (5, "bt601")])
@pytest.mark.parametrize(("full", "levels"), [(False, "tv"), (True, "pc")])
def test_real_pictures_are_scaled_and_converted_as_by_ffmpegs_own_filter(
    tmp_path: Path, size: tuple[int, int], matrix: int, name: str, full: bool, levels: str
) -> None:
    with av.open(str(recording("bikes"))) as container:
        frame = next(container.decode(video=0)).reformat(dst_colorspace=matrix, dst_color_range=2 if full else 1)
    planes = [np.frombuffer(p, np.uint8).reshape(p.height, p.line_size)[:, : p.width] for p in frame.planes]
    path = lossless(tmp_path / "a.mkv", planes, "yuv420p", matrix, full)
    (height, width), scale = size, max(size[0] / 272, size[1] / 640)
    covering_h, covering_w = max(height, round(272 * scale)), max(width, round(640 * scale))
    with av.open(str(path)) as container:
        graph = Graph()
        source = graph.add_buffer(template=container.streams.video[0])
        scaler = graph.add(
            "scale",
            f"w={covering_w}:h={covering_h}:in_color_matrix={name}:in_range={levels}:out_range=pc:"
            "flags=bicubic+accurate_rnd+full_chroma_int",
        )
        rgb, sink = graph.add("format", "rgb24"), graph.add("buffersink")
        source.link_to(scaler)
        scaler.link_to(rgb)
        rgb.link_to(sink)
        graph.configure()
        graph.push(next(container.decode(video=0)))
        expected = graph.pull().to_ndarray()
    top, left = (covering_h - height) // 2, (covering_w - width) // 2
    assert (decode(path, at(*size, 0))[0] == expected[top : top + height, left : left + width]).all()


@pytest.mark.parametrize(
    ("name", "codec", "pix_fmt", "options"),
    [
        ("a.webm", "libvpx-vp9", "yuva420p", {}),  # alpha is a stream of its own, beside the picture's
        ("a.mov", "prores_ks", "yuva444p10le", {"profile": "4444"}),
        ("a.mkv", "ffv1", "bgra", {}),
        ("a.mkv", "ffv1", "yuva420p", {}),
        ("a.avi", "utvideo", "gbrap", {}),
    ],
)
def test_transparency_changes_no_colour(
    tmp_path: Path, name: str, codec: str, pix_fmt: str, options: dict[str, str]
) -> None:
    y, x = np.mgrid[:64, :96]
    rgb = np.stack([255 - 2 * x, 40 + 2 * y, 60 + x + y], -1).astype(np.uint8)
    alpha = np.where(y < 32, 0, 5 * x % 256)[..., None]
    frames = np.concatenate([rgb, alpha], -1).astype(np.uint8)
    path = tmp_path / name
    with av.open(str(path), "w") as out:
        stream = out.add_stream(codec, rate=8, options=options)
        stream.width, stream.height, stream.pix_fmt = 96, 64, pix_fmt
        stream.codec_context.colorspace = 1
        stream.codec_context.color_range = 1 if pix_fmt.startswith("yuv") else 2
        for i in range(3):
            frame = av.VideoFrame.from_ndarray(frames, format="rgba").reformat(
                format=pix_fmt, dst_colorspace=1, dst_color_range=stream.codec_context.color_range
            )
            frame.pts, frame.time_base = i, Fraction(1, 8)
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert "a" in next(container.decode(stream)).format.name or stream.metadata["alpha_mode"] == "1"
    assert probe(path).frames == 3
    for size in ((64, 96), (32, 48)):
        expected = rgb.reshape(size[0], 64 // size[0], size[1], 96 // size[1], 3).mean((1, 3))
        error = np.abs(decode(path, at(*size, 0.25))[0] - expected)
        assert error.mean() < 1.5 and error.max() <= 8, (error.mean(), error.max())


def test_unflagged_colours_are_read_as_players_do(tmp_path: Path) -> None:
    def unflagged(height: int, width: int) -> np.ndarray:
        path = tmp_path / f"{width}.mp4"
        frame = np.tile(np.array((30, 190, 50), np.uint8), (height, width, 1))
        with av.open(str(path), "w") as container:
            stream = container.add_stream("libx264", rate=8, options={"crf": "1"})
            stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
            container.mux(stream.encode(av.VideoFrame.from_ndarray(_yuv420p(frame), format="yuv420p")))
            container.mux(stream.encode(None))
        return decode(path, at(64, 64, 0))[0, 32, 32].astype(int)

    assert np.abs(unflagged(720, 1280) - (30, 190, 50)).max() <= 3  # HD: BT.709, as it was written
    assert np.abs(unflagged(64, 64) - (30, 190, 50)).max() > 10  # small: BT.601, which it was not


def test_rendered_clips_come_back_as_rendered(tmp_path: Path) -> None:
    for i in range(6):
        scene = scene_of(5, i)
        frames = render(scene)
        write_mp4(tmp_path / "a.mp4", frames, scene.fps, crf=4)
        made = plan(probed(tmp_path / "a.mp4"))
        clip = decode(tmp_path / "a.mp4", made)
        assert clip.shape == frames.shape
        error = np.abs(clip.astype(int) - frames)
        assert error.mean() < 1.5 and np.percentile(error, 99) < 40  # 4:2:0 smears edges of colour


def test_a_file_shorter_than_its_plan_is_truncated(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", numbered(9))
    with pytest.raises(VideoError, match=r"truncated: ends at 1\.125 s after 9 frames, the clip needs 1\.250 s"):
        decode(path, at(64, 64, *(i / 8 for i in range(13))))
    whole = write_video(tmp_path / "b.mp4", numbered(96), faststart=True)
    with pytest.raises(VideoError, match=r"corrupt|truncated"):
        decode(cut(whole, tmp_path / "c.mp4", 0.5), at(64, 64, *(i / 8 for i in range(96))))


def test_threads_decode_the_same_pixels(tmp_path: Path) -> None:
    path = recording("carphone_pristine")
    wish = plan(probed(path))
    expected = decode(path, wish)
    results: list[np.ndarray] = []
    threads = [threading.Thread(target=lambda: results.append(decode(path, wish))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 4 and all((r == expected).all() for r in results)
