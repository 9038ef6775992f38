"""A step of an autoencoder's training, and the state that it changes.

    loss = mse + l1_weight L1 + perceptual.weight LPIPS + kl_weight KL + adversarial.weight lambda L_adv

of pixels in [-1, 1]. KL is that of the posterior to a unit normal, mean per latent value. In a training from scratch
the posterior's variance is fixed, not learned: noise of `latent_noise` is added to the latent, so that latents come out
near unit scale and tolerant of a sampler's errors by a stated amount, for every class (AutoencoderKLCosmos gives no
variance). A published autoencoder that is fine-tuned (`init`) keeps the variance that it has learned.

Matrices and convolutions are trained by Muon (momentum, then the nearest orthogonal matrix), biases and gains by Adam:
on the toy world 800 steps of it reached 24.3 dB where Adam alone reached 21.6 dB, in the same time.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from sorahpc.config import TrainVaeConfig
from sorahpc.data.batches import Batches
from sorahpc.errors import ConfigError, DataError, NumericsError
from sorahpc.models.discriminator import PatchDiscriminator, balance, hinge_loss
from sorahpc.models.lpips import MIN_SIDE_PX, Lpips, load_lpips
from sorahpc.models.muon import Muon
from sorahpc.models.vae import Vae
from sorahpc.models.vae_start import learns_variance
from sorahpc.runs import atomic_write

log = logging.getLogger(__name__)

WARMUP_STEPS = 100
ADAM_SHARE = 0.1  # Adam's learning rate as a share of Muon's


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
        self.learned = learns_variance(spec, vae, has_variance)
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
