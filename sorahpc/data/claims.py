"""Who makes which shard: tasks claim shards of the plan by leases on the shared file system, without a server.

    .work/shard-<16 hex>.lease              who makes it now, with a heartbeat (sorahpc.lease)
    .work/index-<16 hex>.lease              who builds the index of a plan
    .work/shard-<16 hex>.<nonce>.journal    what its makers have encoded so far (journal.py)

A task takes the first shard of its order that is neither there nor held. A lease counts as long as its holder beats,
on another machine or this one, and isn't known to be dead. So a task that hangs or is stopped by a debugger loses its
shard after a minute; when it goes on it finds that out before it adds a clip or commits. Between that look and the
commit it may be put to sleep again, and then a shard is written twice, whole and with the same bytes.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from sorahpc.data.cache import PlannedShard
from sorahpc.data.journal import Journal, Record, cache_sha256, head_of, replay
from sorahpc.data.manifest import shown
from sorahpc.data.samples import Sample
from sorahpc.data.shards import ShardWriter
from sorahpc.errors import DataError
from sorahpc.lease import HEARTBEAT_S, Held, Lease, describe, is_fresh
from sorahpc.runs import read_state

log = logging.getLogger(__name__)

WORK = ".work"
MIN_POLL_S, MAX_POLL_S = 0.5, 10.0  # between two looks at what others hold: all tasks look when the last ones work
_JOURNAL = re.compile(r"(shard-[0-9a-f]{16})\.[0-9a-f]{32}\.journal")


class ShardLease(Lease):
    """Unlike the lease of a run, it is lost by a holder that lives and doesn't beat: here that does no harm."""

    def blocked_by(self, holder: dict[str, Any]) -> bool:
        return super().blocked_by(holder) and is_fresh(holder)


class Claim:
    """A shard that this task makes: its lease, its clips so far, and the journal of them.

    Attributes:
        shard: from the plan. writer: of its clips, once all are known.
        known: by their rows of the manifest, the clips that are encoded or rejected.
    """

    def __init__(self, shard: PlannedShard, lease: Lease, writer: ShardWriter, journal: Journal) -> None:
        self.shard, self.lease, self.writer, self.journal = shard, lease, writer, journal
        self.known: dict[int, Record] = {}

    @property
    def left(self) -> list[int]:
        """Rows of its clips that are not known, in the order of the plan."""
        return [row for row in self.shard.rows if row not in self.known]

    def held(self) -> bool:
        """Whether this task has it still. To be asked before a clip is added and before the shard is written."""
        return self.lease.held()

    def keep(self, row: int, record: Record) -> None:
        """Take a clip, into the journal first. Raises DataError: it can't be written."""
        self.known[row] = self.journal.add(record)

    def write(self) -> None:
        """Write the shard. Raises DataError: it can't be written."""
        records = [self.known[row] for row in self.shard.rows]
        self.writer.samples = [record for record in records if isinstance(record, Sample)]
        self.writer.rejected = [record for record in records if not isinstance(record, Sample)]
        self.writer.commit()


class Claims:
    """The claims of a task, which a thread keeps alive. A context manager: at its end, what is held is given back,
    journals and all, for whoever comes next.

    Args:
        folder: of the cache.
        order: the shards of the plan, as this task shall try them.
        share: those of them whose clips `clips` counts.
        writer: makes the writer of a shard.
        row_of: the row of the manifest whose clip, one of the shard's, a record is of, as it is to be encoded now; None
            where there is none.
        launch, restart: as of `Lease`, but the launch is of this task alone.
    """

    def __init__(
        self,
        folder: Path,
        order: Sequence[PlannedShard],
        share: Sequence[PlannedShard],
        writer: Callable[[PlannedShard], ShardWriter],
        row_of: Callable[[PlannedShard, Record], int | None],
        launch: str,
        restart: int = 0,
    ) -> None:
        self._folder, self._writer, self._row_of, self._launch, self._restart = folder, writer, row_of, launch, restart
        self._missing = {shard.name: shard for shard in order}
        self.share, self._counted = share, (len(order), 0)  # missing shards, and the clips of those that are not
        self._cache_sha256 = cache_sha256(folder)
        self._mine: list[Claim] = []
        self._leases: list[Lease] = []  # that are kept alive
        self._lock = threading.Lock()  # of what is above, and between a heartbeat and the end of its lease
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="claims", daemon=True)

    def __enter__(self) -> Claims:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()
        for claim in list(self._mine):
            self.give_back(claim)

    def missing(self) -> set[str]:
        """Names of the shards of the plan that are not there. Raises DataError: the folder can't be read."""
        # A listing, not a look-up of each name: on NFS a name that was missing a moment ago is remembered as missing.
        there = _names(self._folder)
        with self._lock:
            for name in there:
                self._missing.pop(name, None)
            return set(self._missing)

    def clips(self) -> int:
        """How many clips of the share were in shards when last looked, together with those that this task holds."""
        with self._lock:
            if self._counted[0] != len(self._missing):  # asked for at each of a million clips: not counted each time
                there = sum(len(shard.rows) for shard in self.share if shard.name not in self._missing)
                self._counted = len(self._missing), there
            return self._counted[1] + sum(len(claim.known) for claim in self._mine)

    def take(self) -> Claim | None:
        """Claim a shard, with what is known of its clips; None where others hold all that are missing.

        Raises:
            DataError: lease or journal can't be written, or a journal of the shard can't be read. SetupError: what has
            the lease's name is no file.
        """
        self.missing()
        with self._lock:
            mine = {claim.shard.name for claim in self._mine}
            free = [shard for name, shard in self._missing.items() if name not in mine]
        for shard in free:
            lease = ShardLease(self._lease(shard), shard.name, self._launch, self._restart)
            holder = read_state(lease.path)
            if holder is not None and lease.blocked_by(holder):
                continue
            if not self._acquire(lease):  # another was quicker
                continue
            if shard.name not in self.missing():  # committed, and given back, after we looked
                self._release(lease)
                continue
            return self._resume(shard, lease, holder)
        return None

    @contextlib.contextmanager
    def alone(self, name: str) -> Iterator[bool]:
        """Hold the lease of that name meanwhile, which one task of all has at a time. Gives whether it is this one.

        Raises:
            DataError: it can't be written.
        """
        lease = ShardLease(self._folder / WORK / f"{name}.lease", name, self._launch, self._restart)
        holder = read_state(lease.path)  # looked at often by many, who shall not all write each time
        mine = (holder is None or not lease.blocked_by(holder)) and self._acquire(lease)
        try:
            yield mine
        finally:
            if mine:
                self._release(lease)

    def _acquire(self, lease: Lease) -> bool:
        """Take a lease, and keep it alive from now on. False where another has it."""
        try:
            lease.acquire()
        except Held:
            return False
        except OSError as error:
            raise DataError(
                f"{shown(lease.path)}: can't write the lease: {error.strerror or error}; shards and clips that are "
                "there are kept: see to it, and run again"
            ) from None
        with self._lock:
            self._leases.append(lease)
        return True

    def _release(self, lease: Lease) -> None:
        with self._lock:
            self._leases.remove(lease)
            lease.release()

    def lost(self) -> list[Claim]:
        """What this task believed to hold and doesn't."""
        with self._lock:
            return [claim for claim in self._mine if not claim.held()]

    def commit(self, claim: Claim) -> bool:
        """Write the shard, whose clips are all known. False, and nothing written, where the claim was lost.

        Raises:
            DataError: it can't be written.
        """
        held = claim.held()
        if held:
            try:
                claim.write()
            except DataError:
                if claim.held():
                    raise
                held = False  # taken over meanwhile, and so its journal is deleted, of which NFS says that it is stale
            else:
                with self._lock:
                    self._missing.pop(claim.shard.name, None)
                claim.journal.path.unlink(missing_ok=True)
        self.give_back(claim)
        return held

    def give_back(self, claim: Claim) -> None:
        """Let others have it, with its journal."""
        if not claim.held():
            log.warning("%s: another task took it over, since this one had no heartbeat for a while", claim.shard.name)
        claim.journal.close()
        with self._lock:
            self._mine.remove(claim)
        self._release(claim.lease)

    def signs_of_life(self) -> dict[str, int]:
        """Size of each journal: it grows as its task encodes clips."""
        sizes = {}
        for name in _names(self._folder / WORK):
            with contextlib.suppress(FileNotFoundError):
                if name.endswith(".journal"):
                    sizes[name] = (self._folder / WORK / name).stat().st_size
        return sizes

    def holders(self) -> list[str]:
        """Who holds what is missing: `shard-<16 hex>.h5 by <host> (pid <pid>), alive 3 s ago`."""
        with self._lock:
            found = {name: read_state(self._lease(shard)) for name, shard in self._missing.items()}
        return [f"{name} by {describe(holder) if holder else 'an unreadable lease'}" for name, holder in found.items()]

    def _lease(self, shard: PlannedShard) -> Path:
        return self._folder / WORK / f"{shard.name.removesuffix('.h5')}.lease"

    def _resume(self, shard: PlannedShard, lease: Lease, holder: dict[str, Any] | None) -> Claim:
        """Open the journal, and copy into it what is whole in those of former holders."""
        stem, work = shard.name.removesuffix(".h5"), self._folder / WORK
        head = head_of(shard.name, self._cache_sha256)
        try:
            old = sorted(work / name for name in _names(work) if (of := _JOURNAL.fullmatch(name)) and of[1] == stem)
            journal = Journal(work / f"{stem}.{lease.nonce}.journal", head)
        except DataError:
            self._release(lease)
            raise
        writer = self._writer(shard)
        claim = Claim(shard, lease, writer, journal)
        with self._lock:
            self._mine.append(claim)
        for path in old:
            try:
                for record in replay(path, head, writer.dtype, writer.channels, writer.dims):
                    row = self._row_of(shard, record)  # none where its caption or path has changed
                    if row is not None and row not in claim.known:
                        claim.keep(row, record)
            except FileNotFoundError:  # another took this shard over from us, already
                continue
            except OSError as error:
                raise DataError(
                    f"{shown(path)}: can't read the journal: {error.strerror or error}; see to it, or remove it, which "
                    "costs the clips in it, and run again"
                ) from None
        if old:
            journal.sync()
            for path in old:
                path.unlink(missing_ok=True)
            by = f", begun by {describe(holder)}" if holder else ""
            log.info("%s%s: %d of its %d clips are encoded", shard.name, by, len(claim.known), len(shard.rows))
        return claim

    def _beat(self) -> None:
        while not self._end.wait(HEARTBEAT_S):
            with self._lock:
                leases = list(self._leases)
            for lease in leases:
                with self._lock:
                    if lease not in self._leases:
                        continue
                    try:
                        lease.beat()  # one that was lost is seen where it matters
                    except OSError as error:  # the job will meet that too, and end with it
                        log.warning("heartbeat of %s not written: %s", lease.what, error)


def _names(folder: Path) -> list[str]:
    try:
        return os.listdir(folder)
    except OSError as error:
        raise DataError(
            f"{shown(folder)}: can't look into the cache: {error.strerror or error}; see to it, and run again"
        ) from None
