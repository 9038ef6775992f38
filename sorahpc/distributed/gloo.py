"""All-gather and reduce-scatter between CPU ranks by direct exchange: each rank sends each other what that one needs.

No hand-over to gloo's worker threads and, in its reduce-scatter, no all-reduce of the whole. Called back to back
the two are level with gloo's own within the noise (1 to 2 ms at 384 x 144 float32); within a training step, where a
rank computes between them, they save time: the demo's step on two cores, all else equal, 0.31 -> 0.25 s and 0.27 ->
0.24 s.

Both take the arguments of `torch.distributed.all_gather_into_tensor` and `reduce_scatter_tensor`.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class _Exchange:
    """Sends and receives under way, and what to do with what was received."""

    def __init__(self, works: list[Any], total: Tensor | None = None, parts: list[Tensor] | None = None) -> None:
        self.works, self.total, self.parts = works, total, parts

    def wait(self) -> None:
        for work in self.works:
            work.wait()
        if self.total is not None and self.parts is not None:
            # In the order of the ranks, so that the sum does not depend on who computes it.
            self.total.copy_(self.parts[0])
            for part in self.parts[1:]:
                self.total.add_(part)
        self.works, self.total, self.parts = [], None, None


def _swap(outgoing: list[Tensor], incoming: list[Tensor], group: dist.ProcessGroup) -> list[Any]:
    """Start to send `outgoing[r]` to rank r of the group, and to receive `incoming[r]` from it."""
    me, size = group.rank(), group.size()
    works = []
    for distance in range(1, size):  # ranks start with different peers, so that no one is asked by all at once
        to, source = (me + distance) % size, (me - distance) % size
        works.append(dist.irecv(incoming[source], group=group, group_src=source))
        works.append(dist.isend(outgoing[to], group=group, group_dst=to))
    return works


def _check(whole: Tensor, part: Tensor, size: int) -> None:
    if whole.shape != (size * part.shape[0], *part.shape[1:]) or whole.dtype != part.dtype:
        raise ValueError(
            f"gloo: {size} parts {list(part.shape)} {part.dtype} don't make up {list(whole.shape)} {whole.dtype}"
        )


def all_gather(output: Tensor, input_: Tensor, group: dist.ProcessGroup, async_op: bool = False) -> _Exchange | None:
    """output [n * l, ...] = the inputs [l, ...] of the n ranks of the group, in their order.

    Any dtype, the same of all.

    Raises:
        ValueError: shapes or dtypes that don't fit; nothing was sent.
    """
    _check(whole=output, part=input_, size=group.size())
    input_ = input_.contiguous()
    parts = list(output.chunk(group.size()))
    parts[group.rank()].copy_(input_)
    return _finish(_Exchange(_swap([input_] * group.size(), parts, group)), async_op)


def reduce_scatter(
    output: Tensor, input_: Tensor, group: dist.ProcessGroup, async_op: bool = False
) -> _Exchange | None:
    """output [l, ...] = this rank's part of the sum of the inputs [n * l, ...] over the n ranks of the group.

    Any dtype, the same of all.

    Raises:
        ValueError: shapes or dtypes that don't fit; nothing was sent.
    """
    _check(whole=input_, part=output, size=group.size())
    mine = list(input_.contiguous().chunk(group.size()))
    parts = [torch.empty_like(output) for _ in mine]
    parts[group.rank()] = mine[group.rank()]
    return _finish(_Exchange(_swap(mine, parts, group), output, parts), async_op)


def _finish(exchange: _Exchange, async_op: bool) -> _Exchange | None:
    if async_op:
        return exchange
    exchange.wait()
    return None
