"""3D rotary position embedding of a ragged pack (Su et al. 2021, RoFormer, eq. 34; one group of pairs an axis).

Pair i of an axis with d dims turns by (index * scale + offset) * theta^(-2i/d). Interleaved pairs are (2i, 2i+1), as
in RoFormer, Wan and FLUX; rotate-half pairs are (i, i + D/2) over the whole head, as in GPT-NeoX and in transformers'
Llama. Angles are computed in float64, the rest in float32 (float64 for float64).
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Iterable, Sequence
from typing import Any, SupportsIndex

import torch
from torch import Tensor

from sorahpc.ops._library import define
from sorahpc.ops.pack import DTYPES, MAX_TOKENS, check_grids, check_tensors, positions3d, three_numbers, whole

MAX_HEAD_DIM = 256


def rope3d(
    q: Tensor,
    k: Tensor,
    grids: Tensor,
    axes_dim: Sequence[int],
    theta: float | Sequence[float] = 1e4,
    *,
    offset: Sequence[float] = (0.0, 0.0, 0.0),
    scale: Sequence[float] = (1.0, 1.0, 1.0),
    first: int | None = None,
    interleaved: bool = True,
    inverse: bool = False,
) -> tuple[Tensor, Tensor]:
    """Turn q and k by their tokens' positions.

    Args:
        q, k: [L, N, D] and [L, Nk, D], D at most 256; float16, bfloat16, float32, or float64 on the CPU; one dtype and
            device. Tokens and heads may lie anywhere, as in a fused qkv; only D need be contiguous.
        grids: int64 CPU [S, 3], patch counts (T, H, W) a sample; the tokens of a sample in row-major order.
        axes_dim: three even numbers summing to D: the dims that follow (T, H, W).
        theta: base of the frequencies, or one an axis (NTK-aware scaling: bloc97 2023).
        offset, scale: position of index i of an axis is i * scale + offset (position interpolation: Chen et al. 2023).
        first: q and k are tokens [first, first + L) of the pack, as of a context-parallel rank; None: all of it.
        interleaved: the layout of a pair in a head.
        inverse: turn back. It is also the gradient.

    Returns:
        q and k turned, contiguous, in their dtype.

    Raises:
        ValueError: a dtype, device, shape, split or sum of grids that does not fit. Under ``torch.compile`` the values
            of `grids` are checked when the graph runs, as RuntimeError.
    """
    how = _check("rope3d", q, k, grids, axes_dim, theta, offset, scale, first, interleaved)
    out: tuple[Tensor, Tensor] = _rope3d(q, k, *how, inverse)
    return out


def qk_norm_rope3d(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    grids: Tensor,
    axes_dim: Sequence[int],
    theta: float | Sequence[float] = 1e4,
    *,
    offset: Sequence[float] = (0.0, 0.0, 0.0),
    scale: Sequence[float] = (1.0, 1.0, 1.0),
    first: int | None = None,
    interleaved: bool = True,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """RMS norm of every head of q and k (Zhang and Sennrich 2019; on q and k: Dehghani et al. 2023), then `rope3d`.

    Nothing is kept for the gradient but what came in. Arguments and errors are those of `rope3d`, and

    Args:
        q_weight, k_weight: [D], any of the dtypes.
        eps: added to the mean square.
    """
    how = _check("qk_norm_rope3d", q, k, grids, axes_dim, theta, offset, scale, first, interleaved)
    check_tensors("qk_norm_rope3d", q_weight=q_weight, k_weight=k_weight)
    if not 0 <= eps < math.inf:
        raise ValueError(f"qk_norm_rope3d: eps {eps}, expected at least 0, finite")
    for name, weight in (("q_weight", q_weight), ("k_weight", k_weight)):
        if weight.shape != q.shape[-1:] or weight.dtype not in DTYPES or weight.device != q.device:
            raise ValueError(
                f"qk_norm_rope3d: {name} is {weight.dtype} {list(weight.shape)} on {weight.device}, expected "
                f"[{q.shape[-1]}] on {q.device}, one of {', '.join(map(str, DTYPES))}"
            )
    out: tuple[Tensor, Tensor] = _qk_norm_rope3d(q, k, q_weight, k_weight, *how, eps)
    return out


def _check(
    op: str,
    q: Tensor,
    k: Tensor,
    grids: Tensor,
    axes_dim: Sequence[int],
    theta: float | Sequence[float],
    offset: Sequence[float],
    scale: Sequence[float],
    first: int | None,
    interleaved: bool,
) -> tuple[Any, ...]:
    """The arguments from `grids` on as the ops take them."""
    check_tensors(op, q=q, k=k)
    if q.dtype not in DTYPES or q.dtype != k.dtype or q.device != k.device:
        raise ValueError(
            f"{op}: q is {q.dtype} on {q.device}, k is {k.dtype} on {k.device}; expected the same, one of "
            f"{', '.join(map(str, DTYPES))}"
        )
    if q.dtype is torch.float64 and q.device.type != "cpu":
        raise ValueError(f"{op}: q is float64 on {q.device}, which is for the CPU alone")
    if q.dim() != 3 or k.dim() != 3 or q.shape[0] != k.shape[0] or q.shape[2] != k.shape[2]:
        raise ValueError(f"{op}: q is {list(q.shape)}, k is {list(k.shape)}, expected [L, N, D] with one L and D")
    length, dim = q.shape[0], q.shape[2]
    if dim > MAX_HEAD_DIM:
        raise ValueError(f"{op}: head dim {dim}, expected at most {MAX_HEAD_DIM}")
    axes = list(axes_dim) if isinstance(axes_dim, Iterable) else [axes_dim]
    whole_axes = [a for a in axes if isinstance(a, SupportsIndex) and operator.index(a) >= 0]
    if len(axes) != 3 or len(whole_axes) != 3 or sum(whole_axes) != dim or any(a % 2 for a in whole_axes):
        raise ValueError(f"{op}: axes_dim {tuple(axes)}, expected three even numbers summing to the head dim {dim}")
    one = not isinstance(theta, Iterable) or getattr(theta, "ndim", 1) == 0
    numbers = (
        three_numbers(op, "theta", [theta] * 3 if one else theta, positive=True),
        three_numbers(op, "offset", offset),
        three_numbers(op, "scale", scale),
    )
    if first is not None:
        first = whole(op, "first", first, 0, MAX_TOKENS)
    check_grids(op, grids, length, first)
    return grids, [int(a) for a in axes], *numbers, first or 0, interleaved


# ---------------------------------------------------------------------------------------------------------------------
# The reference


# The blocks of a forward pass, and its recomputation, ask for the same tables; two packs cover CFG's pair.
@functools.lru_cache(maxsize=4)
def _tables(
    grids: tuple[tuple[int, ...], ...],
    axes_dim: tuple[int, ...],
    theta: tuple[float, ...],
    offset: tuple[float, ...],
    scale: tuple[float, ...],
    first: int,
    length: int,
    dtype: torch.dtype,
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    """cos and sin [L, 1, D/2]."""
    # Not inference tensors, whoever asks first: a training step may get them next.
    with torch.inference_mode(False), torch.device("cpu"):
        positions = positions3d(torch.tensor(grids, dtype=torch.int64).view(-1, 3))
        if len(positions) < first + length:  # as in the compiled body: what is called without our checks is told
            raise ValueError(f"grids: {len(positions)} tokens, expected at least {first + length}")
        scales, offsets = (torch.tensor(x, dtype=torch.float64) for x in (scale, offset))
        at = positions[first : first + length].double() * scales + offsets
        angles = torch.cat(
            [
                at[:, axis, None] * theta[axis] ** -(torch.arange(0, dim, 2, dtype=torch.float64) / max(dim, 1))
                for axis, dim in enumerate(axes_dim)
            ],
            dim=1,
        )
        return angles.cos().to(device, dtype)[:, None], angles.sin().to(device, dtype)[:, None]


def _turn(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """x [L, N, D] in the tables' dtype."""
    if interleaved:
        a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
        return torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1).flatten(-2)
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


def _tables_for(q: Tensor, grids: Tensor, *where: Any) -> tuple[Tensor, Tensor]:
    """where: axes_dim, theta, offset, scale, first."""
    *lists, first = where
    dtype = torch.float64 if q.dtype is torch.float64 else torch.float32
    return _tables(tuple(map(tuple, grids.tolist())), *map(tuple, lists), first, len(q), dtype, q.device)


# `how`: what the ops take from `grids` on, as `_HOW` says, and last what is each one's own.


def _rope3d_reference(q: Tensor, k: Tensor, *how: Any) -> tuple[Tensor, Tensor]:
    *where, interleaved, inverse = how
    cos, sin = _tables_for(q, *where)
    sin = -sin if inverse else sin
    turned = (_turn(x.to(cos.dtype), cos, sin, interleaved).to(x.dtype) for x in (q, k))
    return tuple(x.contiguous() for x in turned)  # type: ignore[return-value]


def _qk_norm_rope3d_reference(
    q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, *how: Any
) -> tuple[Tensor, Tensor]:
    *where, interleaved, eps = how
    cos, sin = _tables_for(q, *where)
    out = []
    for x, weight in ((q, q_weight), (k, k_weight)):
        y = x.to(cos.dtype)
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps) * weight.to(cos.dtype)
        out.append(_turn(y, cos, sin, interleaved).to(x.dtype).contiguous())
    return out[0], out[1]


def _qk_norm_rope3d_backward_reference(
    dq: Tensor, dk: Tensor, q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, *how: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *where, interleaved, eps = how
    cos, sin = _tables_for(q, *where)
    dx, dweight = [], []
    for x, dy, weight in ((q, dq, q_weight), (k, dk, k_weight)):
        g, y = _turn(dy.to(cos.dtype), cos, -sin, interleaved), x.to(cos.dtype)
        r = torch.rsqrt(y.square().mean(-1, keepdim=True) + eps)
        gw, normed = g * weight.to(cos.dtype), y * r
        dx.append((r * (gw - normed * (gw * normed).mean(-1, keepdim=True))).to(x.dtype).contiguous())
        dweight.append((g * normed).sum((0, 1)).to(weight.dtype))
    return dx[0], dx[1], dweight[0], dweight[1]


# ---------------------------------------------------------------------------------------------------------------------
# The ops


def _like_q_and_k(q: Tensor, k: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape)


def _rope3d_save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    _, _, grids, *ctx.how, ctx.inverse = inputs
    ctx.save_for_backward(grids)


def _rope3d_backward(ctx: Any, dq: Tensor, dk: Tensor) -> tuple[Tensor | None, ...]:
    return *_rope3d(dq, dk, *ctx.saved_tensors, *ctx.how, not ctx.inverse), *[None] * 8


def _norm_save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.how = inputs[5:]
    ctx.save_for_backward(*inputs[:5])


def _norm_backward(ctx: Any, dq: Tensor, dk: Tensor) -> tuple[Tensor | None, ...]:
    return *_qk_norm_rope3d_backward(dq, dk, *ctx.saved_tensors, *ctx.how), *[None] * 8


def _norm_backward_fake(
    dq: Tensor, dk: Tensor, q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        q.new_empty(q.shape),
        k.new_empty(k.shape),
        q_weight.new_empty(q_weight.shape),
        k_weight.new_empty(k_weight.shape),
    )


_HOW = "Tensor grids, int[] axes_dim, float[] theta, float[] offset, float[] scale, SymInt first, bool interleaved"
_WEIGHTS = "Tensor q_weight, Tensor k_weight"

_rope3d = define(
    f"rope3d(Tensor q, Tensor k, {_HOW}, bool inverse) -> (Tensor, Tensor)",
    reference=_rope3d_reference,
    fake=_like_q_and_k,
    setup_context=_rope3d_save,
    backward=_rope3d_backward,
)
_qk_norm_rope3d_backward = define(
    f"qk_norm_rope3d_backward(Tensor dq, Tensor dk, Tensor q, Tensor k, {_WEIGHTS}, {_HOW}, float eps)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    reference=_qk_norm_rope3d_backward_reference,
    fake=_norm_backward_fake,
)
_qk_norm_rope3d = define(
    f"qk_norm_rope3d(Tensor q, Tensor k, {_WEIGHTS}, {_HOW}, float eps) -> (Tensor, Tensor)",
    reference=_qk_norm_rope3d_reference,
    fake=_like_q_and_k,
    setup_context=_norm_save,
    backward=_norm_backward,
)
