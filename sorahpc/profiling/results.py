"""What a measurement of kernels found, in files and against a baseline. No torch here: a baseline is looked at before a
job is submitted.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from sorahpc.config import KernelsConfig
from sorahpc.errors import ConfigError, DataError
from sorahpc.profiling.machine import slug_of
from sorahpc.runs import atomic_write, read_json, write_json

FORMAT = 2
COMPARED = "compared.json"  # in the job's folder: how many ops were held against a baseline
OURS = "sorahpc"  # the candidate that is measured against the others


@dataclass(frozen=True)
class Row:
    """One line of the table: a candidate at a case."""

    date: str
    device: str
    threads: int
    torch: str
    commit: str
    case: str
    dtype: str
    shape: str
    candidate: str
    median_ms: float
    p10_ms: float
    p90_ms: float
    gb_s: float  # of the bytes that the case must move
    gflop_s: float  # of the operations of its formula
    of_limit: float  # of limit_gb_s
    limit_gb_s: float  # of the copy that was measured beside this case
    ours_is_faster_by: float  # this candidate's time over ours
    peak_mb: float  # allocated during a call at the most, its results included

    @property
    def key(self) -> tuple[str, str, str, int]:
        """What was measured, whoever computed it."""
        return self.case, self.dtype, self.shape, self.threads

    def __str__(self) -> str:
        where = f" {self.threads} threads" if self.threads else ""
        return (
            f"{self.case} {self.dtype}{where}, {self.candidate}: {self.median_ms:.2f} ms, {self.gb_s:.1f} GB/s, "
            f"{self.of_limit:.2f} of copy, {self.ours_is_faster_by:.2f} x ours, {self.peak_mb:.0f} MB"
        )


@dataclass(frozen=True)
class Ceiling:
    """What this device can do at the best: `copy` in GB/s read and written, `matmul` in GFLOP/s."""

    name: str
    dtype: str
    threads: int
    value: float
    how: str


@dataclass(frozen=True)
class LeftOut:
    """A candidate that a case has no row of, and why."""

    case: str
    dtype: str
    shape: str
    threads: int
    candidate: str
    reason: str

    @property
    def key(self) -> tuple[str, str, str, int]:
        return self.case, self.dtype, self.shape, self.threads


@dataclass(frozen=True)
class Node:
    """All that was measured on one node."""

    device: str
    host: str
    date: str
    torch: str
    commit: str
    ceilings: tuple[Ceiling, ...]
    rows: tuple[Row, ...]
    small: bool = False  # sizes that try the command out
    left_out: tuple[LeftOut, ...] = ()


def merged_rows(now: Sequence[Row], earlier: Sequence[Row]) -> list[Row]:
    """Cases that were measured again in place of their earlier rows, the others as they were."""
    keys = {row.key for row in now}
    kept = [row for row in earlier if row.key not in keys]
    return sorted([*kept, *now], key=lambda r: (r.threads, r.case, r.shape))


def merged(now: Node, earlier: Node) -> Node:
    """`now`, and what `earlier` measured on this device that `now` did not."""
    keys = {row.key for row in now.rows}
    # Of each ceiling the highest that was ever reached: a slow moment doesn't lower what the device can do.
    by_value = sorted((*earlier.ceilings, *now.ceilings), key=lambda c: c.value)
    limits = {(c.name, c.dtype, c.threads): c for c in by_value}
    left_out = [*(out for out in earlier.left_out if out.key not in keys), *now.left_out]
    return replace(
        now,
        ceilings=tuple(sorted(limits.values(), key=lambda c: (c.threads, c.name, c.dtype))),
        rows=tuple(merged_rows(now.rows, earlier.rows)),
        left_out=tuple(left_out),
    )


# ---------------------------------------------------------------------------------------------------------------------
# Files


def write_csv(rows: Sequence[Row], path: Path) -> None:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, [f.name for f in fields(Row)])
    writer.writeheader()
    writer.writerows(asdict(row) for row in rows)
    atomic_write(path, text.getvalue())


def read_csv(path: Path) -> list[Row]:
    """Raises DataError for a file that `write_csv` has not written."""
    kinds = {f.name: {"int": int, "float": float}.get(str(f.type), str) for f in fields(Row)}
    try:
        lines = list(csv.DictReader(io.StringIO(path.read_text(encoding="utf-8"), newline=""), strict=True))
        return [_typed(Row, {name: kind(line[name]) for name, kind in kinds.items()}) for line in lines]
    except (OSError, csv.Error, KeyError, TypeError, ValueError) as error:
        reason = f"no {error}" if isinstance(error, KeyError) else " ".join(str(error).split())
        raise DataError(f"{path}: not a table of rows as measured here ({reason}); move it away") from None


def write_node(node: Node, path: Path) -> None:
    write_json(path, {"format": FORMAT, **asdict(node)})


def read_node(path: Path) -> Node:
    """Raises DataError for a file that is not there, or that `write_node` has not written."""
    if not path.is_file():
        raise DataError(f"{path}: no such file; `sorahpc profile kernels` writes one into runs/<run>/profile/kernels")
    data = read_json(path)
    found = None if data is None else data.get("format")
    if type(found) is int and 0 < found < 1000 and found != FORMAT:
        raise DataError(
            f"{path}: format {FORMAT} expected, found {found}, of another version of sorahpc; move it away, and "
            "measure again with `sorahpc profile kernels`"
        )
    try:
        if data is None or found != FORMAT:
            raise ValueError(f"a JSON mapping of format {FORMAT} expected")
        data["rows"] = tuple(_typed(Row, row) for row in data["rows"])
        data["ceilings"] = tuple(_typed(Ceiling, ceiling) for ceiling in data["ceilings"])
        data["left_out"] = tuple(_typed(LeftOut, out) for out in data.get("left_out", []))  # files before it have none
        node: Node = _typed(Node, data)
        copies_of = [c.threads for c in node.ceilings if c.name == "copy"]
        for threads in sorted({r.threads for r in node.rows} | {c.threads for c in node.ceilings}):
            if copies_of.count(threads) != 1:
                raise ValueError(f"one copy with {threads} threads expected, found {copies_of.count(threads)}")
        return node
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        reason = f"no {error}" if isinstance(error, KeyError) else " ".join(str(error).split())
        raise DataError(
            f"{path}: not what `sorahpc profile kernels` writes ({reason}); remove it, and measure again"
        ) from None


def file_name(device: str, small: bool) -> str:
    """Of what was measured on a device, in the folder `kernels` of a run's profile."""
    return f"{slug_of(device)}{'.small' if small else ''}.json"


# What must be a word or above 0; other texts may be empty, other numbers 0.
_NEEDED = {"device", "case", "dtype", "shape", "candidate", "name"}
_POSITIVE = {"median_ms", "p10_ms", "p90_ms", "limit_gb_s", "value"}


def _typed(cls: type[Any], data: dict[str, Any]) -> Any:
    """An object of `cls`; ValueError for a field that no measurement has."""
    for field in fields(cls):
        value, kind = data[field.name], str(field.type)
        if kind == "str":
            good = isinstance(value, str) and (bool(value.strip()) or field.name not in _NEEDED)
        elif kind == "bool":
            good = isinstance(value, bool)
        elif kind == "float":  # the page divides by some and takes logarithms
            good = type(value) in (int, float) and math.isfinite(value)
            good = good and (1e-12 <= value <= 1e15 or (value == 0 and field.name not in _POSITIVE))
        elif kind == "int":
            good = type(value) is int and 0 <= value <= 1e6
        else:
            good = isinstance(value, tuple)
        if not good:
            raise ValueError(f"{field.name}: {str(value)[:40]!r}")
    return cls(**{f.name: data[f.name] for f in fields(cls)})


# ---------------------------------------------------------------------------------------------------------------------
# Against a baseline

NO_ROW = (
    "has no row of the case, dtype, shape and threads of one measured now; measure a new baseline with these settings"
)


def check_baseline(wanted: KernelsConfig, folder: Path) -> None:
    """What can be said of `kernels.baseline` where the device that will be measured is not known yet.

    Args:
        folder: that this run writes into.

    Raises:
        ConfigError: it is not there, can't be read, fits no measurement with this config, or is what this run writes.
    """
    path = wanted.baseline
    if path is None:
        return
    if path.is_dir():
        refuse_own(path, folder)
        if not any(f.name.endswith(".small.json") == wanted.small for f in path.glob("*.json")):
            name = "<device>.small.json" if wanted.small else "<device>.json"
            raise ConfigError(
                f"kernels.baseline: {path}: no {name} in this folder; `sorahpc profile kernels` writes one into "
                "runs/<run>/profile/kernels"
            )
        return
    try:
        node = read_node(path)
    except DataError as error:
        raise ConfigError(f"kernels.baseline: {error}") from None
    refuse_own(path, folder / file_name(node.device, node.small))
    if not fits(node, wanted):
        raise ConfigError(f"kernels.baseline: {path} {NO_ROW}")


def refuse_own(path: Path, own: Path) -> None:
    """Raises ConfigError for a baseline that the run itself writes: each slower measurement would become the norm."""
    if path.exists() and own.exists() and path.samefile(own):
        what = "is the folder that this run writes into" if own.is_dir() else "is the file that this run writes"
        raise ConfigError(f"kernels.baseline: {path} {what}; copy it elsewhere, or measure under another run=NAME")


def fits(before: Node, wanted: KernelsConfig, threads: Sequence[int] = ()) -> bool:
    """Whether a baseline has a row of ours of a case that is wanted, with one of these threads where any are named."""
    rows = [r for r in before.rows if r.candidate == OURS and r.case.startswith(wanted.only)]
    return before.small == wanted.small and any(not threads or r.threads in threads for r in rows)


@dataclass(frozen=True)
class Change:
    """One of our rows against the same row of a baseline."""

    row: Row
    before_ms: float

    @property
    def slower_by(self) -> float:
        """0.1: takes 10 % longer than before."""
        return self.row.median_ms / self.before_ms - 1


def compare(now: Node, before: Node) -> list[Change]:
    """Our ops in both, the worst change first.

    Raises:
        DataError: the baseline has no row of the same case, dtype, shape and threads.
    """

    def ours(node: Node) -> dict[tuple[str, str, str, int], Row]:
        return {r.key: r for r in node.rows if r.candidate == OURS}

    known = ours(before)
    changes = [Change(row, known[key].median_ms) for key, row in ours(now).items() if key in known]
    if not changes:
        raise DataError(f"kernels.baseline: that of {before.date} {NO_ROW}")
    return sorted(changes, key=lambda change: -change.slower_by)
