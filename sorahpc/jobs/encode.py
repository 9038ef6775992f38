"""Encode: manifest -> decoded clips -> VAE latents and text embeddings -> the latent cache.

While the VAE is at work on a clip, the next two are decoded and the shard before is written.

An array of independent tasks. The rows of the manifest, in their order, are cut into shards; task k of n makes shards
k, k+n, ..., of which those that exist are done. A clip that can't be encoded is kept in its shard's list with the
reason, and costs nothing but itself; to try it again, delete the shard. Whoever finds all shards present builds the
index. The cache doesn't depend on the number of tasks, nor on how often they were killed.
"""

from __future__ import annotations

import logging
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sorahpc.config import ClipConfig, Config, config_hash
from sorahpc.data import dali
from sorahpc.data.cache import (
    INFO,
    PlannedShard,
    Summary,
    build_index,
    check_info,
    pin_info,
    plan_shards,
    read_index,
    read_info,
)
from sorahpc.data.captions import with_captions
from sorahpc.data.decode import VideoError, decode_by, plan_clip
from sorahpc.data.manifest import MANIFEST, Video, read_manifest, shown
from sorahpc.data.shards import EMPTY_TEXT, ShardWriter, clean_caption, remove_stale_parts, write_empty_text
from sorahpc.data.texts import DETAILED
from sorahpc.errors import DataError, SetupError, Stopped
from sorahpc.models.text import TextEncoders, load_texts
from sorahpc.models.vae import Vae, load_vae
from sorahpc.runs import Task

log = logging.getLogger(__name__)

PREPROCESS = 2  # version of plan_clip and decode: raise it when they give other pixels for the same settings
MAX_REASONS_SHOWN = 5
Clip = tuple[np.ndarray, str]  # uint8 [T,H,W,3], and who decoded it
AHEAD = 2  # clips that are decoded, or being so, while the VAE is at work on another
MAX_NATIVE_MEAN, MAX_NATIVE_STD = 3.0, 5.0


def run(config: Config, task: Task) -> None:
    """Make this task's missing shards, and the index if it finds all of them.

    Raises:
        ConfigError: sections or model folders missing. DataError: no manifest, captions or usable clip, or the cache
        folder was made with other settings. Stopped: between two clips, on request.
    """
    config.need("vae", "text")
    assert config.vae is not None and config.text is not None
    manifest = config.run_dir / MANIFEST
    every, detailed = with_captions(config, read_manifest(manifest))
    if not any(v.ok for v in every):
        raise DataError(f"{shown(manifest)}: no usable video among {len(every)}; its column `reason` says why of each")
    device = torch.device("cuda", task.local_rank % torch.cuda.device_count()) if torch.cuda.is_available() else "cpu"
    vae = load_vae(config.vae.path, config.vae.dtype, device, config.vae.tiling)
    texts = load_texts(config.text, device)
    patch = config.model.patch if config.model else (1, 1, 1)
    decoder = _decoder(config.encode.decoder)
    gpu = task.local_rank % max(1, torch.cuda.device_count())
    folder = config.cache_dir
    try:
        pin_info(folder, cache_info(config, vae, texts, patch, decoder))
        # Of PyAV, and of no CLIP, cache.json says nothing; so one that has DALI or CLIP passes above.
        check_info(folder / INFO, {"decoder": "pyav", **read_info(folder)}, {"decoder": decoder})
        if texts.clip is None:
            check_info(folder / INFO, read_info(folder), {"clip_text": None})
    except OSError as error:
        raise DataError(f"{shown(folder)}: can't write the cache: {error.strerror or error}") from None
    for name in remove_stale_parts(folder):
        log.info("removed %s, which a killed task left", shown(folder / name))
    if not (folder / EMPTY_TEXT).exists():
        write_empty_text(folder, texts.encode([""])[0], config.encode.dtype)

    plan = plan_shards([v.key if v.ok else None for v in every], config.encode.clips_per_shard)
    mine = plan[task.rank :: task.world_size]
    total = sum(len(s.rows) for s in mine)
    missing = [s for s in mine if not (folder / s.name).exists()]
    done = total - sum(len(s.rows) for s in missing)
    log.info("%d clips in %d shards of this task (%d in all); %d clips are there", total, len(mine), len(plan), done)
    task.report(done, total, "clip")
    start = time.monotonic()
    readers: Counter[str] = Counter()

    def decoded(video: Video) -> Clip:
        plan = plan_clip(video, config.clip, stride=vae.stride, patch=patch, floor_frames=vae.floor_frames)
        return decode_by(decoder, video.path, plan, gpu)

    rows = [every[row] for shard in missing for row in shard.rows]
    with _ahead(rows, decoded) as clips, ThreadPoolExecutor(1, "write") as writing:
        written: list[Future[Path]] = []  # the shard before, while the VAE is at work on this one
        for shard in missing:
            writer = ShardWriter(folder, shard.name, config.encode.dtype, vae.channels, texts.dims)
            for row in shard.rows:
                if task.stop_requested():
                    for commit in written:
                        commit.result()
                    raise Stopped(
                        f"encode: stopped with {done} of {total} clips written; the shard in work is made again"
                    )
                second = detailed.get(every[row].key, "")
                _encode(every[row], second, next(clips), config.clip.fps, vae, texts, writer)
                task.report(done + len(writer.samples) + len(writer.rejected), total, "clip")
            for commit in written:
                commit.result()
            written = [writing.submit(writer.commit)]
            readers.update(sample["decoder"] for sample in writer.samples)
            done += len(shard.rows)
        for commit in written:
            commit.result()
    if missing:
        by = ", ".join(f"{count} clips decoded by {reader}" for reader, count in sorted(readers.items()))
        log.info("encoded %d shards in %.1f s%s", len(missing), time.monotonic() - start, by and f": {by}")
    if _finish(folder, plan):
        index = read_index(folder, vae.channels, texts.dims)
        _compare(vae, index.mean, index.std)


def _decoder(wish: str) -> str:
    """``"pyav"`` or ``"dali"``. Raises SetupError."""
    if wish == "auto":
        return "dali" if torch.cuda.is_available() and dali.installed() else "pyav"
    if wish == "dali" and not dali.installed():
        raise SetupError(
            "encode.decoder: dali is not installed; pip install 'sorahpc[dali]' (nvidia-dali-cuda120 for CUDA 12), "
            "or use encode.decoder=pyav"
        )
    return wish


@contextmanager
def _ahead(videos: list[Video], decoded: Callable[[Video], Clip]) -> Iterator[Iterator[Future[Clip]]]:
    """The clips of videos, in their order, decoded by threads that are up to AHEAD clips ahead."""

    def results() -> Iterator[Future[Clip]]:
        waiting: deque[Future[Clip]] = deque()
        for video in videos:
            waiting.append(pool.submit(decoded, video))
            if len(waiting) > AHEAD:
                yield waiting.popleft()
        yield from waiting

    pool = ThreadPoolExecutor(AHEAD, "decode")
    try:
        yield results()
    finally:
        pool.shutdown(cancel_futures=True)


def cache_info(
    config: Config, vae: Vae, texts: TextEncoders, patch: tuple[int, int, int], decoder: str = "pyav"
) -> dict[str, Any]:
    """What decides the cache's content, as pinned in cache.json."""
    assert config.vae is not None and config.text is not None
    clip: ClipConfig = config.clip
    return {
        # Other pixels, by a level or so. Without a word for PyAV, as in caches from before there was a choice.
        **({"decoder": decoder} if decoder != "pyav" else {}),
        "vae": {"id": vae.id, "weights_sha256": vae.weights_sha256},
        "vae_dtype": config.vae.dtype,
        **texts.info(),
        **({"clip_projected": config.text.clip.projected} if config.text.clip else {}),
        "text_dtype": config.text.dtype,
        "text_max_tokens": config.text.max_tokens,
        "dtype": config.encode.dtype,
        "channels": vae.channels,
        "stride": list(vae.stride),
        "patch_hw": list(patch[1:]),
        # None, and of the clip what is None, is as good as absent: caches from before there was a choice stay right.
        "patch_t": patch[0] if patch[0] > 1 else None,
        "clip": clip.model_dump(mode="json"),
        "clip_sha256": config_hash(clip.model_dump(mode="json", exclude_none=True)),
        "preprocess": PREPROCESS,
        "tiling": config.vae.tiling.model_dump(mode="json") if config.vae.tiling else None,
    }


def _encode(
    video: Video, detailed: str, clip: Future[Clip], fps: float, vae: Vae, texts: TextEncoders, writer: ShardWriter
) -> None:
    try:
        pixels, decoder = clip.result()
        latent = vae.encode(pixels)
        captions = [clean_caption(text) for text in ([video.caption, detailed] if detailed else [video.caption])]
        first, *second = texts.encode(captions)
        for embeddings in second:
            first |= {DETAILED + name: e for name, e in embeddings.items()}
        writer.add(video.key, latent, first, captions[0], fps, video.path, decoder, *captions[1:])
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


def _compare(vae: Vae, mean: torch.Tensor, std: torch.Tensor) -> None:
    """Hold the latents' statistics (float32 [C]) against those that the VAE's published models normalise by.

    Nothing else would tell of weights of another model, which encode any clip to latents of the right shape. Bounds are
    wide: a small or odd set of clips is no fault.
    """
    if vae.native is None:
        return
    centre, scale = vae.native
    spread = (scale.square().mean(1) + centre.var(1, correction=0)).sqrt()  # over latent frames, where it has each
    mean, std = (mean - centre.mean(1)) / spread, std / spread
    said = f"{vae.id}: latents normalised as its published models do have mean {mean.min():.2f} to {mean.max():.2f} "
    said += f"and std {std.min():.2f} to {std.max():.2f} over channels, expected near 0 and 1"
    if mean.abs().max() > MAX_NATIVE_MEAN or std.min() < 1 / MAX_NATIVE_STD or std.max() > MAX_NATIVE_STD:
        log.warning("%s; unless it is a VAE of your own, its weights or the clips are not what they should be", said)
    else:
        log.info("%s", said)
