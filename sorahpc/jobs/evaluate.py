"""evaluate: figures and clips for the report, from what a run has made.

    reconstructions/reconstructions.json   real clips beside their cached latents decoded, with PSNR and SSIM
    samples/judgements.json                what each sample shows of what its prompt asked (toy world only)

The reconstructions are what the model can show at best: the latents are those that it was trained on, storage dtype
included. The judge looks at the pixels of the written mp4 files, as a viewer would.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sorahpc.config import ClipConfig, Config
from sorahpc.data.captions import with_captions
from sorahpc.data.decode import ClipPlan, VideoError, decode, plan_clip, probe
from sorahpc.data.indexing import open_cache
from sorahpc.data.keys import check_unchanged
from sorahpc.data.latents import LatentCache
from sorahpc.data.manifest import MANIFEST, Video, open_manifest
from sorahpc.data.mp4 import write_mp4
from sorahpc.data.toyworld import parse_caption
from sorahpc.distributed.mesh import shared_device
from sorahpc.errors import DataError, Stopped
from sorahpc.metrics.physics import judge
from sorahpc.metrics.similarity import psnr_db, ssim
from sorahpc.models.vae import Vae, load_vae
from sorahpc.runs import Task, read_json, write_json

log = logging.getLogger(__name__)


def run(config: Config, task: Task) -> None:
    """Judge the samples where `evaluate.toyworld` says so, and decode `evaluate.reconstructions` cached clips."""
    config.need("vae")
    samples = _sample_files(config) if config.evaluate.toyworld else []
    total = len(samples) + config.evaluate.reconstructions
    done = 0

    def advance() -> None:
        nonlocal done
        done += 1
        task.report(done, total, "clip")
        if task.stop_requested():
            raise Stopped(f"evaluate: stopped on request after {done} of {total} clips")

    task.report(0, total, "clip")
    if samples:
        rows = []
        for mp4, prompt in samples:
            rows.append(judge_file(mp4, prompt))
            advance()
        write_json(config.samples_dir / "judgements.json", {"format": 1, "samples": rows})
        log.info("judged %d samples: %s", len(rows), _counts(rows))
    if config.evaluate.reconstructions:
        # A real VAE decodes a clip in seconds there, and in minutes to hours on a node's CPUs.
        reconstruct(config, shared_device(task.local_rank), advance)


def _sample_files(config: Config) -> list[tuple[Path, str]]:
    """(mp4, prompt) of the samples of the current prompts file that exist."""
    path = config.samples_dir / "prompts.json"
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))["samples"]
    except FileNotFoundError:
        raise DataError(f"{path}: no samples to judge; run `sorahpc sample` first") from None
    files = [(config.samples_dir / f"{entry['name']}.mp4", entry["prompt"]) for entry in entries]
    missing = [mp4 for mp4, _ in files if not mp4.is_file()]
    if missing:
        log.warning("%d of %d samples are not made yet, such as %s", len(missing), len(files), missing[0].name)
    return [(mp4, prompt) for mp4, prompt in files if mp4.is_file()]


def judge_file(mp4: Path, prompt: str) -> dict[str, Any]:
    """What a sample shows of its prompt, as plain data: for each aspect `ok`, and what was asked and found.

    Raises:
        DataError: the prompt is not a caption of the toy world, or the file can't be decoded.
    """
    try:
        asked = parse_caption(prompt)
    except ValueError as error:
        raise DataError(f"{mp4}: {error}; set evaluate.toyworld: false for prompts of other worlds") from None
    frames, fps = all_frames(mp4)
    verdict = judge(frames, prompt, fps)
    row: dict[str, Any] = {"name": mp4.stem, "prompt": prompt, "visible": {"ok": bool(verdict.visible)}}
    for aspect in ("colour", "shape", "direction", "size", "speed"):
        ok, found = bool(getattr(verdict, f"{aspect}_ok")), getattr(verdict, aspect)
        row[aspect] = {"ok": ok, "asked": asked[aspect], "found": found}
    return row


def all_frames(mp4: Path) -> tuple[np.ndarray, float]:
    """Every frame of a video of constant rate, uint8 [T,H,W,3], and its frames a second."""
    found = probe(mp4)
    plan = ClipPlan(tuple(i / found.fps for i in range(found.frames)), found.height, found.width)
    return decode(mp4, plan), found.fps


def _counts(rows: list[dict[str, Any]]) -> str:
    return ", ".join(f"{a} {sum(r[a]['ok'] for r in rows)}" for a in ("visible", "colour", "shape", "direction"))


def reconstruct(config: Config, device: torch.device, advance: Callable[[], None]) -> None:
    """Decode cached latents spread over the cache on that device, and write them beside the real clips with their PSNR
    (dB) and SSIM. `advance` is told of each clip.

    Raises:
        DataError: no finished cache, one of another VAE, or of another run's clips.
    """
    assert config.vae is not None
    folder = config.run_dir / "reconstructions"
    cache = open_cache(config)
    count = min(config.evaluate.reconstructions, len(cache))
    chosen = [i * len(cache) // count for i in range(count)]
    # format 2 has SSIM
    wanted = {"format": 2, "vae": cache.info["vae"], "keys": [cache.keys[i] for i in chosen]}
    before = read_json(folder / "reconstructions.json") or {}
    if all(before.get(field) == value for field, value in wanted.items()):
        for _ in chosen:
            advance()
        return
    vae = load_vae(config.vae.path, config.vae.dtype, device, config.vae.tiling)
    for field, expected in cache.info["vae"].items():
        if (found := getattr(vae, field, None)) != expected:
            raise DataError(
                f"vae.path: {config.vae.path} has {field} {found}, but the cache {config.cache_dir} was "
                f"made with {expected}; use that VAE"
            )
    # Rejected rows keep their keys: a duplicate has that of the row that is used, a renamed file that of its new row.
    rows = open_manifest(config.run_dir / MANIFEST)
    every, _ = with_captions(config, rows)
    videos = {encoded.key: video for encoded, video in zip(every, rows, strict=True) if video.ok}
    clips = []
    for i in chosen:
        try:
            clips.append(_pair(config, cache, i, vae, videos, folder))
        except VideoError as error:  # the videos may have changed since; the other clips and the samples have not
            log.warning("reconstruction left out: %s", error)
        advance()
    # Only what is there, so that the next run tries again what was left out.
    wanted["keys"] = [clip["key"] for clip in clips]
    write_json(folder / "reconstructions.json", {**wanted, "clips": clips})
    if clips:
        log.info("mean PSNR of %d reconstructions: %.1f dB", len(clips), np.mean([c["psnr_db"] for c in clips]))
        if likeness := [c["ssim"] for c in clips if c["ssim"] is not None]:
            log.info("mean SSIM of %d reconstructions: %.4f", len(likeness), np.mean(likeness))
    else:
        log.warning("no reconstruction: none of %d cached clips has its video any more; encode again", count)


def _pair(
    config: Config, cache: LatentCache, i: int, vae: Vae, videos: dict[str, Video], folder: Path
) -> dict[str, Any]:
    key = cache.keys[i]
    if key not in videos:
        raise VideoError(cache.sources[i], f"{key} is not in the manifest: its video or caption changed since encode")
    latent, _ = cache.read(i)
    again = vae.decode(latent)
    clip = ClipConfig.model_validate(cache.info["clip"])  # as it was encoded, whatever the config says today
    ph, pw = cache.info["patch_hw"]
    patch = (cache.info.get("patch_t") or 1, ph, pw)
    plan = plan_clip(videos[key], clip, stride=vae.stride, patch=patch, lengths=vae.lengths)
    check_unchanged(videos[key])  # else the latent is held against another clip
    real = decode(videos[key].path, plan)
    if real.shape != again.shape:
        raise DataError(
            f"{videos[key].path}: its cached latent decodes to {list(again.shape)}, the file itself to "
            f"{list(real.shape)}; the cache is damaged or of another version: delete it and run `sorahpc encode`"
        )
    write_mp4(folder / f"{key}.real.mp4", real, clip.fps)
    write_mp4(folder / f"{key}.vae.mp4", again, clip.fps)
    return {
        "key": key,
        "caption": cache.captions[i],
        "real": f"{key}.real.mp4",
        "reconstruction": f"{key}.vae.mp4",
        "psnr_db": psnr_db(real, again),
        "ssim": ssim(real, again),
    }
