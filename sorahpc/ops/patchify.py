"""Cut the latents of a ragged pack into patches, and put them together again.

Both directions move bytes and compute nothing: they are exact in any dtype, each other's inverse, and each other's
adjoint, so the gradient of one is the other.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sorahpc.ops._library import define
from sorahpc.ops.pack import DTYPES, check_tensors, sum_of_grids, whole

MAX_CHANNELS, MAX_PATCH = 2**20, 2**12  # so that their product can't overflow


def patchify(
    latents: Tensor, grids: Tensor, channels: int, patch: tuple[int, int, int], channels_last: bool = False
) -> Tensor:
    """Latents of several samples to one sequence of tokens.

    Args:
        latents: [sum of C*T*pt*H*ph*W*pw] flat: each sample a contiguous [C, T*pt, H*ph, W*pw], one after the other.
            float16, bfloat16, float32 or float64; any device.
        grids: int64 CPU [S, 3], patch counts (T, H, W) a sample, each at least 1. S = 0 is an empty pack.
        channels: C.
        patch: (pt, ph, pw).
        channels_last: order inside a token: (c pt ph pw), or (pt ph pw c) if true.

    Returns:
        Tokens [L, C*pt*ph*pw] with L = sum of T*H*W, those of a sample in row-major (T, H, W) order; dtype and device
        of `latents`.

    Raises:
        ValueError: a dtype, device, shape or sum of grids that does not fit. Under ``torch.compile`` the values of
            `grids` are checked when the graph runs, as RuntimeError.
    """
    _check("patchify", "latents", latents, 1, grids, channels, patch)
    return _patchify(latents, grids, channels, *patch, channels_last)


def unpatchify(
    tokens: Tensor, grids: Tensor, channels: int, patch: tuple[int, int, int], channels_last: bool = False
) -> Tensor:
    """Tokens [L, C*pt*ph*pw] back to flat latents: the inverse of `patchify`, with the same arguments and errors."""
    _check("unpatchify", "tokens", tokens, 2, grids, channels, patch)
    return _unpatchify(tokens, grids, channels, *patch, channels_last)


def _check(op: str, name: str, x: Tensor, dims: int, grids: Tensor, channels: int, patch: tuple[int, int, int]) -> None:
    check_tensors(op, **{name: x}, grids=grids)
    whole(op, "channels", channels, 1, MAX_CHANNELS)
    if len(patch) != 3:
        raise ValueError(f"{op}: patch {tuple(patch)}, expected three sizes")
    for n in patch:
        whole(op, f"patch {tuple(patch)}: size", n, 1, MAX_PATCH)
    size = channels * patch[0] * patch[1] * patch[2]
    if x.dtype not in DTYPES:
        raise ValueError(f"{op}: {name} is {x.dtype}, expected one of {', '.join(map(str, DTYPES))}")
    if x.dim() != dims or (dims == 2 and x.shape[1] != size):
        expected = f"[L, {size}] for {channels} channels of patch {tuple(patch)}" if dims == 2 else "one flat dim"
        raise ValueError(f"{op}: {name} has shape {tuple(x.shape)}, expected {expected}")
    if grids.dtype != torch.int64 or grids.device.type != "cpu" or grids.dim() != 2 or grids.shape[1] != 3:
        found = f"{grids.dtype} on {grids.device} of shape {tuple(grids.shape)}"
        raise ValueError(f"{op}: grids is {found}, expected int64 on cpu [S, 3]")
    if not torch.compiler.is_compiling():  # a graph can't look at values; the body does, when it runs
        _check_sum(op, grids, x.numel(), size)


def _check_sum(op: str, grids: Tensor, numel: int, size: int) -> None:
    total = sum_of_grids(op, grids)
    if total * size != numel:
        raise ValueError(f"{op}: grids have {total} tokens of {size} elements = {total * size}, the input has {numel}")


def _reference(x: Tensor, grids: Tensor, c: int, pt: int, ph: int, pw: int, channels_last: bool, cut: bool) -> Tensor:
    """Both directions: a sample is [c, T, pt, H, ph, W, pw] as a latent, and a permutation of that as tokens."""
    size = c * pt * ph * pw
    _check_sum("patchify" if cut else "unpatchify", grids, x.numel(), size)
    # latent dims: 0 c, 1 T, 2 pt, 3 H, 4 ph, 5 W, 6 pw
    order = (1, 3, 5, 2, 4, 6, 0) if channels_last else (1, 3, 5, 0, 2, 4, 6)
    inverse = [order.index(dim) for dim in range(7)]
    parts = [x.new_empty(0)]
    begin, flat = 0, x.reshape(-1)
    for t, h, w in grids.tolist():
        shape = (c, t, pt, h, ph, w, pw)
        sample = flat[begin : begin + t * h * w * size]
        begin += t * h * w * size
        moved = sample.view(shape).permute(order) if cut else sample.view([shape[d] for d in order]).permute(inverse)
        parts.append(moved.reshape(-1))
    out = torch.cat(parts)  # new memory also for one sample
    return out.view(-1, size) if cut else out


def _patchify_reference(
    latents: Tensor, grids: Tensor, channels: int, pt: int, ph: int, pw: int, channels_last: bool
) -> Tensor:
    return _reference(latents, grids, channels, pt, ph, pw, channels_last, cut=True)


def _unpatchify_reference(
    tokens: Tensor, grids: Tensor, channels: int, pt: int, ph: int, pw: int, channels_last: bool
) -> Tensor:
    return _reference(tokens, grids, channels, pt, ph, pw, channels_last, cut=False)


def _patchify_fake(
    latents: Tensor, grids: Tensor, channels: int, pt: int, ph: int, pw: int, channels_last: bool
) -> Tensor:
    size = channels * pt * ph * pw
    return latents.new_empty((latents.numel() // size, size))


def _unpatchify_fake(
    tokens: Tensor, grids: Tensor, channels: int, pt: int, ph: int, pw: int, channels_last: bool
) -> Tensor:
    return tokens.new_empty((tokens.numel(),))


def _save_arguments(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, grids, *ctx.how = inputs
    ctx.save_for_backward(grids)


def _patchify_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return _unpatchify(grad, *ctx.saved_tensors, *ctx.how), None, None, None, None, None, None


def _unpatchify_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return _patchify(grad, *ctx.saved_tensors, *ctx.how), None, None, None, None, None, None


_ARGUMENTS = "Tensor grids, int channels, int pt, int ph, int pw, bool channels_last"

_patchify = define(
    f"patchify(Tensor latents, {_ARGUMENTS}) -> Tensor",
    reference=_patchify_reference,
    fake=_patchify_fake,
    setup_context=_save_arguments,
    backward=_patchify_backward,
)
_unpatchify = define(
    f"unpatchify(Tensor tokens, {_ARGUMENTS}) -> Tensor",
    reference=_unpatchify_reference,
    fake=_unpatchify_fake,
    setup_context=_save_arguments,
    backward=_unpatchify_backward,
)
