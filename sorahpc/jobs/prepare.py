"""prepare: a folder of videos with captions becomes a manifest.

Every video gets a row, usable or not. A bad file costs its own row and nothing else. What was probed is not probed
again: a row stands as long as the file's size and time of change, and its caption, are the same. Rows keep their
places; new videos are appended in the order of their paths; videos that are gone stay as rejected rows.

Captions come from a .txt of the same name beside each video, or from a JSONL or CSV file with `path` and `caption`.
White space and control characters in a caption become single spaces; it is cut at 10,000 characters.
"""

from __future__ import annotations

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
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sorahpc.config import Config
from sorahpc.data.decode import VideoError, open_regular, probe
from sorahpc.data.manifest import MANIFEST, Video, read_manifest, shown, write_manifest
from sorahpc.errors import DataError, SoraHPCError, Stopped
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

GONE = "file is gone: not in the videos folder any more"
_DUPLICATE = "duplicate: "
# Reasons that may pass while the file stays as it is. That it crashed the decoder or needs too much memory does not.
_NOT_FINAL = ("can't read", "changed", "unexpected", "took longer", "decoder killed", GONE)


@dataclass(frozen=True)
class _Found:
    """A video to look at: its caption, or why it has none or can't be used."""

    path: str
    caption: str = ""
    reason: str = ""


def run(config: Config, task: Task) -> None:
    """Write ``<run>/manifest.parquet`` from ``prepare.videos``. Run again, it looks only at what is new or changed.

    Raises:
        ConfigError: the section `prepare` is missing.
        DataError: no folder of videos, a captions file that can't be read, or not one usable video.
        Stopped: asked to; what was probed so far is kept for the next run.
    """
    config.need("prepare")
    section = config.prepare
    assert section is not None
    root = Path(os.path.abspath(section.videos))
    if not root.is_dir():
        raise DataError(f"prepare.videos: {shown(root)}: no such folder; expected a folder of video files")
    captions = _read_captions(section.captions, root) if section.captions else None
    found = list(_look(root, captions, section.captions))

    manifest, partial = config.run_dir / MANIFEST, config.run_dir / f"partial-{MANIFEST}"
    rows = {v.path: v for v in read_manifest(manifest)} if manifest.exists() else {}
    rows.update({v.path: v for v in read_manifest(partial)} if partial.exists() else {})  # of a run that was stopped
    present = {f.path for f in found}
    for path, row in rows.items():
        if path not in present:
            rows[path] = dataclasses.replace(row, status="rejected", reason=GONE)

    kept = num_rejected = 0
    saved = time.monotonic()
    with ThreadPoolExecutor(
        section.resources.cpus_per_task
    ) as pool:  # hashing releases the GIL; each has a decoder of its own
        done = pool.map(lambda f: _look_at(f, rows.get(f.path)), found)
        try:
            for i, (row, was_kept) in enumerate(done):
                rows[row.path] = row
                kept += was_kept
                num_rejected += not row.ok
                task.report(i + 1, len(found), "video", rejected=num_rejected)
                if task.stop_requested():
                    write_manifest(partial, list(rows.values()))
                    raise Stopped(f"prepare: stopped after {i + 1} of {len(found)} videos; run again to go on")
                if time.monotonic() - saved > PARTIAL_EVERY_S:
                    write_manifest(partial, list(rows.values()))
                    saved = time.monotonic()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise

    videos = _one_of_each(list(rows.values()))
    _tell(videos, root, kept)
    num_rejected = sum(not v.ok for v in videos)  # with duplicates, and videos that are gone
    task.report(len(found), len(found), "video", rejected=num_rejected)
    if not any(v.ok for v in videos):
        raise DataError(_nothing_usable(videos, root))
    write_manifest(manifest, videos)
    partial.unlink(missing_ok=True)


# ---------------------------------------------------------------------------------------------------------------------
# looking for videos


def _look(root: Path, captions: dict[str, _Found] | None, captions_file: Path | None) -> Iterator[_Found]:
    """Every video of the folder, in the order of paths, then rows of the captions file that name no file in it."""
    left = dict(captions or {})
    for path in _video_files(root, also=set(left)):
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
        status = os.stat(folder)
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
        text = path.read_text(encoding="utf-8-sig")
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


def _look_at(found: _Found, old: Video | None) -> tuple[Video, bool]:
    """The row of a video, and whether the old one was kept."""
    size = mtime = -1
    try:
        status = os.stat(found.path)
        size, mtime = status.st_size, status.st_mtime_ns
    except (OSError, ValueError):
        pass  # gone, dangling, no permission, no such name: opening it below says which
    # A row without a caption was never probed, so equal captions mean that this file was, with this one.
    if old is not None and (old.size_bytes, old.mtime_ns, old.caption) == (size, mtime, found.caption) and size >= 0:
        if old.reason.startswith(_DUPLICATE):
            return dataclasses.replace(old, status="ok", reason=""), True  # the first of them may be gone by now
        if old.ok or not old.reason.startswith(_NOT_FINAL):
            return old, True
    row = Video("", found.path, found.caption, 0, 0.0, 0, 0, "", 0.0, size, mtime, "rejected", found.reason)
    if found.reason:
        return row, False
    try:
        key = _key(found.path, found.caption)
        row = dataclasses.replace(row, key=key)
        video = probe(found.path)
        after = os.stat(found.path)
    except VideoError as error:
        return dataclasses.replace(row, reason=error.reason), False
    except OSError as error:
        return dataclasses.replace(row, reason=f"can't read: {error.strerror}"), False
    except SoraHPCError:
        raise  # no decoder on this machine: no fault of the file
    except Exception as error:  # a hole in our handling of broken files; it must not cost the other videos
        log.exception("%s: unexpected while probing", shown(found.path))
        return dataclasses.replace(row, reason=f"unexpected: {type(error).__name__}: {error}"), False
    if (after.st_size, after.st_mtime_ns) != (size, mtime):
        return dataclasses.replace(row, reason="changed while it was read: run again"), False
    return dataclasses.replace(row, **dataclasses.asdict(video), status="ok"), False


def _key(path: str, caption: str) -> str:
    digest = hashlib.sha256()
    with open_regular(path) as file:
        while block := file.read(1 << 20):
            digest.update(block)
    digest.update(caption.encode())
    return digest.hexdigest()[:16]


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


def _tell(videos: list[Video], root: Path, kept: int) -> None:
    rejected = [v for v in videos if not v.ok]
    for video in rejected[:MAX_NAMED_IN_LOG]:
        log.warning("rejected %s: %s", shown(os.path.relpath(video.path, root)), shown(video.reason))
    if len(rejected) > MAX_NAMED_IN_LOG:
        log.warning("... and %d more; the manifest names each with its reason", len(rejected) - MAX_NAMED_IN_LOG)
    log.info(
        "prepare: %d ok, %d rejected%s; %d unchanged since the last run",
        len(videos) - len(rejected),
        len(rejected),
        f" ({_by_kind(rejected)})" if rejected else "",
        kept,
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
