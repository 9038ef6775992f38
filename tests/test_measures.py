from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from videos import late_damage, numbered, recording, write_video

from sorahpc.config import ScenesConfig
from sorahpc.data import frames as frames_module
from sorahpc.data.decode import ClipPlan, Measured, VideoError, decode, measure, probe
from sorahpc.data.filters import near_duplicates
from sorahpc.data.measures import Scenes, content_score, hsv, luma, phash, size_of


def pattern(i: int, height: int = 48, width: int = 64) -> np.ndarray:
    """Coloured waves, others for each i. uint8 [H,W,3]."""
    y, x = np.mgrid[:height, :width]
    waves = [
        np.sin((0.05 + 0.03 * ((i + c) % 5)) * y + (0.07 + 0.04 * ((2 * i + c) % 3)) * x + i + 2 * c) for c in range(3)
    ]
    return (127.5 + 120 * np.stack(waves, -1)).astype(np.uint8)


def cut(frames: Sequence[np.ndarray], fps: float = 8, threshold: float | None = None, min_s: float = 0.1) -> np.ndarray:
    scenes = Scenes(threshold, min_s)
    for i, frame in enumerate(frames):
        scenes.add(lambda frame=frame: frame, i / fps, (i + 1) / fps)  # type: ignore[misc]
    return scenes.end()


def measured(path: Path, **scenes: float) -> Measured:
    return measure(path, probe(path), ScenesConfig(**scenes) if scenes else None)


def spans(clips: np.ndarray, fps: float) -> list[tuple[int, int]]:
    """First frame and the one after the last of each clip."""
    return [(round(c["start_s"] * fps), round(c["end_s"] * fps)) for c in clips]


def bits(a: int, b: int) -> int:
    return (int(a) ^ int(b)).bit_count()


# --- one picture, and two --------------------------------------------------------------------------------------------


def test_scores_are_those_of_pyscenedetect() -> None:
    """Of PySceneDetect 0.7.2 with OpenCV 5.0, ContentDetector on the same frames. Its hue and saturation are rounded by
    integer tables, ours by float32: at most 1 apart in 3 % of pixels, 0.01 on the mean."""
    theirs = [37.539, 34.904, 45.955, 46.139, 39.377]
    pictures = [hsv(pattern(i)) for i in range(6)]
    ours = [content_score(b, a) for a, b in itertools.pairwise(pictures)]
    assert ours == pytest.approx(theirs, abs=0.02)
    known = {  # by cv2.cvtColor
        (255, 0, 0): (0, 255, 255), (10, 200, 30): (63, 242, 200), (0, 0, 0): (0, 0, 0), (255, 255, 255): (0, 0, 255),
        (200, 10, 40): (175, 242, 200), (90, 80, 250): (122, 173, 250), (3, 4, 5): (105, 102, 5),
        (250, 249, 20): (30, 235, 250),
    }  # fmt: skip
    for rgb, expected in known.items():
        assert tuple(hsv(np.uint8([[rgb]]))[:, 0, 0]) == expected


def test_hashes_are_those_of_imagehash() -> None:
    """Of imagehash 4.3.2, whose detour over 32x32 px may turn the few bits that lie at the median."""
    theirs = "dfb5ea5aa0d8a04a 9ab5624a654a65cf caa56f5ab05ab05a dab46a5ab54ab548 c095a54e3a4e3b4f cab0a54ba54aa5cf"
    assert [bits(phash(luma(pattern(i))), int(h, 16)) for i, h in enumerate(theirs.split())] <= [4] * 6


def test_a_hash_says_what_a_picture_looks_like() -> None:
    path = recording("bikes")
    picture, other = (luma(p) for p in decode(path, ClipPlan((0.4, 2.0), 54, 96)))
    (large,) = decode(path, ClipPlan((0.4,), 108, 192))
    rng = np.random.default_rng(0)
    for like in (picture * 0.7 + 30, picture + rng.normal(0, 5, picture.shape), luma(large), luma(large)[3:, 5:]):
        assert bits(phash(like), phash(picture)) <= 8
    assert bits(phash(other), phash(picture)) >= 16
    assert phash(np.zeros((54, 96), np.float32)) == 0
    assert phash(np.full((54, 96), 77.3, np.float32)) == phash(np.full((10, 20), 200.0, np.float32)) == 1 << 63


def test_pictures_are_measured_small_and_never_larger_than_they_are() -> None:
    assert size_of(1080, 1920) == (54, 96) and size_of(1920, 1080) == (96, 54)
    assert size_of(40, 50) == (40, 50) and size_of(4, 100_000) == (8, 11384)
    height, width = size_of(2160, 4096)
    assert height * width == pytest.approx(96 * 54, rel=0.02)


# --- a clip ----------------------------------------------------------------------------------------------------------


def test_what_is_measured_is_what_was_said() -> None:
    grey = np.full((40, 40, 3), 100, np.uint8)
    box = grey.copy()
    box[:10, :20] = 150  # an eighth of the picture, 50 levels brighter
    bars = grey.copy()
    bars[:5] = bars[-5:] = 16  # a quarter is black
    (still,) = cut([grey] * 16)
    assert (still["start_s"], still["end_s"], still["frames"]) == (0, 2, 16)
    assert (still["luma"], still["black"], still["motion"], still["static"]) == (pytest.approx(100), 0, 0, 1)
    # 8 frames a second: a picture a quarter of a second is every second frame.
    (blinks,) = cut([grey, grey, box, box] * 4)
    assert blinks["motion"] == pytest.approx(50 / 8, rel=1e-4) and blinks["static"] == 0
    assert blinks["luma"] == pytest.approx(100 + 50 / 16, rel=1e-4)
    (half,) = cut([grey] * 9 + [grey, box, box, grey, grey, box, box])  # pictures 0 to 4 are equal, then each changes
    assert half["static"] == pytest.approx(4 / 7) and half["motion"] == pytest.approx(3 / 7 * 50 / 8, rel=1e-4)
    (barred,) = cut([bars] * 8)
    assert barred["black"] == pytest.approx(0.25)


def test_short_clips_and_slow_ones_are_measured_too() -> None:
    grey, white = np.full((16, 16, 3), 100, np.uint8), np.full((16, 16, 3), 200, np.uint8)
    (single,) = cut([white])
    assert (single["frames"], single["motion"], single["static"]) == (1, 0, 1) and single["luma"] == pytest.approx(200)
    (short,) = cut([grey, grey, white], fps=30)  # 0.1 s: from its first frame to its last
    assert short["motion"] == pytest.approx(100, rel=1e-4) and short["static"] == 0
    (slow,) = cut([grey, white, grey], fps=1)  # it changes in two of eleven quarter seconds
    assert slow["static"] == pytest.approx(9 / 11) and slow["motion"] == pytest.approx(200 / 11, rel=1e-4)


def test_the_hashes_are_of_the_middles_of_the_thirds() -> None:
    (clip,) = cut([pattern(i // 8) for i in range(24)])
    assert clip["hash"].tolist() == [phash(luma(pattern(i))) for i in range(3)]


# --- scenes ----------------------------------------------------------------------------------------------------------


def shot(i: int, frames: int, height: int = 96, width: int = 128) -> np.ndarray:
    """A camera that moves slowly over a pattern. uint8 [T,H,W,3]."""
    wide = pattern(i, height, width + frames)
    return np.stack([wide[:, t : t + width] for t in range(frames)])


def test_cuts_of_a_real_video_are_found_to_the_frame(tmp_path: Path) -> None:
    frames = np.concatenate([shot(i, n) for i, n in enumerate((20, 33, 26, 41))])
    for name, codec, fps in [("a.mp4", "libx264", 25), ("b.webm", "libvpx-vp9", 24), ("c.avi", "mpeg4", 30)]:
        path = write_video(tmp_path / name, frames, fps, codec=codec)
        found = measured(path, threshold=27, min_s=0.5)
        assert spans(found.clips, fps) == [(0, 20), (20, 53), (53, 79), (79, 120)], name
        assert found.clips["frames"].tolist() == [20, 33, 26, 41] and (found.frames, found.too_short) == (120, 0)
        whole = measured(path)
        assert spans(whole.clips, fps) == [(0, 120)] and whole.clips["frames"].tolist() == [120]


def test_cuts_of_a_recording_are_those_of_pyscenedetect() -> None:
    """Of PySceneDetect 0.7.2, `detect-content` with its default threshold: frames 30, 76, 137, 187 and 242."""
    found = measured(recording("bikes"), threshold=27, min_s=0.1)
    assert spans(found.clips, 25) == [(0, 30), (30, 76), (76, 137), (137, 187), (187, 242), (242, 250)]
    assert len(measured(recording("carphone_pristine"), threshold=27, min_s=0.1).clips) == 1


def test_a_fade_through_black_is_between_two_scenes(tmp_path: Path) -> None:
    first, second = shot(0, 40), shot(1, 40)
    dark = np.linspace(1, 0, 20)[:, None, None, None]
    frames = np.concatenate([first[:20], first[20:] * dark, second[:20] * dark[::-1], second[20:]]).astype(np.uint8)
    path = write_video(tmp_path / "a.mp4", frames, 25)
    found = measured(path, threshold=27, min_s=0.5)
    (a, b), (c, d) = spans(found.clips, 25)
    # A mean level of 128 is under 12 from a share of 0.09 on: in the last two frames of the fade out and the first two
    # of the fade in.
    assert (a, d) == (0, 80) and b == pytest.approx(38, abs=1) and c == pytest.approx(42, abs=1)
    black = np.zeros((10, 96, 128, 3), np.uint8)
    framed = write_video(tmp_path / "b.mp4", np.concatenate([black, first, black]), 25)
    assert spans(measured(framed, threshold=27, min_s=0.5).clips, 25) == [(10, 50)]
    night = write_video(tmp_path / "c.mp4", np.concatenate([black, black]), 25)
    assert spans(measured(night, threshold=27, min_s=0.5).clips, 25) == [(0, 20)]  # for the filter to judge


def test_short_scenes_are_left_out_and_counted(tmp_path: Path) -> None:
    flash = np.full((2, 96, 128, 3), 250, np.uint8)
    frames = np.concatenate([shot(0, 30), flash, shot(0, 30), shot(1, 5), shot(2, 30)])
    path = write_video(tmp_path / "a.mp4", frames, 25)
    found = measured(path, threshold=27, min_s=0.5)
    assert spans(found.clips, 25) == [(0, 30), (32, 62), (67, 97)] and found.too_short == 2
    none = measured(path, threshold=27, min_s=10)
    assert len(none.clips) == 0 and none.too_short == 5


def test_a_scene_late_in_a_video_is_decoded_from_a_key_frame(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same pixels as decoding from the beginning gives, whatever the container and the codec."""
    kinds = [
        ("a.mp4", "libx264", {"bf": "3", "g": "12"}), ("b.mkv", "libx265", {"x265-params": "keyint=16:log-level=0"}),
        ("c.webm", "libvpx-vp9", {"g": "20"}), ("j.avi", "mpeg4", {"g": "12"}), ("e.mpg", "mpeg2video", {"g": "12"}),
        ("f.mov", "mjpeg", {}), ("g.ts", "libx264", {"x264-params": "open-gop=1:keyint=15:bframes=3"}),
        ("h.mp4", "libx264", {"x264-params": "intra-refresh=1:keyint=20"}),
        ("d.mkv", "libx264", {"flags": "+ildct+ilme", "x264-params": "tff=1:keyint=16"}),
    ]  # fmt: skip
    ways: list[bool] = []
    real = frames_module._decode

    def watched(*args: Any, from_key_frame: bool) -> None:
        ways.append(from_key_frame)
        real(*args, from_key_frame=from_key_frame)

    monkeypatch.setattr(frames_module, "_decode", watched)
    times = tuple(7.3 + i / 8 for i in range(9))
    for name, codec, options in kinds:
        fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        path = write_video(tmp_path / name, numbered(250), 25, codec=codec, pix_fmt=fmt, options=options)
        late, whole = np.zeros((9, 64, 64, 3), np.uint8), np.zeros((10, 64, 64, 3), np.uint8)
        ways.clear()
        with open(path, "rb") as file:
            frames_module.decode(file, ClipPlan(times, 64, 64), late)
            if name[0] < "g":  # where the index leads to a key frame; the others are read from the beginning
                assert ways == [True], name
            frames_module.decode(file, ClipPlan((0.0, *times), 64, 64), whole)
        assert (late == whole[1:]).all() and late.std() > 50, name


def test_a_file_that_is_corrupt_late_is_not_measured(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    path.write_bytes(late_damage(tmp_path))
    assert probe(path).frames == 48
    with pytest.raises(VideoError, match="corrupt"):
        measured(path)


# --- near duplicates -------------------------------------------------------------------------------------------------


def slow_near_duplicates(hashes: np.ndarray, most: int) -> list[tuple[int, int, int]]:
    kept: list[int] = []
    found = []
    for i, code in enumerate(hashes):
        distances = [int(np.bitwise_count(hashes[k] ^ code).sum()) for k in kept]
        near = [(k, d) for k, d in zip(kept, distances, strict=True) if d <= most]
        if near:
            found.append((i, *near[0]))
        else:
            kept.append(i)
    return found


@pytest.mark.parametrize("most", [0, 5, 11, 12, 23])
def test_near_duplicates_are_all_those_that_comparing_each_with_each_finds(
    most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sorahpc.data.filters._BLOCK", 64)
    monkeypatch.setattr("sorahpc.data.filters._MAX_PAIRS", 50)
    rng = np.random.default_rng(most)
    seeds = rng.integers(0, 1 << 63, (40, 3), dtype=np.uint64)
    hashes = seeds[rng.integers(0, 40, 600)]
    for code in hashes:  # some bits of each turned over, wherever they are
        for bit in rng.integers(0, 192, rng.integers(0, 20)):
            code[bit // 64] ^= np.uint64(1) << np.uint64(bit % 64)
    found = near_duplicates(hashes, most)
    assert found == slow_near_duplicates(hashes, most)
    assert len(found) > 5
    assert near_duplicates(hashes[:0], most) == []


def test_near_duplicates_of_many_clips_take_no_square_of_the_time() -> None:
    """Forty thousand, half of them copies of one: 8e8 comparisons by each with each."""
    rng = np.random.default_rng(0)
    hashes = rng.integers(0, 1 << 63, (40_000, 3), dtype=np.uint64)
    hashes[::2] = hashes[0]
    hashes[::2, 1] ^= np.uint64(1) << rng.integers(0, 64, 20_000).astype(np.uint64)
    found = near_duplicates(hashes, 11)
    assert [i for i, _, _ in found] == list(range(2, 40_000, 2)) and all(first == 0 for _, first, _ in found)
