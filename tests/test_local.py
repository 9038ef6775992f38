"""Jobs as processes of this machine: exit codes, causes, signals, and that nothing outlives the launcher."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny

from sorahpc.cluster.local import crash_lines, exit_word, tell_end, visible_gpus
from sorahpc.lease import start_time
from sorahpc.runs import JobFolder, read_json


def launch(folder: Path, *args: str | Path, **env: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "sorahpc.cli", *map(str, args)]
    return subprocess.Popen(command, cwd=folder, env=tiny.env(**env), stderr=subprocess.PIPE, text=True)


def wait_for(ready: Callable[[], object], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def log(folder: Path, rank: int, job: str = "train") -> str:
    path = folder / f"runs/tiny/jobs/{job}/log/rank{rank}.log"
    return path.read_text() if path.exists() else ""


def pids(folder: Path, job: str = "train") -> list[int]:
    lines = [log(folder, rank, job).splitlines() for rank in (0, 1)]
    return [int(x[-1].split("pid ")[1]) for x in ([y for y in found if "pid " in y] for found in lines) if x]


def test_an_array_makes_all_its_items_and_again_only_what_is_missing(tmp_path: Path) -> None:
    config = tiny.write_config(tmp_path)
    done = tiny.sorahpc("encode", config, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "encode: done; run folder runs/tiny\n"
    assert "encode: 12/12 item (100 %)" in done.stderr
    out = tmp_path / "runs/tiny/out/encode"
    before = {p.name: p.stat().st_mtime_ns for p in out.iterdir()}
    assert len(before) == 12
    (out / "4").unlink()
    assert tiny.sorahpc("encode", config, "encode.resources.tasks=5", cwd=tmp_path).returncode == 0
    after = {p.name: p.stat().st_mtime_ns for p in out.iterdir()}
    assert {k for k in after if after[k] != before[k]} == {"4"}


def test_a_failed_task_of_an_array_leaves_the_others_alone(tmp_path: Path) -> None:
    config = tiny.write_config(tmp_path)
    done = tiny.sorahpc("encode", config, cwd=tmp_path, TINY_FAULT="data:1:3")
    assert done.returncode == 4
    assert "encode: task 1 failed (exit 4): clip 7: fault one; clip 8: fault two" in done.stderr
    made = {int(p.name) for p in (tmp_path / "runs/tiny/out/encode").iterdir()}
    assert made == {0, 2, 4, 6, 8, 10, 1}
    assert "Traceback" not in done.stderr


def test_equal_faults_of_the_tasks_of_an_array_are_told_once(tmp_path: Path) -> None:
    config = tiny.write_config(tmp_path)
    done = tiny.sorahpc("encode", config, "encode.resources.tasks=3", cwd=tmp_path, TINY_FAULT="data:*:*")
    assert done.returncode == 4
    told = [line for line in done.stderr.splitlines() if line.startswith("sorahpc: ")]
    assert told[:-1] == ["sorahpc: encode: tasks 0, 1, 2 failed (exit 4): clip 7: fault one; clip 8: fault two"]
    assert told[-1].startswith("sorahpc: encode: see runs/tiny/jobs/encode/log/rank")


@pytest.mark.parametrize(
    ("fault", "code", "expected"),
    [
        ("data:0:3", 4, ["task 0 failed (exit 4): clip 7: fault one; clip 8: fault two", "see LOG"]),
        ("raise:0:3", 1, ["task 0 failed (exit 1): unexpected RuntimeError: a bug\\nof two lines (traceback in LOG)",
                          "see LOG"]),
        ("stop:0:3", 10, ["stopped, progress saved; the same command goes on from here"]),
        ("", 0, []),
    ],
)  # fmt: skip
def test_a_failure_inline_is_told_once(tmp_path: Path, fault: str, code: int, expected: list[str]) -> None:
    config = tiny.write_config(tmp_path, cluster={"kind": "inline"})
    for _ in range(2):  # the log of the first is not told again
        done = tiny.sorahpc("encode", config, cwd=tmp_path, TINY_FAULT=fault)
        told = [line for line in done.stderr.splitlines() if line.startswith("sorahpc: ")]
        where = "runs/tiny/jobs/encode/log/rank0.log"
        assert told == [f"sorahpc: encode: {line.replace('LOG', where)}" for line in expected]
        assert done.returncode == code and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("job", "told"),
    [
        ("train", "stopped, progress saved; the same command goes on from here"),
        ("profile-train", "stopped, nothing of it is kept; the same command begins anew"),
        ("profile-kernels", "stopped, the cases measured so far are kept; the same command begins anew"),
    ],
)
def test_a_stop_says_what_is_kept(tmp_path: Path, job: str, told: str) -> None:
    stream = io.StringIO()
    assert tell_end(JobFolder(tmp_path, job), "gang", {0: 10}, [], {}, stream) == ""
    assert stream.getvalue() == f"sorahpc: {job}: {told}\n"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", []),
        ("/a/b.py:3: UserWarning: an Error: x\n  warnings.warn(\n", []),
        ("loading\n[rank1] progress 3\n", []),
        (
            "Fatal Python error: Segmentation fault\n\nThread 0x1:\n  File x\n",
            ["Fatal Python error: Segmentation fault"],
        ),
        ("Traceback (most recent call last):\n  File x\n    y()\npkg.Odd: text\n  warnings.warn(\n", ["pkg.Odd: text"]),
        ("torch.cuda.OutOfMemoryError: 3 GiB\nbye\n", ["torch.cuda.OutOfMemoryError: 3 GiB"]),
        ("sorahpc: a: one\nsorahpc: b: two\n", ["a: one", "b: two"]),
        ("/usr/bin/python: No module named sorahpc\n", ["/usr/bin/python: No module named sorahpc"]),
    ],
)
def test_raw_output_tells_a_crash_and_no_noise(text: str, expected: list[str]) -> None:
    assert crash_lines(text.splitlines()) == expected


@pytest.mark.parametrize(
    ("fault", "code", "cause"),
    [
        ("data:1:3", 4, "rank 1 failed (exit 4): clip 7: fault one; clip 8: fault two"),
        ("raise:1:3", 1, "rank 1 failed (exit 1): unexpected RuntimeError: a bug"),
        ("kill:1:3", 137, "rank 1 failed (killed by SIGKILL (out of memory?)): no message"),
    ],
)
def test_a_failed_rank_ends_the_gang_and_is_named(tmp_path: Path, fault: str, code: int, cause: str) -> None:
    config = tiny.write_config(tmp_path)
    started = time.monotonic()
    done = tiny.sorahpc("train", config, "train.steps=2000", cwd=tmp_path, TINY_FAULT=fault)
    assert done.returncode == code
    assert cause in done.stderr
    assert time.monotonic() - started < 15
    status = json.loads(tiny.sorahpc("status", "tiny", "--json", cwd=tmp_path).stdout)["jobs"][0]
    assert (status["state"], status["exit_code"]) == ("failed", code)
    assert cause in status["message"]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 10), (signal.SIGHUP, 10)])
def test_a_signal_to_the_launcher_stops_all_ranks_with_progress_saved(
    tmp_path: Path, number: signal.Signals, code: int
) -> None:
    config = tiny.write_config(tmp_path)
    process = launch(tmp_path, "train", config, "train.steps=120", TINY_ITEM_S="0.02")
    wait_for(lambda: len(pids(tmp_path)) == 2)
    time.sleep(0.2)
    process.send_signal(number)
    _, stderr = process.communicate(timeout=20)
    assert process.returncode == code
    assert "stopped, progress saved; the same command goes on from here" in stderr and "Traceback" not in stderr
    done = tiny.sorahpc("train", config, "train.steps=120", cwd=tmp_path)
    assert done.returncode == 0
    for rank in (0, 1):
        assert "resume at step 0," not in log(tmp_path, rank).split("stopped at")[1]


def test_a_second_ctrl_c_ends_what_does_not_stop(tmp_path: Path) -> None:
    config = tiny.write_config(tmp_path)
    process = launch(tmp_path, "train", config, TINY_FAULT="hang:1:2")
    wait_for(lambda: len(pids(tmp_path)) == 2)
    time.sleep(0.3)
    for _ in range(2):
        process.send_signal(signal.SIGINT)
        time.sleep(0.3)
    _, stderr = process.communicate(timeout=10)
    assert process.returncode == 130
    assert all(start_time(pid) is None for pid in pids(tmp_path))
    said = "interrupted twice: left without saving"
    assert [line for line in stderr.splitlines() if line.startswith("sorahpc: ")] == [f"sorahpc: train: {said}"]
    status = json.loads(tiny.sorahpc("status", "tiny", "--json", cwd=tmp_path).stdout)["jobs"][0]
    assert (status["state"], status["exit_code"], status["message"]) == ("failed", 130, said)


def test_no_task_outlives_a_killed_launcher(tmp_path: Path) -> None:
    config = tiny.write_config(tmp_path)
    process = launch(tmp_path, "train", config, TINY_FAULT="hang:1:2", TINY_ITEM_S="0.2")
    wait_for(lambda: len(pids(tmp_path)) == 2)
    tasks = pids(tmp_path)
    assert all(start_time(pid) is not None for pid in tasks)
    process.kill()
    process.communicate()
    wait_for(lambda: all(start_time(pid) is None for pid in tasks), 5)
    status = json.loads(tiny.sorahpc("status", "tiny", "--json", cwd=tmp_path).stdout)["jobs"][0]
    assert status["state"] == "lost"
    # What the dead held is free at once.
    assert tiny.sorahpc("train", config, cwd=tmp_path).returncode == 0


def test_what_a_tool_runs_does_not_outlive_the_launcher_either(tmp_path: Path) -> None:
    """A stand-in for nsys that starts the task as a process of its own, and is killed with the launcher."""
    stand_in = tmp_path / "bin/nsys"
    stand_in.parent.mkdir()
    stand_in.write_text('#!/bin/bash\nwhile [ "$1" != "$REAL_PYTHON" ]; do shift; done\n"$@"\nexit $?\n')
    stand_in.chmod(0o755)
    env = {"PATH": f"{stand_in.parent}{os.pathsep}{os.environ['PATH']}", "REAL_PYTHON": sys.executable}
    config = tiny.write_config(tmp_path, profile={"tool": "nsys", "ranks": [1]})
    process = launch(tmp_path, "profile", "train", config, TINY_FAULT="hang:1:2", TINY_ITEM_S="0.2", **env)
    wait_for(lambda: len(pids(tmp_path, "profile-train")) == 2)
    tasks = pids(tmp_path, "profile-train")
    assert all(start_time(pid) is not None for pid in tasks)
    process.kill()
    process.communicate()
    try:
        wait_for(lambda: all(start_time(pid) is None for pid in tasks), 5)
    finally:
        for pid in tasks:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def test_a_job_that_runs_is_not_launched_again(tmp_path: Path) -> None:
    config = tiny.write_config(tmp_path)
    process = launch(tmp_path, "train", config, "train.steps=1000", TINY_ITEM_S="0.05")
    try:
        wait_for(lambda: len(pids(tmp_path)) == 2)
        before = (tmp_path / "runs/tiny/jobs/train/config.yaml").read_bytes()
        second = tiny.sorahpc("train", config, cwd=tmp_path)
        assert second.returncode == 3
        assert f"train of runs/tiny: is held by {os.uname().nodename} (pid {process.pid})" in second.stderr
        assert len(second.stderr.splitlines()) == 1
        assert (tmp_path / "runs/tiny/jobs/train/config.yaml").read_bytes() == before
    finally:
        process.terminate()
        process.communicate(timeout=20)


def test_inline_runs_in_the_same_process_and_resumes(tmp_path: Path) -> None:
    config = tiny.write_config(tmp_path, cluster={"kind": "inline"})
    process = launch(tmp_path, "encode", config, TINY_ITEM_S="0.1")
    wait_for(lambda: (tmp_path / "runs/tiny/out/encode/1").exists())
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=20)
    assert process.returncode == 130 and "Traceback" not in stderr
    done = tiny.sorahpc("encode", config, cwd=tmp_path)
    assert done.returncode == 0
    texts = {p.read_text() for p in (tmp_path / "runs/tiny/out/encode").iterdir()}
    assert f"task 0 of 1, pid {process.pid}\n" in texts
    said = tiny.sorahpc("train", config, cwd=tmp_path)
    assert said.returncode == 2 and "cluster.kind: inline is one rank, train.resources ask for 2" in said.stderr


def test_the_pipeline_runs_in_order_and_ends_at_the_first_failure(tmp_path: Path) -> None:
    config = tiny.write_config(tmp_path)
    done = tiny.sorahpc("pipeline", config, "--json", cwd=tmp_path, TINY_FAULT="data:1:3")
    assert done.returncode == 4
    assert [j["job"] for j in json.loads(done.stdout)["jobs"]] == ["prepare", "encode"]
    assert tiny.sorahpc("pipeline", config, cwd=tmp_path).returncode == 0
    assert len(list((tmp_path / "runs/tiny/out/sample").iterdir())) == 4


def test_what_ran_is_kept_and_no_environment(tmp_path: Path) -> None:
    config = tiny.write_config(tmp_path)
    assert tiny.sorahpc("train", config, cwd=tmp_path, API_KEY="hunter2canary").returncode == 0
    folder = tmp_path / "runs/tiny/jobs/train"
    for name in ("config.yaml", "spec.json", "submit.sh", "launch.json", "env.txt", "code/commit.txt"):
        assert (folder / name).stat().st_size > 0, name
    assert "pydantic==" in (folder / "env.txt").read_text()
    for path in (tmp_path / "runs").rglob("*"):
        assert path.is_dir() or b"hunter2canary" not in path.read_bytes(), path
        assert path.stat().st_mode & 0o077 == 0, path
    spec = read_json(folder / "spec.json")
    assert spec is not None and spec["module"] == "sorahpc.jobs.train"


def test_the_dry_run_is_a_script_that_does_the_same_and_writes_nothing(tmp_path: Path) -> None:
    config = tiny.write_config(tmp_path, cluster={"kind": "local", "env": {"A_B": "c=d"}})
    done = tiny.sorahpc("train", config, "--dry-run", cwd=tmp_path)
    assert done.returncode == 0 and not (tmp_path / "runs").exists()
    assert tiny.sorahpc("train", config, cwd=tmp_path).returncode == 0
    assert done.stdout == (tmp_path / "runs/tiny/jobs/train/submit.sh").read_text()
    assert subprocess.run(["bash", "-n"], input=done.stdout, text=True).returncode == 0
    assert "export A_B=c=d" in done.stdout


def test_words_for_ends() -> None:
    assert exit_word(4) == "exit 4"
    assert exit_word(-11) == "killed by SIGSEGV"
    assert visible_gpus({"CUDA_VISIBLE_DEVICES": "2,5"}) == ["2", "5"]
    assert visible_gpus({"CUDA_VISIBLE_DEVICES": ""}) == []
