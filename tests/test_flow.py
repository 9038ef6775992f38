"""Noise, timestep and text drop of a sample depend on (seed, sample id, visit) alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats

from sorahpc.config import TrainConfig
from sorahpc.diffusion import flow

TRAIN = TrainConfig(steps=1, tokens_per_pack=1, warmup_steps=0)


def test_noise_is_standard_normal() -> None:
    x = flow.noise(1, 2**62 + 5, 0, (16, 8, 32, 32)).double().numpy().ravel()
    assert abs(x.mean()) < 4 / np.sqrt(x.size)
    assert abs(x.std() - 1) < 4 / np.sqrt(2 * x.size)
    assert stats.kstest(x, "norm").pvalue > 1e-3


def test_noise_of_other_samples_visits_and_seeds_is_uncorrelated() -> None:
    keys = [(0, 1, 0), (0, 2, 0), (0, 1, 1), (1, 1, 0), (0, 2**62, 0), (2, 0, 1), (1, 0, 2)]
    x = torch.stack([flow.noise(*key, (4, 4, 64, 64)).flatten() for key in keys])
    off_diagonal = torch.corrcoef(x) - torch.eye(len(keys))
    assert off_diagonal.abs().max() < 5 / np.sqrt(x.shape[1])


def test_noise_is_the_same_again() -> None:
    assert torch.equal(flow.noise(3, 7, 2, (2, 3, 4, 5)), flow.noise(3, 7, 2, (2, 3, 4, 5)))


def test_timesteps_follow_the_mixture_and_text_is_dropped_as_often_as_asked() -> None:
    draws = [flow.draw(0, i, 0, TRAIN) for i in range(20_000)]
    t = np.array([d.t for d in draws])

    def cdf(x: np.ndarray) -> np.ndarray:
        return 0.1 * x + 0.9 * stats.norm.cdf(np.log(x / (1 - x)))

    assert stats.kstest(t, cdf).pvalue > 1e-3
    assert np.mean([d.drop_text for d in draws]) == pytest.approx(0.1, abs=0.01)


def test_shift_moves_timesteps_towards_noise_and_keeps_the_ends() -> None:
    assert flow.shift_timestep(0.0, 3.0) == 0.0
    assert flow.shift_timestep(1.0, 3.0) == pytest.approx(1.0)
    assert flow.shift_timestep(0.5, 3.0) == pytest.approx(0.75)
    assert flow.shift_timestep(0.3, 1.0) == pytest.approx(0.3)


def test_interpolation_ends_at_data_and_noise_and_velocity_is_its_slope() -> None:
    x0, eps = torch.randn(2, 3), torch.randn(2, 3)
    assert torch.equal(flow.interpolate(x0, eps, 0.0)[0], x0)
    assert torch.equal(flow.interpolate(x0, eps, 1.0)[0], eps)
    a, velocity = flow.interpolate(x0.double(), eps.double(), 0.25)
    b, _ = flow.interpolate(x0.double(), eps.double(), 0.75)
    torch.testing.assert_close((b - a) / 0.5, velocity)
