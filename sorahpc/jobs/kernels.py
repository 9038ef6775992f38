"""profile-kernels: the ops beside their peers and the limits of the node that it runs on.

profile/kernels/<device>.json         ceilings and rows; a baseline for later measurements
                <device>.csv          the rows as a table
                <device>.small.json   and .csv, of `kernels.small`
profile/index.html                    all that this run has measured, of every device
jobs/profile-kernels/compared.json    against a baseline: how many ops were compared, and how many are not in it

Measured again, a case replaces what the run has of it; what is not measured again stays. Files are written after each
case, so a stop or a crash keeps what was measured. A job that Slurm requeues on the same node goes on with the others,
by jobs/profile-kernels/measured.json; a new one measures everything anew.
"""

from __future__ import annotations

import logging
import socket
from dataclasses import replace
from pathlib import Path

import torch

from sorahpc import ops
from sorahpc.config import Config, KernelsConfig
from sorahpc.errors import DataError, SetupError, SlowerError, Stopped
from sorahpc.profiling import results, timing
from sorahpc.profiling.cases import CASES, kernel_cases
from sorahpc.profiling.machine import device_name
from sorahpc.profiling.page import write_profile_page
from sorahpc.profiling.results import OURS
from sorahpc.runs import Task, read_json, read_state, write_json

Key = tuple[str, str, str, int]

DEFAULT_MARGIN = 0.1

log = logging.getLogger(__name__)


def profile(config: Config, task: Task) -> None:
    """Measure, write, and compare with `kernels.baseline` where one is given.

    Raises:
        ConfigError: the baseline is what this run writes. SetupError: the kernels are not built for this device.
        DataError: a baseline that can't be read or is of another device, or an earlier file of this run that can't be
        read. NumericsError: a candidate computes something else. Stopped: on request; finished cases are kept.
        SlowerError: an op is slower than the baseline by more than the margin.
    """
    wanted = config.kernels
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not _built_for(device.type):
        raise SetupError(f"kernels: not built for {device.type}, so there is nothing to measure; run `make build` here")
    folder = config.run_dir / "profile"
    target = folder / "kernels" / results.file_name(device_name(device), wanted.small)
    before = _baseline(wanted, target, device) if wanted.baseline is not None else None
    record = _Record(task, target)
    compared = task.folder.path / results.COMPARED
    compared.unlink(missing_ok=True)  # of an earlier measurement
    timing.keep_freed_memory()
    try:
        _measure(wanted, device, task, record)
    finally:
        if target.is_file():
            try:
                log.info("wrote %s", write_profile_page([folder], folder / "index.html"))
            except DataError as error:  # of another job's file; what was measured is kept and judged all the same
                log.warning("no page: %s", error)
    if before is not None:
        _judge(record.of_this_job(), before, DEFAULT_MARGIN if wanted.margin is None else wanted.margin, compared)


def _built_for(kind: str) -> bool:
    """Whether what is measured has kernels. stream_copy has one for the CPU alone: elsewhere it is torch's own copy."""
    bodies = ops.backend()["ops"]
    return all(live[kind] == "compiled" for name, live in bodies.items() if kind == "cpu" or name != "stream_copy")


def _baseline(wanted: KernelsConfig, target: Path, device: torch.device) -> results.Node:
    assert wanted.baseline is not None
    path = wanted.baseline / target.name if wanted.baseline.is_dir() else wanted.baseline
    results.refuse_own(path, target)
    before = results.read_node(path)
    if before.device != device_name(device):
        raise DataError(f"kernels.baseline: expected one of {device_name(device)}, found one of {before.device}")
    if not results.fits(before, wanted, _turns(wanted) if device.type == "cpu" else (0,)):
        raise DataError(f"kernels.baseline: {path} {results.NO_ROW}")
    return before


def _turns(wanted: KernelsConfig) -> tuple[int, ...]:
    """Numbers of CPU threads to measure with: the worker has set torch's by what Slurm gave, else by the config."""
    return wanted.threads or (torch.get_num_threads(),)


class _Record:
    """The files of a measurement, written after each case, and which cases this job has measured.

    Raises:
        DataError: there is an earlier file, and it can't be read.
    """

    def __init__(self, task: Task, target: Path) -> None:
        self.target = target
        self.progress = task.folder.path / "measured.json"
        for left in target.parent.glob(".*.tmp"):  # by a writer that was killed; the job's lease allows no other
            left.unlink()
        self.earlier = results.read_node(target) if target.is_file() else None
        self.whole = self.earlier
        # The launch is the same for all lives of a job; figures of another node are not mixed with those of this one.
        launched = (read_state(task.folder.launch) or {}).get("time")
        self.life = {"launched": launched, "host": socket.gethostname(), "file": target.name}
        self.done: list[Key] = []
        before = read_json(self.progress) if task.restart and launched is not None else None
        if before is not None and self.earlier and {k: before.get(k) for k in self.life} == self.life:
            kept = {row.key for row in self.earlier.rows}
            cases = before.get("cases")
            self.done = [key for key in kept if isinstance(cases, list) and list(key) in cases]
        if task.restart:
            log.info("requeued: cases that this job has measured on this node, and does not again: %d", len(self.done))

    def add(self, node: results.Node, key: Key) -> None:
        """Keep what was measured until now."""
        self.whole = results.merged(node, self.earlier) if self.earlier else node
        results.write_node(self.whole, self.target)
        results.write_csv(self.whole.rows, self.target.with_suffix(".csv"))
        self.done.append(key)
        write_json(self.progress, {**self.life, "cases": self.done})

    def of_this_job(self) -> results.Node:
        """What this job has measured, before it was requeued too."""
        assert self.whole is not None
        return replace(self.whole, rows=tuple(row for row in self.whole.rows if row.key in self.done))


def _measure(wanted: KernelsConfig, device: torch.device, task: Task, record: _Record) -> None:
    ceilings: list[results.Ceiling] = []
    rows: list[results.Row] = []
    left_out: list[results.LeftOut] = []
    turns = _turns(wanted) if device.type == "cpu" else (1,)
    total = len(turns) * 2 * sum(name.startswith(wanted.only) for name in CASES)
    before = torch.get_num_threads()
    try:
        for threads in turns:
            torch.set_num_threads(threads)
            ceilings += timing.ceilings(device, wanted.repeats)
            for case in kernel_cases(device, wanted.small, wanted.only):
                key = timing.key_of(case, device)
                if key in record.done:
                    continue
                task.report(len(record.done), total, "case")
                if task.stop_requested():
                    raise Stopped(
                        f"profile-kernels: stopped on request after {len(record.done)} of {total} cases"
                        + (f", which are in {record.target}" if record.done else "")
                    )
                for row in timing.measure([case], device, wanted.repeats):
                    rows.append(row)
                    log.info("%s", row)
                left_out += timing.left_out(case, device)
                record.add(timing.make_node(device, ceilings, rows, wanted.small, left_out), key)
        task.report(len(record.done), total, "case")
    finally:
        torch.set_num_threads(before)
    log.info("wrote %s, and its rows as %s", record.target, record.target.with_suffix(".csv").name)


def _judge(node: results.Node, before: results.Node, margin: float, compared: Path) -> None:
    """Log every change, write their number, and raise SlowerError for those beyond the margin."""
    slower = []
    changes = results.compare(node, before)
    measured = sum(row.candidate == OURS for row in node.rows)
    write_json(compared, {"compared": len(changes), "not_in_baseline": measured - len(changes)})
    if len(changes) < measured:
        log.warning(
            "kernels.baseline: %d of the %d ops measured now have no counterpart in it and are held to nothing",
            measured - len(changes), measured,
        )  # fmt: skip
    for change in changes:
        row = change.row
        threads = f" {row.threads} threads" if row.threads else ""
        line = (
            f"{row.case} {row.dtype}{threads}: {row.median_ms:.2f} ms, {change.before_ms:.2f} ms in the baseline "
            f"({change.slower_by:+.0%})"
        )
        log.info("%s", line)
        if change.slower_by > margin:
            slower.append(f"{line}; kernels.margin allows {margin:+.0%}")
    if slower:
        raise SlowerError("\n".join(slower))
