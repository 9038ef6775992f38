"""`profile kernels`: peers compute what ours does, rows say what was measured, a baseline is held to."""

from __future__ import annotations

import csv
import dataclasses
import importlib.util
import itertools
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from sorahpc import cli, ops
from sorahpc.cli.launching import launch_job, left_out
from sorahpc.config import KERNEL_CASES
from sorahpc.configfile import parse_config
from sorahpc.errors import ConfigError, DataError, NumericsError, SlowerError, SoraHPCError, Stopped
from sorahpc.jobs import kernels
from sorahpc.page import roofline
from sorahpc.profiling.cases import CASES, Case, kernel_cases
from sorahpc.profiling.machine import slug
from sorahpc.profiling.page import write_profile_page
from sorahpc.profiling.results import (
    OURS,
    Ceiling,
    Node,
    Row,
    compare,
    merged,
    read_csv,
    read_node,
    write_csv,
    write_node,
)
from sorahpc.profiling.timing import check, copies, copy_limit, interleaved_times, large_buffer, matmul_limit, measure
from sorahpc.runs import Task, write_json

CPU = torch.device("cpu")


def make_case(difference: float = 0.0, name: str = "K0 twice") -> Case:
    x = torch.ones(1000)
    calls: dict[str, Any] = {OURS: lambda: x * 2, "eager": lambda: x + x + difference}
    return Case(name, torch.float32, "1000", 2 * x.nbytes, 1000, calls, 1e-6)


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


def fails(*_: Any) -> torch.Tensor:
    raise RuntimeError("no kernel image\n for this device")


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


# ---------------------------------------------------------------------------------------------------------------------
# Baselines


def make_row(median_ms: float, **changes: Any) -> Row:
    row = Row(
        date="2026-01-01 00:00", device="A", threads=1, torch="2", commit="c", case="K1 rope", dtype="float32",
        shape="L=1", candidate=OURS, median_ms=median_ms, p10_ms=1.0, p90_ms=2.0, gb_s=10.0, gflop_s=5.0, of_limit=0.9,
        limit_gb_s=11.0, ours_is_faster_by=1.0, peak_mb=3.0,
    )  # fmt: skip
    return dataclasses.replace(row, **changes)


def make_node(device: str = "A", rows: tuple[Row, ...] = (), **changes: Any) -> Node:
    ceilings = (Ceiling("copy", "any", 1, 20.0, "memcpy"), Ceiling("matmul", "float32", 1, 100.0, "torch.matmul"))
    node = Node(device, "node1", "2026-01-01 00:00", "2", "c", ceilings, rows)
    return dataclasses.replace(node, **changes)


def test_our_rows_are_compared_with_the_same_rows_of_the_baseline() -> None:
    before = make_node(rows=(make_row(10.0), make_row(5.0, dtype="bfloat16"), make_row(1.0, candidate="eager")))
    now = make_node(
        rows=(make_row(11.5), make_row(4.0, dtype="bfloat16"), make_row(9.0, candidate="eager"), make_row(1, shape="x"))
    )
    changes = compare(now, before)
    assert [(c.row.dtype, pytest.approx(c.slower_by)) for c in changes] == [("float32", 0.15), ("bfloat16", -0.2)]
    with pytest.raises(DataError, match=r"kernels.baseline: that of 2026-01-01 00:00 has no row of the case"):
        compare(make_node(rows=(make_row(1.0, threads=2),)), before)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0, 0.0, True, "1", 10**400, None])
def test_a_baseline_of_figures_that_nothing_can_take_is_one_line(tmp_path: Path, value: Any) -> None:
    write_node(make_node(rows=(make_row(1.0),)), tmp_path / "b.json")
    data = json.loads((tmp_path / "b.json").read_text())
    assert read_node(tmp_path / "b.json").rows[0].median_ms == 1.0
    for changed in (data["rows"][0] | {"median_ms": value}, data["rows"][0] | {"gb_s": value or -1}):
        (tmp_path / "b.json").write_text(json.dumps(data | {"rows": [changed]}))
        with pytest.raises(DataError, match=r"b\.json: not what .* writes \((median_ms|gb_s|int too large)"):
            read_node(tmp_path / "b.json")
    (tmp_path / "b.json").write_text(json.dumps(data | {"ceilings": [data["ceilings"][0] | {"value": value}]}))
    with pytest.raises(DataError, match=r"b\.json: not what .* writes \((value|int too large)"):
        read_node(tmp_path / "b.json")


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"ceilings": []}, "one copy with 1 threads expected, found 0"),
        ({"ceilings": 2 * [{"name": "copy", "dtype": "a", "threads": 1, "value": 1, "how": ""}]}, "found 2"),
        ({"format": True}, "a JSON mapping of format 2 expected"),
        ({"device": " "}, "device: ' '"),
        ({"small": 1}, "small: '1'"),
        ({"rows": [{"date": ""}]}, "no 'device'"),
    ],
)
def test_a_file_that_no_page_can_show_is_one_line(tmp_path: Path, changes: dict[str, Any], expected: str) -> None:
    write_node(make_node(rows=(make_row(1.0),)), tmp_path / "r/kernels/b.json")
    data = json.loads((tmp_path / "r/kernels/b.json").read_text())
    (tmp_path / "r/kernels/b.json").write_text(json.dumps(data | changes))
    with pytest.raises(DataError, match=rf"b\.json: not what .* writes \(.*{expected}"):
        write_profile_page([tmp_path / "r"], tmp_path / "page.html")


@pytest.mark.parametrize("text", ["", "{", "[1]", '{"format": "1"}', '{"format": 2, "rows": [{}], "ceilings": []}'])
def test_a_baseline_that_is_none_is_one_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "b.json").write_text(text)
    with pytest.raises(DataError, match=r"b\.json: not what `sorahpc profile kernels` writes") as caught:
        read_node(tmp_path / "b.json")
    assert "\n" not in str(caught.value)


def test_a_file_of_another_format_says_so_and_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "b.json").write_text('{"format": 1, "copies": []}')
    expected = r"b\.json: format 2 expected, found 1, of another version of sorahpc; move it away, and measure again"
    with pytest.raises(DataError, match=expected):
        read_node(tmp_path / "b.json")


# ---------------------------------------------------------------------------------------------------------------------
# The job


@pytest.fixture
def one_case(monkeypatch: pytest.MonkeyPatch) -> None:
    """The job with one case that takes no time."""

    def cases(device: torch.device, small: bool, only: str) -> Iterator[Case]:
        yield make_case()

    monkeypatch.setattr(kernels, "kernel_cases", cases)
    monkeypatch.setattr(kernels.timing, "ceilings", lambda *_: make_node().ceilings)


def run(tmp_path: Path, **changes: Any) -> Path:
    """Run the job; the folder `profile/kernels` of its run."""
    data = {"run": "p", "runs_dir": str(tmp_path / "runs"), "kernels": {"repeats": 3, **changes}}
    config = parse_config(data)
    kernels.profile(config, Task(config.run_dir, "profile-kernels"))
    return config.run_dir / "profile" / "kernels"


@pytest.mark.usefixtures("one_case")
def test_the_job_writes_json_csv_and_a_page_and_holds_to_its_baseline(tmp_path: Path) -> None:
    folder = run(tmp_path)
    file = folder / f"{slug(CPU)}.json"
    assert sorted(p.name for p in folder.iterdir()) == sorted([file.name, file.with_suffix(".csv").name])
    text = (folder.parent / "index.html").read_text()
    assert "K0 twice" in text and "<script" not in text and "Roofline" in text
    kept = shutil.copytree(folder, tmp_path / "kept")
    run(tmp_path, baseline=str(kept), margin=10.0)
    run(tmp_path, baseline=str(kept / file.name), margin=10.0)

    baseline = tmp_path / "faster.json"  # than any machine
    data = json.loads(file.read_text())
    for row in data["rows"]:
        row["median_ms"] /= 1e6
    baseline.write_text(json.dumps(data))
    with pytest.raises(
        SlowerError, match=r"K0 twice float32 1 threads: .* ms in the baseline .* allows \+10%"
    ) as caught:
        run(tmp_path, baseline=str(baseline))
    assert caught.value.exit_code == 17 and file.is_file(), "what was measured is kept"
    data["device"] = "H200"
    baseline.write_text(json.dumps(data))
    with pytest.raises(DataError, match=r"kernels.baseline: expected one of .*, found one of H200"):
        run(tmp_path, baseline=str(baseline))
    with pytest.raises(DataError, match=rf"runs/{slug(CPU)}.json: no such file; `sorahpc profile kernels` writes one"):
        run(tmp_path, baseline=str(tmp_path / "runs"))  # a folder without one of this device


@pytest.mark.usefixtures("one_case")
def test_what_is_not_measured_again_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = run(tmp_path) / f"{slug(CPU)}.json"
    monkeypatch.setattr(kernels, "kernel_cases", lambda *_: iter([make_case(name="K1 other")]))
    run(tmp_path, only="K1")
    first, second = read_node(file).rows[::2]
    assert (first.case, second.case) == ("K0 twice", "K1 other")
    run(tmp_path, only="K1")
    with file.with_suffix(".csv").open(newline="") as table:
        assert [row["case"] for row in csv.DictReader(table)] == ["K0 twice"] * 2 + ["K1 other"] * 2
    other = dataclasses.replace(second, threads=2)
    copy = Ceiling("copy", "any", 2, 1.0, "memcpy")
    node = merged(make_node(rows=(second,)), make_node(rows=(first, second, other), ceilings=(copy,)))
    assert node.rows == (first, second, other) and copy in node.ceilings and len(node.ceilings) == 3


@pytest.mark.usefixtures("one_case")
def test_the_page_says_what_is_left_out_until_it_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case()
    case.calls["Liger"] = fails
    monkeypatch.setattr(kernels, "kernel_cases", lambda *_: iter([case]))
    folder = run(tmp_path)
    file, page = folder / f"{slug(CPU)}.json", folder.parent / "index.html"
    (out,) = read_node(file).left_out
    assert (out.case, out.dtype, out.threads, out.candidate) == ("K0 twice", "float32", 1, "Liger")
    expected = 'Liger</th><td colspan="7">left out: RuntimeError: no kernel image for this device</td>'
    assert expected in page.read_text()
    monkeypatch.setattr(kernels, "kernel_cases", lambda *_: iter([make_case(name="K1 other")]))
    run(tmp_path)
    assert expected in page.read_text(), "what is not measured again stays"
    monkeypatch.setattr(kernels, "kernel_cases", lambda *_: iter([make_case()]))
    run(tmp_path)
    assert "left out" not in page.read_text()
    data = json.loads(file.read_text())
    del data["left_out"]
    file.write_text(json.dumps(data))
    assert read_node(file).left_out == (), "of an earlier version"


@pytest.mark.usefixtures("one_case")
def test_small_sizes_go_to_a_file_of_their_own(tmp_path: Path) -> None:
    file = run(tmp_path) / f"{slug(CPU)}.json"
    before = file.read_bytes()
    folder = run(tmp_path, small=True)
    assert file.read_bytes() == before
    assert read_node(file.with_suffix(".small.json")).small and file.with_suffix(".small.csv").is_file()
    assert (folder.parent / "index.html").read_text().count("no figure here means anything") == 1


@pytest.mark.usefixtures("one_case")
def test_an_earlier_file_that_is_damaged_is_said_before_measuring(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = run(tmp_path) / f"{slug(CPU)}.json"
    file.write_text("{")
    monkeypatch.setattr(kernels, "_measure", lambda *_: pytest.fail("measured"))
    with pytest.raises(DataError, match=r"json: not what `sorahpc profile kernels` writes .*; remove it, and measure"):
        run(tmp_path)


@pytest.mark.usefixtures("one_case")
def test_a_baseline_that_the_run_would_replace_or_that_fits_nothing_is_refused_before_measuring(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = run(tmp_path)
    file = folder / f"{slug(CPU)}.json"
    (tmp_path / "link").symlink_to(folder)
    kept = shutil.copytree(folder, tmp_path / "kept")
    monkeypatch.setattr(kernels, "_measure", lambda *_: pytest.fail("measured"))
    for baseline in (folder, file, tmp_path / "link"):
        with pytest.raises(ConfigError, match=r"kernels.baseline: .* is the file that this run writes; copy it else"):
            run(tmp_path, baseline=str(baseline))
    for changes in ({"threads": [3]}, {"only": "K1"}, {"small": True, "baseline": str(kept / file.name)}):
        with pytest.raises(DataError, match=r"kernels.baseline: .* has no row of the case, dtype, shape and threads"):
            run(tmp_path, **{"baseline": str(kept), **changes})


@pytest.mark.usefixtures("one_case")
def test_what_has_no_counterpart_in_the_baseline_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    kept = shutil.copytree(run(tmp_path), tmp_path / "kept")
    cases = [make_case(), make_case(name="K1 other")]
    monkeypatch.setattr(kernels, "kernel_cases", lambda *_: iter(cases))
    run(tmp_path, baseline=str(kept), margin=10.0)
    assert "kernels.baseline: 1 of the 2 ops measured now have no counterpart" in caplog.text
    config = parse_config({"run": "p", "runs_dir": str(tmp_path / "runs")})
    assert left_out(config, "profile-kernels") == (
        {"compared": 1, "not_in_baseline": 1},
        ["1 ops are no slower than kernels.baseline allows; 1 have no counterpart in it and are held to nothing"],
    )
    run(tmp_path)
    assert left_out(config, "profile-kernels") == ({}, []), "of another measurement"


@pytest.mark.usefixtures("one_case")
def test_a_damaged_file_of_another_job_costs_the_page_and_not_the_measurement(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    damaged = tmp_path / "runs/p/profile/train/x_rank0.json"
    damaged.parent.mkdir(parents=True)
    damaged.write_text("{")
    assert (run(tmp_path) / f"{slug(CPU)}.json").is_file()
    assert "no page: " in caplog.text and "x_rank0.json" in caplog.text


@pytest.mark.usefixtures("one_case")
def test_a_measurement_that_is_stopped_at_once_leaves_nothing(tmp_path: Path) -> None:
    config = parse_config({"run": "p", "runs_dir": str(tmp_path)})
    with pytest.raises(Stopped, match=r"after 0 of 12 cases$"):
        kernels.profile(config, Task(config.run_dir, "profile-kernels", stop_requested=lambda: True))
    assert not (config.run_dir / "profile").exists()


class Lives:
    """A job of three cases, of which some lives measure only some."""

    def __init__(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        data = {"run": "p", "runs_dir": str(tmp_path / "runs"), "kernels": {"repeats": 3, "threads": [1]}}
        self.config, self.measured = parse_config(data), list[str]()
        self.folder = self.config.run_dir / "profile/kernels"
        self.file = self.folder / f"{slug(CPU)}.json"
        self.fail_at = ""
        times = itertools.count(1)

        def measure(cases: list[Case], device: torch.device, repeats: int) -> Iterator[Row]:
            if cases[0].name == self.fail_at:
                raise KeyboardInterrupt
            self.measured.append(cases[0].name)
            for candidate in (OURS, "eager"):
                yield make_row(float(next(times)), case=cases[0].name, shape=cases[0].shape, candidate=candidate)

        monkeypatch.setattr(kernels.timing, "measure", measure)
        monkeypatch.setattr(kernels.timing, "ceilings", lambda *_: make_node().ceilings)
        monkeypatch.setattr(kernels, "kernel_cases", lambda *_: iter([make_case(name=f"K{i} x") for i in (1, 2, 3)]))
        self.launch(1.0)

    def launch(self, at: float) -> None:
        write_json(self.config.run_dir / "jobs/profile-kernels/launch.json", {"kind": "slurm", "time": at})

    def live(self, restart: int, stop_after: int = 99) -> list[str]:
        """Names of the cases that are measured."""
        self.measured.clear()
        stop = lambda: len(self.measured) >= stop_after  # noqa: E731
        task = Task(self.config.run_dir, "profile-kernels", restart=restart, stop_requested=stop)
        kernels.profile(self.config, task)
        return self.measured


def test_a_stopped_measurement_keeps_its_cases_and_a_requeued_one_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    lives = Lives(tmp_path, monkeypatch)
    with pytest.raises(Stopped, match=rf"stopped on request after 1 of 12 cases, which are in .*/{lives.file.name}$"):
        lives.live(restart=0, stop_after=1)
    assert [row.case for row in read_node(lives.file).rows] == ["K1 x"] * 2
    assert lives.file.with_suffix(".csv").read_text().count("K1 x") == 2
    assert "K1 x" in (lives.folder.parent / "index.html").read_text()
    first = read_node(lives.file).rows
    with pytest.raises(Stopped, match="after 2 of 12 cases, which are in"):
        lives.live(restart=1, stop_after=1)
    assert lives.measured == ["K2 x"]
    with caplog.at_level("INFO"):
        assert lives.live(restart=2) == ["K3 x"]
    assert "requeued: cases that this job has measured on this node, and does not again: 2" in caplog.text
    assert lives.live(restart=3) == []
    node = read_node(lives.file)
    assert [row.case for row in node.rows[::2]] == ["K1 x", "K2 x", "K3 x"] and node.rows[:2] == first


def test_what_a_crash_leaves_is_kept_as_well(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lives = Lives(tmp_path, monkeypatch)
    lives.fail_at = "K3 x"
    with pytest.raises(KeyboardInterrupt):
        lives.live(restart=0)
    (lives.folder / f".{lives.file.name}.host.1.2.tmp").write_text("half")
    assert [row.case for row in read_node(lives.file).rows[::2]] == ["K1 x", "K2 x"]
    lives.fail_at = ""
    assert lives.live(restart=1) == ["K3 x"]
    assert not list(lives.folder.glob(".*")), "what a killed writer left aside"


@pytest.mark.parametrize(
    "change", ["new launch", "launched again", "other node", "other device", "file gone", "damaged", "edited"]
)
def test_all_is_measured_anew_unless_it_is_the_same_job_on_the_same_node(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    lives = Lives(tmp_path, monkeypatch)
    with pytest.raises(Stopped):
        lives.live(restart=0, stop_after=2)
    if change == "launched again":
        lives.launch(2.0)
    elif change == "other node":
        monkeypatch.setattr("socket.gethostname", lambda: "node9")
    elif change == "other device":
        monkeypatch.setattr(kernels, "device_name", lambda _: "B")
    elif change == "file gone":
        lives.file.unlink()
    progress = lives.config.run_dir / "jobs/profile-kernels/measured.json"
    if change == "damaged":
        progress.write_text("{")
    elif change == "edited":
        write_json(progress, json.loads(progress.read_text()) | {"cases": 3})
    assert lives.live(restart=0 if change == "new launch" else 1) == ["K1 x", "K2 x", "K3 x"]


def test_the_baseline_is_held_to_what_the_job_measured_before_it_was_requeued(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lives = Lives(tmp_path, monkeypatch)
    lives.live(restart=0)
    node = read_node(lives.file)
    faster = tuple(dataclasses.replace(row, median_ms=row.median_ms / 1e4) for row in node.rows)
    write_node(dataclasses.replace(node, rows=faster), tmp_path / "faster.json")
    wanted = lives.config.kernels.model_copy(update={"baseline": tmp_path / "faster.json"})
    lives.config = lives.config.model_copy(update={"kernels": wanted})
    with pytest.raises(Stopped):
        lives.live(restart=0, stop_after=2)
    with pytest.raises(SlowerError) as caught:
        lives.live(restart=1)
    assert lives.measured == ["K3 x"]
    assert [f"K{i} x float32" in str(caught.value) for i in (1, 2, 3)] == [True] * 3


def test_the_config_knows_the_cases() -> None:
    assert tuple(CASES) == KERNEL_CASES


def write_baselines(folder: Path) -> None:
    write_node(make_node(rows=(make_row(1.0),)), folder / "b.json")
    (folder / "old.json").write_text('{"format": 1, "rows": []}')
    (folder / "text.json").write_text("hello")
    (folder / "empty").mkdir()
    write_node(make_node(rows=(make_row(1.0),)), folder / "runs/p/profile/kernels/a.json")
    (folder / "link").symlink_to("runs/p/profile/kernels/a.json")


@pytest.mark.parametrize(
    ("baseline", "changes", "expected"),
    [
        ("nowhere.json", {}, "nowhere.json: no such file; `sorahpc profile kernels` writes one into"),
        ("text.json", {}, "text.json: not what `sorahpc profile kernels` writes "),
        ("old.json", {}, "old.json: format 2 expected, found 1, of another version of sorahpc; move it away, and mea"),
        ("b.json", {"small": True}, "b.json has no row of the case, dtype, shape and threads of one measured now; mea"),
        ("b.json", {"only": "K5"}, "b.json has no row of the case"),
        ("empty", {}, "empty: no <device>.json in this folder; `sorahpc profile kernels` writes one into"),
        (".", {"small": True}, ".: no <device>.small.json in this folder"),
        (
            "runs/p/profile/kernels",
            {},
            "runs/p/profile/kernels is the folder that this run writes into; copy it elsewhere, or",
        ),
        ("link", {}, "link is the file that this run writes; copy it elsewhere, or measure under another run=NAME"),
    ],
)
def test_a_baseline_that_can_never_serve_is_refused_before_anything_is_submitted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, baseline: str, changes: dict[str, Any], expected: str
) -> None:
    write_baselines(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sorahpc.cluster.launch.launch", lambda *_, **__: pytest.fail("submitted"))
    overrides = [f"kernels.{key}={value}" for key, value in changes.items()]
    with pytest.raises(ConfigError) as caught:
        launch_job("profile-kernels", "profile", ["run=p", f"kernels.baseline={baseline}", *overrides], "slurm",
                    dry_run=False, as_json=False, wait=False)  # fmt: skip
    assert str(caught.value).startswith(f"kernels.baseline: {expected}") and "\n" not in str(caught.value)


@pytest.mark.parametrize("baseline", ["b.json", "."])
def test_a_baseline_that_may_serve_goes_with_the_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, baseline: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write_baselines(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert cli.main(["profile", "kernels", "run=p", "--baseline", baseline, "--cluster", "slurm", "--dry-run"]) == 0
    assert "#SBATCH" in capsys.readouterr().out


def test_a_baseline_is_looked_at_without_torch(tmp_path: Path) -> None:
    write_baselines(tmp_path)
    code = "import sys; from sorahpc import cli; assert cli.main(sys.argv[1:]) == 0; assert 'torch' not in sys.modules"
    command = ["profile", "kernels", "run=p", "--baseline", "b.json", "--cluster", "slurm", "--dry-run"]
    subprocess.run([sys.executable, "-c", code, *command], cwd=tmp_path, check=True, stdout=subprocess.DEVNULL)


def test_without_kernels_there_is_nothing_to_measure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "backend", lambda: {"ops": {"rope3d": {"cpu": "reference", "cuda": "reference"}}})
    with pytest.raises(SoraHPCError, match="kernels: not built for c"):
        run(tmp_path)


@pytest.mark.slow
def test_the_real_job_measures_a_real_case(tmp_path: Path) -> None:
    """Compiles the peers, so it takes a minute."""
    folder = run(tmp_path, only="K5", small=True, threads=[1, 2])
    node = read_node(folder / f"{slug(CPU)}.small.json")
    assert {(r.threads, r.dtype) for r in node.rows} == {(t, d) for t in (1, 2) for d in ("float32", "bfloat16")}
    assert [c.name for c in node.ceilings] == ["copy", "matmul", "matmul"] * 2
    assert all(r.median_ms > 0 and r.peak_mb > 0 for r in node.rows)


# ---------------------------------------------------------------------------------------------------------------------
# benchmarks/bench_ops.py


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Row]]:
    """Runs the script with some cases; the rows of its file of this day."""
    path = Path(__file__).resolve().parent.parent / "benchmarks/bench_ops.py"
    spec = importlib.util.spec_from_file_location("bench_ops", path)
    assert spec is not None and spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    monkeypatch.setattr(script, "RESULTS", tmp_path)

    def run_script(*names: str, args: tuple[str, ...] = (), end: str = ".csv") -> list[Row]:
        monkeypatch.setattr(script, "kernel_cases", lambda *_: iter([make_case(name=name) for name in names]))
        monkeypatch.setattr(sys, "argv", ["bench_ops.py", "--threads", "1", "--repeats", "3", *args])
        script.main()
        (file,) = tmp_path.glob(f"ops_????-??-??_{slug(CPU)}{end}")
        return read_csv(file)

    return run_script


def test_a_benchmark_of_some_cases_leaves_the_others_of_the_day(
    tmp_path: Path, bench: Callable[..., list[Row]]
) -> None:
    first = bench("K1 a", "K2 b")
    again = bench("K2 b", args=("--only", "K2"))
    assert [row.case for row in again] == ["K1 a"] * 2 + ["K2 b"] * 2
    assert again[:2] == first[:2] and again[2:] != first[2:]
    assert [row.case for row in bench("K1 a", args=("--small",), end=".small.csv")] == ["K1 a"] * 2
    (file,) = (f for f in tmp_path.iterdir() if "small" not in f.name)
    assert read_csv(file) == again


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a,b\n1,2\n", r"rows\.csv: not a table of rows as measured here \(no 'date'\); move it away"),
        (None, r"rows\.csv: expected rows of .*, found some of A; see --out"),
    ],
)
def test_a_benchmark_replaces_no_file_that_it_cannot_continue(
    tmp_path: Path,
    bench: Callable[..., list[Row]],
    capsys: pytest.CaptureFixture[str],
    text: str | None,
    expected: str,
) -> None:
    file = tmp_path / "rows.csv"
    if text is None:
        write_csv([make_row(1.0)], file)
    else:
        file.write_text(text)
    before = file.read_bytes()
    with pytest.raises(SystemExit):
        bench("K1 a", args=("--out", str(file)))
    assert re.search(expected, capsys.readouterr().err) and file.read_bytes() == before


# ---------------------------------------------------------------------------------------------------------------------
# The page


def test_several_devices_are_compared_on_one_page(tmp_path: Path) -> None:
    slow = make_node("A100 <b>", rows=(make_row(2.0, gb_s=1500.0), make_row(9.0, candidate="eager")))
    fast = make_node("H100", rows=(make_row(1.0, gb_s=3000.0), make_row(0.5, candidate="eager", ours_is_faster_by=0.5)))
    write_node(slow, tmp_path / "r1/kernels/a100.json")
    write_node(fast, tmp_path / "r2/kernels/h100.json")
    text = write_profile_page([tmp_path / "r1", tmp_path / "r2"], tmp_path / "page.html").read_text()
    assert "Kernels of all devices" in text and "1,500.0 GB/s, 90% of copy" in text and "3,000.0 GB/s" in text
    assert "A100 &lt;b&gt;" in text and "<b>" not in text
    assert "0.50 (faster)" in text, "a peer that wins is said to"


def test_the_roof_is_the_fastest_copy_of_its_threads(tmp_path: Path) -> None:
    rows = (
        make_row(1.0, limit_gb_s=35.0),
        make_row(1.0, case="K3 b", of_limit=1.2),
        make_row(1.0, threads=2, limit_gb_s=50.0),
    )
    two = tuple(dataclasses.replace(c, threads=2) for c in make_node().ceilings)
    write_node(make_node(rows=rows, ceilings=(*make_node().ceilings, *two)), tmp_path / "kernels/a.json")
    text = write_profile_page([tmp_path], tmp_path / "page.html").read_text()
    assert ">copy: 35.0 GB/s</text>" in text and ">copy: 50.0 GB/s</text>" in text
    assert "float32, 1 thread: L=1; copy 35.0 GB/s" in text, "what the shares of a case refer to"
    assert "A share above 100 % is no error" in text
    write_node(make_node(rows=rows[:1]), tmp_path / "kernels/a.json")
    text = write_profile_page([tmp_path], tmp_path / "page.html").read_text()
    assert "A share above 100 %" not in text


def test_devices_are_compared_at_the_same_shape_and_nodes_of_one_device_are_told_apart(tmp_path: Path) -> None:
    other = make_row(2.0, shape="L=2", gb_s=15.0)
    write_node(make_node(rows=(make_row(1.0), other)), tmp_path / "r1/kernels/a.json")
    write_node(make_node(rows=(make_row(1.0),), host="node2"), tmp_path / "r2/kernels/a.json")
    write_node(make_node("B", rows=(other,), host="node3"), tmp_path / "r3/kernels/b.json")
    folders = [tmp_path / name for name in ("r1", "r2", "r3")]
    text = write_profile_page(folders, tmp_path / "page.html").read_text()
    first, second = re.findall(r"K1 rope, float32: (L=\d)</th>(.*?)</tr>", text)
    assert [first[0], second[0]] == ["L=1", "L=2"]
    assert first[1].count("10.0 GB/s") == 2 and first[1].count("not measured") == 1
    assert second[1].count("15.0 GB/s") == 2 and second[1].count("not measured") == 1
    assert [title in text for title in ("on A (node1, ", "on A (node2, ", "Kernels on B</h2>")] == [True] * 3


def test_the_roofline_names_its_cases_and_says_which_compute_nothing(tmp_path: Path) -> None:
    rows = (make_row(1.0, case="K4 patchify", gflop_s=0.0), make_row(1.0, case="K4 flow_patchify of a clip"))
    write_node(make_node(rows=rows), tmp_path / "kernels/a.json")
    text = write_profile_page([tmp_path], tmp_path / "page.html").read_text()
    assert ">K4 flow_patchify float32</text>" in text
    assert "Not on the roofline, as it moves bytes and computes nothing: K4 patchify.</p>" in text


def test_an_empty_run_says_what_to_do(tmp_path: Path) -> None:
    text = write_profile_page([tmp_path], tmp_path / "page.html").read_text()
    assert "Nothing is measured yet" in text


def test_the_roofline_shows_every_point_below_or_above_its_roof() -> None:
    chart = roofline("R <1>", 20.0, [("float32", 100.0)], [("K1", 0.5, 9.0, "solid"), ("peer", 0.5, 3.0, "hollow")])
    assert chart.count("<circle") == 2 and 'class="hollow"' in chart and "R &lt;1&gt;" in chart
    assert "K1: 0.5 FLOP a byte, 9.0 GFLOP/s" in chart
    assert "nothing to show" in roofline("R", 20.0, [], [])


@pytest.mark.parametrize("roofs", [(37.0, 300.0), (2400.0, 700_000.0)])
def test_no_name_on_the_roofline_covers_a_dot_or_another_name(roofs: tuple[float, float]) -> None:
    """Points as measured: ours near the roof, peers below, pairs of dtypes at twice the operations a byte."""
    scale = roofs[0] / 37
    points = []
    for name, x, ours, peer in (
        ("K1 rope3d", 0.375, 12.0, 8.5), ("K2 qk-norm", 1.0, 15.0, 5.6), ("K3 gated", 0.6, 15.5, 11.0),
        ("K4 flow_patchify", 0.333, 1.75, 0.4), ("K5 add_sincos3d", 0.125, 3.8, 2.3),
        ("K6 of tomorrow", 0.13, 3.6, 2.2),
    ):  # fmt: skip
        for dtype, factor in (("float32", 1), ("bfloat16", 2)):
            points.append((f"{name} {dtype}", factor * x, factor * ours * scale, "solid"))
            points.append((f"{name} {dtype}, eager", factor * x, factor * peer * scale, "hollow"))
    chart = roofline("R", roofs[0], [("matmul bfloat16", roofs[1])], points)
    dots = [(float(x), float(y)) for x, y in re.findall(r'cx="([\d.]+)" cy="([\d.]+)"', chart)]
    texts = re.findall(r'<text x="([\d.]+)" y="([\d.]+)"( text-anchor="end")?>((?:K\d|copy|matmul)[^<]*)<', chart)
    assert len(dots) == 24 and len(texts) == 12 + 2
    boxes = []
    for x_text, y_text, end, text in texts:
        x, y, width = float(x_text), float(y_text), 6.8 * len(text)
        boxes.append((x - width if end else x, y - 10, x if end else x + width, y + 3))
        assert 0 < boxes[-1][0] and boxes[-1][2] < 1080, text
    for i, (left, top, right, bottom) in enumerate(boxes):
        assert not [d for d in dots if left - 4 < d[0] < right + 4 and top - 4 < d[1] < bottom + 4], texts[i]
        others = [b for b in boxes[:i] if left < b[2] and b[0] < right and top < b[3] and b[1] < bottom]
        assert not others, texts[i]
