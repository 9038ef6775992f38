"""How a process leaves its gang, after an error too."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest
import torch

from sorahpc.distributed.mesh import leaving
from sorahpc.errors import DataError, Stopped


@pytest.mark.parametrize(
    ("error", "world_size", "cuda", "left"),
    [
        (None, 2, True, True),
        (Stopped("on request"), 2, True, True),  # of all ranks, at the same step
        (DataError("of one rank"), 2, True, False),
        (DataError("of the only one"), 1, True, True),
        (DataError("over gloo, which waits for nobody"), 2, False, True),
    ],
)
def test_a_rank_that_fails_on_a_gpu_does_not_wait_for_the_others_to_end_nccl(
    monkeypatch: pytest.MonkeyPatch, error: Exception | None, world_size: int, cuda: bool, left: bool
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    calls: list[str] = []
    try:
        with leaving(lambda: calls.append("left"), world_size):
            if error is not None:
                raise error
    except Exception as caught:
        assert caught is error
    assert calls == ["left"] * left


@pytest.mark.parametrize("joined", [True, False])
def test_a_process_that_an_error_left_in_its_group_ends_at_once(joined: bool) -> None:
    script = (
        "import atexit, sys, time; import torch.distributed as dist; from sorahpc.cluster import worker\n"
        f"if {joined}:\n"
        "    dist.init_process_group('gloo', store=dist.HashStore(), rank=0, world_size=1)\n"
        "    atexit.register(time.sleep, 60)\n"
        "print('said', end='')\n"
        "worker.end(4)"
    )
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=50)
    assert (done.returncode, done.stdout) == (4, "said"), done.stderr
    assert time.monotonic() - began < 50
