"""Captions by an array on a real Slurm, from a server that is slow: requeued in the middle, and nothing asked twice."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import tiny
import yaml
from endpoints import Server, completion, send, serving

from slurm.cluster import MiniSlurm
from sorahpc.configfile import load_config
from sorahpc.data.captions import CAPTIONS, known_items, read_captions
from sorahpc.data.toyworld import write_world
from sorahpc.jobs import prepare
from sorahpc.runs import Task

pytestmark = [pytest.mark.slurm, pytest.mark.slow, pytest.mark.timeout(300)]

CLIPS, TASKS, KEY = 16, 2, "canary-0123456789"


def _answer(h: Any, b: dict[str, Any], n: int) -> None:
    time.sleep(0.5)
    send(
        h, 200, completion(f"A red ball rolls over wet grass to the left in the morning sun, seen from far, take {n}.")
    )


def _submit(cluster: MiniSlurm, folder: Path, config: Path) -> str:
    env = {**tiny.env(), "PYTHONPATH": str(tiny.ROOT), **cluster.env, "MY_KEY": KEY}
    command = [sys.executable, "-m", "sorahpc.cli", "caption", str(config), "--json"]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return str(json.loads(done.stdout)["job_id"])


def _wait(what: str, wanted: Any, timeout: float = 90) -> None:
    end = time.monotonic() + timeout
    while not wanted():
        assert time.monotonic() < end, what
        time.sleep(0.05)


def test_an_array_that_is_requeued_in_the_middle_asks_for_each_clip_once(
    slurm_cluster: MiniSlurm, short_tmp: Path
) -> None:
    write_world(short_tmp / "videos", CLIPS, 0)
    path = short_tmp / "config.yaml"
    server: Server
    with serving(_answer) as server:
        endpoint = {"url": server.url, "model": "stub", "key_env": "MY_KEY", "concurrency": 1}
        path.write_text(
            yaml.safe_dump(
                {
                    "run": "r", "runs_dir": str(short_tmp / "runs"),
                    "cluster": {"kind": "slurm", "signal_lead_s": 10},
                    "prepare": {"videos": str(short_tmp / "videos")},
                    "caption": {"endpoint": endpoint, "frames": 2, "resources": {"tasks": TASKS}},
                }
            )
        )  # fmt: skip
        config = load_config(path)
        run = config.run_dir
        prepare.run(config, Task(run, "prepare"))
        job_id = _submit(slurm_cluster, short_tmp, path)
        folder = run / "captions/clips"
        _wait("both tasks at work", lambda: len(known_items(folder)) >= 3)
        slurm_cluster.run("scancel", "--signal=USR2", job_id)
        info = slurm_cluster.wait_for_job(job_id, "COMPLETED", timeout=150)
        logs = "\n".join(p.read_text() for p in (run / "jobs/caption/log").glob("*.log"))
        assert int(info["Restarts"]) >= 1 and "stopped with" in logs, logs
        _wait("the table", (run / CAPTIONS).exists, 30)
        # A request that the stop has cut off is asked again: at most one a task.
        assert CLIPS <= len(server.requests) <= CLIPS + TASKS
        assert {headers["Authorization"] for _, headers, _ in server.requests} == {f"Bearer {KEY}"}
    rows, _ = read_captions(run / CAPTIONS)
    assert len(rows) == CLIPS == len({row.caption for row in rows if row.caption})
    assert not [p for p in short_tmp.rglob("*") if p.is_file() and KEY.encode() in p.read_bytes()]
