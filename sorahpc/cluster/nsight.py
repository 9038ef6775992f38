"""`profile.tool: nsys` and `ncu`: a chosen rank of a profile job starts again as what Nsight runs."""

from __future__ import annotations

import os
import shutil
import socket
import sys
from collections.abc import Mapping
from pathlib import Path

from sorahpc.config import Config
from sorahpc.errors import ConfigError, SetupError

INSIDE = "SORAHPC_NSIGHT"  # set in the environment of what Nsight runs


def command(config: Config, job: str, rank: int, world_size: int, env: Mapping[str, str]) -> list[str] | None:
    """What this process has to become, or None where it goes on as it is.

    The job marks with cudaProfilerStart and -Stop what is recorded, and names its ranges by NVTX.

    Raises:
        ConfigError: ncu for ranks that wait for each other. SetupError: the tool is not on this node.
    """
    how = config.profile
    chosen = job == "profile-sample" or (job == "profile-train" and rank in how.ranks)
    if not chosen or how.tool == "torch" or INSIDE in env:
        return None
    if how.tool == "ncu" and world_size > 1:
        raise ConfigError(
            f"profile.tool: ncu runs each kernel several times, and the {world_size} ranks of this job would wait for "
            "each other for ever; use nsys, or one rank"
        )
    tool = shutil.which(how.tool)
    if tool is None:
        raise SetupError(
            f"{how.tool}: not found on this node; load its module in slurm/env.sh, or use profile.tool=torch"
        )
    out = report_path(config, job, rank)
    out.parent.mkdir(parents=True, exist_ok=True)
    options = {
        "nsys": [
            "profile", "--trace=cuda,nvtx,osrt", "--sample=none", "--capture-range=cudaProfilerApi",
            "--capture-range-end=stop", "--force-overwrite=true", f"--output={out}",
        ],
        "ncu": [
            "--profile-from-start=off", "--set=basic", "--nvtx", "--target-processes=all", "--force-overwrite",
            f"--export={out}",
        ],
    }  # fmt: skip
    return [tool, *options[how.tool], sys.executable, "-u", "-m", "sorahpc.cluster.worker", *sys.argv[1:]]


def report_path(config: Config, job: str, rank: int) -> Path:
    """Without the suffix, which the tool adds: .nsys-rep or .ncu-rep."""
    name = f"{config.profile.tool}_{socket.gethostname()}_rank{rank}"
    return (config.run_dir / "profile" / job.removeprefix("profile-") / name).absolute()


def become(command: list[str], launcher: str) -> None:
    """Start again as `command`, with the same process id, so that signals and leases still find it.

    Args:
        launcher: the process that what the tool runs must not outlive; empty where there is none.
    """
    os.execve(command[0], command, {**os.environ, INSIDE: "1", "SORAHPC_PARENT": launcher})
