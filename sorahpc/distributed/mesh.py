"""The mesh of a gang: which ranks share a tensor, which share a batch, and where this process computes."""

from __future__ import annotations

import contextlib
import datetime
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist

from sorahpc.errors import SetupError, Stopped

# A rank that waits longer than this for the others gives up: they are gone, or they hang.
COLLECTIVE_TIMEOUT = datetime.timedelta(minutes=10)


@dataclass(frozen=True)
class Mesh:
    """Axes tp (splits tensors, innermost) and dp (splits the batch); world size = tp x dp.

    `sp` says whether activations between the tensor-parallel regions are split over the tp axis by tokens. It is False
    at tp = 1, where it would mean nothing.
    """

    tp_group: dist.ProcessGroup
    dp_group: dist.ProcessGroup
    sp: bool
    device: torch.device

    @property
    def tp_size(self) -> int:
        return self.tp_group.size()

    @property
    def tp_rank(self) -> int:
        return self.tp_group.rank()

    @property
    def dp_size(self) -> int:
        return self.dp_group.size()

    @property
    def dp_rank(self) -> int:
        return self.dp_group.rank()

    @property
    def rank(self) -> int:
        return dist.get_rank()

    def any_rank(self, *flags: bool) -> list[bool]:
        return any_rank(*flags)

    def dp_sum(self, *values: float) -> list[float]:
        """Sums over the dp axis, in float64."""
        t = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(t, group=self.dp_group)
        return t.tolist()


def any_rank(*flags: bool) -> list[bool]:
    """For each flag: is it set on any rank of the world? One small all-reduce for all of them."""
    t = torch.tensor([float(f) for f in flags])
    dist.all_reduce(t, op=dist.ReduceOp.MAX)
    return [bool(v) for v in t]


def pick_device(local_rank: int) -> torch.device:
    """CUDA device of this local rank where there is CUDA, else the CPU.

    Raises:
        SetupError: more local ranks than GPUs.
    """
    if not torch.cuda.is_available():
        return torch.device("cpu")
    count = torch.cuda.device_count()
    # A site may show each task its own GPU only; then every local rank finds one device.
    own = count == 1 and "CUDA_VISIBLE_DEVICES" in os.environ
    if local_rank >= count and not own:
        raise SetupError(
            f"local rank {local_rank}: one GPU a rank expected, this node shows {count}; start fewer ranks a node "
            f"(resources.tasks_per_node of the job)"
        )
    return torch.device("cuda", local_rank if count > 1 else 0)


def shared_device(local_rank: int) -> torch.device:
    """A CUDA device for a task that may share it with others, by turns where there are more tasks than GPUs; without
    CUDA the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", local_rank % torch.cuda.device_count())


def init_process_group(rank: int, world_size: int, device: torch.device) -> None:
    """Join the world: gloo for CPU tensors and, on CUDA, NCCL for device tensors.

    More than one rank meet at MASTER_ADDR:MASTER_PORT. A single rank needs no address and opens no socket.
    """
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if world_size == 1:
        store = dist.HashStore()  # type: ignore[attr-defined]  # public, but not in torch's own list of exports
        dist.init_process_group(backend, store=store, rank=0, world_size=1, timeout=COLLECTIVE_TIMEOUT)
        return
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise SetupError(
            f"{' and '.join(missing)} not set for {world_size} ranks; start the job through sorahpc or slurm/"
        )
    dist.init_process_group(backend, init_method="env://", rank=rank, world_size=world_size, timeout=COLLECTIVE_TIMEOUT)


@contextlib.contextmanager
def leaving(leave: Callable[[], None], world_size: int) -> Iterator[None]:
    """Call `leave`, which ends the process group, at the end of the block.

    But not after an error in a gang on CUDA, unless it is that all ranks stop: NCCL ends a communicator when all of its
    ranks do, and the others may wait in a collective for this one, which would never come. The process has to end.
    """
    try:
        yield
    except BaseException as error:
        if isinstance(error, Stopped) or world_size == 1 or not torch.cuda.is_available():
            leave()
        raise
    leave()
