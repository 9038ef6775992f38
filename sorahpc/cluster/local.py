"""Tasks as processes of this machine.

Each is the very worker that Slurm would start, in a session of its own, so that Ctrl-C reaches the launcher alone,
which passes it on once. The kernel ends them when the launcher dies, whatever way it dies.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import TextIO

from sorahpc.cluster import nsight
from sorahpc.cluster.launch import Job, folder_of, gpus_per_task, num_tasks, worker_command
from sorahpc.cluster.worker import resources
from sorahpc.config import Config
from sorahpc.errors import SetupError, Stopped
from sorahpc.log import Progress
from sorahpc.runs import JobFolder, read_state, write_json

POLL_S = 0.05
GANG_GRACE_S = 15.0  # after a rank failed: the others are most likely stuck waiting for it
STOP_GRACE_S = 120.0  # on request: the time a large checkpoint takes; as cluster.signal_lead_s by default
SCHEDULER = ("SLURM_", "SRUN_")

# Lines of a process' raw output that tell why it ended; all else there is warnings and prints.
CRASH = re.compile(
    r"sorahpc: .+"
    r"|Fatal Python error: .+"
    r"|[\w.]*(?:Error|Exception|Interrupt)(?:: .*)?$"
    r"|terminate called .+"
    r"|\S+: No module named .+"
    r"|\S+: error while loading shared libraries: .+"
)


def visible_gpus(env: dict[str, str]) -> list[str]:
    """Ids of this machine's GPUs, without asking torch."""
    if "CUDA_VISIBLE_DEVICES" in env:
        return [d for d in env["CUDA_VISIBLE_DEVICES"].split(",") if d]
    return [str(i) for i, _ in enumerate(sorted(Path("/proc/driver/nvidia/gpus").glob("*")))]


def free_port() -> int:
    """A port of the loopback that nothing listens on now."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


class _Forward:
    """INT, TERM and HUP are counted: the first asks the tasks to stop, a second INT ends them."""

    def __init__(self) -> None:
        self.first: signal.Signals | None = None
        self.interrupts = 0

    def _note(self, number: int, _: FrameType | None) -> None:
        self.first = self.first or signal.Signals(number)
        self.interrupts += number == signal.SIGINT

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        before = {n: signal.signal(n, self._note) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler if handler is not None else signal.SIG_DFL)


def last_error(folder: JobFolder, rank: int, start: dict[Path, int]) -> str:
    """The error lines that a rank ended with, since `start` (sizes then): from its log, else its raw output."""
    for path in (folder.log(rank), folder.path / "log" / f"rank{rank}.out"):
        try:
            with open(path, "rb") as f:
                f.seek(max(start.get(path, 0), os.path.getsize(path) - 65536))
                lines = f.read().decode(errors="replace").splitlines()
        except OSError:
            continue
        if path.suffix == ".out":
            errors = crash_lines(lines)
        else:  # the faults that it ended with, each a line
            last = next((i for i, line in enumerate(reversed(lines)) if " ERROR " in line), None)
            lines = lines[: len(lines) - last] if last is not None else []
            errors = [line.split(" ERROR ", 1)[1].partition(": ")[2] for line in _trailing_errors(lines)]
        if errors:
            return "; ".join(line.strip() for line in errors)
    return "no message"


def crash_lines(lines: list[str]) -> list[str]:
    """Why a process ended, from its raw output: the last crash, or the faults it named before it had a log."""
    found: list[str] = []
    in_traceback = False
    for line in lines:
        if line.startswith("Traceback (most recent call last)"):
            in_traceback = True
        elif (in_traceback and line.strip() and not line.startswith(" ")) or CRASH.match(line):
            in_traceback = False
            before = found if found and line.startswith("sorahpc: ") and found[-1].startswith("sorahpc: ") else []
            found = [*before, line]
    return [line.removeprefix("sorahpc: ") for line in found[-5:]]


def _trailing_errors(lines: list[str]) -> list[str]:
    keep = len(lines)
    while keep and " ERROR " in lines[keep - 1]:
        keep -= 1
    return lines[keep:][-5:]


def exit_word(code: int) -> str:
    """`exit 4`, or `killed by SIGKILL (out of memory?)`."""
    if code >= 0:
        return f"exit {code}"
    hint = " (out of memory?)" if code == -signal.SIGKILL else ""
    return f"killed by {signal.Signals(-code).name}{hint}"


def tell_end(
    folder: JobFolder, kind: str, codes: dict[int, int], failed: list[int], sizes: dict[Path, int], stream: TextIO
) -> str:
    """Print how tasks ended that did not end well, equal faults once.

    Args:
        kind: of the job: of a gang the rank that failed first is the cause, and told alone.
        codes: how each task ended, by task, as `subprocess` has it.
        failed: the tasks that failed, in the order of their ends; none: they were stopped.
        sizes: of the files of the log folder, before the tasks started.

    Returns:
        What was told of the failed ones.
    """
    if not failed:
        # A measurement that was interrupted is none; that of the kernels is one a case.
        what = "nothing of it is kept" if folder.job.startswith("profile-") else "progress saved"
        what = "the cases measured so far are kept" if folder.job == "profile-kernels" else what
        again = "begins anew" if folder.job.startswith("profile-") else "goes on from here"
        print(f"sorahpc: {folder.job}: stopped, {what}; the same command {again}", file=stream)
        return ""
    faults: dict[str, list[int]] = {}
    for rank in failed[:1] if kind == "gang" else failed:
        faults.setdefault(f"failed ({exit_word(codes[rank])}): {last_error(folder, rank, sizes)}", []).append(rank)
    told = [f"{_tasks_word(kind, ranks)} {fault}" for fault, ranks in list(faults.items())[:10]]
    log, out = folder.log(failed[0]), folder.log(failed[0]).with_suffix(".out")
    grown = log.exists() and log.stat().st_size > sizes.get(log, 0)
    for line in [*told, f"see {log if grown or not out.exists() else out}"]:
        print(f"sorahpc: {folder.job}: {line}", file=stream)
    return "\n".join(told)


def _tasks_word(kind: str, ranks: list[int]) -> str:
    """`rank 1`, `tasks 0, 2`, `tasks 0, 1, 2, 3, 4 and 11 more`."""
    word = "rank" if kind == "gang" else "task" if len(ranks) == 1 else "tasks"
    more = f" and {len(ranks) - 5} more" if len(ranks) > 5 else ""
    return f"{word} {', '.join(map(str, sorted(ranks)[:5]))}{more}"


def log_sizes(folder: JobFolder) -> dict[Path, int]:
    """Sizes of the files of the log folder, which is made."""
    logs = folder.log(0).parent
    logs.mkdir(parents=True, exist_ok=True)
    return {p: p.stat().st_size for p in logs.iterdir()}


def run_local(config: Config, job: Job, launch: str, progress: bool, stream: TextIO | None = None) -> int:
    """Run all tasks of a job on this machine; wait for them.

    A gang is ended when one of its ranks fails; the tasks of an array go on. An array runs as many tasks at a time as
    there are CPUs (GPUs) for.

    Returns:
        0; 10 when stopped on request with progress saved; else the code of the task that failed first (128 + n when a
        signal n killed it). 130 after Ctrl-C.
    """
    folder, tasks, wanted = folder_of(config, job), num_tasks(config, job), resources(config, job.name)
    stream = stream or sys.stderr
    env = {k: v for k, v in os.environ.items() if not k.startswith(SCHEDULER)}
    env.update(config.cluster.env)
    cpus = wanted.cpus_per_task if wanted else 1
    env.setdefault("OMP_NUM_THREADS", str(cpus))
    env.update(
        WORLD_SIZE=str(tasks),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(free_port()),
        SORAHPC_LAUNCH=launch,
        SORAHPC_PARENT=str(os.getpid()),
    )
    wants_gpu = gpus_per_task(config, job) > 0
    gpus = visible_gpus(env) if wants_gpu else []
    if wants_gpu and not gpus:
        raise SetupError("cluster.gpus_per_task: 1 GPU a task expected, this machine has none; set it to 0")
    if job.kind == "gang":
        if wants_gpu and tasks > len(gpus):
            raise SetupError(f"{job.name}.resources: {tasks} ranks with a GPU each expected, {len(gpus)} GPUs found")
        slots = tasks
    else:
        slots = min(tasks, config.cluster.max_array_parallel, len(gpus) or max(1, len(os.sched_getaffinity(0)) // cpus))

    if warning := nsight.warning(config, job.name, visible_gpus(env)):
        print(f"sorahpc: {job.name}: {warning}", file=stream)
    sizes = log_sizes(folder)
    waiting, running, free = list(range(tasks)), dict[int, tuple[subprocess.Popen[bytes], int]](), list(range(slots))
    codes: dict[int, int] = {}
    failed: list[int] = []  # in the order of their ends: the first is the cause
    forward, asked, kill_at = _Forward(), False, float("inf")
    killed: set[int] = set()  # by this launcher, which had asked before

    def start(rank: int) -> None:
        slot = free.pop(0)
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank if job.kind == "gang" else 0)}
        if gpus and job.kind == "array":
            place["CUDA_VISIBLE_DEVICES"] = gpus[slot]
        # What the task writes past its log (a crash of the interpreter, a library's print) is kept beside it.
        with open(folder.path / "log" / f"rank{rank}.out", "ab") as out:
            process = subprocess.Popen(
                worker_command(config, job),
                env={**env, **place},
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        running[rank] = (process, slot)

    def tell(number: signal.Signals) -> None:
        for process, _ in running.values():
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(number)

    with forward.installed(), Progress(folder, stream) if progress else contextlib.nullcontext():
        try:
            while running or waiting:
                while waiting and free and not asked:
                    start(waiting.pop(0))
                if asked and not running:
                    break
                time.sleep(POLL_S)
                for rank, (process, slot) in list(running.items()):
                    code = process.poll()
                    if code is None:
                        continue
                    codes[rank] = code
                    del running[rank]
                    free.append(slot)
                    if code not in (0, Stopped.exit_code):
                        failed.append(rank)
                if forward.first and not asked:
                    asked, kill_at = True, time.monotonic() + STOP_GRACE_S
                    tell(signal.SIGTERM)
                elif job.kind == "gang" and not asked and any(codes.values()) and running:
                    asked, kill_at = True, time.monotonic() + GANG_GRACE_S
                    tell(signal.SIGTERM)
                if running and (time.monotonic() > kill_at or forward.interrupts > 1):
                    kill_at = float("inf")
                    killed |= set(running)
                    tell(signal.SIGKILL)
        finally:
            tell(signal.SIGKILL)
            for process, _ in running.values():
                process.wait()

    result, message = 0, ""
    unfinished = len(waiting) + sum(code != 0 for code in codes.values())
    if failed and killed.issuperset(failed):  # no fault of theirs, nor a lack of memory
        twice = forward.interrupts > 1
        message = f"{'interrupted twice' if twice else 'did not stop in time'}: left without saving"
        print(f"sorahpc: {job.name}: {message}", file=stream)
        result = 128 + (signal.SIGINT if twice else signal.SIGKILL)
    elif failed or unfinished:
        message = tell_end(folder, job.kind, codes, failed, sizes, stream)
        code = codes[failed[0]] if failed else Stopped.exit_code
        result = code if code > 0 else 128 - code
    # A killed rank leaves no word of its own.
    write_json(folder.launch, {**(read_state(folder.launch) or {}), "exit_code": result, "message": message})
    return 130 if forward.first == signal.SIGINT and unfinished else result
