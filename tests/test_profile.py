"""The benchmark itself: it refuses candidates that compute something else, and its rows say what was measured."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch

from sorahpc import ops
from sorahpc.errors import NumericsError
from sorahpc.jobs.profile import check, copy_limit, measure, write_csv
from sorahpc.ops.cases import CASES, OURS, Case, kernel_cases

CPU = torch.device("cpu")


def make_case(difference: float = 0.0) -> Case:
    x = torch.ones(1000)
    calls = {OURS: lambda: x * 2, "eager": lambda: x + x + difference}
    return Case("K0 twice", torch.float32, "1000", 2 * x.nbytes, dict(calls), 1e-6, dict(calls))


@pytest.mark.parametrize("name", CASES)
def test_every_eager_peer_computes_what_our_op_does(name: str) -> None:
    cases = list(kernel_cases(CPU, small=True, only=name))
    assert [case.dtype for case in cases] == [torch.float32, torch.bfloat16]
    for case in cases:
        case.results = {name: call for name, call in case.results.items() if not name.startswith("compile")}
        assert next(iter(case.calls)) == OURS and len(case.results) > 1
        check(case)


def test_a_peer_that_computes_something_else_is_not_timed() -> None:
    with pytest.raises(NumericsError, match=r"K0 twice torch.float32: `eager` differs from `sorahpc` by 5.0e-02"):
        list(measure([make_case(0.1)], CPU, repeats=3))


def test_rows_hold_medians_of_all_candidates_and_survive_as_csv(tmp_path: Path) -> None:
    rows = list(measure([make_case()], CPU, repeats=5))
    assert [row.candidate for row in rows] == [OURS, "eager"]
    ours = rows[0]
    assert ours.ours_is_faster_by == 1.0 and 0 < ours.p10_ms <= ours.median_ms <= ours.p90_ms
    assert ours.gb_s == pytest.approx(8000 / (ours.median_ms * 1e-3) / 1e9, rel=0.1, abs=0.01)
    write_csv(rows, tmp_path / "new/rows.csv")
    with (tmp_path / "new/rows.csv").open(newline="") as file:
        read = list(csv.DictReader(file))
    assert [row["candidate"] for row in read] == [OURS, "eager"] and read[0]["case"] == "K0 twice"


def test_the_limit_is_a_copy_and_stream_copy_is_exact() -> None:
    bytes_per_s, name = copy_limit(CPU, repeats=3)
    assert 1e8 < bytes_per_s < 1e13 and name in ("memcpy", "non-temporal copy")
    for x in (
        torch.randn(3, 5, 7),
        torch.randn(70_001, dtype=torch.float64),
        torch.randn(8, 6)[:, ::2],
        torch.empty(0),
    ):
        assert torch.equal(ops.stream_copy(x), x) and ops.stream_copy(x).is_contiguous()
    with pytest.raises(ValueError, match=r"x is torch\.int32"):
        ops.stream_copy(torch.zeros(3, dtype=torch.int32))
