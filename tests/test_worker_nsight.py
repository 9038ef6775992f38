"""A task under Nsight, which needs a GPU: a stand-in notes how it was called and runs the rest."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
from workers import status, wait_for, worker

from sorahpc.cluster import nsight
from sorahpc.cluster.local import visible_gpus
from sorahpc.configfile import parse_config
from sorahpc.runs import read_json

STAND_IN = """#!/bin/bash
printf '%s\\n' "$(basename "$0")" "$@" >>"$NOTES"
while [ "$1" != "$REAL_PYTHON" ]; do shift; done
exec "$@"
"""


def with_tool(tmp_path: Path, name: str, text: str = STAND_IN) -> dict[str, str]:
    """The environment with a stand-in for nsys or ncu in front."""
    path = tmp_path / "bin" / name
    path.parent.mkdir()
    path.write_text(text)
    path.chmod(0o755)
    search = f"{path.parent}{os.pathsep}{os.environ['PATH']}"
    return {"PATH": search, "NOTES": str(tmp_path / "notes"), "REAL_PYTHON": sys.executable}


def test_only_the_chosen_rank_runs_under_nsight(tmp_path: Path) -> None:
    env = with_tool(tmp_path, "nsys")
    tiny.write_config(tmp_path, profile={"tool": "nsys", "ranks": [1]})
    done = tiny.sorahpc("profile", "train", "tiny.yaml", cwd=tmp_path, **env)
    assert done.returncode == 0, done.stderr
    if not visible_gpus(dict(os.environ)):
        warned = "profile.tool: nsys records a GPU, and this machine has none: no report will come; use profile.tool="
        assert done.stderr.startswith(f"sorahpc: profile-train: {warned}torch\n") and done.stderr.count(warned) == 1
    notes = (tmp_path / "notes").read_text().splitlines()
    assert notes[:2] == ["nsys", "profile"] and notes.count("nsys") == 1
    assert "--capture-range=cudaProfilerApi" in notes and "--trace=cuda,nvtx,osrt" in notes
    (out,) = [note for note in notes if note.startswith("--output=")]
    assert out.startswith(f"--output={tmp_path}/runs/tiny/profile/train/nsys_") and out.endswith("_rank1")
    log = (tmp_path / "runs/tiny/jobs/profile-train/log/rank1.log").read_text()
    assert "start: profile-train, rank 1 of 2" in log and log.count("start:") == 1
    assert status(tmp_path, "profile-train")["state"] == "done"


def test_a_lease_is_not_in_the_way_of_the_writer_under_nsight(tmp_path: Path) -> None:
    env = with_tool(tmp_path, "ncu")
    train = {**tiny.config_data()["train"], "resources": {}}
    tiny.write_config(tmp_path, train=train, profile={"tool": "ncu"})
    done = tiny.sorahpc("profile", "train", "tiny.yaml", cwd=tmp_path, **env)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "notes").read_text().startswith("ncu\n--profile-from-start=off\n")
    by_hand = worker("profile-train", "tiny.yaml", cwd=tmp_path, **env)
    assert by_hand.returncode == 0, by_hand.stderr


def test_the_one_task_of_a_sampling_runs_under_nsight_whatever_ranks_are_chosen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", with_tool(tmp_path, "nsys")["PATH"])
    data = {**tiny.config_data(), "runs_dir": str(tmp_path), "profile": {"tool": "nsys", "ranks": [1]}}
    found = nsight.command(parse_config(data), "profile-sample", 0, 1, {})
    assert found is not None and found[0] == str(tmp_path / "bin/nsys")
    assert nsight.command(parse_config(data), "profile-train", 0, 2, {}) is None
    assert "no report will come" in nsight.warning(parse_config(data), "profile-sample", [])
    assert not nsight.warning(parse_config(data), "profile-sample", ["0"])
    assert not nsight.warning(parse_config(data), "encode", [])


@pytest.mark.parametrize(
    ("tool", "cluster", "code", "expected"),
    [
        ("nsys", "local", 3, "nsys: not found on this node; load its module"),
        ("ncu", "local", 2, "profile.tool: ncu runs each kernel several times, and the 2 ranks of this job would wait"),
        ("nsys", "inline", 3, "nsys: not found on this node"),
    ],
)
def test_what_nsight_can_not_do_is_one_line(tmp_path: Path, tool: str, cluster: str, code: int, expected: str) -> None:
    tiny.write_config(tmp_path, profile={"tool": tool}, cluster={"kind": cluster})
    if cluster == "inline":
        tiny.write_config(tmp_path, profile={"tool": tool}, cluster={"kind": cluster}, train={
            **tiny.config_data()["train"], "resources": {},
        })  # fmt: skip
    done = tiny.sorahpc("profile", "train", "tiny.yaml", cwd=tmp_path, PATH="/usr/bin:/bin")
    assert done.returncode == code and expected in done.stderr and "Traceback" not in done.stderr, done.stderr


# As nsys does: the task is its child, and its own exit code may be another.
RUN = 'while [ "$1" != "$REAL_PYTHON" ]; do shift; done\n"$@"\n'
RANK_OUT = "runs/tiny/jobs/profile-train/log/rank1.out"


@pytest.mark.parametrize(
    ("script", "fault", "code", "expected"),
    [
        ("echo no; echo 'nsys: no licence' >&2; echo; exit 1", "", 3,
         f"(exit 3): nsys: exit 1 without having run the job: nsys: no licence; see {RANK_OUT} and mend the cause, "
         "or use profile.tool=torch"),
        ("exit 0", "", 3, "nsys: exit 0 without having run the job: no word; see"),
        ("kill -9 $$", "", 3, "nsys: killed by SIGKILL without having run the job: no word"),
        (RUN + "echo disk full; exit 7", "", 3, "nsys: exit 7 after the job: disk full; see"),
        (RUN + "exit 5", "kill:1:3", 3, "nsys: exit 5 while the job ran"),
        (RUN + "exit $?", "data:1:3", 4, "rank 1 failed (exit 4): clip 7: fault one; clip 8: fault two"),
        (RUN + "exit 0", "data:1:3", 4, "rank 1 failed (exit 4): clip 7: fault one; clip 8: fault two"),
    ],
)  # fmt: skip
def test_a_tool_that_fails_says_why_and_does_not_hide_how_the_task_ended(
    tmp_path: Path, script: str, fault: str, code: int, expected: str
) -> None:
    env = with_tool(tmp_path, "nsys", f"#!/bin/bash\n{script}\n")
    tiny.write_config(tmp_path, profile={"tool": "nsys", "ranks": [1]})
    done = tiny.sorahpc("profile", "train", "tiny.yaml", cwd=tmp_path, TINY_FAULT=fault, **env)
    assert done.returncode == code and "Traceback" not in done.stderr, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if "rank 1 failed" in line]
    assert expected in line.replace(f"{tmp_path}/", "")


def test_a_tool_that_can_not_be_run_is_one_line(tmp_path: Path) -> None:
    env = with_tool(tmp_path, "nsys", "no program\n")
    tiny.write_config(tmp_path, profile={"tool": "nsys", "ranks": [1]})
    done = tiny.sorahpc("profile", "train", "tiny.yaml", cwd=tmp_path, **env)
    assert done.returncode == 3 and f"{tmp_path}/bin/nsys: can't be run: Exec format error; mend" in done.stderr


def test_by_hand_a_failed_tool_is_told_by_the_status(tmp_path: Path) -> None:
    env = with_tool(tmp_path, "nsys", "#!/bin/bash\necho no licence\nexit 1\n")
    train = {**tiny.config_data()["train"], "resources": {}}
    tiny.write_config(tmp_path, train=train, profile={"tool": "nsys"})
    done = worker("profile-train", "tiny.yaml", cwd=tmp_path, **env)
    assert done.returncode == 3
    told = status(tmp_path, "profile-train")
    assert (told["state"], told["exit_code"]) == ("failed", 3)
    assert told["message"].startswith("nsys: exit 1 without having run the job: no licence; see the lines above")
    assert done.stderr.splitlines() == ["no licence", f"sorahpc: {told['message']}"]


def test_a_stop_reaches_the_task_and_not_the_tool_between(tmp_path: Path) -> None:
    """A tool that TERM would end, and with it the recording."""
    env = with_tool(tmp_path, "nsys", f"#!/bin/bash\n{RUN}code=$?\necho tool ended >>$NOTES\nexit $code\n")
    train = {**tiny.config_data()["train"], "resources": {}}
    tiny.write_config(tmp_path, train={**train, "steps": 1000}, profile={"tool": "nsys"})
    command = [sys.executable, "-m", "sorahpc.cluster.worker", "profile-train", "tiny.yaml"]
    process = subprocess.Popen(command, cwd=tmp_path, env=tiny.env(TINY_ITEM_S="0.05", **env))
    path = tmp_path / "runs/tiny/jobs/profile-train/status/0.json"
    wait_for(lambda: (read_json(path) or {}).get("total") == 1000)
    process.terminate()
    assert process.wait(timeout=20) == 10
    assert status(tmp_path, "profile-train")["state"] == "stopped"
    assert (tmp_path / "notes").read_text() == "tool ended\n"
