"""What must not be in the repository: secrets, and paths of somebody's machine."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

FORBIDDEN = {
    "a private key": r"-----BEGIN [A-Z ]*PRIVATE KEY-----",
    "an access token": r"\b(?:ghp|gho|github_pat|hf|glpat|xox[abp]|sk-[a-z]+)[_-][A-Za-z0-9_-]{20,}",
    "an AWS key": r"\bAKIA[0-9A-Z]{16}\b",
    "a password in an address": r"://[^/\s:@\"'{}$]+:[^/\s:@\"'{}$]+@",
    "a path of one machine": r"(?<![\w.])/(?:work|home/\w+|Users/\w+|mnt/\w+)/\w",
}


def test_no_secret_and_no_path_of_one_machine_is_in_a_tracked_file() -> None:
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    names = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    found = []
    for name in filter(None, names.split("\0")):
        path = ROOT / name
        if not path.is_file() or path == Path(__file__):
            continue
        text = path.read_bytes()[:1_000_000].decode("utf-8", errors="ignore")
        for what, pattern in FORBIDDEN.items():
            found += [f"{name}: {what}: {match.group()[:20]}" for match in re.finditer(pattern, text)]
    assert not found
