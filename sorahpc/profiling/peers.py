"""Rotary kernels of other libraries, which `rope_case` times beside ours where they are installed; none has to be.

They know no 3D positions: each is given one sequence of batch 1 and a table of every token's angles, which is what its
users must make. Read at:

    Transformer Engine  transformer_engine.pytorch.attention.rope.apply_rotary_pos_emb  2.20.0.dev0, d0067d0; since 2.4
    apex                fused_rotary_positional_embedding.forward                       6424da3; since 37d83fc
    Liger               liger_kernel.transformers.rope.liger_rotary_pos_emb             0.8.2, ead96b6
    flash-attn          flash_attn.layers.rotary.apply_rotary_emb                       2.8.4, 0251105
"""

from __future__ import annotations

import functools
import importlib
import logging
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

log = logging.getLogger(__name__)

Call = Callable[[], tuple[Tensor, ...]]
Peer = Callable[[Tensor, Tensor, Tensor], tuple[Call, Call]]


def rope_peers(q: Tensor, k: Tensor, angles: Tensor) -> dict[str, tuple[Call, Call]]:
    """The libraries that can be imported here; one that is installed and can't be is a warning in the log.

    Args:
        q, k: [L, N, D] and [L, Nk, D], contiguous, float32 or 16 bits, interleaved; never written to.
        angles: float64 [L, D/2], on their device.

    Returns:
        name -> what to time, in the library's own layout, and what computes from q and k that which `rope3d` returns.
    """
    return {name: peer(q, k, angles) for name, peer in _libraries().items()}


@functools.cache  # the second import of a broken library seldom says what broke it, and one warning is enough
def _libraries() -> dict[str, Peer]:
    found = {}
    for name, package, load in (
        ("Transformer Engine", "transformer_engine", _transformer_engine),
        ("apex", "apex", _apex),
        ("Liger", "liger_kernel", _liger),
        ("flash-attn", "flash_attn", _flash_attn),
    ):
        try:
            found[name] = load()
        except Exception as error:  # any: Transformer Engine asserts torch's version, and its ctypes raise OSError
            if not (isinstance(error, ModuleNotFoundError) and error.name == package):
                reason = " ".join(str(error).split())
                log.warning("%s is installed but not measured: %s: %s", name, type(error).__name__, reason)
    return found


def _transformer_engine() -> Peer:
    """x [s, b, h, d], interleaved or rotate-half; freqs float32 [s, 1, 1, d]; computes in float32."""
    from transformer_engine.pytorch.attention.rope import apply_rotary_pos_emb

    def peer(q: Tensor, k: Tensor, angles: Tensor) -> tuple[Call, Call]:
        freqs = angles.float().repeat_interleave(2, -1)[:, None, None]
        turn = partial(apply_rotary_pos_emb, freqs=freqs, tensor_format="sbhd", interleaved=True, fused=True)
        return _out_of_place(turn, q[:, None], k[:, None], lambda x: x[:, 0])

    return peer


def _apex() -> Peer:
    """x [s, b, h, d], rotate-half; freqs float32 [s, 1, 1, d]; computes in x's dtype.

    Until 4fcca77 apex.transformer.functional.fused_apply_rotary_pos_emb wrapped the extension; without it, as with it,
    this is the kernel.
    """
    importlib.import_module("apex")  # so that an apex that was built without the extension isn't an absent one
    import fused_rotary_positional_embedding as extension

    def peer(q: Tensor, k: Tensor, angles: Tensor) -> tuple[Call, Call]:
        freqs = torch.cat((angles, angles), -1).float()[:, None, None]

        def turn(x: Tensor) -> Tensor:
            out: Tensor = extension.forward(x, freqs, False)  # the output's memory not transposed
            return out

        return _out_of_place(turn, to_halves(q)[:, None], to_halves(k)[:, None], lambda x: to_pairs(x[:, 0]))

    return peer


def _liger() -> Peer:
    """q, k [b, h, s, d], rotate-half, turned IN PLACE where [b, s, h, d] lies in memory; cos, sin [1, s, d].

    Computes in their dtype, which is x's in the models that it is made for.
    """
    from liger_kernel.transformers.rope import liger_rotary_pos_emb

    def peer(q: Tensor, k: Tensor, angles: Tensor) -> tuple[Call, Call]:
        wide = torch.cat((angles, angles), -1)[None]
        cos, sin = wide.cos().to(q.dtype), wide.sin().to(q.dtype)

        def turn(q: Tensor, k: Tensor) -> tuple[Tensor, ...]:
            return tuple(liger_rotary_pos_emb(q.transpose(1, 2), k.transpose(1, 2), cos, sin))

        def result() -> tuple[Tensor, ...]:
            return tuple(to_pairs(x.transpose(1, 2)[0]) for x in turn(to_halves(q)[None], to_halves(k)[None]))

        # Copies of its own, which turn on with each run: it costs the same.
        return partial(turn, to_halves(q)[None], to_halves(k)[None]), result

    return peer


def _flash_attn() -> Peer:
    """x [b, s, h, d], interleaved or rotate-half; cos, sin [s, d/2]; computes in float32.

    The tables are of x's dtype, as its RotaryEmbedding makes them, and as versions before 2.8 demand.
    """
    from flash_attn.layers.rotary import apply_rotary_emb

    def peer(q: Tensor, k: Tensor, angles: Tensor) -> tuple[Call, Call]:
        turn = partial(apply_rotary_emb, cos=angles.cos().to(q.dtype), sin=angles.sin().to(q.dtype), interleaved=True)
        return _out_of_place(turn, q[None], k[None], lambda x: x[0])

    return peer


def _out_of_place(
    turn: Callable[[Tensor], Tensor], q: Tensor, k: Tensor, to_ours: Callable[[Tensor], Tensor]
) -> tuple[Call, Call]:
    """Of a library that turns one tensor; q and k are in its layout."""

    def call() -> tuple[Tensor, ...]:
        return turn(q), turn(k)

    return call, lambda: tuple(to_ours(x) for x in call())


def to_halves(x: Tensor) -> Tensor:
    """A copy of x [..., D] for rotate-half: pair i from (2i, 2i+1) to (i, i + D/2)."""
    return torch.cat((x[..., 0::2], x[..., 1::2]), -1)


def to_pairs(x: Tensor) -> Tensor:
    """`to_halves` undone, a copy."""
    return torch.stack(x.chunk(2, -1), -1).flatten(-2)
