"""`profile kernels`: peers compute what ours does, and rows say what was measured."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import torch
from kernel_rows import CPU, fails, make_case, make_node

from sorahpc import ops
from sorahpc.config import KERNEL_CASES
from sorahpc.errors import NumericsError
from sorahpc.profiling.cases import CASES, Case, kernel_cases
from sorahpc.profiling.results import OURS, read_csv, read_node, write_csv, write_node
from sorahpc.profiling.timing import check, copies, copy_limit, interleaved_times, large_buffer, matmul_limit, measure


@pytest.mark.parametrize("name", CASES)
def test_every_eager_peer_computes_what_our_op_does(name: str) -> None:
    cases = list(kernel_cases(CPU, small=True, only=name))
    assert [case.dtype for case in cases] == [torch.float32, torch.bfloat16]
    for case in cases:
        case.calls = {name: call for name, call in case.calls.items() if not name.startswith("compile")}
        assert next(iter(case.calls)) == OURS and len(case.calls) > 1
        check(case)


def test_a_peer_that_computes_something_else_is_not_timed() -> None:
    expected = r"K0 twice torch.float32: result 0 of `eager` differs from that of `sorahpc` by 5.0e-02"
    with pytest.raises(NumericsError, match=expected):
        list(measure([make_case(0.1)], CPU, repeats=3))


def test_a_peer_that_cannot_be_called_is_left_out_and_said_and_ours_is_not(
    caplog: pytest.LogCaptureFixture,
) -> None:
    case = make_case()
    case.calls |= {"broken": fails, "broken when timed": fails}
    case.results["broken when timed"] = case.calls["eager"]
    assert [row.candidate for row in measure([case], CPU, repeats=3)] == [OURS, "eager"]
    reason = "RuntimeError: no kernel image for this device"
    assert case.left_out == {"broken": reason, "broken when timed": reason}
    told = [record.getMessage() for record in caplog.records]
    assert told == [f"K0 twice float32: `{name}` is left out: {reason}" for name in case.left_out]
    case.calls[OURS] = fails
    with pytest.raises(RuntimeError, match="no kernel image"):
        list(measure([case], CPU, repeats=3))


@pytest.mark.parametrize("result", [lambda: torch.ones(1), lambda: (torch.full((1000,), 2.0), torch.ones(1000))])
def test_a_peer_with_results_of_other_shapes_is_not_timed(result: Any) -> None:
    case = make_case()
    case.calls["other"] = result
    with pytest.raises(
        NumericsError, match=r"K0 twice torch.float32: `other` returns .*, expected as `sorahpc` \(1000,"
    ):
        check(case)


def test_rows_hold_medians_of_all_candidates_and_survive_as_csv_and_json(tmp_path: Path) -> None:
    rows = list(measure([make_case()], CPU, repeats=5))
    assert [row.candidate for row in rows] == [OURS, "eager"]
    ours, eager = rows
    assert ours.ours_is_faster_by == 1.0 and 0 < ours.p10_ms <= ours.median_ms <= ours.p90_ms
    assert ours.gb_s == pytest.approx(8000 / (ours.median_ms * 1e-3) / 1e9, rel=0.1, abs=0.01)
    assert ours.gflop_s == pytest.approx(1000 / (ours.median_ms * 1e-3) / 1e9, rel=0.1, abs=0.01)
    write_csv(rows, tmp_path / "new/rows.csv")
    assert read_csv(tmp_path / "new/rows.csv") == rows
    with (tmp_path / "new/rows.csv").open(newline="") as file:
        read = list(csv.DictReader(file))
    assert [row["candidate"] for row in read] == [OURS, "eager"] and read[0]["case"] == "K0 twice"
    node = make_node(rows=(ours, eager))
    write_node(node, tmp_path / "node.json")
    assert read_node(tmp_path / "node.json") == node


def test_peak_memory_is_that_of_a_call_and_not_of_those_before() -> None:
    x = torch.ones(1 << 20)
    calls: dict[str, Any] = {OURS: lambda: x * 2, "two": lambda: x + x + 0.0, "clones": lambda: (x.clone() * 2).clone()}
    case = Case("K0 twice", torch.float32, "1M", 2 * x.nbytes, 1, calls, 1e-6)
    for _ in range(2):  # a second profile of the same process begins anew
        peaks = [row.peak_mb for row in measure([case], CPU, repeats=3)]
        assert peaks == pytest.approx([4.2, 8.4, 8.4], abs=0.2)


def test_the_limits_are_a_copy_and_a_product_and_stream_copy_is_exact() -> None:
    buffers = [large_buffer(CPU)]
    bytes_per_s, name = copy_limit(interleaved_times(copies(buffers), CPU, repeats=3), buffers)
    assert 1e8 < bytes_per_s < 1e13 and name in ("memcpy", "non-temporal copy")
    assert 1e8 < matmul_limit(CPU, torch.float32, repeats=3) < 1e14
    for x in (
        torch.randn(3, 5, 7),
        torch.randn(70_001, dtype=torch.float64),
        torch.randn(8, 6)[:, ::2],
        torch.empty(0),
    ):
        assert torch.equal(ops.stream_copy(x), x) and ops.stream_copy(x).is_contiguous()
    with pytest.raises(ValueError, match=r"x is torch\.int32"):
        ops.stream_copy(torch.zeros(3, dtype=torch.int32))


def test_the_config_knows_the_cases() -> None:
    assert tuple(CASES) == KERNEL_CASES
