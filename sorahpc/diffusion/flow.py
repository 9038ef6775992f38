"""Rectified flow (Liu et al. 2022; Lipman et al. 2022): noising, velocity target, and all of a sample's randomness.

Timestep 0 is data, 1 is noise: x_t = (1 - t) x0 + t eps, and the model learns the velocity eps - x0.

Whatever is random about a sample is a function of (seed, sample id, visit), drawn from a counter-based generator
(Philox 4x64, Salmon et al. 2011): the same for any batch, rank, layout, and number of resumptions.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sorahpc.config import TrainConfig

_NOISE, _DRAW = 1, 2  # what a stream is for; streams of different purposes never overlap


def _generator(purpose: int, seed: int, sample_id: int, visit: int) -> np.random.Generator:
    # The key names the stream; the two high counter words are set apart, and the low two count draws (2^128 of them).
    counter = np.array([0, 0, visit, purpose], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=np.array([seed, sample_id], dtype=np.uint64), counter=counter))


def noise(seed: int, sample_id: int, visit: int, shape: tuple[int, ...]) -> Tensor:
    """Standard normal noise of one sample.

    Args:
        seed, sample_id, visit: non-negative, below 2^63; `visit` counts how often training has seen the sample.
        shape: of the latent, [C, T, H, W].

    Returns:
        float32 CPU tensor.
    """
    generator = _generator(_NOISE, seed, sample_id, visit)
    return torch.from_numpy(generator.standard_normal(shape, dtype=np.float32))


@dataclass(frozen=True)
class Draw:
    """A sample's scalars at one visit."""

    t: float
    drop_text: bool


def draw(seed: int, sample_id: int, visit: int, train: TrainConfig) -> Draw:
    """Timestep and text drop of one sample.

    t is the sigmoid of a normal (Esser et al. 2024, section 3.1), or uniform for a share `t_uniform`, then shifted
    towards noise: t' = s t / (1 + (s - 1) t).
    """
    generator = _generator(_DRAW, seed, sample_id, visit)
    u_mix, u_t, u_drop = generator.random(3)
    normal = generator.standard_normal()
    t = u_t if u_mix < train.t_uniform else 1.0 / (1.0 + np.exp(-(train.t_mean + train.t_std * normal)))
    return Draw(t=shift_timestep(float(t), train.t_shift), drop_text=bool(u_drop < train.text_drop))


def shift_timestep(t: float, shift: float) -> float:
    return shift * t / (1.0 + (shift - 1.0) * t)


def interpolate(x0: Tensor, eps: Tensor, t: float) -> tuple[Tensor, Tensor]:
    """(x_t, velocity target) of one sample, in x0's shape and dtype."""
    return (1.0 - t) * x0 + t * eps, eps - x0
