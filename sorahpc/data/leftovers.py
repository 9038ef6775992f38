"""What killed tasks left in the folder of a cache, and which of it nobody needs any more."""

from __future__ import annotations

import contextlib
import os
import re
import socket
import stat
import time
from pathlib import Path

from sorahpc.data.claims import WORK, ShardLease
from sorahpc.lease import STALE_AFTER_S
from sorahpc.runs import read_state

LEFT_AFTER_S = 86400.0
STALE_PART_S = 3600.0


def remove_stale_parts(folder: Path) -> list[str]:
    """Delete `.part` files of writers that are gone: dead on this host, or silent for an hour. Returns their names."""
    removed = []
    for part in sorted(folder.glob(".*.part")):
        host, _, pid = part.name.removesuffix(".part").rpartition(".")
        try:
            found = os.lstat(part)
            stale = time.time() - found.st_mtime > STALE_PART_S
            if not stale and host.endswith(f".{socket.gethostname()}") and pid.isascii() and pid.isdigit():
                stale = not _alive(int(pid))
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


def remove_leftovers(folder: Path) -> list[str]:
    """Delete what killed tasks left in `.work` of shards that are there, but for those that somebody holds. To be
    called when all shards of the plan are there: of others, planned no more, what is a day old goes too.

    Returns:
        the names of what was deleted.
    """
    there, removed = set(os.listdir(folder)), []
    for name in sorted(os.listdir(folder / WORK)) if (folder / WORK).is_dir() else []:
        path = folder / WORK / name
        of = re.match(r"\.*((?:shard|index)-[0-9a-f]{16})\.", name)
        if of is None:
            continue
        lease = ShardLease(folder / WORK / f"{of[1]}.lease", "", "")
        holder = read_state(lease.path)
        with contextlib.suppress(FileNotFoundError):  # others do the same
            # What begins with a dot is on its way to be a lease, of one who hasn't seen that the shard is there.
            # What is of no shard that is there may be of another manifest, whose run will go on with it.
            keep_s = LEFT_AFTER_S if f"{of[1]}.h5" not in there else STALE_AFTER_S if name.startswith(".") else 0.0
            found = os.lstat(path)
            young = keep_s > 0 and time.time() - found.st_mtime < keep_s
            if stat.S_ISREG(found.st_mode) and not young and (holder is None or not lease.blocked_by(holder)):
                path.unlink()
                removed.append(name)
    return removed
