"""The latent cache by an array of eight tasks on a real Slurm of four nodes: one is killed, two join midway."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import tiny
import torch
import yaml

from slurm.cluster import MiniSlurm
from sorahpc.configfile import load_config
from sorahpc.data.cache import INDEX
from sorahpc.data.claims import WORK
from sorahpc.data.latents import LatentCache
from sorahpc.data.toyworld import write_world
from sorahpc.jobs import encode, prepare
from sorahpc.models.text import make_tiny_t5
from sorahpc.runs import Task

pytestmark = [pytest.mark.slurm, pytest.mark.slow, pytest.mark.timeout(580)]

CLIPS, TASKS, VICTIM = 64, 8, "3"

# Found by every task: tells of each clip that was encoded, kills one task between a clip and its record, and lets the
# others not finish before two have joined.
SITE = """
import importlib.util, os, sys, time

class Finder:
    def find_spec(self, name, path, target=None):
        if name != "sorahpc.jobs.encode":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        execute = spec.loader.exec_module
        spec.loader.exec_module = lambda module: (execute(module), patch(module))
        return spec

def patch(module):
    real, told, me = module._encode, os.environ["TOLD"], os.environ["SLURM_ARRAY_TASK_ID"]

    def encodes(video, *rest):
        for _ in range(60):
            if int(me) >= 8 or {"8", "9"} & {line.split()[0] for line in open(told)}:
                break
            time.sleep(0.1)
        record = real(video, *rest)
        with open(told, "a") as file:
            file.write(f"{me} {video.key}\\n")
        if me == os.environ["VICTIM"] and sum(line.split()[0] == me for line in open(told)) == 2:
            os.kill(os.getpid(), 9)
        return record

    module._encode = encodes

sys.meta_path.insert(0, Finder())
"""


def states(cluster: MiniSlurm, job_id: str) -> Counter[str]:
    lines = cluster.run("scontrol", "show", "job", "--oneliner", job_id).stdout.splitlines()
    return Counter(line.split("JobState=")[1].split()[0] for line in lines if line.startswith("JobId="))


def content(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir() if not p.name.startswith(".")}


def test_eight_tasks_over_four_nodes_one_killed_and_two_that_join_make_the_cache_of_one_task(
    four_nodes: MiniSlurm, short_tmp: Path
) -> None:
    cluster, told, path = four_nodes, short_tmp / "told", short_tmp / "config.yaml"
    write_world(short_tmp / "videos", CLIPS, 0)
    (short_tmp / "videos/bad.mp4").write_bytes(b"no video at all")
    (short_tmp / "videos/bad.txt").write_text("a broken file")
    make_tiny_t5(short_tmp / "t5", [p.read_text() for p in sorted((short_tmp / "videos").glob("*.txt"))], 16, 0)
    (short_tmp / "site").mkdir()
    (short_tmp / "site/sitecustomize.py").write_text(SITE)
    told.touch()
    data = {
        "run": "r", "runs_dir": str(short_tmp / "runs"), "cluster": {"kind": "slurm", "signal_lead_s": 10},
        "prepare": {"videos": str(short_tmp / "videos")},
        "vae": {"path": str(tiny.ROOT / "configs/vae/toy")}, "text": {"path": str(short_tmp / "t5"), "max_tokens": 32},
        "encode": {"clips_per_shard": 6, "resources": {"tasks": TASKS}},
    }  # fmt: skip
    path.write_text(yaml.safe_dump(data))
    config = load_config(path)
    prepare.run(config, Task(config.run_dir, "prepare"))

    env = {
        **tiny.env(),
        "PYTHONPATH": f"{short_tmp / 'site'}:{tiny.ROOT}",
        **cluster.env,
        "TOLD": str(told),
        "VICTIM": VICTIM,
    }
    env |= {"SORAHPC_PYTHON": sys.executable, "SBATCH_OUTPUT": str(short_tmp / "sbatch-%A_%a.out")}
    command = [sys.executable, "-m", "sorahpc.cli", "encode", str(path), "--json"]
    done = subprocess.run(command, cwd=short_tmp, env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    job_id = str(json.loads(done.stdout)["job_id"])

    def wait(what: str, wanted: object, seconds: float = 240) -> None:
        end = time.monotonic() + seconds
        while not wanted():  # type: ignore[operator]
            logs = [p.read_text() for p in config.run_dir.glob("jobs/encode/log/*.log")]
            assert time.monotonic() < end, f"{what}\n{states(cluster, job_id)}\n" + "\n".join(logs)
            time.sleep(0.05)

    wait("all eight run", lambda: states(cluster, job_id)["RUNNING"] == TASKS)
    join = ["sbatch", "--parsable", "--array=8-9", "slurm/encode.sbatch", str(path)]
    more = subprocess.run(join, cwd=tiny.ROOT, env=env, capture_output=True, text=True, timeout=30)
    assert more.returncode == 0, more.stderr
    cluster.wait_for_job(job_id, timeout=240)
    cluster.wait_for_job(more.stdout.strip(), timeout=60)

    assert states(cluster, job_id) == {"COMPLETED": TASKS - 1, "FAILED": 1}
    assert states(cluster, more.stdout.strip()) == {"COMPLETED": 2}
    last_words = json.loads((config.run_dir / f"jobs/encode/status/{VICTIM}.json").read_text())
    assert last_words["state"] == "running"
    by, keys = zip(*(line.split() for line in told.read_text().splitlines()), strict=True)
    assert by.count(VICTIM) == 2 and {"8", "9"} & set(by)
    again = [key for key, n in Counter(keys).items() if n > 1]
    assert len(set(keys)) == CLIPS and len(keys) == CLIPS + 1, again
    assert again == [key for key, who in zip(keys, by, strict=True) if who == VICTIM][1:]
    hosts = {json.loads(p.read_text())["host"] for p in config.run_dir.glob("jobs/encode/status/*.json")}
    assert len(hosts) == 4 or not cluster.namespaces
    assert list((config.cache_dir / WORK).iterdir()) == []

    one = load_config(path, ["run=one"])
    one.run_dir.mkdir(parents=True)
    (one.run_dir / "manifest.parquet").write_bytes((config.run_dir / "manifest.parquet").read_bytes())
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        encode.run(one, Task(one.run_dir, "encode"))
    finally:
        torch.set_num_threads(threads)
    assert INDEX in content(one.cache_dir) and content(one.cache_dir) == content(config.cache_dir)
    assert len(set(LatentCache(config.cache_dir).keys)) == CLIPS
