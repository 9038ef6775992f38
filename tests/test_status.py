"""status, logs and cancel from the run folder alone, and from squeue where there is a Slurm."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import tiny

from sorahpc.cluster.status import (
    cancel_job,
    find_jobs,
    find_run,
    job_status,
    log_lines,
    queue_of,
    run_status,
    srun_errors,
    status_table,
)
from sorahpc.errors import ConfigError
from sorahpc.lease import identity, is_dead
from sorahpc.log import duration, number, progress_line
from sorahpc.runs import JobFolder, summarize, write_json

NOW = {"process": identity(), "host": "h"}
DEAD = {"process": {**identity(), "started": 1}, "host": "h"}
FAR = {"process": {**identity(), "machine": "other"}, "host": "far"}


def make(folder: Path, launch: dict[str, Any], *statuses: dict[str, Any], kind: str = "array") -> JobFolder:
    job = JobFolder(folder / "runs" / "x", "encode")
    write_json(job.spec, {"kind": kind})
    write_json(job.launch, launch)
    for task, status in enumerate(statuses):
        full = {"task": task, "tasks": len(statuses), "heartbeat": time.time(), "done": 1, "total": 4, "unit": "clip"}
        write_json(job.status(task), {**full, **status})
    return job


def entry(state: str, reason: str = "None") -> dict[str, Any]:
    return {"7": {"state": state, "reason": reason, "nodes": [], "tasks": {state: 1}}}


LOCAL = {"kind": "local", "launcher": identity(), "tasks": 2}
SLURM = {"kind": "slurm", "job_id": "7", "tasks": 2}
OLD = {"heartbeat": time.time() - 1000}


@pytest.mark.parametrize(
    ("launch", "statuses", "queue", "expected"),
    [
        (LOCAL, [], {}, "pending"),
        (LOCAL, [{"state": "running", **NOW}], {}, "running"),
        (LOCAL, [{"state": "running", **DEAD}], {}, "lost"),
        (LOCAL, [{"state": "done"}, {"state": "done"}], {}, "done"),
        (LOCAL, [{"state": "done"}, {"state": "running", **NOW}], {}, "running"),
        (LOCAL, [{"state": "done"}, {"state": "failed", "message": "m", "exit_code": 4}], {}, "failed"),
        ({**LOCAL, "exit_code": 137, "message": "rank 1 was killed"}, [{"state": "stopped"}], {}, "failed"),
        (LOCAL, [{"state": "stopped"}], {}, "stopped"),
        ({**LOCAL, "cancelled": 1.0}, [{"state": "stopped"}], {}, "cancelled"),
        ({**LOCAL, "launcher": DEAD["process"]}, [], {}, "lost"),
        (SLURM, [], entry("PENDING", "Resources"), "pending"),
        (SLURM, [], entry("RUNNING"), "running"),
        (SLURM, [{"state": "running", **FAR}], entry("RUNNING"), "running"),
        (SLURM, [{"state": "stopped"}], entry("PENDING", "BeginTime"), "pending"),
        (SLURM, [{"state": "running", **FAR}], {}, "lost"),
        (SLURM, [{"state": "running", **FAR, **OLD}], None, "lost"),
        (SLURM, [{"state": "running", **FAR}], None, "running"),
        (SLURM, [], {}, "cancelled"),
        (SLURM, [], None, "pending"),
        (SLURM, [{"state": "done"}, {"state": "done"}], None, "done"),
        (SLURM, [{"state": "done"}, {"state": "done"}], {}, "done"),
    ],
)
def test_the_state_of_a_job(
    tmp_path: Path, launch: dict[str, Any], statuses: list[dict[str, Any]], queue: Any, expected: str
) -> None:
    found = job_status(make(tmp_path, launch, *statuses), queue)
    assert found["state"] == expected, found
    json.dumps(found, allow_nan=False)
    table = status_table({"run": "x", "path": "p", "queue_known": queue is not None, "jobs": [found]})
    assert expected in table and "None" not in table


def test_a_pending_job_says_why(tmp_path: Path) -> None:
    found = job_status(make(tmp_path, SLURM), entry("PENDING", "QOSMaxJobsPerUserLimit"))
    assert found["message"] == "QOSMaxJobsPerUserLimit"


def test_the_first_rank_that_failed_is_the_cause(tmp_path: Path) -> None:
    told = [{"state": "failed", "message": f"m{i}", "exit_code": i, "heartbeat": 100.0 - i} for i in (3, 4, 5)]
    found = job_status(make(tmp_path, SLURM, *told, kind="gang"), {})
    assert (found["message"], found["exit_code"]) == ("m5", 5)


def test_what_srun_says_of_killed_tasks_is_found(tmp_path: Path) -> None:
    job = make(tmp_path, SLURM, {"state": "stopped"})
    path = job.path / "slurm" / "7_0_log.out"
    path.parent.mkdir()
    path.write_text(
        "2026-01-01T00:00:00Z INFO rank0 x: y\nsrun: error: n1: task 0: Exited with exit code 10\n"
        "srun: error: n2: tasks 1-3: Killed\nslurmstepd-n2: error: *** STEP 7.0 ON n2 CANCELLED DUE TO TIME LIMIT ***\n"
    )
    assert srun_errors(job, "7") == ["n2: tasks 1-3: Killed", "*** STEP 7.0 ON n2 CANCELLED DUE TO TIME LIMIT ***"]


@pytest.mark.parametrize("broken", ["", "{", "[]", "null", '{"state": "running"}', "\x00\xff"])
def test_a_broken_status_file_breaks_nothing(tmp_path: Path, broken: str) -> None:
    job = make(tmp_path, LOCAL, {"state": "done"}, {"state": "done"})
    job.status(1).write_text(broken, encoding="latin-1")
    status_table(run_status(tmp_path / "runs/x"))


DAMAGE: list[Any] = ["soon", None, [1], {"a": 1}, True, -1, 1e999, 10**30, {}]


@pytest.mark.parametrize("value", DAMAGE, ids=repr)
@pytest.mark.parametrize("name", ["launch.json", "status/0.json"])
def test_a_value_of_a_wrong_type_is_taken_for_unknown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: Any
) -> None:
    killed: list[int] = []
    monkeypatch.setattr(os, "kill", lambda pid, _: killed.append(pid))
    job = make(tmp_path, {**LOCAL, "time": 1.0, "launcher": DEAD["process"]}, {"state": "running", **DEAD})
    job.log(0).parent.mkdir()
    job.log(0).write_text("a line\n")
    before = json.loads((job.path / name).read_text())
    keys = (*before, "metrics", "rate", "message", "exit_code", "restart", "job_id", "cancelled")
    for damaged in keys:
        (job.path / name).write_text(json.dumps({**before, damaged: value}))
        found = run_status(job.run_dir)
        assert status_table(found) and json.dumps(found, allow_nan=False), damaged
        assert list(log_lines(find_jobs(job.run_dir)[0], 0, follow=False)) == ["a line\n"]
        assert cancel_job(job) in ("encode: has ended already", "encode: was never started")
    (job.path / name).write_text(json.dumps({k: before[k] for k in before if k != "done"}))
    assert status_table(run_status(job.run_dir)) and not killed


def test_a_launcher_without_a_start_is_nobody_and_is_never_signalled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed: list[int] = []
    monkeypatch.setattr(os, "kill", lambda pid, _: killed.append(pid))
    for pid, started in ((-1, None), (0, None), (-1, 1), (2**30, None)):
        who = {**identity(), "pid": pid, "started": started}
        assert is_dead(who) is True
        assert cancel_job(make(tmp_path, {**LOCAL, "launcher": who})) == "encode: has ended already"
    assert not killed


def test_progress_adds_up_over_the_tasks() -> None:
    told = [
        {"state": "running", "done": 2, "total": 10, "unit": "clip", "rate": 0.5, "host": "a", "heartbeat": 1.0},
        {"state": "running", "done": 4, "total": 6, "unit": "clip", "rate": 1.5, "host": "b", "heartbeat": 2.0},
        {"state": "done", "done": 4, "total": 4, "unit": "clip", "rate": 9.0, "host": "b", "heartbeat": 1.5},
        {"state": "running", "host": "c"},
    ]
    found = summarize(told)
    assert (found["done"], found["total"], found["rate"], found["eta_s"]) == (10, 20, 2.0, 5.0)
    assert (found["heartbeat"], found["hosts"]) == (2.0, ["a", "b", "c"])
    assert progress_line("encode", found) == "encode: 10/20 clip (50 %), 2 clip/s, 5 s left"
    assert progress_line("encode", summarize([])) == "encode: starting"


def test_numbers_and_durations_for_people() -> None:
    assert [duration(s) for s in (None, 0.4, 61, 3599.6, 7260, 90000)] == [
        "-",
        "0 s",
        "1 min 01 s",
        "1 h 00 min",
        "2 h 01 min",
        "1 d 01 h",
    ]
    assert [number(x) for x in (3.0, 0.123456, 12345, "x")] == ["3", "0.1235", "12345", "x"]


def fake_squeue(folder: Path, body: str) -> None:
    (folder / "squeue").write_text(f"#!/bin/sh\n{body}\n")
    (folder / "squeue").chmod(0o755)


def test_squeue_is_read_and_its_failure_is_not_an_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    fake_squeue(
        tmp_path,
        "printf '7|PENDING|Priority||1-3\\n7|RUNNING|None|n1|0\\n8|RUNNING|None|n1|N/A\\n9|COMPLETED|None||\\n'",
    )
    found = queue_of(["7", "9"])
    assert found is not None and set(found) == {"7"}
    assert (found["7"]["state"], found["7"]["tasks"], found["7"]["nodes"]) == (
        "RUNNING",
        {"PENDING": 1, "RUNNING": 1},
        ["n1"],
    )
    fake_squeue(tmp_path, "echo 'slurm_load_jobs error: Unable to contact slurm controller' >&2; exit 1")
    assert queue_of(["7"]) is None
    monkeypatch.setenv("PATH", "/nowhere")
    assert queue_of(["7"]) is None and queue_of([]) == {}


def test_a_run_is_found_by_name_and_by_path_and_a_wrong_one_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    make(tmp_path, LOCAL)
    assert find_run("x") == Path("runs/x") and find_run(str(tmp_path / "runs/x")) == tmp_path / "runs/x"
    with pytest.raises(ConfigError, match=r"y: expected a run folder.*runs here: x"):
        find_run("y")


def test_logs_and_cancel_from_the_command_line(tmp_path: Path) -> None:
    config = tiny.write_config(tmp_path)
    command = [sys.executable, "-m", "sorahpc.cli", "train", str(config), "train.steps=1000"]
    process = subprocess.Popen(command, cwd=tmp_path, env=tiny.env(TINY_ITEM_S="0.05"), stderr=subprocess.DEVNULL)
    status: dict[str, Any] = {}
    deadline = time.monotonic() + 20
    while status.get("state") != "running" and time.monotonic() < deadline:
        done = tiny.sorahpc("status", "tiny", "--json", cwd=tmp_path)
        status = json.loads(done.stdout)["jobs"][0] if done.returncode == 0 and json.loads(done.stdout)["jobs"] else {}
    assert status["hosts"] == [os.uname().nodename]
    follow = subprocess.Popen(
        [sys.executable, "-m", "sorahpc.cli", "logs", "tiny", "-f"],
        cwd=tmp_path, env=tiny.env(), stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    said = tiny.sorahpc("cancel", "tiny", cwd=tmp_path)
    assert said.returncode == 0 and f"train: stopped (pid {process.pid})" in said.stdout
    assert process.wait(timeout=10) == 10
    assert "stopped: stopped at step" in follow.communicate(timeout=20)[0]
    assert tiny.sorahpc("cancel", "tiny", "train", cwd=tmp_path).stdout == "train: has ended already\n"
    lines = json.loads(tiny.sorahpc("logs", "tiny", "train", "--rank", "1", "--json", cwd=tmp_path).stdout)["lines"]
    assert "rank 1 of 2" in lines[0]
    for args, text in (
        (["logs", "tiny", "train", "--rank", "7"], "no log of rank 7; ranks with a log: 0, 1"),
        (["logs", "tiny", "encode"], "no job 'encode'; launched so far: train"),
        (["cancel", "nosuch"], "expected a run folder"),
    ):
        wrong = tiny.sorahpc(*args, cwd=tmp_path)
        assert wrong.returncode == 2 and text in wrong.stderr and len(wrong.stderr.splitlines()) == 1
