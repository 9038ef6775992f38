"""prepare: a folder of videos with captions becomes a manifest.

Every clip gets a row, usable or not: a video, or with `prepare.scenes` each of its scenes. A bad file costs its own row
and nothing else. Each video is read through by its packets, then decoded once, small, and measured. What was looked at
is not looked at again: its rows stand as long as the file's size and time of change are the same, and the way scenes
are cut. Filters are applied to the rows, and cost no decoding. Rows keep their places; new ones are appended in the
order of their paths; videos that are gone stay as rejected rows.

An array of independent tasks. Which task a video belongs to follows from its path; each writes what it found as a part
of the manifest into ``<run>/prepare/``, and whoever finds all parts finished writes the manifest from them. It does not
depend on the number of tasks.

Captions come from a .txt of the same name beside each video, or from a JSONL or CSV file with `path` and `caption`.
White space and control characters in a caption become single spaces; it is cut at 10,000 characters.
"""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import hashlib
import io
import json
import logging
import os
import time
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sorahpc.config import Config, PrepareConfig
from sorahpc.data.decode import Probe, VideoError, measure, open_regular, probe
from sorahpc.data.filters import filtered, lifted
from sorahpc.data.keys import digest_of, key_of
from sorahpc.data.manifest import MANIFEST, NoManifest, Video, read_rows, shown, write_manifest
from sorahpc.errors import DataError, SoraHPCError, Stopped
from sorahpc.files import read_text
from sorahpc.runs import Task

log = logging.getLogger(__name__)

# .ts is left out: it is TypeScript more often than MPEG-TS. A file of any name can be listed in the captions file.
VIDEO_SUFFIXES = frozenset(
    ".mp4 .m4v .mov .qt .3gp .3g2 .mkv .webm .avi .mpg .mpeg .m2ts .mts .wmv .asf .flv .f4v .ogv .mxf".split()
)
MAX_CAPTION_CHARS = 10_000
MAX_CAPTION_FILE_BYTES = 1 << 20
MAX_NAMED_IN_LOG = 200
PARTIAL_EVERY_S = 60.0

PARTS = "prepare"  # folder of the parts in the run folder
GONE = "file is gone: not in the videos folder any more"
NOT_CUT_SO = "not a clip: its video is cut otherwise now"
_DUPLICATE = "duplicate: "
_NO_SCENE = "no scene: "
# Reasons that may pass while the file stays as it is. That it crashed the decoder or needs too much memory does not.
_NOT_FINAL = ("can't read", "changed", "unexpected", "took longer", "decoder killed", GONE)


@dataclass(frozen=True)
class _Found:
    """A video to look at: its caption, or why it has none or can't be used."""

    path: str
    caption: str = ""
    reason: str = ""


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
    captions = _read_captions(section.captions, root) if section.captions else None
    found = list(_look(root, captions, section.captions, task))
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
# looking for videos


def _look(root: Path, captions: dict[str, _Found] | None, captions_file: Path | None, task: Task) -> Iterator[_Found]:
    """This task's videos of the folder, in the order of paths, then rows of the captions file that name no file."""

    def mine(path: str) -> bool:
        # By its name, and not by its number: another file that comes meanwhile changes no other's task. By a real hash:
        # crc32 is linear, and sends files that are numbered to one task.
        digest = hashlib.blake2b(path.encode(errors="backslashreplace"), digest_size=8).digest()
        return int.from_bytes(digest, "big") % task.world_size == task.rank

    left = {path: entry for path, entry in (captions or {}).items() if mine(path)}
    for path in filter(mine, _video_files(root, also=set(left))):
        try:
            path.encode()
        except UnicodeEncodeError:
            # Parquet holds UTF-8; the row shows the name with escapes.
            yield _Found(path.encode(errors="backslashreplace").decode(), reason="file name is not UTF-8: rename it")
            continue
        if captions is None:
            yield _caption_beside(path)
        elif path in left:
            yield left.pop(path)
        else:
            yield _Found(path, reason=f"no caption: not in {shown(captions_file or '')}")
    for entry in left.values():
        yield entry if entry.reason else dataclasses.replace(entry, reason="no such file")


def _video_files(root: Path, also: set[str]) -> list[str]:
    """Absolute paths with a video's suffix or in `also`, sorted. Links to folders are followed, each folder once;
    hidden names are left out (that is where writers put what is not finished)."""
    files = []
    visited = set()

    def unreadable(error: OSError) -> None:
        log.warning("can't look into folder %s: %s", shown(error.filename), error.strerror)

    for folder, folders, names in os.walk(root, followlinks=True, onerror=unreadable):
        try:
            status = os.stat(folder)
        except OSError as error:  # deleted since it was listed
            unreadable(error)
            folders.clear()
            continue
        if (status.st_dev, status.st_ino) in visited:
            folders.clear()
            continue
        visited.add((status.st_dev, status.st_ino))
        folders[:] = sorted(f for f in folders if not f.startswith("."))
        for name in names:
            path = os.path.join(folder, name)
            if not name.startswith(".") and (os.path.splitext(name)[1].lower() in VIDEO_SUFFIXES or path in also):
                files.append(path)
    return sorted(files)


# ---------------------------------------------------------------------------------------------------------------------
# captions


def _caption_beside(path: str) -> _Found:
    text_path = os.path.splitext(path)[0] + ".txt"
    name = os.path.basename(text_path)
    if not os.path.lexists(text_path):
        return _Found(path, reason=f"no caption: no {shown(name)} beside it")
    try:
        with open_regular(text_path) as file:
            data = file.read(MAX_CAPTION_FILE_BYTES + 1)
    except VideoError as error:
        return _Found(path, reason=f"no caption: {shown(name)}: {error.reason}")
    except OSError as error:
        return _Found(path, reason=f"no caption: {shown(name)}: can't read: {error.strerror}")
    if len(data) > MAX_CAPTION_FILE_BYTES:
        return _Found(path, reason=f"no caption: {shown(name)} is over {MAX_CAPTION_FILE_BYTES} bytes")
    try:
        return _captioned(path, data.decode("utf-8-sig"))
    except UnicodeDecodeError:
        return _Found(path, reason=f"no caption: {shown(name)} is not UTF-8 text")


def _captioned(path: str, text: str) -> _Found:
    cleaned = " ".join("".join(" " if unicodedata.category(c) in ("Cc", "Cs") else c for c in text).split())
    if len(cleaned) > MAX_CAPTION_CHARS:
        log.warning("%s: caption of %d characters, cut at %d", shown(path), len(cleaned), MAX_CAPTION_CHARS)
        cleaned = cleaned[:MAX_CAPTION_CHARS].rstrip()
    return _Found(path, cleaned) if cleaned else _Found(path, reason="no caption: it is empty")


def _read_captions(path: Path, root: Path) -> dict[str, _Found]:
    """Captions by absolute path of the video. A row that can't be used is an entry with its reason.

    Raises:
        DataError: the file can't be read as JSONL or CSV; names the line.
    """
    name = shown(path)
    kinds = {".jsonl": _jsonl_rows, ".ndjson": _jsonl_rows, ".csv": _csv_rows}
    kind = kinds.get(path.suffix.lower())
    if kind is None:
        raise DataError(f"prepare.captions: {name}: expected a file named .jsonl or .csv, found {path.suffix!r}")
    try:
        text = read_text(path, "utf-8-sig")
    except OSError as error:
        raise DataError(f"prepare.captions: {name}: can't read it: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise DataError(
            f"prepare.captions: {name}: UTF-8 text expected, found byte {error.start} that is not"
        ) from None

    entries: dict[str, _Found] = {}
    lines: dict[str, int] = {}
    for line, row in kind(text, name):
        video, caption = row.get("path"), row.get("caption")
        if not isinstance(video, str) or not video.strip():
            raise DataError(
                f"{name}: line {line}: `path`: the path of a video expected, found {json.dumps(video)[:80]}"
            )
        full = os.path.normpath(os.path.join(root, video))
        if "\0" in full or any(unicodedata.category(c) == "Cs" for c in full):
            full = full.encode(errors="backslashreplace").decode().replace("\0", "\\x00")
            entry = _Found(full, reason=f"no such name can be: line {line} of {name}")
        elif not full.startswith(os.path.join(root, "")):
            entry = _Found(full, reason=f"outside the videos folder: named in line {line} of {name}")
        elif caption is None:
            entry = _Found(full, reason=f"no caption: none in line {line} of {name}")
        elif not isinstance(caption, str):
            entry = _Found(full, reason=f"no caption: not text in line {line} of {name}")
        else:
            entry = _captioned(full, caption)
        old = entries.get(full)
        if old is not None and old != entry:  # which of them is right, nobody can know; equal rows are harmless
            entry = _Found(full, reason=f"two captions: lines {lines[full]} and {line} of {name}")
        entries[full] = entry
        lines.setdefault(full, line)
    return entries


def _jsonl_rows(text: str, name: str) -> Iterator[tuple[int, dict[str, Any]]]:
    # Not splitlines(): JSON strings may hold U+2028 and others that it takes for ends of lines.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{name}: line {number}: not JSON: {str(error).splitlines()[0]}") from None
        if not isinstance(row, dict) or "path" not in row:
            raise DataError(
                f'{name}: line {number}: expected {{"path": ..., "caption": ...}}, found {line.strip()[:80]}'
            )
        yield number, row


def _csv_rows(text: str, name: str) -> Iterator[tuple[int, dict[str, Any]]]:
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        header = reader.fieldnames or []
        missing = [c for c in ("path", "caption") if c not in header]
        if missing:
            raise DataError(
                f"{name}: line 1: columns `path` and `caption` expected, found {', '.join(header) or 'none'}"
            )
        for row in reader:
            if None in row:
                raise DataError(f"{name}: line {reader.line_num}: more values than columns; quote commas")
            yield reader.line_num, row
    except csv.Error as error:
        raise DataError(f"{name}: line {reader.line_num}: not CSV: {error}") from None


# ---------------------------------------------------------------------------------------------------------------------
# probing


def _look_at(found: _Found, old: list[Video], section: PrepareConfig) -> tuple[list[Video], bool]:
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
    if stands and all(v.caption == found.caption for v in old):
        return old, True
    row = Video("", found.path, found.caption, 0, 0.0, 0, 0, "", 0.0, size, mtime, "rejected", found.reason)
    if found.reason:
        return [row], False
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
