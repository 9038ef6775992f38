"""What killed tasks left in the folder of a cache, and which of it nobody needs any more."""

from __future__ import annotations

import contextlib
import math
import os
import re
import stat
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from sorahpc.data.claims import WORK, ShardLease
from sorahpc.lease import STALE_AFTER_S
from sorahpc.runs import place, read_state

LEFT_AFTER_S = 86400.0
STALE_PART_S = 3600.0
_UNFINISHED = re.compile(r"(?P<place>.+)\.(?P<pid>\d+)\.\d+\.(?:part|tmp)", re.ASCII)  # as `aside` names it


def remove_stale_parts(folder: Path) -> list[str]:
    """Delete the unfinished files of writers that are gone: dead on this machine, or silent for an hour.

    Returns:
        the names of what was deleted.
    """
    removed = []
    here = f".{place()}"
    for part in sorted([*folder.glob(".*.part"), *folder.glob(".*.tmp")]):
        of = _UNFINISHED.fullmatch(part.name)
        if of is None:  # nothing that we write
            continue
        try:
            found = os.lstat(part)
            stale = time.time() - found.st_mtime > STALE_PART_S
            if not stale and of["place"].endswith(here):
                stale = not _alive(int(of["pid"]))
            if stale and stat.S_ISREG(found.st_mode):
                part.unlink()
                removed.append(part.name)
        except FileNotFoundError:  # its writer was quicker
            continue
    return removed


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


@dataclass(frozen=True)
class Work:
    """What lies in `.work`, of tasks at work and of dead ones. `left` names what nobody needs; it has `left_bytes`."""

    journals: int
    leases: int
    others: int
    nbytes: int
    left: list[str]
    left_bytes: int


def look_at_work(folder: Path) -> Work:
    """What is there; `left` is what `remove_leftovers` deletes. Raises OSError: the folder can't be read."""
    sizes: dict[str, int] = {}
    for name in os.listdir(folder / WORK) if (folder / WORK).is_dir() else []:
        with contextlib.suppress(FileNotFoundError):  # its task was quicker
            sizes[name] = os.lstat(folder / WORK / name).st_size
    journals, leases = (sum(name.endswith(suffix) for name in sizes) for suffix in (".journal", ".lease"))
    left = [name for name in _leftovers(folder, False) if name in sizes]
    return Work(
        journals=journals,
        leases=leases,
        others=len(sizes) - journals - leases,
        nbytes=sum(sizes.values()),
        left=left,
        left_bytes=sum(sizes[name] for name in left),
    )


def remove_leftovers(folder: Path, complete: bool = False) -> list[str]:
    """Delete what killed tasks left in `.work` of shards that are there, and, where it is a day old, of others; but not
    what is of a shard that somebody holds.

    Args:
        complete: whether all shards of the plan are there. Else journals of others stay: `encode` goes on with them.

    Returns:
        the names of what was deleted.
    """
    removed = []
    for name in _leftovers(folder, complete):
        with contextlib.suppress(FileNotFoundError):  # others do the same
            (folder / WORK / name).unlink()
            removed.append(name)
    return removed


def _leftovers(folder: Path, complete: bool) -> Iterator[str]:
    there = set(os.listdir(folder))
    for name in sorted(os.listdir(folder / WORK)) if (folder / WORK).is_dir() else []:
        of = re.match(r"\.*((?:shard|index)-[0-9a-f]{16})\.", name)
        if of is None:
            continue
        lease = ShardLease(folder / WORK / f"{of[1]}.lease", "", "")
        holder = read_state(lease.path)
        # What begins with a dot is on its way to be a lease, of one who hasn't seen that the shard is there.
        # What is of no shard that is there may be of another manifest, whose run will go on with it.
        late_s = LEFT_AFTER_S if complete or not name.endswith(".journal") else math.inf
        keep_s = late_s if f"{of[1]}.h5" not in there else STALE_AFTER_S if name.startswith(".") else 0.0
        with contextlib.suppress(FileNotFoundError):
            found = os.lstat(folder / WORK / name)
            young = keep_s > 0 and time.time() - found.st_mtime < keep_s
            if stat.S_ISREG(found.st_mode) and not young and (holder is None or not lease.blocked_by(holder)):
                yield name
