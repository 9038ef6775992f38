"""decode: recordings of any container, rate, rotation and shape give the frames on screen at their times."""

from __future__ import annotations

import threading
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from plans import at, plan, probed
from videos import claim_matrix, numbered, numbers, recording, write_video

from sorahpc.data.decode import VideoError, decode


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
