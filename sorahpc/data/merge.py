"""Joining finished caches into one, whose shards are links to theirs, or copies."""

from __future__ import annotations

import errno
import filecmp
import itertools
import os
import shutil
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
from sorahpc.runs import aside, fsync_dir


def merge(out: Path, sources: Sequence[Path]) -> dict[str, Any]:
    """Join finished caches of the same cache.json into one. Shards are hard-linked, or copied to another file system.

    A shard that two caches share (its name is a hash of its clips) is taken once, of the cache where none of its
    samples is lacking: a clip may have been rejected in another. Killed, it goes on when run again.

    Returns:
        samples, shards: of the new cache; linked, copied, shared: numbers of shards.

    Raises:
        DataError: a field of cache.json differs; a cache isn't finished; a key is in two different shards; each cache
            lacks a sample of a shard that they share; a shard is damaged, or `out` has another of its name; `out` is a
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
    held: dict[str, dict[Path, set[str]]] = {}  # by shard and cache: keys of its samples there
    for source, cache in zip(sources, caches, strict=True):
        for shard in cache.index.shards:
            held.setdefault(shard, {})[source] = set()
        for key, k in zip(cache.keys, cache.index.shard_of, strict=True):
            shard = cache.index.shards[k]
            held[shard][source].add(key)
            first = owner.setdefault(key, (shard, source))
            if first[0] != shard:
                raise DataError(
                    f"{shown(source / shard)}: sample {key} is also in {shown(first[1] / first[0])}, expected in one "
                    "of the caches; take the clip out of one manifest and encode that one again"
                )
    fullest = {shard: max(of, key=lambda source: len(of[source])) for shard, of in held.items()}
    for shard, source in fullest.items():
        for other, keys in held[shard].items():
            if lacking := keys - held[shard][source]:
                raise DataError(
                    f"{shown(source / shard)}: lacks sample {min(lacking)}, which {shown(other / shard)} has, and has "
                    f"others that that one lacks; run `sorahpc cache retry {shown(source)}` and encode it again"
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
                    count[_link_or_copy(fullest[name] / name, out / name)] += 1
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
        if target.samefile(source):
            return "linked"
        if not filecmp.cmp(source, target, shallow=False):  # else it is of an earlier run of this merge
            raise DataError(f"{shown(target)}: is not {shown(source)}; merge into a new folder")
        return "copied"
    try:
        os.link(source, target)
        return "linked"
    except OSError as error:
        # Another file system; one without hard links; a file of somebody else's, or that has links enough.
        if error.errno not in (errno.EXDEV, errno.EPERM, errno.EACCES, errno.EMLINK, errno.ENOTSUP, errno.ENOSYS):
            raise
    part = aside(target, ".part")
    try:
        with open(source, "rb") as old, open(part, "wb") as new:
            shutil.copyfileobj(old, new, 1 << 20)
            new.flush()
            os.fsync(new.fileno())
        try:
            check_seal(part)
        except DataError:
            _check_source(source)
            raise
        os.replace(part, target)
    finally:
        part.unlink(missing_ok=True)
    return "copied"


def _check_source(path: Path) -> None:
    try:
        check_seal(path)
    except DataError as fault:
        raise DataError(f"{fault}; `sorahpc cache repair {shown(path.parent)}`, and encode it again") from None
