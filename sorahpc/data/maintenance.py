"""Looking after a latent cache: is every byte of it whole, what is in it, joining several, setting damage aside.

Nothing here changes a shard, nor deletes one, but `retry`, whose journal then has its clips. A damaged one is renamed,
out of the way of `encode`, which then makes it anew.
"""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from sorahpc.data.cache import (
    INDEX,
    INFO,
    SHARD,
    Kinds,
    assemble,
    build_index,
    check_kinds,
    load_index,
    read_index,
    read_info,
)
from sorahpc.data.claims import WORK
from sorahpc.data.decode import may_pass
from sorahpc.data.journal import Journal, cache_sha256, head_of
from sorahpc.data.leftovers import Work, look_at_work, remove_leftovers, remove_stale_parts
from sorahpc.data.manifest import REJECTED, shown
from sorahpc.data.samples import pieces
from sorahpc.data.seal import check_parquet_seal, check_seal, crc32
from sorahpc.data.shards import EMPTY_TEXT, Shard, read_empty_text, read_samples, read_shard
from sorahpc.errors import DataError
from sorahpc.files import open_regular, read_text
from sorahpc.runs import atomic_write, fsync_dir, write_json

SHARDS_AT_ONCE = 4  # each is read as a stream; a file system with latency wants several
Result = TypeVar("Result")


# ---------------------------------------------------------------------------------------------------------------------
# verify


@dataclass(frozen=True)
class Fault:
    file: str  # its name in the cache folder
    key: str  # of the sample that it hits; "" where it hits the file
    what: str  # one line, with what was expected and found
    unread: bool = False  # the system would not read it: that says nothing of its bytes

    def __str__(self) -> str:
        return f"{self.file}: {f'sample {self.key}: ' if self.key else ''}{self.what}"


@dataclass(frozen=True)
class Report:
    """What `verify` has found. `samples` and `shards` are those of the index, or of the folder if it has none."""

    samples: int
    shards: int
    nbytes: int
    unlisted: list[str]  # shards that the index leaves out: no fault
    parts: list[str]  # of writers, at work or killed: no fault
    work: Work  # of tasks, at work or killed: no fault
    faults: list[Fault]

    def to_json(self) -> dict[str, Any]:
        return {"ok": not self.faults, **asdict(self)}


def verify(folder: Path) -> Report:
    """Read all of a cache and hold each file against its own sums and against the others.

    cache.json against the index's copy of it; the index against its seal, its sha256 and what the shards themselves
    give; of each shard the seal over all of its bytes, the structure through HDF5 and the crc32 of each sample; the
    empty caption's text; the list of rejected clips.

    Raises:
        DataError: there is no such folder, or nothing of a cache in it. OSError: it can't be listed.
    """
    if not folder.is_dir():
        raise DataError(f"{shown(folder)}: no such folder; expected that of a latent cache")
    listed = sorted(os.listdir(folder))
    there = [name for name in listed if SHARD.fullmatch(name)]
    if not there and INFO not in listed and INDEX not in listed:
        raise DataError(f"{shown(folder)}: no latent cache here ({INFO} is missing); run `sorahpc encode`")
    faults: list[Fault] = []

    def attempt(file: str, read: Callable[[], Result]) -> Result | None:
        try:
            return read()
        except (DataError, OSError) as error:
            faults.append(_fault(error, folder / file))
            return None

    info = attempt(INFO, lambda: read_info(folder))
    index = attempt(INDEX, lambda: load_index(folder))
    names, rows_of = there, dict[str, list[dict[str, Any]]]()
    if index is not None:
        table, meta = index
        names = list(meta["shards"])
        if meta.get("sealed"):
            attempt(INDEX, lambda: check_parquet_seal(folder / INDEX))
        if info is not None and (folder / INFO).read_bytes() != meta["info"].encode():
            faults.append(Fault(INFO, "", "is not the one that the index was built with; expected the copy in there"))
        info = json.loads(meta["info"])
        for row in table.to_pylist():
            rows_of.setdefault(row["shard"], []).append(row)
    kinds = None if info is None else attempt(INFO, lambda: check_kinds(folder, info))
    shards: dict[str, Shard] = {}
    with ThreadPoolExecutor(SHARDS_AT_ONCE) as pool:
        checked = pool.map(lambda name: _check_shard(folder / name, kinds, rows_of.get(name, [])), names)
        for name, (shard, found) in zip(names, checked, strict=True):
            faults += found
            if shard is not None:
                shards[name] = shard
    if kinds is not None:
        attempt(EMPTY_TEXT, lambda: read_empty_text(folder, kinds[1], kinds[2]))
    if (
        index is not None
        and kinds is not None
        and len(shards) == len(names)
        and not any(f.file == INFO for f in faults)
    ):
        faults += attempt(INDEX, lambda: _against_shards(folder, *index, shards, kinds)) or []
    sizes = [(folder / name).stat().st_size for name in {*names, INFO, INDEX, EMPTY_TEXT} if name in listed]
    return Report(
        samples=sum(len(shard.rows) for shard in shards.values()) if index is None else index[0].num_rows,
        shards=len(names),
        nbytes=sum(sizes),
        unlisted=sorted(set(there) - set(names)),
        parts=[name for name in listed if name.endswith((".part", ".tmp"))],
        work=look_at_work(folder),
        faults=faults,
    )


def _fault(error: Exception, path: Path) -> Fault:
    """Of a whole file, without the path that the error's line begins with."""
    if isinstance(error, OSError):
        return Fault(path.name, "", f"can't be read: {error.strerror}", unread=True)
    return Fault(path.name, "", str(error).replace("\n", "; ").removeprefix(f"{shown(path)}: "))


def _check_shard(path: Path, kinds: Kinds | None, rows: list[dict[str, Any]]) -> tuple[Shard | None, list[Fault]]:
    """Read a shard, all of it. Returns it resolved if nothing is wrong with it, and its faults."""
    faults = []
    shard = None
    try:
        check_seal(path)
    except FileNotFoundError:
        return None, [Fault(path.name, "", "missing; run `sorahpc encode` to make it")]
    except (DataError, OSError) as error:
        faults.append(_fault(error, path))
    if kinds is None:
        return None, faults
    try:
        shard = read_shard(path, *kinds)
    except DataError as error:
        faults.append(_fault(error, path))
    # Where the shard itself is whole its own table counts, and an index that says else is the one at fault.
    believed = rows if shard is None or (faults and rows) else shard.rows
    try:
        with open_regular(path) as file:
            for row in believed:
                faults += _check_sample(file, path.name, row, kinds[1])
    except OSError as error:
        faults.append(_fault(error, path))
    return (None if faults else shard), faults


def _check_sample(file: Any, name: str, row: dict[str, Any], dims: Mapping[str, int]) -> list[Fault]:
    size = os.fstat(file.fileno()).st_size
    faults = []
    for what, offset, nbytes, crc in pieces(row, dims):
        if not 0 <= offset <= offset + nbytes <= size:
            faults.append(Fault(name, row["key"], f"its {what} ends after the file: {nbytes} bytes at {offset}"))
            continue
        file.seek(offset)
        found = crc32(file.read(nbytes))
        if found != crc:
            faults.append(
                Fault(name, row["key"], f"its {what} is damaged: crc32 {crc:08x} expected, found {found:08x}")
            )
    return faults


def _against_shards(
    folder: Path, table: Any, meta: dict[str, Any], shards: dict[str, Shard], kinds: Kinds
) -> list[Fault]:
    """Index and list of rejected clips against whole shards."""
    anew = assemble(folder, shards, kinds[1])
    if table.schema.names != anew.table.schema.names:
        names = (anew.table.schema.names, table.schema.names)
        return [Fault(INDEX, "", f"columns {names[0]} by the shards, found {names[1]}")]
    faults = []
    for row, expected in zip(table.to_pylist(), anew.table.to_pylist(), strict=False):
        wrong = [f"{k} {expected[k]!r} expected, found {row[k]!r}" for k in expected if row[k] != expected[k]]
        if wrong:
            faults.append(Fault(INDEX, row["key"], f"not what its shard says: {', '.join(wrong)}"))
    if table.num_rows != anew.table.num_rows:
        faults.append(Fault(INDEX, "", f"{anew.table.num_rows} samples in its shards, {table.num_rows} in the index"))
    for name in ("mean", "std", "count"):
        if meta[name] != anew.meta[name]:
            faults.append(Fault(INDEX, "", f"statistics: {name} {anew.meta[name]} by the shards, found {meta[name]}"))
    if not faults:
        try:
            read_index(folder, kinds[0], kinds[1])
        except DataError as error:
            faults.append(_fault(error, folder / INDEX))
    try:
        text = read_text(folder / REJECTED)
        rejected = json.loads(text)
    except (OSError, ValueError, RecursionError) as error:
        faults.append(Fault(REJECTED, "", f"can't be read: {getattr(error, 'strerror', None) or 'not JSON'}"))
    else:
        if rejected != anew.rejected or not text.endswith("\n"):  # the end of a line is all that a cut could take
            faults.append(Fault(REJECTED, "", "is not the list that the shards hold"))
    return faults


# ---------------------------------------------------------------------------------------------------------------------
# repair


def repair(folder: Path) -> dict[str, Any]:
    """Set damaged shards aside, put cache.json back from the index, remove what killed writers left, and build the
    index from the shards that are whole.

    Returns:
        before: the report of `verify`; set_aside: {old name: new name}; missing: shards that the index wanted, and the
        empty caption's text; restored: whether cache.json was; removed: what killed tasks left; samples: in the new
        index, None if no shard is whole.

    Raises:
        DataError: as `verify`; a file that the system would not read, which may be whole; cache.json is lost or damaged
        and so is the index's copy; or shards overlap, so that only `encode` knows which of them count.
    """
    before = verify(folder)
    for fault in before.faults:
        if fault.unread:
            raise DataError(f"{shown(folder)}/{fault}; nothing was changed: see to that, and run again")
    bad = {fault.file for fault in before.faults}
    meta = None if INDEX in bad and not _loads(folder) else load_index(folder)[1]
    if restored := INFO in bad:
        if meta is None or not _has_kinds(folder, meta):
            lost = "damaged" if (folder / INFO).exists() else "missing"
            raise DataError(
                f"{shown(folder / INFO)}: {lost}, and {INDEX} has no good copy of it; nothing was changed: put "
                f"{INFO} back from a backup, or encode into another folder"
            )
        if (folder / INFO).exists():
            _rename_aside(folder, INFO)
        atomic_write(folder / INFO, meta["info"])
    names = [name for name in os.listdir(folder) if SHARD.fullmatch(name)] if meta is None else list(meta["shards"])
    names = sorted(names) if meta is None else names
    there = [name for name in names if (folder / name).exists()]
    aside = {
        name: _rename_aside(folder, name) for name in [*there, EMPTY_TEXT] if name in bad and (folder / name).exists()
    }
    whole = [name for name in there if name not in aside]
    summary = build_index(folder, whole) if whole else None
    if summary is not None:
        write_json(folder / REJECTED, summary.rejected)
    removed = remove_stale_parts(folder)
    work = remove_leftovers(folder)
    return {
        "before": before.to_json(),
        "set_aside": aside,
        "missing": [name for name in names if name not in there]
        + ([EMPTY_TEXT] if EMPTY_TEXT in bad and EMPTY_TEXT not in aside else []),
        "restored": restored,
        "removed": removed + [f"{WORK}/{name}" for name in work],
        "samples": None if summary is None else summary.samples,
    }


def _has_kinds(folder: Path, meta: dict[str, Any]) -> bool:
    """Whether the index's copy of cache.json says how to read the bytes."""
    try:
        check_kinds(folder, json.loads(meta["info"]))
    except DataError:
        return False
    return True


def _loads(folder: Path) -> bool:
    try:
        load_index(folder)
    except DataError:
        return False
    return True


def _rename_aside(folder: Path, name: str) -> str:
    """Rename a file to damaged-<name>, or with the first number that is free. Returns the new name."""
    for k in range(1_000_000):
        new = f"damaged-{name}" + (f".{k}" if k else "")
        if not (folder / new).exists():
            os.rename(folder / name, folder / new)
            fsync_dir(folder)
            return new
    raise DataError(f"{shown(folder)}: a million files named damaged-{name}*; remove some")


# ---------------------------------------------------------------------------------------------------------------------
# retry


def retry(folder: Path) -> dict[str, Any]:
    """Have `encode` try again the clips that it could not read in time, in its memory, or at all: each shard with such
    a clip becomes a journal of its others, with which `encode` goes on.

    Returns:
        clips: their sources and reasons; shards: names of those that are to be made anew.

    Raises:
        DataError: no cache here; a shard is missing or damaged; or a journal can't be written.
    """
    info = read_info(folder)
    _, dims, dtype = kinds = check_kinds(folder, info)
    if (folder / INDEX).exists():
        names = list(load_index(folder)[1]["shards"])
    else:
        names = sorted(name for name in os.listdir(folder) if SHARD.fullmatch(name))
    clips: list[dict[str, str]] = []
    anew: list[str] = []
    for name in names:
        if not (folder / name).exists():
            continue  # of an earlier retry, or set aside: `encode` makes it
        shard = read_shard(folder / name, *kinds)
        again = [{"source": r["source"], "reason": r["reason"]} for r in shard.rejected if may_pass(r["reason"])]
        if not again:
            continue
        try:
            check_seal(folder / name)
            _to_journal(folder, name, shard, dims, dtype)
            (folder / name).unlink()
            fsync_dir(folder)
        except OSError as error:
            raise DataError(f"{shown(folder / name)}: {error.strerror or error}; see to it, and run again") from None
        clips += again
        anew.append(name)
    return {"clips": clips, "shards": anew}


def _to_journal(folder: Path, name: str, shard: Shard, dims: Mapping[str, int], dtype: str) -> None:
    """All that a shard has but the clips that are to be tried again."""
    (folder / WORK).mkdir(exist_ok=True)
    path = folder / WORK / f"{name.removesuffix('.h5')}.{uuid.uuid4().hex}.journal"
    journal = Journal(path, head_of(name, cache_sha256(folder)))
    try:
        for sample in read_samples(folder / name, shard, dims, dtype):
            journal.add(sample)
        for clip in shard.rejected:
            if not may_pass(clip["reason"]):
                journal.add(clip)
        journal.sync()
    except BaseException:
        path.unlink()
        raise
    finally:
        journal.close()
    fsync_dir(path.parent)
