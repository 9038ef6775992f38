"""prepare: an array of tasks makes one manifest, whoever is stopped, late or early."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from prepare_jobs import config_for, looked_at, put, with_section
from videos import numbered, shots, write_video

from sorahpc.data.manifest import read_manifest
from sorahpc.data.sources import look
from sorahpc.errors import DataError, Stopped
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
