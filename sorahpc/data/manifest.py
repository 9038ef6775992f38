"""The manifest: one row a clip, a video or a scene of one; what was found in it, and whether it can be used.

A Parquet file with a schema version in its metadata. Rows keep their places over reruns; rejected clips stay in it with
their reason, so that nothing is left out in silence.

Version 1 knew neither scenes nor measures; it is read as whole videos that were not measured.
"""

from __future__ import annotations

import dataclasses
import io
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, overload

import pyarrow as pa
import pyarrow.parquet as pq

from sorahpc.data.parquet import read_table
from sorahpc.errors import DataError
from sorahpc.runs import atomic_write

MANIFEST = "manifest.parquet"  # its name in the run folder
REJECTED = "rejected.json"  # what encode could not use, in the cache; named here since the cache's module needs torch
_VERSION_KEY, _VERSION, _FIRST_VERSION = b"sorahpc.manifest", b"2", b"1"
_MADE_KEY = b"sorahpc.prepare"
_KEY, _HASH = re.compile(r"[0-9a-f]{16}"), re.compile(r"[0-9a-f]{48}")


@dataclass(frozen=True)
class Video:
    """One row. Of a rejected one only `path`, `status` and `reason` are sure to say something."""

    # 16 hex digits of sha256(file bytes, caption), of a scene also of its start and end; "" if the file can't be read
    key: str
    path: str  # absolute
    caption: str
    frames: int  # frames that the clip presents, counted
    fps: float  # average; 0 for a single picture without duration
    width: int  # as displayed: after rotation, in square pixels
    height: int
    codec: str
    duration_s: float  # from the clip's first presentation time to the end of its last frame
    size_bytes: int  # -1 where there is no file
    mtime_ns: int  # with size_bytes: whether the file is the one that was probed
    status: Literal["ok", "rejected"]
    reason: str  # "" if ok; else `kind` or `kind: detail`
    start_s: float = 0.0  # where the clip begins in the file, from its first frame; 0 for a whole video
    # As measured (sorahpc.data.measures) on small pictures, four a second; None where nothing was.
    luma: float | None = None  # mean brightness, 0 to 255
    black: float | None = None  # share of black pixels: 1 for a black clip, 0.25 for one with bars above and below
    motion: float | None = None  # mean absolute change of luma, of 255 levels, from a picture to that 1/4 s later
    static: float | None = None  # share of these steps in which nothing moves
    hash: str | None = None  # 48 hex digits: perceptual hashes, of 64 bits each, of the middles of its thirds

    @property
    def end_s(self) -> float:
        """Where the clip ends in the file, from its first frame."""
        return self.start_s + self.duration_s

    @property
    def measured(self) -> bool:
        return self.hash is not None

    @property
    def ok(self) -> bool:
        return self.status == "ok"


class NoManifest(DataError):
    """There is no such file."""


_FIRST_TYPES = {
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
_MEASURES = {
    "luma": pa.float64(),
    "black": pa.float64(),
    "motion": pa.float64(),
    "static": pa.float64(),
    "hash": pa.string(),
}
ROWS_AT_ONCE = 1 << 16  # are read: in one piece, a million took 1.2 GB more
_NUMBERS = [name for name in _MEASURES if name != "hash"]
_TYPES = {
    **_FIRST_TYPES,
    "start_s": pa.float64(),
    "end_s": pa.float64(),  # for others who read it: it follows from the start and the duration
    **_MEASURES,
}
_SCHEMA = pa.schema([pa.field(name, kind, nullable=name in _MEASURES) for name, kind in _TYPES.items()])


def shown(path: Path | str) -> str:
    """A path as one printable line, whatever bytes its name has."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "replace").decode() for c in str(path))


def write_manifest(path: Path, videos: Sequence[Video], made: Mapping[str, Any] | None = None) -> None:
    """Write a manifest; the file appears whole or not at all.

    Args:
        made: how prepare made it, for its next run.

    Raises:
        DataError: it can't be written.
    """
    columns = {name: [getattr(v, name) for v in videos] for name in _TYPES}
    told = {_MADE_KEY: json.dumps(made).encode()} if made is not None else {}
    buffer = io.BytesIO()
    table = pa.table(columns, schema=_SCHEMA.with_metadata({_VERSION_KEY: _VERSION, **told}))
    pq.write_table(table, buffer, compression="zstd", row_group_size=ROWS_AT_ONCE)
    try:
        atomic_write(path, buffer.getvalue())
    except OSError as error:
        raise DataError(f"{shown(path)}: can't write the manifest: {error.strerror}") from None


class Rows(Sequence[Video]):
    """The rows of a manifest in the columns that they were read in, each made when it is asked for: a million take half
    a GB so, and more than one and a half as objects."""

    def __init__(self, table: pa.Table) -> None:
        fields = [f.name for f in dataclasses.fields(Video)]
        names = [name for name in fields if name in table.schema.names]
        assert names == fields[: len(names)], names  # rows are made by place: of version 1, only the last are lacking
        self._table = table.select(names)
        self._columns = [self._table.column(name) for name in names]

    def with_keys(self, keys: Sequence[str]) -> Rows:
        """The same rows, with these keys."""
        at = self._table.schema.get_field_index("key")
        return Rows(self._table.set_column(at, "key", pa.array(keys, pa.string())))

    def __len__(self) -> int:
        return int(self._table.num_rows)

    @overload
    def __getitem__(self, i: int) -> Video: ...
    @overload
    def __getitem__(self, i: slice) -> list[Video]: ...
    def __getitem__(self, i: int | slice) -> Video | list[Video]:
        if isinstance(i, slice):
            return [self[k] for k in range(*i.indices(len(self)))]
        return Video(*(column[i].as_py() for column in self._columns))

    def __iter__(self) -> Iterator[Video]:
        for batch in self._table.to_batches(ROWS_AT_ONCE):
            yield from map(Video, *(column.to_pylist() for column in batch.columns))


def open_manifest(path: Path) -> Rows:
    """Read a manifest: its rows, in their order.

    Raises:
        DataError: it is missing, unreadable, of another version, or a column or row is not what it must be.
    """
    rows, _ = _read(path)
    seen: dict[str, int] = {}
    for i, video in enumerate(rows):
        if not video.ok:
            continue
        if video.key in seen:
            raise DataError(
                f"{shown(path)}: row {i}: key {video.key} is also that of row {seen[video.key]}; expected one of each"
            )
        seen[video.key] = i
    return rows


def read_manifest(path: Path) -> list[Video]:
    """As `open_manifest`, the rows as a list."""
    return list(open_manifest(path))


def _fault(video: Video) -> str:
    """What can't be in the row of a usable clip, as another program may have left it."""
    for field in ("frames", "width", "height"):
        if getattr(video, field) < 1:
            return f"{field}: 1 or more expected, found {getattr(video, field)}"
    for field in ("fps", "duration_s", "start_s"):
        if not 0 <= getattr(video, field) < math.inf:
            return f"{field}: a number from 0 expected, found {getattr(video, field)}"
    for field in _NUMBERS if video.measured else ():
        value = getattr(video, field)
        if value is None or not math.isfinite(value):
            return f"{field}: a number expected, as it has a hash, found {value}"
    return ""


def read_rows(path: Path) -> tuple[list[Video], dict[str, Any]]:
    """As `read_manifest`, also of a part of one, in which a clip may come twice; and how prepare made it."""
    rows, made = _read(path)
    return list(rows), made


def _read(path: Path) -> tuple[Rows, dict[str, Any]]:
    name = shown(path)
    try:
        table = read_table(path, name, "delete it and run `sorahpc prepare` again", _TYPES)
    except FileNotFoundError:
        raise NoManifest(f"{name}: no such manifest; run `sorahpc prepare` first") from None
    metadata = table.schema.metadata or {}
    version = metadata.get(_VERSION_KEY)
    if version not in (_VERSION, _FIRST_VERSION):
        found = "none" if version is None else version.decode(errors="replace")
        raise DataError(
            f"{name}: manifest version {_VERSION.decode()} expected, found {found}; "
            "delete it and run `sorahpc prepare` again"
        )
    types = _TYPES if version == _VERSION else _FIRST_TYPES
    for column, kind in types.items():
        if column not in table.schema.names:
            raise DataError(f"{name}: column `{column}` is missing; delete it and run `sorahpc prepare` again")
        if table.schema.field(column).type != kind:
            raise DataError(f"{name}: column `{column}` is {table.schema.field(column).type}, expected {kind}")
        if table.column(column).null_count and column not in _MEASURES:
            raise DataError(
                f"{name}: column `{column}` has {table.column(column).null_count} empty values, expected none"
            )
    rows = Rows(table.select(list(types)))
    for i, video in enumerate(rows):
        if video.status not in ("ok", "rejected"):
            raise DataError(f"{name}: row {i}: status `ok` or `rejected` expected, found {video.status!r}")
        if video.ok and not _KEY.fullmatch(video.key):
            raise DataError(f"{name}: row {i}: key: 16 hex digits expected, found {video.key!r}")
        if video.hash is not None and not _HASH.fullmatch(video.hash):
            raise DataError(f"{name}: row {i}: hash: 48 hex digits expected, found {video.hash!r}")
        if video.ok and (fault := _fault(video)):
            raise DataError(f"{name}: row {i}: {fault}; mend it, or delete it and run `sorahpc prepare` again")
    try:
        made = json.loads(metadata.get(_MADE_KEY, b"{}"))
    except (ValueError, RecursionError):
        made = None
    if not isinstance(made, dict):
        raise DataError(f"{name}: its note of how it was made is not JSON; delete it and run `sorahpc prepare` again")
    return rows, made
