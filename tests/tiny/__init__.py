"""Helpers of the launching tests: a config whose jobs are the tiny ones, and the environment that finds them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[2]


def env(**more: str) -> dict[str, str]:
    """This process's environment, with the tiny jobs in front and no scheduler or launcher around."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "SORAHPC_", "TINY_"))}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        kept.pop(name, None)
    path = [str(ROOT / "tests" / "tiny"), str(ROOT), *filter(None, [kept.get("PYTHONPATH")])]
    return {**kept, "PYTHONPATH": os.pathsep.join(path), "OMP_NUM_THREADS": "1", **more}


def config_data(**sections: Any) -> dict[str, Any]:
    """All sections that the pipeline asks for; the tiny jobs read next to nothing of them."""
    return {
        "run": "tiny",
        "prepare": {"videos": "videos"},
        "vae": {"path": "vae"},
        "text": {"path": "text"},
        "encode": {"resources": {"tasks": 2}},
        "model": {"depth": 1, "dim": 12, "num_heads": 1},
        "train": {
            "steps": 20,
            "tokens_per_pack": 8,
            "warmup_steps": 0,
            "packs_per_step": 2,
            "resources": {"tasks_per_node": 2},
        },
        "sample": {"prompts": "prompts.txt"},
        **sections,
    }


def write_config(folder: Path, **sections: Any) -> Path:
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(config_data(**sections)))
    return path


def sorahpc(*args: str | Path, cwd: Path, timeout: float = 60, **more: str) -> subprocess.CompletedProcess[str]:
    """Run the command line in `cwd`; `more` is added to its environment."""
    command = [sys.executable, "-m", "sorahpc.cli", *map(str, args)]
    return subprocess.run(command, cwd=cwd, env=env(**more), capture_output=True, text=True, timeout=timeout)
