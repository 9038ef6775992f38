"""PSNR and SSIM, held against the paper's formula written out and against figures of scikit-image."""

from __future__ import annotations

import numpy as np
import pytest

from sorahpc.metrics.similarity import psnr_db, ssim


def picture(height: int, width: int, frames: int = 1, seed: int = 0) -> np.ndarray:
    """uint8 [T,H,W,3]: waves of three colours that move."""
    t, y, x = np.meshgrid(np.arange(frames), np.arange(height), np.arange(width), indexing="ij")
    waves = [np.sin(0.3 * x + 0.17 * y + k + 0.5 * t + seed) for k in range(3)]
    return np.round(127.5 + 100 * np.stack(waves, axis=-1)).astype(np.uint8)


def noisy(clip: np.ndarray, sigma: float) -> np.ndarray:
    noise = np.random.default_rng(1).normal(0, sigma, clip.shape)
    return np.clip(np.round(clip + noise), 0, 255).astype(np.uint8)


def written_out(a: np.ndarray, b: np.ndarray) -> float:
    """Equations 13 to 17 of the paper: sums over each window, two-dimensional, one window after the other."""
    at = np.arange(11) - 5
    w = np.exp(-(at[:, None] ** 2 + at[None] ** 2) / (2 * 1.5**2))
    w /= w.sum()
    found = []
    for x, y in zip(a @ np.array([0.299, 0.587, 0.114]), b @ np.array([0.299, 0.587, 0.114]), strict=True):
        for i in range(x.shape[0] - 10):
            for j in range(x.shape[1] - 10):
                p, q = x[i : i + 11, j : j + 11], y[i : i + 11, j : j + 11]
                mp, mq = (w * p).sum(), (w * q).sum()
                vp, vq, c = (w * (p - mp) ** 2).sum(), (w * (q - mq) ** 2).sum(), (w * (p - mp) * (q - mq)).sum()
                c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
                found.append((2 * mp * mq + c1) * (2 * c + c2) / ((mp**2 + mq**2 + c1) * (vp + vq + c2)))
    return float(np.mean(found))


def test_ssim_is_the_papers_formula_on_each_frames_luma() -> None:
    clip = picture(19, 26, frames=2)
    for other in (noisy(clip, 20), picture(19, 26, frames=2, seed=1), 255 - clip):
        assert ssim(clip, other) == pytest.approx(written_out(clip, other), abs=1e-9)


def test_ssim_is_that_of_scikit_image() -> None:
    """0.26: structural_similarity(luma, luma, gaussian_weights, sigma 1.5, no sample covariance, data_range 255)."""
    clip = picture(37, 52)
    assert ssim(clip, noisy(clip, 20)) == pytest.approx(0.8758004456865507, abs=1e-9)
    assert ssim(clip, picture(37, 52, seed=1)) == pytest.approx(0.3809885821404754, abs=1e-9)


def test_ssim_is_1_for_equal_clips_falls_with_noise_and_is_symmetric() -> None:
    clip = picture(32, 48, frames=3)
    found = [ssim(clip, noisy(clip, sigma)) for sigma in (0, 5, 20, 60)]
    assert found[0] == pytest.approx(1.0, abs=1e-12) and found == sorted(found, reverse=True)
    assert ssim(noisy(clip, 20), clip) == pytest.approx(found[2])
    assert ssim(clip, 255 - clip) < 0


def test_a_clip_under_the_window_has_no_ssim_and_two_sizes_are_refused() -> None:
    assert ssim(picture(8, 64), picture(8, 64)) is None
    assert ssim(picture(11, 11), picture(11, 11)) == pytest.approx(1)
    for other in (picture(16, 17), picture(16, 16, frames=2), picture(16, 16)[0]):
        with pytest.raises(ValueError, match="two clips"):
            ssim(picture(16, 16), other)


def test_psnr_of_a_constant_error_is_known_and_equal_clips_have_99_db() -> None:
    clip = np.full((2, 4, 4, 3), 100, np.uint8)
    assert psnr_db(clip, clip + 5) == pytest.approx(20 * np.log10(255 / 5))
    assert psnr_db(clip, clip) == 99.0
