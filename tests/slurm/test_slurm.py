"""The launching side on a real Slurm: what is submitted, what the tasks see, how they stop, come back and end.

The jobs are the tiny ones of tests/tiny: nothing here waits for torch."""

from __future__ import annotations

import json
import os
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import tiny

from slurm.cluster import MiniSlurm

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(180)]

SLURM = {"kind": "slurm", "signal_lead_s": 10}


class Cli:
    """The command line in a folder, on the cluster."""

    def __init__(self, cluster: MiniSlurm, folder: Path):
        self.cluster, self.folder = cluster, folder

    def __call__(self, *args: str | Path, code: int = 0, **more: str) -> str:
        done = tiny.sorahpc(*args, cwd=self.folder, timeout=120, **self.cluster.env, **more)
        assert done.returncode == code, f"{args}: exit {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done.stdout if code == 0 else done.stderr

    def submit(self, verb: str, *args: str | Path, **more: str) -> str:
        return str(json.loads(self(verb, *args, "--json", **more))["job_id"])

    def status(self, job: str, run: str = "tiny") -> dict[str, Any]:
        jobs = json.loads(self("status", run, "--json"))["jobs"]
        return next(j for j in jobs if j["job"] == job)

    def path(self, job: str, *parts: str) -> Path:
        return self.folder.joinpath("runs", "tiny", "jobs", job, *parts)

    def wait_status(self, job: str, timeout: float = 30, **wanted: Any) -> dict[str, Any]:
        deadline = time.monotonic() + timeout
        while True:
            now = self.status(job) if self.path(job, "launch.json").exists() else {}  # sbatch: written by rank 0
            if now and all(now[k] == v for k, v in wanted.items()):
                return now
            assert time.monotonic() < deadline, f"{wanted} expected, {now} found\n{self.output(job)}"
            time.sleep(0.2)

    def output(self, job: str) -> str:
        return "\n".join(p.read_text() for p in sorted(self.path(job, "slurm").glob("*.out")))


@pytest.fixture
def cli(slurm_cluster: MiniSlurm, short_tmp: Path) -> Cli:
    return Cli(slurm_cluster, short_tmp)


def gang(nodes: int = 2, **train: Any) -> dict[str, Any]:
    section = {"steps": 20, "tokens_per_pack": 8, "warmup_steps": 0, "packs_per_step": 2, **train}
    return {**section, "resources": {"nodes": nodes, "tasks_per_node": 1}}


def test_an_array_splits_the_work_over_its_tasks_and_does_only_what_is_missing(cli: Cli) -> None:
    config = tiny.write_config(cli.folder, cluster=SLURM, encode={"resources": {"tasks": 3}})
    job_id = cli.submit("encode", config)
    assert cli.cluster.wait_for_job(job_id)["ExitCode"] == "0:0"
    out = cli.folder / "runs/tiny/out/encode"
    assert sorted(int(p.name) for p in out.iterdir()) == list(range(12))
    assert {p.read_text().split(",")[0] for p in out.iterdir()} == {f"task {i} of 3" for i in range(3)}
    status = cli.status("encode")
    assert (status["state"], status["done"], status["total"], status["tasks"]) == ("done", 12, 12, {"done": 3})

    (out / "5").unlink()
    before = {p: p.stat().st_mtime_ns for p in out.iterdir()}
    assert "done" in cli("encode", config, "--wait")
    assert {p: p.stat().st_mtime_ns for p in out.iterdir() if p.name != "5"} == before
    assert (out / "5").exists()


def test_a_gang_on_two_nodes_knows_its_place_and_its_cpus(cli: Cli) -> None:
    config = tiny.write_config(
        cli.folder, cluster=SLURM, train={**gang(), "resources": {"nodes": 2, "tasks_per_node": 1, "cpus_per_task": 2}}
    )
    job_id = cli.submit("train", config)
    info = cli.cluster.wait_for_job(job_id)
    assert info["JobState"] == "COMPLETED", cli.output("train")
    assert info["Comment"] == "sorahpc:tiny:train"
    logs = [cli("logs", "tiny", "train", "--rank", str(r)) for r in (0, 1)]
    assert ["rank 0 of 2" in logs[0], "rank 1 of 2" in logs[1]] == [True, True]
    master = {line.split("master ")[1] for log in logs for line in log.splitlines() if "master " in line}
    assert len(master) == 1 and master.pop().split(":")[0] in cli.cluster.nodes
    assert all("cpus 2 omp 1" in log for log in logs)  # OMP_NUM_THREADS is 1 for all tests
    assert cli.status("train")["state"] == "done"


def test_usr2_stops_with_progress_saved_and_the_job_comes_back_and_finishes(cli: Cli) -> None:
    config = tiny.write_config(cli.folder, cluster=SLURM, train=gang(steps=40))
    job_id = cli.submit("train", config, TINY_ITEM_S="0.15")
    status = cli.wait_status("train", state="running", total=40)
    assert status["job_id"] == job_id and status["queue"]["state"] == "RUNNING"
    assert cli.cluster.run("scancel", "--signal=USR2", job_id).returncode == 0  # as Slurm does ahead of the time limit
    info = cli.cluster.wait_for_job(job_id, "COMPLETED", timeout=60)
    assert info["Restarts"] == "1"
    status = cli.status("train")
    assert (status["state"], status["restart"], status["exit_code"]) == ("done", 1, 0)
    for rank in (0, 1):
        log = cli("logs", "tiny", "train", "--rank", str(rank))
        stopped = [int(x.split("stopped at step ")[1].split(",")[0]) for x in log.splitlines() if "stopped at" in x]
        resumed = [int(x.split("resume at step ")[1].split(",")[0]) for x in log.splitlines() if "resume at" in x]
        assert resumed == [0, *stopped] and 0 < stopped[0] < 40, log  # no step lost, none done twice, logs appended


def test_the_time_limits_signal_is_asked_for(cli: Cli) -> None:
    config = tiny.write_config(cli.folder, cluster=SLURM)
    script = cli("train", config, "--dry-run")
    assert "#SBATCH --signal=USR2@10" in script and "#SBATCH --requeue" in script
    assert not (cli.folder / "runs").exists()


def test_a_job_that_never_gets_further_is_not_requeued_for_ever(cli: Cli) -> None:
    config = tiny.write_config(cli.folder, cluster=SLURM, train=gang(nodes=1, packs_per_step=1, steps=10))
    job_id = cli.submit("train", config, TINY_FAULT="stop:0:3")
    info = cli.cluster.wait_for_job(job_id, timeout=90)
    # The first life made the progress, three more made none: the fourth restart says so.
    assert (info["JobState"], info["ExitCode"], info["Restarts"]) == ("FAILED", "20:0", "4")
    status = cli.status("train")
    assert (status["state"], status["exit_code"]) == ("failed", 20)
    assert "3 restarts without progress, 7 step left" in status["message"]


def test_a_failed_rank_ends_the_gang_and_status_names_it(cli: Cli) -> None:
    config = tiny.write_config(cli.folder, cluster=SLURM, train=gang(steps=400))
    job_id = cli.submit("train", config, TINY_ITEM_S="0.1", TINY_FAULT="data:1:3")
    info = cli.cluster.wait_for_job(job_id)
    assert info["JobState"] == "FAILED" and info["Restarts"] == "0"
    status = cli.status("train")
    assert (status["state"], status["exit_code"]) == ("failed", 4)
    assert status["message"] == "clip 7: fault one\nclip 8: fault two"


def test_a_killed_rank_ends_the_gang_and_is_named(cli: Cli) -> None:
    config = tiny.write_config(cli.folder, cluster=SLURM, train=gang(steps=400))
    job_id = cli.submit("train", config, TINY_ITEM_S="0.1", TINY_FAULT="kill:1:3")
    assert cli.cluster.wait_for_job(job_id)["JobState"] == "FAILED"
    status = cli.status("train")
    assert f"{cli.cluster.nodes[1]}: task 1: Killed" in status["message"], status


def test_cancel_stops_a_running_job_for_good(cli: Cli) -> None:
    config = tiny.write_config(cli.folder, cluster=SLURM, train=gang(nodes=1, packs_per_step=1, steps=1000))
    job_id = cli.submit("train", config, TINY_ITEM_S="0.1")
    cli.wait_status("train", state="running", total=1000)
    assert f"Slurm job {job_id} cancelled" in cli("cancel", "tiny")
    assert cli.cluster.wait_for_job(job_id)["JobState"] == "CANCELLED"
    assert cli.wait_status("train", state="cancelled")["message"].startswith("stopped at step")  # its progress is saved
    time.sleep(1)
    assert cli.cluster.job(job_id)["JobState"] == "CANCELLED"  # the requeue trap left it alone


def test_a_job_in_the_queue_is_not_submitted_again(cli: Cli) -> None:
    config = tiny.write_config(cli.folder, cluster=SLURM)
    cli.cluster.run("scontrol", "update", "partitionname=main", "state=down")
    try:
        job_id = cli.submit("train", config)
        status = cli.wait_status("train", state="pending")
        assert status["message"].startswith("Partition")
        said = cli("train", config, code=3)
        assert f"is held by Slurm job {job_id} (PENDING)" in said and said.count("\n") == 1
        assert f"{job_id} PENDING" in cli("status", "tiny")
        cli("cancel", "tiny", "train")
        assert cli.status("train")["state"] == "cancelled"
    finally:
        cli.cluster.run("scontrol", "update", "partitionname=main", "state=up")


def test_the_pipeline_runs_in_order_and_again_only_what_is_missing(cli: Cli) -> None:
    config = tiny.write_config(cli.folder, cluster=SLURM, train=gang())
    first = json.loads(cli("pipeline", config, "--json", "--wait"))
    assert first["exit_code"] == 0
    assert [j["job"] for j in first["jobs"]] == ["prepare", "encode", "train", "sample"]
    ends = [(cli.folder / f"runs/tiny/jobs/{j}/status/0.json").stat().st_mtime for j in ("prepare", "encode", "train")]
    assert ends == sorted(ends)
    status = json.loads(cli("status", "tiny", "--json"))
    assert [j["state"] for j in status["jobs"]] == ["done"] * 4
    out = cli.folder / "runs/tiny/out"
    before = {p: p.stat().st_mtime_ns for p in out.glob("sample/*")}
    (out / "encode" / "3").unlink()
    assert json.loads(cli("pipeline", config, "--json", "--wait"))["exit_code"] == 0
    assert (out / "encode" / "3").exists()
    assert {p: p.stat().st_mtime_ns for p in out.glob("sample/*")} == before


def test_what_waits_for_a_failed_job_is_cancelled_not_left_pending(cli: Cli) -> None:
    config = tiny.write_config(cli.folder, cluster=SLURM, train=gang())
    jobs = json.loads(cli("pipeline", config, "--json", TINY_FAULT="data:1:1"))["jobs"]
    ids = {j["job"]: j["job_id"] for j in jobs}
    cli.cluster.wait_for_job(ids["sample"])
    states = {j["job"]: j["state"] for j in json.loads(cli("status", "tiny", "--json"))["jobs"]}
    assert states == {"prepare": "done", "encode": "failed", "train": "cancelled", "sample": "cancelled"}
    assert "clip 7: fault one" in cli("status", "tiny")
    assert json.loads(cli("pipeline", config, "--json", "--wait"))["exit_code"] == 0  # mended: all goes on


def test_a_pipeline_leaves_what_is_queued_where_it_is(cli: Cli) -> None:
    config = tiny.write_config(cli.folder, cluster=SLURM, train=gang())
    cli.cluster.run("scontrol", "update", "partitionname=main", "state=down")
    try:
        first = json.loads(cli("pipeline", config, "--json"))["jobs"]
        again = json.loads(cli("pipeline", config, "--json"))["jobs"]
        assert [j["job_id"] for j in first] == [j["job_id"] for j in again]
        assert all(j["already_queued"] for j in again)
        cli("cancel", "tiny")
    finally:
        cli.cluster.run("scontrol", "update", "partitionname=main", "state=up")


def test_logs_follow_a_job_to_its_end(cli: Cli) -> None:
    config = tiny.write_config(cli.folder, cluster=SLURM, train=gang(nodes=1, packs_per_step=1))
    cli.submit("train", config, TINY_ITEM_S="0.05")
    log = cli("logs", "tiny", "train", "-f")
    assert "resume at step 0" in log and log.rstrip().endswith("s") and "done in" in log


def sbatch(cli: Cli, script: str, *args: str | Path, **more: str) -> str:
    options = {"encode": ["--array=0-2"], "profile": ["--nodes=2"]}.get(script, [])
    command = ["sbatch", "--parsable", *options, f"slurm/{script}.sbatch"]
    env = {**tiny.env(**more), **cli.cluster.env}
    done = subprocess.run(
        [*command, *map(str, args)], cwd=tiny.ROOT, env=env, capture_output=True, text=True, timeout=30
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture
def sbatch_env(short_tmp: Path) -> dict[str, str]:
    """The scripts' site lines, as a site would set them."""
    import sys

    return {"SORAHPC_PYTHON": sys.executable, "SBATCH_OUTPUT": str(short_tmp / "%x-%A_%a.out")}


def test_sbatch_with_the_shipped_script_starts_every_rank_and_status_shows_it(
    cli: Cli, sbatch_env: dict[str, str]
) -> None:
    config = tiny.write_config(cli.folder, runs_dir=str(cli.folder / "runs"), train=gang(steps=40))
    job_id = sbatch(cli, "train", config, "train.steps=30", TINY_ITEM_S="0.1", **sbatch_env)
    cli.wait_status("train", state="running", total=30)
    cli.cluster.run("scancel", "--signal=USR2", job_id)
    info = cli.cluster.wait_for_job(job_id, "COMPLETED")
    assert info["Restarts"] == "1"
    status = cli.status("train")
    assert (status["state"], status["job_id"], status["done"]) == ("done", job_id, 30)
    assert "rank 1 of 2" in cli("logs", "tiny", "train", "--rank", "1")


def test_a_profile_of_training_is_a_gang_through_submitit_and_through_sbatch(
    cli: Cli, sbatch_env: dict[str, str]
) -> None:
    config = tiny.write_config(cli.folder, runs_dir=str(cli.folder / "runs"), cluster=SLURM, train=gang(nodes=2))
    job_id = str(json.loads(cli("profile", "train", config, "--json"))["job_id"])
    cli.cluster.wait_for_job(job_id, "COMPLETED")
    assert "start: profile-train, rank 1 of 2" in cli("logs", "tiny", "profile-train", "--rank", "1")
    by_hand = sbatch(cli, "profile", "train", config, **sbatch_env)
    cli.cluster.wait_for_job(by_hand, "COMPLETED")
    status = cli.status("profile-train")
    assert (status["state"], status["job_id"]) == ("done", by_hand)


def test_a_tool_that_fails_before_it_runs_the_first_rank_is_told_by_the_status(cli: Cli) -> None:
    """Nobody but the rank itself can tell why: there is no launcher, and no log."""
    nsys = cli.folder / "bin/nsys"
    nsys.parent.mkdir()
    nsys.write_text("#!/bin/bash\necho no licence >&2\nexit 1\n")
    nsys.chmod(0o755)
    train = gang(nodes=1, packs_per_step=1)
    config = tiny.write_config(cli.folder, cluster=SLURM, train=train, profile={"tool": "nsys"})
    path = f"{nsys.parent}{os.pathsep}{os.environ['PATH']}"
    job_id = str(json.loads(cli("profile", "train", config, "--json", PATH=path))["job_id"])
    assert cli.cluster.wait_for_job(job_id)["ExitCode"] == "3:0"
    status = cli.status("profile-train")
    assert (status["state"], status["exit_code"]) == ("failed", 3)
    assert status["message"] == (
        "nsys: exit 1 without having run the job: no licence; see the output of the Slurm job and mend the cause, or "
        "use profile.tool=torch"
    )


@pytest.mark.parametrize(
    ("script", "args", "expected"),
    [
        ("profile", [], "kernels, train CONFIG or sample CONFIG expected, found nothing; sbatch slurm/profile.sbatch"),
        ("profile", ["train"], "kernels, train CONFIG or sample CONFIG expected, found train; sbatch slurm/profile"),
        ("profile", ["tiny.yaml"], "kernels, train CONFIG or sample CONFIG expected, found tiny.yaml; sbatch slurm/"),
        *((name, [], f"a config expected, found no argument; sbatch slurm/{name}.sbatch CONFIG [key=value ...]")
          for name in ("caption", "encode", "train", "train-vae", "sample")),
    ],
)  # fmt: skip
def test_a_shipped_script_that_lacks_an_argument_is_one_line(
    cli: Cli, sbatch_env: dict[str, str], script: str, args: list[str], expected: str
) -> None:
    """And does not start a task, of which each would tell it again."""
    job_id = sbatch(cli, script, *args, **sbatch_env)
    assert cli.cluster.wait_for_job(job_id)["ExitCode"] == "2:0"
    said = [path.read_text() for path in cli.folder.glob("*.out") if f"-{job_id}_" in path.name]
    assert said, list(cli.folder.iterdir())
    for text in said:
        assert text.startswith(f"sorahpc: slurm/{script}.sbatch: {expected}") and text.count("\n") == 1, text


def test_sbatch_array_with_the_shipped_script(cli: Cli, sbatch_env: dict[str, str]) -> None:
    config = tiny.write_config(cli.folder, runs_dir=str(cli.folder / "runs"))
    job_id = sbatch(cli, "encode", config, **sbatch_env)
    assert cli.cluster.wait_for_job(job_id)["ExitCode"] == "0:0"
    assert {p.read_text().split(",")[0] for p in (cli.folder / "runs/tiny/out/encode").iterdir()} == {
        f"task {i} of 3" for i in range(3)
    }
    assert cli.status("encode")["state"] == "done"


def test_a_second_writer_through_sbatch_is_refused_by_name(cli: Cli, sbatch_env: dict[str, str]) -> None:
    config = tiny.write_config(
        cli.folder, runs_dir=str(cli.folder / "runs"), cluster=SLURM, train=gang(nodes=1, packs_per_step=1, steps=60)
    )
    first = cli.submit("train", config, TINY_ITEM_S="0.1")
    cli.wait_status("train", state="running", total=60)
    env = {**sbatch_env, "SBATCH_OUTPUT": str(cli.folder / "second.out")}
    command = ["sbatch", "--parsable", "--nodes=1", "slurm/train.sbatch", str(config)]
    done = subprocess.run(
        command, cwd=tiny.ROOT, env={**tiny.env(**env), **cli.cluster.env}, capture_output=True, text=True, timeout=30
    )
    info = cli.cluster.wait_for_job(done.stdout.strip())
    assert info["ExitCode"] == "3:0"
    assert f"is held by Slurm job {first} on {cli.cluster.nodes[0]}" in (cli.folder / "second.out").read_text()
    assert cli.cluster.wait_for_job(first)["JobState"] == "COMPLETED"


def test_a_run_folder_with_quotes_and_shell_syntax_in_its_path_is_only_a_path(cli: Cli) -> None:
    folder = cli.folder / "a 'b' \"c\"; $(touch pwned) `touch pwned` & #"
    folder.mkdir()
    config = tiny.write_config(folder, cluster=SLURM, train=gang(nodes=1, packs_per_step=1))
    hostile = Cli(cli.cluster, folder)
    job_id = hostile.submit("train", config)
    assert cli.cluster.wait_for_job(job_id)["JobState"] == "COMPLETED", hostile.output("train")
    assert not list(cli.folder.rglob("pwned")) and not os.path.exists("pwned")
    assert list(hostile.path("train", "slurm").glob("*_log.out"))


def test_sbatchs_refusal_is_one_line(cli: Cli) -> None:
    config = tiny.write_config(cli.folder, cluster={**SLURM, "partition": "nosuch"})
    said = cli("train", config, code=3)
    assert said.count("\n") == 1 and "invalid partition specified: nosuch" in said


def test_a_lost_node_gives_the_job_to_the_other_one(cli: Cli) -> None:
    config = tiny.write_config(cli.folder, cluster=SLURM, train=gang(nodes=1, packs_per_step=1, steps=30))
    job_id = cli.submit("train", config, TINY_FAULT="hang:0:5:0")
    cli.wait_status("train", state="running", done=5)
    node = cli.cluster.job(job_id)["BatchHost"]
    cli.cluster.kill_node(node)
    try:
        cli.cluster.run("scontrol", "update", f"nodename={node}", "state=down", "reason=test")
        info = cli.cluster.wait_for_job(job_id, "COMPLETED", timeout=60)
        # The dead life's lease is seconds old, of another machine: the same Slurm job takes it over at once.
        assert info["BatchHost"] != node and info["Restarts"] == "1"
        assert cli.status("train")["state"] == "done"
    finally:
        cli.cluster.start_node(node)
        cli.cluster.run("scontrol", "update", f"nodename={node}", "state=resume")
