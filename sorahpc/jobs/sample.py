"""sample: prompts + checkpoint -> mp4 files, each with a JSON sidecar that says how it was made.

    samples/
        prompts.json                 the samples of the current prompts file, in order (written by task 0)
        00000-a-red-ball.mp4         written aside and renamed
        00000-a-red-ball.json        last: a sample with a fitting sidecar is done

The unit of work is a pack: `sample.prompts_per_pack` consecutive prompts, denoised together whatever their grids.
Which prompts share a pack depends on the prompts file alone, so the bytes of a sample do not depend on how many tasks
there are, nor on which of them made it or what was there before. Unit u belongs to task u % num_tasks.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import math
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from sorahpc import ops
from sorahpc.config import Config, config_hash
from sorahpc.data.captions import ITEMS, known_items, read_item
from sorahpc.data.manifest import shown
from sorahpc.data.mp4 import write_mp4
from sorahpc.data.prompts import Prompt, read_prompts
from sorahpc.diffusion.sampler import euler, guided
from sorahpc.distributed import megatron
from sorahpc.distributed.checkpoint import MANIFEST, Meta, latest
from sorahpc.distributed.mesh import shared_device
from sorahpc.errors import CheckpointError, ConfigError, NumericsError, SetupError, Stopped
from sorahpc.models.captioner import ask_all, load_captioner, prompt_question
from sorahpc.models.dit import DiT, load_ema_for_sampling
from sorahpc.models.text import TextEncoders, load_texts
from sorahpc.models.vae import Vae, load_vae
from sorahpc.profiling.page import write_profile_page
from sorahpc.profiling.record import num_steps, recorded, remove_other_ranks, span
from sorahpc.runs import Task, write_json

log = logging.getLogger(__name__)

INDEX = "prompts.json"


@dataclass(frozen=True)
class Item:
    """One sample to make: a prompt with every setting resolved.

    `settings` names all that its bits depend on, but for the software and the machine.
    """

    name: str
    prompt: Prompt
    seed: int
    sample_id: int  # of the noise
    frames: int
    height: int
    width: int
    fps: float
    settings: dict[str, Any]

    @property
    def settings_sha256(self) -> str:
        return config_hash(self.settings)


@dataclass(frozen=True)
class Models:
    """What a pack goes through, on one device."""

    model: nn.Module
    meta: Meta
    texts: TextEncoders
    vae: Vae
    patch: tuple[int, int, int]
    device: torch.device


def run(config: Config, task: Task) -> None:
    """Make the samples of this task's packs that are missing or were made with other settings."""
    config.need("sample", "vae", "text")
    assert config.sample is not None
    prompts = read_prompts(config.sample.prompts)
    checkpoint = _checkpoint(config)
    folder = config.samples_dir
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SetupError(f"sample.out: can't make the folder {folder}: {error.strerror}") from None

    size = config.sample.prompts_per_pack
    if config.sample.expand:  # only those of this task's packs: no more than a pack decides a sample
        own = [p for p in prompts if p.index // size % task.world_size == task.rank]
        expanded = {p.index: p for p in expand(config, own, task)}
        prompts = [expanded.get(p.index, p) for p in prompts]
    items = plan(config, prompts, checkpoint)
    if task.rank == 0:
        write_index(folder, items, config)
    units = [items[i : i + size] for i in range(0, len(items), size)][task.rank :: task.world_size]
    missing = [[item for item in unit if not _is_done(folder, item)] for unit in units]
    total = sum(len(unit) for unit in units)
    done = total - sum(len(m) for m in missing)
    log.info("%d of %d samples of this task are done in %s; checkpoint %s", done, total, folder, checkpoint)
    task.report(done, total, "clip")
    if done == total:
        return

    try:
        models = _load(config, checkpoint, task.local_rank)
        _check_sizes(config, items, models)
        for unit, lacking in zip(units, missing, strict=True):
            if not lacking:
                continue
            if task.stop_requested():
                raise Stopped(f"sample: stopped on request with {done} of {total} samples of this task done")
            # The whole pack again, though only some are lacking: the pack is part of a sample's bits.
            with ops.chosen(config.ops):
                clips = make_pack(unit, models, config)
            for item, (frames, text_tokens) in zip(unit, clips, strict=True):
                if item in lacking:
                    _write(folder, item, frames, text_tokens, unit, models, config, checkpoint)
                    done += 1
                    task.report(done, total, "clip")
    finally:
        megatron.stop()


def profile(config: Config, task: Task) -> None:
    """The first pack, made again and again under a profiler with `profile.steps` Euler steps; no sample is written.

    It has one task, which is recorded whatever `profile.ranks` says of training.

    Raises:
        As `run`; Stopped: on request, with nothing kept.
    """
    config.need("sample", "vae", "text")
    assert config.sample is not None
    how, folder = config.profile, config.run_dir / "profile"
    checkpoint = _checkpoint(config)
    prompts = read_prompts(config.sample.prompts)[: config.sample.prompts_per_pack]
    items = plan(config, expand(config, prompts, task) if config.sample.expand else prompts, checkpoint)
    few = config.model_copy(update={"sample": config.sample.model_copy(update={"steps": how.steps})})
    # What is recorded is one pack, from its text to its frames.
    once = how.model_copy(update={"steps": 1, "ranks": (task.rank,)})
    try:
        models = _load(config, checkpoint, task.local_rank)
        _check_sizes(config, items, models)
        assert isinstance(models.model, DiT)
        shapes = [models.vae.latent_shape(item.frames, item.height, item.width) for item in items]
        volumes = [math.prod(shape[1:]) for shape in shapes]
        tokens = how.steps * sum(volumes) // math.prod(models.patch) * (1 if config.sample.cfg_scale == 1 else 2)
        total = num_steps(once)
        recording = recorded(once, folder / "sample", task, models.device, models.model.parts())
        with recording as pack_done, ops.chosen(config.ops):
            for i in range(total):
                if task.stop_requested():
                    raise Stopped(
                        f"profile-sample: stopped on request after {i} of {total} packs; nothing of it is kept, "
                        "an earlier profile is"
                    )
                make_pack(items, models, few)
                pack_done(tokens)
                task.report(i + 1, total, "pack")
        remove_other_ranks(once, folder / "sample", models.device)
        log.info("wrote %s", write_profile_page([folder], folder / "index.html"))
    finally:
        megatron.stop()


def expand(config: Config, prompts: list[Prompt], task: Task) -> list[Prompt]:
    """The prompts, each with what the model of the section `caption` made of it, kept in `<run>/captions/prompts`.

    A prompt whose answers are all rejected stays as it is; the log and the sidecar say why. The model is gone when this
    returns: the memory is the sampler's.

    Raises:
        As `sorahpc.models.captioner.ask_all`.
    """
    section = config.caption
    assert section is not None
    captioner = load_captioner(section, shared_device(task.local_rank))
    folder = config.run_dir / ITEMS / "prompts"
    asked = [prompt_question(section, captioner, p.text) for p in prompts]
    known = known_items(folder)
    missing = {q.sha256: q for q in asked if q.sha256 not in known}  # equal prompts are asked about once
    ask_all(section, captioner, list(missing.values()), folder, task.stop_requested, lambda _: None)
    out = []
    for p, question in zip(prompts, asked, strict=True):
        item = read_item(folder, question.sha256)
        if not item.caption:
            log.warning("%s: the prompt stays as it is: %s", p.name, shown(item.reason))
        how = {"prompt": item.caption, "reason": item.reason, "model": item.model, "item": item.sha256}
        out.append(dataclasses.replace(p, detailed=item.caption, expansion=how))
    return out


def plan(config: Config, prompts: list[Prompt], checkpoint: Path) -> list[Item]:
    """Every sample of the prompts file, in order, with all settings that its bits depend on."""
    s = config.sample
    assert s is not None and config.vae is not None and config.text is not None
    shared = {
        "steps": s.steps,
        "cfg_scale": s.cfg_scale,
        "t_shift": s.t_shift,
        "ops": config.ops,
        # Names the weights, and through them the VAE and the text encoder; the path may change, the bytes may not.
        "checkpoint_manifest_sha256": _sha256(checkpoint / MANIFEST),
        "vae_dtype": config.vae.dtype,
        "vae_tiling": config.vae.tiling.model_dump(mode="json") if config.vae.tiling else None,
        "text_dtype": config.text.dtype,
        "text_max_tokens": config.text.max_tokens,
        **({"clip_projected": config.text.clip.projected} if config.text.clip else {}),
    }
    resolved: list[dict[str, Any]] = []
    for p in prompts:
        own: dict[str, Any] = {
            "prompt": p.condition,
            # A line with its own seed asks for that seed's noise wherever it stands in the file.
            "seed": s.seed if p.seed is None else p.seed,
            "sample_id": p.index if p.seed is None else 0,
            "frames": p.frames or s.frames,
            "height": p.height or s.height,
            "width": p.width or s.width,
            "fps": p.fps or s.fps,
        }
        resolved.append(own)
    items = []
    for p, own in zip(prompts, resolved, strict=True):
        first = p.index // s.prompts_per_pack * s.prompts_per_pack
        pack = config_hash({"pack": resolved[first : first + s.prompts_per_pack]})
        items.append(
            Item(
                name=p.name,
                prompt=p,
                **{key: own[key] for key in ("seed", "sample_id", "frames", "height", "width", "fps")},
                settings={**own, **shared, "pack": pack},
            )
        )
    return items


def make_pack(unit: list[Item], models: Models, config: Config) -> list[tuple[np.ndarray, int]]:
    """Denoise a pack of samples together.

    Returns:
        For each: frames uint8 [T,H,W,3], and how many T5 tokens its prompt has.

    Raises:
        NumericsError: a latent is not finite.
    """
    assert config.sample is not None
    with span("text encoder"):
        conditions = models.texts.encode([*(item.prompt.condition for item in unit), ""])
    shapes = [models.vae.latent_shape(item.frames, item.height, item.width) for item in unit]  # [C,T,H,W] each
    channels, patch, device = models.meta.channels, models.patch, models.device
    grids = torch.tensor([[n // p for n, p in zip(shape[1:], patch, strict=True)] for shape in shapes])  # [S,3]
    eps = [ops.noise(item.seed, item.sample_id, 0, shape) for item, shape in zip(unit, shapes, strict=True)]
    x = ops.patchify(torch.cat([e.flatten() for e in eps]).to(device), grids, channels, patch)  # [L,P]
    *texts, empty = [{name: e.to(device) for name, e in each.items()} for each in conditions]
    velocity = guided(models.model, grids, texts, empty, config.sample.cfg_scale)
    with span("forward"):
        x = euler(velocity, x, config.sample.steps, config.sample.t_shift)
    flat = ops.unpatchify(x, grids, channels, patch).float()

    mean = torch.tensor(models.meta.latent_mean, device=device)[:, None, None, None]
    std = torch.tensor(models.meta.latent_std, device=device)[:, None, None, None]
    clips = []
    parts = flat.split([e.numel() for e in eps])
    for item, part, shape, condition in zip(unit, parts, shapes, conditions[:-1], strict=True):
        latent = part.view(shape) * std + mean
        if not bool(latent.isfinite().all()):
            raise NumericsError(
                f"sample {item.name}: the latent is not finite (cfg_scale {config.sample.cfg_scale}, checkpoint step "
                f"{models.meta.step}); sample from another checkpoint or with a smaller sample.cfg_scale"
            )
        with span("VAE"):
            clips.append((models.vae.decode(latent), len(condition["text"])))
    return clips


def _checkpoint(config: Config) -> Path:
    assert config.sample is not None
    if config.sample.checkpoint is not None:
        folder = config.sample.checkpoint
        if not (folder / MANIFEST).is_file():
            raise CheckpointError(f"sample.checkpoint: no {MANIFEST} in {folder}; expected a committed checkpoint")
        return folder
    root = config.run_dir / "checkpoints"
    found = latest(root)
    if found is None:
        raise CheckpointError(f"{root}: no checkpoint to sample from; train first, or set sample.checkpoint")
    return found


def _load(config: Config, checkpoint: Path, local_rank: int) -> Models:
    assert config.vae is not None and config.text is not None
    model, meta = load_ema_for_sampling(checkpoint, local_rank)
    device = next(model.parameters()).device
    if bool(meta.clip_text_dim) != (config.text.clip is not None):
        raise CheckpointError(
            f"text.clip: the checkpoint {checkpoint} was trained {'with' if meta.clip_text_dim else 'without'} CLIP; "
            f"{'name the encoder of its cache' if meta.clip_text_dim else 'leave it out'}"
        )
    texts = load_texts(config.text, device)
    vae = load_vae(config.vae.path, config.vae.dtype, device, config.vae.tiling)
    used: list[tuple[str, str, Any, Path]] = [("vae", "vae.path", vae, config.vae.path)]
    used.append(("text", "text.path", texts.t5, config.text.path))
    if config.text.clip is not None:
        used.append(("clip_text", "text.clip.path", texts.clip, config.text.clip.path))
    for section, key, found, path in used:
        for field, expected in meta.cache[section].items():
            if getattr(found, field, None) != expected:
                raise CheckpointError(
                    f"{key}: {path} has {field} {getattr(found, field)}, but the checkpoint {checkpoint} was "
                    f"trained with {expected}; use the one that encoded its cache"
                )
    return Models(model, meta, texts, vae, model.model.patch, device)


def _check_sizes(config: Config, items: list[Item], models: Models) -> None:
    """Raise ConfigError for frames, height and width that the VAE and the patch don't take, a line a fault."""
    assert config.sample is not None
    t, *sides = models.vae.stride
    pt, *patches = models.patch
    faults: dict[str, None] = {}  # in order, each once
    for item in items:
        for field, stride, patch in zip(("height", "width"), sides, patches, strict=True):
            value, unit = getattr(item, field), stride * patch
            if value < unit or value % unit:
                expected = f"a multiple of {unit} (VAE stride {stride} x patch {patch})"
                near = max(round(value / unit), 1) * unit
                faults[f"{_where(config, item, field)}: expected {expected}, found {value}; use {near}"] = None
        where, valid = _where(config, item, "frames"), models.vae.floor_frames(item.frames)
        latent_frames = (valid - 1) // t + 1
        if valid != item.frames:
            faults[f"{where}: expected what {models.vae.id} takes, found {item.frames}; use {valid}"] = None
        elif latent_frames % pt:
            found = f"{item.frames}, which is {latent_frames}"
            faults[f"{where}: expected a multiple of the patch's {pt} in latent frames, found {found}"] = None
    if faults:
        raise ConfigError("\n".join(list(faults)[:20]))


def _where(config: Config, item: Item, field: str) -> str:
    assert config.sample is not None
    own = getattr(item.prompt, field) is not None
    return f"{config.sample.prompts} line {item.prompt.line}: {field}" if own else f"sample.{field}"


# ---------------------------------------------------------------------------------------------------------------------
# Files


def write_index(folder: Path, items: list[Item], config: Config) -> None:
    """Write `prompts.json`, by which a reader tells the samples of the current prompts file from older ones."""
    assert config.sample is not None
    names = [{"name": item.name, "prompt": item.prompt.text} for item in items]
    write_json(folder / INDEX, {"prompts_file": str(config.sample.prompts), "samples": names})
    known = {item.name for item in items}
    others = sorted(p.stem for p in folder.glob("[0-9]*-*.mp4") if p.stem not in known)
    if others:
        log.warning(
            "%s holds %d clips that are not of %s (such as %s.mp4); they were left alone",
            folder, len(others), config.sample.prompts, others[0],
        )  # fmt: skip


def read_sidecar(path: Path) -> dict[str, Any] | None:
    """A sample's sidecar; None where there is none, or it is not one (it is then made again)."""
    try:
        sidecar = json.loads(path.read_text(encoding="utf-8"))
        return sidecar if isinstance(sidecar["settings"], dict) and isinstance(sidecar["mp4"]["bytes"], int) else None
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        log.warning("%s is not a sidecar (%s); the sample is made again", path, error)
        return None


def _is_done(folder: Path, item: Item) -> bool:
    sidecar = read_sidecar(folder / f"{item.name}.json")
    if sidecar is None:
        return False
    if sidecar.get("settings_sha256") != item.settings_sha256:
        before = sidecar["settings"]
        changed = [k for k in item.settings if before.get(k) != item.settings[k]]
        shown = ", ".join(f"{k} {_short(before.get(k))} -> {_short(item.settings[k])}" for k in changed)
        log.info("%s was made with other settings and is made again: %s", item.name, shown or "its own hash")
        return False
    mp4 = folder / f"{item.name}.mp4"
    size = mp4.stat().st_size if mp4.is_file() else None
    if size != sidecar["mp4"]["bytes"]:
        log.info("%s: %s bytes where its sidecar says %d; made again", mp4, size, sidecar["mp4"]["bytes"])
        return False
    return True


def _write(
    folder: Path, item: Item, frames: np.ndarray, text_tokens: int, unit: list[Item], models: Models, config: Config,
    checkpoint: Path,
) -> None:  # fmt: skip
    assert config.text is not None
    if text_tokens >= config.text.max_tokens:
        log.warning("%s: the prompt was cut to text.max_tokens = %d tokens", item.name, config.text.max_tokens)
    mp4 = folder / f"{item.name}.mp4"
    write_mp4(mp4, frames, item.fps)
    sidecar = {
        "format": 1,
        "name": item.name,
        "prompt": item.prompt.text,
        **({} if item.prompt.expansion is None else {"expansion": item.prompt.expansion}),
        "prompt_tokens": text_tokens,
        "seed": item.seed,
        "settings": item.settings,
        "settings_sha256": item.settings_sha256,
        "pack": [other.name for other in unit],
        "checkpoint": {
            "path": str(checkpoint),
            "step": models.meta.step,
            "manifest_sha256": item.settings["checkpoint_manifest_sha256"],
        },
        "vae": models.vae.identity,
        **{k: v for k, v in models.texts.info().items() if isinstance(v, dict)},
        "mp4": {"file": mp4.name, "bytes": mp4.stat().st_size, "sha256": _sha256(mp4)},
        "device": torch.cuda.get_device_name(models.device) if models.device.type == "cuda" else "cpu",
        "versions": _versions(),
    }
    write_json(folder / f"{item.name}.json", sidecar)


def _versions() -> dict[str, str]:
    out = {"torch": str(torch.__version__)}
    for package in ("sorahpc", "megatron-core", "diffusers", "transformers", "av"):
        try:
            out[package] = version(package)
        except PackageNotFoundError:
            out[package] = "not installed as a package"
    return out


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 24 else f"{text[:12]}..."


def _sha256(path: Path) -> str:
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()
