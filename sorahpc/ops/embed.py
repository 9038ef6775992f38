"""Sinusoidal embeddings: of 3D positions in a ragged pack, and of the diffusion timestep."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from sorahpc.ops._library import define
from sorahpc.ops.pack import DTYPES, MAX_TOKENS, check_grids, check_tensors, positions3d, whole

MAX_DIM = 6 * 2**20
MAX_TIMESTEP_DIM = 2**24
MAX_TIMESTEP_SCALE = 2.0**40  # float32 can't tell beyond where on the circle an angle lies


def sincos3d(
    grids: Tensor,
    dim: int,
    theta: float = 1e4,
    *,
    first: int | None = None,
    length: int | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Absolute 3D sinusoidal embedding of a pack (Vaswani et al. 2017, section 3.5, a third of the dims an axis).

    Args:
        grids: int64 CPU [S, 3], patch counts (T, H, W) a sample.
        dim: a multiple of 6; each axis gets dim/3 as (sin half, cos half).
        theta: base of the frequencies; angles are computed in float64.
        first, length: of the tokens [first, first + length) of the pack alone; None: from its start, to its end.
        dtype, device: of the result; float16, bfloat16, float32, or float64 on the CPU.

    Returns:
        [L, dim], computed in float32 (float64 for float64).

    Raises:
        ValueError: what does not fit.
    """
    like = torch.empty(0, dtype=dtype, device=device)
    _check_dtype("sincos3d", "the result", like)
    _check_numbers("sincos3d", dim, theta, first)
    if length is None:
        check_grids("sincos3d", grids, 0, 0)
        length = max(int(grids.prod(1).sum()) - (first or 0), 0)  # so that a graph may be made of it
    else:
        length = whole("sincos3d", "length", length, 0, MAX_TOKENS)
    check_grids("sincos3d", grids, length, first or 0)
    out: Tensor = _sincos3d(like, grids, dim, float(theta), first or 0, length)
    return out


def add_sincos3d(x: Tensor, grids: Tensor, theta: float = 1e4, *, first: int | None = None) -> Tensor:
    """x + `sincos3d` of its tokens, in one pass, without a table the size of x.

    Args:
        x: [L, dim], dim a multiple of 6; float16, bfloat16, float32, or float64 on the CPU.
        grids, theta: as of `sincos3d`.
        first: x is tokens [first, first + L) of the pack, as of a sequence-parallel rank; None: all of it.

    Returns:
        [L, dim] in x's dtype, added in float32 (float64 for float64).

    Raises:
        ValueError: what does not fit. Under ``torch.compile`` the values of `grids` are checked when the graph runs, as
            RuntimeError.
    """
    op = "add_sincos3d"
    _check_dtype(op, "x", x)
    if x.dim() != 2:
        raise ValueError(f"{op}: x has shape {tuple(x.shape)}, expected [L, dim]")
    _check_numbers(op, x.shape[1], theta, first)
    check_grids(op, grids, x.shape[0], first)
    out: Tensor = _add_sincos3d(x, grids, float(theta), first or 0)
    return out


def timestep_embedding(t: Tensor, dim: int, *, scale: float = 1000.0, max_period: float = 1e4) -> Tensor:
    """Sinusoidal embedding of timesteps, cos half then sin half (as in DiT, Peebles and Xie 2023).

    Args:
        t: [S] in [0, 1]; 0 = data, 1 = noise. Multiplied by `scale` first.
        dim: even.
        max_period: frequency i of the half is max_period^(-i / half).

    Returns:
        float32 [S, dim]; float64 for float64, which is for the CPU alone.

    Raises:
        ValueError: what does not fit.
    """
    op = "timestep_embedding"
    check_tensors(op, t=t)
    if t.dtype not in DTYPES or t.dim() != 1:
        raise ValueError(f"{op}: t is {t.dtype} of shape {tuple(t.shape)}, expected [S] of a floating dtype")
    if t.dtype is torch.float64 and t.device.type != "cpu":
        raise ValueError(f"{op}: t is float64 on {t.device}, which is for the CPU alone")
    if whole(op, "dim", dim, 2, MAX_TIMESTEP_DIM) % 2:
        raise ValueError(f"{op}: dim {dim}, expected an even number")
    if not 0 < max_period < math.inf:
        raise ValueError(f"{op}: max_period {max_period}, expected a positive number")
    if not abs(scale) <= MAX_TIMESTEP_SCALE:
        raise ValueError(f"{op}: scale {scale}, expected at most 2^40 in size")
    out: Tensor = _timestep_embedding(t, dim, float(scale), float(max_period))
    return out


def _check_dtype(op: str, name: str, x: Tensor) -> None:
    check_tensors(op, **{name: x})
    if x.dtype not in DTYPES:
        raise ValueError(f"{op}: {name} is {x.dtype}, expected one of {', '.join(map(str, DTYPES))}")
    if x.dtype is torch.float64 and x.device.type != "cpu":
        raise ValueError(f"{op}: {name} is float64 on {x.device}, which is for the CPU alone")


def _check_numbers(op: str, dim: int, theta: float, first: int | None) -> None:
    if whole(op, "dim", dim, 6, MAX_DIM) % 6:
        raise ValueError(f"{op}: dim {dim}, expected a multiple of 6")
    if not 0 < theta < math.inf:
        raise ValueError(f"{op}: theta {theta}, expected a positive number")
    if first is not None:
        whole(op, "first", first, 0, MAX_TOKENS)


# ---------------------------------------------------------------------------------------------------------------------
# The references


def _embedding(grids: Tensor, dim: int, theta: float, first: int, length: int) -> Tensor:
    """float64 [length, dim]."""
    positions = positions3d(grids)
    if len(positions) < first + length:  # as in the compiled body: what is called without our checks is told
        raise ValueError(f"grids: {len(positions)} tokens, expected at least {first + length}")
    half = dim // 6
    frequencies = theta ** -(torch.arange(half, dtype=torch.float64, device="cpu") / half)
    angles = positions[first : first + length].double()[:, :, None] * frequencies  # [L, 3, dim/6]
    return torch.cat((angles.sin(), angles.cos()), dim=-1).flatten(1)


def _sincos3d_reference(like: Tensor, grids: Tensor, dim: int, theta: float, first: int, length: int) -> Tensor:
    exact = _embedding(grids, dim, theta, first, length)
    return (exact if like.dtype is torch.float64 else exact.float()).to(like.device, like.dtype)


def _add_sincos3d_reference(x: Tensor, grids: Tensor, theta: float, first: int) -> Tensor:
    compute = torch.float64 if x.dtype is torch.float64 else torch.float32
    embedding = _embedding(grids, x.shape[1], theta, first, x.shape[0]).to(x.device, compute)
    return (x.to(compute) + embedding).to(x.dtype).contiguous()


def _frequencies(like: Tensor, half: int, max_period: float) -> Tensor:
    exact = torch.exp(-math.log(max_period) * torch.arange(half, dtype=torch.float64, device="cpu") / half)
    return exact.to(like.device, torch.float64 if like.dtype is torch.float64 else torch.float32)


def _timestep_embedding_reference(t: Tensor, dim: int, scale: float, max_period: float) -> Tensor:
    frequencies = _frequencies(t, dim // 2, max_period)
    angles = scale * t.to(frequencies.dtype)[:, None] * frequencies
    return torch.cat((angles.cos(), angles.sin()), dim=-1)


# ---------------------------------------------------------------------------------------------------------------------
# The ops


def _save_nothing(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    pass


def _add_sincos3d_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return grad, None, None, None


def _timestep_fake(t: Tensor, dim: int, scale: float, max_period: float) -> Tensor:
    return t.new_empty((t.shape[0], dim), dtype=torch.float64 if t.dtype is torch.float64 else torch.float32)


def _timestep_save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    t, ctx.dim, ctx.scale, ctx.max_period = inputs
    ctx.save_for_backward(t, output)


def _timestep_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    t, output = ctx.saved_tensors
    (cos, sin), (g_cos, g_sin) = output.chunk(2, dim=1), grad.chunk(2, dim=1)
    slope = (g_sin * cos - g_cos * sin) * _frequencies(t, ctx.dim // 2, ctx.max_period)
    return (ctx.scale * slope.sum(1)).to(t.dtype), None, None, None


_sincos3d = define(
    "sincos3d(Tensor like, Tensor grids, int dim, float theta, SymInt first, SymInt length) -> Tensor",
    reference=_sincos3d_reference,
    fake=lambda like, grids, dim, theta, first, length: like.new_empty((length, dim)),
)
_add_sincos3d = define(
    "add_sincos3d(Tensor x, Tensor grids, float theta, SymInt first) -> Tensor",
    reference=_add_sincos3d_reference,
    fake=lambda x, grids, theta, first: x.new_empty(x.shape),
    setup_context=_save_nothing,
    backward=_add_sincos3d_backward,
)
_timestep_embedding = define(
    "timestep_embedding(Tensor t, int dim, float scale, float max_period) -> Tensor",
    reference=_timestep_embedding_reference,
    fake=_timestep_fake,
    setup_context=_timestep_save,
    backward=_timestep_backward,
)
