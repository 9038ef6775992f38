"""status, logs, cancel: from the run folder and squeue. sacct is never needed; torch is never imported."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sorahpc.errors import ConfigError, SetupError
from sorahpc.lease import STALE_AFTER_S, is_dead, start_time
from sorahpc.runs import JobFolder, read_json, read_state, summarize, write_json

SQUEUE_TIMEOUT_S = 10.0
ACTIVE = ("pending", "running")
FOLLOW_POLL_S = 0.5


def find_run(run: str, runs_dir: str | Path = "runs") -> Path:
    """A run folder from its path, or from its name under `runs_dir`. Raises ConfigError."""
    for folder in (Path(run), Path(runs_dir) / run):
        if (folder / "jobs").is_dir():
            return folder
    known = sorted(p.parent.name for p in Path(runs_dir).glob("*/jobs"))
    hint = f"; runs here: {', '.join(known[:20])}" if known else ""
    raise ConfigError(f"{run}: expected a run folder, or the name of one under {runs_dir}/{hint}")


def find_jobs(run_dir: Path, job: str | None = None) -> list[JobFolder]:
    """The jobs of a run in the order of their launch, or the one named."""
    found = [JobFolder(run_dir, p.name) for p in sorted((run_dir / "jobs").iterdir()) if (p / "spec.json").exists()]
    found.sort(key=lambda f: (read_state(f.launch) or {}).get("time") or 0.0)
    if job is None:
        return found
    chosen = [f for f in found if f.job == job]
    if not chosen:
        raise ConfigError(f"{run_dir}: no job {job!r}; launched so far: {', '.join(f.job for f in found) or 'none'}")
    return chosen


def queue_of(job_ids: list[str]) -> dict[str, dict[str, Any]] | None:
    """State of Slurm jobs from squeue: {id: {state, reason, nodes, tasks}}, without those that left the queue.

    An array counts as RUNNING when one of its tasks does. None where squeue can't tell.
    """
    if not job_ids:
        return {}
    if shutil.which("squeue") is None:
        return None
    # All of the user's jobs in one call: asked by id, squeue fails for the whole list once one is forgotten.
    command = ["squeue", "--noheader", "--array", "--user", str(os.getuid()), "--format", "%F|%T|%r|%N|%K"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SQUEUE_TIMEOUT_S)
    except (OSError, subprocess.TimeoutExpired):
        return None
    if done.returncode != 0:
        return None
    found: dict[str, dict[str, Any]] = {}
    for line in done.stdout.splitlines():
        job_id, state, reason, nodes, _ = (line.strip().split("|") + [""] * 5)[:5]
        if job_id not in job_ids or state in ("COMPLETED", "CANCELLED", "FAILED", "TIMEOUT", "NODE_FAIL"):
            continue
        entry = found.setdefault(job_id, {"state": state, "reason": reason, "nodes": [], "tasks": {}})
        entry["tasks"][state] = entry["tasks"].get(state, 0) + 1
        if nodes:
            entry["nodes"].append(nodes)
        if state == "RUNNING" or (entry["state"] == "PENDING" and state != "PENDING"):
            entry.update(state=state, reason=reason)
    return found


def _task_state(status: dict[str, Any]) -> str:
    """running, done, stopped or failed, as told; lost for one that runs no more without having told."""
    state = str(status.get("state"))
    if state != "running":
        return state
    dead = is_dead(status["process"]) if isinstance(status.get("process"), dict) else None
    if dead is None:
        dead = time.time() - float(status.get("heartbeat") or 0.0) > STALE_AFTER_S
    return "lost" if dead else "running"


def srun_errors(folder: JobFolder, job_id: str) -> list[str]:
    """What srun said of tasks that could not speak for themselves: `node2: task 1: Killed`."""
    found: list[str] = []
    for path in sorted((folder.path / "slurm").glob(f"{job_id}_*_log.out"))[:20]:
        with open(path, "rb") as f:
            f.seek(max(0, path.stat().st_size - 65536))
            text = f.read().decode(errors="replace")
        pattern = r"^(?:srun|slurmstepd\S*): error: (\S+: tasks? \S+: (?!Exited with exit code 10$).+|.*DUE TO .*)$"
        found += re.findall(pattern, text, re.M)
    return found[-3:]


def job_status(folder: JobFolder, queue: dict[str, dict[str, Any]] | None) -> dict[str, Any]:
    """Everything that is known of one job, as plain data.

    ``state``: pending, running, done, stopped (progress saved), failed, lost (ended without a word), cancelled
    (its message says whether progress was saved).
    """
    launch = read_state(folder.launch) or {}
    statuses = folder.statuses()
    states = [_task_state(s) for s in statuses]
    summary = summarize(statuses)
    tasks = int(launch.get("tasks") or max((int(s.get("tasks") or 1) for s in statuses), default=1))
    spec = read_json(folder.spec) or {}
    expected = 1 if spec.get("kind") == "gang" else tasks
    entry = (queue or {}).get(str(launch.get("job_id")))
    slurm = launch.get("kind") == "slurm"
    launcher_dead = is_dead(launch["launcher"]) if isinstance(launch.get("launcher"), dict) else None

    if entry and entry["state"] in ("PENDING", "SUSPENDED", "REQUEUED", "REQUEUE_HOLD", "CONFIGURING"):
        state = "pending"
    elif entry and "running" in states:
        state = "running"
    elif entry and entry["state"] == "RUNNING":
        state = "running"
    elif "failed" in states or launch.get("exit_code") not in (None, 0, 10):
        state = "failed"
    elif "running" in states and not (slurm and queue is not None):
        state = "running"
    elif states.count("done") >= expected:  # more than expected where others joined
        state = "done"
    elif launch.get("cancelled"):
        state = "cancelled"
    elif "running" in states or "lost" in states:
        state = "lost"
    elif "stopped" in states:
        state = "stopped"
    elif launcher_dead is False or (slurm and queue is None):
        state = "pending"
    elif slurm:
        state = "cancelled"
    else:
        state = "lost"

    bad = [s for s, told in zip(statuses, states, strict=True) if told == "failed"]
    bad.sort(key=lambda s: s.get("heartbeat") or 0.0)  # the first to fail is the cause
    message = str(launch.get("message") or next((str(s["message"]) for s in bad if s.get("message")), ""))
    if not message and state in ("stopped", "cancelled"):
        message = next((str(s["message"]) for s in statuses if s.get("message")), "")
    if state == "lost":
        message = f"ended without a word (killed? node lost?); see `sorahpc logs {folder.run_dir} {folder.job}`"
    if state == "cancelled" and not launch.get("cancelled") and not statuses:
        message = "left the queue without starting: an earlier job failed, or it was cancelled"
    if state == "pending" and entry and entry["reason"] not in ("", "None"):
        message = entry["reason"]
    if slurm and state in ("stopped", "lost", "failed") and not bad:
        message = "; ".join(filter(None, [message, *srun_errors(folder, str(launch.get("job_id")))]))
    beat = summary["heartbeat"]
    codes = [launch.get("exit_code"), *(s.get("exit_code") for s in [*bad, *statuses])]
    return {
        "job": folder.job,
        "state": state,
        "kind": launch.get("kind"),
        "job_id": launch.get("job_id"),
        "queue": entry,
        "tasks": {name: states.count(name) for name in dict.fromkeys(states)},
        "num_tasks": tasks,
        "done": summary["done"],
        "total": summary["total"],
        "unit": summary["unit"],
        "rate": summary["rate"] if state == "running" else None,
        "eta_s": summary["eta_s"] if state == "running" else None,
        "metrics": summary["metrics"],
        "heartbeat_age_s": max(0.0, time.time() - beat) if beat else None,
        "hosts": summary["hosts"],
        "restart": max((int(s.get("restart") or 0) for s in statuses), default=0),
        "exit_code": next((code for code in codes if code is not None), None),
        "message": message,
    }


def run_status(run_dir: Path) -> dict[str, Any]:
    """Status of a run: its jobs in the order of their launch."""
    folders = find_jobs(run_dir)
    launches = [read_state(f.launch) or {} for f in folders]
    ids = [str(x["job_id"]) for x in launches if x.get("kind") == "slurm" and x.get("job_id")]
    queue = queue_of(ids)
    jobs = [job_status(folder, queue) for folder in folders]
    return {"run": run_dir.name, "path": str(run_dir.absolute()), "queue_known": queue is not None, "jobs": jobs}


def status_table(status: dict[str, Any]) -> str:
    """The same for people: one line a job, and one for each message."""
    from sorahpc.log import duration, number

    rows = [("JOB", "STATE", "DONE", "RATE", "LEFT", "SEEN", "HOST", "SLURM")]
    notes = []
    for job in status["jobs"]:
        done = "-" if job["total"] is None else f"{number(job['done'])}/{number(job['total'])} {job['unit']}"
        rate = f"{number(job['rate'])}/s" if job["rate"] else "-"
        seen = "-" if job["heartbeat_age_s"] is None else f"{duration(job['heartbeat_age_s'])} ago"
        hosts = job["hosts"][0] if job["hosts"] else "-"
        if len(job["hosts"]) > 1:
            hosts += f" +{len(job['hosts']) - 1}"
        queued = job["queue"]["state"] if job["queue"] else "ended"
        slurm = f"{job['job_id']} {queued}" if job["job_id"] else "-"
        rows.append((job["job"], job["state"], done, rate, duration(job["eta_s"]), seen, hosts, slurm))
        if job["message"]:
            code = f" (exit {job['exit_code']})" if job["state"] == "failed" and job["exit_code"] is not None else ""
            notes += [f"{job['job']}: {line}{code}" for line in job["message"].splitlines()]
        if job["metrics"] and job["state"] == "running":
            notes.append(f"{job['job']}: " + ", ".join(f"{k}={number(v)}" for k, v in job["metrics"].items()))
    if not status["queue_known"]:
        notes.append("squeue gives no answer: the state of Slurm jobs is what their tasks last told")
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([f"run {status['run']}  ({status['path']})", *lines, *notes])


def log_lines(folder: JobFolder, rank: int, follow: bool) -> Iterator[str]:
    """The log of a rank, as text in pieces; with `follow` until its job ends.

    Raises:
        ConfigError: there is no such log.
    """
    path = folder.log(rank)
    if not path.exists():
        # It failed before it had a log, or has none yet: what Slurm or the launcher caught of its output.
        raw = [*(folder.path / "slurm").glob("*_log.out"), *(folder.path / "log").glob(f"rank{rank}.out")]
        if raw and not follow:
            path = max(raw, key=lambda p: p.stat().st_mtime)
        elif not follow:
            names = [p.stem[4:] for p in (folder.path / "log").glob("rank*.log")]
            ranks = sorted(int(name) for name in names if name.isdecimal())
            there = f"ranks with a log: {', '.join(map(str, ranks))}" if ranks else "no rank has started yet"
            raise ConfigError(f"{path}: no log of rank {rank}; {there}")
    offset, ended = 0, False
    while True:
        if path.exists():
            with open(path, "rb") as f:
                f.seek(offset)
                while data := f.read(1 << 16):
                    offset += len(data)
                    yield data.decode(errors="replace")
        if not follow or ended:
            return
        launch = read_state(folder.launch) or {}
        ids = [str(launch["job_id"])] if launch.get("kind") == "slurm" and launch.get("job_id") else []
        state = job_status(folder, queue_of(ids))["state"]
        ended = state not in ACTIVE  # once more round for what was written in between
        # Slurm's controller is asked rarely: every login shell with `logs -f` open adds up.
        for _ in range(10 if ids else 1):
            if ended:
                break
            time.sleep(FOLLOW_POLL_S)
            if path.exists() and path.stat().st_size > offset:
                break


def cancel_job(folder: JobFolder) -> str:
    """End a job. Returns what was done, in words.

    Local tasks get TERM through their launcher, save and stop; so do Slurm's through scancel.

    Raises:
        SetupError: it can't be reached from here.
    """
    launch = read_state(folder.launch) or {}
    if launch.get("kind") == "slurm" and launch.get("job_id"):
        job_id = str(launch["job_id"])
        queue = queue_of([job_id])
        if queue is None:
            raise SetupError("squeue: gives no answer; run this on a login node of the cluster")
        if job_id not in queue:
            return f"{folder.job}: Slurm job {job_id} has ended already"
        done = subprocess.run(["scancel", job_id], capture_output=True, text=True, timeout=60)
        if done.returncode != 0:
            raise SetupError(f"scancel {job_id}: {' '.join(done.stderr.split())}")
        write_json(folder.launch, {**launch, "cancelled": time.time()})
        return f"{folder.job}: Slurm job {job_id} cancelled"
    launcher = launch.get("launcher")
    if not isinstance(launcher, dict):
        return f"{folder.job}: was never started"
    dead = is_dead(launcher)
    if dead is None:
        raise SetupError(f"{folder.job}: runs on {launcher.get('host')}; cancel it there")
    if dead:
        return f"{folder.job}: has ended already"
    pid = int(launcher["pid"])
    write_json(folder.launch, {**launch, "cancelled": time.time()})
    os.kill(pid, signal.SIGTERM)
    deadline = time.monotonic() + 150.0  # the launcher itself gives its tasks 120 s to save
    while time.monotonic() < deadline:
        if start_time(pid) != launcher["started"]:
            return f"{folder.job}: stopped (pid {pid})"
        time.sleep(0.1)
    os.kill(pid, signal.SIGKILL)
    return f"{folder.job}: killed (pid {pid}); it did not stop within 150 s"


def write_text(pieces: Iterator[str]) -> None:
    for piece in pieces:
        sys.stdout.write(piece)
        sys.stdout.flush()
