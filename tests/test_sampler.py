"""The Euler sampler and guidance, against velocity fields whose solution is known."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from sorahpc.diffusion.sampler import euler, guided, time_grid


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def test_the_time_grid_falls_from_one_to_zero_and_the_shift_keeps_both_ends() -> None:
    for steps in (1, 2, 7, 30):
        for shift in (0.5, 1.0, 3.0):
            times = time_grid(steps, shift)
            assert len(times) == steps + 1
            assert times[0] == 1.0 and times[-1] == 0.0
            assert all(a > b for a, b in itertools.pairwise(times))


def test_a_shift_above_one_spends_more_steps_near_noise() -> None:
    even, shifted = time_grid(10), time_grid(10, 3.0)
    assert all(s > e for s, e in zip(shifted[1:-1], even[1:-1], strict=True))
    assert shifted[5] == pytest.approx(3 * 0.5 / (1 + 2 * 0.5))


@pytest.mark.parametrize(("steps", "shift"), [(0, 1.0), (-1, 1.0), (5, 0.0), (5, -2.0), (5, math.nan)])
def test_a_grid_that_makes_no_sense_is_refused_with_its_number(steps: int, shift: float) -> None:
    with pytest.raises(ValueError, match=r"steps|t_shift"):
        time_grid(steps, shift)


@pytest.mark.parametrize("steps", [1, 3, 30])
@pytest.mark.parametrize("shift", [1.0, 2.5])
def test_a_single_target_is_reached_exactly_because_its_paths_are_straight(steps: int, shift: float) -> None:
    target = noise(12, 4) * 2 + 1
    x = euler(lambda x, t: (x - target) / t, noise(12, 4), steps, shift)
    torch.testing.assert_close(x, target, rtol=1e-5, atol=1e-5)


def gaussian_error(steps: int, shift: float = 1.0) -> float:
    """Largest error for the target N(mu, s^2), whose flow is x_t = m_t + (v_t / v_1) (x_1 - m_1)."""
    mu, s = 1.5, 0.3
    x1 = torch.linspace(-3, 3, 101, dtype=torch.float64)[:, None]

    def velocity(x: torch.Tensor, t: float) -> torch.Tensor:
        variance = (1 - t) ** 2 * s**2 + t**2
        eps = t * (x - (1 - t) * mu) / variance
        x0 = mu + (1 - t) * s**2 * (x - (1 - t) * mu) / variance
        return eps - x0

    exact = mu + s * x1
    return float((euler(velocity, x1, steps, shift) - exact).abs().max())


@pytest.mark.parametrize("shift", [1.0, 2.0])
def test_the_error_on_a_gaussian_halves_when_the_steps_double(shift: float) -> None:
    errors = [gaussian_error(steps, shift) for steps in (50, 100, 200)]
    for coarse, fine in itertools.pairwise(errors):
        assert 1.8 < coarse / fine < 2.2, errors
    assert errors[-1] < 0.015


def test_the_input_noise_is_left_as_it_was_and_no_graph_is_kept() -> None:
    x = noise(5, 3)
    before = x.clone()
    weight = torch.ones(3, requires_grad=True)
    out = euler(lambda x, t: x * weight, x, 2)
    assert torch.equal(x, before)
    assert not out.requires_grad


class Spy:
    """A model whose velocity is the mean of its sample's text, so that guidance can be worked out by hand."""

    def __init__(self) -> None:
        self.calls: list[tuple[int, int]] = []

    def __call__(
        self,
        tokens: torch.Tensor,
        t: torch.Tensor,
        grids: torch.Tensor,
        text: torch.Tensor,
        lens: list[int],
        *clip: None,
    ) -> torch.Tensor:
        counts = grids.prod(1).tolist()
        assert sum(counts) == len(tokens) and sum(lens) == len(text) and len(t) == len(grids) == len(lens)
        self.calls.append((len(tokens), len(lens)))
        means = [e.mean() for e in text.split(lens)]
        return torch.cat([torch.full((n, tokens.shape[1]), float(m)) for n, m in zip(counts, means, strict=True)])


GRIDS = torch.tensor([[2, 1, 3], [1, 4, 1]])
TEXTS = [{"text": torch.full((3, 8), 2.0)}, {"text": torch.full((1, 8), 5.0)}]
EMPTY = {"text": torch.full((2, 8), 1.0)}


def test_guidance_is_the_unconditional_velocity_plus_scale_times_the_difference() -> None:
    spy = Spy()
    v = guided(spy, GRIDS, TEXTS, EMPTY, 3.0)(torch.zeros(10, 4), 0.5)
    assert torch.equal(v[:6], torch.full((6, 4), 1 + 3 * (2.0 - 1)))
    assert torch.equal(v[6:], torch.full((4, 4), 1 + 3 * (5.0 - 1)))
    assert spy.calls == [(20, 4)], "one call with both halves in one pack"


def test_scale_one_runs_only_the_conditional_half() -> None:
    spy = Spy()
    v = guided(spy, GRIDS, TEXTS, EMPTY, 1.0)(torch.zeros(10, 4), 0.5)
    assert spy.calls == [(10, 2)]
    assert torch.equal(v, torch.tensor([2.0] * 6 + [5.0] * 4)[:, None].expand(10, 4))


def test_scale_zero_ignores_the_prompt() -> None:
    v = guided(Spy(), GRIDS, TEXTS, EMPTY, 0.0)(torch.zeros(10, 4), 0.5)
    assert torch.equal(v, torch.ones(10, 4))


def test_guided_refuses_grids_that_are_not_one_a_text() -> None:
    with pytest.raises(ValueError, match=r"grids: \[2, 3\] for 2 texts, not \[1, 3\]"):
        guided(Spy(), GRIDS[:1], TEXTS, EMPTY, 3.0)
