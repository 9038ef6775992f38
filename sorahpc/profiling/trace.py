"""Traces of a job's steps: recorded with torch.profiler, or marked for Nsight; and what a trace says.

`Recorder` sees the steps of one rank: some to warm up, then those that count. What code belongs to is told by spans:
`span("optimizer")` around code, `layer_spans` around the forward and backward passes of a model's layers. A trace is
Chrome's JSON, as chrome://tracing and Perfetto open it; `analyse` reads it back.

On a GPU, time is that of kernels, each counted for the innermost span that it was launched in; on the CPU, where
operations end before the next begins, it is that of the span itself without the spans inside it.
"""

from __future__ import annotations

import bisect
import contextlib
import gzip
import heapq
import json
import os
import socket
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, record_function, schedule

from sorahpc.config import ProfileConfig
from sorahpc.errors import DataError
from sorahpc.profiling.machine import commit_of_this, device_name, now_utc, slug
from sorahpc.runs import Task, read_json, write_json

SPAN = "sorahpc "  # begins the name of every span of ours in a trace
FORWARD, BACKWARD = "forward: ", "backward: "  # of a layer
TOP = 25
TIMELINE_POINTS = 400
FORMAT = 1


def span(name: str) -> record_function:
    """A context whose time `analyse` tells apart, and an NVTX range under Nsight. About 1 us where nobody records."""
    return record_function(SPAN + name)


@contextlib.contextmanager
def layer_spans(layers: Iterable[tuple[str, nn.Module]]) -> Iterator[None]:
    """Spans `forward: NAME` and `backward: NAME` around what each module computes; several may share a name."""
    handles: list[Any] = []
    open_spans: list[record_function] = []

    def enter(name: str) -> Callable[..., None]:
        def hook(*_: object) -> None:
            open_spans.append(span(name))
            open_spans[-1].__enter__()

        return hook

    def leave(*_: object) -> None:
        open_spans.pop().__exit__(None, None, None)

    try:
        for name, module in layers:
            handles.append(module.register_forward_pre_hook(enter(FORWARD + name)))
            handles.append(module.register_forward_hook(leave))
            handles.append(module.register_full_backward_pre_hook(enter(BACKWARD + name)))
            handles.append(module.register_full_backward_hook(leave))
        yield
    finally:
        for handle in handles:
            handle.remove()


# ---------------------------------------------------------------------------------------------------------------------
# Recording


@contextlib.contextmanager
def recorded(
    how: ProfileConfig, folder: Path, task: Task, device: torch.device, layers: Sequence[tuple[str, nn.Module]]
) -> Iterator[Callable[[int], None]]:
    """Record `how.steps` steps of this rank, after `how.warmup_steps`, if it is one of `how.ranks`.

    As many steps again go unrecorded after them (`num_steps` in all): their time is free of what recording costs.

    Yields:
        What to call at the end of each step, with the tokens that it took.

    Writes into `folder`, named by device and rank: `.json` (a `Summary`); where `how.tool` is torch, `.trace.json.gz`,
    and on a GPU `.memory.pickle` (every allocation, as docs.pytorch.org/memory_viz opens it). What earlier profiles of
    this kind of device have left there is removed first.
    """
    name = slug(device)
    if task.rank == 0:
        for path in folder.glob(f"{name}_rank*"):
            path.unlink()
    if task.rank not in how.ranks:
        yield lambda tokens: None
        return
    folder.mkdir(parents=True, exist_ok=True)
    stem = f"{name}_rank{task.rank}"
    recorder = _Recorder(how, device, folder / stem)
    with layer_spans(layers), recorder:
        yield recorder.step_done
    summary = Summary(
        job=task.job.removeprefix("profile-"),
        rank=task.rank,
        world_size=task.world_size,
        device=device_name(device),
        host=socket.gethostname(),
        date=now_utc(),
        torch=torch.__version__,
        commit=commit_of_this(),
        tool=how.tool,
        step_ms=[round(s * 1e3, 3) for s in recorder.step_s],
        recorded_step_ms=[round(s * 1e3, 3) for s in recorder.recorded_s],
        step_tokens=recorder.step_tokens,
        found=analyse(recorder.trace) if recorder.trace.exists() else None,
    )
    write_json(folder / f"{stem}.json", {"format": FORMAT, **asdict(summary)})


def num_steps(how: ProfileConfig) -> int:
    return how.warmup_steps + 2 * how.steps


class _Recorder:
    """The profiler of one rank; `step_done` starts and ends its recording."""

    def __init__(self, how: ProfileConfig, device: torch.device, stem: Path) -> None:
        self.how, self.device, self.done = how, device, 0
        self.trace, self.snapshot = (stem.with_name(stem.name + end) for end in (".trace.json.gz", ".memory.pickle"))
        self.recorded_s: list[float] = []
        self.step_s: list[float] = []
        self.step_tokens: list[int] = []
        self.began = time.perf_counter()
        self.stack = contextlib.ExitStack()
        self.profiler: torch.profiler.profile | None = None

    def __enter__(self) -> _Recorder:
        if self.how.tool == "torch":
            cuda = [ProfilerActivity.CUDA] if self.device.type == "cuda" else []
            self.profiler = torch.profiler.profile(
                activities=[ProfilerActivity.CPU, *cuda],
                # The last step of the warm-up is recorded and thrown away: the first that is recorded is slow.
                schedule=schedule(wait=self.how.warmup_steps - 1, warmup=1, active=self.how.steps, repeat=1),
                profile_memory=True,
                on_trace_ready=self._write_trace,
            )
            self.stack.enter_context(self.profiler)
        return self

    def __exit__(self, *error: object) -> None:
        self.stack.close()

    def step_done(self, tokens: int) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()  # a step's time is that of its kernels too
        self.done += 1
        seconds, recorded_steps = time.perf_counter() - self.began, self.done - self.how.warmup_steps
        if recorded_steps > self.how.steps:
            self.step_s.append(seconds)
            self.step_tokens.append(tokens)
        elif recorded_steps > 0:
            self.recorded_s.append(seconds)
        if self.profiler is not None and recorded_steps <= self.how.steps:
            self.profiler.step()
        if recorded_steps == self.how.steps:
            self.stack.close()
        if self.done == self.how.warmup_steps and self.device.type == "cuda":
            if self.profiler is not None:
                torch.cuda.memory._record_memory_history(max_entries=1_000_000)  # torch has no public name for it
                self.stack.callback(self._write_snapshot)
            else:  # what nsys and ncu are told to wait for
                self.stack.enter_context(torch.cuda.profiler.profile())
                self.stack.enter_context(torch.autograd.profiler.emit_nvtx())
        self.began = time.perf_counter()

    def _write_trace(self, profiler: torch.profiler.profile) -> None:
        aside = self.trace.with_name(f".{self.trace.name}")  # a reader sees all of it or none; .gz has it compressed
        profiler.export_chrome_trace(str(aside))
        os.replace(aside, self.trace)

    def _write_snapshot(self) -> None:
        torch.cuda.memory._dump_snapshot(str(self.snapshot))
        torch.cuda.memory._record_memory_history(enabled=None)


def peak_bytes(call: Callable[[], object], device: torch.device) -> int:
    """Most bytes that a call has allocated at a time, its results included. The call was made before."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        out = call()
        torch.cuda.synchronize()
        del out
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        out = call()
        del out
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json.gz"
        profiler.export_chrome_trace(str(path))
        points = _memory(_read(path))
    return max((size for _, size in points), default=0)


# ---------------------------------------------------------------------------------------------------------------------
# Reading


@dataclass(frozen=True)
class Part:
    """What a span's name has taken, a step."""

    name: str
    forward_ms: float
    backward_ms: float
    other_ms: float

    @property
    def ms(self) -> float:
        return self.forward_ms + self.backward_ms + self.other_ms


@dataclass(frozen=True)
class Op:
    """A kernel by its name (on the CPU an operator, without those that it calls), a step."""

    name: str
    calls: float
    ms: float


@dataclass(frozen=True)
class Communication:
    """Time of collectives a step, and how much of it something else was computed in."""

    ms: float
    overlapped_ms: float


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
    wall_ms: float
    busy_ms: float
    parts: list[Part]
    ops: list[Op]
    communication: Communication
    memory: list[tuple[float, int]]
    peak_bytes: int


@dataclass(frozen=True)
class Summary:
    """What was recorded of a rank; `found` is None where Nsight recorded it. Times and tokens of steps are lists."""

    job: str
    rank: int
    world_size: int
    device: str
    host: str
    date: str
    torch: str
    commit: str
    tool: str
    step_ms: list[float]
    step_tokens: list[int]
    recorded_step_ms: list[float]
    found: Findings | None


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
COLLECTIVES = ("nccl", "gloo:", "c10d::")  # begin or are part of their names


def read_summary(path: Path) -> Summary:
    """Raises DataError for a file that `recorded` has not written."""
    data = read_json(path)
    try:
        if data is None or data.pop("format") != FORMAT:
            raise ValueError(f"a JSON mapping of format {FORMAT} expected")
        found = data.pop("found")
        if found is not None:
            found = Findings(
                **found
                | {"parts": [Part(**part) for part in found["parts"]], "ops": [Op(**op) for op in found["ops"]]}
                | {"communication": Communication(**found["communication"])}
            )
        return Summary(**data, found=found)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        reason = " ".join(str(error).split())
        raise DataError(f"{path}: not what `sorahpc profile` writes ({reason}); record again") from None


def _read(path: Path) -> list[dict[str, Any]]:
    try:
        with gzip.open(path, "rt", encoding="utf-8", errors="replace") as file:
            events: list[dict[str, Any]] = json.load(file)["traceEvents"]
            return events
    except (OSError, EOFError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: not a trace of torch.profiler ({' '.join(str(error).split())})") from None


def analyse(path: Path) -> Findings:
    """Read a trace (Chrome's JSON, gzipped) that `recorded` wrote.

    Raises:
        DataError: it is not one, or has no step.
    """
    raw = _read(path)
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
    else:
        times = [(s.name, s.end - s.start) for s in _innermost([*windows, *(e for e in spans if e.thread == main)])]
        operators = [e for e in events if e.category == "cpu_op" and e.thread == main and begin <= e.start < end]
        ops = [(s.name, s.end - s.start) for s in _innermost(operators)]
        work = [e for e in operators if e.name.startswith(COMPUTE)]  # others may wait inside
    calls = Counter(e.name for e in (kernels or operators))
    talk = _union((e.start, e.end) for e in events if _is_collective(e, bool(kernels)) and begin <= e.start < end)
    compute = _union((e.start, e.end) for e in work if not _is_collective(e, bool(kernels)))
    busy = _union((e.start, e.end) for e in work)
    memory = [(round((at - begin) / 1e3, 2), size) for at, size in _memory(raw) if at >= begin]
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
    kernels: Sequence[_Event], spans: Sequence[_Event], events: Iterable[_Event], main: tuple[Any, Any]
) -> list[tuple[str, float]]:
    """(name of the span that launched it, us) of each kernel: the innermost of its thread, else of the main thread,
    which waits while autograd's thread goes backward."""
    launches = {e.correlation: e for e in events if e.category in LAUNCHES and e.correlation is not None}
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
        name = "" if launch is None else name_at(launch.thread, launch.start) or name_at(main, launch.start)
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


def _memory(raw: Iterable[dict[str, Any]]) -> list[tuple[float, int]]:
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
