from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from videos import broken_files, late_damage, numbered, recording, shots, write_video

from sorahpc.config import ClipConfig, Config
from sorahpc.configfile import parse_config
from sorahpc.data.decode import ClipPlan, decode, plan_clip
from sorahpc.data.manifest import Video, read_manifest
from sorahpc.data.sources import look
from sorahpc.data.toyworld import write_world
from sorahpc.errors import ConfigError, DataError, Stopped
from sorahpc.jobs import prepare
from sorahpc.models.lengths import Lengths
from sorahpc.runs import Task


def config_for(videos: Path, captions: Path | None = None, cpus: int = 1) -> Config:
    section = {"videos": str(videos), "captions": captions and str(captions), "resources": {"cpus_per_task": cpus}}
    return parse_config({"run": "r", "runs_dir": str(videos.parent / "runs"), "prepare": section})


def prepared(videos: Path, captions: Path | None = None, cpus: int = 1) -> list[Video]:
    config = config_for(videos, captions, cpus)
    prepare.run(config, Task(config.run_dir, "prepare"))
    return read_manifest(config.run_dir / "manifest.parquet")


def by_name(videos: list[Video], root: Path) -> dict[str, Video]:
    return {os.path.relpath(v.path, root): v for v in videos}


def put(path: Path, caption: str | bytes | None, source: bytes = b"") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(source)
    if caption is not None:
        path.with_suffix(".txt").write_bytes(caption.encode() if isinstance(caption, str) else caption)
    return path


@pytest.fixture(scope="session")
def clip(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return write_video(tmp_path_factory.mktemp("clip") / "a.mp4", numbered(9)).read_bytes()


@pytest.fixture
def videos(tmp_path: Path) -> Path:
    (tmp_path / "videos").mkdir()
    return tmp_path / "videos"


@pytest.fixture
def probes(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that were probed."""
    seen: list[str] = []
    real = prepare.probe
    monkeypatch.setattr(prepare, "probe", lambda path: seen.append(os.path.basename(path)) or real(path))
    return seen


def test_recordings_and_renders_become_rows(videos: Path) -> None:
    write_world(videos / "toy", 6)
    for name in ("bikes", "carphone_pristine"):
        shutil.copy(recording(name), videos / f"{name}.MP4")
        (videos / f"{name}.txt").write_text(f"\ufeff a video\r\n of {name}\t \n")
    rows = prepared(videos, cpus=3)
    assert [v.ok for v in rows] == [True] * 8
    names = by_name(rows, videos)
    assert list(names) == ["bikes.MP4", "carphone_pristine.MP4", *(f"toy/{i:06d}.mp4" for i in range(6))]
    assert names["bikes.MP4"].caption == "a video of bikes"
    assert (names["bikes.MP4"].frames, names["bikes.MP4"].width, names["bikes.MP4"].height) == (250, 640, 272)
    assert all(len(v.key) == 16 and os.path.isabs(v.path) and v.reason == "" for v in rows)
    assert len({v.key for v in rows}) == 8


def test_bad_files_cost_themselves_alone_and_are_named(
    videos: Path, clip: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    good = [put(videos / n, f"caption of {i}", clip) for i, n in enumerate(["good.mp4", 'sub dir/it\'s "good".mkv'])]
    alone = {v.path: v.key for v in prepared(videos)}
    bad = {path.name: reason for path, reason in broken_files(videos).values()}
    for name in bad:
        put(videos / name, "caption", (videos / name).read_bytes())
    os.mkfifo(videos / "fifo.mp4")
    (videos / "dangling.mp4").symlink_to("nowhere.mp4")
    for name in ("fifo", "dangling"):
        (videos / f"{name}.txt").write_text("caption")
    bad |= {"fifo.mp4": "not a regular file: a FIFO", "dangling.mp4": "dangling link"}
    with caplog.at_level(logging.INFO):
        rows = prepared(videos)
    names = by_name(rows, videos)
    assert {v.path: v.key for v in rows if v.ok} == alone == {str(p): alone[str(p)] for p in good}
    for name, reason in bad.items():
        assert names[name].status == "rejected" and names[name].reason.startswith(reason), (name, names[name].reason)
        assert f"rejected {name}: {names[name].reason}" in caplog.messages
    assert any(m.startswith(f"prepare: 2 ok, {len(rows) - 2} rejected (") for m in caplog.messages)


def test_a_caption_that_is_none_is_said(videos: Path, clip: bytes) -> None:
    put(videos / "good.mp4", "x" * 20_000, clip)
    put(videos / "none.mp4", None, clip)
    put(videos / "empty.mp4", " \n\t ", clip)
    put(videos / "latin1.mp4", "caf\xe9".encode("latin-1"), clip)
    put(videos / "huge.mp4", b"x" * ((1 << 20) + 1), clip)
    put(videos / "control.mp4", "a\0cat\x1b[31m\u2028sits\r\n", clip)
    put(videos / "fifo.mp4", None, clip)
    os.mkfifo(videos / "fifo.txt")
    names = by_name(prepared(videos), videos)
    assert len(names["good.mp4"].caption) == 10_000
    assert names["control.mp4"].caption == "a cat [31m sits"
    assert {n: v.reason for n, v in names.items() if not v.ok} == {
        "none.mp4": "no caption: no none.txt beside it",
        "empty.mp4": "no caption: it is empty",
        "latin1.mp4": "no caption: latin1.txt is not UTF-8 text",
        "huge.mp4": "no caption: huge.txt is over 1048576 bytes",
        "fifo.mp4": "no caption: fifo.txt: not a regular file: a FIFO",
    }


def test_strange_names_are_only_names(videos: Path, clip: bytes) -> None:
    strange = ["a b.mp4", "a'; echo foo.mp4", 'q"q.mp4', "new\nline.mp4", "é☃🎬.mp4", "-rf.mp4", "%d.mp4", "a:b.mp4"]
    for i, name in enumerate(strange):
        put(videos / name, f"caption {i}", clip)
    raw = os.path.join(os.fsencode(videos), b"\xff.mp4")
    os.close(os.open(raw, os.O_CREAT))
    rows = prepared(videos)
    assert sorted(os.path.relpath(v.path, videos) for v in rows if v.ok) == sorted(strange)
    assert [v.reason for v in rows if not v.ok] == ["file name is not UTF-8: rename it"]
    assert rows == prepared(videos)


def test_links_to_folders_are_followed_once_and_hidden_files_are_not_looked_at(videos: Path, clip: bytes) -> None:
    put(videos / "a.mp4", "one", clip)
    put(videos / ".part.mp4", "two", clip)
    put(videos / ".hidden" / "b.mp4", "three", clip)
    outside = put(videos.parent / "elsewhere" / "c.mp4", "four", clip)
    (videos / "link").symlink_to(outside.parent)
    (videos / "loop").symlink_to(videos)
    assert list(by_name(prepared(videos), videos)) == ["a.mp4", "link/c.mp4"]


def test_running_again_looks_only_at_what_changed(videos: Path, clip: bytes, probes: list[str]) -> None:
    for name in "bdf":
        put(videos / f"{name}.mp4", name, clip)
    put(videos / "text.mp4", "text", b"text")
    first = prepared(videos)
    assert sorted(probes) == ["b.mp4", "d.mp4", "f.mp4", "text.mp4"]
    probes.clear()
    assert prepared(videos) == first and probes == []

    put(videos / "a.mp4", "new", clip)  # sorts first, but is appended
    (videos / "b.txt").write_text("another caption")
    (videos / "d.mp4").unlink()
    again = prepared(videos)
    assert probes == ["a.mp4"]  # of b.mp4 the caption is another, the pictures are known
    assert [os.path.basename(v.path) for v in again] == ["b.mp4", "d.mp4", "f.mp4", "text.mp4", "a.mp4"]
    assert again[0].caption == "another caption" and again[0].key != first[0].key
    assert (again[1].status, again[1].reason, again[1].key) == ("rejected", prepare.GONE, first[1].key)
    assert again[2:4] == first[2:4]

    put(videos / "d.mp4", "d", clip)  # back: its old place and key
    assert prepared(videos)[1].key == first[1].key
    put(videos / "text.mp4", "text", clip)  # mended
    assert all(v.ok for v in prepared(videos))


def test_a_refusal_that_may_pass_is_tried_again(videos: Path, clip: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    put(videos / "a.mp4", "a", clip)
    put(videos / "b.mp4", "b", clip)
    with monkeypatch.context() as patch:
        real = prepare.digest_of

        def denied(path: str):
            if path.endswith("b.mp4"):
                raise prepare.VideoError(path, "can't read: Permission denied")
            return real(path)

        patch.setattr(prepare, "digest_of", denied)
        assert [v.reason for v in prepared(videos)] == ["", "can't read: Permission denied"]
    assert [v.ok for v in prepared(videos)] == [True, True]


def test_equal_videos_with_equal_captions_are_used_once(videos: Path, clip: bytes, probes: list[str]) -> None:
    put(videos / "a.mp4", "same", clip)
    put(videos / "b.mp4", "same", clip)
    put(videos / "c.mp4", "other", clip)
    rows = prepared(videos)
    assert [v.ok for v in rows] == [True, False, True]
    assert rows[1].reason == f"duplicate: same bytes and caption as {videos / 'a.mp4'}"
    probes.clear()
    assert prepared(videos) == rows and probes == []
    (videos / "a.mp4").unlink()
    assert [v.ok for v in prepared(videos)] == [False, True, True] and probes == []


def test_the_status_counts_duplicates_and_videos_that_are_gone(videos: Path, clip: bytes) -> None:
    for name in "abc":
        put(videos / f"{name}.mp4", "same", clip)
    put(videos / "gone.mp4", "gone", clip)
    rows = prepared(videos)
    (videos / "gone.mp4").unlink()
    rows = prepared(videos)
    status = json.loads((videos.parent / "runs/r/jobs/prepare/status/0.json").read_text())
    assert (status["done"], status["total"], status["metrics"]) == (3, 3, {"rejected": 3})
    assert [v.ok for v in rows] == [True, False, False, False]


def test_a_hole_in_our_own_checks_costs_one_row(
    videos: Path, clip: bytes, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    put(videos / "a.mp4", "a", clip)
    put(videos / "b.mp4", "b", clip)
    real = prepare.probe
    monkeypatch.setattr(prepare, "probe", lambda p: 1 // 0 if p.endswith("a.mp4") else real(p))
    assert [v.reason for v in prepared(videos)] == [
        "unexpected: ZeroDivisionError: integer division or modulo by zero",
        "",
    ]
    assert "ZeroDivisionError" in caplog.text  # with its traceback, for the bug report


def test_a_stopped_run_keeps_what_it_probed(
    videos: Path, clip: bytes, probes: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for i in range(6):
        put(videos / f"{i}.mp4", f"caption {i}", clip)
    config = config_for(videos)
    task = Task(config.run_dir, "prepare", stop_requested=lambda: len(probes) >= 3)
    with pytest.raises(Stopped, match="of 6 videos; run again to go on"):
        prepare.run(config, task)
    assert not (config.run_dir / "manifest.parquet").exists()  # half a manifest is none
    before = set(probes)
    probes.clear()
    rows = prepared(videos)
    assert all(v.ok for v in rows) and len(rows) == 6
    assert len(before & set(probes)) < len(before) and before | set(probes) == {f"{i}.mp4" for i in range(6)}
    assert [p.name for p in config.run_dir.glob("*.parquet")] == ["manifest.parquet"]


def test_nothing_usable_is_an_error_that_says_what_was_found(videos: Path) -> None:
    with pytest.raises(DataError, match=r"prepare\.videos: .*: no video found; expected files named \.3g2"):
        prepared(videos)
    put(videos / "a.mp4", "a", b"")
    put(videos / "b.mp4", None, b"")
    with pytest.raises(
        DataError, match=r"none of 2 videos can be used \(1 empty file, 1 no caption\); the first: a\.mp4"
    ):
        prepared(videos)
    with pytest.raises(DataError, match=r"prepare\.videos: .*nowhere: no such folder"):
        prepared(videos / "nowhere")
    with pytest.raises(ConfigError, match="prepare: missing"):
        prepare.run(parse_config({"run": "r"}), Task(videos, "prepare"))


# --- a captions file -------------------------------------------------------------------------------------------------


def jsonl(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(r) + "\n\n" for r in rows))
    return path


def test_captions_come_from_jsonl(videos: Path, clip: bytes) -> None:
    for name in ("a.mp4", "sub/b.mp4", "c.bin", "left.mp4", "null.mp4", "number.mp4", "two.mp4", "twice.mp4"):
        put(videos / name, None, clip)
    file = jsonl(
        videos / "captions.jsonl",
        {"path": "a.mp4", "caption": " a\u2028cat ", "extra": 1},
        {"path": str(videos / "sub" / "b.mp4"), "caption": "b"},
        {"path": "./c.bin", "caption": "of any name"},
        {"path": "null.mp4", "caption": None},
        {"path": "number.mp4", "caption": 7},
        {"path": "two.mp4", "caption": "one"},
        {"path": "two.mp4", "caption": "two"},
        {"path": "twice.mp4", "caption": "equal"},
        {"path": "twice.mp4", "caption": "equal"},
        {"path": "missing.mp4", "caption": "m"},
        {"path": "../outside.mp4", "caption": "o"},
        {"path": "/etc/passwd", "caption": "o"},
        {"path": "nul\0.mp4", "caption": "o"},
        {"path": "half\ud800.mp4", "caption": "o"},
    )
    names = by_name(prepared(videos, file), videos)
    assert {n: v.caption for n, v in names.items() if v.ok} == {
        "a.mp4": "a cat",
        "sub/b.mp4": "b",
        "c.bin": "of any name",
        "twice.mp4": "equal",
    }
    reasons = {n: v.reason.replace(str(file), "F") for n, v in names.items() if not v.ok}
    assert reasons == {
        "left.mp4": "no caption: not in F",
        "null.mp4": "no caption: none in line 7 of F",
        "number.mp4": "no caption: not text in line 9 of F",
        "two.mp4": "two captions: lines 11 and 13 of F",
        "missing.mp4": "no such file",
        "../outside.mp4": "outside the videos folder: named in line 21 of F",
        os.path.relpath("/etc/passwd", videos): "outside the videos folder: named in line 23 of F",
        "nul\\x00.mp4": "no such name can be: line 25 of F",
        "half\\ud800.mp4": "no such name can be: line 27 of F",
    }


def test_captions_come_from_csv(videos: Path, clip: bytes) -> None:
    for name in ("a.mp4", "b, c.mp4", "none.mp4"):
        put(videos / name, None, clip)
    file = videos / "captions.CSV"
    file.write_text('\ufeffid,path,caption\r\n1,a.mp4,"a ""cat"",\nsits"\r\n2,"b, c.mp4",b\r\n3,none.mp4\r\n')
    names = by_name(prepared(videos, file), videos)
    assert names["a.mp4"].caption == 'a "cat", sits' and names["b, c.mp4"].caption == "b"
    assert names["none.mp4"].reason == f"no caption: none in line 5 of {file}"


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("c.txt", b"", "expected a file named .jsonl or .csv, found '.txt'"),
        ("c.jsonl", b'{"path": "a.mp4", "caption": "\xff"}', "UTF-8 text expected, found byte 30"),
        ("c.jsonl", b'{"path": "a.mp4", "caption": "a"}\n{"path": ', "line 2: not JSON"),
        ("c.jsonl", b"[" * 100_000, "line 1: not JSON"),
        ("c.jsonl", b'["a.mp4", "a"]', 'line 1: expected {"path": ..., "caption": ...}'),
        ("c.jsonl", b'{"path": 3, "caption": "a"}', "line 1: `path`: the path of a video expected, found 3"),
        ("c.csv", b"", "line 1: columns `path` and `caption` expected, found none"),
        ("c.csv", b"file,text\na.mp4,a\n", "line 1: columns `path` and `caption` expected, found file, text"),
        ("c.csv", b"path,caption\na.mp4,a cat, sitting\n", "line 2: more values than columns"),
        ("c.csv", b'path,caption\na.mp4,"a\n', "not CSV"),
        ("c.csv", b"path,caption\n,a\n", "line 2: `path`: the path of a video expected"),
    ],
)
def test_a_captions_file_that_can_not_be_read_is_one_error(
    videos: Path, clip: bytes, name: str, data: bytes, message: str
) -> None:
    put(videos / "a.mp4", None, clip)
    (videos.parent / name).write_bytes(data)
    with pytest.raises(DataError) as caught:
        prepared(videos, videos.parent / name)
    assert message in str(caught.value) and name in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(DataError, match=r"prepare\.captions: .*: can't read it: No such file"):
        prepared(videos, videos.parent / "missing.jsonl")


# --- measures, filters and scenes ------------------------------------------------------------------------------------


def with_section(videos: Path, task: Task | None = None, **section: object) -> list[Video]:
    config = parse_config(
        {"run": "r", "runs_dir": str(videos.parent / "runs"), "prepare": {"videos": str(videos), **section}}
    )
    prepare.run(config, task or Task(config.run_dir, "prepare"))
    return read_manifest(config.run_dir / "manifest.parquet")


@pytest.fixture
def measures(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that were decoded."""
    seen: list[str] = []
    real = prepare.measure
    monkeypatch.setattr(prepare, "measure", lambda path, *how: seen.append(os.path.basename(path)) or real(path, *how))
    return seen


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


@pytest.fixture(scope="session")
def shot(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """Three seconds of one scene."""
    picture = np.random.default_rng(1).integers(60, 200, (8, 8, 3), dtype=np.uint8).repeat(8, 0).repeat(8, 1)
    path = tmp_path_factory.mktemp("shot") / "a.mp4"
    return write_video(path, np.stack([np.roll(picture, t, 1) for t in range(24)])).read_bytes()


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


# --- an array of tasks -----------------------------------------------------------------------------------------------


def test_the_manifest_does_not_depend_on_the_number_of_tasks(videos: Path, clip: bytes, probes: list[str]) -> None:
    for i in range(9):
        put(videos / f"{i}.mp4", f"caption {i // 2}", clip)  # some of them are equal
    put(videos / "text.mp4", "text", b"text")
    run_dir = videos.parent / "runs/r"
    one = with_section(videos)
    for count, order in ((3, (2, 0, 1)), (20, range(20))):
        shutil.rmtree(run_dir)
        probes.clear()
        for rank in order:
            assert not (run_dir / "manifest.parquet").exists()
            with_parts = Task(run_dir, "prepare", rank=rank, world_size=count)
            try:
                rows = with_section(videos, with_parts)
            except DataError as error:  # read_manifest's: the other tasks are not done
                assert "no such manifest" in str(error)
        assert rows == one and sorted(probes) == sorted(os.path.basename(v.path) for v in one)
    probes.clear()
    assert with_section(videos) == one and probes == []  # another number of tasks knows what they found
    assert [p.name for p in (run_dir / "prepare").iterdir()] == ["00000-of-00001.parquet"]


def test_a_task_that_was_stopped_is_waited_for(videos: Path, clip: bytes, probes: list[str]) -> None:
    for i in range(8):
        put(videos / f"{i}.mp4", f"caption {i}", clip)
    run_dir = videos.parent / "runs/r"

    def videos_of(rank: int) -> int:
        return len(list(look(videos, None, Task(run_dir, "prepare", rank=rank, world_size=2))))

    # Whose videos they are follows from where they lie: of one task in 256 folders, none.
    first, second = sorted((0, 1), key=videos_of, reverse=True)
    stopped = Task(run_dir, "prepare", rank=first, world_size=2, stop_requested=lambda: True)
    with pytest.raises(Stopped):
        with_section(videos, stopped)
    with pytest.raises(DataError, match="no such manifest"):
        with_section(videos, Task(run_dir, "prepare", rank=second, world_size=2))
    rows = with_section(videos, Task(run_dir, "prepare", rank=first, world_size=2))
    assert len(rows) == 8 and all(v.ok for v in rows)
    probes.clear()
    put(videos / "9.mp4", "new", clip)
    (videos / "3.mp4").unlink()
    for rank in range(2):
        rows = with_section(videos, Task(run_dir, "prepare", rank=rank, world_size=2))
    assert [os.path.basename(v.path)[0] for v in rows] == list("012345679") and probes == ["9.mp4"]
    assert [v.reason for v in rows] == [prepare.GONE if v.path.endswith("3.mp4") else "" for v in rows]


def test_parts_that_another_task_deletes_between_listing_and_reading_are_in_its_manifest(
    videos: Path, clip: bytes, probes: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for i in range(6):
        put(videos / f"{i}.mp4", f"caption {i}", clip)
    run_dir = videos.parent / "runs/r"
    for rank in range(2):
        config = config_for(videos)
        prepare.run(config, Task(run_dir, "prepare", rank=rank, world_size=2))
    expected = read_manifest(run_dir / "manifest.parquet")
    (run_dir / "manifest.parquet").unlink()  # as if it had never been written
    (run_dir / "prepare/00000-of-00009.parquet").symlink_to("deleted")  # listed, and gone when it is looked at
    real = prepare.read_rows
    others: list[Path] = []

    def meanwhile(path: Path) -> object:
        if not others:
            others.append(path)
            prepare.run(config, Task(run_dir, "prepare"))  # all in one task: it takes what the two found
        return real(path)

    monkeypatch.setattr(prepare, "read_rows", meanwhile)
    probes.clear()
    prepare.run(config, Task(run_dir, "prepare", rank=0, world_size=3))
    assert others[0].name.endswith("-of-00002.parquet") and not others[0].exists()
    for rank in (1, 2):
        prepare.run(config, Task(run_dir, "prepare", rank=rank, world_size=3))
    assert read_manifest(run_dir / "manifest.parquet") == expected and probes == []


def test_a_part_that_is_deleted_while_all_are_read_is_waited_for(
    videos: Path, clip: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    for i in range(6):
        put(videos / f"{i}.mp4", f"caption {i}", clip)
    run_dir = videos.parent / "runs/r"
    tasks = [Task(run_dir, "prepare", rank=rank, world_size=2) for rank in range(2)]
    prepare.run(config_for(videos), tasks[0])
    real = prepare._all_parts

    with monkeypatch.context() as patch:

        def meanwhile(folder: Path, *how: object) -> object:
            listed = os.listdir(folder)
            (folder / "00000-of-00002.parquet").unlink()
            patch.setattr(prepare.os, "listdir", lambda _: listed)
            return real(folder, *how)

        patch.setattr(prepare, "_all_parts", meanwhile)
        prepare.run(config_for(videos), tasks[1])
    assert not (run_dir / "manifest.parquet").exists()
    prepare.run(config_for(videos), tasks[0])
    assert len(read_manifest(run_dir / "manifest.parquet")) == 6


def test_a_folder_that_is_deleted_while_videos_are_looked_for_is_said(
    videos: Path, clip: bytes, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    put(videos / "a.mp4", "a caption", clip)
    put(videos / "old/b.mp4", "a caption", clip)
    real = os.walk

    def walk(root: Path, **how: object) -> object:
        for folder, folders, names in real(root, **how):
            if os.path.basename(folder) == "old":
                shutil.rmtree(folder)
            yield folder, folders, names

    monkeypatch.setattr(prepare.os, "walk", walk)
    rows = prepared(videos)
    assert [os.path.basename(v.path) for v in rows] == ["a.mp4"]
    assert f"can't look into folder {videos / 'old'}: No such file or directory" in caplog.text


def test_parts_that_an_earlier_run_cut_otherwise_are_not_taken_for_those_of_this_one(videos: Path) -> None:
    for i in range(3):
        shots(videos / f"{i}.mp4", (16, 24))
        (videos / f"{i}.txt").write_text(f"caption {i}")
    tasks = [Task(videos.parent / "runs/r", "prepare", rank=rank, world_size=2) for rank in (0, 1)]
    with pytest.raises(DataError, match="no such manifest"):
        with_section(videos, tasks[0])
    whole = with_section(videos, tasks[1])
    assert len(whole) == 3
    # One is done before the other begins, as tasks that a cluster starts one by one are.
    assert with_section(videos, tasks[0], scenes={"min_s": 1}) == whole
    rows = with_section(videos, tasks[1], scenes={"min_s": 1})
    assert [(v.start_s, v.ok) for v in rows] == [(0, True)] * 3 + [(2, True)] * 3
