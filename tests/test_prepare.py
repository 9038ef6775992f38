"""prepare: a row a video, a reason for each that can't be used, and nothing looked at twice; captions of any kind."""

from __future__ import annotations

import json
import logging
import os
import shutil
from pathlib import Path

import pytest
from prepare_jobs import by_name, config_for, looked_at, prepared, put
from videos import broken_files, numbered, recording, write_video

from sorahpc.configfile import parse_config
from sorahpc.data.toyworld import write_world
from sorahpc.errors import ConfigError, DataError, Stopped
from sorahpc.jobs import prepare
from sorahpc.runs import Task


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
    return looked_at(monkeypatch, "probe")


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
    (videos / "empty.txt").write_bytes(b"caf\xe9")  # another fault of the same file
    assert by_name(prepared(videos), videos)["empty.mp4"].reason == "no caption: empty.txt is not UTF-8 text"


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
