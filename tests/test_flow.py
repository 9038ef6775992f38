"""Timestep and text drop of a sample depend on (seed, sample id, visit) alone."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from sorahpc.config import TrainConfig
from sorahpc.diffusion import flow

TRAIN = TrainConfig(steps=1, tokens_per_pack=1, warmup_steps=0)


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
