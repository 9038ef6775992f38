"""Times the ops beside their peers and this machine's limits.

Every figure is a median over runs in which all candidates take turns: a slow moment of the machine meets them all.
"""

from __future__ import annotations

import csv
import ctypes
import io
import math
import socket
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch

from sorahpc.errors import DataError, NumericsError
from sorahpc.ops import stream_copy
from sorahpc.profiling.cases import OURS, Case
from sorahpc.profiling.machine import commit_of_this, device_name, now_utc
from sorahpc.profiling.record import peak_bytes
from sorahpc.runs import atomic_write, read_json, write_json

COPY_BYTES = 256 << 20  # beyond any cache
FLUSH_BYTES = 256 << 20  # on a GPU, between two runs: beyond its L2
MATMUL_SIZE = {"cpu": 2048, "cuda": 8192}
FORMAT = 2


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


def keep_freed_memory() -> None:
    """Have this process keep the memory that it frees: faults of fresh pages cost more than the kernels do.

    glibc only; elsewhere nothing changes.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        for parameter, value in ((-4, 0), (-1, -1), (-2, 256 << 20)):  # M_MMAP_MAX, M_TRIM_THRESHOLD, M_TOP_PAD
            mallopt(parameter, value)


def interleaved_times(
    calls: Mapping[str, Callable[[], object]], device: torch.device, repeats: int
) -> dict[str, list[float]]:
    """Seconds of each call, sorted: `repeats` rounds, each in another order, after one that warms up and compiles."""
    names = list(calls)
    for name in names:
        calls[name]()
    times: dict[str, list[float]] = {name: [] for name in names}
    flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=device) if device.type == "cuda" else None
    for r in range(repeats):
        for name in names[r % len(names) :] + names[: r % len(names)]:
            if flush is not None:
                flush.zero_()
                start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                start.record()
                calls[name]()
                end.record()
                end.synchronize()
                times[name].append(start.elapsed_time(end) / 1e3)
            else:
                began = time.perf_counter()
                out = calls[name]()
                times[name].append(time.perf_counter() - began)
                del out
    return {name: sorted(values) for name, values in times.items()}


def threads_of(device: torch.device) -> int:
    """CPU threads that a figure is for; 0 where the CPU does not compute."""
    return torch.get_num_threads() if device.type == "cpu" else 0


def copies(device: torch.device) -> dict[str, Callable[[], object]]:
    """The fastest copies that this device may have, of COPY_BYTES each."""
    source = torch.zeros(COPY_BYTES // 4, device=device)
    target = torch.zeros_like(source)
    calls: dict[str, Callable[[], object]] = {"memcpy": lambda: target.copy_(source)}
    if device.type == "cpu":
        calls["non-temporal copy"] = lambda: stream_copy(source)
    return calls


def copy_limit(times: Mapping[str, Sequence[float]]) -> tuple[float, str]:
    """Bytes a second, read and written, of the fastest of the `copies` that were timed, and which it was."""
    medians = {name: statistics.median(times[name]) for name in ("memcpy", "non-temporal copy") if name in times}
    best = min(medians, key=lambda name: medians[name])
    return 2 * COPY_BYTES / medians[best], best


def matmul_limit(device: torch.device, dtype: torch.dtype, repeats: int) -> float:
    """Operations a second of a large square matrix product, sums and products."""
    n = MATMUL_SIZE[device.type]
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    times = interleaved_times({"matmul": lambda: a @ b}, device, repeats)["matmul"]
    return 2 * n**3 / statistics.median(times)


def ceilings(device: torch.device, repeats: int) -> Iterator[Ceiling]:
    threads = threads_of(device)
    copy, how = copy_limit(interleaved_times(copies(device), device, repeats))
    yield Ceiling("copy", "any", threads, round(copy / 1e9, 2), f"{how}, {COPY_BYTES >> 20} MB")
    n = MATMUL_SIZE[device.type]
    for dtype in (torch.float32, torch.bfloat16):
        limit = matmul_limit(device, dtype, repeats)
        yield Ceiling("matmul", dtype_name(dtype), threads, round(limit / 1e9, 2), f"torch.matmul, {n} x {n} x {n}")


def check(case: Case) -> None:
    """Every candidate computes what ours does, before any is timed.

    Raises:
        NumericsError: one does not.
    """
    ours = case.result(OURS)
    for name in case.calls:
        if name == OURS:
            continue
        for i, (a, b) in enumerate(zip(case.result(name), ours, strict=True)):
            difference = float((a.double() - b.double()).norm() / b.double().norm().clamp_min(1e-30))
            if not difference <= case.tolerance:
                raise NumericsError(
                    f"profile: {case.name} {case.dtype}: result {i} of `{name}` differs from that of `{OURS}` by "
                    f"{difference:.1e} of its norm, expected at most {case.tolerance:.0e}"
                )


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def measure(cases: Iterable[Case], device: torch.device, repeats: int) -> Iterator[Row]:
    """The rows of each case in turn.

    Raises:
        NumericsError: a candidate computes something else.
    """
    now, name, commit = now_utc(), device_name(device), commit_of_this()
    for case in cases:
        torch._dynamo.reset()  # what is compiled knows the number of threads, and there is a limit to how often
        check(case)
        # The copies take their turns with the candidates: a shared machine's speed drifts within seconds.
        times = interleaved_times({**case.calls, **copies(device)}, device, repeats)
        limit, _ = copy_limit(times)
        medians = {candidate: statistics.median(times[candidate]) for candidate in case.calls}
        for candidate, median in medians.items():
            values = times[candidate]
            yield Row(
                date=now,
                device=name,
                threads=threads_of(device),
                torch=torch.__version__,
                commit=commit,
                case=case.name,
                dtype=dtype_name(case.dtype),
                shape=case.shape,
                candidate=candidate,
                median_ms=round(median * 1e3, 4),
                p10_ms=round(values[len(values) // 10] * 1e3, 4),
                p90_ms=round(values[len(values) * 9 // 10] * 1e3, 4),
                gb_s=round(case.bytes / median / 1e9, 2),
                gflop_s=round(case.flops / median / 1e9, 2),
                of_limit=round(case.bytes / median / limit, 3),
                limit_gb_s=round(limit / 1e9, 2),
                ours_is_faster_by=round(median / medians[OURS], 2),
                peak_mb=round(peak_bytes(case.calls[candidate], device) / 1e6, 1),
            )


def make_node(device: torch.device, ceilings: Sequence[Ceiling], rows: Sequence[Row], small: bool = False) -> Node:
    return Node(
        device=device_name(device),
        host=socket.gethostname(),
        date=now_utc(),
        torch=torch.__version__,
        commit=commit_of_this(),
        ceilings=tuple(ceilings),
        rows=tuple(rows),
        small=small,
    )


def merged(now: Node, earlier: Node) -> Node:
    """`now`, and what `earlier` measured on this device that `now` did not."""
    keys = {row.key for row in now.rows}
    rows = [*(row for row in earlier.rows if row.key not in keys), *now.rows]
    limits = {(c.name, c.dtype, c.threads): c for c in (*earlier.ceilings, *now.ceilings)}
    return replace(
        now, ceilings=tuple(limits.values()), rows=tuple(sorted(rows, key=lambda r: (r.threads, r.case, r.shape)))
    )


# ---------------------------------------------------------------------------------------------------------------------
# Files


def write_csv(rows: Sequence[Row], path: Path) -> None:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, [f.name for f in fields(Row)])
    writer.writeheader()
    writer.writerows(asdict(row) for row in rows)
    atomic_write(path, text.getvalue())


def write_node(node: Node, path: Path) -> None:
    write_json(path, {"format": FORMAT, **asdict(node)})


def read_node(path: Path) -> Node:
    """Raises DataError for a file that is not there, or that `write_node` has not written."""
    if not path.is_file():
        raise DataError(f"{path}: no such file; `sorahpc profile kernels` writes one into runs/<run>/profile/kernels")
    data = read_json(path)
    try:
        if data is None or data["format"] != FORMAT:
            raise ValueError(f"a JSON mapping of format {FORMAT} expected")
        data["rows"] = tuple(_typed(Row, row) for row in data["rows"])
        data["ceilings"] = tuple(_typed(Ceiling, ceiling) for ceiling in data["ceilings"])
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
