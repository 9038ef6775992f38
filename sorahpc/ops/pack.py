"""What the ops share about a ragged pack: the table of its samples, checked, and the tokens' positions."""

from __future__ import annotations

import torch
from torch import Tensor

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def positions3d(grids: Tensor) -> Tensor:
    """(T, H, W) index of every token of a pack.

    Args:
        grids: int64 [S, 3] on the CPU, patch counts (T, H, W) a sample; tokens of a sample are in row-major order.

    Returns:
        int64 [L, 3] with L = sum of T*H*W.
    """
    parts = [torch.cartesian_prod(*(torch.arange(n) for n in grid)).view(-1, 3) for grid in grids.tolist()]
    return torch.cat(parts) if parts else torch.zeros(0, 3, dtype=torch.int64)


def check_grids(op: str, grids: Tensor, num_tokens: int, first: int | None = None) -> None:
    """Raise ValueError unless `grids` is int64 CPU [S, 3] of counts >= 1 whose tokens are `num_tokens`.

    With `first` they may be more, and must reach first + num_tokens.
    """
    if grids.dtype != torch.int64 or grids.device.type != "cpu" or grids.dim() != 2 or grids.shape[1] != 3:
        found = f"{grids.dtype} on {grids.device} of shape {tuple(grids.shape)}"
        raise ValueError(f"{op}: grids is {found}, expected int64 on cpu [S, 3]")
    if torch.compiler.is_compiling():  # a graph can't look at values; the body does, when it runs
        return
    total = 0
    for t, h, w in grids.tolist():
        if min(t, h, w) < 1:
            raise ValueError(f"{op}: grid {(t, h, w)}, expected counts of at least 1")
        total += t * h * w
    if first is None and total != num_tokens:
        raise ValueError(f"{op}: grids have {total} tokens, the input has {num_tokens}")
    if first is not None and total < first + num_tokens:
        raise ValueError(f"{op}: grids have {total} tokens, expected {first} + {num_tokens} at least")


def check_lens(op: str, lens: Tensor, num_tokens: int) -> None:
    """Raise ValueError unless `lens` is int64 CPU [S] of counts >= 0 that sum to `num_tokens`."""
    if lens.dtype != torch.int64 or lens.device.type != "cpu" or lens.dim() != 1:
        found = f"{lens.dtype} on {lens.device} of shape {tuple(lens.shape)}"
        raise ValueError(f"{op}: lens is {found}, expected int64 on cpu [S]")
    if torch.compiler.is_compiling():  # a graph can't look at values; the body does, when it runs
        return
    values = lens.tolist()
    if min(values, default=0) < 0:
        raise ValueError(f"{op}: lens has {min(values)}, expected counts of at least 0")
    if sum(values) != num_tokens:
        raise ValueError(f"{op}: lens have {sum(values)} tokens, the input has {num_tokens}")
