"""Train or fine-tune a video autoencoder on the clips of a manifest: ``sorahpc train-vae CONFIG``.

A gang of ranks, each with a share of the batch, by DDP; one rank is the same path. The batch of a step is a pure
function of (seed, step): the ranks only share it out. Clips are decoded ahead of the step that needs them, by the rank
that needs them, and kept as far as `cache_gb` goes.

    loss = mse + l1_weight L1 + perceptual.weight LPIPS + kl_weight KL + adversarial.weight lambda L_adv

of pixels in [-1, 1]. KL is that of the posterior to a unit normal, mean per latent value. In a training from scratch
the posterior's variance is fixed, not learned: noise of `latent_noise` is added to the latent, so that latents come out
near unit scale and tolerant of a sampler's errors by a stated amount, for every class (AutoencoderKLCosmos gives no
variance). A published autoencoder that is fine-tuned (`init`) keeps the variance that it has learned.

Matrices and convolutions are trained by Muon (momentum, then the nearest orthogonal matrix), biases and gains by Adam:
on the toy world 800 steps of it reached 24.3 dB where Adam alone reached 21.6 dB, in the same time.

Windows and crops are put around moving pixels mostly (`focus`): a still background soon has nothing left to teach.
Where colours are in small objects on grey, an autoencoder learns brightness first and stays blind to colour for
hundreds of steps. A share of the clips, falling to none at the end, therefore has its channels permuted and inverted at
random (`recolour`), so that large areas have colour too.

State is saved every `save_every` steps (safetensors: no pickle), whole and by one rank, so that a rerun goes on from it
on any number of ranks; on the same number bit by bit. The folder of videos may grow or shrink between two runs, what
decides how clips are cut may not: a state of other settings is refused, by field.

A clip that was trained on is never among those held out, whatever becomes of the folder (sorahpc.data.holdout): the
state and, for who starts from it, train_vae.json beside the weights keep the limit by which they were chosen.
"""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from sorahpc.config import ClipConfig, Config, TrainVaeConfig
from sorahpc.data.clips import Clip, ClipCache
from sorahpc.data.decode import ClipPlan, decode, plan_clip
from sorahpc.data.holdout import limit_of, place_of
from sorahpc.data.manifest import MANIFEST, Video, read_manifest, read_rows
from sorahpc.distributed.mesh import any_rank, init_process_group, pick_device
from sorahpc.distributed.muon import orthogonalize
from sorahpc.errors import ConfigError, DataError, NumericsError, Stopped
from sorahpc.metrics.similarity import psnr_db, ssim
from sorahpc.models.discriminator import PatchDiscriminator, balance, hinge_loss
from sorahpc.models.lpips import MIN_SIDE_PX, Lpips, load_lpips
from sorahpc.models.vae import WEIGHTS, Vae, build_vae, load_vae, save_vae
from sorahpc.runs import Task, atomic_write, fsync_dir, read_json, write_json
from sorahpc.store import resolve

log = logging.getLogger(__name__)

WARMUP_STEPS = 100
ADAM_SHARE = 0.1  # Adam's learning rate as a share of Muon's
STEPS_AHEAD = 3  # whose clips are being decoded while a step computes
NOTE = "train_vae.json"  # beside the weights: how they were trained


def run(config: Config, task: Task) -> None:
    """Manifest -> `train_vae.out`, and `train_vae/result.json` in the run with PSNR and SSIM on the clips held out.

    Raises:
        ConfigError: sections missing, or a class, weights or settings that don't go together. DataError: no usable
        clip, or a state of other settings. Stopped: saved on request. NumericsError: a loss, a weight or a result that
        is not finite; `out` is left as it was.
    """
    config.need("train_vae")
    spec = config.train_vae
    assert spec is not None
    folder = config.run_dir / "train_vae"
    if (index := spec.out / f"{WEIGHTS}.index.json").exists():
        raise ConfigError(f"train_vae.out: {spec.out}: a folder without {index.name} expected; name another one")
    state, settings = folder / "state.safetensors", _settings(config)
    with _joined(task) as device:
        before = _limit_before(state, settings)
        vae = start_vae(spec)
        videos, shapes = _plan(config, vae)
        limit = limit_of(videos, spec.holdout_clips, before)
        held = [i for i, video in enumerate(videos) if place_of(video) < limit]
        log.info("%d clips, %d of them held out", len(videos), len(held))
        init_limit = _init_limit(spec)
        if doubtful := sum(place_of(videos[i]) >= init_limit for i in held):
            log.warning(
                "%d of the clips held out may be among those that %s (train_vae.init) was trained on: with the same "
                "videos and train_vae.holdout_clips, or fewer, they would not", doubtful, spec.init,
            )  # fmt: skip
        load = lambda i: decode(videos[i].path, _plan_one(videos[i], config.clip, vae))  # noqa: E731
        threads = max(1, spec.resources.cpus_per_task)
        with ClipCache(load, int(spec.cache_gb * 1e9), threads) as clips:
            learned = {i: shape for i, shape in enumerate(shapes) if place_of(videos[i]) >= limit}
            trainer = Trainer(vae, Batches(clips, learned, vae, spec, task.rank, task.world_size), spec, device)
            trainer.resume(state)
            _train(trainer, spec, task, state, {"settings": settings, "held_out_below": limit})
        result = _finish(trainer, spec, task, {"held_out_below": min(limit, init_limit)}, load, held)
        if task.rank == 0:
            write_json(folder / "result.json", result)
            log.info("wrote %s: %s", spec.out, json.dumps(result))


def _finish(
    trainer: Trainer, spec: TrainVaeConfig, task: Task, note: dict[str, Any], load: Any, held: list[int]
) -> dict[str, Any]:
    """Write the autoencoder, measure it as it is read back, and only then put it where `out` is read.

    Returns:
        of rank 0: what was measured.
    """
    aside = spec.out / ".new"
    if task.rank == 0:
        save_vae(trainer.vae, trainer.ema, aside, getattr(torch, spec.weights_dtype))
        write_json(aside / NOTE, {**trainer.note(), **note})
    any_rank(False)  # it is written
    try:
        made = load_vae(aside, device=trainer.device)
        shared: list[Any] = [None] * task.world_size
        dist.all_gather_object(shared, measure(made, load, held[task.rank :: task.world_size]))
        result = summary([row for rows in shared for row in rows])
        if task.rank == 0:
            _check_finite(made, result, spec)
            for name in ("config.json", WEIGHTS, NOTE):
                os.replace(aside / name, spec.out / name)
            fsync_dir(spec.out)
    finally:
        if task.rank == 0:
            shutil.rmtree(aside)
    return result


def _check_finite(made: Vae, result: dict[str, Any], spec: TrainVaeConfig) -> None:
    """Raises NumericsError. A weight may be finite as it was trained and not as it is stored; a decoder that gives NaN
    makes black pixels, whose PSNR is a number."""
    lower = f"lower train_vae.lr (now {spec.lr})"
    if bad := [name for name, value in result.items() if value is not None and not np.isfinite(value).all()]:
        raise NumericsError(
            f"train_vae: {bad[0]} of what was to be {spec.out} makes of the clips held out is not finite; {lower}"
        )
    if bad := [name for name, value in made.module.state_dict().items() if not value.isfinite().all()]:
        kept = (
            ""
            if spec.weights_dtype == "float32"
            else f", or train_vae.weights_dtype=float32 (now {spec.weights_dtype})"
        )
        raise NumericsError(f"train_vae: {bad[0]} of what was to be {spec.out} is not finite; {lower}{kept}")


@contextmanager
def _joined(task: Task) -> Iterator[torch.device]:
    """This rank among its world, and the device that it computes on."""
    device = pick_device(task.local_rank)
    init_process_group(task.rank, task.world_size, device)
    try:
        yield device
    finally:
        dist.destroy_process_group()


def _train(trainer: Trainer, spec: TrainVaeConfig, task: Task, path: Path, note: dict[str, Any]) -> None:
    def save() -> None:
        if task.rank == 0:
            trainer.save(path, note)

    while trainer.step < spec.steps:
        if trainer.step % spec.save_every == 0 and trainer.step:
            save()
        if any_rank(task.stop_requested())[0]:
            save()
            raise Stopped(f"train_vae: stopped at step {trainer.step} of {spec.steps}; the state is saved")
        found = trainer.train_step()
        psnr = -10 * math.log10(max(found["mse"] / 4, 1e-10))
        shown = {name: round(value, 5) for name, value in found.items() if name != "mse"}
        task.report(trainer.step, spec.steps, "step", psnr_db=round(psnr, 2), **shown)
        if trainer.step % 100 == 0:
            words = ", ".join(f"{name} {value:.5f}" for name, value in shown.items())
            log.info("step %d/%d: %s, PSNR of the batch %.2f dB", trainer.step, spec.steps, words, psnr)
    save()


def _settings(config: Config) -> dict[str, Any]:
    """What a saved state must agree on, by section: the class, its arguments, and what decides clips and batches."""
    assert config.train_vae is not None
    free = {"out", "weights_dtype", "save_every", "cache_gb", "resources"}
    sections = {
        "train_vae": config.train_vae.model_dump(mode="json", exclude=free),
        "clip": config.clip.model_dump(mode="json", exclude_none=True),
        # As the manifest has it: where scenes begin, and so what a clip is known by here.
        "prepare": {"scenes": read_rows(config.run_dir / MANIFEST)[1].get("scenes")},
    }
    settings: dict[str, Any] = json.loads(json.dumps(sections))  # tuples to lists, as it will be read back
    return settings


def _limit_before(path: Path, settings: dict[str, Any]) -> str | None:
    """The limit under which clips were held out from the training of the state at `path`; None where there is none.

    Raises:
        DataError: it can't be read, or was saved under other settings, a line a field.
    """
    note = read_note(path)
    if note is None:
        return None
    saved, limit = note.get("settings"), note.get("held_out_below")
    if not isinstance(saved, dict) or not isinstance(limit, str):
        raise DataError(f"{path}: of a version that held out other clips; delete it, or use another run name")
    faults = []
    for section in settings:
        now, was = settings[section], saved.get(section) or {}
        faults += [
            f"{path}: field `{section}.{name}`: expected {json.dumps(now.get(name))}, found "
            f"{json.dumps(was.get(name))}; use the settings that it was saved with, delete it, or use another run name"
            for name in sorted(now.keys() | was.keys())
            if now.get(name) != was.get(name)
        ]
    if faults:
        raise DataError("\n".join(faults))
    return limit


def _plan(config: Config, vae: Vae) -> tuple[list[Video], list[tuple[int, int, int]]]:
    """The manifest's usable videos that have a clip of lengths and sizes that this class takes, and its (T,H,W)."""
    rows = [v for v in read_manifest(config.run_dir / MANIFEST) if v.ok]
    videos, shapes = [], []
    for video in rows:
        try:
            plan = _plan_one(video, config.clip, vae)
        except DataError as error:
            log.warning("left out: %s", error)
            continue
        videos.append(video)
        shapes.append((len(plan.times_s), plan.height, plan.width))  # not the plan: a kilobyte, a million times
    if not videos:
        raise DataError(f"{config.run_dir / MANIFEST}: no usable clip among {len(rows)} videos with status ok")
    return videos, shapes


def _plan_one(video: Video, clip: ClipConfig, vae: Vae) -> ClipPlan:
    return plan_clip(
        video, clip, stride=vae.stride, patch=(1, 1, 1), lengths=vae.lengths,
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# What is trained


def start_vae(spec: TrainVaeConfig) -> Vae:
    """The autoencoder as a training begins, in float32 on the CPU: of random weights, or those of `init`.

    Raises:
        ConfigError: class or arguments that don't make one, or that aren't those of `init`.
    """
    if spec.init is None:
        assert spec.class_name is not None and spec.arch is not None
        torch.manual_seed(spec.seed)
        return build_vae(spec.class_name, spec.arch)
    vae = load_vae(spec.init, where="train_vae.init")
    if spec.class_name not in (None, vae.id):
        raise ConfigError(
            f"train_vae.class_name: {spec.init} (train_vae.init) holds {vae.id}, found {spec.class_name}; "
            "leave class_name and arch out"
        )
    for name, value in (spec.arch or {}).items():
        there = json.loads(json.dumps(dict(vae.module.config).get(name)))  # tuples as lists, as YAML has them
        if there != value:
            raise ConfigError(
                f"train_vae.arch.{name}: {spec.init} (train_vae.init) has {json.dumps(there)}, found "
                f"{json.dumps(value)}; leave class_name and arch out"
            )
    vae.module.requires_grad_(True)
    return vae


def _learns_variance(spec: TrainVaeConfig, vae: Vae, has_variance: bool) -> bool:
    """Whether the posterior's variance is the class's own, learned one.

    Raises:
        ConfigError: the class has none.
    """
    if spec.posterior is not None:
        if spec.posterior == "learned" and not has_variance:
            raise ConfigError(f"train_vae.posterior: {vae.id} gives no variance, so fixed expected, found learned")
        return spec.posterior == "learned"
    if spec.init is None or not has_variance:
        return False
    # One of ours that was trained with a fixed variance has never learned what it gives for it.
    return (_init_note(spec) or {}).get("posterior") != "fixed"


def _init_note(spec: TrainVaeConfig) -> dict[str, Any] | None:
    """What a training wrote beside the weights of `init`; None where there is no `init`, or it is none of ours."""
    if spec.init is None:
        return None
    folder = resolve(spec.init, "vae", "train_vae.init")
    return read_json((folder.parent if folder.is_file() else folder) / NOTE)


def _init_limit(spec: TrainVaeConfig) -> str:
    """The place from which clips may have been trained on by `init`: over all places where it is none of ours."""
    note = _init_note(spec)
    if note is None:
        return "g"  # after every hex digit
    limit = note.get("held_out_below")
    return limit if isinstance(limit, str) else ""


class Coder(nn.Module):
    """A forward pass as DDP wants it: one call."""

    def __init__(self, vae: Vae, latent_noise: float | None) -> None:
        """latent_noise: the posterior's fixed standard deviation; None: what the class gives."""
        super().__init__()
        self.module, self.decode_args, self.latent_noise = vae.module, vae.decode_args, latent_noise

    def forward(self, x: torch.Tensor, noise: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Pixels [B,3,T,H,W] -> (pixels of a draw from the posterior, KL of the posterior to a unit normal)."""
        posterior = self.module.encode(x).latent_dist
        mean = posterior.mode()
        if self.latent_noise is None:
            # Not the posterior's own kl(): diffusers' leaves out an axis of a video's latent.
            kl = 0.5 * (mean.square() + posterior.logvar.exp() - 1 - posterior.logvar).mean()
            z = mean + (0.5 * posterior.logvar).exp() * noise
        else:
            kl = 0.5 * (mean.square().mean() + self.latent_noise**2 - 1) - math.log(self.latent_noise)
            z = mean + self.latent_noise * noise
        return self.module.decode(z, *self.decode_args).sample, kl


class Trainer:
    """The training state: `step`, weights, moments, the averaged weights `ema`, and the discriminator where there is
    one. The same on every rank."""

    def __init__(self, vae: Vae, batches: Batches, spec: TrainVaeConfig, device: torch.device) -> None:
        """
        Args:
            vae: from `start_vae`; trained in place.
            batches: this rank's share of each step.

        Raises:
            ConfigError: settings that don't go with the class or the size of its clips.
        """
        self.vae, self.batches, self.spec, self.step = vae, batches, spec, 0
        self.device = device
        side = min(min(size[1:]) for size in batches.sizes)
        self.lpips = _perceptual(spec, side, device)
        vae.module.to(device).train()
        vae.device = device
        for p in vae.module.parameters():
            # Channels last: oneDNN then takes the convolutions at batch sizes where torch would fall back to a slow
            # one. A kernel of one place is so already, and DDP would wonder at its strides.
            if p.ndim == 5 and p[0, 0].numel() > 1:
                p.data = p.data.contiguous(memory_format=torch.channels_last_3d)
        has_variance, self.last_weight, some_unused = _probe(vae, min(batches.sizes))  # the shortest uses least
        self.learned = _learns_variance(spec, vae, has_variance)
        self.coder = _ddp(Coder(vae, None if self.learned else spec.latent_noise), device, some_unused)
        parameters = [p for p in vae.module.parameters() if p.requires_grad]
        matrices = [p for p in parameters if p.ndim >= 2 and p.shape[0] > 1 and p[0].numel() > 1]
        others = [p for p in parameters if not (p.ndim >= 2 and p.shape[0] > 1 and p[0].numel() > 1)]
        self.optimizers: dict[str, torch.optim.Optimizer] = {
            "muon": Muon(matrices, lr=spec.lr),
            "adam": torch.optim.Adam(others, lr=ADAM_SHARE * spec.lr, betas=(0.9, 0.99)),
        }
        self.ema = {k: v.detach().clone() for k, v in vae.module.state_dict().items()}
        self.judge: DistributedDataParallel | None = None
        if spec.adversarial is not None:
            least = PatchDiscriminator.min_side_px(spec.adversarial.layers)
            if side < least:
                raise ConfigError(
                    f"train_vae.adversarial.layers: {spec.adversarial.layers} need frames of {least} px or more, the "
                    f"smallest here have {side}; fewer layers, a larger train_vae.crop_px or clip.max_area_px"
                )
            torch.manual_seed(spec.seed)
            judge = PatchDiscriminator(spec.adversarial.channels, spec.adversarial.layers).to(device)
            self.judge = _ddp(judge, device)
            self.optimizers["discriminator"] = torch.optim.Adam(
                judge.parameters(), lr=spec.adversarial.lr, betas=(0.5, 0.9)
            )

    def train_step(self) -> dict[str, float]:
        """One optimizer step.

        Returns:
            loss, its terms but for their weights, and `discriminator`, where they are on; of the whole batch.

        Raises:
            NumericsError: a loss or gradient is not finite; nothing was changed.
        """
        spec, adversarial = self.spec, self.spec.adversarial
        x = self._pixels(self.batches.next(self.step))
        # What a class draws by itself (LTX's injected noise, dropout) is then the same after a rerun, and another on
        # each rank.
        own = np.random.SeedSequence([spec.seed, self.step, self.batches.mine.start])
        torch.manual_seed(int(own.generate_state(1)[0]))
        reconstruction, kl = self.coder(x, self._noise(x))
        error = reconstruction - x
        terms = {"mse": error.square().mean(), "kl": kl}
        likeness = terms["mse"] + spec.l1_weight * error.abs().mean()
        if spec.perceptual is not None:
            terms["perceptual"] = self._perceptual_distance(reconstruction, x)
            likeness = likeness + spec.perceptual.weight * terms["perceptual"]
        loss = likeness + spec.kl_weight * kl
        judged = adversarial is not None and self.step >= adversarial.start_step
        if judged:
            assert adversarial is not None and self.judge is not None
            self.judge.requires_grad_(False)
            terms["adversarial"] = -self.judge.module(reconstruction).mean()
            terms["balance"] = self._balance(likeness, terms["adversarial"])
            loss = loss + adversarial.weight * terms["balance"] * terms["adversarial"]
            self.judge.requires_grad_(True)
        terms["loss"] = loss
        self.vae.module.zero_grad(set_to_none=True)
        loss.backward()
        if judged:
            assert self.judge is not None
            both = self.judge(torch.cat([x, reconstruction.detach()]))
            terms["discriminator"] = hinge_loss(*both.chunk(2))
            self.optimizers["discriminator"].zero_grad(set_to_none=True)
            terms["discriminator"].backward()
        found = self._mean_over_ranks(terms)
        if bad := [name for name in ("loss", *found) if not math.isfinite(found[name])]:
            raise NumericsError(
                f"train_vae: {bad[0]} {found[bad[0]]} at step {self.step}; lower train_vae.lr (now {spec.lr})"
            )
        norm = float(torch.nn.utils.clip_grad_norm_(self.vae.module.parameters(), 1.0))
        if not math.isfinite(norm):
            raise NumericsError(
                f"train_vae: gradient norm {norm} at step {self.step}; lower train_vae.lr (now {spec.lr})"
            )
        warm = min(1.0, (self.step + 1) / WARMUP_STEPS)
        cosine = 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * self.step / spec.steps))
        for name, optimizer in self.optimizers.items():
            if name != "discriminator":
                for group in optimizer.param_groups:
                    group["lr"] = spec.lr * warm * cosine * (ADAM_SHARE if name == "adam" else 1)
            if name != "discriminator" or judged:
                optimizer.step()
        self.step += 1
        decay = min(spec.ema_decay, self.step / (self.step + 10))
        with torch.no_grad():
            for name, value in self.vae.module.state_dict().items():
                self.ema[name].lerp_(value, 1 - decay) if value.is_floating_point() else self.ema[name].copy_(value)
        return found

    def _pixels(self, clips: np.ndarray) -> torch.Tensor:
        """uint8 [B,T,H,W,3] -> [B,3,T,H,W] in [-1, 1] on the device."""
        return torch.from_numpy(clips).to(self.device).permute(0, 4, 1, 2, 3).float() / 127.5 - 1

    def _noise(self, x: torch.Tensor) -> torch.Tensor:
        """This rank's part of the whole batch's draw, for its latents."""
        shape = self.vae.latent_shape(*x.shape[2:])
        generator = torch.Generator().manual_seed(self.spec.seed * 1_000_003 + self.step)
        noise = torch.randn(self.spec.batch_clips, *shape, generator=generator)
        return noise[self.batches.mine.start : self.batches.mine.stop].to(self.device)

    def _perceptual_distance(self, reconstruction: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """Mean LPIPS of some frames, the same ones of each clip."""
        assert self.lpips is not None and self.spec.perceptual is not None
        # Numbers from batch_clips on are no clip's: a stream of its own, the same on every rank.
        rng = np.random.default_rng([self.spec.seed, self.step, self.spec.batch_clips])
        frames = x.shape[2]
        chosen = np.sort(rng.choice(frames, min(self.spec.perceptual.frames, frames), replace=False))
        a, b = (v[:, :, torch.from_numpy(chosen)].transpose(1, 2).flatten(0, 1) for v in (reconstruction, x))
        distance: torch.Tensor = self.lpips(a, b).mean()
        return distance

    def _balance(self, likeness: torch.Tensor, adversarial: torch.Tensor) -> torch.Tensor:
        """`discriminator.balance` of the gradients over all ranks, as if one had the whole batch."""
        # autograd.grad leaves .grad and DDP's own hooks alone.
        grads = [torch.autograd.grad(v, self.last_weight, retain_graph=True)[0] for v in (likeness, adversarial)]
        both = torch.stack(grads)
        dist.all_reduce(both)
        return balance(both[0] / dist.get_world_size(), both[1] / dist.get_world_size())

    def _mean_over_ranks(self, terms: dict[str, torch.Tensor]) -> dict[str, float]:
        values = torch.stack([v.detach().double().cpu() for v in terms.values()])
        dist.all_reduce(values)
        return dict(zip(terms, (values / dist.get_world_size()).tolist(), strict=True))

    def note(self) -> dict[str, Any]:
        """What those who use the weights may want to know."""
        return {
            "posterior": "learned" if self.learned else "fixed",
            "latent_noise": None if self.learned else self.spec.latent_noise,
            "steps": self.step,
            "init": None if self.spec.init is None else str(self.spec.init),
        }

    def save(self, path: Path, note: dict[str, Any]) -> None:
        """Write the whole state, and `note` for `read_note`."""
        from safetensors.torch import save

        tensors = {f"model.{k}": v for k, v in self.vae.module.state_dict().items()}
        tensors |= {f"ema.{k}": v for k, v in self.ema.items()}
        if self.judge is not None:
            tensors |= {f"judge.{k}": v for k, v in self.judge.module.state_dict().items()}
        for name, optimizer in self.optimizers.items():
            for i, state in optimizer.state_dict()["state"].items():
                tensors |= {f"{name}.{i}.{k}": torch.as_tensor(v) for k, v in state.items()}
        tensors = {k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()}
        atomic_write(path, save(tensors, metadata={"step": str(self.step), "note": json.dumps(note)}))

    def resume(self, path: Path) -> None:
        """Go on from a state that `save` wrote, if there is one. Raises DataError where it can't be read."""
        if not path.exists():
            return
        with _state(path) as f:
            step, tensors = int(f.metadata()["step"]), {k: f.get_tensor(k) for k in f.keys()}
        pick = lambda prefix: {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}  # noqa: E731
        self.vae.module.load_state_dict(pick("model."))
        for name, value in pick("ema.").items():
            self.ema[name].copy_(value)
        if self.judge is not None:
            self.judge.module.load_state_dict(pick("judge."))
        for kind, optimizer in self.optimizers.items():
            state: dict[int, dict[str, torch.Tensor]] = {}
            for name, value in pick(f"{kind}.").items():
                index, _, word = name.partition(".")
                state.setdefault(int(index), {})[word] = value
            optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
        self.step = step
        log.info("resumed from %s at step %d", path, self.step)


@contextmanager
def _state(path: Path) -> Iterator[Any]:
    """The file of a saved state, open. Raises DataError where it can't be read."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), "pt") as f:
            yield f
    except (OSError, ValueError, SafetensorError) as error:
        raise DataError(f"{path}: can't be read ({error}); delete it to train from the start") from None


def read_note(path: Path) -> dict[str, Any] | None:
    """The note of a state that `Trainer.save` wrote; None where there is no state. Raises DataError: unreadable."""
    if not path.exists():
        return None
    with _state(path) as f:
        note = json.loads((f.metadata() or {}).get("note", "{}"))
        return note if isinstance(note, dict) else {}


def _ddp(module: nn.Module, device: torch.device, some_unused: bool = False) -> DistributedDataParallel:
    ids = [device.index] if device.type == "cuda" else None
    return DistributedDataParallel(
        module, device_ids=ids, find_unused_parameters=some_unused, gradient_as_bucket_view=True
    )


def _perceptual(spec: TrainVaeConfig, side: int, device: torch.device) -> Lpips | None:
    if spec.perceptual is None:
        return None
    if side < MIN_SIDE_PX:
        raise ConfigError(
            f"train_vae.perceptual: frames of {MIN_SIDE_PX} px or more expected, the smallest here have {side}; a "
            "larger train_vae.crop_px or clip.max_area_px, or no perceptual term"
        )
    return load_lpips(spec.perceptual.vgg, spec.perceptual.heads).to(device)


def _probe(vae: Vae, size: tuple[int, int, int]) -> tuple[bool, nn.Parameter, bool]:
    """What a pass of a clip (T,H,W) tells of a class.

    Returns:
        whether it gives a variance, the weight of its decoder's last layer, whether some parameters are not used.
    """
    ran: list[Any] = []
    layers = [m for m in vae.module.modules() if isinstance(m, nn.Conv2d | nn.Conv3d | nn.Linear)]
    hooks = [layer.register_forward_hook(lambda m, *_: ran.append(m)) for layer in layers]
    try:
        posterior = vae.module.encode(torch.zeros(1, 3, *size, device=vae.device)).latent_dist
        vae.module.decode(posterior.mode(), *vae.decode_args).sample.sum().backward()
    finally:
        for hook in hooks:
            hook.remove()
    some_unused = any(p.requires_grad and p.grad is None for p in vae.module.parameters())
    vae.module.zero_grad(set_to_none=True)
    return isinstance(getattr(posterior, "logvar", None), torch.Tensor), ran[-1].weight, some_unused


class Muon(torch.optim.Optimizer):
    """Momentum whose update is replaced by the nearest orthogonal matrix, so that all directions learn equally fast.

    For parameters of two and more axes, read as [first axis, all others]. That of the DiT, whose matrices are cut over
    ranks, is sorahpc.distributed.muon.
    """

    def __init__(self, parameters: list[torch.nn.Parameter], lr: float, momentum: float = 0.9) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                average = self.state[p].setdefault("average", torch.zeros_like(p))
                average.lerp_(p.grad, 1 - group["momentum"])
                update = orthogonalize(p.grad.lerp(average, group["momentum"]).reshape(1, len(p), -1))[0]
                scale = max(1.0, update.shape[0] / update.shape[1]) ** 0.5
                p.sub_(update.reshape(p.shape), alpha=group["lr"] * scale)


# ---------------------------------------------------------------------------------------------------------------------
# Data


class Batches:
    """This rank's share of each step's batch.

    A bucket of clips of one size by its share of all clips, then clips, then what is cut out of each: drawn from
    streams that (seed, step) and (seed, step, place in the batch) name. So no draw depends on another clip's pixels,
    and a rank decodes its own clips only. A clip that can't be decoded has the next of its bucket in its place.

    Attributes:
        sizes: (T,H,W) of what is cut out of the clips of each bucket. mine: this rank's places in the batch.
    """

    def __init__(
        self,
        clips: ClipCache,
        shapes: dict[int, tuple[int, int, int]],
        vae: Vae,
        spec: TrainVaeConfig,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        """
        Args:
            shapes: (T,H,W) of the clips to train on, by their number in `clips`: as the class takes them.
        """
        self.clips, self.spec = clips, spec
        share = spec.batch_clips // world_size
        self.mine = range(rank * share, (rank + 1) * share)
        window = vae.floor_frames(spec.window_frames) if spec.window_frames else None
        crop = spec.crop_px // vae.stride[1] * vae.stride[1] if spec.crop_px else None
        buckets: dict[tuple[int, int, int], list[int]] = {}
        for i, (frames, height, width) in shapes.items():
            size = (min(window or frames, frames), min(crop or height, height), min(crop or width, width))
            buckets.setdefault(size, []).append(i)
        self.sizes = sorted(buckets)
        self.buckets = [buckets[size] for size in self.sizes]
        self.broken: set[int] = set()
        self._ahead: dict[int, list[Future[Clip]]] = {}

    def next(self, step: int) -> np.ndarray:
        """uint8 [B,T,H,W,3] of this rank's places.

        Raises:
            DataError: no clip of the bucket can be decoded.
        """
        for later in range(step, min(step + 1 + STEPS_AHEAD, self.spec.steps)):
            if later not in self._ahead:
                _, chosen = self._draw(later)
                self._ahead[later] = [self.clips.ask(i) for i in chosen]  # held, whatever the cache forgets
        bucket, chosen = self._draw(step)
        out = []
        for place, i, future in zip(self.mine, chosen, self._ahead.pop(step), strict=True):
            rng = np.random.default_rng([self.spec.seed, step, place])
            out.append(self._cut(self._usable(bucket, i, future), self.sizes[bucket], rng, step))
        return np.stack(out)

    def _draw(self, step: int) -> tuple[int, list[int]]:
        """(bucket, number of the clip at each of this rank's places)."""
        rng = np.random.default_rng([self.spec.seed, step])
        counts = np.array([len(b) for b in self.buckets], dtype=float)
        k = int(rng.choice(len(counts), p=counts / counts.sum()))
        drawn = rng.integers(len(self.buckets[k]), size=self.spec.batch_clips)
        return k, [self.buckets[k][i] for i in drawn[self.mine.start : self.mine.stop]]

    def _usable(self, k: int, i: int, future: Future[Clip]) -> Clip:
        """The clip i of bucket k, or the next one that can be decoded."""
        try:
            return future.result()
        except DataError as error:
            self._leave_out(i, error)
        bucket = self.buckets[k]
        first = bucket.index(i)
        for number in (bucket[place % len(bucket)] for place in range(first + 1, first + len(bucket))):
            try:
                return self.clips.ask(number).result()
            except DataError as error:
                self._leave_out(number, error)
        size = "x".join(map(str, self.sizes[k]))
        raise DataError(f"train_vae: none of the {len(bucket)} clips of {size} can be decoded; the log says why")

    def _leave_out(self, number: int, error: DataError) -> None:
        if number not in self.broken:
            log.warning("left out: %s", error)
            self.broken.add(number)

    def _cut(self, clip: Clip, size: tuple[int, int, int], rng: np.random.Generator, step: int) -> np.ndarray:
        low, high = np.zeros(3, np.int64), np.subtract(clip.pixels.shape[:3], size)
        if len(clip.moving) and rng.random() < self.spec.focus:
            pixel = clip.moving[rng.integers(len(clip.moving))]
            low, high = np.maximum(low, pixel - size + 1), np.minimum(high, pixel)
        at = rng.integers(low, high + 1)
        t, y, x = (slice(a, a + m) for a, m in zip(at, size, strict=True))
        pixels = clip.pixels[t, y, x]
        pixels = pixels[:, :, ::-1] if rng.random() < 0.5 else pixels
        if rng.random() < self.spec.recolour * (1 - step / self.spec.steps):
            pixels = pixels[..., rng.permutation(3)] ^ (255 * rng.integers(2, size=3)).astype(np.uint8)
        return pixels


# ---------------------------------------------------------------------------------------------------------------------
# What came of it


def measure(vae: Vae, load: Any, numbers: list[int]) -> list[dict[str, Any]]:
    """A row a clip that can be decoded: its number, PSNR and SSIM of its reconstruction, and sums over its latent."""
    rows = []
    for i in numbers:
        try:
            clip = load(i)
        except DataError as error:
            log.warning("left out: %s", error)
            continue
        z = vae.encode(clip)
        again, values = vae.decode(z), z.flatten(1).double()
        rows.append(
            {
                "number": i, "psnr_db": psnr_db(clip, again), "ssim": ssim(clip, again), "values": values.shape[1],
                "sum": values.sum(1).numpy(), "squares": values.square().sum(1).numpy(),
            }
        )  # fmt: skip
    return rows


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """PSNR (dB) and SSIM, mean and worst over the clips, and the latents' mean and std a channel; in any order."""
    rows = sorted(rows, key=lambda row: row["number"])
    psnrs = [row["psnr_db"] for row in rows]
    ssims = [row["ssim"] for row in rows if row["ssim"] is not None]  # a clip under 11 px has none
    result: dict[str, Any] = {
        "clips": len(rows),
        "psnr_db": float(np.mean(psnrs)) if psnrs else None,
        "psnr_db_worst": min(psnrs, default=None),
        "ssim": float(np.mean(ssims)) if ssims else None,
        "ssim_worst": min(ssims, default=None),
        "latent_mean": None,
        "latent_std": None,
    }
    if rows:
        values = sum(row["values"] for row in rows)
        mean = sum(row["sum"] for row in rows) / values
        variance = (sum(row["squares"] for row in rows) - values * mean**2) / max(values - 1, 1)
        result["latent_mean"] = [round(float(v), 4) for v in mean]
        result["latent_std"] = [round(float(v), 4) for v in np.sqrt(np.maximum(variance, 0))]
    return result
