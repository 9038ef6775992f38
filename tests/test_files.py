"""What is named as a file and is none is refused at once, wherever a job opens it."""

from __future__ import annotations

import os
import re
import resource
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import caches
import pytest
from videos import numbered, write_video

from sorahpc.cli import main
from sorahpc.configfile import parse_config
from sorahpc.data.cache import INDEX, INFO, build_index, load_index, read_info
from sorahpc.data.captions import item_path, read_captions, read_item
from sorahpc.data.decode import VideoError
from sorahpc.data.decode import open_regular as open_video
from sorahpc.data.manifest import read_manifest
from sorahpc.data.prompts import read_prompts
from sorahpc.data.seal import check_seal
from sorahpc.data.shards import read_shard
from sorahpc.data.sources import look
from sorahpc.errors import SoraHPCError
from sorahpc.files import NotRegular, open_regular, read_regular, read_text
from sorahpc.jobs import prepare
from sorahpc.runs import Task, atomic_write

pytestmark = pytest.mark.timeout(60)  # what waits for a FIFO waits for ever


@pytest.fixture(params=["a FIFO", "a socket", "a device", "a folder"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def put(kind: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Path], Path]]:
    """Puts one of this kind at a path."""
    listener = socket.socket(socket.AF_UNIX)

    def make(path: Path) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        if kind == "a FIFO":
            os.mkfifo(path)
        elif kind == "a socket":
            monkeypatch.chdir(path.parent)  # a socket's path has at most 107 bytes
            listener.bind(path.name)
        elif kind == "a device":
            path.symlink_to("/dev/zero")
        else:
            path.mkdir()
        return path

    yield make
    listener.close()


def test_what_is_no_file_is_not_opened_as_one(tmp_path: Path, kind: str, put: Callable[[Path], Path]) -> None:
    path = put(tmp_path / "x")
    before = len(os.listdir("/proc/self/fd"))
    for use in (open_regular, read_regular, read_text, check_seal):
        with pytest.raises(NotRegular) as caught:
            use(path)
        assert caught.value.strerror == f"not a regular file: {kind}" and caught.value.filename == str(path)
    with pytest.raises(VideoError, match=f"not a regular file: {kind}"):
        open_video(path)
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_file_is_read_as_open_would_read_it(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes("\ufeffa\r\nb\rc\u2028d\n".encode())
    assert read_text(path, "utf-8-sig") == path.read_text("utf-8-sig") == "a\nb\nc\u2028d\n"
    assert read_regular(path) == path.read_bytes()
    path.write_bytes(b"\xff")
    with pytest.raises(UnicodeDecodeError):
        read_text(path)
    with pytest.raises(FileNotFoundError):
        read_text(tmp_path / "missing")


READERS: dict[str, tuple[str, Callable[[Path], object]]] = {
    "manifest": ("manifest.parquet", read_manifest),
    "captions": ("captions.parquet", read_captions),
    "item": (f"aa/{'a' * 64}.json", lambda path: read_item(path.parent.parent, path.stem)),
    "prompts": ("prompts.txt", read_prompts),
    "captions file": ("captions.jsonl", lambda path: list(look(path.parent, path, Task(path.parent, "prepare")))),
    "cache.json": (INFO, lambda path: read_info(path.parent)),
    "index": (INDEX, lambda path: load_index(path.parent)),
    "shard": ("shard-0123456789abcdef.h5", lambda path: read_shard(path, 4, {"text": 8}, "float16")),
}


@pytest.mark.parametrize("what", READERS)
def test_no_reader_waits_for_what_is_no_file(tmp_path: Path, kind: str, put: Callable[[Path], Path], what: str) -> None:
    name, read = READERS[what]
    assert item_path(tmp_path, "a" * 64) == tmp_path / READERS["item"][0]
    path = put(tmp_path / name)
    with pytest.raises(SoraHPCError) as caught:
        read(path)
    text = str(caught.value)
    assert f"not a regular file: {kind}" in text and str(path) in text and "\n" not in text


def test_jobs_end_with_one_line_at_what_is_no_file(
    tmp_path: Path, kind: str, put: Callable[[Path], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    data = {"run": "r", "runs_dir": str(tmp_path / "runs"), "prepare": {"videos": str(tmp_path / "videos")}}
    config = parse_config(data)
    write_video(tmp_path / "a.mp4", numbered(3))
    (tmp_path / "videos").mkdir()
    for name in ("a", "b"):
        (tmp_path / f"videos/{name}.mp4").write_bytes((tmp_path / "a.mp4").read_bytes())
    (tmp_path / "videos/a.txt").write_text("a caption")
    prepare.run(config, Task(config.run_dir, "prepare"))
    part = config.run_dir / "prepare/00000-of-00001.parquet"
    part.unlink()
    put(part)
    with pytest.raises(
        SoraHPCError, match=rf"{part.name}: can't read it: not a regular file: {kind}; delete it and run .* again"
    ):
        prepare.run(config, Task(config.run_dir, "prepare"))
    umask = os.umask(0o077)
    try:
        assert main(["data", "show", str(part)]) == 4
    finally:
        os.umask(umask)
    assert f"not a regular file: {kind}" in capsys.readouterr().err


def test_an_index_that_is_no_file_is_written_over(tmp_path: Path) -> None:
    caches.write(tmp_path)
    names = [path.name for path in sorted(tmp_path.glob("shard-*.h5"))]
    expected = build_index(tmp_path, names)
    (tmp_path / INDEX).unlink()
    os.mkfifo(tmp_path / INDEX)
    assert build_index(tmp_path, names) == expected and load_index(tmp_path)[0].num_rows == 10


def test_a_file_that_does_not_fit_is_named_and_the_old_one_stays(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    atomic_write(path, "old")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(OSError, match=re.escape(f"File too large: '{path}'")):
            atomic_write(path, "x" * 2000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["x.json"]
