"""The global batch is a pure function of (seed, samples consumed)."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sorahpc.data.packing import Packer
from sorahpc.errors import DataError


def _packer(tokens: list[int], packs: int, budget: int, seed: int = 0) -> Packer:
    array = np.array(tokens, dtype=np.int64)
    return Packer(array, array, seed=seed, packs_per_step=packs, tokens_per_pack=budget, dim=64)


def _stream(packer: Packer, start: int, count: int) -> list[tuple[int, int]]:
    return [packer._at(position) for position in range(start, start + count)]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(1, 50), min_size=1, max_size=40),
    st.integers(1, 6),
    st.integers(50, 200),
    st.integers(0, 10**6),
)
def test_a_batch_is_the_next_samples_of_the_stream_whole_and_within_budget(
    tokens: list[int], packs: int, budget: int, consumed: int
) -> None:
    packer = _packer(tokens, packs, budget)
    batch = packer.next(consumed)
    count = batch.consumed - consumed
    assert count >= packs
    assert sorted(s for pack in batch.packs for s in pack) == sorted(_stream(packer, consumed, count))
    for pack in batch.packs:
        assert pack
        assert sum(tokens[sample] for sample, _ in pack) <= budget


def test_every_epoch_visits_each_sample_once_across_batches() -> None:
    packer = _packer(list(range(1, 38)), 2, 60)
    seen: list[tuple[int, int]] = []
    consumed = 0
    while consumed < 3 * 37:
        batch = packer.next(consumed)
        seen += [s for pack in batch.packs for s in pack]
        consumed = batch.consumed
    for visit in range(3):
        assert sorted(sample for sample, v in seen if v == visit) == list(range(37))


def test_a_fresh_packer_continues_where_another_stopped() -> None:
    tokens = list(range(5, 30))
    first, consumed = _packer(tokens, 3, 64), 0
    for _ in range(7):
        consumed = first.next(consumed).consumed
    assert _packer(tokens, 3, 64).next(consumed) == first.next(consumed)
    assert _packer(tokens, 3, 64, seed=1).next(consumed) != first.next(consumed)


def test_packs_of_one_batch_have_even_cost() -> None:
    rng = np.random.default_rng(0)
    tokens = rng.integers(16, 400, 2000)
    packer = Packer(tokens, tokens, seed=0, packs_per_step=64, tokens_per_pack=4096, dim=512)
    shares, fills = [], []
    consumed = 0
    for _ in range(5):
        batch = packer.next(consumed)
        consumed = batch.consumed
        cost = np.array([sum(packer.cost[s] for s, _ in pack) for pack in batch.packs])
        shares.append(cost.mean() / cost.max())
        fills.append(sum(tokens[s] for pack in batch.packs for s, _ in pack) / (64 * 4096))
    assert min(shares) > 0.97
    assert min(fills) > 0.97


def test_samples_of_equal_shape_lie_together_in_a_pack() -> None:
    packer = _packer([4, 9, 4, 9, 4, 9, 4, 9], 1, 52)
    lengths = [packer.tokens[s] for s, _ in packer.next(0).packs[0]]
    assert lengths == sorted(lengths)


def test_a_sample_no_pack_can_hold_is_refused_with_the_numbers() -> None:
    with pytest.raises(DataError, match=r"train\.tokens_per_pack: 100, but sample 1 .* 101 tokens"):
        _packer([5, 101], 1, 100)
    with pytest.raises(DataError, match="no samples"):
        _packer([], 1, 100)
