"""All ops in one graph of torch.compile's default backend, forward and backward, for fixed and for changing shapes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sorahpc import ops

AXES, PATCH = (24, 20, 20), (1, 2, 2)


def everything(
    q: Tensor, k: Tensor, wq: Tensor, wk: Tensor, x: Tensor, branch: Tensor, gate: Tensor, shift: Tensor, scale: Tensor,
    latents: Tensor, t: Tensor, ids: Tensor, grids: Tensor, lens: Tensor,
) -> Tensor:  # fmt: skip
    q, k = ops.rope3d(*ops.qk_norm_rope3d(q, k, wq, wk, grids, AXES), grids, AXES, interleaved=False)
    total, y = ops.residual_norm(x, branch, lens, gate, shift, scale)
    y = ops.add_sincos3d(ops.modulate(y, shift, scale, lens), grids) + ops.sincos3d(grids, x.shape[1])
    noised, target = ops.flow_patchify(latents, t, ids, grids, 4, PATCH, seed=1)
    back = ops.unpatchify(ops.patchify(latents, grids, 4, PATCH), grids, 4, PATCH)
    parts = (q, k, total, y, noised, target, back, ops.timestep_embedding(t, 64))
    return sum(part.sin().sum() for part in parts)  # type: ignore[return-value]


@pytest.mark.slow
@pytest.mark.parametrize("dynamic", [False, True])
def test_the_ops_are_one_graph_with_inductor(dynamic: bool) -> None:
    torch._dynamo.reset()
    graph = torch.compile(everything, fullgraph=True, dynamic=dynamic)
    for pack in ([(2, 3, 4), (1, 5, 5)], [(3, 2, 2), (1, 1, 1), (4, 4, 4)]):
        torch.manual_seed(0)
        grids, samples = torch.tensor(pack), len(pack)
        lens = grids.prod(-1)
        length = int(lens.sum())
        shapes = [(length, 3, 64), (length, 2, 64), (64,), (64,), (length, 48), (length, 48), *[(samples, 48)] * 3]
        leaves = [torch.randn(*shape, requires_grad=True) for shape in [*shapes, (length * 16,)]]
        rest = [torch.rand(samples), torch.stack((torch.arange(samples), torch.zeros(samples).long()), 1), grids, lens]
        found = []
        for call in (everything, graph):
            out = call(*leaves, *rest)
            found.append([out, *torch.autograd.grad(out, leaves)])
        torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)
