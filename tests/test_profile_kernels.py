"""`profile kernels`, the job: what it writes and keeps, and how a requeued one goes on."""

from __future__ import annotations

import csv
import dataclasses
import itertools
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from kernel_rows import CPU, fails, make_case, make_node, make_row

from sorahpc import ops
from sorahpc.cli.launching import left_out
from sorahpc.configfile import parse_config
from sorahpc.errors import ConfigError, DataError, SlowerError, SoraHPCError, Stopped
from sorahpc.jobs import kernels
from sorahpc.profiling.cases import Case
from sorahpc.profiling.machine import slug
from sorahpc.profiling.results import OURS, Ceiling, Row, merged, read_node, write_node
from sorahpc.runs import Task, write_json


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


def test_without_kernels_there_is_nothing_to_measure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "backend", lambda: {"ops": {"rope3d": {"cpu": "reference", "cuda": "reference"}}})
    with pytest.raises(SoraHPCError, match="kernels: not built for c"):
        run(tmp_path)


def test_on_a_gpu_the_copy_needs_no_kernel_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    """A build with CUDA has none for stream_copy; all others it has, as tests/test_ops_emulated.py says of one."""
    live = {name: {"cpu": "compiled", "cuda": "compiled"} for name in ops.backend()["ops"]}
    live["stream_copy"]["cuda"] = "reference"
    monkeypatch.setattr(ops, "backend", lambda: {"ops": live})
    assert kernels._built_for("cuda") and kernels._built_for("cpu")
    live["rope3d"]["cuda"] = live["stream_copy"]["cpu"] = "reference"
    assert not kernels._built_for("cuda") and not kernels._built_for("cpu")


@pytest.mark.slow
def test_the_real_job_measures_a_real_case(tmp_path: Path) -> None:
    """Compiles the peers, so it takes a minute."""
    folder = run(tmp_path, only="K5", small=True, threads=[1, 2])
    node = read_node(folder / f"{slug(CPU)}.small.json")
    assert {(r.threads, r.dtype) for r in node.rows} == {(t, d) for t in (1, 2) for d in ("float32", "bfloat16")}
    assert [c.name for c in node.ceilings] == ["copy", "matmul", "matmul"] * 2
    assert all(r.median_ms > 0 and r.peak_mb > 0 for r in node.rows)
