"""A script on the CPU kernels of one level, in a process of its own: the level is chosen when the ops are loaded."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from sorahpc import ops

# v4 is v4bf16 but for one conversion.
LEVELS = ("v4bf16", pytest.param("v4", marks=pytest.mark.slow), "v3", "base")
EMULATED = os.environ.get("SORAHPC_EMULATE") == "1"  # `make emulate`: the CPU's bodies are CUDA's kernels


def run_at_level(level: str, script: str) -> str:
    """What the script prints; it may import test modules. A machine takes the best level that it has, at most `level`:
    the lower ones it has all of."""
    package = Path(ops.__file__).parents[2]  # under `make sanitize` not this checkout
    path = f"{package}{os.pathsep}{Path(__file__).parent}"
    env = {**os.environ, "SORAHPC_CPU_LEVEL": level, "PYTHONPATH": path}
    done = subprocess.run([sys.executable, "-c", script], cwd=package, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout
