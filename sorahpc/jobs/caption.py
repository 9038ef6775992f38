"""caption: manifest -> detailed captions, as the recipe of DALL-E 3 has it: a model writes what the captions leave out.

An array of independent tasks; task k of n has the clips k, k+n, ... of the manifest, of which those that have their
item are done. Whoever finds an item for every clip writes the table `captions.parquet`, which encode reads. The table
depends neither on the number of tasks nor on how often they were killed. (Of an endpoint the answer that came first is
kept.) A clip whose answers are all rejected keeps its own caption, and the table says why.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from sorahpc.config import Config
from sorahpc.data.captions import (
    CAPTIONS,
    ITEMS,
    Item,
    Row,
    caption_settings,
    item_path,
    known_items,
    merge,
    read_captions,
    read_item,
    write_captions,
)
from sorahpc.data.decode import VideoError, may_pass, plan_clip
from sorahpc.data.manifest import MANIFEST, Video, read_manifest, shown
from sorahpc.distributed.mesh import shared_device
from sorahpc.errors import DataError, Stopped
from sorahpc.models.captioner import OF_VIDEO, Question, ask_all, clip_question, load_captioner
from sorahpc.models.vae import read_rule
from sorahpc.runs import Task

log = logging.getLogger(__name__)

MAX_REASONS_SHOWN = 5


def run(config: Config, task: Task) -> None:
    """Caption this task's clips that have no item yet, and write the table if all tasks' are there.

    Raises:
        ConfigError: no section `caption`, or its model can't be used. SetupError: no key, or no answer of the endpoint.
        DataError: no manifest or no usable clip, or not one answer was accepted. Stopped: on request.
    """
    config.need("caption")
    section = config.caption
    assert section is not None
    manifest = config.run_dir / MANIFEST
    videos = [v for v in read_manifest(manifest) if v.ok]
    if not videos:
        raise DataError(f"{shown(manifest)}: no usable video; its column `reason` says why of each")
    captioner = load_captioner(section, shared_device(task.local_rank))
    folder = config.run_dir / ITEMS / "clips"
    span_s = _spans(config)
    questions = [clip_question(config, captioner, video, span_s(video)) for video in videos]
    known = known_items(folder)
    mine = questions[task.rank :: task.world_size]
    away = {row.item for row in _last_table(config) if _of_file(row.reason)} & known
    known -= _forget(folder, [read_item(folder, q.sha256) for q in mine if q.sha256 in away])
    missing = [q for q in mine if q.sha256 not in known]
    done, rejected = len(mine) - len(missing), 0
    log.info("%d clips of this task, %d of them captioned before", len(mine), done)
    task.report(done, len(mine), "clip")

    def kept(item: Item) -> None:
        nonlocal done, rejected
        done += 1
        if not item.caption:
            rejected += 1
            log.warning("clip %s keeps its caption: %s", item.subject, shown(item.reason))
        task.report(done, len(mine), "clip", rejected=rejected)

    try:
        ask_all(section, captioner, missing, folder, task.stop_requested, kept)
    except Stopped:
        raise Stopped(f"caption: stopped with {done} of {len(mine)} clips of this task captioned") from None
    items = _items(folder, questions)
    if items is None:
        return
    rows = merge(items)
    reasons = Counter(row.reason.split(":")[0] for row in rows if not row.caption)
    if not any(row.caption for row in rows):
        _forget(folder, items)
        first = "; ".join(f"{row.key}: {row.reason}" for row in rows[:MAX_REASONS_SHOWN])
        raise DataError(
            f"{shown(folder)}: not one of {len(rows)} captions was accepted: {shown(first)}; the raw answers are in "
            "its files: change the section `caption`"
        )
    write_captions(config.run_dir / CAPTIONS, rows, caption_settings(config))
    log.info(
        "captions complete: %d detailed, %d clips keep their own%s", sum(1 for r in rows if r.caption),
        reasons.total(), f" ({', '.join(f'{n} {kind}' for kind, n in reasons.most_common())})" if reasons else "",
    )  # fmt: skip


def _items(folder: Path, questions: list[Question]) -> list[Item] | None:
    """Those of all clips, or None where other tasks have not asked for some yet, or are about to ask anew."""
    for _ in range(2):
        known = known_items(folder)
        if lacking := sum(q.sha256 not in known for q in questions):
            log.info("%d clips of other tasks are still to be captioned; the last task writes the table", lacking)
            return None
        try:
            return [read_item(folder, q.sha256) for q in questions]
        except DataError as error:  # one that another task forgot since we looked is no fault, and is lacking now
            fault = error
    raise fault


def _last_table(config: Config) -> list[Row]:
    try:
        return read_captions(config.run_dir / CAPTIONS)[0]
    except DataError:  # there is none, or it will be written anew
        return []


def _of_file(reason: str) -> bool:
    """Whether a clip has no caption because its file was not there, or another one: by the next time it may be back."""
    return reason.startswith(OF_VIDEO) and may_pass(reason.removeprefix(OF_VIDEO))


def _forget(folder: Path, items: list[Item]) -> set[str]:
    """Delete those of the items that are so. Returns their hashes."""
    again = {item.sha256 for item in items if _of_file(item.reason)}
    for sha256 in again:
        item_path(folder, sha256).unlink(missing_ok=True)
    return again


def _spans(config: Config) -> Callable[[Video], float]:
    """How long a video's clip will be, in seconds: a caption that tells of more would be trained on with less."""
    most_s = config.clip.max_frames / config.clip.fps
    if config.clip.max_tokens is None or config.vae is None:
        return lambda video: min(video.duration_s, most_s)
    stride, lengths = read_rule(config.vae.path)
    patch = config.model.patch if config.model else (1, 1, 1)

    def span(video: Video) -> float:
        try:
            plan = plan_clip(video, config.clip, stride=stride, patch=patch, lengths=lengths)
        except VideoError:  # encode rejects it, and says so
            return min(video.duration_s, most_s)
        return min(video.duration_s, len(plan.times_s) / config.clip.fps)

    return span
