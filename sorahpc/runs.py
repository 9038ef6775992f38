"""The run folder: where each thing of a run lies, and how it is written so that nobody reads half of it.

    runs/<run>/
        manifest.parquet  cache/  checkpoints/  samples/  report.html
        metrics.jsonl  tensorboard/
        jobs/<job>/       config.yaml   the resolved config that its tasks execute
                          spec.json     what the tasks execute: module, function, config (never a pickle)
                          submit.sh     the exact script or command
                          launch.json   how it was started: kind, Slurm job id or process ids
                          code/ env.txt what ran: commit, diff, installed packages
                          log/rank*.log
                          status/<task>.json   state, step, rate, eta, heartbeat; one writer each
                          lease/<task>.json    who works on it now; a second writer is refused
                          index.json    of encode: the cache's index that its tasks have built

An array job has a status file a task; a gang (train) has one, written by rank 0. No torch here: status and logs run on
a login node.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sorahpc.files import read_regular

STATUS_INTERVAL_S = 2.0


def fsync_dir(path: Path) -> None:
    """Make the names in a folder durable."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def machine_id() -> str:
    """Where a pid means something: this boot and this pid namespace (containers share host names, not pids)."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot}:{os.stat('/proc/self/ns/pid').st_ino}"


def place() -> str:
    """`machine_id`, short, behind the name of the host, which people know; a name of a file may have 255 bytes."""
    return f"{socket.gethostname()[:32]}-{hashlib.sha256(machine_id().encode()).hexdigest()[:8]}"


def aside(path: Path, suffix: str = ".tmp") -> Path:
    """A name beside a file's for what is not whole yet, which no other thread anywhere has: where it runs, its process,
    itself. What killed tasks leave in a cache is known by it (sorahpc/data/leftovers.py)."""
    return path.with_name(f".{path.name}.{place()}.{os.getpid()}.{threading.get_native_id()}{suffix}")


def atomic_write(path: Path, data: str | bytes, *, durable: bool = True) -> None:
    """Write a file so that a reader sees the old content or the new, never a part: aside, fsync, rename.

    `durable=False` leaves out the fsyncs (for status files, rewritten every few seconds).
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    new = aside(path)
    try:
        with open(new, "wb") as f:
            f.write(data.encode() if isinstance(data, str) else data)
            if durable:
                f.flush()
                os.fsync(f.fileno())
        os.replace(new, path)
    except BaseException as error:
        new.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is None:  # of a disk that is full: say which
            error.filename = str(path)
        raise
    if durable:
        fsync_dir(path.parent)


def write_json(path: Path, value: Any, *, durable: bool = True) -> None:
    atomic_write(path, json.dumps(value, indent=1, allow_nan=False) + "\n", durable=durable)


def read_json(path: Path) -> dict[str, Any] | None:
    """A JSON mapping, or None where there is none (missing, unreadable, not JSON): for files that others rewrite."""
    try:
        value = json.loads(read_regular(path))
    except (OSError, ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _is_number(value: Any) -> bool:
    whole = isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63
    return whole or (isinstance(value, float) and math.isfinite(value))


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and _is_number(value)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_process(value: Any) -> bool:
    return isinstance(value, dict) and _is_text(value.get("machine")) and _is_whole(value.get("pid"))


def _is_metrics(value: Any) -> bool:
    return isinstance(value, dict) and all(_is_text(v) or _is_number(v) for v in value.values())


def _is_job_id(value: Any) -> bool:
    return isinstance(value, str) and value.isdecimal()  # it goes into a command line and a file pattern


# What the keys of launch, status, lease and restart files hold.
_HOLDS: dict[str, Callable[[Any], bool]] = {
    **dict.fromkeys(("time", "cancelled", "heartbeat", "done", "total", "rate", "eta_s", "left"), _is_number),
    **dict.fromkeys(("task", "tasks", "restart", "exit_code", "stuck", "pid", "started"), _is_whole),
    **dict.fromkeys(("kind", "job", "state", "message", "unit", "host", "machine", "nonce"), _is_text),
    **dict.fromkeys(("launcher", "process"), _is_process),
    "metrics": _is_metrics,
    "job_id": _is_job_id,
}


def read_state(path: Path) -> dict[str, Any] | None:
    """`read_json` of a launch, status, lease or restart file. A value of a wrong type (a hand edit, a damaged disk) is
    left out, as if it had never been told: what is known stays visible, and the job can be launched again."""
    value = read_json(path)
    return None if value is None else {k: v for k, v in value.items() if k not in _HOLDS or _HOLDS[k](v)}


def summarize(statuses: list[dict[str, Any]]) -> dict[str, Any]:
    """One line of progress from the status files of a job: sums of done, total and rate; the metrics of the first task.

    Returns:
        done, total (None before the first report), unit, rate (units/s or None), eta_s (or None), metrics,
        heartbeat (newest, seconds since the epoch, or None), hosts.
    """
    told = [s for s in statuses if s.get("total") is not None and s.get("done") is not None]
    done = sum(s["done"] for s in told) if told else None
    total = sum(s["total"] for s in told) if told else None
    rates = [s["rate"] for s in told if s.get("state") == "running" and s.get("rate")]
    rate = sum(rates) if rates else None
    return {
        "done": done,
        "total": total,
        "unit": told[0].get("unit", "") if told else "",
        "rate": rate,
        "eta_s": (total - done) / rate if rate and total is not None and done is not None else None,
        "metrics": told[0].get("metrics") or {} if told else {},
        "heartbeat": max((s.get("heartbeat") or 0.0 for s in statuses), default=None),
        "hosts": sorted({str(s["host"]) for s in statuses if s.get("host")}),
    }


@dataclass(frozen=True)
class JobFolder:
    """Paths of one job of a run."""

    run_dir: Path
    job: str

    @property
    def path(self) -> Path:
        return self.run_dir / "jobs" / self.job

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

    @property
    def spec(self) -> Path:
        return self.path / "spec.json"

    @property
    def submit(self) -> Path:
        return self.path / "submit.sh"

    @property
    def launch(self) -> Path:
        return self.path / "launch.json"

    def log(self, rank: int) -> Path:
        return self.path / "log" / f"rank{rank}.log"

    def status(self, task: int) -> Path:
        return self.path / "status" / f"{task}.json"

    def lease(self, name: int | str) -> Path:
        """Lease of a task, or of the launcher (``"launch"``)."""
        return self.path / "lease" / f"{name}.json"

    def restarts(self, task: int) -> Path:
        return self.path / "restarts" / f"{task}.json"

    def statuses(self) -> list[dict[str, Any]]:
        """What the tasks last told, by task. A file that vanishes or isn't ours is left out: this is a display."""
        return [s for s in map(read_state, sorted((self.path / "status").glob("[0-9]*.json"))) if s is not None]


def _never() -> bool:
    return False


@dataclass
class Task:
    """What one process of a job knows of its place, and how it tells of its progress.

    For an array job `rank` is the index of the independent task and `world_size` their number; no process group is
    formed. For a gang they are the rank and world size of the process group. Size 1 is the same path.
    """

    run_dir: Path
    job: str
    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    restart: int = 0  # how often the scheduler has requeued this task
    launch: str = ""  # the same for all tasks and restarts of a launch
    writes: bool = True  # a gang's ranks above 0 report nothing
    stop_requested: Callable[[], bool] = _never  # a signal asked for an orderly stop; look at it between steps
    _status: dict[str, Any] = field(default_factory=dict)
    _written: float = -1e9
    _rates: list[tuple[float, float]] = field(default_factory=list)
    _lock: threading.RLock = field(default_factory=threading.RLock)  # the heartbeat thread writes too

    @property
    def folder(self) -> JobFolder:
        return JobFolder(self.run_dir, self.job)

    def report(self, done: float, total: float, unit: str, **metrics: float | str) -> None:
        """Tell how far this task is. Cheap: the status file is rewritten at most every 2 s.

        Args:
            done, total: items finished and in all, in `unit` (``"step"``, ``"clip"``, ``"video"``).
            metrics: what else a person wants to see in the status line (``loss=0.41``).
        """
        if not self.writes:  # the ranks of a gang are equally far, and progress is summed over status files
            return
        with self._lock:
            self._report(done, total, unit, metrics)

    def _report(self, done: float, total: float, unit: str, metrics: dict[str, float | str]) -> None:
        now = time.monotonic()
        if not self._rates or now - self._rates[-1][0] > 1.0:
            self._rates = [*self._rates[-30:], (now, done)]
        (t0, d0) = self._rates[0]
        rate = (done - d0) / (now - t0) if now > t0 and done > d0 else None
        self._status.update(
            done=done, total=total, unit=unit, rate=rate, eta_s=(total - done) / rate if rate else None, metrics=metrics
        )
        if now - self._written >= STATUS_INTERVAL_S or done >= total:
            self.write_status("running")

    def write_status(self, state: str, **extra: Any) -> None:
        """Rewrite this task's status file: state is running, done, stopped or failed."""
        if not self.writes:
            return
        with self._lock:
            self._written = time.monotonic()
            self._status.update(extra)
            status = {
                "job": self.job,
                "task": self.rank,
                "tasks": self.world_size,
                "state": state,
                **self._status,
                "restart": self.restart,
                "heartbeat": time.time(),
                "host": socket.gethostname(),
                "pid": os.getpid(),
            }
            write_json(self.folder.status(self.rank), status, durable=state != "running")
