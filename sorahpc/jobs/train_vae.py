"""Train a small video autoencoder on the clips of a manifest: ``sorahpc train-vae CONFIG``.

One process. All clips are decoded once and kept in memory as uint8, so this is for toy worlds and small folders. Loss:
squared error (+ absolute error) of the pixels in [-1, 1], and the KL of the posterior to a unit normal. The posterior's
variance is fixed, not learned: noise of `latent_noise` is added to the latent, so that latents come out near unit
scale and tolerant of a sampler's errors by a stated amount, for every class (AutoencoderKLCosmos gives no variance).

Matrices and convolutions are trained by Muon (momentum, then the nearest orthogonal matrix), biases and gains by Adam:
on the toy world 800 steps of it reached 24.3 dB where Adam alone reached 21.6 dB, in the same time.

Windows and crops are put around moving pixels mostly (`focus`): a still background soon has nothing left to teach.
Where colours are in small objects on grey, an autoencoder learns brightness first and stays blind to colour for
hundreds of steps. A share of the clips, falling to none at the end, therefore has its channels permuted and inverted at
random (`recolour`), so that large areas have colour too.

State is saved every `save_every` steps (safetensors: no pickle) and a rerun goes on from it. The batch of a step is a
pure function of (seed, step).
"""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path

import numpy as np
import torch

from sorahpc.config import ClipConfig, Config, TrainVaeConfig, config_hash
from sorahpc.data.decode import decode, plan_clip
from sorahpc.data.manifest import read_manifest
from sorahpc.distributed.muon import orthogonalize
from sorahpc.errors import DataError, NumericsError, Stopped
from sorahpc.metrics.similarity import psnr_db, ssim
from sorahpc.models.vae import Vae, build_vae, load_vae, save_vae
from sorahpc.runs import Task, atomic_write, write_json

log = logging.getLogger(__name__)

WARMUP_STEPS = 100
MOVING_LEVELS = 24  # of 255: above what H.264 and slow changes of light do to a pixel at rest
ADAM_SHARE = 0.1  # Adam's learning rate as a share of Muon's


def run(config: Config, task: Task) -> None:
    """Manifest -> `train_vae.out`, and `train_vae/result.json` in the run with PSNR and SSIM on the clips held out."""
    config.need("train_vae")
    spec = config.train_vae
    assert spec is not None
    if task.rank:
        return
    folder = config.run_dir / "train_vae"
    torch.manual_seed(spec.seed)
    vae = build_vae(spec.class_name, spec.arch)
    held, clips = _load_clips(config, vae, spec, task)
    trainer = Trainer(vae, clips, spec)
    trainer.resume(folder / "state.safetensors")
    while trainer.step < spec.steps:
        if trainer.step % spec.save_every == 0 and trainer.step:
            trainer.save(folder / "state.safetensors")
        if task.stop_requested():
            trainer.save(folder / "state.safetensors")
            raise Stopped(f"train_vae: stopped at step {trainer.step} of {spec.steps}; the state is saved")
        loss, mse = trainer.train_step()
        task.report(trainer.step, spec.steps, "step", loss=round(loss, 5), psnr_db=round(_psnr(mse / 4), 2))
        if trainer.step % 100 == 0:
            log.info("step %d/%d: loss %.5f, PSNR of the batch %.2f dB", trainer.step, spec.steps, loss, _psnr(mse / 4))
    trainer.save(folder / "state.safetensors")
    save_vae(vae, trainer.ema, spec.out, getattr(torch, spec.weights_dtype))
    result = measure(load_vae(spec.out), held)
    write_json(folder / "result.json", result)
    log.info("wrote %s: %s", spec.out, json.dumps(result))


class Trainer:
    """The training state: `step`, weights, Adam's moments, and the averaged weights `ema`."""

    def __init__(self, vae: Vae, clips: list[np.ndarray], spec: TrainVaeConfig) -> None:
        """
        Args:
            vae: from `build_vae`; trained in place.
            clips: uint8 [T,H,W,3], of any lengths and sizes that the class takes.
        """
        self.vae, self.spec, self.step = vae, spec, 0
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        # Channels last: oneDNN then takes the convolutions at batch sizes where torch would fall back to a slow one.
        vae.module.to(self.device, memory_format=torch.channels_last_3d).train()
        parameters = list(vae.module.parameters())
        matrices = [p for p in parameters if p.ndim >= 2 and p.shape[0] > 1 and p[0].numel() > 1]
        others = [p for p in parameters if not (p.ndim >= 2 and p.shape[0] > 1 and p[0].numel() > 1)]
        self.optimizers = {
            "muon": Muon(matrices, lr=spec.lr),
            "adam": torch.optim.Adam(others, lr=ADAM_SHARE * spec.lr, betas=(0.9, 0.99)),
        }
        self.ema = {k: v.detach().clone() for k, v in vae.module.state_dict().items()}
        window = vae.floor_frames(spec.window_frames) if spec.window_frames else None
        crop = spec.crop_px // vae.stride[1] * vae.stride[1] if spec.crop_px else None
        buckets: dict[tuple[int, ...], list[tuple[np.ndarray, np.ndarray]]] = {}
        for clip in clips:
            most = (window or len(clip), crop or clip.shape[1], crop or clip.shape[2])
            buckets.setdefault(tuple(map(min, most, clip.shape[:3])), []).append((clip, moving_pixels(clip)))
        self.sizes = sorted(buckets)  # (T,H,W) of what is cut out of the clips of each bucket
        self.buckets = [buckets[size] for size in self.sizes]

    def _batch(self) -> torch.Tensor:
        """[B,3,T,H,W] in [-1, 1]: a bucket by its share of the clips, then clips and what is cut out of them."""
        rng = np.random.default_rng([self.spec.seed, self.step])
        counts = np.array([len(b) for b in self.buckets], dtype=float)
        k = int(rng.choice(len(counts), p=counts / counts.sum()))
        clips = []
        for i in rng.integers(len(self.buckets[k]), size=self.spec.batch_clips):
            clip, moving = self.buckets[k][i]
            low, high = np.zeros(3, np.int64), np.subtract(clip.shape[:3], self.sizes[k])
            if len(moving) and rng.random() < self.spec.focus:
                pixel = moving[rng.integers(len(moving))]
                low, high = np.maximum(low, pixel - self.sizes[k] + 1), np.minimum(high, pixel)
            at = rng.integers(low, high + 1)
            t, y, x = (slice(a, a + m) for a, m in zip(at, self.sizes[k], strict=True))
            clip = clip[t, y, x]
            clip = clip[:, :, ::-1] if rng.random() < 0.5 else clip
            if rng.random() < self.spec.recolour * (1 - self.step / self.spec.steps):
                clip = clip[..., rng.permutation(3)] ^ (255 * rng.integers(2, size=3)).astype(np.uint8)
            clips.append(clip)
        batch = torch.from_numpy(np.stack(clips)).to(self.device)
        return batch.permute(0, 4, 1, 2, 3).float() / 127.5 - 1

    def train_step(self) -> tuple[float, float]:
        """One optimizer step. Returns (loss, mean squared error of pixels in [-1, 1]).

        Raises:
            NumericsError: the loss is not finite; nothing was changed.
        """
        spec = self.spec
        x = self._batch()
        mean = self.vae.module.encode(x).latent_dist.mode()
        noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(spec.seed * 1_000_003 + self.step))
        z = mean + spec.latent_noise * noise.to(mean.device)
        kl = 0.5 * (mean.square().mean() + spec.latent_noise**2 - 1) - math.log(spec.latent_noise)
        error = self.vae.module.decode(z, *self.vae.decode_args).sample - x
        mse = error.square().mean()
        loss = mse + spec.l1_weight * error.abs().mean() + spec.kl_weight * kl
        if not math.isfinite(loss.item()):
            raise NumericsError(
                f"train_vae: loss {loss.item()} at step {self.step}; lower train_vae.lr (now {spec.lr})"
            )
        self.vae.module.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.vae.module.parameters(), 1.0)
        warm = min(1.0, (self.step + 1) / WARMUP_STEPS)
        cosine = 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * self.step / spec.steps))
        for name, optimizer in self.optimizers.items():
            for group in optimizer.param_groups:
                group["lr"] = spec.lr * warm * cosine * (ADAM_SHARE if name == "adam" else 1)
            optimizer.step()
        self.step += 1
        decay = min(spec.ema_decay, self.step / (self.step + 10))
        with torch.no_grad():
            for name, value in self.vae.module.state_dict().items():
                self.ema[name].lerp_(value, 1 - decay) if value.is_floating_point() else self.ema[name].copy_(value)
        return loss.item(), mse.item()

    def _key(self) -> str:
        """What a saved state must agree on: the class, its arguments, and what decides the batches."""
        data = self.spec.model_dump(
            mode="json", exclude={"out", "weights_dtype", "save_every", "holdout_clips", "resources"}
        )
        return config_hash(data)

    def save(self, path: Path) -> None:
        from safetensors.torch import save

        tensors = {f"model.{k}": v for k, v in self.vae.module.state_dict().items()}
        tensors |= {f"ema.{k}": v for k, v in self.ema.items()}
        for name, optimizer in self.optimizers.items():
            for i, state in optimizer.state_dict()["state"].items():
                tensors |= {f"{name}.{i}.{k}": torch.as_tensor(v) for k, v in state.items()}
        tensors = {k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()}
        atomic_write(path, save(tensors, metadata={"step": str(self.step), "key": self._key()}))

    def resume(self, path: Path) -> None:
        """Go on from a state that `save` wrote, if there is one.

        Raises:
            DataError: the state is unreadable, or of another train_vae section.
        """
        from safetensors import SafetensorError, safe_open

        if not path.exists():
            return
        try:
            with safe_open(str(path), "pt") as f:
                meta = f.metadata() or {}
                tensors = {k: f.get_tensor(k) for k in f.keys()}
        except (OSError, SafetensorError) as error:
            raise DataError(f"{path}: can't be read ({error}); delete it to train from the start") from None
        if meta.get("key") != self._key():
            raise DataError(f"{path}: saved under other train_vae settings; delete it, or use another run name")
        pick = lambda prefix: {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}  # noqa: E731
        self.vae.module.load_state_dict(pick("model."))
        for name, value in pick("ema.").items():
            self.ema[name].copy_(value)
        for kind, optimizer in self.optimizers.items():
            state: dict[int, dict[str, torch.Tensor]] = {}
            for name, value in pick(f"{kind}.").items():
                index, _, word = name.partition(".")
                state.setdefault(int(index), {})[word] = value
            optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
        self.step = int(meta["step"])
        log.info("resumed from %s at step %d", path, self.step)


def moving_pixels(clip: np.ndarray, most: int = 512) -> np.ndarray:
    """(t, y, x) of up to `most` pixels, evenly picked, that differ from the clip's median over time: int64 [n,3]."""
    away = np.abs(clip.astype(np.int16) - np.median(clip, axis=0).astype(np.int16)).max(axis=-1) > MOVING_LEVELS
    found = np.argwhere(away)
    return found[np.linspace(0, len(found) - 1, min(most, len(found))).astype(int)]


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


def measure(vae: Vae, clips: list[np.ndarray]) -> dict[str, float | int | list[float] | None]:
    """PSNR (dB) and SSIM of reconstructions, mean and worst over the clips, and the latents' mean and std a channel."""
    psnrs, ssims, latents = [], [], []
    for clip in clips:
        z = vae.encode(clip)
        latents.append(z.flatten(1).double())
        again = vae.decode(z)
        psnrs.append(psnr_db(clip, again))
        ssims.append(ssim(clip, again))
    likeness = [s for s in ssims if s is not None]  # a clip under 11 px has none
    z_all = torch.cat(latents, dim=1) if clips else None
    return {
        "clips": len(clips),
        "psnr_db": float(np.mean(psnrs)) if clips else None,
        "psnr_db_worst": min(psnrs, default=None),
        "ssim": float(np.mean(likeness)) if likeness else None,
        "ssim_worst": min(likeness, default=None),
        "latent_mean": None if z_all is None else [round(v, 4) for v in z_all.mean(1).tolist()],
        "latent_std": None if z_all is None else [round(v, 4) for v in z_all.std(1).tolist()],
    }


def _psnr(mse_of_unit_range: float) -> float:
    return -10 * math.log10(max(mse_of_unit_range, 1e-10))


def _load_clips(
    config: Config, vae: Vae, spec: TrainVaeConfig, task: Task
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """(held out, for training): uint8 [T,H,W,3] clips of the manifest's usable videos, decoded once."""
    clip: ClipConfig = config.clip
    videos = [v for v in read_manifest(config.run_dir / "manifest.parquet") if v.status == "ok"]
    clips = []
    for video in videos:
        if task.stop_requested():
            raise Stopped("train_vae: stopped while reading the clips; nothing to save yet")
        try:
            plan = plan_clip(video, clip, stride=vae.stride, patch=(1, 1, 1), floor_frames=vae.floor_frames,
                             latent_frames=vae.lengths.latent)  # fmt: skip
            clips.append(decode(video.path, plan))
        except DataError as error:
            log.warning("left out: %s", error)
    if not clips:
        raise DataError(
            f"{config.run_dir / 'manifest.parquet'}: no usable clip among {len(videos)} videos with status ok"
        )
    held = min(spec.holdout_clips, len(clips) // 5)
    log.info("%d clips decoded (%d MB), %d held out", len(clips), sum(c.nbytes for c in clips) >> 20, held)
    return clips[:held], clips[held:]
