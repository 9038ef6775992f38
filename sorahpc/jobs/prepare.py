"""prepare: a folder of videos with captions becomes a manifest.

Every clip gets a row, usable or not: a video, or with `prepare.scenes` each of its scenes. A bad file costs its own row
and nothing else. Each video is read through by its packets, then decoded once, small, and measured. What was looked at
is not looked at again: its rows stand as long as the file's size and time of change are the same, and the way scenes
are cut. Filters are applied to the rows, and cost no decoding. Rows keep their places; new ones are appended in the
order of their paths; videos that are gone stay as rejected rows.

An array of independent tasks. Which task a video belongs to follows from its path; each writes what it found as a part
of the manifest into ``<run>/prepare/``, and whoever finds all parts finished writes the manifest from them. It does not
depend on the number of tasks.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import logging
import os
import time
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from sorahpc.config import Config, PrepareConfig
from sorahpc.data.decode import Probe, VideoError, measure, probe
from sorahpc.data.filters import filtered, lifted
from sorahpc.data.keys import digest_of, key_of
from sorahpc.data.manifest import MANIFEST, NoManifest, Video, read_rows, shown, write_manifest
from sorahpc.data.sources import VIDEO_SUFFIXES, Source, look
from sorahpc.errors import DataError, SoraHPCError, Stopped
from sorahpc.runs import Task

log = logging.getLogger(__name__)

MAX_NAMED_IN_LOG = 200
PARTIAL_EVERY_S = 60.0

PARTS = "prepare"  # folder of the parts in the run folder
GONE = "file is gone: not in the videos folder any more"
NOT_CUT_SO = "not a clip: its video is cut otherwise now"
_DUPLICATE = "duplicate: "
_NO_SCENE = "no scene: "
# Reasons that may pass while the file stays as it is. That it crashed the decoder or needs too much memory does not.
_NOT_FINAL = ("can't read", "changed", "unexpected", "took longer", "decoder killed", GONE)


def run(config: Config, task: Task) -> None:
    """Look at this task's videos, and write ``<run>/manifest.parquet`` if all tasks' parts are there. Run again, it
    looks only at what is new or changed.

    Raises:
        ConfigError: the section `prepare` is missing.
        DataError: no folder of videos, a captions file that can't be read, or not one usable video.
        Stopped: asked to; what was found so far is kept for the next run.
    """
    config.need("prepare")
    section = config.prepare
    assert section is not None
    root = Path(os.path.abspath(section.videos))
    if not root.is_dir():
        raise DataError(f"prepare.videos: {shown(root)}: no such folder; expected a folder of video files")
    found = list(look(root, section.captions, task))
    cut_by = section.scenes.model_dump(mode="json") if section.scenes else None
    manifest, folder = config.run_dir / MANIFEST, config.run_dir / PARTS
    known = _known(manifest, folder, cut_by)
    part = folder / _part_name(task)
    rows = {f.path: known[f.path] for f in found if f.path in known}  # of earlier runs, until it is looked at again

    def write_part(finished: bool) -> None:
        made = {"scenes": cut_by, "finished": finished}
        write_manifest(part, [row for path in sorted(rows) for row in rows[path]], made)

    write_part(False)
    task.report(0, len(found), "video")
    kept = 0
    saved = time.monotonic()
    # Hashing releases the GIL; each has a decoder of its own.
    with ThreadPoolExecutor(section.resources.cpus_per_task) as pool:
        done = pool.map(lambda f: _look_at(f, known.get(f.path, []), section), found)
        try:
            num_rejected = 0
            for i, (looked_at, was_kept) in enumerate(done):
                rows[found[i].path] = looked_at
                kept += was_kept
                num_rejected += sum(not row.ok for row in looked_at)
                task.report(i + 1, len(found), "video", rejected=num_rejected)
                if task.stop_requested():
                    write_part(False)
                    raise Stopped(f"prepare: stopped after {i + 1} of {len(found)} videos; run again to go on")
                if time.monotonic() - saved > PARTIAL_EVERY_S:
                    write_part(False)
                    saved = time.monotonic()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    write_part(True)
    log.info("%d videos of this task, %d of them unchanged since the last run", len(found), kept)
    parts = _all_parts(folder, task.world_size, cut_by)
    if parts is None:
        log.info("other tasks still have videos to look at; the last task writes the manifest")
        return
    old = _read(manifest)
    videos = filtered(_one_of_each(_in_place(old[0] if old else [], parts)), section.filters)
    _tell(videos, root)
    # With duplicates, filtered clips, and videos that are gone.
    task.report(len(found), len(found), "video", rejected=sum(not v.ok for v in videos))
    if not any(v.ok for v in videos):
        raise DataError(_nothing_usable(videos, root))
    write_manifest(manifest, videos, {"scenes": cut_by})
    for stale in set(folder.glob("*.parquet")) - {folder / _part_name(task, k) for k in range(task.world_size)}:
        stale.unlink(missing_ok=True)  # of a run with another number of tasks


# ---------------------------------------------------------------------------------------------------------------------
# parts


def _part_name(task: Task, rank: int | None = None) -> str:
    return f"{task.rank if rank is None else rank:05d}-of-{task.world_size:05d}.parquet"


def _read(path: Path) -> tuple[list[Video], dict[str, Any]] | None:
    """As `read_rows`; None where there is none, or no more: another task may have deleted it since it was listed."""
    try:
        return read_rows(path)
    except NoManifest:
        return None


def _by_path(videos: Iterable[Video]) -> dict[str, list[Video]]:
    rows: dict[str, list[Video]] = {}
    for video in videos:
        rows.setdefault(video.path, []).append(video)
    return rows


def _known(manifest: Path, folder: Path, cut_by: dict[str, Any] | None) -> dict[str, list[Video]]:
    """What earlier runs, finished or not, found in each file, as it was before filters. Of videos that were cut in
    another way only what was wrong with the file."""
    known: dict[str, list[Video]] = {}
    # Parts first: a task that deletes them has written the manifest from them, so that one of both is found.
    parts = []
    for path in folder.glob("*.parquet"):
        with contextlib.suppress(FileNotFoundError, NoManifest):
            parts.append((path.stat().st_mtime_ns, read_rows(path)))
    parts.sort(key=lambda part: part[0])
    old = _read(manifest)
    # Parts are newer than the manifest, or as old. The oldest first: of a file the last word counts.
    for videos, made in [*([old] if old else []), *(part for _, part in parts)]:
        for name, rows in _by_path(videos).items():
            rows = [lifted(row) for row in rows if row.reason not in (GONE, NOT_CUT_SO)]
            of_the_file = all(row.frames == 0 and not row.reason.startswith(_NO_SCENE) for row in rows)
            if rows and (made.get("scenes") == cut_by or of_the_file):
                known[name] = rows
    return known


def _all_parts(folder: Path, count: int, cut_by: dict[str, Any] | None) -> dict[str, list[Video]] | None:
    """The clips of each file, as all tasks found them; None if one of them has not finished, or not begun yet and its
    part is of an earlier run that cut scenes otherwise."""
    # A listing, not a look-up of each name: on NFS a name that was missing a moment ago is remembered as missing.
    there = {name for name in os.listdir(folder) if name.endswith(f"-of-{count:05d}.parquet")}
    if len(there) < count:
        return None
    rows: dict[str, list[Video]] = {}
    for name in sorted(there):
        part = _read(folder / name)
        if part is None or not part[1].get("finished") or part[1].get("scenes") != cut_by:
            return None
        rows.update(_by_path(part[0]))
    return rows


def _in_place(old: list[Video], found: dict[str, list[Video]]) -> list[Video]:
    """The rows of a manifest with what was found now in their places, then what is new by path."""
    seen: Counter[str] = Counter()
    out = []
    for row in old:
        clips, number = found.get(row.path), seen[row.path]
        seen[row.path] += 1
        if clips is None:
            out.append(dataclasses.replace(row, status="rejected", reason=GONE))
        elif number < len(clips):
            out.append(clips[number])
        else:
            out.append(dataclasses.replace(row, status="rejected", reason=NOT_CUT_SO))
    for path in sorted(found):
        out += found[path][seen[path] :]
    return out


# ---------------------------------------------------------------------------------------------------------------------
# probing


def _look_at(found: Source, old: list[Video], section: PrepareConfig) -> tuple[list[Video], bool]:
    """The rows of a video, and whether the old ones were kept."""
    size = mtime = -1
    try:
        status = os.stat(found.path)
        size, mtime = status.st_size, status.st_mtime_ns
    except (OSError, ValueError):
        pass  # gone, dangling, no permission, no such name: opening it below says which
    old = [_single(row) for row in old]
    # A row without a caption was never looked at, so with an equal one this file was.
    same = size >= 0 and bool(old) and all((v.size_bytes, v.mtime_ns) == (size, mtime) for v in old)
    stands = same and all(
        v.measured or not section.measure if v.ok else not v.reason.startswith(_NOT_FINAL) for v in old
    )
    row = Video("", found.path, found.caption, 0, 0.0, 0, 0, "", 0.0, size, mtime, "rejected", found.reason)
    if found.reason:  # as it is now: without a caption too a row may have another one since
        return [row], old == [row]
    if stands and all(v.caption == found.caption for v in old):
        return old, True
    try:
        digest = digest_of(found.path)
        row = dataclasses.replace(row, key=key_of(digest, found.caption))
        if stands and all(v.ok for v in old):  # another caption, for the same pictures
            return [_with_caption(v, digest, found.caption) for v in old], False
        video = probe(found.path)
        clips = _clips(row, digest, video, section)
        after = os.stat(found.path)
    except VideoError as error:
        return [dataclasses.replace(row, reason=error.reason)], False
    except OSError as error:
        return [dataclasses.replace(row, reason=f"can't read: {error.strerror}")], False
    except SoraHPCError:
        raise  # no decoder on this machine: no fault of the file
    except Exception as error:  # a hole in our handling of broken files; it must not cost the other videos
        log.exception("%s: unexpected while looking at it", shown(found.path))
        return [dataclasses.replace(row, reason=f"unexpected: {type(error).__name__}: {error}")], False
    if (after.st_size, after.st_mtime_ns) != (size, mtime):
        return [dataclasses.replace(row, reason="changed while it was read: run again")], False
    return clips, False


def _single(video: Video) -> Video:
    """A row as it was before duplicates were looked for: the first of them may be gone by now."""
    return dataclasses.replace(video, status="ok", reason="") if video.reason.startswith(_DUPLICATE) else video


def _with_caption(video: Video, digest: hashlib._Hash, caption: str) -> Video:
    whole = video.key == key_of(digest, video.caption)
    key = key_of(digest, caption) if whole else key_of(digest, caption, video.start_s, video.end_s)
    return dataclasses.replace(video, key=key, caption=caption)


def _clips(row: Video, digest: hashlib._Hash, video: Probe, section: PrepareConfig) -> list[Video]:
    """The clips of a file that can be read, measured if that is wished. Raises VideoError."""
    row = dataclasses.replace(row, **dataclasses.asdict(video), status="ok")
    if not section.measure:
        return [row]
    found = measure(row.path, video, section.scenes)
    if found.too_short:
        assert section.scenes is not None
        told = (
            f"{found.too_short} scene{'s' * (found.too_short > 1)} under prepare.scenes.min_s={section.scenes.min_s:g}"
        )
        log.info("%s: %d clips; left out: %s", shown(row.path), len(found.clips), told)
        if not len(found.clips):
            raise VideoError(row.path, f"{_NO_SCENE}{told}, and no other")
    clips = []
    for clip in found.clips:
        frames, start_s, end_s = int(clip["frames"]), float(clip["start_s"]), float(clip["end_s"])
        measures: dict[str, Any] = {name: float(clip[name]) for name in ("luma", "black", "motion", "static")}
        scene = dataclasses.replace(row, **measures, hash="".join(f"{int(h):016x}" for h in clip["hash"]))
        if frames != found.frames:  # else it is the whole video, of which probing knows more
            duration_s = end_s - start_s
            fps = frames / duration_s if duration_s > 0 else 0.0
            key = key_of(digest, row.caption, start_s, end_s)
            scene = dataclasses.replace(scene, key=key, frames=frames, fps=fps, duration_s=duration_s, start_s=start_s)
        clips.append(scene)
    return clips


def _one_of_each(videos: list[Video]) -> list[Video]:
    """Of videos with equal bytes and captions the first is used: the key is what the cache knows a sample by."""
    first: dict[str, str] = {}
    out = []
    for video in videos:
        if video.ok and first.setdefault(video.key, video.path) != video.path:
            reason = f"{_DUPLICATE}same bytes and caption as {first[video.key]}"
            video = dataclasses.replace(video, status="rejected", reason=reason)
        out.append(video)
    return out


# ---------------------------------------------------------------------------------------------------------------------
# telling


def _tell(videos: list[Video], root: Path) -> None:
    rejected = [v for v in videos if not v.ok]
    for video in rejected[:MAX_NAMED_IN_LOG]:
        log.warning("rejected %s: %s", shown(os.path.relpath(video.path, root)), shown(video.reason))
    if len(rejected) > MAX_NAMED_IN_LOG:
        log.warning("... and %d more; the manifest names each with its reason", len(rejected) - MAX_NAMED_IN_LOG)
    log.info(
        "prepare: %d ok, %d rejected%s",
        len(videos) - len(rejected),
        len(rejected),
        f" ({_by_kind(rejected)})" if rejected else "",
    )


def _by_kind(rejected: list[Video]) -> str:
    kinds = Counter(v.reason.split(":")[0] for v in rejected)
    return ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())


def _nothing_usable(videos: list[Video], root: Path) -> str:
    if not videos:
        known = " ".join(sorted(VIDEO_SUFFIXES))
        return f"prepare.videos: {shown(root)}: no video found; expected files named {known}"
    first = next(v for v in videos if not v.ok)
    return (
        f"prepare.videos: {shown(root)}: none of {len(videos)} videos can be used ({_by_kind(videos)}); "
        f"the first: {shown(os.path.relpath(first.path, root))}: {shown(first.reason)}"
    )
