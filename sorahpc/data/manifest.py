"""The manifest: one row a video, what was found in it, and whether it can be used.

A Parquet file with a schema version in its metadata. Rows keep their places over reruns; rejected videos stay in it
with their reason, so that nothing is left out in silence.
"""

from __future__ import annotations

import dataclasses
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pyarrow as pa
import pyarrow.parquet as pq

from sorahpc.errors import DataError
from sorahpc.runs import atomic_write

MANIFEST = "manifest.parquet"  # its name in the run folder
REJECTED = "rejected.json"  # what encode could not use, in the cache; named here since the cache's module needs torch
_VERSION_KEY, _VERSION = b"sorahpc.manifest", b"1"
_KEY = re.compile(r"[0-9a-f]{16}")


@dataclass(frozen=True)
class Video:
    """One row. Of a rejected video only `path`, `status` and `reason` are sure to say something."""

    key: str  # 16 hex digits of sha256(file bytes, caption); "" where the file could not be read
    path: str  # absolute
    caption: str
    frames: int  # frames that the file presents, counted
    fps: float  # average; 0 for a single picture without duration
    width: int  # as displayed: after rotation, in square pixels
    height: int
    codec: str
    duration_s: float  # from the first presentation time to the end of the last frame
    size_bytes: int  # -1 where there is no file
    mtime_ns: int  # with size_bytes: whether the file is the one that was probed
    status: Literal["ok", "rejected"]
    reason: str  # "" if ok; else `kind` or `kind: detail`

    @property
    def ok(self) -> bool:
        return self.status == "ok"


_TYPES = {
    "key": pa.string(),
    "path": pa.string(),
    "caption": pa.string(),
    "frames": pa.int64(),
    "fps": pa.float64(),
    "width": pa.int32(),
    "height": pa.int32(),
    "codec": pa.string(),
    "duration_s": pa.float64(),
    "size_bytes": pa.int64(),
    "mtime_ns": pa.int64(),
    "status": pa.string(),
    "reason": pa.string(),
}
_SCHEMA = pa.schema(
    [pa.field(name, kind, nullable=False) for name, kind in _TYPES.items()], metadata={_VERSION_KEY: _VERSION}
)


def shown(path: Path | str) -> str:
    """A path as one printable line, whatever bytes its name has."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "replace").decode() for c in str(path))


def write_manifest(path: Path, videos: Sequence[Video]) -> None:
    """Write a manifest; the file appears whole or not at all.

    Raises:
        DataError: it can't be written.
    """
    columns = {name: [getattr(v, name) for v in videos] for name in _TYPES}
    buffer = io.BytesIO()
    pq.write_table(pa.table(columns, schema=_SCHEMA), buffer, compression="zstd")
    try:
        atomic_write(path, buffer.getvalue())
    except OSError as error:
        raise DataError(f"{shown(path)}: can't write the manifest: {error.strerror}") from None


def read_manifest(path: Path) -> list[Video]:
    """Read a manifest, all rows, in their order.

    Raises:
        DataError: it is missing, unreadable, of another version, or a column or row is not what it must be.
    """
    name = shown(path)
    if not path.exists():
        raise DataError(f"{name}: no such manifest; run `sorahpc prepare` first")
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"{name}: can't read the manifest: {error.strerror}; run `sorahpc prepare` again") from None
    try:
        # One thread: with Arrow's pool 2 of 40 short processes aborted at exit (pyarrow 26.0.1, "terminate called").
        table = pq.ParquetFile(pa.BufferReader(data)).read(use_threads=False)
    except (pa.ArrowException, OSError) as error:  # of bytes in memory, so whatever Arrow calls it, it is the content
        first = str(error).splitlines()[0]
        raise DataError(
            f"{name}: not a whole Parquet file: {first}; delete it and run `sorahpc prepare` again"
        ) from None
    version = (table.schema.metadata or {}).get(_VERSION_KEY)
    if version != _VERSION:
        found = "none" if version is None else version.decode(errors="replace")
        raise DataError(
            f"{name}: manifest version {_VERSION.decode()} expected, found {found}; "
            "delete it and run `sorahpc prepare` again"
        )
    for column, kind in _TYPES.items():
        if column not in table.schema.names:
            raise DataError(f"{name}: column `{column}` is missing; delete it and run `sorahpc prepare` again")
        if table.schema.field(column).type != kind:
            raise DataError(f"{name}: column `{column}` is {table.schema.field(column).type}, expected {kind}")
        if table.column(column).null_count:
            raise DataError(
                f"{name}: column `{column}` has {table.column(column).null_count} empty values, expected none"
            )
    fields = [f.name for f in dataclasses.fields(Video)]
    columns = [table.column(f).to_pylist() for f in fields]
    videos = [Video(*row) for row in zip(*columns, strict=True)]
    seen: dict[str, int] = {}
    for i, video in enumerate(videos):
        if video.status not in ("ok", "rejected"):
            raise DataError(f"{name}: row {i}: status `ok` or `rejected` expected, found {video.status!r}")
        if not video.ok:
            continue
        if not _KEY.fullmatch(video.key):
            raise DataError(f"{name}: row {i}: key: 16 hex digits expected, found {video.key!r}")
        if video.key in seen:
            raise DataError(
                f"{name}: row {i}: key {video.key} is also that of row {seen[video.key]}; expected one of each"
            )
        seen[video.key] = i
    return videos
