"""Encode: manifest -> decoded clips -> VAE latents and text embeddings -> the latent cache.

While the VAE is at work on a clip, the next ones, as many as the task has CPUs and at least two, are decoded and their
captions embedded, and the shard before is written.

An array of independent tasks, as many as one likes and at any time. The rows of the manifest, in their order, are cut
into shards; a task claims a shard that is neither there nor claimed (claims.py), begins with those that its rank has by
turns, and puts each clip into the shard's journal as soon as it is encoded. So a task that dies costs the clip it was
at; another goes on with its shard. Who finds none to claim waits for those who hold the last ones, and goes on for them
if they die. A clip that can't be encoded is kept in its shard's list with the reason, and costs nothing but itself; one
that took too long, needed too much memory or couldn't be read is tried once more before. Whoever finds all shards
present builds the index, one of the launch's tasks while the others wait for it. The cache doesn't depend on the number
of tasks, nor on how often they were killed.
"""

from __future__ import annotations

import functools
import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from sorahpc.config import ClipConfig, Config, config_hash
from sorahpc.data import dali
from sorahpc.data.cache import (
    INFO,
    PlannedShard,
    check_info,
    pin_info,
    plan_shards,
    read_index,
    read_info,
)
from sorahpc.data.captions import with_captions
from sorahpc.data.claims import MAX_POLL_S, MIN_POLL_S, WORK, Claim, Claims
from sorahpc.data.decode import VideoError, decode_by, may_pass_soon, plan_clip
from sorahpc.data.indexing import PlanIndex
from sorahpc.data.journal import Record
from sorahpc.data.keys import check_unchanged
from sorahpc.data.leftovers import remove_leftovers, remove_stale_parts
from sorahpc.data.manifest import MANIFEST, Rows, Video, open_manifest, shown
from sorahpc.data.samples import Sample, clean_caption, rejection
from sorahpc.data.shards import EMPTY_TEXT, ShardWriter, write_empty_text
from sorahpc.data.texts import DETAILED, Texts
from sorahpc.distributed.mesh import shared_device
from sorahpc.errors import DataError, SetupError, Stopped
from sorahpc.models.text import TextEncoders, load_texts
from sorahpc.models.vae import Vae, load_vae
from sorahpc.runs import Task

log = logging.getLogger(__name__)

PREPROCESS = 2  # version of plan_clip and decode: raise it when they give other pixels for the same settings
MAX_SHOWN = 5
AHEAD = 2  # at least so many clips are ready, or being made so, while the VAE is at work on another
RETRY_AFTER_S = 5.0
PATIENCE_S = 1800.0  # with tasks that hold the last shards and encode no clip
MAX_NATIVE_MEAN, MAX_NATIVE_STD = 3.0, 5.0


def run(config: Config, task: Task) -> None:
    """Make shards that are missing, as long as there are any to claim, and the index once all are there.

    Raises:
        ConfigError: sections or model folders missing. DataError: no manifest, captions or usable clip, or the cache
        folder was made with other settings. SetupError: others hold shards and don't get on, or the GPU's memory
        is too small. Stopped: between two clips, on request.
    """
    config.need("vae", "text")
    assert config.vae is not None and config.text is not None
    manifest = config.run_dir / MANIFEST
    rows = open_manifest(manifest)
    every, detailed = with_captions(config, rows)
    if not any(v.ok for v in every):
        raise DataError(f"{shown(manifest)}: no usable video among {len(every)}; its column `reason` says why of each")
    device = shared_device(task.local_rank)
    vae = load_vae(config.vae.path, config.vae.dtype, device, config.vae.tiling)
    texts = load_texts(config.text, device)
    patch = config.model.patch if config.model else (1, 1, 1)
    decoder = _decoder(config.encode.decoder)
    gpu = device.index or 0
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
    one_by_one = threading.Lock()  # the tokenizers take one caller at a time

    def ready(row: int) -> _Ready:
        video, second = every[row], detailed[row]
        cut = plan_clip(video, config.clip, stride=vae.stride, patch=patch, lengths=vae.lengths)
        check_unchanged(rows[row])
        pixels, by = decode_by(decoder, video.path, cut, gpu)
        captions = [clean_caption(text) for text in ([video.caption, second] if second else [video.caption])]
        with one_by_one:
            first, *more = texts.encode(captions)
        for embeddings in more:
            first |= {DETAILED + name: e for name, e in embeddings.items()}
        return _Ready(pixels, by, first, captions)

    def twice(row: int) -> _Ready:
        try:
            return ready(row)
        except VideoError as error:
            if not may_pass_soon(error.reason):
                raise
            log.warning("%s: %s; tried once more in %g s", shown(error.path), error.reason, RETRY_AFTER_S)
        time.sleep(RETRY_AFTER_S)
        if task.stop_requested():  # a second try could last longer than there is left
            raise Stopped("encode: stopped before a clip was tried once more; the next run tries it")
        return ready(row)

    @functools.lru_cache(1)
    def rows_of(shard: PlannedShard) -> dict[str, int]:
        return {every[row].key: row for row in shard.rows}

    def row_of(shard: PlannedShard, record: Record) -> int | None:
        """The row of the shard's clip that a journal's record is of, if it is as it is to be encoded now."""
        key, source = (record["key"], record["source"]) if isinstance(record, dict) else (record.key, record.source)
        row = rows_of(shard).get(key)
        if row is None or source != shown(every[row].path):
            return None
        if isinstance(record, dict):
            return row
        captions = clean_caption(every[row].caption), clean_caption(detailed[row])
        return row if (record.caption, record.detailed) == captions else None

    share = plan[task.rank :: task.world_size] if task.rank < task.world_size else []  # of who joined later: none
    claims = Claims(
        folder,
        # Its own by turns first, so that tasks which start together don't all ask for the same.
        [plan[i] for i in sorted(range(len(plan)), key=lambda i: (i - task.rank) % task.world_size)],
        share,  # so that each clip is reported once
        lambda shard: ShardWriter(folder, shard.name, config.encode.dtype, vae.channels, texts.dims),
        row_of,
        f"{task.launch}:{task.rank}",
        task.restart,
    )
    index = PlanIndex(task, folder, plan, config.encode.clips_per_shard)
    most_ahead = max(AHEAD, config.encode.resources.cpus_per_task)
    with claims:
        _Line(task, claims, index, every, vae, config.clip.fps, twice, most_ahead).run()
        if index.finish(claims):
            for name in remove_leftovers(folder, complete=True):
                log.info("removed %s, which a killed task left", shown(folder / WORK / name))
            found = read_index(folder, vae.channels, texts.dims)
            _compare(vae, found.mean, found.std)


@dataclass(frozen=True)
class _Ready:
    """A clip as the VAE takes it, and all else that its sample has."""

    pixels: np.ndarray  # uint8 [T,H,W,3]
    decoder: str
    texts: Texts
    captions: list[str]


class _Line:
    """The way of the clips: the next ones are made ready while the VAE has one, and the shard before is written.

    Args:
        every: the rows of the manifest. ready: from a row of it to what the VAE takes; so for `most_ahead` at a time.
    """

    def __init__(
        self,
        task: Task,
        claims: Claims,
        index: PlanIndex,
        every: Rows,
        vae: Vae,
        fps: float,
        ready: Callable[[int], _Ready],
        most_ahead: int,
    ) -> None:
        self.task, self.claims, self.index, self.every = task, claims, index, every
        self.vae, self.fps, self.ready, self.most_ahead = vae, fps, ready, most_ahead
        self.total = sum(len(shard.rows) for shard in claims.share)
        self.ahead: deque[tuple[Claim, int, Future[_Ready]]] = deque()
        self.filling: Claim | None = None  # whose clips are next
        self.rows: deque[int] = deque()  # of it, that are not ahead yet
        self.writing: list[Future[Any]] = []  # a shard or a journal
        self.encoded: Counter[str] = Counter()  # by who decoded them
        self.rejected = 0

    def run(self) -> None:
        """Until every shard is there. Raises DataError, Stopped; SetupError: nobody gets any further."""
        start = time.monotonic()
        self.claims.missing()
        log.info("%d of the %d clips that this task reports are there", self._report(), self.total)
        self.decoders, self.writer = ThreadPoolExecutor(self.most_ahead, "decode"), ThreadPoolExecutor(1, "write")
        try:
            self._run()
        finally:
            self.decoders.shutdown(cancel_futures=True)
            self.writer.shutdown()
        if self.encoded or self.rejected:
            by = ", ".join(f"{count} clips decoded by {reader}" for reader, count in sorted(self.encoded.items()))
            more = f", {self.rejected} rejected" if self.rejected else ""
            log.info("encoded %d clips in %.1f s: %s%s", self.encoded.total(), time.monotonic() - start, by, more)

    def _run(self) -> None:
        waiting = _Patience()
        while True:
            if self.task.stop_requested():
                self._settle()
                raise Stopped(f"encode: stopped with {self._report()} of {self.total} clips encoded")
            self._fill()
            if self.ahead:
                waiting = _Patience()
                self._next()
                continue
            self._settle()
            if not self.claims.missing():
                return
            waiting.check(self.claims)
            waiting.rest()

    def _fill(self) -> None:
        """Have clips made ready, and claim a shard where there are no more of the last."""
        while len(self.ahead) <= self.most_ahead:
            if self.rows:
                assert self.filling is not None
                row = self.rows.popleft()
                self.ahead.append((self.filling, row, self.decoders.submit(self.ready, row)))
                continue
            claim = self.filling = self.claims.take()
            if claim is None:
                return
            self.rows.extend(claim.left)
            if not self.rows:
                self._commit(claim)

    def _next(self) -> None:
        """Encode the clip that is first."""
        claim, row, ready = self.ahead.popleft()
        record = _encode(self.every[row], ready, self.fps, self.vae, claim.writer)
        if not claim.held():
            self._lost(claim)
            return
        try:
            claim.keep(row, record)
        except DataError:
            if claim.held():
                raise
            self._lost(claim)  # so its journal is deleted, of which NFS says that it is stale
            return
        if isinstance(record, Sample):
            self.encoded[record.decoder] += 1
        else:
            self.rejected += 1
        self._report()
        if not claim.left:
            self._commit(claim)
        elif all(job.done() for job in self.writing):
            self._settle()
            self.writing.append(self.writer.submit(claim.journal.sync))

    def _commit(self, claim: Claim) -> None:
        self._settle()  # one at a time: a shard is built in memory
        self.index.forget()
        self.writing.append(self.writer.submit(self.claims.commit, claim))

    def _settle(self) -> None:
        """Wait for what is being written. Raises DataError where it can't be."""
        while self.writing:
            self.writing.pop(0).result()

    def _lost(self, first: Claim) -> None:
        """Give up a claim that another took over while this task had no heartbeat, and those that went with it."""
        self._settle()
        for claim in {first, *self.claims.lost()}:
            self.claims.give_back(claim)
            self.ahead = deque(item for item in self.ahead if item[0] is not claim)
            if self.filling is claim:
                self.rows.clear()

    def _report(self) -> int:
        """Returns the clips that are done of those that this task reports."""
        done = min(self.claims.clips(), self.total)
        self.task.report(done, self.total, "clip")
        return done


class _Patience:
    """With those who hold the last shards: as long as any of them gets on. Those of the dead are taken over."""

    def __init__(self) -> None:
        self._seen: object = None
        self._since = time.monotonic()
        self._pause_s = MIN_POLL_S

    def rest(self) -> None:
        time.sleep(self._pause_s)
        self._pause_s = min(1.5 * self._pause_s, MAX_POLL_S)

    def check(self, claims: Claims) -> None:
        """Raises SetupError: none of them has encoded a clip for PATIENCE_S. An end without it would count as done."""
        seen = claims.missing(), claims.signs_of_life()
        if self._seen is None:
            log.info("nothing left to claim; waiting for %s", ", ".join(claims.holders()[:MAX_SHOWN]))
        if seen != self._seen:
            self._seen, self._since = seen, time.monotonic()
        if time.monotonic() - self._since > PATIENCE_S:
            holders = claims.holders()
            raise SetupError(
                f"encode: {len(holders)} shards are missing, and who holds them encoded no clip for "
                f"{PATIENCE_S / 60:g} min: {', '.join(holders[:MAX_SHOWN])}; end them (`sorahpc cancel`, `scancel`), "
                "and run encode again, which goes on from their clips"
            )


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


def cache_info(
    config: Config, vae: Vae, texts: TextEncoders, patch: tuple[int, int, int], decoder: str = "pyav"
) -> dict[str, Any]:
    """What decides the cache's content, as pinned in cache.json."""
    assert config.vae is not None and config.text is not None
    clip: ClipConfig = config.clip
    return {
        # Other pixels, by a level or so. Without a word for PyAV, as in caches from before there was a choice.
        **({"decoder": decoder} if decoder != "pyav" else {}),
        "vae": vae.identity,
        "vae_dtype": config.vae.dtype,
        **texts.info(),
        **({"clip_projected": config.text.clip.projected} if config.text.clip else {}),
        "text_dtype": config.text.dtype,
        "text_max_tokens": config.text.max_tokens,
        "dtype": config.encode.dtype,
        "channels": vae.channels,
        "stride": list(vae.stride),
        "restart_frames": vae.lengths.restart,
        "patch_hw": list(patch[1:]),
        # None, and of the clip what is None, is as good as absent: caches from before there was a choice stay right.
        "patch_t": patch[0] if patch[0] > 1 else None,
        "clip": clip.model_dump(mode="json"),
        "clip_sha256": config_hash(clip.model_dump(mode="json", exclude_none=True)),
        "preprocess": PREPROCESS,
        "tiling": config.vae.tiling.model_dump(mode="json") if config.vae.tiling else None,
    }


def _encode(video: Video, ready: Future[_Ready], fps: float, vae: Vae, writer: ShardWriter) -> Record:
    try:
        clip = ready.result()
        latent = _latent(video, clip.pixels, vae)
        first, *second = clip.captions
        return writer.pack(video.key, latent, clip.texts, first, fps, video.path, clip.decoder, *second)
    except DataError as error:
        reason = error.reason if isinstance(error, VideoError) else str(error)
        log.warning("rejected %s: %s%s", shown(video.path), reason, " (tried twice)" if may_pass_soon(reason) else "")
        return rejection(video.key, video.path, reason)


def _latent(video: Video, pixels: np.ndarray, vae: Vae) -> torch.Tensor:
    try:
        return vae.encode(pixels)
    except torch.OutOfMemoryError as error:  # by these settings: other clips of the size would end so too
        frames, height, width, _ = pixels.shape
        raise SetupError(
            f"vae.tiling: {shown(video.path)}: the VAE lacks GPU memory for {frames} frames of {height}x{width} px "
            f"({str(error).splitlines()[0]}); what was encoded is kept. Take a GPU with more, or begin a cache anew "
            "with vae.tiling, or with less of clip.max_area_px or clip.max_frames"
        ) from None


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
