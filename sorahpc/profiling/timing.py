"""Times the ops beside their peers and this machine's limits.

Every figure is a median over runs in which all candidates take turns: a slow moment of the machine meets them all.
"""

from __future__ import annotations

import ctypes
import logging
import socket
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from sorahpc.errors import NumericsError
from sorahpc.ops import stream_copy
from sorahpc.profiling.cases import Case
from sorahpc.profiling.machine import commit_of_this, device_name, now_utc
from sorahpc.profiling.record import peak_bytes
from sorahpc.profiling.results import OURS, Ceiling, LeftOut, Node, Row

log = logging.getLogger(__name__)

COPY_BYTES = 256 << 20  # beyond any cache
FLUSH_BYTES = 1 << 30  # on a GPU, between two runs: beyond its L2, and long enough to launch what is timed meanwhile
MATMUL_SIZE = {"cpu": 1024, "cuda": 8192}  # torch needs 9 s for 1024 of bf16 on a core without AVX-512


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


def copies(buffers: Sequence[Tensor]) -> dict[str, Callable[[], object]]:
    """The fastest copies of some buffers that their device may have, to where a call's results would lie."""
    calls: dict[str, Callable[[], object]] = {"memcpy": lambda: [x.clone() for x in buffers]}
    if buffers[0].device.type == "cpu":
        calls["non-temporal copy"] = lambda: [stream_copy(x) for x in buffers]
    return calls


def large_buffer(device: torch.device) -> Tensor:
    """COPY_BYTES that were written: pages that were never are all one page of zeros."""
    return torch.ones(COPY_BYTES // 4, device=device)


def copy_limit(times: Mapping[str, Sequence[float]], buffers: Sequence[Tensor]) -> tuple[float, str]:
    """Bytes a second, read and written, of the fastest of the `copies` that were timed, and which it was."""
    medians = {name: statistics.median(times[name]) for name in ("memcpy", "non-temporal copy") if name in times}
    best = min(medians, key=lambda name: medians[name])
    return 2 * sum(x.nbytes for x in buffers) / medians[best], best


def matmul_limit(device: torch.device, dtype: torch.dtype, repeats: int) -> float:
    """Operations a second of a large square matrix product, sums and products."""
    n = MATMUL_SIZE[device.type]
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    times = interleaved_times({"matmul": lambda: a @ b}, device, repeats)["matmul"]
    return 2 * n**3 / statistics.median(times)


def ceilings(device: torch.device, repeats: int) -> Iterator[Ceiling]:
    threads = threads_of(device)
    buffers = [large_buffer(device)]
    copy, how = copy_limit(interleaved_times(copies(buffers), device, repeats), buffers)
    yield Ceiling("copy", "any", threads, round(copy / 1e9, 2), f"{how}, {COPY_BYTES >> 20} MB")
    n = MATMUL_SIZE[device.type]
    for dtype in (torch.float32, torch.bfloat16):
        limit = matmul_limit(device, dtype, repeats)
        yield Ceiling("matmul", dtype_name(dtype), threads, round(limit / 1e9, 2), f"torch.matmul, {n} x {n} x {n}")


def check(case: Case) -> None:
    """Every candidate computes what ours does, before any is timed. A peer that can't be called is left out.

    Raises:
        NumericsError: one computes something else.
    """
    ours = case.result(OURS)
    for name in [name for name in case.calls if name != OURS]:
        try:
            found = case.result(name)
            if name in case.results:  # what is timed is another call
                case.calls[name]()
            if torch.cuda.is_available():
                torch.cuda.synchronize()  # or a fault of its kernels would be told of the next candidate
        except Exception as error:  # any: it is the code of others
            case.left_out[name] = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            del case.calls[name]
            log.warning("%s %s: `%s` is left out: %s", case.name, dtype_name(case.dtype), name, case.left_out[name])
            continue
        what = f"profile: {case.name} {case.dtype}"
        if [x.shape for x in found] != [x.shape for x in ours]:
            shapes = [" and ".join(str(tuple(x.shape)) for x in results) for results in (found, ours)]
            raise NumericsError(f"{what}: `{name}` returns {shapes[0]}, expected as `{OURS}` {shapes[1]}")
        for i, (a, b) in enumerate(zip(found, ours, strict=True)):
            difference = float((a.double() - b.double()).norm() / b.double().norm().clamp_min(1e-30))
            if not difference <= case.tolerance:
                raise NumericsError(
                    f"{what}: result {i} of `{name}` differs from that of `{OURS}` by {difference:.1e} of its norm, "
                    f"expected at most {case.tolerance:.0e}"
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
        # The copies take their turns with the candidates: a shared machine's speed drifts within seconds. And they read
        # the same buffers, where an op writes as much as it reads: how fast memory is depends on the pages that a
        # buffer got, by a fifth on an EPYC.
        buffers = case.copied or (large_buffer(device),)
        times = interleaved_times({**case.calls, **copies(buffers)}, device, repeats)
        limit, _ = copy_limit(times, buffers)
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


def key_of(case: Case, device: torch.device) -> tuple[str, str, str, int]:
    """`Row.key` of the rows that `measure` would give now."""
    return case.name, dtype_name(case.dtype), case.shape, threads_of(device)


def left_out(case: Case, device: torch.device) -> list[LeftOut]:
    """The peers that `measure` has left out of a case."""
    return [LeftOut(*key_of(case, device), name, reason) for name, reason in case.left_out.items()]


def make_node(
    device: torch.device,
    ceilings: Sequence[Ceiling],
    rows: Sequence[Row],
    small: bool = False,
    left_out: Sequence[LeftOut] = (),
) -> Node:
    return Node(
        device=device_name(device),
        host=socket.gethostname(),
        date=now_utc(),
        torch=torch.__version__,
        commit=commit_of_this(),
        ceilings=tuple(ceilings),
        rows=tuple(rows),
        small=small,
        left_out=tuple(left_out),
    )
