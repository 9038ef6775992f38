"""Collectives by direct exchange give what torch's own give, in any overlap, for any number of ranks."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from ranks import run_on_ranks


def exchange_cases(rank: int, world_size: int) -> list[str]:
    from sorahpc.distributed import gloo
    from sorahpc.distributed.mesh import init_process_group

    init_process_group(rank, world_size, torch.device("cpu"))
    group = dist.group.WORLD
    assert group is not None
    passed = []
    for dtype in (torch.float32, torch.bfloat16):
        generator = torch.Generator().manual_seed(rank)
        part = torch.randn(5, 7, generator=generator).to(dtype)
        whole = torch.randn(world_size * 5, 7, generator=generator).to(dtype)
        everyone = [torch.empty_like(whole) for _ in range(world_size)]
        dist.all_gather(everyone, whole, group=group)
        total = everyone[0].clone()
        for other in everyone[1:]:
            total += other
        total = total.chunk(world_size)[rank]
        gathered = torch.empty_like(whole)
        dist.all_gather(list(gathered.chunk(world_size)), part, group=group)

        out = torch.empty_like(whole)
        # With strides that can't be sent as they are.
        assert gloo.all_gather(out, part.t().contiguous().t(), group=group) is None
        assert torch.equal(out, gathered)
        mine = torch.empty_like(part)
        assert gloo.reduce_scatter(mine, whole.t().contiguous().t(), group=group) is None
        assert torch.equal(mine, total)

        # Both under way at once, as in the backward pass of a column-parallel linear; waited for in either order.
        for first in (0, 1):
            out, mine, sent, reduced = torch.empty_like(whole), torch.empty_like(part), part.clone(), whole.clone()
            works = [
                gloo.all_gather(out, sent, group=group, async_op=True),
                gloo.reduce_scatter(mine, reduced, group=group, async_op=True),
            ]
            for work in (works[first], works[1 - first]):
                assert work is not None
                work.wait()
            assert torch.equal(out, gathered) and torch.equal(mine, total)
            assert torch.equal(sent, part) and torch.equal(reduced, whole), "an input was changed"
        for bad in (whole[:-1], torch.cat([whole, whole]), whole.double()):
            for call in (lambda x: gloo.all_gather(x, part, group), lambda x: gloo.reduce_scatter(part, x, group)):  # noqa: B023
                with pytest.raises(ValueError, match=r"parts \[5, 7\] .* don't make up"):
                    call(bad)
        passed.append(str(dtype))
    dist.destroy_process_group()
    return passed


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_exchange_equals_the_collectives_of_torch(world_size: int) -> None:
    assert run_on_ranks(world_size, exchange_cases) == [["torch.float32", "torch.bfloat16"]] * world_size
