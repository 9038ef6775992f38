"""The index of a plan's shards: one of many tasks builds it while the others wait, and a run knows its own again."""

from __future__ import annotations

import hashlib
import logging
import os
import time
from pathlib import Path
from typing import Any

from sorahpc.config import Config
from sorahpc.data.cache import INDEX, PlannedShard, Summary, build_index, load_index
from sorahpc.data.claims import MAX_POLL_S, MIN_POLL_S, Claims
from sorahpc.data.decode import may_pass
from sorahpc.data.latents import LatentCache
from sorahpc.data.manifest import shown
from sorahpc.errors import DataError, Stopped
from sorahpc.files import open_regular
from sorahpc.runs import JobFolder, Task, read_json, write_json

log = logging.getLogger(__name__)

MAX_SHOWN = 5


def open_cache(config: Config) -> LatentCache:
    """The run's cache, whose index is the one that the run's own encode has built: another run's, of another manifest,
    may have taken its place in a folder that both write to, and nothing else would tell of the other clips.

    Raises:
        DataError: no finished cache, or clips of another run in its index.
    """
    cache = LatentCache(config.cache_dir)
    told = read_json(_told(config.run_dir)) or {}
    if told.get("cache") == str(config.cache_dir.resolve()) and isinstance(told.get("shards"), list):
        own, found = set(map(str, told["shards"])), set(cache.index.shards)
        if found - own:
            raise DataError(
                f"{shown(config.cache_dir / INDEX)}: expected the {len(own)} shards of this run's encode, found "
                f"{len(found)}, {len(found - own)} of them of others: another run has encoded into this folder since. "
                "Run `sorahpc encode` of this run again, which builds the index anew, or give each its encode.cache"
            )
        if own - found:  # as `sorahpc cache repair` leaves it, whose loss may be for good
            log.warning(
                "%s: %d of the %d shards of this run's encode are not in it; `sorahpc encode` brings them back",
                shown(config.cache_dir / INDEX), len(own - found), len(own),
            )  # fmt: skip
    return cache


def _told(run_dir: Path) -> Path:
    return JobFolder(run_dir, "encode").path / "index.json"


class PlanIndex:
    """The index of the plan's shards, which one task of a launch builds, as it reads them all.

    jobs/encode/index.json says which index.parquet the tasks of which launch have built, or why they can't. Another
    launch builds it anew: it can't know what became of the shards since. It also says of which shards, in which folder,
    the run's last index is, which outlives what a killed or failed launch leaves: an index there is still that one's,
    or another run's. Where there was none yet, these are the shards that it shall be of.
    """

    def __init__(self, task: Task, folder: Path, plan: list[PlannedShard], clips_per_shard: int) -> None:
        """Raises DataError where the run's shards that are there were cut by another `clips_per_shard`."""
        self.task, self.folder, self.shards = task, folder, [shard.name for shard in plan]
        self.clips_per_shard = clips_per_shard
        digest = hashlib.sha256("\n".join(self.shards).encode()).hexdigest()
        self.name = f"index-{digest[:16]}"
        self.told = _told(task.run_dir)
        last = self._last()
        before = last["clips_per_shard"]
        if before != clips_per_shard and set(map(str, last["shards"])) & set(os.listdir(folder)):
            raise DataError(
                f"{shown(folder)}: encode.clips_per_shard: expected {before}, by which this run's shards there are "
                f"cut, found {clips_per_shard}, by which every clip would be encoded anew; set it back, or give a new "
                "encode.cache"
            )

    def forget(self) -> None:
        """To be called before a shard is put where none was. Raises DataError."""
        told = read_json(self.told)
        if told is None or "launch" in told:
            self._tell(self._last())

    def finish(self, claims: Claims) -> bool:
        """Build it, or wait for another task that does. Returns whether it was this one.

        Raises:
            DataError: it can't be built, by any task, or no clip at all could be encoded. Stopped: on request.
        """
        pause_s = MIN_POLL_S
        while not self._is_built():
            with claims.alone(self.name) as mine:
                if mine and not self._is_built():
                    self._build()
                    return True
            if not mine:
                if pause_s == MIN_POLL_S:
                    log.info("waiting for another task that builds the index")
                if self.task.stop_requested():
                    raise Stopped("encode: all shards are there; stopped while another task builds the index")
                time.sleep(pause_s)
                pause_s = min(1.5 * pause_s, MAX_POLL_S)
        log.info("cache complete: another task has built the index")
        return False

    def _is_built(self) -> bool:
        told = read_json(self.told) or {}
        if (told.get("launch"), told.get("plan")) != (self.task.launch, self.name):
            return False
        if "fault" in told:
            raise DataError(str(told["fault"]))
        return bool(told.get("index") == self._stamp())

    def _stamp(self) -> list[int] | None:
        try:
            with open_regular(self.folder / INDEX) as file:  # opened: of a name NFS may say what was so a minute ago
                found = os.fstat(file.fileno())
        except OSError:
            return None
        return [found.st_size, found.st_mtime_ns]

    def _build(self) -> None:
        told = {"launch": self.task.launch, "plan": self.name}
        if others := self._listed() - set(map(str, self._last()["shards"])) - set(self.shards):
            log.warning(
                "%s: %d shards of another run or of a merge were in it, and are left alone but no longer indexed; that "
                "run's `sorahpc encode`, or the merge anew into another folder, has them again",
                shown(self.folder / INDEX), len(others),
            )  # fmt: skip
        try:
            summary = build_index(self.folder, self.shards)
            self._check(summary)
        except DataError as error:
            # Or each of them would read all shards to find it.
            self._tell({**self._last(), **told, "fault": str(error)})
            raise
        self._tell({**self._planned(), **told, "index": self._stamp()})

    def _listed(self) -> set[str]:
        try:
            return set(load_index(self.folder)[1]["shards"])
        except (DataError, OSError):  # none yet, or a damaged one: nobody could read it
            return set()

    def _planned(self) -> dict[str, Any]:
        return {
            "cache": str(self.folder.resolve()),
            "clips_per_shard": self.clips_per_shard,
            "shards": self.shards,
        }

    def _last(self) -> dict[str, Any]:
        planned, told = self._planned(), read_json(self.told) or {}
        same = told.get("cache") == planned["cache"] and isinstance(told.get("shards"), list)
        return {name: told.get(name, value) for name, value in planned.items()} if same else planned

    def _tell(self, told: dict[str, Any]) -> None:
        try:
            write_json(self.told, told)
        except OSError as error:
            raise self._fault(error) from None

    def _fault(self, error: OSError) -> DataError:
        return DataError(
            f"{shown(self.told)}: can't be written: {error.strerror or error}; the shards are all kept: see to it, and "
            "run again"
        )

    def _check(self, summary: Summary | None) -> None:
        folder = shown(self.folder)
        if summary is None:
            raise DataError(f"{folder}: a shard that was there is gone; run encode again, which makes it")
        if not summary.samples:
            reasons = "; ".join(f"{r['source']}: {r['reason']}" for r in summary.rejected[:MAX_SHOWN])
            raise DataError(f"{folder}: none of {len(summary.rejected)} clips could be encoded: {reasons}")
        log.info(
            "cache complete: %d samples, %d clips rejected (rejected.json)", summary.samples, len(summary.rejected)
        )
        if again := sum(may_pass(clip["reason"]) for clip in summary.rejected):
            log.info(
                "%d of them for want of time or memory, or by the file system: `sorahpc cache retry %s`, then encode, "
                "has these tried again",
                again,
                folder,
            )
        if summary.superseded:
            log.info("%d shards in %s are not of this manifest; left alone, no longer read", summary.superseded, folder)
