"""What the ops share about a ragged pack: the table of its samples, checked, and the tokens' positions."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
MAX_TOKENS = 2**50  # far beyond any pack, and small enough that nothing overflows on the way


def whole(op: str, name: str, value: Any, least: int, most: int) -> int:
    """`value` as an int. Raises ValueError unless it is one of `least` to `most`."""
    # An int is taken as it is: operator.index would make a graph's symbol of one a constant of that graph.
    number = value if isinstance(value, int) else _index(value)
    if number is None or not least <= number <= most:
        raise ValueError(f"{op}: {name} {value!r}, expected a whole number from {least} to {most}")
    return number


def _index(value: Any) -> int | None:
    try:
        return operator.index(value)
    except TypeError:
        return None


def three_numbers(op: str, name: str, values: Any, positive: bool = False) -> list[float]:
    """Raises ValueError unless `values` are three finite numbers."""
    found = list(values) if isinstance(values, Iterable) else [values]
    try:
        numbers = [float(x) for x in found]
    except (TypeError, ValueError, OverflowError):
        numbers = []
    if len(numbers) != 3 or not all(abs(x) < math.inf for x in numbers) or (positive and min(numbers) <= 0):
        kind = "positive" if positive else "finite"
        raise ValueError(f"{op}: {name} {tuple(found)}, expected three {kind} numbers")
    return numbers


def check_tensors(op: str, **given: Any) -> None:
    """Raise ValueError for what is no dense tensor."""
    for name, x in given.items():
        if not isinstance(x, Tensor):
            raise ValueError(f"{op}: {name} is {type(x).__name__}, expected a tensor")
        if x.layout is not torch.strided:
            raise ValueError(f"{op}: {name} is {x.layout}, expected a dense tensor")


def positions3d(grids: Tensor) -> Tensor:
    """(T, H, W) index of every token of a pack.

    Args:
        grids: int64 [S, 3] on the CPU, patch counts (T, H, W) a sample; tokens of a sample are in row-major order.

    Returns:
        int64 [L, 3] with L = sum of T*H*W.
    """
    parts = [
        torch.cartesian_prod(*(torch.arange(n, device="cpu") for n in grid)).view(-1, 3) for grid in grids.tolist()
    ]
    return torch.cat(parts) if parts else torch.zeros(0, 3, dtype=torch.int64, device="cpu")


def check_grids(op: str, grids: Tensor, num_tokens: int, first: int | None = None) -> None:
    """Raise ValueError unless `grids` is int64 CPU [S, 3] of counts >= 1 whose tokens are `num_tokens`.

    With `first` they may be more, and must reach first + num_tokens.
    """
    check_tensors(op, grids=grids)
    if grids.dtype != torch.int64 or grids.device.type != "cpu" or grids.dim() != 2 or grids.shape[1] != 3:
        found = f"{grids.dtype} on {grids.device} of shape {tuple(grids.shape)}"
        raise ValueError(f"{op}: grids is {found}, expected int64 on cpu [S, 3]")
    if torch.compiler.is_compiling():  # a graph can't look at values; the body does, when it runs
        return
    total = sum_of_grids(op, grids)
    if first is None and total != num_tokens:
        raise ValueError(f"{op}: grids have {total} tokens, the input has {num_tokens}")
    if first is not None and total < first + num_tokens:
        raise ValueError(f"{op}: grids have {total} tokens, expected {first} + {num_tokens} at least")


def sum_of_grids(op: str, grids: Tensor) -> int:
    """Their tokens. Raises ValueError for a count out of range."""
    total = 0
    for t, h, w in grids.tolist():
        if min(t, h, w) < 1 or max(t, h, w) >= 2**31:
            raise ValueError(f"{op}: grid {(t, h, w)}, expected counts of at least 1 and below 2^31")
        total += t * h * w
    if total > MAX_TOKENS:
        raise ValueError(f"{op}: grids have {total} tokens, expected at most 2^50")
    return total


def check_lens(op: str, lens: Tensor, num_tokens: int) -> None:
    """Raise ValueError unless `lens` is int64 CPU [S] of counts >= 0 that sum to `num_tokens`."""
    check_tensors(op, lens=lens)
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
