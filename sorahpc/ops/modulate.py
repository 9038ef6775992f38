"""Residual, layer norm and modulation of a ragged pack: adaLN-Zero of DiT (Peebles and Xie 2023, section 3.2).

One shift, scale and gate vector a sample, never spread over its tokens. Math in float32 (float64 for float64).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from sorahpc.ops._library import define
from sorahpc.ops.pack import DTYPES, check_lens, check_tensors


def modulate(x: Tensor, shift: Tensor, scale: Tensor, lens: Tensor, eps: float = 1e-6) -> Tensor:
    """LayerNorm(x) * (1 + scale) + shift, the norm without weights of its own.

    Args:
        x: [L, M] tokens of a pack, M at least 1; float16, bfloat16, float32, or float64 on the CPU. Tokens may lie
            anywhere; only M need be contiguous.
        shift, scale: [S, M], a vector a sample, in x's dtype and on its device; chunks of [S, 6M] as they are.
        lens: int64 CPU [S], tokens of each sample, in order, summing to L; may be zero.
        eps: added to the variance.

    Returns:
        [L, M] in x's dtype, contiguous.

    Raises:
        ValueError: a dtype, device, shape or sum of lens that does not fit. Under ``torch.compile`` the values of
            `lens` are checked when the graph runs, as RuntimeError.
    """
    _check("modulate", x, lens, eps, {}, {"shift": shift, "scale": scale})
    out: tuple[Tensor, Tensor, Tensor] = _ada_norm(x, None, None, shift, scale, lens, eps)
    return out[1]


def residual_norm(
    x: Tensor,
    branch: Tensor,
    lens: Tensor,
    gate: Tensor | None = None,
    shift: Tensor | None = None,
    scale: Tensor | None = None,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """sum = x + gate * branch, and LayerNorm(sum) * (1 + scale) + shift: the seam of two blocks in one pass.

    Arguments and errors are those of `modulate`, and

    Args:
        branch: [L, M], what a block adds to x.
        gate: [S, M]; None: 1.
        shift, scale: None, both: the plain norm.

    Returns:
        (sum, normed), [L, M] each. The norm is of the sum as it is returned, rounded to x's dtype.
    """
    if (shift is None) != (scale is None):
        raise ValueError(
            f"residual_norm: shift is {_found(shift)}, scale is {_found(scale)}; expected both tensors or both None"
        )
    vectors = {"gate": gate, "shift": shift, "scale": scale}
    given = {name: v for name, v in vectors.items() if v is not None}
    _check("residual_norm", x, lens, eps, {"branch": branch}, given)
    out: tuple[Tensor, Tensor, Tensor] = _ada_norm(x, branch, gate, shift, scale, lens, eps)
    return out[:2]


def _found(x: Tensor | None) -> str:
    return "None" if x is None else f"{x.dtype} {list(x.shape)} on {x.device}"


def _check(op: str, x: Tensor, lens: Tensor, eps: float, tokens: dict[str, Tensor], vectors: dict[str, Tensor]) -> None:
    check_tensors(op, x=x, **tokens, **vectors)
    if x.dtype not in DTYPES:
        raise ValueError(f"{op}: x is {x.dtype}, expected one of {', '.join(map(str, DTYPES))}")
    if x.dtype is torch.float64 and x.device.type != "cpu":
        raise ValueError(f"{op}: x is float64 on {x.device}, which is for the CPU alone")
    if x.dim() != 2 or x.shape[1] < 1:
        raise ValueError(f"{op}: x has shape {list(x.shape)}, expected [L, M], M at least 1")
    if not 0 <= eps < math.inf:
        raise ValueError(f"{op}: eps {eps}, expected at least 0, finite")
    check_lens(op, lens, x.shape[0])
    for rows, group in ((x.shape[0], tokens), (lens.shape[0], vectors)):
        for name, v in group.items():
            if v.dim() != 2 or v.shape[0] != rows or v.shape[1] != x.shape[1] or v.dtype != x.dtype:
                raise ValueError(f"{op}: {name} is {_found(v)}, expected {x.dtype} [{rows}, {x.shape[1]}]")
            if v.device != x.device:
                raise ValueError(f"{op}: {name} is {_found(v)}, expected it on {x.device}, as x")


# ---------------------------------------------------------------------------------------------------------------------
# The reference


def _over_tokens(v_SM: Tensor, lens: Tensor, like: Tensor) -> Tensor:
    return v_SM.to(like.dtype).repeat_interleave(lens.to(like.device), 0, output_size=len(like))


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype is torch.float64 else x.float()


def _reference(
    x: Tensor,
    branch: Tensor | None,
    gate: Tensor | None,
    shift: Tensor | None,
    scale: Tensor | None,
    lens: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """(sum, or an empty tensor without a branch; y; mean and inverse deviation of each row, for the gradient)"""
    _check_sum("ada_norm", lens, len(x))
    total, summed = _wide(x), x.new_empty(0)
    if branch is not None:
        wide = _wide(branch)
        summed = (total + (wide if gate is None else _over_tokens(gate, lens, wide) * wide)).to(x.dtype).contiguous()
        total = _wide(summed)
    y = torch.nn.functional.layer_norm(total, total.shape[-1:], eps=eps)
    if scale is not None and shift is not None:
        y = y * (1 + _over_tokens(scale, lens, y)) + _over_tokens(shift, lens, y)
    with torch.no_grad():
        mean = total.mean(-1, keepdim=True)
        variance = (total - mean).square().mean(-1, keepdim=True)
        moments = torch.cat((mean, torch.rsqrt(variance + eps)), -1)
    return summed, y.to(x.dtype).contiguous(), moments


def _backward_reference(
    dsum: Tensor | None,
    dy: Tensor,
    sum: Tensor,
    moments: Tensor,
    branch: Tensor | None,
    gate: Tensor | None,
    scale: Tensor | None,
    lens: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    _check_sum("ada_norm_backward", lens, len(sum))
    x, g = _wide(sum), _wide(dy)
    sample = torch.arange(len(lens)).repeat_interleave(lens).to(x.device)

    def a_sample(v_LM: Tensor) -> Tensor:
        return v_LM.new_zeros(len(lens), v_LM.shape[1]).index_add_(0, sample, v_LM).to(sum.dtype)

    mean, r = moments.split(1, dim=-1)
    normed = (x - mean) * r
    dbranch = dgate = dshift = dscale = sum.new_empty(0)
    if scale is not None:
        dshift, dscale = a_sample(g), a_sample(g * normed)
        g = g * (1 + _over_tokens(scale, lens, g))
    dx = r * (g - g.mean(-1, keepdim=True) - normed * (g * normed).mean(-1, keepdim=True))
    if dsum is not None:
        dx = dx + _wide(dsum)
    if branch is not None and gate is not None:
        dgate = a_sample(dx * _wide(branch))
        dbranch = (dx * _over_tokens(gate, lens, dx)).to(sum.dtype).contiguous()
    out = (dx.to(sum.dtype).contiguous(), dbranch, dgate, dshift, dscale)
    # An op's results may not share memory: each that is not wanted is an empty of its own.
    return tuple(v if v.dim() == 2 else sum.new_empty(0) for v in out)  # type: ignore[return-value]


def _check_sum(op: str, lens: Tensor, num_tokens: int) -> None:
    """As in the compiled body: what is called without our checks is told."""
    values = lens.tolist()
    if min(values, default=0) < 0 or sum(values) != num_tokens:
        raise ValueError(f"{op}: lens have {sum(values)} tokens, the input has {num_tokens}")


# ---------------------------------------------------------------------------------------------------------------------
# The ops


def _fake(x: Tensor, branch: Tensor | None, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    moments = x.new_empty((x.shape[0], 2), dtype=torch.float64 if x.dtype is torch.float64 else torch.float32)
    return x.new_empty(0 if branch is None else x.shape), x.new_empty(x.shape), moments


def _backward_fake(
    dsum: Tensor | None,
    dy: Tensor,
    sum: Tensor,
    moments: Tensor,
    branch: Tensor | None,
    gate: Tensor | None,
    scale: Tensor | None,
    lens: Tensor,
) -> tuple[Tensor, ...]:
    wanted = (sum, branch, gate, scale, scale)
    return tuple(sum.new_empty(0 if v is None else v.shape) for v in wanted)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, branch, gate, _, scale, lens, _ = inputs
    total, _, moments = output
    ctx.mark_non_differentiable(moments)
    ctx.set_materialize_grads(False)  # no zeros for a sum that nobody reads, as of the last block
    ctx.has_branch = branch is not None
    # Of branch's gradient only a gate needs the branch.
    ctx.save_for_backward(total if ctx.has_branch else x, moments, None if gate is None else branch, gate, scale, lens)


def _backward(ctx: Any, dsum: Tensor | None, dy: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors
    total, _, _, gate, scale, _ = saved
    dx, dbranch, dgate, dshift, dscale = _ada_norm_backward(
        dsum if ctx.has_branch else None, torch.zeros_like(total) if dy is None else dy, *saved
    )
    if gate is None:
        dbranch, dgate = (dx if ctx.has_branch else None), None
    if scale is None:
        dshift = dscale = None
    return dx, dbranch, dgate, dshift, dscale, None, None


_ada_norm_backward = define(
    "ada_norm_backward(Tensor? dsum, Tensor dy, Tensor sum, Tensor moments, Tensor? branch, Tensor? gate, "
    "Tensor? scale, Tensor lens) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    reference=_backward_reference,
    fake=_backward_fake,
)
_ada_norm = define(
    "ada_norm(Tensor x, Tensor? branch, Tensor? gate, Tensor? shift, Tensor? scale, Tensor lens, float eps)"
    " -> (Tensor, Tensor, Tensor)",
    reference=_reference,
    fake=_fake,
    setup_context=_save,
    backward=_backward,
)
