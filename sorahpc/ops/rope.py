"""3D rotary position embedding of a ragged pack (Su et al. 2021, RoFormer, eq. 34; one axis group a dimension)."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor


def positions3d(grids: Tensor) -> Tensor:
    """(T, H, W) index of every token of a pack.

    Args:
        grids: int64 [S, 3] on the CPU, patch counts (T, H, W) a sample; tokens of a sample are in row-major order.

    Returns:
        int64 [L, 3] with L = sum of T*H*W.
    """
    parts = [torch.cartesian_prod(*(torch.arange(n) for n in grid)).view(-1, 3) for grid in grids.tolist()]
    return torch.cat(parts) if parts else torch.zeros(0, 3, dtype=torch.int64)


def rope3d(q: Tensor, k: Tensor, grids: Tensor, axes_dim: Sequence[int], theta: float = 1e4) -> tuple[Tensor, Tensor]:
    """Rotate q and k by the tokens' positions; pairs are interleaved (2i, 2i+1), angles and math in float32.

    Pair i of an axis with d dims turns by position * theta^(-2i/d).

    Args:
        q, k: [L, N, D] and [L, Nk, D], any float dtype.
        grids: int64 CPU [S, 3], patch counts a sample; their products sum to L.
        axes_dim: three even numbers summing to D: the dims that follow (T, H, W).

    Returns:
        q and k rotated, in their dtypes.

    Raises:
        ValueError: axes that don't sum to D, or grids that don't sum to L.
    """
    if sum(axes_dim) != q.shape[-1] or any(a % 2 or a < 0 for a in axes_dim):
        raise ValueError(f"rope3d: axes_dim {tuple(axes_dim)} must be even and sum to the head dim {q.shape[-1]}")
    total = int(grids.prod(-1).sum())
    if q.shape[0] != total or k.shape[0] != total:
        raise ValueError(f"rope3d: grids have {total} tokens, q has {q.shape[0]} and k has {k.shape[0]}")
    cos, sin = _tables(tuple(map(tuple, grids.tolist())), tuple(axes_dim), float(theta), q.device)
    return _rotate(q, cos, sin), _rotate(k, cos, sin)


# The blocks of a forward pass, and its recomputation, ask for the same tables; two packs cover CFG's pair.
@functools.lru_cache(maxsize=4)
def _tables(
    grids: tuple[tuple[int, ...], ...], axes_dim: tuple[int, ...], theta: float, device: torch.device
) -> tuple[Tensor, Tensor]:
    """cos and sin [L, 1, D/2] float32."""
    positions = positions3d(torch.tensor(grids, dtype=torch.int64).view(-1, 3)).to(torch.float64)
    angles = torch.cat(
        [
            positions[:, axis, None] * theta ** -(torch.arange(0, dim, 2, dtype=torch.float64) / max(dim, 1))
            for axis, dim in enumerate(axes_dim)
        ],
        dim=1,
    )
    return angles.cos().float()[:, None].to(device), angles.sin().float()[:, None].to(device)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1).flatten(-2).to(x.dtype)
