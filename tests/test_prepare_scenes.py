"""prepare: each filter rejects its own, each scene is a row, and what was decoded once is not again."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from prepare_jobs import looked_at, put, with_section
from videos import late_damage, numbered, shots, write_video

from sorahpc.config import ClipConfig
from sorahpc.data import keys
from sorahpc.data.decode import ClipPlan, decode, plan_clip
from sorahpc.data.manifest import Video
from sorahpc.errors import ConfigError, DataError
from sorahpc.jobs import prepare
from sorahpc.models.lengths import Lengths


@pytest.fixture(scope="session")
def clip(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return write_video(tmp_path_factory.mktemp("clip") / "a.mp4", numbered(9)).read_bytes()


@pytest.fixture(scope="session")
def shot(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """Three seconds of one scene."""
    picture = np.random.default_rng(1).integers(60, 200, (8, 8, 3), dtype=np.uint8).repeat(8, 0).repeat(8, 1)
    path = tmp_path_factory.mktemp("shot") / "a.mp4"
    return write_video(path, np.stack([np.roll(picture, t, 1) for t in range(24)])).read_bytes()


@pytest.fixture
def videos(tmp_path: Path) -> Path:
    (tmp_path / "videos").mkdir()
    return tmp_path / "videos"


@pytest.fixture
def measures(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that were decoded."""
    return looked_at(monkeypatch, "measure")


def kinds_of_videos(videos: Path) -> None:
    """still, moving, black, small, long, and a copy of moving at another size and quality."""
    noise = np.random.default_rng(0).integers(60, 200, (8, 8, 3), dtype=np.uint8)
    picture = noise.repeat(16, 0).repeat(16, 1)
    moving = np.stack([np.roll(picture, 16 * t, 1) for t in range(8)])
    for name, frames, how in [
        ("still", np.stack([picture] * 8), {}), ("moving", moving, {}), ("black", np.zeros_like(moving), {}),
        ("small", moving[:, ::4, ::4], {}), ("long", np.concatenate([moving[::-1]] * 4), {}),
        ("copy", moving[:, ::2, ::2], {"options": {"crf": "35"}}),
    ]:  # fmt: skip
        write_video(videos / f"{name}.mp4", frames, **how)
        (videos / f"{name}.txt").write_text(f"a caption of {name}")


def test_each_filter_rejects_its_own_and_filtering_again_decodes_nothing(videos: Path, measures: list[str]) -> None:
    kinds_of_videos(videos)
    names = ["black", "copy", "long", "moving", "small", "still"]
    plain = with_section(videos)
    assert [os.path.basename(v.path)[:-4] for v in plain] == names and all(v.ok and v.measured for v in plain)
    assert sorted(measures) == [f"{n}.mp4" for n in names]
    measures.clear()
    found = {os.path.basename(v.path)[:-4]: v for v in plain}
    assert found["black"].black == 1 and found["moving"].black == 0 and found["black"].luma < 2
    assert found["still"].motion < 0.3 < 10 < found["moving"].motion and found["still"].static == 1
    for filters, expected in [
        ({"min_side_px": 64}, {"small": "small picture: 32 px, under prepare.filters.min_side_px=64"}),
        ({"max_duration_s": 2}, {"long": "long clip: 4 s, over prepare.filters.max_duration_s=2"}),
        (
            {"min_duration_s": 2},
            {n: "short clip: 1 s, under prepare.filters.min_duration_s=2" for n in names if n != "long"},
        ),
        ({"max_black": 0.9}, {"black": "black: 1.000 of its pixels, over prepare.filters.max_black=0.9"}),
        ({"min_motion": 1}, {n: f"little motion: {found[n].motion:.3g} levels, under prepare.filters.min_motion=1"
                             for n in ("black", "still")}),
        ({"max_motion": 1}, {n: f"much motion: {found[n].motion:.3g} levels, over prepare.filters.max_motion=1"
                             for n in ("copy", "long", "moving", "small")}),
        ({"max_static": 0.9}, dict.fromkeys(
            ("black", "still"), "static: 1.000 of it, over prepare.filters.max_static=0.9")),
    ]:  # fmt: skip
        rows = with_section(videos, filters=filters)
        assert {os.path.basename(v.path)[:-4]: v.reason for v in rows if not v.ok} == expected, filters
    rows = with_section(videos, filters={"near_duplicate_bits": 23, "min_side_px": 40})
    reasons = {os.path.basename(v.path)[:-4]: v.reason for v in rows if not v.ok}
    assert set(reasons) == {"moving", "small"}  # the copy comes first; what a filter rejects is compared with nothing
    first, rest = reasons["moving"].split(" bits from ")
    assert first.startswith("near duplicate: ") and int(first[16:]) <= 23
    assert rest == f"{videos}/copy.mp4, prepare.filters.near_duplicate_bits=23"
    assert with_section(videos) == plain and measures == []


def test_keys_are_those_of_a_manifest_without_measures(videos: Path, shot: bytes, measures: list[str]) -> None:
    put(videos / "a.mp4", "a caption", shot)
    (unmeasured,) = with_section(videos, measure=False)
    assert measures == [] and not unmeasured.measured
    assert unmeasured.key == hashlib.sha256(shot + b"a caption").hexdigest()[:16]
    (row,) = with_section(videos)
    assert measures == ["a.mp4"] and row.measured
    assert dataclasses.replace(row, luma=None, black=None, motion=None, static=None, hash=None) == unmeasured
    (cut,) = with_section(videos, scenes={"min_s": 0.1})
    assert cut == row  # a video of one scene is whole
    assert with_section(videos) == [row]
    measures.clear()
    assert with_section(videos, measure=False) == [row] and measures == []


def test_a_video_becomes_a_row_a_scene(videos: Path, shot: bytes, caplog: pytest.LogCaptureFixture) -> None:
    path = shots(videos / "b.mp4", (16, 24, 4, 20))
    (videos / "b.txt").write_text("four shots")
    put(videos / "a.mp4", "one shot", shot)
    with caplog.at_level(logging.INFO):
        rows = with_section(videos, scenes={"min_s": 1})
    assert f"{path}: 3 clips; left out: 1 scene under prepare.scenes.min_s=1" in caplog.messages
    cut = [v for v in rows if v.path == str(path)]
    assert [(v.start_s, v.end_s, v.frames, v.fps) for v in cut] == [(0, 2, 16, 8), (2, 5, 24, 8), (5.5, 8, 20, 8)]
    assert len({v.key for v in rows}) == 4 and all(v.ok and v.measured and v.caption == "four shots" for v in cut)
    digest = hashlib.sha256(path.read_bytes() + b"four shots" + b"\0002.000000\0005.000000")
    assert cut[1].key == digest.hexdigest()[:16]

    def plan(video: Video) -> ClipPlan:
        return plan_clip(video, ClipConfig(max_frames=97), stride=(1, 8, 8), patch=(1, 1, 1), lengths=Lengths(1, 1))

    whole = decode(path, ClipPlan(tuple(i / 8 for i in range(64)), 64, 64))
    for video, (first, last) in zip(cut, [(0, 16), (16, 40), (44, 64)], strict=True):
        assert plan(video).times_s == tuple(i / 8 for i in range(first, last))
        assert (decode(path, plan(video)) == whole[first:last]).all()


def test_a_copy_of_another_time_is_read_through_once_for_all_of_its_scenes(
    videos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shots(put(videos / "a.mp4", "a film"), (12, 12, 12, 12))
    rows = with_section(videos, scenes={"threshold": 27, "min_s": 1})
    os.utime(videos / "a.mp4", (1, 1))
    read: list[str] = []

    def slowly(path: str) -> object:
        read.append(path)
        time.sleep(0.2)
        return digest_of(path)

    digest_of = keys.digest_of
    monkeypatch.setattr(keys, "digest_of", slowly)
    with ThreadPoolExecutor(len(rows)) as pool:
        list(pool.map(keys.check_unchanged, rows))
    assert len(rows) == 4 and len(read) == 1


def test_cutting_otherwise_keeps_places_and_looks_again(videos: Path, shot: bytes, measures: list[str]) -> None:
    path = shots(videos / "a.mp4", (16, 24, 4, 20))
    (videos / "a.txt").write_text("four shots")
    put(videos / "b.mp4", "one shot", shot)
    names = lambda rows: [(os.path.basename(v.path), v.start_s, v.ok) for v in rows]  # noqa: E731
    whole = with_section(videos)
    assert names(whole) == [("a.mp4", 0, True), ("b.mp4", 0, True)]
    cut = with_section(videos, scenes={"min_s": 1})
    assert names(cut) == [("a.mp4", 0, True), ("b.mp4", 0, True), ("a.mp4", 2, True), ("a.mp4", 5.5, True)]
    measures.clear()
    assert with_section(videos, scenes={"min_s": 1}) == cut and measures == []
    (videos / "a.txt").write_text("some shots")
    said = with_section(videos, scenes={"min_s": 1})
    assert measures == [] and [v.start_s for v in said] == [v.start_s for v in cut]
    assert said[2].key == hashlib.sha256(path.read_bytes() + b"some shots\0002.000000\0005.000000").hexdigest()[:16]
    less = with_section(videos, scenes={"min_s": 2.1})
    assert names(less) == [("a.mp4", 2, True), ("b.mp4", 0, True), ("a.mp4", 5.5, True), ("a.mp4", 5.5, False)]
    assert less[3].reason == prepare.NOT_CUT_SO and sorted(measures) == ["a.mp4", "b.mp4"]
    with pytest.raises(DataError, match=r"none of 4 .*no scene: 4 scenes under prepare\.scenes\.min_s=9, and no other"):
        with_section(videos, scenes={"min_s": 9})
    (videos / "a.txt").write_text("four shots")
    back = with_section(videos)
    assert back[:2] == whole and [v.reason for v in back[2:]] == [prepare.NOT_CUT_SO] * 2


def test_a_video_that_can_not_be_decoded_through_is_named(videos: Path, clip: bytes) -> None:
    put(videos / "a.mp4", "fine", clip)
    put(videos / "b.mp4", "broken", late_damage(videos.parent))
    rows = with_section(videos)
    assert rows[0].ok and rows[1].reason.startswith("corrupt: ") and rows[1].frames == 0
    assert with_section(videos, measure=False) == rows  # what is known stays known


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"measure": False, "scenes": {}}, "prepare.measure: expected true, which scenes needs"),
        (
            {"measure": False, "filters": {"max_black": 0.5}},
            "prepare.measure: expected true, which filters.max_black needs",
        ),
        (
            {"filters": {"min_motion": 2, "max_motion": 1}},
            "prepare.filters.min_motion: expected at most max_motion = 1, not 2",
        ),
        ({"filters": {"near_duplicate_bits": 24}}, "prepare.filters.near_duplicate_bits: expected "),
        ({"filters": {"max_blakc": 0.5}}, "max_black"),
    ],
)
def test_filters_that_can_not_be_are_refused(videos: Path, section: dict, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        with_section(videos, **section)
    assert message in str(caught.value)
