"""Times the ops beside their peers and this machine's limits.

Every figure is a median over runs in which all candidates take turns: a slow moment of the machine meets them all.
"""

from __future__ import annotations

import csv
import io
import os
import platform
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from pathlib import Path

import torch

from sorahpc.errors import NumericsError
from sorahpc.ops import stream_copy
from sorahpc.ops.cases import OURS, Case
from sorahpc.runs import atomic_write

COPY_BYTES = 256 << 20  # beyond any cache
FLUSH_BYTES = 256 << 20  # on a GPU, between two runs: beyond its L2
# Page faults of fresh memory cost more than the kernels: freed memory is kept. glibc reads these when a process starts.
MALLOC = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 40), "MALLOC_TOP_PAD_": str(256 << 20)}


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
    of_limit: float  # of the copy's gb_s
    ours_is_faster_by: float  # this candidate's time over ours


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else []:
        if line.startswith("model name"):
            return f"{line.split(':')[1].strip()}, {os.cpu_count()} cores"
    return platform.processor() or platform.machine()


def _commit() -> str:
    here = Path(__file__).resolve().parent
    found = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=here, capture_output=True, text=True)
    return found.stdout.strip() if found.returncode == 0 else ""


def interleaved_times(
    calls: dict[str, Callable[[], object]], device: torch.device, repeats: int
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


def copy_limit(device: torch.device, repeats: int) -> tuple[float, str]:
    """Bytes a second, read and written, of the fastest copy of this device, and which it was."""
    source = torch.zeros(COPY_BYTES // 4, device=device)
    target = torch.zeros_like(source)
    calls: dict[str, Callable[[], object]] = {"memcpy": lambda: target.copy_(source)}
    if device.type == "cpu":
        calls["non-temporal copy"] = lambda: stream_copy(source)
    times = interleaved_times(calls, device, repeats)
    medians = {name: values[len(values) // 2] for name, values in times.items()}
    best = min(medians, key=lambda name: medians[name])
    return 2 * source.nbytes / medians[best], best


def check(case: Case) -> None:
    """Every candidate computes what ours does, before any is timed.

    Raises:
        NumericsError: one does not.
    """
    ours = case.results[OURS]().double()
    for name, result in case.results.items():
        found = result().double()
        difference = float((found - ours).norm() / ours.norm().clamp_min(1e-30))
        if not difference <= case.tolerance:
            raise NumericsError(
                f"profile: {case.name} {case.dtype}: `{name}` differs from `{OURS}` by {difference:.1e} of its norm, "
                f"expected at most {case.tolerance:.0e}"
            )


def measure(cases: Iterable[Case], device: torch.device, repeats: int) -> Iterator[Row]:
    now, name, commit = datetime.now(UTC).strftime("%Y-%m-%d %H:%M"), device_name(device), _commit()
    for case in cases:
        check(case)
        limit, _ = copy_limit(device, max(3, repeats // 2))  # beside each case: a shared machine's speed drifts
        times = interleaved_times(case.calls, device, repeats)
        medians = {candidate: values[len(values) // 2] for candidate, values in times.items()}
        for candidate, values in times.items():
            median = medians[candidate]
            yield Row(
                date=now,
                device=name,
                threads=torch.get_num_threads() if device.type == "cpu" else 0,
                torch=torch.__version__,
                commit=commit,
                case=case.name,
                dtype=str(case.dtype).removeprefix("torch."),
                shape=case.shape,
                candidate=candidate,
                median_ms=round(median * 1e3, 4),
                p10_ms=round(values[len(values) // 10] * 1e3, 4),
                p90_ms=round(values[len(values) * 9 // 10] * 1e3, 4),
                gb_s=round(case.bytes / median / 1e9, 2),
                of_limit=round(case.bytes / median / limit, 3),
                ours_is_faster_by=round(median / medians[OURS], 2),
            )


def write_csv(rows: list[Row], path: Path) -> None:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, [f.name for f in fields(Row)])
    writer.writeheader()
    writer.writerows(asdict(row) for row in rows)
    atomic_write(path, text.getvalue())
