"""Adaptive layer norm over a ragged pack: LayerNorm + scale/shift, and the gated residual (DiT's adaLN-Zero)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def modulate(x: Tensor, shift: Tensor, scale: Tensor, lengths: Tensor, eps: float = 1e-6) -> Tensor:
    """LayerNorm(x) * (1 + scale) + shift, with one (shift, scale) a sample; math in float32.

    Args:
        x: [L, M] tokens of a pack.
        shift, scale: [S, M].
        lengths: int64 [S] on x's device: tokens of each sample in x, in order, summing to L; may be zero.

    Returns:
        [L, M] in x's dtype.
    """
    normed = F.layer_norm(x.float(), x.shape[-1:], eps=eps)
    shift, scale = (v.float().repeat_interleave(lengths, 0, output_size=len(x)) for v in (shift, scale))
    return (normed * (1 + scale) + shift).to(x.dtype)


def gated_residual(x: Tensor, branch: Tensor, gate: Tensor, lengths: Tensor) -> Tensor:
    """x + gate * branch, with one gate a sample.

    Args:
        x, branch: [L, M].
        gate: [S, M].
        lengths: int64 [S] as in `modulate`.
    """
    return x + gate.repeat_interleave(lengths, 0, output_size=len(x)).to(x.dtype) * branch
