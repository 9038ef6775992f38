"""`profile kernels` on a real Slurm, requeued in the middle: it goes on with the cases that it has not measured."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny
import yaml

from slurm.cluster import MiniSlurm
from sorahpc.runs import read_json

pytestmark = [pytest.mark.slurm, pytest.mark.slow, pytest.mark.timeout(800)]


def test_a_job_that_is_requeued_in_the_middle_measures_no_case_again(slurm_cluster: MiniSlurm, short_tmp: Path) -> None:
    path = short_tmp / "config.yaml"
    path.write_text(
        yaml.safe_dump(
            {
                "run": "p", "runs_dir": str(short_tmp / "runs"), "cluster": {"kind": "slurm"},
                "kernels": {"small": True, "repeats": 3, "only": "K4"},
            }
        )
    )  # fmt: skip
    env = {**tiny.env(), "PYTHONPATH": str(tiny.ROOT), **slurm_cluster.env}
    command = [sys.executable, "-m", "sorahpc.cli", "profile", "kernels", str(path), "--json"]
    done = subprocess.run(command, cwd=short_tmp, env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    job_id = str(json.loads(done.stdout)["job_id"])
    job = short_tmp / "runs/p/jobs/profile-kernels"

    def measured() -> int:
        return len((read_json(job / "measured.json") or {}).get("cases", []))

    end = time.monotonic() + 300  # the peers are compiled
    while not measured():
        assert time.monotonic() < end, [p.read_text() for p in job.glob("log/*")]
        time.sleep(0.02)
    slurm_cluster.run("scontrol", "requeue", job_id)
    info = slurm_cluster.wait_for_job(job_id, "COMPLETED", timeout=400)
    assert info["Restarts"] == "1"
    log = "\n".join(p.read_text() for p in sorted((job / "log").glob("*.log")))
    assert "requeued: cases that this job has measured on this node, and does not again: " in log
    ours = [line.partition(", sorahpc: ")[0] for line in log.splitlines() if ", sorahpc: " in line]
    names = [line[line.index("K4") :] for line in ours]
    assert len(names) == len(set(names)) == measured() == 4, names
