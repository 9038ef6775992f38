"""Train the DiT on a latent cache: a gang of ranks, tp x dp, on CUDA over NCCL or on CPU over gloo.

A step: next packs -> noise and target -> forward, backward -> reduce gradients -> finite on all ranks? -> clip -> step
-> EMA -> stop asked? -> log, save. All of the progress is in the checkpoint (weights, EMA, optimizer, step, samples
consumed), so running it again is resuming it, bit by bit on the same layout.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sorahpc import ops
from sorahpc.config import Config, TrainConfig
from sorahpc.data.cache import differences
from sorahpc.data.indexing import open_cache
from sorahpc.data.latents import LatentCache
from sorahpc.data.packing import GlobalBatch, Packer
from sorahpc.data.texts import PackTexts, join_texts
from sorahpc.diffusion import flow
from sorahpc.distributed import checkpoint, megatron
from sorahpc.distributed.checkpoint import Meta
from sorahpc.distributed.ema import Ema
from sorahpc.distributed.mesh import Mesh, leaving
from sorahpc.errors import CheckpointError, DataError, NumericsError, SetupError, Stopped
from sorahpc.models.dit import DiT
from sorahpc.profiling.page import write_profile_page
from sorahpc.profiling.record import num_steps, recorded, remove_other_ranks, span
from sorahpc.runs import Task, atomic_write

log = logging.getLogger(__name__)


def run(config: Config, task: Task) -> None:
    """The job.

    Raises:
        ConfigError: sections missing. SetupError: ranks that don't match the config. DataError: no cache, or one that
        doesn't fit. CheckpointError: a checkpoint that was altered or is of another model. Stopped: saved on request.
        NumericsError: a loss or gradient that is not finite.
    """
    with _started(config, task) as (cache, mesh):
        _train(config, task, cache, mesh)


@contextlib.contextmanager
def _started(config: Config, task: Task) -> Iterator[tuple[LatentCache, Mesh]]:
    """The cache, and the mesh of the ranks that this process is one of."""
    config.need("model", "train")
    assert config.train is not None
    train = config.train
    if task.world_size != train.resources.world_size:
        raise SetupError(
            f"train.resources: nodes {train.resources.nodes} x tasks_per_node {train.resources.tasks_per_node}, but "
            f"the job was started with {task.world_size} ranks; set them to what the job has"
        )
    cache = open_cache(config)
    mesh = megatron.start(task.rank, task.world_size, task.local_rank, tp=train.tp, sp=train.sp)
    with leaving(megatron.stop, task.world_size), ops.chosen(config.ops):
        yield cache, mesh


def _train(config: Config, task: Task, cache: LatentCache, mesh: Mesh) -> None:
    train, model_config = config.train, config.model
    assert train is not None and model_config is not None
    root = config.run_dir / "checkpoints"

    found = checkpoint.latest(root)
    meta = None if found is None else checkpoint.verify(found, mesh)
    if found is not None and meta is not None:
        checkpoint.check_model(meta, model_config, cache.channels, cache.dims, found)
        _check_cache(meta, cache, config.cache_dir, found)
        _check_optimizer(meta, train, found)

    learner = make_learner(config, cache, mesh)
    state = (learner.model, learner.optimizer, learner.ema)  # what a checkpoint holds

    step, consumed, mean, std = 0, 0, cache.mean, cache.std
    if found is not None and meta is not None:
        checkpoint.load(found, *state, mesh)
        step, consumed = meta.step, meta.consumed
        mean, std = torch.tensor(meta.latent_mean), torch.tensor(meta.latent_std)
        log.info("resumed from %s at step %d of %d", found, step, train.steps)
        if meta.samples != len(cache):
            # A new epoch of the new cache, later than any seen: no sample meets the same noise and timestep again.
            consumed = (consumed // meta.samples + 1) * len(cache)
            log.warning("the cache had %d samples and now has %d: a new epoch starts", meta.samples, len(cache))
        if step >= train.steps:
            log.warning("nothing to do: step %d is there, train.steps is %d", step, train.steps)
            task.report(train.steps, train.steps, "step")

    packer = make_packer(cache, config)
    loader = Loader(cache, packer, config, mean, std, mesh)
    metrics = Metrics(config.run_dir, step) if mesh.rank == 0 else None
    if mesh.rank == 0:
        parameters = sum(p.numel() for p in learner.model.parameters())
        log.info(
            "%d parameters on this rank, %s, tp %d%s, dp %d, %d samples",
            parameters, learner.model.dtype, mesh.tp_size, " with sp" if mesh.sp else "", mesh.dp_size, len(cache),
        )  # fmt: skip

    def save() -> None:
        meta = Meta(
            step=step,
            consumed=consumed,
            config=config.model_dump(mode="json"),
            channels=cache.channels,
            **text_dims(cache),
            latent_mean=mean.tolist(),
            latent_std=std.tolist(),
            cache=cache.info,
            samples=len(cache),
            world={"tp": mesh.tp_size, "dp": mesh.dp_size},
        )
        folder = checkpoint.save(root, meta, *state, mesh, keep=train.keep)
        if mesh.rank == 0:
            log.info("saved %s", folder)

    with metrics or contextlib.nullcontext(), loader:
        while step < train.steps:
            start = time.perf_counter()
            batch, packs = loader.next(consumed)
            loss, norm = learner.gradients(packs, loader.batch_tokens(batch))
            bad, stop = mesh.any_rank(not (math.isfinite(loss) and math.isfinite(norm)), task.stop_requested())
            if bad:
                _refuse(step + 1, loss, norm, batch, cache)
            lr = learner.update(step, norm)
            step, consumed, step_consumed = step + 1, batch.consumed, batch.consumed - consumed

            seconds = time.perf_counter() - start
            task.report(step, train.steps, "step", loss=f"{loss:.4f}")
            if metrics and (step % train.log_every == 0 or step in (1, train.steps)):
                tokens = loader.batch_tokens(batch)
                metrics.write(
                    step=step, loss=loss, grad_norm=norm, lr=lr, tokens=tokens, samples=step_consumed,
                    consumed=consumed, step_s=seconds, tokens_per_s=tokens / seconds,
                )  # fmt: skip
            if stop or step % train.save_every == 0 or step == train.steps:
                save()
            if stop and step < train.steps:
                raise Stopped(f"stopped on request at step {step} of {train.steps}; saved")


def profile(config: Config, task: Task) -> None:
    """Steps of the same training under a profiler, from fresh weights; nothing of the run but its profile is written.

    Raises:
        As `run`; Stopped: on request, with nothing kept.
    """
    folder = config.run_dir / "profile"
    with _started(config, task) as (cache, mesh):
        learner = make_learner(config, cache, mesh)
        loader = Loader(cache, make_packer(cache, config), config, cache.mean, cache.std, mesh)
        total, consumed = num_steps(config.profile), 0
        recording = recorded(config.profile, folder / "train", task, mesh.device, learner.model.parts())
        with loader, recording as step_done:
            for step in range(total):
                batch, packs = loader.next(consumed)
                loss, norm = learner.gradients(packs, loader.batch_tokens(batch))
                # As in training, whose step this all-reduce is a part of.
                bad, stop = mesh.any_rank(not (math.isfinite(loss) and math.isfinite(norm)), task.stop_requested())
                if bad:
                    _refuse(step + 1, loss, norm, batch, cache)
                if stop:
                    raise Stopped(
                        f"profile-train: stopped on request after {step} of {total} steps; nothing of it is kept, "
                        "an earlier profile is"
                    )
                learner.update(step, norm)
                consumed = batch.consumed
                step_done(loader.batch_tokens(batch))
                task.report(step + 1, total, "step")
        mesh.any_rank(False)  # all have written
        if task.rank == 0:
            remove_other_ranks(config.profile, folder / "train", mesh.device)
            log.info("wrote %s", write_profile_page([folder], folder / "index.html"))


# ---------------------------------------------------------------------------------------------------------------------
# A step


@dataclass(frozen=True)
class Learner:
    """The model on this rank, what updates it, and its averaged weights."""

    train: TrainConfig
    mesh: Mesh
    model: DiT
    ddp: Any
    optimizer: Any
    ema: Ema

    def gradients(self, packs: list[PackBatch], tokens: int) -> tuple[float, float]:
        """Forward, backward and reductions of this rank's packs, of a global batch of `tokens`.

        Returns:
            The global batch's loss and gradient norm, the same on every rank.
        """
        loss = accumulate_gradients(self.ddp, packs, tokens * self.model.patch_dim, self.mesh)
        with span("gradient norm"):
            return loss, megatron.gradient_norm(self.optimizer)

    def update(self, step: int, norm: float) -> float:
        """Clip, step and average; `step` counts from 0. Returns the learning rate."""
        lr = learning_rate(step, self.train)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        with span("optimizer"):
            megatron.clip_and_step(self.optimizer, norm, self.train.clip_grad)
        with span("ema"):
            self.ema.update()
        return lr


def make_learner(config: Config, cache: LatentCache, mesh: Mesh) -> Learner:
    """As a training begins: fresh weights, the same for any layout."""
    assert config.train is not None and config.model is not None
    train, dtype = config.train, pick_dtype(config.train, mesh.device)
    model = DiT(config.model, mesh, channels=cache.channels, **text_dims(cache), dtype=dtype, seed=train.seed)
    ddp = megatron.wrap_ddp(model, model.config)
    optimizer = megatron.make_optimizer(ddp, train, mesh, dtype)
    return Learner(train, mesh, model, ddp, optimizer, Ema(model, optimizer, mesh, train.ema_decay))


def text_dims(cache: LatentCache) -> dict[str, int]:
    """As DiT and Meta call them."""
    return {f"{name}_dim": dim for name, dim in cache.dims.items()}


def pick_dtype(train: TrainConfig, device: torch.device) -> torch.dtype:
    bf16 = device.type == "cuda" if train.precision == "auto" else train.precision == "bf16"
    return torch.bfloat16 if bf16 else torch.float32


def learning_rate(step: int, train: TrainConfig) -> float:
    """Linear warm-up, constant, linear decay to zero over the last `decay_steps`; `step` counts from 0."""
    warm = min(1.0, (step + 1) / train.warmup_steps) if train.warmup_steps else 1.0
    left = min(1.0, (train.steps - step) / train.decay_steps) if train.decay_steps else 1.0
    return train.lr * min(warm, left)


def accumulate_gradients(ddp: Any, packs: list[PackBatch], elements: int, mesh: Mesh) -> float:
    """Forward and backward over this rank's packs, then the reductions over the mesh.

    The loss is the mean squared error of the velocity over every element of the global batch, so that a token counts
    the same wherever it is packed.

    Args:
        elements: tokens x patch volume of the global batch.

    Returns:
        The global batch's loss, the same on every rank.
    """
    ddp.zero_grad_buffer()
    total = torch.zeros((), dtype=torch.float64, device=mesh.device)
    for i, pack in enumerate(packs):
        with ddp.no_sync() if i + 1 < len(packs) else contextlib.nullcontext():
            with span("forward"):
                velocity = ddp(pack.tokens, pack.t, pack.grids, *pack.texts)
                loss = (velocity - pack.target).square().sum() / elements
            with span("backward"):
                loss.backward()
        total += loss.detach().double()
    with span("gradient reduction"):
        megatron.finalize_grads(ddp)
    return mesh.dp_sum(total.item())[0]


# ---------------------------------------------------------------------------------------------------------------------
# Data


@dataclass(frozen=True)
class PackBatch:
    """A pack on the device. Shapes: tokens and target [L, P] float32, t [S], grids int64 CPU [S, 3]."""

    tokens: Tensor
    target: Tensor
    t: Tensor
    grids: Tensor
    texts: PackTexts


def make_packer(cache: LatentCache, config: Config) -> Packer:
    """Raises DataError for a latent that the patch does not divide, or that no pack can hold."""
    assert config.model is not None and config.train is not None
    patch = np.array(config.model.patch)
    rest = cache.shapes[:, 1:] % patch
    if rest.any():
        worst = int(np.argmax(rest.any(1)))
        raise DataError(
            f"model.patch: {config.model.patch} does not divide the latent {tuple(cache.shapes[worst].tolist())} of "
            f"sample {cache.keys[worst]} in {config.cache_dir}; encode with this model section, or change the patch"
        )
    grids = cache.shapes[:, 1:] // patch
    # sort key: same grid, then same text length, lie together in a pack
    order = ((grids[:, 0] * 4096 + grids[:, 1]) * 4096 + grids[:, 2]) * 8192 + cache.text_lens
    return Packer(
        grids.prod(1),
        order,
        seed=config.train.seed,
        packs_per_step=config.train.packs_per_step,
        tokens_per_pack=config.train.tokens_per_pack,
        dim=config.model.dim,
    )


def build_pack(
    cache: LatentCache, samples: list[tuple[int, int]], config: Config, mean: Tensor, std: Tensor, device: torch.device
) -> PackBatch:
    """Read, normalise, noise and patch the samples of a pack.

    Args:
        samples: (index in the cache, visit).
        mean, std: [C] of the latents.
    """
    assert config.model is not None and config.train is not None
    train, patch = config.train, config.model.patch
    mean, std = (v.to(device).view(-1, 1, 1, 1) for v in (mean, std))
    latents, ts, ids, grids, texts = [], [], [], [], []
    indices = [index for index, _ in samples]
    draws = [flow.draw(train.seed, int(cache.ids[index]), visit, train) for index, visit in samples]
    detailed = [draw.detailed for draw in draws]
    # To a GPU from pinned memory, and as stored: two bytes a value, which become float32 there.
    buffer = torch.empty(cache.nbytes(indices, detailed), dtype=torch.uint8, pin_memory=device.type == "cuda")
    stored = cache.read_bits(indices, buffer, detailed)
    for (index, visit), draw, (latent, own) in zip(samples, draws, stored, strict=True):
        latent = latent.to(device, non_blocking=True).float()
        sample_id = int(cache.ids[index])
        latents.append(((latent - mean) / std).flatten())
        ts.append(draw.t)
        ids.append([sample_id, visit])
        grids.append([size // p for size, p in zip(latent.shape[1:], patch, strict=True)])
        chosen = cache.empty_texts if draw.drop_text else own
        texts.append({name: e.to(device, non_blocking=True).float() for name, e in chosen.items()})
    grid, t = torch.tensor(grids, dtype=torch.int64).view(-1, 3), torch.tensor(ts, dtype=torch.float32)
    tokens, target = ops.flow_patchify(
        torch.cat(latents), t, torch.tensor(ids).view(-1, 2), grid, cache.channels, patch, seed=train.seed
    )
    return PackBatch(
        tokens=tokens,
        target=target,
        t=t.to(device),
        grids=grid,
        texts=join_texts(texts),
    )


class Loader:
    """Builds the next step's packs of this dp rank in a thread while the current step computes.

    On CUDA on a stream of its own: on the default one, which all threads share, each copy to the GPU that something
    waits for would wait for the current step as well, and the data would come after it, not beside it.
    """

    def __init__(
        self, cache: LatentCache, packer: Packer, config: Config, mean: Tensor, std: Tensor, mesh: Mesh
    ) -> None:
        self.cache, self.packer, self.config, self.mean, self.std, self.mesh = cache, packer, config, mean, std, mesh
        self.stream = torch.cuda.Stream(mesh.device) if mesh.device.type == "cuda" else None
        self.thread = ThreadPoolExecutor(1)
        self.ahead: tuple[int, Future[tuple[GlobalBatch, list[PackBatch]]]] | None = None

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *_: object) -> None:
        self.thread.shutdown(wait=True, cancel_futures=True)

    def next(self, consumed: int) -> tuple[GlobalBatch, list[PackBatch]]:
        """The global batch at `consumed`, and this rank's packs of it."""
        if self.ahead is None or self.ahead[0] != consumed:
            self.ahead = (consumed, self.thread.submit(self._build, consumed))
        with span("wait for data"):
            batch, packs = self.ahead[1].result()
        if self.stream is not None:  # whose memory is this: not to be used again before the current stream is done
            for pack in packs:
                for x in (pack.tokens, pack.target, pack.t, *pack.texts):
                    if isinstance(x, Tensor):
                        x.record_stream(torch.cuda.current_stream())
        self.ahead = (batch.consumed, self.thread.submit(self._build, batch.consumed))
        return batch, packs

    def batch_tokens(self, batch: GlobalBatch) -> int:
        return int(sum(self.packer.tokens[sample] for pack in batch.packs for sample, _ in pack))

    def _build(self, consumed: int) -> tuple[GlobalBatch, list[PackBatch]]:
        batch = self.packer.next(consumed)
        share = len(batch.packs) // self.mesh.dp_size
        mine = batch.packs[self.mesh.dp_rank * share : (self.mesh.dp_rank + 1) * share]
        args = (self.config, self.mean, self.std, self.mesh.device)
        with torch.cuda.stream(self.stream) if self.stream else contextlib.nullcontext():
            packs = [build_pack(self.cache, samples, *args) for samples in mine]
        if self.stream:
            self.stream.synchronize()  # this thread has time to
        return batch, packs


def _check_cache(meta: Meta, cache: LatentCache, folder: Path, found: Path) -> None:
    for name, before, now in differences(cache.info, {k: meta.cache.get(k) for k in ("vae", "text", "clip_text")}):
        raise DataError(
            f"{folder}: field `{name}` is {json.dumps(now)}, but the checkpoint {found} was trained with "
            f"{json.dumps(before)}; use the cache it came from, or another run name"
        )


def _check_optimizer(meta: Meta, train: TrainConfig, found: Path) -> None:
    """Muon leaves AdamW's second moment at zero: AdamW would go on from it with steps of many times its size."""
    before = meta.config["train"].get("optimizer", "adamw")
    if before != train.optimizer:
        raise CheckpointError(
            f"train.optimizer: the checkpoint {found} was trained with {before}, this run asks for {train.optimizer}; "
            f"use the checkpoint's, or another run name"
        )


def _refuse(step: int, loss: float, norm: float, batch: GlobalBatch, cache: LatentCache) -> None:
    keys = [cache.keys[sample] for pack in batch.packs for sample, _ in pack]
    shown = ", ".join(keys[:8]) + (", ..." if len(keys) > 8 else "")
    raise NumericsError(
        f"step {step}: loss {loss} and gradient norm {norm} must be finite; the weights are those of step {step - 1}. "
        f"The batch's {len(keys)} samples: {shown}. Lower train.lr, or look at these samples"
    )


# ---------------------------------------------------------------------------------------------------------------------
# Metrics


class Metrics:
    """metrics.jsonl, the truth, and TensorBoard beside it; both continue at the resumed step without duplicates."""

    def __init__(self, run_dir: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.path = run_dir / "metrics.jsonl"
        kept = [line for line in _lines(self.path) if _step_of(line) <= step]
        atomic_write(self.path, "".join(kept))
        self.file = open(self.path, "a", buffering=1)
        self.board = SummaryWriter(str(run_dir / "tensorboard"), purge_step=step + 1)

    def __enter__(self) -> Metrics:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()
        self.board.close()

    def write(self, *, step: int, **values: float) -> None:
        self.file.write(json.dumps({"step": step, **values, "time": time.time()}) + "\n")
        for name, value in values.items():
            self.board.add_scalar(name, value, step)


def _step_of(line: str) -> float:
    """Step of a metrics line; infinite, so that it is dropped, for a line that is none of ours."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, TypeError, KeyError):
        log.warning("metrics.jsonl: a line that is not a step's metrics is dropped: %r", line[:80])
        return math.inf


def _lines(path: Path) -> Iterator[str]:
    """Whole lines of a file; a last one that a crash cut short is left out."""
    if path.exists():
        with open(path) as f:
            yield from (line for line in f if line.endswith("\n"))
