"""What the dead left goes, and nothing of the living."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from caches import write

from sorahpc.cli import main
from sorahpc.data.claims import WORK, ShardLease
from sorahpc.data.leftovers import LEFT_AFTER_S, remove_leftovers, remove_stale_parts
from sorahpc.runs import aside, place


def test_parts_of_the_dead_and_of_the_silent_are_removed_and_those_of_the_living_are_not(tmp_path: Path) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    here, twin = place(), f"{socket.gethostname()}-00000000"  # of a container with our name, whose pids we don't see
    mine, gone = tmp_path / f".a.h5.{here}.{os.getpid()}.1.part", tmp_path / f".b.h5.{here}.{dead.pid}.1.part"
    other, silent = tmp_path / f".c.h5.{twin}.{dead.pid}.1.part", tmp_path / f".d.h5.{twin}.{dead.pid}.1.part"
    # Of cache.json, as its first writer has it aside, and of the index.
    small, under_way = (
        tmp_path / f"..cache.json.{here}.{pid}.1.tmp.{here}.{pid}.1.tmp" for pid in (dead.pid, os.getpid())
    )
    index = tmp_path / f".index.parquet.{here}.{dead.pid}.140001.tmp"
    strange = [tmp_path / name for name in (f".notes.{here}.tmp", ".download.part", ".tmp")]  # of somebody else's
    for path in (mine, gone, other, silent, small, under_way, index, *strange):
        path.write_bytes(b"x")
    for path in (silent, *strange):
        os.utime(path, (1, 1))
    assert remove_stale_parts(tmp_path) == sorted([small.name, gone.name, silent.name, index.name])
    assert mine.exists() and other.exists() and under_way.exists()
    assert all(path.exists() for path in strange)


def test_what_is_written_aside_is_known_by_its_writer(tmp_path: Path) -> None:
    part = aside(tmp_path / "shard-0.h5", ".part")
    part.write_bytes(b"x")
    assert remove_stale_parts(tmp_path) == []
    code = "import sys; from pathlib import Path; from sorahpc.runs import aside; aside(Path(sys.argv[1])).touch()"
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "index.parquet")], check=True)
    (dead,) = set(os.listdir(tmp_path)) - {part.name}
    assert remove_stale_parts(tmp_path) == [dead] and part.exists()


@pytest.fixture
def left(tmp_path: Path) -> Path:
    """A finished cache, and in its `.work` what a dead task, and one at work, have there; a day and more ago or not."""
    write(tmp_path)
    work = tmp_path / WORK
    work.mkdir()
    there, held, _ = (path.stem for path in sorted(tmp_path.glob("shard-*.h5")))
    absent, dead = "shard-" + "a" * 16, "index-" + "b" * 16
    young = [f"{there}.{'1' * 32}.journal", f"{there}.lease", f".{there}.lease.2.stale", f"{held}.{'3' * 32}.journal"]
    old = [f"{absent}.{'4' * 32}.journal", f"{absent}.lease", f".{absent}.lease.5", f"{dead}.lease", "notes"]
    for name in [*young, *old]:
        (work / name).write_bytes(bytes(100))
        if name in old:
            os.utime(work / name, (time.time() - LEFT_AFTER_S - 1,) * 2)
    ShardLease(work / f"{held}.lease", held, "other").acquire()
    return tmp_path


def test_verify_counts_what_lies_in_the_work_folder_and_repair_removes_what_nobody_needs(
    left: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = set(os.listdir(left / WORK))
    nbytes = sum(path.stat().st_size for path in (left / WORK).iterdir())
    assert main(["cache", "verify", str(left)]) == 0
    said = capsys.readouterr().out
    assert f"{left}/.work: 3 journals, 4 leases, 3 others, 0.000 GB; 5 of them, 0.000 GB, are needed no more" in said
    assert main(["cache", "verify", str(left), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["work"]
    assert found["nbytes"] == nbytes and found["left_bytes"] == 500
    assert main(["cache", "repair", str(left)]) == 0
    said = capsys.readouterr().out
    assert before - set(os.listdir(left / WORK)) == set(found["left"])
    assert all(f"{left}/.work/{name}: removed" in said for name in found["left"])
    kept = set(os.listdir(left / WORK))
    held = {name for name in kept if name.endswith(".lease") and not name.startswith(".")}
    assert len(held) == 1 and {name.split(".")[0] for name in kept} == {
        held.pop().removesuffix(".lease"), "shard-" + "a" * 16, "notes", ""
    }  # fmt: skip
    assert main(["cache", "verify", str(left)]) == 0
    assert "2 journals, 1 leases, 2 others, 0.000 GB\n" in capsys.readouterr().out


def test_journals_of_shards_that_are_not_there_go_a_day_later_where_all_that_are_planned_are(left: Path) -> None:
    (journal,) = (left / WORK).glob("shard-aaaa*.journal")
    remove_leftovers(left)
    assert journal.exists()
    assert remove_leftovers(left, complete=True) == [journal.name]
    assert remove_leftovers(left, complete=True) == []
