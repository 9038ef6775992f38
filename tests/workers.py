"""A task as a process, and what it tells."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import tiny

from sorahpc.runs import read_json


def worker(*args: str | Path, cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "sorahpc.cluster.worker", *map(str, args)]
    return subprocess.run(command, cwd=cwd, env=tiny.env(**env), capture_output=True, text=True, timeout=60)


def status(tmp_path: Path, job: str = "train", task: int = 0) -> dict[str, Any]:
    found = read_json(tmp_path / f"runs/tiny/jobs/{job}/status/{task}.json")
    assert found is not None
    return found


def wait_for(ready: Any, seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < deadline
        time.sleep(0.02)
