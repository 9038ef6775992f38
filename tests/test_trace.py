"""What a trace says: on made-up traces whose answer is known, and on real ones of a small model."""

from __future__ import annotations

import gzip
import json
import random
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sorahpc.config import ProfileConfig
from sorahpc.errors import DataError, Stopped
from sorahpc.profiling.page import write_profile_page
from sorahpc.profiling.record import num_steps, read_summary, recorded, remove_other_ranks, span
from sorahpc.profiling.trace import (
    Communication,
    Findings,
    Part,
    _common,
    _Event,
    _innermost,
    _length,
    _thin,
    _union,
    analyse,
)
from sorahpc.runs import Task

CPU = torch.device("cpu")


def event(
    name: str, start: float, end: float, cat: str = "user_annotation", tid: int = 1, **args: Any
) -> dict[str, Any]:
    return {"ph": "X", "name": name, "cat": cat, "ts": start, "dur": end - start, "pid": 1, "tid": tid, "args": args}


def write_trace(path: Path, events: list[dict[str, Any]]) -> Path:
    with gzip.open(path, "wt") as file:
        json.dump({"traceEvents": events}, file)
    return path


def parts_of(found: Findings) -> dict[str, Part]:
    return {part.name: part for part in found.parts}


def test_on_a_gpu_a_kernel_counts_for_the_span_that_launched_it(tmp_path: Path) -> None:
    """Two steps of 1 ms. The backward pass launches from a thread of its own, and so does the loading of data; a copy
    comes from no span."""
    events: list[dict[str, Any]] = [
        event("ProfilerStep#3", 0, 1000),
        event("ProfilerStep#4", 1000, 2000),
        event("sorahpc forward", 0, 400),
        event("sorahpc forward: mlp", 100, 300),
        event("sorahpc backward", 400, 900),
        event("sorahpc backward: mlp", 500, 700, tid=2),
        event("sorahpc optimizer", 900, 1000),
        event("autograd::engine::evaluate_function: MmBackward0", 500, 600, "cpu_op", tid=2),
        event("cudaLaunchKernel", 105, 107, "cuda_runtime", tid=3, correlation=8),  # noise of the next step
        event("cudaMemcpyAsync", 505, 507, "cuda_runtime", tid=3, correlation=9),
        event("cudaLaunchKernel", 110, 112, "cuda_runtime", correlation=1),
        event("cudaLaunchKernel", 310, 312, "cuda_runtime", correlation=2),
        event("cudaLaunchKernel", 510, 512, "cuda_runtime", tid=2, correlation=3),
        event("cudaLaunchKernel", 520, 522, "cuda_runtime", tid=2, correlation=4),
        event("cudaLaunchKernel", 800, 802, "cuda_runtime", tid=2, correlation=7),  # between layers, going backward
        event("cudaLaunchKernel", 950, 952, "cuda_driver", correlation=5),
        event("cudaMemcpyAsync", 1500, 1502, "cuda_runtime", correlation=6),
        # on the device, later than launched, on two streams
        event("noise", 150, 200, "kernel", tid=9, correlation=8),
        event("Memcpy HtoD", 900, 1000, "gpu_memcpy", tid=9, correlation=9),  # beside the all-reduce: no computing
        event("gemm", 200, 400, "kernel", tid=7, correlation=1),
        event("other", 400, 500, "kernel", tid=7, correlation=2),
        event("gemm", 600, 800, "kernel", tid=7, correlation=3),
        event("ncclDevKernel_AllReduce", 700, 1000, "kernel", tid=8, correlation=4),
        event("adam", 1000, 1100, "kernel", tid=7, correlation=5),
        event("add", 1100, 1200, "kernel", tid=7, correlation=7),
        event("Memcpy DtoH", 1600, 1650, "gpu_memcpy", tid=7, correlation=6),
        event("gemm", 2500, 2600, "kernel", tid=7, correlation=1),  # after the last step: not of a step
        {"ph": "i", "name": "[memory]", "ts": 10, "args": {"Device Type": 1, "Total Allocated": 100, "Bytes": 100}},
        {"ph": "i", "name": "[memory]", "ts": 500, "args": {"Device Type": 1, "Total Allocated": 900, "Bytes": 800}},
        {"ph": "i", "name": "[memory]", "ts": 600, "args": {"Device Type": 0, "Total Allocated": 5000, "Bytes": 8}},
    ]
    found = analyse(write_trace(tmp_path / "t.json.gz", events))
    parts = parts_of(found)
    assert (parts["mlp"].forward_ms, parts["mlp"].backward_ms) == (0.1, pytest.approx(0.25))
    assert (parts["between layers"].forward_ms, parts["between layers"].backward_ms) == (0.05, 0.05)
    assert parts["optimizer"].other_ms == 0.05
    assert parts["other threads"].other_ms == 0.075
    assert parts["everything else"].other_ms == 0.025
    assert (found.steps, found.wall_ms, found.busy_ms) == (2, 1.0, pytest.approx(0.5))
    assert found.communication == Communication(ms=0.15, overlapped_ms=0.05)
    assert (found.ops[0].name, found.ops[0].calls, found.ops[0].ms) == ("gemm", 1.0, 0.2)
    assert found.peak_bytes == 900 and found.memory == [(0.01, 100), (0.5, 900)]


def test_on_the_cpu_a_span_has_its_own_time_without_those_inside(tmp_path: Path) -> None:
    events = [
        event("ProfilerStep#3", 0, 1000),
        event("sorahpc forward", 100, 500),
        event("sorahpc forward: self attention", 200, 300),
        event("sorahpc forward: mlp", 300, 450),
        event("sorahpc wait for data", 0, 100),
        event("sorahpc forward: mlp", 0, 900, tid=2),  # of another thread
        event("aten::linear", 300, 440, "cpu_op"),
        event("aten::addmm", 310, 430, "cpu_op"),
        event("LinearBackward", 600, 900, "cpu_op"),  # which waits for others inside
        event("aten::mm", 600, 700, "cpu_op"),
        event("gloo:all_reduce", 650, 800, tid=9),
    ]
    found = analyse(write_trace(tmp_path / "t.json.gz", events))
    parts = parts_of(found)
    assert parts["mlp"].forward_ms == 0.15 and parts["self attention"].forward_ms == 0.1
    assert parts["between layers"].forward_ms == 0.15 and parts["wait for data"].other_ms == 0.1
    assert parts["everything else"].other_ms == 0.5 and sum(part.ms for part in found.parts) == pytest.approx(1.0)
    assert found.busy_ms == 0.24 and found.communication == Communication(ms=0.15, overlapped_ms=0.05)
    assert [(op.name, op.ms) for op in found.ops[:2]] == [("LinearBackward", 0.2), ("aten::addmm", 0.12)]


@pytest.mark.parametrize(
    "content", [b"", b"not gzip", *(gzip.compress(text, mtime=0) for text in (b"{", b"[]", b"{}"))]
)
def test_what_is_no_trace_is_one_line(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "t.json.gz").write_bytes(content)
    with pytest.raises(DataError, match=r"t.json.gz: not a trace of torch.profiler") as caught:
        analyse(tmp_path / "t.json.gz")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "events",
    [
        None, [1, 2], "text", 7,
        [{"args": None}], [{"args": [1]}], [event("a", 0, 1) | {"ts": "0"}], [event("a", 0, 1) | {"dur": None}],
        [event("a", float("nan"), 1)], [event("a", 1, 0)], [event("a", 0, 1, tid=[])],
        [event("a", 0, 1, correlation={})], [{"name": "[memory]", "ts": 1, "args": {"Total Allocated": "1"}}],
        [{"name": "[memory]", "args": {"Total Allocated": 1, "Bytes": 1}}],
    ],
)  # fmt: skip
def test_a_damaged_trace_is_one_line(tmp_path: Path, events: Any) -> None:
    whole = [event("ProfilerStep#1", 0, 10)]
    path = write_trace(tmp_path / "t.json.gz", whole + events if isinstance(events, list) else events)
    with pytest.raises(DataError, match=r"t.json.gz: not a trace of torch.profiler \(.+\)$") as caught:
        analyse(path)
    assert "\n" not in str(caught.value)


def test_a_trace_without_a_step_says_so(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no step in this trace"):
        analyse(write_trace(tmp_path / "t.json.gz", [event("aten::mm", 0, 1, "cpu_op")]))


def test_innermost_is_a_partition_of_the_time_that_some_event_covers() -> None:
    """Against a walk over every microsecond, also for events that overlap without being nested."""
    rng = random.Random(0)
    for _ in range(300):
        events = []
        for i in range(rng.randint(0, 12)):
            start = rng.randint(0, 40)
            events.append(_Event(str(i), "", start, start + rng.randint(0, 20), (1, 1), None))
        by_time: dict[float, str] = {}
        for stretch in _innermost(events):
            for at in range(int(stretch.start), int(stretch.end)):
                assert at not in by_time, "no time is given twice"
                by_time[at] = stretch.name
        for at in range(70):
            covering = [e for e in events if e.start <= at < e.end]
            assert (at in by_time) == bool(covering)
            if covering:
                latest = max(e.start for e in covering)
                assert by_time[at] in {e.name for e in covering if e.start == latest}


def test_unions_and_their_common_part_against_sets() -> None:
    rng = random.Random(1)
    for _ in range(300):
        sets, unions = [], []
        for _ in range(2):
            intervals = [(a, a + rng.randint(0, 9)) for a in (rng.randint(0, 50) for _ in range(rng.randint(0, 8)))]
            sets.append({x for a, b in intervals for x in range(a, b)})
            unions.append(_union((float(a), float(b)) for a, b in intervals))
        assert [_length(u) for u in unions] == [len(s) for s in sets]
        assert _length(_common(*unions)) == len(sets[0] & sets[1])


def test_thinning_keeps_the_peak_and_the_order() -> None:
    points = [(float(i), i * 7919 % 1000) for i in range(1001)]
    thin = _thin(points, 100)
    assert len(thin) <= 100 and max(s for _, s in thin) == max(s for _, s in points)
    assert [t for t, _ in thin] == sorted(t for t, _ in thin) and _thin([], 10) == []


# ---------------------------------------------------------------------------------------------------------------------
# Recording


class TwoLayers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).relu())


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_layers_are_told_apart_forward_and_backward(tmp_path: Path, device: str) -> None:
    model, how = TwoLayers().to(device), ProfileConfig(warmup_steps=2, steps=3)
    layers = [("all", model), ("a", model.first), ("b", model.second)]
    task = Task(tmp_path, "profile-train")
    x = torch.randn(512, 64, requires_grad=True, device=device)
    with recorded(how, tmp_path / "train", task, torch.device(device), layers) as step_done:
        for step in range(num_steps(how)):
            with span("forward"):
                loss = model(x).square().sum()
            with span("backward"):
                loss.backward()
            step_done(100 + step)
    (summary_path,) = (tmp_path / "train").glob("*_rank0.json")
    summary = read_summary(summary_path)
    assert summary.step_tokens == [105, 106, 107] and len(summary.recorded_step_ms) == 3
    assert (summary.job, summary.rank, summary.world_size, summary.tool) == ("train", 0, 1, "torch")
    assert summary.found is not None and summary.found.steps == 3
    parts = parts_of(summary.found)
    for name in ("a", "b", "all", "between layers"):
        assert parts[name].forward_ms > 0 and parts[name].backward_ms > 0, name
    assert parts["a"].other_ms == 0
    if device == "cpu":
        assert sum(part.ms for part in summary.found.parts) == pytest.approx(summary.found.wall_ms, rel=0.01)
        assert any(op.name == "aten::addmm" and op.calls == 2 for op in summary.found.ops)
    else:
        assert sum(part.ms for part in summary.found.parts) <= summary.found.wall_ms
        assert list((tmp_path / "train").glob("*_rank0.memory.pickle"))
    assert summary.found.peak_bytes >= 2 * 512 * 64 * 4
    assert not list(model.first._forward_hooks) and not list(model.first._backward_hooks), "the hooks are gone"
    page = write_profile_page([tmp_path], tmp_path / "p.html").read_text()
    assert "train on" in page and "between layers" in page and "Memory allocated" in page


class Slow(torch.autograd.Function):
    """Takes 20 ms in its backward pass."""

    @staticmethod
    def forward(_: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(_: Any, *grads: Tensor) -> Tensor:
        time.sleep(0.02)
        return grads[0]


class SlowLinear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, Slow.apply(self.weight), self.bias)


class Embedded(nn.Module):
    """As the DiT: two embeddings of what needs no gradient, one of which the layers after it share."""

    def __init__(self) -> None:
        super().__init__()
        self.x, self.t = SlowLinear(8, 8), nn.Sequential(nn.Linear(8, 8), nn.SiLU(), SlowLinear(8, 8))
        self.layers = nn.ModuleList(SlowLinear(8, 8) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        t, x = self.t(x), self.x(x)
        for layer in self.layers:
            x = layer(x + t)
        return x


def test_the_backward_of_a_layer_whose_input_needs_no_gradient_is_its_own(tmp_path: Path) -> None:
    """To the gradients of its parameters, and what others do with them there, as Megatron does: here 10 ms each."""
    model, how = Embedded(), ProfileConfig(warmup_steps=1, steps=2)
    nodes = [torch.autograd.graph.get_gradient_edge(parameter).node for parameter in model.parameters()]
    for node in nodes:
        node.register_hook(lambda *_: time.sleep(0.01))
    layers = [("all", model), ("x", model.x), ("t", model.t), *(("layer", layer) for layer in model.layers)]
    with recorded(how, tmp_path / "train", Task(tmp_path, "profile-train"), CPU, layers) as step_done:
        for _ in range(num_steps(how)):
            with span("backward"):
                model(torch.randn(2, 8)).sum().backward()
            step_done(1)
    (path,) = (tmp_path / "train").glob("*_rank0.json")
    found = read_summary(path).found
    assert found is not None
    parts = parts_of(found)
    asleep = {"x": 40, "t": 60, "layer": 80, "all": 0, "between layers": 0}
    spare = found.wall_ms - sum(asleep.values()) + 0.1  # all the rest of a step, which a busy machine makes long
    for name, least in asleep.items():
        assert least <= parts[name].backward_ms <= least + spare, (name, spare)
    assert sum(part.ms for part in found.parts) == pytest.approx(found.wall_ms, rel=0.01)
    assert not any(layer._backward_hooks for _, layer in layers)


def test_a_rank_that_is_not_chosen_records_nothing(tmp_path: Path) -> None:
    how = ProfileConfig(ranks=(1,))
    with recorded(how, tmp_path / "train", Task(tmp_path, "profile-train", 0, 2), CPU, []) as step_done:
        for _ in range(num_steps(how)):
            step_done(1)
    assert not (tmp_path / "train").exists()


def test_steps_that_are_not_recorded_have_no_hooks_and_wait_for_no_trace_of_another_rank(tmp_path: Path) -> None:
    model, how, hooks = TwoLayers(), ProfileConfig(warmup_steps=1, steps=2, ranks=(0, 1)), []
    assert num_steps(how) == num_steps(how.model_copy(update={"ranks": (0,)})) + 1 == 6
    with recorded(how, tmp_path, Task(tmp_path, "profile-train", 0, 2), CPU, [("all", model)]) as step_done:
        for step in range(num_steps(how)):
            hooks.append(len(model._forward_hooks))
            if step == 3:  # the first after those that are recorded: the other rank writes its trace
                time.sleep(0.5)
            step_done(100 + step)
    (path,) = tmp_path.glob("*_rank0.json")
    summary = read_summary(path)
    assert hooks == [1, 1, 1, 0, 0, 0]
    assert summary.step_tokens == [104, 105] and max(summary.step_ms) < 250 and len(summary.recorded_step_ms) == 2


def record_nothing(folder: Path, how: ProfileConfig, *, rank: int = 0, fail_after: int = 1000) -> None:
    task = Task(folder, "profile-train", rank, 8)
    with recorded(how, folder, task, CPU, []) as step_done:
        for step in range(num_steps(how)):
            if step == fail_after:
                raise Stopped("on request")
            step_done(1)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_what_an_earlier_profile_left_of_other_ranks_goes_and_other_devices_and_tools_stay(tmp_path: Path) -> None:
    how = ProfileConfig(warmup_steps=1, steps=1, ranks=(0, 1))
    record_nothing(tmp_path, how)
    record_nothing(tmp_path, how, rank=1)
    (path,) = tmp_path.glob("*_rank0.json")
    stem = path.name.removesuffix("_rank0.json")
    stale = [tmp_path / f"{stem}_rank{end}" for end in ("7.json", "7.trace.json.gz", "10.json", "10.memory.pickle")]
    other = [tmp_path / "nvidia-h200_rank7.json", tmp_path / f"{stem}_nsys_rank7.json"]
    for path in (*stale, *other):
        path.write_text("{}")
    before = contents(tmp_path)
    remove_other_ranks(how, tmp_path, CPU)
    assert contents(tmp_path) == {n: data for n, data in before.items() if n not in {path.name for path in stale}}


def test_what_a_killed_recording_left_aside_goes_with_the_next(tmp_path: Path) -> None:
    how = ProfileConfig(warmup_steps=1, steps=1)
    record_nothing(tmp_path, how)
    (path,) = tmp_path.glob("*_rank0.json")
    start = path.name.removesuffix("0.json")
    for left in (f".{start}0.x1_y", f".{start}7.x1_y", f".{start}10.x1_y", ".nvidia-h200_rank0.x1_y"):
        (tmp_path / left).mkdir()
        (tmp_path / left / f"{start}0.trace.json.gz").write_bytes(b"half")
    (tmp_path / f".{start}0.json.host.1.2.tmp").write_text("half")
    record_nothing(tmp_path, how)
    kept = [f".{start}7.x1_y", f".{start}10.x1_y", ".nvidia-h200_rank0.x1_y"]  # other ranks may be recording
    assert sorted(p.name for p in tmp_path.glob(".*")) == sorted(kept)
    remove_other_ranks(how, tmp_path, CPU)
    assert [p.name for p in tmp_path.glob(".*")] == kept[-1:]


@pytest.mark.parametrize("fail_after", [0, 2, 3])
def test_a_profile_that_does_not_end_leaves_the_earlier_one(tmp_path: Path, fail_after: int) -> None:
    """Before, in and after what is recorded."""
    how = ProfileConfig(warmup_steps=1, steps=2)
    record_nothing(tmp_path, how)
    before = contents(tmp_path)
    assert len(before) == 2
    with pytest.raises(Stopped):
        record_nothing(tmp_path, how, fail_after=fail_after)
    assert contents(tmp_path) == before


def test_a_trace_that_could_not_be_written_whole_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def export(_: object, path: str) -> None:
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch.profiler.profile, "export_chrome_trace", export)
    with pytest.raises(OSError, match="No space left"):
        record_nothing(tmp_path, ProfileConfig(warmup_steps=1, steps=1))
    assert not contents(tmp_path)


def test_profiles_of_several_tools_lie_side_by_side_and_on_a_cpu_nsight_is_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for tool in ("torch", "nsys", "ncu"):
        record_nothing(tmp_path, ProfileConfig(warmup_steps=1, steps=1, tool=tool))
    words = "records a GPU, and this rank runs on a CPU: no report will come; use profile.tool=torch"
    assert caplog.messages == [f"profile.tool: {tool} {words}" for tool in ("nsys", "ncu")]
    assert sorted(read_summary(path).tool for path in tmp_path.glob("*_rank0.json")) == ["ncu", "nsys", "torch"]


DEEP = pytest.param("[" * 100_000, id="deep")


@pytest.mark.parametrize("text", [DEEP, "", "[]", "null", "{", '{"format": 1}', '{"format": 1, "found": {}}'])
def test_a_summary_that_is_none_is_one_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "s.json").write_text(text)
    with pytest.raises(DataError, match=r"s\.json: not what `sorahpc profile` writes") as caught:
        read_summary(tmp_path / "s.json")
    assert "\n" not in str(caught.value)


SUMMARY = {
    "format": 1, "job": "train", "rank": 0, "world_size": 1, "device": "cpu", "host": "here",
    "date": "2026-01-01 00:00", "torch": "2", "commit": "", "tool": "torch", "step_ms": [2.0], "step_tokens": [8],
    "recorded_step_ms": [3],
    "found": {
        "steps": 1, "wall_ms": 3.0, "busy_ms": 1.0, "memory": [[0.0, 1], [1.0, 2]], "peak_bytes": 2,
        "parts": [{"name": "mlp", "forward_ms": 1.0, "backward_ms": 0.0, "other_ms": 0}],
        "ops": [{"name": "gemm", "calls": 1.0, "ms": 1.0}], "communication": {"ms": 0.0, "overlapped_ms": 0.0},
    },
}  # fmt: skip


def write_summary(path: Path, tool: str = "torch", **changes: Any) -> Path:
    """Changes of what only `found` has are made there."""
    data = json.loads(json.dumps(SUMMARY)) | {"tool": tool}
    for key, value in changes.items():
        (data if key in data else data["found"])[key] = value
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data))
    return path


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("step_ms", []), ("recorded_step_ms", []), ("step_ms", [0]), ("step_ms", [float("nan")]), ("step_ms", ["2"]),
        ("step_tokens", ["8"]), ("rank", "0"), ("host", 1), ("wall_ms", 0), ("wall_ms", float("nan")),
        ("busy_ms", float("inf")), ("memory", [[1]]), ("memory", [["a", 1]]), ("peak_bytes", "2"), ("parts", [1]),
        ("ops", [{"name": "gemm", "calls": 1.0, "ms": "1"}]), ("communication", None), ("found", []),
    ],
)  # fmt: skip
def test_a_damaged_summary_is_one_line(tmp_path: Path, key: str, value: Any) -> None:
    assert read_summary(write_summary(tmp_path / "whole.json")).step_ms == [2.0]
    with pytest.raises(DataError, match=rf"s\.json: not what `sorahpc profile` writes \(.*{key}.*\)") as caught:
        read_summary(write_summary(tmp_path / "s.json", **{key: value}))
    assert "\n" not in str(caught.value)


def test_a_page_calls_a_pack_a_pack(tmp_path: Path) -> None:
    write_summary(tmp_path / "train/a_rank0.json")
    train = write_profile_page([tmp_path], tmp_path / "p.html").read_text()
    assert "tokens a second" in train and "ms a step" in train and "a pack" not in train
    (tmp_path / "train/a_rank0.json").unlink()
    write_summary(tmp_path / "sample/a_rank0.json", job="sample")
    sample = write_profile_page([tmp_path], tmp_path / "p.html").read_text()
    assert "tokens a second" not in sample and "a step" not in sample
    assert "a pack (text, Euler steps, VAE)" in sample and "ms a pack" in sample


def test_a_page_says_what_the_peak_of_memory_is_above(tmp_path: Path) -> None:
    path = write_summary(tmp_path / "train/a_rank0.json")
    assert "above what was allocated when the recording began" in (
        write_profile_page([tmp_path], tmp_path / "p.html").read_text()
    )
    path.with_name("a_rank0.memory.pickle").touch()  # on a GPU all is counted
    assert "above what was" not in write_profile_page([tmp_path], tmp_path / "p.html").read_text()


@pytest.mark.parametrize(("tool", "report"), [("nsys", "nsys_here_rank0.nsys-rep"), ("ncu", "ncu_here_rank0.ncu-rep")])
def test_a_page_names_the_report_that_is_there_and_no_other(tmp_path: Path, tool: str, report: str) -> None:
    write_summary(tmp_path / f"train/a_{tool}_rank0.json", tool, found=None)
    (tmp_path / f"train/{tool}_here_rank1.{tool}-rep").touch()
    page = write_profile_page([tmp_path], tmp_path / "p.html").read_text()
    assert f"{tool}: no report in {tmp_path / 'train'}" in page and "-rep" not in page
    (tmp_path / "train" / report).touch()
    assert f"{tool}: {tmp_path / 'train' / report}" in write_profile_page([tmp_path], tmp_path / "p.html").read_text()
