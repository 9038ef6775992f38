"""What a measurement is of: device, date, and the commit that was measured."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        import torch  # here, so that names of files are known without it

        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    first = cpuinfo.read_text().split("\n\n")[0] if cpuinfo.is_file() else ""
    found = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in first.splitlines())}
    if "model name" in found:
        # A virtual machine may call processors with and without AVX-512 by one name.
        which = f" (family {found['cpu family']}, model {found['model']})" if "cpu family" in found else ""
        return f"{found['model name']}{which}, {os.cpu_count()} cores"
    return platform.processor() or platform.machine()


def now_utc() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%d %H:%M")


def commit_of_this() -> str:
    """`git describe` of the checkout that this package runs from; empty where it is installed."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return ""
    found = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=root, capture_output=True, text=True)
    return found.stdout.strip() if found.returncode == 0 else ""


def slug(device: torch.device) -> str:
    """The device's name for files."""
    return slug_of(device_name(device))


def slug_of(name: str) -> str:
    """Small letters, digits and dashes."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
