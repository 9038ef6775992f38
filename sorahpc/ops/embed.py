"""Sinusoidal embeddings: of 3D positions in a ragged pack, and of the diffusion timestep."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sorahpc.ops.pack import positions3d


def sincos3d(grids: Tensor, dim: int, theta: float = 1e4) -> Tensor:
    """Absolute 3D sinusoidal embedding of a pack (Vaswani et al. 2017, section 3.5, a third of the dims an axis).

    Args:
        grids: int64 CPU [S, 3], patch counts (T, H, W) a sample.
        dim: a multiple of 6; each axis gets dim/3 as (sin half, cos half).

    Returns:
        float32 [L, dim] on the CPU.
    """
    if dim % 6:
        raise ValueError(f"sincos3d: dim must be a multiple of 6, not {dim}")
    half = dim // 6
    frequencies = theta ** -(torch.arange(half, dtype=torch.float64) / half)
    angles = positions3d(grids).to(torch.float64)[:, :, None] * frequencies  # [L, 3, dim/6]
    return torch.cat((angles.sin(), angles.cos()), dim=-1).flatten(1).float()


def timestep_embedding(t: Tensor, dim: int, *, scale: float = 1000.0, max_period: float = 1e4) -> Tensor:
    """Sinusoidal embedding of timesteps, cos half then sin half (as in DiT, Peebles and Xie 2023).

    Args:
        t: [S] in [0, 1]; 0 = data, 1 = noise. Multiplied by `scale` first.
        dim: even.

    Returns:
        float32 [S, dim].
    """
    half = dim // 2
    frequencies = torch.exp(-math.log(max_period) * torch.arange(half, dtype=torch.float32, device=t.device) / half)
    angles = scale * t.float()[:, None] * frequencies
    return torch.cat((angles.cos(), angles.sin()), dim=-1)
