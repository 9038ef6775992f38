"""Muon for the matrices of attention and MLP, wherever tp and dp have cut them; everything else stays with AdamW.

Muon (K. Jordan et al., "Muon: an optimizer for hidden layers", 2024) steps along the nearest orthogonal matrix to a
matrix's momentum, so that all of its directions learn equally fast, not only those with large gradients. The step is
scaled to the size of AdamW's (J. Liu et al., "Muon is scalable for LLM training", 2025, arXiv 2502.16982), so one
learning rate serves both.

A matrix is orthogonalised whole, so a step does not depend on the layout. Each matrix has one owner among all ranks:
slices of the momentum go to it, slices of the update come back, in two all-to-alls. The price a step: each rank sends
its shard of the momentum and gets that of the update, in float32, and owners hold a few float32 copies of what they own
for the time of the step. With more ranks than matrices some own nothing. The state is one moment; the second that
AdamW keeps is allocated beside it and stays zero, since Megatron's checkpoints want both.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from sorahpc.distributed.mesh import Mesh

MOMENTUM = 0.95
UPDATE_RMS = 0.2  # of AdamW's updates, roughly


def orthogonalize(x: Tensor) -> Tensor:
    """The nearest (semi-)orthogonal matrix to each of a batch, roughly.

    Five steps of the quintic Newton-Schulz iteration with the coefficients of Jordan et al.: singular values end
    between 0.6 and 1.25, but for those under a hundredth or so of the Frobenius norm, which grow 500-fold at most.

    Args:
        x: [B, m, n]. A matrix of zeros stays zero.

    Returns:
        [B, m, n], in x's dtype.
    """
    flip = x.shape[-2] > x.shape[-1]
    x = x.mT if flip else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
    return x.mT if flip else x


def _direction(main: Tensor, optimizer: torch.optim.Optimizer) -> Tensor:
    """Nesterov's momentum of a slice, kept where `optimizer` keeps its own."""
    assert main.grad is not None
    state = optimizer.state[main]
    if not state:
        state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(main), torch.zeros_like(main)
        if isinstance(optimizer, torch.optim.AdamW):  # Transformer Engine's counts in its groups, and chokes on this
            state["step"] = torch.zeros((), dtype=torch.float32, device=main.device)
    if "step" in state:
        state["step"] += 1
    state["exp_avg"].lerp_(main.grad, 1 - MOMENTUM)
    return main.grad.lerp(state["exp_avg"], MOMENTUM)


@dataclass(frozen=True)
class Matrix:
    """A weight of a layer as this rank holds it.

    Attributes:
        shape: of this tp rank's part, (rows, columns).
        axis: 0 or 1, which of them tp has cut.
        parts: (number, rows a head): rows lie head by head, and within a head part by part, each part (q, k or v) a
            matrix of its own; (1, 1) for a single matrix.
        main: its float32 master slice, flat, of elements start:end of the part; None where dp gave this rank nothing.
    """

    shape: tuple[int, int]
    axis: int
    parts: tuple[int, int]
    main: Tensor | None
    start: int
    end: int


class Muon:
    """Takes the step of `matrices` before AdamW takes that of the other parameters: a step pre-hook of AdamW.

    It reads lr and weight_decay from AdamW's groups and keeps its momentum in AdamW's state, where checkpoints find it,
    and takes the gradients away, so that AdamW passes by. Collective over all ranks.

    Args:
        matrices: the same on every rank, in the same order, but for the slices.
        mesh: tp innermost.
        dtype: of the orthogonalisation.

    Raises:
        ValueError: slices that don't make up their matrix.
    """

    def __init__(self, matrices: Sequence[Matrix], mesh: Mesh, dtype: torch.dtype) -> None:
        self.matrices, self.mesh, self.dtype = list(matrices), mesh, dtype
        self.ranks, self.tp_size = range(mesh.tp_size * mesh.dp_size), mesh.tp_size
        ranges: list[Any] = [None for _ in self.ranks]
        dist.all_gather_object(ranges, [(m.start, m.end) if m.main is not None else (0, 0) for m in self.matrices])
        # [matrix][rank] -> (start, end); the ranks of a tp part, in their order, hold it from its start to its end
        self.ranges: list[list[tuple[int, int]]] = [list(r) for r in zip(*ranges, strict=True)]
        for matrix, held in zip(self.matrices, self.ranges, strict=True):
            for part in range(self.tp_size):
                slices = [r for r in held[part :: self.tp_size] if r[0] < r[1]]
                cuts = [0, *(end for _, end in slices)]
                if [start for start, _ in slices] != cuts[:-1] or cuts[-1] != matrix.shape[0] * matrix.shape[1]:
                    raise ValueError(f"muon: slices {slices} don't make up a matrix of {matrix.shape}")
        # Largest first, each to whoever has least to do.
        load, self.owners = [0 for _ in self.ranks], [0 for _ in self.matrices]
        for i in sorted(range(len(self.matrices)), key=lambda i: -self._work(i)):
            self.owners[i] = load.index(min(load))
            load[self.owners[i]] += self._work(i)
        self.mine = [i for i, owner in enumerate(self.owners) if owner == mesh.rank]

    def _work(self, i: int) -> int:
        (rows, columns), parts = self._whole_shape(i), self.matrices[i].parts[0]
        small, large = sorted((rows // parts, columns))
        return parts * small * small * large

    def _whole_shape(self, i: int) -> tuple[int, int]:
        shape = list(self.matrices[i].shape)
        shape[self.matrices[i].axis] *= self.tp_size
        return shape[0], shape[1]

    @torch.no_grad()
    def __call__(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        """The hook: `args` and `kwargs` are those of `optimizer.step`, and unused."""
        groups = {p: group for group in optimizer.param_groups for p in group["params"]}
        directions: list[list[Tensor]] = [[] for _ in self.ranks]  # by owner
        for matrix, owner in zip(self.matrices, self.owners, strict=True):
            if matrix.main is not None:
                directions[owner].append(_direction(matrix.main, optimizer))
        updates = [iter(group) for group in self._orthogonal(directions)]
        for matrix, owner in zip(self.matrices, self.owners, strict=True):
            if matrix.main is not None:
                lr, decay = groups[matrix.main]["lr"], groups[matrix.main]["weight_decay"]
                matrix.main.mul_(1 - lr * decay).add_(next(updates[owner]), alpha=-lr)
                matrix.main.grad = None

    def _orthogonal(self, directions: list[list[Tensor]]) -> list[tuple[Tensor, ...]]:
        """This rank's slices, by owner, -> the same slices of the updates of the whole matrices."""
        mine = [[self._size(i, r) for i in self.mine] for r in self.ranks]  # what I own, by who holds it
        to_owners, to_me = [sum(map(len, group)) for group in directions], [sum(sizes) for sizes in mine]
        received = self._exchange([d for group in directions for d in group], to_owners, to_me)
        slices = [block.split(sizes) for block, sizes in zip(received, mine, strict=True)]
        whole = [self._assemble(i, list(held)) for i, held in zip(self.mine, zip(*slices, strict=True), strict=True)]
        updates = self._update(whole)
        # One flat copy a tp part: a slice keeps alive what it is a view of.
        flat = [
            [part.reshape(-1) for part in update.chunk(self.tp_size, self.matrices[i].axis)]
            for i, update in zip(self.mine, updates, strict=True)
        ]
        back = [
            parts[r % self.tp_size][slice(*self.ranges[i][r])]
            for r in self.ranks
            for i, parts in zip(self.mine, flat, strict=True)
        ]
        returned = self._exchange(back, to_me, to_owners)
        return [block.split([len(d) for d in group]) for block, group in zip(returned, directions, strict=True)]

    def _size(self, i: int, rank: int) -> int:
        start, end = self.ranges[i][rank]
        return end - start

    def _exchange(self, slices: list[Tensor], to: list[int], source: list[int]) -> tuple[Tensor, ...]:
        """Send slices, `to[r]` numbers to rank r, and receive `source[r]` from each."""
        out = torch.empty(sum(source), dtype=torch.float32, device=self.mesh.device)
        dist.all_to_all_single(out, torch.cat([out[:0], *slices]), source, to)
        return out.split(source)

    def _assemble(self, i: int, pieces: list[Tensor]) -> Tensor:
        """Slices of all ranks -> whole matrix."""
        matrix = self.matrices[i]
        return torch.cat(
            [torch.cat(pieces[part :: self.tp_size]).view(matrix.shape) for part in range(self.tp_size)], matrix.axis
        )

    def _update(self, whole: list[Tensor]) -> list[Tensor]:
        """Orthogonalise whole matrices, those of one shape together, and scale them."""
        stacks: dict[torch.Size, list[Tensor]] = {}
        places = []
        for i, w in zip(self.mine, whole, strict=True):
            parts, head_rows = self.matrices[i].parts
            x = w.unflatten(0, (-1, parts, head_rows)).transpose(0, 1).flatten(1, 2)  # [parts, rows / parts, columns]
            stack = stacks.setdefault(x.shape[1:], [])
            places.append((x.shape[1:], sum(len(s) for s in stack)))
            stack.append(x)
        done = {
            shape: orthogonalize(torch.cat(stack).to(self.dtype)).float() * (UPDATE_RMS * max(shape) ** 0.5)
            for shape, stack in stacks.items()
        }
        out = []
        for i, (shape, at) in zip(self.mine, places, strict=True):
            parts, head_rows = self.matrices[i].parts
            x = done[shape][at : at + parts]
            out.append(x.unflatten(1, (-1, head_rows)).transpose(0, 1).flatten(0, 2))
        return out
