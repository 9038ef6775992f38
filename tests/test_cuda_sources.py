"""The CUDA kernels where there is no GPU: each compiles for every architecture that we name, and spills nothing."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def nvcc() -> Path:
    """That of `make nvcc`, else the machine's. Skips where there is none; with SORAHPC_REQUIRE_NVCC=1 (as in CI) that
    is a failure."""
    places = [
        ROOT / "build/nvcc/nvidia/cu13/bin/nvcc",
        Path(os.environ.get("CUDA_HOME", ""), "bin/nvcc"),
        Path(shutil.which("nvcc") or ""),
        Path("/usr/local/cuda/bin/nvcc"),
    ]
    found = next((p for p in places if p.is_absolute() and p.is_file()), None)
    if found is None:
        required = os.environ.get("SORAHPC_REQUIRE_NVCC") == "1"
        (pytest.fail if required else pytest.skip)("no nvcc: `make nvcc` gets one")
    return found


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_90a", "sm_100"])
@pytest.mark.parametrize("source", sorted((ROOT / "csrc/cuda").glob("*.cu")), ids=lambda p: p.stem)
def test_every_cuda_kernel_compiles_without_spilling_registers(
    nvcc: Path, source: Path, arch: str, tmp_path: Path
) -> None:
    command = [nvcc, "-std=c++17", "-O3", "-cubin", f"-arch={arch}", "-Xptxas=--warn-on-spills,--warning-as-error"]
    done = subprocess.run([*command, source, "-o", tmp_path / "kernel.cubin"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
