"""Attention over a pack: each sample attends to itself, or to its own text, with no mask and no padding."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def pack_attention(q: Tensor, k: Tensor, v: Tensor, q_lens: Sequence[int], k_lens: Sequence[int]) -> Tensor:
    """softmax(q k^T / sqrt(D)) v within each sample.

    On CUDA in half precision this is one varlen flash-attention kernel, for head dims of up to 256. Elsewhere SDPA runs
    over stretches of consecutive samples that have equal lengths (packs are sorted so that those are long).

    Args:
        q: [sum of q_lens, N, D].
        k, v: [sum of k_lens, N, D].
        q_lens, k_lens: tokens a sample, same number of samples.

    Returns:
        [sum of q_lens, N, D].
    """
    if q.is_cuda and q.dtype in (torch.bfloat16, torch.float16) and q.shape[-1] <= 256:
        return _varlen(q, k, v, q_lens, k_lens)
    out, q_start, k_start = [], 0, 0
    for (q_len, k_len), run in itertools.groupby(zip(q_lens, k_lens, strict=True)):
        count = len(list(run))
        q_end, k_end = q_start + count * q_len, k_start + count * k_len
        qi = q[q_start:q_end].unflatten(0, (count, q_len)).transpose(1, 2)
        ki, vi = (x[k_start:k_end].unflatten(0, (count, k_len)).transpose(1, 2) for x in (k, v))
        out.append(F.scaled_dot_product_attention(qi, ki, vi).transpose(1, 2).flatten(0, 1))
        q_start, k_start = q_end, k_end
    return torch.cat(out) if out else q


def _varlen(q: Tensor, k: Tensor, v: Tensor, q_lens: Sequence[int], k_lens: Sequence[int]) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    # The kernel takes head dims that are multiples of 8. Zeros change no product; they cost copies of q, k and v.
    dim = q.shape[-1]
    if short := -dim % 8:
        q, k, v = (F.pad(x, (0, short)) for x in (q, k, v))
    cu_q, cu_k = (_starts(tuple(lens), q.device) for lens in (q_lens, k_lens))
    out = varlen_attn(q, k, v, cu_q, cu_k, max(q_lens), max(k_lens), scale=dim**-0.5)
    assert isinstance(out, Tensor)  # a tuple only where auxiliary outputs are asked for
    return out[..., :dim]


# All blocks ask for those of a pack and of its text. Sent anew by each, from pageable memory, they would have each
# layer wait until the GPU has nothing left to do, and the GPU then for the next layer's launches.
@functools.lru_cache(maxsize=8)
def _starts(lens: tuple[int, ...], device: torch.device) -> Tensor:
    """int32 [S + 1], where each sample begins, and the end."""
    with torch.inference_mode(False):  # whoever asks first: a training step may get it next
        starts = torch.tensor([0, *itertools.accumulate(lens)], dtype=torch.int32, pin_memory=device.type == "cuda")
        return starts.to(device, non_blocking=True)
