"""Exactly one writer holds a task: a small file that says who, with a heartbeat.

A lease is taken by linking a finished file to its name, which fails where one exists. It is stale when its holder was a
process of this machine that is dead, when it was an earlier life of the same Slurm job, or when it had no heartbeat for
60 s. Clocks of the nodes must agree to much less than that.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import stat
import time
import uuid
from pathlib import Path
from typing import Any

from sorahpc.errors import SetupError
from sorahpc.files import NotRegular
from sorahpc.runs import atomic_write, machine_id, read_state

STALE_AFTER_S = 60.0
HEARTBEAT_S = 10.0


def start_time(pid: int) -> int | None:
    """Start of a live process in clock ticks since boot, or None if there is none. With the pid it names one process
    for ever: a pid alone is reused."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    fields = text[text.rindex(")") + 2 :].split()  # the name, in parentheses, may hold anything
    return None if fields[0] in "ZX" else int(fields[19])


def identity() -> dict[str, Any]:
    """What names this process among all: host, machine, pid and its start."""
    pid = os.getpid()
    return {"host": socket.gethostname(), "machine": machine_id(), "pid": pid, "started": start_time(pid)}


def is_dead(who: dict[str, Any]) -> bool | None:
    """Whether the process that `identity()` described is gone; None where that can't be seen (another machine)."""
    if who.get("machine") != machine_id():
        return None
    pid, started = who.get("pid"), who.get("started")
    # A record without them names nobody: it must never be taken for a process, and be signalled.
    return not isinstance(pid, int) or pid < 1 or started is None or start_time(pid) != started


def is_fresh(holder: dict[str, Any]) -> bool:
    """Whether it had a heartbeat lately. One that is as far ahead is none: it would count for ever."""
    beat = holder.get("heartbeat")
    return isinstance(beat, (int, float)) and abs(time.time() - beat) < STALE_AFTER_S


def is_alive(holder: dict[str, Any]) -> bool:
    """Whether a lease still counts."""
    dead = is_dead(holder)
    return is_fresh(holder) if dead is None else not dead


def describe(holder: dict[str, Any]) -> str:
    """`Slurm job 12 on node1 (pid 4242), alive 3 s ago`."""
    launch = str(holder.get("launch", ""))
    job = f"Slurm job {launch[6:]} on " if launch.startswith("slurm:") else ""
    age = max(0.0, time.time() - float(holder.get("heartbeat") or 0))
    return f"{job}{holder.get('host', '?')} (pid {holder.get('pid', '?')}), alive {age:.0f} s ago"


class Held(SetupError):
    """Somebody else has it."""


class Lease:
    """The right to write for one task.

    Args:
        path: the lease file, ``jobs/<job>/lease/<task>.json``.
        what: what is held, for the message (``"train of runs/demo"``).
        launch: names the launch (``slurm:123``), the same for all its tasks and restarts.
        restart: how often this launch was requeued: an older life of the same launch never refuses a newer one.
    """

    def __init__(self, path: Path, what: str, launch: str, restart: int = 0):
        self.path, self.what, self.launch, self.restart = path, what, launch, restart
        self.nonce = uuid.uuid4().hex

    def _text(self) -> str:
        who = {**identity(), "launch": self.launch, "restart": self.restart, "nonce": self.nonce}
        return json.dumps({**who, "heartbeat": time.time()}) + "\n"

    def blocked_by(self, holder: dict[str, Any]) -> bool:
        """Whether another's lease keeps this one out."""
        own = holder.get("launch") == self.launch and int(holder.get("restart") or 0) < self.restart
        return not own and is_alive(holder)

    def refuse(self, holder: dict[str, Any]) -> Held:
        return Held(f"{self.what}: is held by {describe(holder)}; wait for it, or end it with `sorahpc cancel`")

    def acquire(self) -> Lease:
        """Take it. Raises Held, naming the holder, where another has it; SetupError where its name is of no file."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        aside = self.path.with_name(f".{self.path.name}.{self.nonce}")
        for _ in range(20):
            atomic_write(aside, self._text(), durable=False)
            try:
                os.link(aside, self.path)
                return self
            except FileExistsError:
                pass
            finally:
                aside.unlink(missing_ok=True)
            holder = read_state(self.path)
            if holder is None:
                try:
                    found = os.lstat(self.path)
                except FileNotFoundError:
                    continue  # given back in between
                if not stat.S_ISREG(found.st_mode):
                    why = NotRegular(self.path, found.st_mode).strerror
                    raise SetupError(f"{self.what}: its lease {self.path}: {why}; remove it, and run again")
                holder = {"heartbeat": found.st_mtime}  # not ours to read: held while it is fresh
            if self.blocked_by(holder):
                raise self.refuse(holder)
            self._remove(holder)
        raise Held(f"{self.what}: {self.path} changes hands again and again; is it launched in a loop?")

    def _remove(self, stale: dict[str, Any]) -> None:
        """Move a stale lease away, and no newer one that another task put there since it was read."""
        away = self.path.with_name(f".{self.path.name}.{self.nonce}.stale")
        try:
            os.rename(self.path, away)
        except FileNotFoundError:
            return
        try:
            if (read_state(away) or {}).get("nonce") != stale.get("nonce"):
                with contextlib.suppress(FileExistsError):
                    os.link(away, self.path)
        finally:
            away.unlink(missing_ok=True)

    def held(self) -> bool:
        """Whether the file still says us."""
        return (read_state(self.path) or {}).get("nonce") == self.nonce

    def beat(self) -> bool:
        """Renew it. False when it was lost: another writer took it for dead."""
        if not self.held():
            return False
        atomic_write(self.path, self._text(), durable=False)
        return True

    def release(self) -> None:
        if self.held():
            self.path.unlink(missing_ok=True)
