"""Rectified flow (Liu et al. 2022; Lipman et al. 2022): what is drawn for a sample each time that training sees it.

Timestep 0 is data, 1 is noise: x_t = (1 - t) x0 + t eps, and the model learns the velocity eps - x0. Noise and mixing
are `ops.flow_patchify`. Whatever is random about a sample is a function of (seed, sample id, visit), drawn from
counter-based generators (here Philox 4x64, Salmon et al. 2011): the same for any batch, rank, layout, and number of
resumptions.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from sorahpc.config import TrainConfig


@dataclass(frozen=True)
class Draw:
    """A sample's scalars at one visit."""

    t: float
    drop_text: bool
    detailed: bool  # its detailed caption, if it has one


def draw(seed: int, sample_id: int, visit: int, train: TrainConfig) -> Draw:
    """Timestep and text of one sample.

    t is the sigmoid of a normal (Esser et al. 2024, section 3.1), or uniform for a share `t_uniform`, then shifted
    towards noise: t' = s t / (1 + (s - 1) t).
    """
    # The key names the stream; the two high counter words are set apart, and the low two count draws (2^128 of them).
    counter = np.array([0, 0, visit, 2], dtype=np.uint64)
    key = np.array([seed, sample_id], dtype=np.uint64)
    generator = np.random.Generator(np.random.Philox(key=key, counter=counter))
    u_mix, u_t, u_drop = generator.random(3)
    normal = generator.standard_normal()
    t = u_t if u_mix < train.t_uniform else 1.0 / (1.0 + np.exp(-(train.t_mean + train.t_std * normal)))
    u_detailed = generator.random()
    return Draw(
        t=shift_timestep(float(t), train.t_shift),
        drop_text=bool(u_drop < train.text_drop),
        detailed=bool(u_detailed < train.detailed_share),
    )


def shift_timestep(t: float, shift: float) -> float:
    return shift * t / (1.0 + (shift - 1.0) * t)
