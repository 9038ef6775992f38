"""What every task executes: place, lease, heartbeat, restart guard, exit codes, logs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import tiny
from workers import status, wait_for, worker

from sorahpc import lease as lease_module
from sorahpc.cluster.worker import Place, Spec, check_progress, export_gang
from sorahpc.configfile import parse_config
from sorahpc.errors import NoProgressError, SetupError
from sorahpc.lease import Lease, identity, is_alive, is_dead, start_time
from sorahpc.runs import JobFolder, Task, read_json, write_json


@pytest.fixture
def config(tmp_path: Path) -> Path:
    return tiny.write_config(tmp_path, train={**tiny.config_data()["train"], "packs_per_step": 1, "resources": {}})


@pytest.mark.parametrize(
    ("env", "kind", "expected"),
    [
        ({}, "gang", (0, 1, 0, 0)),
        ({"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}, "gang", (3, 4, 1, 0)),
        (
            {"SLURM_PROCID": "1", "SLURM_NTASKS": "2", "SLURM_LOCALID": "0", "SLURM_RESTART_COUNT": "2"},
            "gang",
            (1, 2, 0, 2),
        ),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "1", "RANK": "5", "WORLD_SIZE": "9"}, "gang", (0, 1, 0, 0)),
        ({"SLURM_PROCID": "0", "SLURM_ARRAY_TASK_ID": "2", "SLURM_ARRAY_TASK_COUNT": "4"}, "array", (2, 4, 0, 0)),
        (
            {"SLURM_PROCID": "1", "SLURM_NTASKS": "2", "SLURM_ARRAY_TASK_ID": "2", "SLURM_ARRAY_TASK_COUNT": "4"},
            "array",
            (5, 8, 0, 0),
        ),
    ],
)
def test_the_place_comes_from_slurm_then_from_the_local_launcher(
    env: dict[str, str], kind: str, expected: tuple[int, int, int, int]
) -> None:
    place = Place.of(env, kind)
    assert (place.rank, place.world_size, place.local_rank, place.restart) == expected


def test_tasks_that_claim_their_work_may_join_from_an_array_with_other_indices() -> None:
    env = {"SLURM_PROCID": "0", "SLURM_ARRAY_TASK_ID": "9", "SLURM_ARRAY_TASK_COUNT": "2", "SLURM_ARRAY_JOB_ID": "7"}
    place = Place.of(env, "array", joined=True)
    assert (place.rank, place.world_size, place.launch) == (9, 2, "slurm:7")


@pytest.mark.parametrize(
    ("env", "kind", "message"),
    [
        ({"RANK": "two", "WORLD_SIZE": "4"}, "gang", "RANK: expected a whole number"),
        ({"RANK": "4", "WORLD_SIZE": "4"}, "gang", "less than the world size 4, found 4"),
        ({"SLURM_PROCID": "0", "SLURM_ARRAY_TASK_ID": "3", "SLURM_ARRAY_TASK_COUNT": "1"}, "array", "index 3 among 1"),
        ({"SLURM_PROCID": "0", "SLURM_ARRAY_TASK_ID": "0"}, "gang", "without --array"),
    ],
)
def test_an_impossible_place_is_one_line(env: dict[str, str], kind: str, message: str) -> None:
    with pytest.raises(SetupError, match=message) as caught:
        Place.of(env, kind)
    assert "\n" not in str(caught.value)


def test_the_port_of_a_gang_changes_with_job_and_restart(tmp_path: Path) -> None:
    fake = tmp_path / "scontrol"
    fake.write_text("#!/bin/sh\nprintf 'node7\\nnode8\\n'\n")
    fake.chmod(0o755)
    ports = set()
    for job, restart in ((100, 0), (100, 1), (101, 0)):
        env = {"SLURM_PROCID": "1", "SLURM_JOB_ID": str(job), "SLURM_JOB_NODELIST": "node[7-8]"}
        old = os.environ["PATH"]
        try:
            os.environ["PATH"] = f"{tmp_path}:{old}"
            export_gang(Place(1, 2, 0, restart), env)
        finally:
            os.environ["PATH"] = old
        assert (env["MASTER_ADDR"], env["RANK"], env["WORLD_SIZE"]) == ("node7", "1", "2")
        ports.add(int(env["MASTER_PORT"]))
    assert len(ports) == 3 and all(10_000 <= p < 30_000 for p in ports)


def test_only_functions_of_our_own_jobs_are_executed(tmp_path: Path) -> None:
    good = {
        "job": "train",
        "module": "sorahpc.jobs.train",
        "function": "run",
        "kind": "gang",
        "config": "c",
        "cwd": "/",
    }
    path = tmp_path / "spec.json"
    for change in (
        {"module": "os"},
        {"module": "sorahpc.jobs.train.x"},
        {"module": "sorahpc.jobs..os"},
        {"function": "__import__('os')"},
        {"kind": "thread"},
        {"job": "../x"},
        {"cwd": 3},
        {"more": "x"},
    ):
        write_json(path, {**good, **change})
        with pytest.raises(SetupError):
            Spec.read(path)
    path.write_text("{")
    with pytest.raises(SetupError, match="can't read the spec"):
        Spec.read(path)
    write_json(path, good)
    assert Spec.read(path).job == "train"


@pytest.mark.parametrize(
    ("fault", "code", "said"),
    [
        ("data:0:3", 4, ["clip 7: fault one", "clip 8: fault two"]),
        ("raise:0:3", 1, ["RuntimeError: a bug\\nof two lines"]),
        (
            "memory:0:3",
            3,
            ["the GPU's memory is too small: CUDA out of memory. Tried to allocate 3.00 GiB.; what"],
        ),
        ("exit:0:3", 1, ["the job called sys.exit(0)"]),
        ("stop:0:3", 10, ["asks to be requeued"]),
    ],
)
def test_how_a_job_ends_is_its_exit_code_its_status_and_lines_without_a_traceback(
    tmp_path: Path, config: Path, fault: str, code: int, said: list[str]
) -> None:
    done = worker("train", config, cwd=tmp_path, TINY_FAULT=fault)
    assert done.returncode == code
    assert "Traceback" not in done.stderr
    for text in said:
        assert sum(text in line for line in done.stderr.splitlines()) == 1, done.stderr
    now = status(tmp_path)
    assert (now["state"], now["exit_code"]) == ("stopped" if code == 10 else "failed", code)
    log = (tmp_path / "runs/tiny/jobs/train/log/rank0.log").read_text()
    assert ("Traceback" in log) == (code in (1, 3))  # where memory was lacking tells what took it
    assert not list((tmp_path / "runs/tiny/jobs/train/lease").glob("*.json"))


def test_a_task_asks_for_no_network_unless_the_site_says_so(tmp_path: Path, config: Path) -> None:
    script = (
        "import os, sys; from sorahpc.cluster import worker\n"
        "worker.execute = lambda *a, **k: print(os.environ['HF_HUB_OFFLINE']) or 0\n"
        f"sys.exit(worker.main(['train', {str(config)!r}]))"
    )
    for env, said in (({}, "1"), ({"HF_HUB_OFFLINE": "0"}, "0")):
        done = subprocess.run(
            [sys.executable, "-c", script],
            cwd=tmp_path,
            env=tiny.env(**env),
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert (done.returncode, done.stdout) == (0, f"{said}\n"), done.stderr


@pytest.mark.parametrize("number", [signal.SIGUSR2, signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_between_steps_and_the_next_start_goes_on(
    tmp_path: Path, config: Path, number: signal.Signals
) -> None:
    command = [sys.executable, "-m", "sorahpc.cluster.worker", "train", str(config), "train.steps=200"]
    process = subprocess.Popen(command, cwd=tmp_path, env=tiny.env(TINY_ITEM_S="0.02"), stderr=subprocess.PIPE)
    wait_for(lambda: (tmp_path / "runs/tiny/jobs/train/status/0.json").exists())
    time.sleep(0.2)
    process.send_signal(number)
    assert process.wait(timeout=20) == 10
    process.communicate()
    now = status(tmp_path)
    assert now["state"] == "stopped" and 0 < now["done"] < 200
    assert worker("train", config, "train.steps=200", cwd=tmp_path).returncode == 0
    log = (tmp_path / "runs/tiny/jobs/train/log/rank0.log").read_text()
    assert f"resume at step {now['done']}," in log


def test_a_second_writer_is_refused_and_told_who_holds_the_run(tmp_path: Path, config: Path) -> None:
    command = [sys.executable, "-m", "sorahpc.cluster.worker", "train", str(config)]
    first = subprocess.Popen(command, cwd=tmp_path, env=tiny.env(TINY_FAULT="hang:0:1"), stderr=subprocess.DEVNULL)
    try:
        wait_for(lambda: (tmp_path / "runs/tiny/jobs/train/lease/0.json").exists())
        second = worker("train", config, cwd=tmp_path)
        assert second.returncode == 3
        assert f"train of runs/tiny: is held by {os.uname().nodename} (pid {first.pid}), alive" in second.stderr
        assert len(second.stderr.splitlines()) == 1
        assert status(tmp_path)["pid"] == first.pid
    finally:
        first.kill()
        first.wait()
    # A dead process of this machine holds nothing, however young its heartbeat.
    assert worker("train", config, cwd=tmp_path).returncode == 0


def test_a_gang_of_another_size_than_the_config_says_is_refused(tmp_path: Path, config: Path) -> None:
    done = worker("train", config, cwd=tmp_path, RANK="0", WORLD_SIZE="3")
    assert done.returncode == 2
    assert "train.resources: 1 nodes x 1 tasks_per_node = 1 ranks expected, 3 were started" in done.stderr


def test_files_and_folders_are_private(tmp_path: Path, config: Path) -> None:
    old = os.umask(0)
    try:
        assert worker("train", config, cwd=tmp_path, SECRET_TOKEN="hunter2canary").returncode == 0
    finally:
        os.umask(old)
    for path in (tmp_path / "runs").rglob("*"):
        assert path.stat().st_mode & 0o777 == (0o700 if path.is_dir() else 0o600), path
        assert path.is_dir() or b"hunter2canary" not in path.read_bytes(), path


def test_ranks_above_zero_of_a_gang_hold_no_lease_and_tell_only_of_failure(tmp_path: Path) -> None:
    config = tiny.write_config(tmp_path)
    place = {"RANK": "1", "WORLD_SIZE": "2"}
    assert worker("train", config, cwd=tmp_path, **place).returncode == 0
    assert not (tmp_path / "runs/tiny/jobs/train/status/1.json").exists()
    assert worker("train", config, "train.steps=30", cwd=tmp_path, TINY_FAULT="data:1:25", **place).returncode == 4
    told = status(tmp_path, task=1)
    assert told["exit_code"] == 4 and "done" not in told, "progress is rank 0's to tell: told twice, it would be summed"
    # Rank 0 is stopped because of it: its own 10 would have the job requeued.
    done = worker("train", config, cwd=tmp_path, TINY_FAULT="stop:0:3", RANK="0", WORLD_SIZE="2")
    assert done.returncode == 4
    assert "was stopped because rank 1 failed: clip 7: fault one" in done.stderr


def life(folder: JobFolder, restart: int, done: float, total: float) -> None:
    check_progress(folder, 0, restart)
    task = Task(folder.run_dir, folder.job, restart=restart)
    task.write_status("running")
    task.report(done, total, "step")
    task.write_status("stopped")


def test_three_restarts_without_progress_end_the_job(tmp_path: Path) -> None:
    folder = JobFolder(tmp_path, "train")
    for restart in range(4):
        life(folder, restart, 5, 10)
    with pytest.raises(NoProgressError, match="3 restarts without progress, 5 step left"):
        check_progress(folder, 0, 4)
    check_progress(folder, 0, 0)  # launched again by a person: a new count


def test_restarts_with_progress_go_on_for_ever(tmp_path: Path) -> None:
    folder = JobFolder(tmp_path, "encode")
    for restart in range(20):
        life(folder, restart, restart, 100)
    for restart in range(20, 30):  # a job may also count only what is missing
        life(folder, restart, 0, 80 - restart)


def test_a_job_that_never_reports_is_stuck_too(tmp_path: Path) -> None:
    folder = JobFolder(tmp_path, "train")
    for restart in range(3):
        check_progress(folder, 0, restart)
        Task(tmp_path, "train", restart=restart).write_status("running")
    with pytest.raises(NoProgressError, match="nothing was ever reported"):
        check_progress(folder, 0, 3)


def test_one_of_many_simultaneous_writers_gets_the_lease(tmp_path: Path) -> None:
    path, winners, losers = tmp_path / "lease" / "0.json", [], []
    barrier = threading.Barrier(16)

    def attempt() -> None:
        lease = Lease(path, "x", "pid:1")
        barrier.wait()
        try:
            winners.append(lease.acquire())
        except SetupError:
            losers.append(lease)

    for _ in range(10):
        winners.clear(), losers.clear()
        threads = [threading.Thread(target=attempt) for _ in range(16)]
        [t.start() for t in threads]
        [t.join() for t in threads]
        assert (len(winners), len(losers)) == (1, 15)
        assert winners[0].held() and not losers[0].held()
        winners[0].release()
    assert list(path.parent.iterdir()) == []


def elsewhere(age_s: float, **more: Any) -> dict[str, Any]:
    return {**identity(), "machine": "other:1", "nonce": "n", "heartbeat": time.time() - age_s, **more}


def test_a_lease_of_another_machine_is_stale_after_a_minute_without_heartbeat(tmp_path: Path) -> None:
    path = tmp_path / "0.json"
    write_json(path, elsewhere(30, launch="slurm:7"))
    with pytest.raises(SetupError, match=r"is held by Slurm job 7 on .* alive 30 s ago"):
        Lease(path, "train of runs/x", "slurm:8").acquire()
    for age_s in (61, -3600):  # of a clock that is an hour ahead, too: it would hold for an hour after its death
        write_json(path, elsewhere(age_s, launch="slurm:7"))
        assert Lease(path, "train of runs/x", "slurm:8").acquire().held()


def test_an_earlier_life_of_the_same_slurm_job_never_refuses_the_next(tmp_path: Path) -> None:
    path = tmp_path / "0.json"
    write_json(path, elsewhere(1, launch="slurm:7", restart=0))
    with pytest.raises(SetupError):
        Lease(path, "x", "slurm:7", restart=0).acquire()
    assert Lease(path, "x", "slurm:7", restart=1).acquire().held()


def test_a_reused_pid_is_another_process() -> None:
    who = identity()
    assert is_dead(who) is False and is_alive(who)
    assert is_dead({**who, "started": who["started"] + 1}) is True
    assert is_dead({**who, "machine": "other"}) is None
    process = subprocess.Popen(["true"])
    wait_for(lambda: start_time(process.pid) is None)  # a zombie is dead
    process.wait()


def test_an_unreadable_lease_is_held_while_it_is_fresh(tmp_path: Path) -> None:
    path = tmp_path / "0.json"
    path.write_text("")
    with pytest.raises(SetupError):
        Lease(path, "x", "a").acquire()
    os.utime(path, (time.time() - 100,) * 2)
    assert Lease(path, "x", "a").acquire().held()


def test_a_writer_that_lost_its_lease_stops_and_leaves_the_status_to_the_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sorahpc.cluster import worker as worker_module

    monkeypatch.setattr(worker_module.Heartbeat.__init__, "__defaults__", (0.02,))
    config = parse_config(tiny.config_data(runs_dir=str(tmp_path)))
    folder = JobFolder(config.run_dir, "encode")

    def job(_: Any, task: Task) -> None:
        lease_module.atomic_write(folder.lease(0), json.dumps(elsewhere(0, launch="slurm:9")))
        write_json(folder.status(0), {"state": "theirs"})
        time.sleep(0.2)
        task.stop_requested()

    monkeypatch.setattr(Spec, "load", lambda self: job)
    spec = Spec("encode", "sorahpc.jobs.encode", "run", "array", "c", "/")
    assert worker_module.execute(spec, config, Place(), lambda: False, stderr=False) == 3
    assert read_json(folder.status(0)) == {"state": "theirs"}
    assert (read_json(folder.lease(0)) or {})["launch"] == "slurm:9"
    assert "the lease was lost" in folder.log(0).read_text()


def test_the_heartbeat_goes_on_through_a_long_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sorahpc.cluster.worker import Heartbeat

    task = Task(tmp_path, "train")
    task.report(1, 10, "step")
    lease = Lease(task.folder.lease(0), "x", "a").acquire()
    first = read_json(task.folder.status(0))
    with Heartbeat(task, lease, every_s=0.02):
        time.sleep(0.2)
    second, held = read_json(task.folder.status(0)), read_json(task.folder.lease(0))
    assert first and second and held
    assert second["heartbeat"] > first["heartbeat"] and second["done"] == 1
    assert time.time() - held["heartbeat"] < 0.5


@pytest.mark.parametrize("args", [[], ["--spec"], ["train"], ["--help"]])
def test_a_wrong_call_is_one_line(tmp_path: Path, args: list[str]) -> None:
    done = worker(*args, cwd=tmp_path)
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
