"""Which videos there are, and their captions.

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
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sorahpc.data.decode import VideoError, open_regular
from sorahpc.data.manifest import shown
from sorahpc.errors import DataError
from sorahpc.files import read_text
from sorahpc.runs import Task

log = logging.getLogger(__name__)

# .ts is left out: it is TypeScript more often than MPEG-TS. A file of any name can be listed in the captions file.
VIDEO_SUFFIXES = frozenset(
    ".mp4 .m4v .mov .qt .3gp .3g2 .mkv .webm .avi .mpg .mpeg .m2ts .mts .wmv .asf .flv .f4v .ogv .mxf".split()
)
MAX_CAPTION_CHARS = 10_000
MAX_CAPTION_FILE_BYTES = 1 << 20


@dataclass(frozen=True)
class Source:
    """A video to look at: its caption, or why it has none or can't be used."""

    path: str
    caption: str = ""
    reason: str = ""


def look(root: Path, captions_file: Path | None, task: Task) -> Iterator[Source]:
    """This task's videos of a folder, in the order of paths, then rows of the captions file that name no file.

    Args:
        root: the folder, absolute. captions_file: None: a .txt beside each video.

    Raises:
        DataError: the captions file can't be read.
    """
    captions = _read_captions(captions_file, root) if captions_file else None

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
            yield Source(path.encode(errors="backslashreplace").decode(), reason="file name is not UTF-8: rename it")
            continue
        if captions is None:
            yield _caption_beside(path)
        elif path in left:
            yield left.pop(path)
        else:
            yield Source(path, reason=f"no caption: not in {shown(captions_file or '')}")
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


def _caption_beside(path: str) -> Source:
    text_path = os.path.splitext(path)[0] + ".txt"
    name = os.path.basename(text_path)
    if not os.path.lexists(text_path):
        return Source(path, reason=f"no caption: no {shown(name)} beside it")
    try:
        with open_regular(text_path) as file:
            data = file.read(MAX_CAPTION_FILE_BYTES + 1)
    except VideoError as error:
        return Source(path, reason=f"no caption: {shown(name)}: {error.reason}")
    except OSError as error:
        return Source(path, reason=f"no caption: {shown(name)}: can't read: {error.strerror}")
    if len(data) > MAX_CAPTION_FILE_BYTES:
        return Source(path, reason=f"no caption: {shown(name)} is over {MAX_CAPTION_FILE_BYTES} bytes")
    try:
        return _captioned(path, data.decode("utf-8-sig"))
    except UnicodeDecodeError:
        return Source(path, reason=f"no caption: {shown(name)} is not UTF-8 text")


def _captioned(path: str, text: str) -> Source:
    cleaned = " ".join("".join(" " if unicodedata.category(c) in ("Cc", "Cs") else c for c in text).split())
    if len(cleaned) > MAX_CAPTION_CHARS:
        log.warning("%s: caption of %d characters, cut at %d", shown(path), len(cleaned), MAX_CAPTION_CHARS)
        cleaned = cleaned[:MAX_CAPTION_CHARS].rstrip()
    return Source(path, cleaned) if cleaned else Source(path, reason="no caption: it is empty")


def _read_captions(path: Path, root: Path) -> dict[str, Source]:
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

    entries: dict[str, Source] = {}
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
            entry = Source(full, reason=f"no such name can be: line {line} of {name}")
        elif not full.startswith(os.path.join(root, "")):
            entry = Source(full, reason=f"outside the videos folder: named in line {line} of {name}")
        elif caption is None:
            entry = Source(full, reason=f"no caption: none in line {line} of {name}")
        elif not isinstance(caption, str):
            entry = Source(full, reason=f"no caption: not text in line {line} of {name}")
        else:
            entry = _captioned(full, caption)
        old = entries.get(full)
        if old is not None and old != entry:  # which of them is right, nobody can know; equal rows are harmless
            entry = Source(full, reason=f"two captions: lines {lines[full]} and {line} of {name}")
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
