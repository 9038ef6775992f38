"""`slurm_cluster`: a real cluster for the session. Skips with the reason where there can be none; with
SORAHPC_REQUIRE_SLURM=1 (as in CI) that is a failure."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from slurm.cluster import MiniSlurm, Unavailable, why_not


@contextlib.contextmanager
def started(**size: int) -> Iterator[MiniSlurm]:
    required = os.environ.get("SORAHPC_REQUIRE_SLURM") == "1"
    reason, cluster = why_not(), None
    folder = Path(tempfile.mkdtemp(prefix="mini_slurm_", dir="/tmp"))  # short: a socket's path has at most 107 bytes
    try:
        if reason is None:
            cluster = MiniSlurm(folder, **size)
            try:
                cluster.start()
            except (Unavailable, OSError) as error:
                reason = f"Slurm does not start here: {error}"
        if reason is not None:
            (pytest.fail if required else pytest.skip)(reason)
        assert cluster is not None
        yield cluster
    finally:
        if cluster is not None:
            cluster.stop()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def slurm_cluster() -> Iterator[MiniSlurm]:
    """Two nodes of two CPUs. `.env` holds what clients need; `.wait_for_job(id)` waits."""
    with started() as cluster:
        yield cluster


@pytest.fixture
def four_nodes() -> Iterator[MiniSlurm]:
    """Four of three CPUs."""
    with started(num_nodes=4, cpus=3) as cluster:
        yield cluster


@pytest.fixture
def short_tmp() -> Iterator[Path]:
    """A folder that all nodes see."""
    folder = Path(tempfile.mkdtemp(prefix="sorahpc_test_", dir="/tmp"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)
