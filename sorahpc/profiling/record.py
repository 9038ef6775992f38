"""Recording some steps of a job: with torch.profiler, or marked for Nsight.

What code belongs to is told by spans: `span("optimizer")` around code, `layer_spans` around the forward and backward
passes of a model's layers. sorahpc.profiling.trace says what a trace has in it.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import socket
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field, TypeAdapter, ValidationError
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.profiler import ProfilerActivity, record_function, schedule

from sorahpc.config import ProfileConfig
from sorahpc.errors import DataError
from sorahpc.profiling.machine import commit_of_this, device_name, now_utc, slug
from sorahpc.profiling.trace import (
    BACKWARD,
    FORWARD,
    SPAN,
    Findings,
    Positive,
    analyse,
    memory_points,
    read_events,
)
from sorahpc.runs import Task, write_json

FORMAT = 1

log = logging.getLogger(__name__)


def span(name: str) -> record_function:
    """A context whose time `analyse` tells apart, and an NVTX range under Nsight. About 1 us where nobody records."""
    return record_function(SPAN + name)


@contextlib.contextmanager
def layer_spans(layers: Iterable[tuple[str, nn.Module]]) -> Iterator[None]:
    """Spans `forward: NAME` and `backward: NAME` around what each module computes; several may share a name.

    A backward span ends with the gradient of the module's inputs. Where none of them needs one, as those of the first
    layers, it ends with the gradients of all its parameters, and what else hangs on them (Megatron adds them to its
    buffers there).
    """
    handles: list[Any] = []
    open_spans: list[tuple[nn.Module, record_function]] = []
    left: dict[nn.Module, int] = {}  # parameters without their gradient yet, of modules whose backward ends with these

    def enter(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, *_: object) -> None:
            open_spans.append((module, span(name)))
            open_spans[-1][1].__enter__()

        return hook

    def leave(module: nn.Module, *_: object) -> None:
        for i in reversed(range(len(open_spans))):
            if open_spans[i][0] is module:
                open_spans.pop(i)[1].__exit__(None, None, None)
                return

    def inputs_done(module: nn.Module, grads: tuple[Tensor | None, ...], _: object) -> None:
        if any(grad is not None for grad in grads):
            leave(module)
        else:  # none needs one: torch calls this as soon as the module's backward begins
            left[module] = sum(p.requires_grad for p in module.parameters())

    def parameter_done(module: nn.Module) -> Callable[..., None]:
        def hook(*_: object) -> None:
            if module in left:
                left[module] -= 1
                if left[module] == 0:
                    del left[module]
                    leave(module)

        return hook

    warnings.filterwarnings("ignore", message="Full backward hook is firing when gradients")  # see inputs_done
    layers = list(layers)
    try:
        for name, module in layers:
            handles.append(module.register_forward_pre_hook(enter(FORWARD + name)))
            handles.append(module.register_forward_hook(leave))
            handles.append(module.register_full_backward_pre_hook(enter(BACKWARD + name)))
            handles.append(module.register_full_backward_hook(inputs_done))
        for _, module in reversed(layers):  # of spans that end with the same gradient the inner ones first
            for parameter in module.parameters():
                if parameter.requires_grad:
                    # A hook of the accumulating node comes after the gradient was added, and after hooks set before.
                    handles.append(get_gradient_edge(parameter).node.register_hook(parameter_done(module)))
        yield
    finally:
        for handle in handles:
            handle.remove()


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
    step_ms: Annotated[list[Positive], Field(min_length=1)]
    step_tokens: list[int]
    recorded_step_ms: Annotated[list[Positive], Field(min_length=1)]
    found: Findings | None


@contextlib.contextmanager
def recorded(
    how: ProfileConfig, folder: Path, task: Task, device: torch.device, layers: Sequence[tuple[str, nn.Module]]
) -> Iterator[Callable[[int], None]]:
    """Record `how.steps` steps of this rank, after `how.warmup_steps`, if it is one of `how.ranks`.

    As many steps again go unrecorded after them (`num_steps` in all): their time is free of what recording costs. Of
    several recorded ranks, one step between is not counted: in it the first waits for the last to write its trace.

    Yields:
        What to call at the end of each step, with the tokens that it took.

    Writes into `folder`, named by device, tool (where it is not torch) and rank: `.json` (a `Summary`); where
    `how.tool` is torch, `.trace.json.gz`, and on a GPU `.memory.pickle` (every allocation, as
    docs.pytorch.org/memory_viz opens it). They take the place of earlier ones when all is recorded and read. What a
    killed recording of this rank left aside goes when the next begins.
    """
    if task.rank not in how.ranks:
        yield lambda tokens: None
        return
    folder.mkdir(parents=True, exist_ok=True)
    stem = f"{_stem(how, device)}{task.rank}"
    _remove_left_aside(folder, f"{stem}.")
    # Dotted and beside the results: renamed, not copied, and never taken for one of them.
    with tempfile.TemporaryDirectory(prefix=f".{stem}.", dir=folder) as aside:
        with _Recorder(how, device, Path(aside) / stem, layers) as recorder:
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
            step_ms=[round(s * 1e3, 6) for s in recorder.step_s],
            recorded_step_ms=[round(s * 1e3, 6) for s in recorder.recorded_s],
            step_tokens=recorder.step_tokens,
            found=analyse(recorder.trace) if how.tool == "torch" else None,
        )
        for path in Path(aside).iterdir():
            os.replace(path, folder / path.name)
        write_json(folder / f"{stem}.json", {"format": FORMAT, **asdict(summary)})


def remove_other_ranks(how: ProfileConfig, folder: Path, device: torch.device) -> None:
    """Remove what an earlier profile with this tool, of this kind of device, left of ranks that this one has not.

    For one rank to call, after all have written.
    """
    start = _stem(how, device)
    kept = {f"{start}{rank}" for rank in how.ranks}
    for path in folder.glob(f"{start}*"):
        if path.name.split(".")[0] not in kept:
            path.unlink()
    _remove_left_aside(folder, start)


def _remove_left_aside(folder: Path, start: str) -> None:
    """Remove what writers that were killed left of files whose names begin so; the job's lease allows no other."""
    for path in folder.glob(f".{start}*"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def _stem(how: ProfileConfig, device: torch.device) -> str:
    """How the names of a profile's files begin, up to the rank."""
    return f"{slug(device)}{'' if how.tool == 'torch' else f'_{how.tool}'}_rank"


def num_steps(how: ProfileConfig) -> int:
    return how.warmup_steps + 2 * how.steps + _uneven_steps(how)


def _uneven_steps(how: ProfileConfig) -> int:
    """Steps after those that are recorded in which ranks wait for each other's traces."""
    return int(len(how.ranks) > 1)


class _Recorder:
    """The profiler and the spans of one rank; `step_done` starts and ends its recording."""

    def __init__(
        self, how: ProfileConfig, device: torch.device, stem: Path, layers: Sequence[tuple[str, nn.Module]]
    ) -> None:
        self.how, self.device, self.layers, self.done = how, device, layers, 0
        self.trace, self.snapshot = (stem.with_name(stem.name + end) for end in (".trace.json.gz", ".memory.pickle"))
        self.recorded_s: list[float] = []
        self.step_s: list[float] = []
        self.step_tokens: list[int] = []
        self.began = time.perf_counter()
        self.stack = contextlib.ExitStack()
        self.profiler: torch.profiler.profile | None = None

    def __enter__(self) -> _Recorder:
        self.stack.enter_context(layer_spans(self.layers))
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
        elif self.device.type != "cuda":
            log.warning(
                "profile.tool: %s records a GPU, and this rank runs on a CPU: no report will come; use "
                "profile.tool=torch",
                self.how.tool,
            )
        return self

    def __exit__(self, *error: object) -> None:
        self.stack.close()

    def step_done(self, tokens: int) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()  # a step's time is that of its kernels too
        self.done += 1
        seconds, recorded_steps = time.perf_counter() - self.began, self.done - self.how.warmup_steps
        if recorded_steps > self.how.steps + _uneven_steps(self.how):
            self.step_s.append(seconds)
            self.step_tokens.append(tokens)
        elif 0 < recorded_steps <= self.how.steps:
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
        profiler.export_chrome_trace(str(self.trace))  # .gz has it compressed

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
    # Kineto says on stderr when it begins and ends. Where there is no GPU it has no error to tell either.
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")
    with torch.profiler.profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        out = call()
        del out
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json.gz"
        profiler.export_chrome_trace(str(path))
        points = memory_points(read_events(path))
    return max((size for _, size in points), default=0)


def read_summary(path: Path) -> Summary:
    """Raises DataError for a file that `recorded` has not written."""
    try:
        text = path.read_bytes()
        if json.loads(text)["format"] != FORMAT:
            raise ValueError(f"format {FORMAT} expected")
        return _SUMMARY.validate_json(text, strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        reason = f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
    except (OSError, RecursionError, KeyError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())
    raise DataError(f"{path}: not what `sorahpc profile` writes ({reason}); record again")


_SUMMARY = TypeAdapter(Summary)
