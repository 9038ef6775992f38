"""What the dead left goes, and nothing of the living."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

from sorahpc.data.leftovers import remove_stale_parts


def test_parts_of_the_dead_and_of_the_silent_are_removed_and_those_of_the_living_are_not(tmp_path: Path) -> None:
    host = socket.gethostname()
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    mine, gone = tmp_path / f".a.h5.{host}.{os.getpid()}.part", tmp_path / f".b.h5.{host}.{dead.pid}.part"
    other, silent = tmp_path / f".c.h5.elsewhere.{dead.pid}.part", tmp_path / f".d.h5.elsewhere.{dead.pid}.part"
    for path in (mine, gone, other, silent):
        path.write_bytes(b"x")
    os.utime(silent, (1, 1))
    assert remove_stale_parts(tmp_path) == [gone.name, silent.name]
    assert mine.exists() and other.exists()
