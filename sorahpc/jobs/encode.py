"""Encode: manifest -> decoded clips -> VAE latents and text embeddings -> the latent cache.

An array of independent tasks. The rows of the manifest, in their order, are cut into shards; task k of n makes shards
k, k+n, ..., of which those that exist are done. A clip that can't be encoded is kept in its shard's list with the
reason, and costs nothing but itself; to try it again, delete the shard. Whoever finds all shards present builds the
index. The cache doesn't depend on the number of tasks, nor on how often they were killed.
"""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any

import torch

from sorahpc.config import ClipConfig, Config, config_hash
from sorahpc.data.cache import PlannedShard, Summary, build_index, pin_info, plan_shards
from sorahpc.data.captions import with_captions
from sorahpc.data.decode import VideoError, decode, plan_clip
from sorahpc.data.manifest import MANIFEST, Video, read_manifest, shown
from sorahpc.data.shards import EMPTY_TEXT, ShardWriter, clean_caption, remove_stale_parts, write_empty_text
from sorahpc.errors import DataError, Stopped
from sorahpc.models.text import TextEncoder, load_text
from sorahpc.models.vae import Vae, load_vae
from sorahpc.runs import Task

log = logging.getLogger(__name__)

PREPROCESS = 1  # version of plan_clip and decode: raise it when they give other pixels for the same settings
MAX_REASONS_SHOWN = 5


def run(config: Config, task: Task) -> None:
    """Make this task's missing shards, and the index if it finds all of them.

    Raises:
        ConfigError: sections or model folders missing. DataError: no manifest, captions or usable clip, or the cache
        folder was made with other settings. Stopped: between two clips, on request.
    """
    config.need("vae", "text")
    assert config.vae is not None and config.text is not None
    manifest = config.run_dir / MANIFEST
    every = with_captions(config, read_manifest(manifest))
    if not any(v.ok for v in every):
        raise DataError(f"{shown(manifest)}: no usable video among {len(every)}; its column `reason` says why of each")
    device = torch.device("cuda", task.local_rank % torch.cuda.device_count()) if torch.cuda.is_available() else "cpu"
    vae = load_vae(config.vae.path, config.vae.dtype, device)
    text = load_text(config.text.path, config.text.max_tokens, config.text.dtype, device)
    patch_hw = config.model.patch[1:] if config.model else (1, 1)
    folder = config.cache_dir
    try:
        pin_info(folder, cache_info(config, vae, text, patch_hw))
    except OSError as error:
        raise DataError(f"{shown(folder)}: can't write the cache: {error.strerror or error}") from None
    for name in remove_stale_parts(folder):
        log.info("removed %s, which a killed task left", shown(folder / name))
    if not (folder / EMPTY_TEXT).exists():
        write_empty_text(folder, text.encode([""])[0], config.encode.dtype)

    plan = plan_shards([v.key if v.ok else None for v in every], config.encode.clips_per_shard)
    mine = plan[task.rank :: task.world_size]
    total = sum(len(s.rows) for s in mine)
    missing = [s for s in mine if not (folder / s.name).exists()]
    done = total - sum(len(s.rows) for s in missing)
    log.info("%d clips in %d shards of this task (%d in all); %d clips are there", total, len(mine), len(plan), done)
    task.report(done, total, "clip")
    start = time.monotonic()
    for shard in missing:
        writer = ShardWriter(folder, shard.name, config.encode.dtype, vae.channels, text.dim)
        for row in shard.rows:
            if task.stop_requested():
                raise Stopped(f"encode: stopped with {done} of {total} clips written; the shard in work is made again")
            _encode(every[row], config.clip, patch_hw, vae, text, writer)
            task.report(done + len(writer.samples) + len(writer.rejected), total, "clip")
        writer.commit()
        done += len(shard.rows)
    if missing:
        log.info("encoded %d shards in %.1f s", len(missing), time.monotonic() - start)
    _finish(folder, plan)


def cache_info(config: Config, vae: Vae, text: TextEncoder, patch_hw: tuple[int, ...]) -> dict[str, Any]:
    """What decides the cache's content, as pinned in cache.json."""
    assert config.vae is not None and config.text is not None
    clip: ClipConfig = config.clip
    return {
        "vae": {"id": vae.id, "weights_sha256": vae.weights_sha256},
        "vae_dtype": config.vae.dtype,
        "text": {"id": text.id, "weights_sha256": text.weights_sha256},
        "text_dtype": config.text.dtype,
        "text_max_tokens": config.text.max_tokens,
        "dtype": config.encode.dtype,
        "channels": vae.channels,
        "text_dim": text.dim,
        "stride": list(vae.stride),
        "patch_hw": list(patch_hw),
        "clip": clip.model_dump(mode="json"),
        "clip_sha256": config_hash(clip),
        "preprocess": PREPROCESS,
        "tiling": None,
    }


def _encode(
    video: Video, clip: ClipConfig, patch_hw: tuple[int, ...], vae: Vae, text: TextEncoder, writer: ShardWriter
) -> None:
    try:
        ph, pw = patch_hw
        plan = plan_clip(video, clip, stride=vae.stride, patch_hw=(ph, pw), floor_frames=vae.floor_frames)
        latent = vae.encode(decode(video.path, plan))
        caption = clean_caption(video.caption)
        writer.add(video.key, latent, text.encode([caption])[0], caption, clip.fps, video.path)
    except DataError as error:
        reason = error.reason if isinstance(error, VideoError) else str(error)
        log.warning("rejected %s: %s", shown(video.path), reason)
        writer.reject(video.key, video.path, reason)


def _finish(folder: Path, plan: list[PlannedShard]) -> Summary | None:
    """Build the index if all shards are there. Raises DataError when no clip at all could be encoded."""
    summary = build_index(folder, [s.name for s in plan])
    if summary is None:
        log.info("other tasks still have shards to make; the last one builds the index")
        return None
    if not summary.samples:
        shown_reasons = "; ".join(f"{r['source']}: {r['reason']}" for r in summary.rejected[:MAX_REASONS_SHOWN])
        raise DataError(f"{shown(folder)}: none of {len(summary.rejected)} clips could be encoded: {shown_reasons}")
    log.info("cache complete: %d samples, %d clips rejected (rejected.json)", summary.samples, len(summary.rejected))
    if summary.superseded:
        log.info(
            "%d shards in %s are not of this manifest; left alone, no longer read", summary.superseded, shown(folder)
        )
    return summary
