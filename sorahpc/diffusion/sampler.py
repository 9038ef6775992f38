"""From noise to data: Euler steps along the learned velocity field, with classifier-free guidance.

Pure functions over a pack of tokens, so that they test against fields whose solution is known. Time runs as in
training: t = 1 is noise, t = 0 is data, ``x_t = (1 - t) x0 + t eps``, velocity ``dx/dt = eps - x0``
(rectified flow, arXiv 2209.03003). Shapes: L tokens of the pack, P numbers a token, S samples.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from sorahpc.data.texts import Texts, join_texts

Velocity = Callable[[Tensor, float], Tensor]
"""(x [L, P] float32, t) -> dx/dt [L, P] float32."""


def time_grid(steps: int, t_shift: float = 1.0) -> list[float]:
    """The ``steps + 1`` times of a sampling run, from 1 down to 0.

    Evenly spaced, then moved towards noise for ``t_shift`` s > 1 by ``t' = s t / (1 + (s - 1) t)``, the map that
    training applies to its timesteps. Computed in Python floats: the grid is the same on every device.
    """
    if steps < 1:
        raise ValueError(f"steps: at least 1, not {steps}")
    if not t_shift > 0:
        raise ValueError(f"t_shift: above 0, not {t_shift}")
    even = (1.0 - i / steps for i in range(steps + 1))
    return [t_shift * t / (1.0 + (t_shift - 1.0) * t) for t in even]


@torch.no_grad()
def euler(velocity: Velocity, x: Tensor, steps: int, t_shift: float = 1.0) -> Tensor:
    """Integrate dx/dt = velocity(x, t) from t = 1 to t = 0 with explicit Euler steps, one model call each.

    Args:
        velocity: the field; it is never asked at t = 0.
        x: [L, P] float32, standard normal noise; not changed.
        steps: number of model calls.
        t_shift: see `time_grid`.

    Returns:
        [L, P] float32, the sample in the space of the tokens.
    """
    times = time_grid(steps, t_shift)
    for t, t_next in itertools.pairwise(times):
        x = x + (t_next - t) * velocity(x, t)
    return x


def guided(
    model: Callable[..., Tensor],
    grids: Tensor,
    texts: Sequence[Texts],
    empty: Texts,
    scale: float,
) -> Velocity:
    """The velocity of a pack with classifier-free guidance: ``v = v_u + scale (v_c - v_u)`` (arXiv 2207.12598).

    The conditional and the unconditional half go through the model as one pack of 2 S samples. At scale 1 they cancel
    to the conditional one, so only that is computed, at half the price.

    Args:
        model: forward(tokens [L, P], t [S], grids [S, 3], *PackTexts) -> velocity [L, P] float32.
        grids: int64 CPU [S, 3], counts of patches (T, H, W) of each sample.
        texts: the embeddings of S captions, [L_i, Dt] by name, unpadded.
        empty: those of the empty caption.
        scale: guidance; 0 is unconditional, 1 conditional, above 1 sharper than the data.
    """
    num_samples = len(texts)
    if grids.shape != (num_samples, 3):
        raise ValueError(f"grids: [{num_samples}, 3] for {num_samples} texts, not {list(grids.shape)}")
    both = scale != 1.0
    pack = join_texts([*texts, *([empty] * num_samples if both else [])])
    pack_grids = torch.cat([grids, grids]) if both else grids

    def velocity(x: Tensor, t: float) -> Tensor:
        times = torch.full((len(pack_grids),), t, dtype=torch.float32, device=x.device)
        if not both:
            return model(x, times, pack_grids, *pack)
        cond, uncond = model(torch.cat([x, x]), times, pack_grids, *pack).chunk(2)
        return uncond + scale * (cond - uncond)

    return velocity
