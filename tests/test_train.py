"""The train job on a real cache: toy videos, decoded, encoded and embedded by the jobs themselves."""

from __future__ import annotations

import contextlib
import json
import math
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import caches
import pytest
import torch
from ranks import run_on_ranks

from sorahpc.config import Config
from sorahpc.configfile import parse_config
from sorahpc.data.latents import LatentCache
from sorahpc.errors import DataError, NumericsError, SetupError, Stopped
from sorahpc.runs import Task

CLIPS = 18


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A config (as data) whose manifest and cache exist. Clips of three aspect ratios and three durations."""
    from sorahpc.data.toyworld import write_world
    from sorahpc.jobs import encode, prepare
    from sorahpc.models.text import make_tiny_t5

    root = tmp_path_factory.mktemp("train")
    write_world(root / "videos", CLIPS, 0)
    captions = [p.read_text() for p in sorted((root / "videos").glob("*.txt"))]
    make_tiny_t5(root / "t5", captions, 32, 0)
    data = {
        "run": "base",
        "runs_dir": str(root / "runs"),
        "prepare": {"videos": str(root / "videos")},
        "vae": {"path": "configs/vae/toy"},
        "text": {"path": str(root / "t5"), "max_tokens": 32},
        "model": {"depth": 2, "dim": 64, "num_heads": 4},
        "train": {
            "steps": 30, "tokens_per_pack": 400, "packs_per_step": 2, "lr": 1e-3, "warmup_steps": 5, "log_every": 1,
            "save_every": 1000,
        },
    }  # fmt: skip
    config = parse_config(data)
    prepare.run(config, Task(config.run_dir, "prepare"))
    encode.run(config, Task(config.run_dir, "encode"))
    data["encode"] = {"cache": str(config.cache_dir)}
    return data


def _config(world: dict[str, Any], run: str, **changes: Any) -> Config:
    data = json.loads(json.dumps(world)) | {"run": run}
    for key, value in changes.items():
        section, _, name = key.rpartition("__")
        (data[section] if section else data)[name] = value
    return parse_config(data)


class _StopAfter:
    """A stop request that comes after so many looks; the job looks once a step."""

    def __init__(self, steps: int) -> None:
        self.left = steps

    def __call__(self) -> bool:
        self.left -= 1
        return self.left <= 0


def train_legs(rank: int, world_size: int, data: dict[str, Any], stops: list[int]) -> list[str]:
    """Run the job once for each entry: to its end for 0, else stopped on request after so many steps."""
    from sorahpc.jobs import train

    config, outcomes = parse_config(data), []
    for stop in stops:
        # Only one rank is asked to stop, and not rank 0: all must agree.
        asked = _StopAfter(stop) if stop and rank == world_size - 1 else (lambda: False)
        task = Task(config.run_dir, "train", rank, world_size, rank, stop_requested=asked)
        try:
            train.run(config, task)
            outcomes.append("done")
        except Stopped as error:
            outcomes.append(str(error))
        time.sleep(0.5)  # the former process group's store is gone before the next is made at its port
    return outcomes


def _tensors(config: Config) -> dict[str, torch.Tensor]:
    """All tensors of the newest checkpoint: weights, EMA, master weights and moments."""
    from sorahpc.distributed import checkpoint, megatron

    folder = checkpoint.latest(config.run_dir / "checkpoints")
    assert folder is not None
    megatron.start()
    try:
        plain = megatron._core().dist_checkpointing.load_plain_tensors(str(folder))
        return {key: value for key, value in plain.items() if torch.is_tensor(value)}
    finally:
        megatron.stop()


def _metrics(config: Config) -> list[dict[str, float]]:
    return [json.loads(line) for line in (config.run_dir / "metrics.jsonl").read_text().splitlines()]


def test_resuming_twice_is_bit_equal_to_never_stopping(world: dict[str, Any]) -> None:
    """30 steps against 10 + 10 + 10, on tp=2 with sequence parallelism: weights, EMA, moments, logged loss."""
    layout = {"train__tp": 2, "train__resources": {"tasks_per_node": 2}}
    whole, parts = _config(world, "whole", **layout), _config(world, "parts", **layout)
    assert run_on_ranks(2, train_legs, whole.model_dump(mode="json"), [0]) == [["done"]] * 2
    data = parts.model_dump(mode="json")
    for expected, stop in (("at step 10 of 30", 10), ("at step 20 of 30", 10), ("done", 0)):
        for outcome in run_on_ranks(2, train_legs, data, [stop]):
            assert expected in outcome[0]
    a, b = _tensors(whole), _tensors(parts)
    assert a.keys() == b.keys() and any(k.startswith("ema.") for k in a) and any("exp_avg_sq" in k for k in a)
    assert [k for k in a if not torch.equal(a[k], b[k])] == []
    keys = ("step", "loss", "grad_norm", "lr", "tokens", "consumed")
    logged = [[{k: row[k] for k in keys} for row in _metrics(c)] for c in (whole, parts)]
    assert logged[0] == logged[1]
    assert [row["step"] for row in logged[0]] == list(range(1, 31))
    assert (parts.run_dir / "tensorboard").is_dir()


def test_dp_sees_the_same_samples_and_the_same_loss(world: dict[str, Any]) -> None:
    one = _config(world, "dp1", train__steps=3, train__warmup_steps=0)
    two = _config(world, "dp2", train__steps=3, train__warmup_steps=0, train__resources={"tasks_per_node": 2})
    assert run_on_ranks(1, train_legs, one.model_dump(mode="json"), [0]) == [["done"]]
    assert run_on_ranks(2, train_legs, two.model_dump(mode="json"), [0]) == [["done"]] * 2
    for a, b in zip(_metrics(one), _metrics(two), strict=True):
        assert a["consumed"] == b["consumed"] and a["tokens"] == b["tokens"]
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)


def test_training_on_the_references_is_training_on_the_kernels(world: dict[str, Any]) -> None:
    """`ops: reference` changes roundings alone: ten steps with rope3d, norms, modulation and noise in Python."""
    fast = _config(world, "kernels", train__steps=10, train__warmup_steps=0)
    slow = _config(world, "references", train__steps=10, train__warmup_steps=0, ops="reference")
    for config in (fast, slow):
        assert run_on_ranks(1, train_legs, config.model_dump(mode="json"), [0]) == [["done"]]
    for a, b in zip(_metrics(fast), _metrics(slow), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3)
    weights, others = _tensors(fast), _tensors(slow)  # a loss, one float32, may well round to the same
    assert any(not torch.equal(x, others[name]) for name, x in weights.items())  # it did switch


def profile_ranks(rank: int, world_size: int, data: dict[str, Any]) -> None:
    from sorahpc.jobs import train

    config = parse_config(data)
    train.profile(config, Task(config.run_dir, "profile-train", rank, world_size, rank))


def test_a_profile_tells_layers_and_communication_apart_and_leaves_the_run_alone(world: dict[str, Any]) -> None:
    """Two ranks of tensor and sequence parallelism, both recorded."""
    from sorahpc.profiling.record import read_summary

    profile = {"warmup_steps": 1, "steps": 2, "ranks": [0, 1]}
    layout = {"train__tp": 2, "train__resources": {"tasks_per_node": 2}}
    config = _config(world, "profiled", **layout, profile=profile)
    run_on_ranks(2, profile_ranks, config.model_dump(mode="json"))
    summaries = [read_summary(path) for path in sorted((config.run_dir / "profile/train").glob("*_rank*.json"))]
    assert [s.rank for s in summaries] == [0, 1]
    for summary in summaries:
        found = summary.found
        assert found is not None and found.steps == 2 and len(summary.step_ms) == 2 and min(summary.step_tokens) > 0
        parts = {part.name: part for part in found.parts}
        for layer in ("self attention", "cross attention", "mlp", "residuals, norms, modulation", "patch embedding",
                      "timestep embedding", "text embedding", "ada ln", "last layer"):  # fmt: skip
            assert parts[layer].forward_ms > 0 and parts[layer].backward_ms > 0, layer
        for phase in ("optimizer", "gradient reduction", "gradient norm", "ema", "wait for data"):
            assert parts[phase].other_ms > 0, phase
        assert parts["everything else"].ms < 0.3 * found.wall_ms
        assert 0 < found.communication.overlapped_ms < found.communication.ms < found.wall_ms
        assert 0 < found.busy_ms < found.wall_ms and found.peak_bytes > 1e6 and found.memory
    names = sorted(path.name for path in config.run_dir.iterdir())
    assert names == ["jobs", "profile"], "no checkpoint, no metrics"
    assert "train on" in (config.run_dir / "profile/index.html").read_text()


def stopped_profile(rank: int, world_size: int, data: dict[str, Any]) -> str:
    from sorahpc.jobs import train

    config = parse_config(data)
    asked = _StopAfter(3) if rank == 1 else (lambda: False)
    with pytest.raises(Stopped) as caught:
        train.profile(config, Task(config.run_dir, "profile-train", rank, world_size, rank, stop_requested=asked))
    return str(caught.value)


def test_a_profile_stops_on_request_of_one_rank_and_keeps_nothing(world: dict[str, Any]) -> None:
    layout = {"train__tp": 2, "train__resources": {"tasks_per_node": 2}}
    config = _config(world, "profile-stopped", **layout, profile={"warmup_steps": 1, "steps": 2})
    said = run_on_ranks(2, stopped_profile, config.model_dump(mode="json"))
    assert said[0] == said[1] and "stopped on request after 2 of 5 steps; nothing of it is kept" in said[0]
    assert not list((config.run_dir / "profile/train").iterdir())


def test_first_loss_is_one_plus_the_variance_of_the_latents(world: dict[str, Any]) -> None:
    config = _config(world, "first", train__steps=1, train__warmup_steps=0, train__packs_per_step=8)
    train_legs(0, 1, config.model_dump(mode="json"), [0])
    cache = LatentCache(config.cache_dir)
    latents = [
        (cache.read(i)[0] - cache.mean.view(-1, 1, 1, 1)) / cache.std.view(-1, 1, 1, 1) for i in range(len(cache))
    ]
    variance = torch.cat([z.flatten() for z in latents]).square().mean().item()
    assert variance == pytest.approx(1.0, abs=0.05), "the cache's statistics normalise the latents"
    assert _metrics(config)[0]["loss"] == pytest.approx(1 + variance, rel=0.05)


def test_one_batch_is_learnt_by_heart(world: dict[str, Any]) -> None:
    from sorahpc.distributed import megatron
    from sorahpc.jobs import train
    from sorahpc.models.dit import DiT

    config = _config(world, "overfit", train__lr=3e-3, train__steps=1000)
    assert config.train and config.model
    cache, mesh = LatentCache(config.cache_dir), megatron.start()
    try:
        batch = train.make_packer(cache, config).next(0)
        pack = train.build_pack(cache, batch.packs[0], config, cache.mean, cache.std, mesh.device)
        assert len({tuple(g) for g in pack.grids.tolist()}) > 1, "samples of different grids train together"
        model = DiT(config.model, mesh, channels=cache.channels, text_dim=cache.dims["text"], dtype=torch.float32)
        ddp = megatron.wrap_ddp(model, model.config)
        optimizer = megatron.make_optimizer(ddp, config.train, mesh, torch.float32)
        losses = []
        for step in range(400):
            losses.append(train.accumulate_gradients(ddp, [pack], pack.target.numel(), mesh))
            for group in optimizer.param_groups:
                group["lr"] = train.learning_rate(step, config.train)
            megatron.clip_and_step(optimizer, megatron.gradient_norm(optimizer), 1.0)
            if losses[-1] < 0.1 * losses[0]:
                break
        assert losses[-1] < 0.1 * losses[0], f"{losses[0]:.3f} -> {losses[-1]:.3f} after {len(losses)} steps"
    finally:
        megatron.stop()


def test_on_a_gpu_packs_are_built_on_a_stream_of_their_own(
    world: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With stand-ins for streams: packs come from the CPU."""
    from sorahpc.distributed.mesh import Mesh
    from sorahpc.jobs import train

    config = _config(world, "stream")
    cache = LatentCache(config.cache_dir)
    current, said = threading.local(), []
    build_pack = train.build_pack

    class Stream:
        def __init__(self, device: torch.device) -> None:
            assert device == torch.device("cuda", 1)

        def synchronize(self) -> None:
            said.append("synchronize")

    @contextlib.contextmanager
    def stream(of: Stream) -> Iterator[None]:
        current.stream = of
        yield
        current.stream = None

    def build(*args: Any) -> train.PackBatch:
        assert isinstance(current.stream, Stream) and args[-1] == torch.device("cuda", 1)
        said.append("build")
        return build_pack(*args[:-1], torch.device("cpu"))

    def record_stream(x: torch.Tensor, of: str) -> None:
        assert of == "main"
        said.append(x)

    monkeypatch.setattr(train, "build_pack", build)
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: "main")
    monkeypatch.setattr(torch.Tensor, "record_stream", record_stream)
    mesh = Mesh(FakeGroup(), FakeGroup(), False, torch.device("cuda", 1))  # type: ignore[arg-type]
    with train.Loader(cache, train.make_packer(cache, config), config, cache.mean, cache.std, mesh) as loader:
        _, packs = loader.next(0)
        loader.ahead[1].result()  # type: ignore[index]
    assert [x for x in said if isinstance(x, str)] == ["build", "build", "synchronize"] * 2
    held = [x for x in said if not isinstance(x, str)]
    for pack in packs:
        for x in (pack.tokens, pack.target, pack.t, pack.texts.text):
            assert any(x is y for y in held)


class FakeGroup:
    def size(self) -> int:
        return 1

    def rank(self) -> int:
        return 0


def test_a_loss_that_is_not_finite_stops_before_the_weights_are_touched(world: dict[str, Any]) -> None:
    from sorahpc.jobs import train

    config = _config(world, "nan", train__lr=1e30, train__warmup_steps=0, train__save_every=1)
    with pytest.raises(
        NumericsError, match=r"step \d+: loss .* the weights are those of step \d+.*samples: [0-9a-f]{16}"
    ):
        train.run(config, Task(config.run_dir, "train"))
    assert all(math.isfinite(row["loss"]) for row in _metrics(config))


def test_a_finished_run_is_left_as_it_is(world: dict[str, Any]) -> None:
    from sorahpc.jobs import train

    config = _config(world, "again", train__steps=2, train__warmup_steps=0)
    train.run(config, Task(config.run_dir, "train"))
    before = {p: p.stat().st_mtime_ns for p in (config.run_dir / "checkpoints").rglob("*")}
    train.run(config, Task(config.run_dir, "train"))
    assert {p: p.stat().st_mtime_ns for p in (config.run_dir / "checkpoints").rglob("*")} == before
    assert [row["step"] for row in _metrics(config)] == [1, 2]


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"train__tokens_per_pack": 10}, DataError, r"train\.tokens_per_pack: 10, but sample \d+ .* tokens"),
        ({"model__patch": [1, 3, 2]}, DataError, r"model\.patch: \(1, 3, 2\) does not divide the latent"),
        ({"encode__cache": "/nowhere/cache"}, DataError, r"/nowhere/cache"),
        (
            {"train__resources": {"tasks_per_node": 2}},
            SetupError,
            r"train\.resources: nodes 1 x tasks_per_node 2, but .* 1",
        ),
    ],
)
def test_what_does_not_fit_is_one_line(
    world: dict[str, Any], changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    from sorahpc.jobs import train

    config = _config(world, "bad", **changes)
    with pytest.raises(error, match=message) as caught:
        train.run(config, Task(config.run_dir, "train"))
    assert "\n" not in str(caught.value)


def test_learning_rate_warms_up_stays_and_decays() -> None:
    from sorahpc.config import TrainConfig
    from sorahpc.jobs.train import learning_rate

    train = TrainConfig(steps=100, tokens_per_pack=1, lr=2.0, warmup_steps=10, decay_steps=20)
    rates = [learning_rate(step, train) for step in range(100)]
    assert rates[0] == pytest.approx(0.2) and rates[9] == rates[79] == 2.0
    assert rates[80] == pytest.approx(2.0) and rates[90] == pytest.approx(1.0) and rates[99] == pytest.approx(0.1)


def test_a_cache_of_another_vae_than_the_checkpoint_s_is_refused_by_field_and_one_that_is_older_passes(
    tmp_path: Path,
) -> None:
    from sorahpc.distributed.checkpoint import Meta
    from sorahpc.jobs import train

    caches.write(tmp_path)
    cache = LatentCache(tmp_path)
    old = cache.info
    new = {**old, "vae": {**old["vae"], "config_sha256": "1" * 64}}
    other = {**old, "vae": {**old["vae"], "config_sha256": "2" * 64}}

    def check(before: dict[str, Any], now: dict[str, Any]) -> None:
        cache.info = now
        train._check_cache(Meta(1, 0, {}, 4, 8, [], [], 10, before, {}), cache, tmp_path, tmp_path / "step-1")

    for before, now in ((old, old), (old, new), (new, old), (new, new)):
        check(before, now)
    for before, now, field in (
        (other, new, 'vae.config_sha256` is "1+", but the checkpoint .* trained with "2+"'),
        (old, {**old, "vae": {"id": "V", "weights_sha256": "f" * 64}}, 'vae.weights_sha256` is "f+"'),
        (old, {**old, "clip_text": {"id": "K"}}, 'clip_text` is {"id": "K"}, but .* with null'),
        ({**old, "clip_text": {"id": "K"}}, old, 'clip_text.id` is null, but .* with "K"'),
    ):
        with pytest.raises(DataError, match=f"field `{field}"):
            check(before, now)


def test_another_model_under_the_same_name_is_refused_by_field_before_it_is_loaded(world: dict[str, Any]) -> None:
    from sorahpc.errors import CheckpointError
    from sorahpc.jobs import train

    config = _config(world, "other", train__steps=1, train__warmup_steps=0)
    train.run(config, Task(config.run_dir, "train"))
    other = _config(world, "other", train__steps=2, train__warmup_steps=0, model__dim=96)
    with pytest.raises(CheckpointError, match=r"model\.dim: the checkpoint .* has 64, this run 96"):
        train.run(other, Task(other.run_dir, "train"))


@pytest.mark.parametrize(("first", "then"), [("muon", "adamw"), ("adamw", "muon")])
def test_another_optimizer_under_the_same_name_is_refused(world: dict[str, Any], first: str, then: str) -> None:
    from sorahpc.errors import CheckpointError
    from sorahpc.jobs import train

    config = _config(world, first, train__steps=1, train__warmup_steps=0, train__optimizer=first)
    train.run(config, Task(config.run_dir, "train"))
    other = _config(world, first, train__steps=2, train__warmup_steps=0, train__optimizer=then)
    with pytest.raises(CheckpointError, match=rf"^train\.optimizer: .* trained with {first}, this run asks for {then}"):
        train.run(other, Task(other.run_dir, "train"))


def test_a_damaged_line_of_metrics_does_not_stop_a_resume(world: dict[str, Any]) -> None:
    from sorahpc.jobs import train

    config = _config(world, "damaged", train__steps=1, train__warmup_steps=0)
    train.run(config, Task(config.run_dir, "train"))
    with open(config.run_dir / "metrics.jsonl", "a") as f:
        f.write('garbage\n{"nostep": 1}\n[3]\n{"step": 2, "loss')
    longer = _config(world, "damaged", train__steps=2, train__warmup_steps=0)
    train.run(longer, Task(longer.run_dir, "train"))
    assert [row["step"] for row in _metrics(longer)] == [1, 2]
