"""How a process leaves its gang, after an error too."""

from __future__ import annotations

import os
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


def test_a_gpu_is_seen_by_the_tests_for_it_alone() -> None:
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ""


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


def test_with_a_backend_for_each_device_the_groups_of_the_mesh_have_both_and_give_up_as_soon() -> None:
    """As on GPUs, with torch's fake backend in NCCL's place: flags and sums go over gloo from the CPU."""
    script = (
        "import torch, torch.distributed as dist, torch.testing._internal.distributed.fake_pg\n"
        "from sorahpc.distributed import megatron, mesh\n"
        "dist.init_process_group('cpu:gloo,cuda:fake', store=dist.HashStore(), rank=0, world_size=1)\n"
        "found = megatron.start()\n"
        "for group in (found.tp_group, found.dp_group):\n"
        "    cpu, cuda = (group._get_backend(torch.device(kind)) for kind in ('cpu', 'cuda'))\n"
        "    assert cpu.name() == 'gloo' and cuda.name() == 'fake', (cpu.name(), cuda.name())\n"
        "    assert cpu.options._timeout == mesh.COLLECTIVE_TIMEOUT, cpu.options._timeout\n"
        "assert found.dp_sum(1.0, 2.5) == [1.0, 2.5] and found.any_rank(True, False) == [True, False]\n"
        "dist.barrier()\n"
        "dist.broadcast_object_list([None], src=0)\n"
        "megatron.stop()"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
