"""What a trace of torch.profiler says: time by span, kernels, communication against computing, memory.

A trace is Chrome's JSON, as chrome://tracing and Perfetto open it. On a GPU, time is that of kernels, each counted for
the innermost span that it was launched in; on the CPU, where operations end before the next begins, it is that of the
span itself without the spans inside it.
"""

from __future__ import annotations

import bisect
import gzip
import heapq
import json
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from sorahpc.errors import DataError

SPAN = "sorahpc "  # begins the name of every span of ours in a trace
FORWARD, BACKWARD = "forward: ", "backward: "  # of a layer
TOP = 25
TIMELINE_POINTS = 400

# What a file of findings must hold to be read back.
Amount = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


@dataclass(frozen=True)
class Part:
    """What a span's name has taken, a step."""

    name: str
    forward_ms: Amount
    backward_ms: Amount
    other_ms: Amount

    @property
    def ms(self) -> float:
        return self.forward_ms + self.backward_ms + self.other_ms


@dataclass(frozen=True)
class Op:
    """A kernel by its name (on the CPU an operator, without those that it calls), a step."""

    name: str
    calls: Amount
    ms: Amount


@dataclass(frozen=True)
class Communication:
    """Time of collectives a step, and how much of it something else was computed in.

    On the CPU a send or receive lasts from its start to the wait for it, be it done before: what is computed in between
    counts as overlap.
    """

    ms: Amount
    overlapped_ms: Amount


@dataclass(frozen=True)
class Findings:
    """What a trace says; times are means over its steps, of wall time where nothing else is said.

    Attributes:
        steps: steps in the trace.
        wall_ms: of a step.
        busy_ms: of a step, in which a kernel ran (on the CPU: an operator that computes).
        parts: by time, the longest first; "everything else" is what no span was around.
        ops: those that took longest.
        memory: (ms since the first step began, bytes allocated), thinned out, peaks kept; on the CPU above what was
            allocated when recording began.
        peak_bytes: the most of them.
    """

    steps: int
    wall_ms: Positive
    busy_ms: Amount
    parts: list[Part]
    ops: list[Op]
    communication: Communication
    memory: list[tuple[Amount, int]]
    peak_bytes: int


@dataclass(frozen=True)
class _Event:
    name: str
    category: str
    start: float  # us
    end: float
    thread: tuple[Any, Any]
    correlation: Any  # of a kernel with the call that launched it


@dataclass(frozen=True)
class _Stretch:
    """Time in which one event of a thread was the innermost."""

    start: float
    end: float
    name: str


KERNELS = ("kernel", "gpu_memcpy", "gpu_memset")
LAUNCHES = ("cuda_runtime", "cuda_driver")
COMPUTE = ("aten::", "sorahpc::")
AUTOGRAD = "autograd::engine::evaluate_function"
OTHER_THREADS = SPAN + "other threads"
COLLECTIVES = ("nccl", "gloo:", "c10d::")  # begin or are part of their names


def read_events(path: Path) -> list[dict[str, Any]]:
    try:
        with gzip.open(path, "rt", encoding="utf-8", errors="replace") as file:
            events: list[dict[str, Any]] = json.load(file)["traceEvents"]
        for event in events:
            _check(event)
        return events
    except (OSError, EOFError, RecursionError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: not a trace of torch.profiler ({' '.join(str(error).split())})") from None


def _check(event: object) -> None:
    """Raise ValueError for what the rest of this module could not read."""
    args = event.get("args", {}) if isinstance(event, dict) else None
    if not isinstance(event, dict) or not isinstance(args, dict):
        raise ValueError(f"an event with its args expected, found {str(event)[:60]}")
    numbers = [event[key] for key in ("ts", "dur") if key in event]
    if event.get("name") == "[memory]" and "Total Allocated" in args:
        numbers += [event["ts"], args["Total Allocated"], args["Bytes"]]
    for number in numbers:
        if type(number) not in (int, float) or not math.isfinite(number):
            raise ValueError(f"a number expected, found {str(number)[:60]} in {str(event)[:60]}")
    if event.get("dur", 0) < 0:
        raise ValueError(f"dur: at least 0 expected in {str(event)[:60]}")
    if any(isinstance(key, (dict, list)) for key in (event.get("pid"), event.get("tid"), args.get("correlation"))):
        raise ValueError(f"numbers or names expected for pid, tid and correlation in {str(event)[:60]}")


def analyse(path: Path) -> Findings:
    """Read a trace (Chrome's JSON, gzipped) that `recorded` wrote.

    Raises:
        DataError: it is not one, or has no step.
    """
    raw = read_events(path)
    events = [
        _Event(
            name=str(e.get("name", "")),
            category=str(e.get("cat", "")),
            start=float(e["ts"]),
            end=float(e["ts"]) + float(e["dur"]),
            thread=(e.get("pid"), e.get("tid")),
            correlation=e.get("args", {}).get("correlation"),
        )
        for e in raw
        if e.get("ph") == "X" and "ts" in e and "dur" in e
    ]
    windows = [e for e in events if e.category == "user_annotation" and e.name.startswith("ProfilerStep#")]
    if not windows:
        raise DataError(f"{path}: no step in this trace; record one with `sorahpc profile`")
    steps = len(windows)
    begin, end = min(w.start for w in windows), max(w.end for w in windows)
    main = windows[0].thread
    spans = [e for e in events if e.category == "user_annotation" and e.name.startswith(SPAN)]
    kernels = [e for e in events if e.category in KERNELS and begin <= e.start < end]
    if kernels:
        times = _of_kernels(kernels, spans, events, main)
        ops = [(e.name, e.end - e.start) for e in kernels]
        work = kernels
        computing = [e for e in kernels if e.category == "kernel"]  # a copy moves, as a collective does
    else:
        times = [(s.name, s.end - s.start) for s in _innermost([*windows, *(e for e in spans if e.thread == main)])]
        operators = [e for e in events if e.category == "cpu_op" and e.thread == main and begin <= e.start < end]
        ops = [(s.name, s.end - s.start) for s in _innermost(operators)]
        work = computing = [e for e in operators if e.name.startswith(COMPUTE)]  # others may wait inside
    calls = Counter(e.name for e in (kernels or operators))
    talk = _union((e.start, e.end) for e in events if _is_collective(e, bool(kernels)) and begin <= e.start < end)
    compute = _union((e.start, e.end) for e in computing if not _is_collective(e, bool(kernels)))
    busy = _union((e.start, e.end) for e in work)
    memory = [(round((at - begin) / 1e3, 2), size) for at, size in memory_points(raw) if at >= begin]
    per_step = 1e-3 / steps
    return Findings(
        steps=steps,
        wall_ms=round(_length((w.start, w.end) for w in windows) * per_step, 3),
        busy_ms=round(_length(busy) * per_step, 3),
        parts=_parts(times, per_step),
        ops=_top(ops, calls, steps),
        communication=Communication(
            ms=round(_length(talk) * per_step, 3),
            overlapped_ms=round(_length(_common(talk, compute)) * per_step, 3),
        ),
        memory=_thin(memory, TIMELINE_POINTS),
        peak_bytes=max((size for _, size in memory), default=0),
    )


def _is_collective(event: _Event, on_gpu: bool) -> bool:
    wanted = ("kernel",) if on_gpu else ("cpu_op", "user_annotation")
    return event.category in wanted and any(word in event.name for word in COLLECTIVES)


def _innermost(events: Sequence[_Event]) -> list[_Stretch]:
    """The time of one thread, cut where events begin and end, each stretch for the event that began last."""
    out: list[_Stretch] = []
    open_events: list[tuple[float, int, _Event]] = []  # the last begun first
    at = 0.0

    def advance(to: float) -> None:
        """Hand out the time up to `to`."""
        nonlocal at
        while open_events and at < to:
            event = open_events[0][2]
            until = min(event.end, to)
            if until > at:
                out.append(_Stretch(at, until, event.name))
                at = until
            if event.end <= at:
                heapq.heappop(open_events)
        at = to

    for i, event in enumerate(sorted(events, key=lambda e: (e.start, -e.end))):
        advance(event.start)
        heapq.heappush(open_events, (-event.start, -i, event))
    advance(max((e.end for e in events), default=0.0))
    return out


def _of_kernels(
    kernels: Sequence[_Event], spans: Sequence[_Event], events: Sequence[_Event], main: tuple[Any, Any]
) -> list[tuple[str, float]]:
    """(name of the span that launched it, us) of each kernel: the innermost of its thread, or of the main thread
    where autograd's launched it, for which the main thread waits. Others, such as the one that prepares the next batch,
    have nothing to do with what the main thread is at."""
    launches = {e.correlation: e for e in events if e.category in LAUNCHES and e.correlation is not None}
    autograd = {e.thread for e in events if e.name.startswith(AUTOGRAD)}
    by_thread = defaultdict(list)
    for event in spans:
        by_thread[event.thread].append(event)
    stretches = {thread: _innermost(found) for thread, found in by_thread.items()}
    starts = {thread: [s.start for s in found] for thread, found in stretches.items()}

    def name_at(thread: tuple[Any, Any], at: float) -> str:
        i = bisect.bisect_right(starts.get(thread, ()), at) - 1
        return stretches[thread][i].name if i >= 0 and at < stretches[thread][i].end else ""

    out = []
    for kernel in kernels:
        launch = launches.get(kernel.correlation)
        name = "" if launch is None else name_at(launch.thread, launch.start)
        if launch is not None and not name and launch.thread != main:
            name = name_at(main, launch.start) if launch.thread in autograd else OTHER_THREADS
        out.append((name, kernel.end - kernel.start))
    return out


def _parts(times: Iterable[tuple[str, float]], per_step: float) -> list[Part]:
    """By the names of spans; what has none of ours is everything else."""
    sums: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0, 0.0])
    for name, us in times:
        name = name.removeprefix(SPAN) if name.startswith(SPAN) else "everything else"
        for i, prefix in enumerate((FORWARD, BACKWARD)):
            if name.startswith(prefix) or name == prefix.removesuffix(": "):
                sums[name.removeprefix(prefix) if name.startswith(prefix) else "between layers"][i] += us
                break
        else:
            sums[name][2] += us
    parts = [Part(name, *(round(us * per_step, 4) for us in values)) for name, values in sums.items()]
    return sorted(parts, key=lambda part: -part.ms)


def _top(times: Iterable[tuple[str, float]], calls: Mapping[str, int], steps: int) -> list[Op]:
    sums: dict[str, float] = defaultdict(float)
    for name, us in times:
        sums[name] += us
    found = [Op(name[:200], calls[name] / steps, round(us * 1e-3 / steps, 4)) for name, us in sums.items()]
    return sorted(found, key=lambda op: -op.ms)[:TOP]


Intervals = list[tuple[float, float]]


def _union(intervals: Iterable[tuple[float, float]]) -> Intervals:
    """Sorted and disjoint."""
    out: Intervals = []
    for start, end in sorted(intervals):
        if out and start <= out[-1][1]:
            out[-1] = (out[-1][0], max(out[-1][1], end))
        else:
            out.append((start, end))
    return out


def _common(a: Intervals, b: Intervals) -> Intervals:
    """What two unions have in common."""
    out, i, j = [], 0, 0
    while i < len(a) and j < len(b):
        start, end = max(a[i][0], b[j][0]), min(a[i][1], b[j][1])
        if start < end:
            out.append((start, end))
        if a[i][1] < b[j][1]:
            i += 1
        else:
            j += 1
    return out


def _length(intervals: Iterable[tuple[float, float]]) -> float:
    return sum(end - start for start, end in intervals)


def memory_points(raw: Iterable[dict[str, Any]]) -> list[tuple[float, int]]:
    """(us, bytes allocated) after each allocation and release; of the GPU where one was used.

    On the CPU torch counts from where it began to record: what is released and was there before makes no difference.
    """
    found = [e for e in raw if e.get("name") == "[memory]" and "Total Allocated" in e.get("args", {})]
    found = sorted([e for e in found if e["args"].get("Device Type") == 1] or found, key=lambda e: float(e["ts"]))
    if not found:
        return []
    first = found[0]["args"]
    before = 0 if first.get("Device Type") == 1 else int(first["Total Allocated"]) - int(first["Bytes"])
    return [(float(e["ts"]), int(e["args"]["Total Allocated"]) - before) for e in found]


def _thin(points: Sequence[tuple[float, int]], most: int) -> list[tuple[float, int]]:
    """At most `most` points, of each stretch the highest."""
    size = -(-len(points) // most) or 1
    return [max(points[i : i + size], key=lambda point: point[1]) for i in range(0, len(points), size)]
