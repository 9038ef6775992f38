"""How near a clip is to another, from their pixels: PSNR and SSIM.

PSNR is of the squared error over all values. SSIM (Wang, Bovik, Sheikh, Simoncelli, "Image quality assessment: from
error visibility to structural similarity", IEEE Trans. Image Processing 13(4), 2004) compares local means, contrasts
and structure of each frame's luma under a Gaussian window.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch.nn import functional as F

PEAK = 255.0
WINDOW_PX, SIGMA_PX, K1, K2 = 11, 1.5, 0.01, 0.03  # the paper's
LUMA = (0.299, 0.587, 0.114)  # BT.601, on the grey of which the paper's images were judged


def psnr_db(a: np.ndarray, b: np.ndarray) -> float:
    """Peak signal-to-noise ratio of uint8 clips in dB, from the mean squared error over all values; 99 if equal."""
    error = float(np.mean((a.astype(np.float64) - b.astype(np.float64)) ** 2))
    return 99.0 if error == 0 else min(99.0, 10 * math.log10(PEAK**2 / error))


def ssim(a: np.ndarray, b: np.ndarray) -> float | None:
    """Mean structural similarity of two clips, frame by frame; 1 if equal. None if a side is under the window's 11 px.

    As in the paper: luma, a Gaussian of 11 x 11 and sigma 1.5 whose weights sum to 1, K1 = 0.01, K2 = 0.03, the mean
    over the places where the window lies in the frame whole. No frame is made smaller first, whatever its size.

    Args:
        a, b: uint8 [T,H,W,3], RGB.

    Raises:
        ValueError: not two clips of one size.
    """
    if a.shape != b.shape or a.ndim != 4 or a.shape[-1] != 3 or not len(a):
        raise ValueError(f"two clips [T,H,W,3] of one size expected, found {list(a.shape)} and {list(b.shape)}")
    if min(a.shape[1:3]) < WINDOW_PX:
        return None
    at = torch.arange(WINDOW_PX, dtype=torch.float64) - WINDOW_PX // 2
    window = torch.exp(-at.square() / (2 * SIGMA_PX**2))
    window /= window.sum()
    # A frame at a time: five float64 maps of it are all the memory that this takes.
    return float(np.mean([_ssim_frame(_luma(x), _luma(y), window) for x, y in zip(a, b, strict=True)]))


def _luma(frame: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(frame.astype(np.float64) @ np.array(LUMA))


def _ssim_frame(x: torch.Tensor, y: torch.Tensor, window: torch.Tensor) -> float:
    maps = torch.stack([x, y, x * x, y * y, x * y])[:, None]  # [5,1,H,W]
    mean_x, mean_y, xx, yy, xy = F.conv2d(F.conv2d(maps, window.view(1, 1, -1, 1)), window.view(1, 1, 1, -1))
    c1, c2 = (K1 * PEAK) ** 2, (K2 * PEAK) ** 2
    structure = (2 * (xy - mean_x * mean_y) + c2) / (xx - mean_x**2 + yy - mean_y**2 + c2)
    return float(((2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1) * structure).mean())
