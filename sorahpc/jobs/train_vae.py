"""Train or fine-tune a video autoencoder on the clips of a manifest: ``sorahpc train-vae CONFIG``.

A gang of ranks, each with a share of the batch, by DDP; one rank is the same path. The batch of a step is a pure
function of (seed, step): the ranks only share it out. Clips are decoded ahead of the step that needs them, by the rank
that needs them, and kept as far as `cache_gb` goes.

State is saved every `save_every` steps (safetensors: no pickle), whole and by one rank, so that a rerun goes on from it
on any number of ranks; on the same number of CPUs bit by bit. (On GPUs the gradients of convolutions are summed in an
order that differs from run to run, and to fix it costs speed.) The folder of videos may grow or shrink between two
runs, what decides how clips are cut may not: a state of other settings is refused, by field.

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
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from sorahpc.config import ClipConfig, Config, TilingConfig, TrainVaeConfig
from sorahpc.data.batches import Batches
from sorahpc.data.clips import ClipCache
from sorahpc.data.decode import ClipPlan, decode, plan_clip
from sorahpc.data.holdout import limit_of, place_of
from sorahpc.data.keys import check_unchanged
from sorahpc.data.manifest import MANIFEST, Video, read_manifest, read_rows
from sorahpc.distributed.mesh import any_rank, init_process_group, leaving, pick_device
from sorahpc.errors import ConfigError, DataError, NumericsError, SetupError, Stopped
from sorahpc.metrics.similarity import psnr_db, ssim
from sorahpc.models.vae import WEIGHTS, Vae, load_vae, save_vae
from sorahpc.models.vae_start import NOTE, init_limit, start_vae
from sorahpc.models.vae_training import Trainer, read_note
from sorahpc.runs import Task, fsync_dir, write_json

log = logging.getLogger(__name__)


def run(config: Config, task: Task) -> None:
    """Manifest -> `train_vae.out`, and `train_vae/result.json` in the run with PSNR and SSIM on the clips held out.

    Raises:
        ConfigError: sections missing, or a class, weights or settings that don't go together. DataError: no usable
        clip, or a state of other settings. Stopped: saved on request. NumericsError: a loss, a weight or a result that
        is not finite; `out` is left as it was. SetupError: whole clips don't fit into the GPU's memory.
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
        before_init = init_limit(spec)
        if doubtful := sum(place_of(videos[i]) >= before_init for i in held):
            log.warning(
                "%d of the clips held out may be among those that %s (train_vae.init) was trained on: with the same "
                "videos and train_vae.holdout_clips, or fewer, they would not", doubtful, spec.init,
            )  # fmt: skip

        def load(i: int) -> np.ndarray:
            check_unchanged(videos[i])  # else what was held out before may be learned under another's name
            return decode(videos[i].path, _plan_one(videos[i], config.clip, vae))

        threads = max(1, spec.resources.cpus_per_task)
        with ClipCache(load, int(spec.cache_gb * 1e9), threads) as clips:
            learned = {i: shape for i, shape in enumerate(shapes) if place_of(videos[i]) >= limit}
            trainer = Trainer(vae, Batches(clips, learned, vae, spec, task.rank, task.world_size), spec, device)
            trainer.resume(state)
            _train(trainer, spec, task, state, {"settings": settings, "held_out_below": limit})
        tiling = config.vae.tiling if config.vae else None
        result = _finish(trainer, spec, task, {"held_out_below": min(limit, before_init)}, load, held, tiling)
        if task.rank == 0:
            write_json(folder / "result.json", result)
            log.info("wrote %s: %s", spec.out, json.dumps(result))


def _finish(
    trainer: Trainer, spec: TrainVaeConfig, task: Task, note: dict[str, Any], load: Any, held: list[int],
    tiling: TilingConfig | None,
) -> dict[str, Any]:  # fmt: skip
    """Write the autoencoder, measure it as it is read back, and only then put it where `out` is read.

    Args:
        tiling: how whole clips are cut, where training saw windows and crops that take less of a GPU's memory.

    Returns:
        of rank 0: what was measured.

    Raises:
        NumericsError: as `run`. SetupError: the GPU's memory is too small for a whole clip.
    """
    aside = spec.out / ".new"
    if task.rank == 0:
        save_vae(trainer.vae, trainer.ema, aside, getattr(torch, spec.weights_dtype))
        write_json(aside / NOTE, {**trainer.note(), **note})
    any_rank(False)  # it is written
    try:
        made = load_vae(aside, device=trainer.device, tiling=tiling)
        shared: list[Any] = [None] * task.world_size
        try:
            rows = measure(made, load, held[task.rank :: task.world_size])
        except torch.OutOfMemoryError as error:  # smaller windows and crops would not help: these are whole clips
            raise SetupError(
                f"vae.tiling: train_vae is done and saved, but the GPU lacks memory to measure whole clips "
                f"({str(error).splitlines()[0]}); run it again with vae.tiling, or on a GPU with more"
            ) from None
        dist.all_gather_object(shared, rows)
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
        kept = "" if spec.weights_dtype == "float32" else ", or train_vae.weights_dtype=float32"
        raise NumericsError(f"train_vae: {bad[0]} of what was to be {spec.out} is not finite; {lower}{kept}")


@contextmanager
def _joined(task: Task) -> Iterator[torch.device]:
    """This rank among its world, and the device that it computes on."""
    device = pick_device(task.local_rank)
    init_process_group(task.rank, task.world_size, device)
    with leaving(dist.destroy_process_group, task.world_size):
        yield device


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
