"""The whole pipeline on a real Slurm of two nodes: real videos, VAE, T5, Megatron on gloo between the nodes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import yaml

from slurm.cluster import MiniSlurm

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(600)]


def _environ(cluster: MiniSlurm) -> dict[str, str]:
    """The real jobs: without the tiny ones that tests/tiny puts in front."""
    return {**tiny.env(), "PYTHONPATH": str(tiny.ROOT), **cluster.env}


def _run(cluster: MiniSlurm, cwd: Path, *command: str | Path) -> str:
    done = subprocess.run(
        list(map(str, command)), cwd=cwd, env=_environ(cluster), capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, f"{command}: exit {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def _logs(folder: Path) -> str:
    return "\n".join(f"== {p}\n{p.read_text()}" for p in sorted(folder.glob("runs/*/jobs/*/log/*.log")))


def _tensors(folder: Path) -> dict[str, torch.Tensor]:
    from sorahpc.distributed import checkpoint, megatron

    found = checkpoint.latest(folder / "checkpoints")
    assert found is not None
    megatron.start()
    try:
        plain = megatron._core().dist_checkpointing.load_plain_tensors(str(found))
    finally:
        megatron.stop()
    return {key: value for key, value in plain.items() if torch.is_tensor(value)}


def _config(folder: Path) -> dict[str, Any]:
    return {
        "run": "whole",
        "runs_dir": str(folder / "runs"),
        "cluster": {"kind": "slurm", "signal_lead_s": 10, "env": {"OMP_NUM_THREADS": "1"}},
        "prepare": {"videos": str(folder / "videos"), "resources": {"tasks": 2}},
        "vae": {"path": str(tiny.ROOT / "configs/vae/toy")},
        "text": {"path": str(folder / "t5"), "max_tokens": 32},
        "encode": {"clips_per_shard": 4, "resources": {"tasks": 2}},
        "model": {"depth": 2, "dim": 64, "num_heads": 4},
        "train": {
            "steps": 12, "tokens_per_pack": 400, "tp": 2, "sp": True, "warmup_steps": 2, "log_every": 1,
            "resources": {"nodes": 2, "tasks_per_node": 1},
        },
        "sample": {
            "prompts": str(folder / "prompts.txt"), "frames": 9, "steps": 2, "prompts_per_pack": 2,
            "resources": {"tasks": 2},
        },
    }  # fmt: skip


def test_videos_become_samples_on_two_nodes_and_sbatch_trains_to_equal_bits(
    slurm_cluster: MiniSlurm, short_tmp: Path
) -> None:
    from sorahpc.data.toyworld import write_world
    from sorahpc.models.text import make_tiny_t5

    folder = short_tmp
    write_world(folder / "videos", 10, 0)
    make_tiny_t5(folder / "t5", [p.read_text() for p in sorted((folder / "videos").glob("*.txt"))], 32, 0)
    (folder / "videos" / "broken.mp4").write_bytes(b"not a video")
    (folder / "videos" / "broken.txt").write_text("a broken file")
    (folder / "prompts.txt").write_text("a red circle\na blue square\na green triangle\n")
    config = folder / "config.yaml"
    config.write_text(yaml.safe_dump(_config(folder)))
    sorahpc = (sys.executable, "-m", "sorahpc.cli")

    submitted = json.loads(_run(slurm_cluster, folder, *sorahpc, "pipeline", config, "--json"))
    ids = {job["job"]: str(job["job_id"]) for job in submitted["jobs"]}
    assert list(ids) == ["prepare", "encode", "train", "sample"]
    try:
        for job_id in ids.values():
            info = slurm_cluster.wait_for_job(job_id, timeout=240)
            assert info["JobState"] == "COMPLETED", _logs(folder)
    except AssertionError:
        print(_logs(folder))
        raise

    run = folder / "runs" / "whole"
    status = {j["job"]: j for j in json.loads(_run(slurm_cluster, folder, *sorahpc, "status", run, "--json"))["jobs"]}
    assert {name: job["state"] for name, job in status.items()} == dict.fromkeys(ids, "done")
    logs = [path.read_text() for path in (run / "jobs/prepare/log").glob("rank*.log")]
    assert len(logs) == 2 and any("rejected broken.mp4: not a video" in log for log in logs)  # by whoever came last
    made = {suffix: len(list((run / "samples").glob(f"0*.{suffix}"))) for suffix in ("mp4", "json")}
    assert made == {"mp4": 3, "json": 3}
    assert [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()] == list(range(1, 13))

    # The same training by hand, as another run on the same cache.
    env = {
        **_environ(slurm_cluster),
        "SORAHPC_PYTHON": sys.executable,
        "SBATCH_OUTPUT": str(folder / "sbatch-%j.out"),
        "OMP_NUM_THREADS": "1",
    }
    command = ["sbatch", "--parsable", "slurm/train.sbatch", str(config), "run=byhand", f"encode.cache={run / 'cache'}"]
    done = subprocess.run(command, cwd=tiny.ROOT, env=env, capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, done.stderr
    info = slurm_cluster.wait_for_job(done.stdout.strip(), timeout=240)
    assert info["JobState"] == "COMPLETED", _logs(folder)

    a, b = _tensors(run), _tensors(folder / "runs" / "byhand")
    assert a.keys() == b.keys() and len(a) > 100
    assert [key for key in a if not torch.equal(a[key], b[key])] == []
    losses = [
        [json.loads(line)["loss"] for line in (folder / "runs" / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("whole", "byhand")
    ]
    assert losses[0] == losses[1] and losses[0][0] > losses[0][-1]
    assert os.stat(run).st_mode & 0o077 == 0, "run folders are the user's own"
