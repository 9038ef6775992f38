"""The CUDA kernels where there is no GPU: each compiles for every architecture that we name, and spills nothing.
And what setup.py says before it builds them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
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


@pytest.mark.parametrize(
    ("archs", "said"),
    [
        ("", "has no 10.0+PTX, only compute_80 compute_90; name those that your GPUs are"),  # the default
        ("9.0a;12.0", "has no 12.0, only compute_80 compute_90"),
        ("8.0;Hopper", "got 'Hopper', expected e.g. 8.0;9.0;10.0+PTX"),
        ("8.0;", "got '', expected e.g. 8.0;9.0;10.0+PTX"),
        ("broken", "nvcc --list-gpu-arch: exit code 3; set CUDA_HOME to another CUDA, or SORAHPC_CUDA=0"),
        (None, "SORAHPC_CUDA=1, but no nvcc in "),
    ],
)
def test_a_build_that_cannot_be_is_refused_before_anything_is_compiled(
    archs: str | None, said: str, tmp_path: Path
) -> None:
    """None: no nvcc. Else one of CUDA 12.4, as many clusters have it, whatever CUDA torch has."""
    if shutil.which("g++") is None:
        pytest.skip("no C++ compiler, which setup.py asks for first")
    fake = tmp_path / "bin/nvcc"
    fake.parent.mkdir()
    if archs is not None:
        fake.write_text("#!/bin/sh\n" + ("exit 3" if archs == "broken" else "echo compute_80; echo compute_90") + "\n")
        fake.chmod(0o755)
    env = {**os.environ, "CUDA_HOME": str(tmp_path), "SORAHPC_CUDA": "1", "TORCH_CUDA_ARCH_LIST": archs or ""}
    places = ["--build-lib", str(tmp_path / "lib"), "--build-temp", str(tmp_path / "temp")]
    command = [sys.executable, "setup.py", "-q", "build_ext", *places]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 1 and said in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "temp").exists()
