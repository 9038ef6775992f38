"""The CUDA kernels where there is no GPU: each compiles for every architecture that we name, and spills nothing."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def nvcc() -> str | None:
    found = shutil.which("nvcc")
    return found or next((p for p in ("/usr/local/cuda/bin/nvcc",) if Path(p).is_file()), None)


@pytest.mark.skipif(
    nvcc() is None, reason="no nvcc (CUDA toolkit, or pip install nvidia-cuda-nvcc nvidia-cuda-runtime)"
)
@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_90a", "sm_100"])
@pytest.mark.parametrize("source", sorted((ROOT / "csrc/cuda").glob("*.cu")), ids=lambda p: p.stem)
def test_every_cuda_kernel_compiles_without_spilling_registers(source: Path, arch: str, tmp_path: Path) -> None:
    command = [nvcc(), "-std=c++17", "-O3", "-cubin", f"-arch={arch}", "-Xptxas=--warn-on-spills,--warning-as-error"]
    done = subprocess.run([*command, source, "-o", tmp_path / "kernel.cubin"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
