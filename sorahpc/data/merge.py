"""Joining finished caches into one, whose shards are links to theirs, or copies."""

from __future__ import annotations

import errno
import itertools
import os
import shutil
import socket
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sorahpc.data.cache import (
    INDEX,
    INFO,
    build_index,
    check_info,
    load_index,
    pin_info,
    read_info,
)
from sorahpc.data.latents import LatentCache
from sorahpc.data.manifest import shown
from sorahpc.data.seal import check_seal
from sorahpc.data.shards import EMPTY_TEXT
from sorahpc.errors import ConfigError, DataError
from sorahpc.runs import fsync_dir


def merge(out: Path, sources: Sequence[Path]) -> dict[str, Any]:
    """Join finished caches of the same cache.json into one. Shards are hard-linked, or copied to another file system.

    A shard that two caches share (its name is a hash of its clips) is taken once. Killed, it goes on when run again.

    Returns:
        samples, shards: of the new cache; linked, copied, shared: numbers of shards.

    Raises:
        DataError: a field of cache.json differs; a cache isn't finished; a key is in two different shards; `out` is a
            finished cache already; or the disk is full.
    """
    if len(sources) < 2:
        raise ConfigError(f"cache merge: expected two caches or more, found {len(sources)}")
    if (out / INDEX).exists():
        raise DataError(f"{shown(out)}: holds a finished cache; expected a new folder")
    infos = [read_info(source) for source in sources]
    for (one, expected), (other, found) in itertools.combinations(zip(sources, infos, strict=True), 2):
        check_info(other / INFO, found, expected)
        check_info(one / INFO, expected, found)
    caches = [LatentCache(source) for source in sources]
    owner: dict[str, tuple[str, Path]] = {}
    for source, cache in zip(sources, caches, strict=True):
        for key, k in zip(cache.keys, cache.index.shard_of, strict=True):
            shard = cache.index.shards[k]
            first = owner.setdefault(key, (shard, source))
            if first[0] != shard:
                raise DataError(
                    f"{shown(source / shard)}: sample {key} is also in {shown(first[1] / first[0])}, expected in one "
                    "of the caches; take the clip out of one manifest and encode that one again"
                )
    count: Counter[str] = Counter()
    names: dict[str, None] = {}
    try:
        pin_info(out, {k: v for k, v in infos[0].items() if k != "version"})
        for source in sources:
            for name in load_index(source)[1]["shards"]:
                if name in names:
                    count["shared"] += 1
                else:
                    count[_link_or_copy(source / name, out / name)] += 1
                names[name] = None
        _link_or_copy(sources[0] / EMPTY_TEXT, out / EMPTY_TEXT)
        fsync_dir(out)
        summary = build_index(out, list(names))
    except OSError as error:
        raise DataError(f"{shown(out)}: can't be written: {error.strerror or error}; see to it and run again") from None
    assert summary is not None
    return {"samples": summary.samples, "shards": len(names), **{k: count[k] for k in ("linked", "copied", "shared")}}


def _link_or_copy(source: Path, target: Path) -> str:
    if target.exists():
        if not target.samefile(source):
            check_seal(target)  # of an earlier run of this merge
        return "linked" if target.samefile(source) else "copied"
    try:
        os.link(source, target)
        return "linked"
    except OSError as error:
        # Another file system; one without hard links; a file of somebody else's, or that has links enough.
        if error.errno not in (errno.EXDEV, errno.EPERM, errno.EACCES, errno.EMLINK, errno.ENOTSUP, errno.ENOSYS):
            raise
    aside = target.with_name(f".{target.name}.{socket.gethostname()}.{os.getpid()}.part")
    try:
        with open(source, "rb") as old, open(aside, "wb") as new:
            shutil.copyfileobj(old, new, 1 << 20)
            new.flush()
            os.fsync(new.fileno())
        check_seal(aside)
        os.replace(aside, target)
    finally:
        aside.unlink(missing_ok=True)
    return "copied"
