"""What every task executes, wherever it runs.

    python -m sorahpc.cluster.worker --spec runs/demo/jobs/train/spec.json     (the launchers)
    python -m sorahpc.cluster.worker train CONFIG [key=value ...]              (slurm/*.sbatch)

It finds its place among the tasks from Slurm's variables or from those of the local launcher, takes the lease, keeps
the heartbeat, runs ``sorahpc.jobs.<job>.run(config, task)``, and turns what happens into a status file and an
exit code.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import logging
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn

from sorahpc.cluster import nsight
from sorahpc.cluster.signals import StopFlag, die_after, die_with, ignore_stop_signals
from sorahpc.config import ArrayResources, Config
from sorahpc.configfile import load_config
from sorahpc.errors import ConfigError, NoProgressError, SetupError, SoraHPCError, Stopped
from sorahpc.lease import HEARTBEAT_S, Lease, identity, is_alive
from sorahpc.log import number, task_logging
from sorahpc.runs import JobFolder, Task, read_state, write_json

MAX_STUCK_RESTARTS = 3
FIRST_PORT, NUM_PORTS = 10_000, 20_000  # below Linux' ephemeral ports (32768 up)
# Jobs whose tasks claim what they do: more of them, of another launch too, may join those that run.
JOINED = ("encode",)
# What of the config decides how much of a GPU's memory a job needs.
MEMORY = {
    "caption": "caption.frames or caption.frame_area_px",
    "encode": "clip.max_area_px or clip.max_frames",
    "evaluate": "clip.max_area_px or clip.max_frames; evaluate.reconstructions=0 leaves the VAE out",
    "train": "train.tokens_per_pack, with train.packs_per_step or train.tp raised for it",
    "sample": "sample.prompts_per_pack, or of sample.frames, height or width",
    "train-vae": "train_vae.window_frames or train_vae.crop_px",
}

log = logging.getLogger("sorahpc.cluster.worker")  # __name__ is __main__ in a task


@dataclass(frozen=True)
class Spec:
    """What to execute: data only, never a pickle.

    Attributes:
        job: name of the job and of its folder.
        module: its module, ``sorahpc.jobs.*``.
        function: its function of (config, task).
        kind: ``array`` (independent tasks) or ``gang`` (ranks of one process group).
        config: absolute path of the resolved config.
        cwd: folder that the config's relative paths start from.
    """

    job: str
    module: str
    function: str
    kind: str
    config: str
    cwd: str

    @classmethod
    def read(cls, path: Path) -> Spec:
        try:
            data = json.loads(path.read_bytes())
        except (OSError, ValueError) as error:
            raise SetupError(f"{path}: can't read the spec: {error}; launch the job again") from None
        fields = list(cls.__dataclass_fields__)
        texts = isinstance(data, dict) and all(isinstance(v, str) for v in data.values())
        if not texts or sorted(data) != sorted(fields):
            raise SetupError(f"{path}: expected a mapping of texts {', '.join(fields)}; launch the job again")
        spec = cls(**data)
        spec.check(str(path))
        return spec

    def check(self, where: str) -> None:
        """Nothing but a function of one of our own jobs is ever executed."""
        if not re.fullmatch(r"sorahpc\.jobs\.[a-z][a-z0-9_]*", self.module):
            raise SetupError(f"{where}: module: expected sorahpc.jobs.<name>, found {self.module!r}")
        if not re.fullmatch(r"[a-z][a-z0-9_]*", self.function):
            raise SetupError(f"{where}: function: expected a name, found {self.function!r}")
        if not re.fullmatch(r"[a-z][a-z0-9-]*", self.job):
            raise SetupError(f"{where}: job: expected a name, found {self.job!r}")
        if self.kind not in ("array", "gang"):
            raise SetupError(f"{where}: kind: expected array or gang, found {self.kind!r}")

    def write(self, path: Path) -> None:
        write_json(path, asdict(self))

    def load(self) -> Callable[[Config, Task], None]:
        try:
            module = importlib.import_module(self.module)
        except ModuleNotFoundError as error:
            raise SetupError(f"{self.job}: module {error.name} is not installed here; install sorahpc again") from None
        function: Callable[[Config, Task], None] = getattr(module, self.function)
        return function


@dataclass(frozen=True)
class Place:
    """Where a process stands among the tasks of its job."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    restart: int = 0
    launch: str = ""  # the same for all tasks and restarts of a launch

    @classmethod
    def of(cls, env: Mapping[str, str], kind: str, joined: bool = False) -> Place:
        """Read Slurm's variables, else those of the local launcher; one task where there are neither.

        An array job numbers its tasks over the elements of the Slurm array and the tasks of each. A gang lives inside
        one Slurm job: an array of gangs has no meaning. Only of a job that may be joined has the array other indices
        than 0 to N-1: those of an array that is there are 0 to N-1.
        """

        def get(name: str, default: int) -> int:
            text = env.get(name, "")
            if not text:
                return default
            if not text.isdecimal():
                raise SetupError(f"{name}: expected a whole number in the environment, found {text!r}")
            return int(text)

        launch = f"pid:{os.getpid()}"
        if "SLURM_PROCID" in env:
            job = env.get("SLURM_ARRAY_JOB_ID") or env.get("SLURM_JOB_ID", "?")
            tasks, index, count = get("SLURM_NTASKS", 1), 0, 1
            if "SLURM_ARRAY_TASK_ID" in env:
                index, count = get("SLURM_ARRAY_TASK_ID", 0), get("SLURM_ARRAY_TASK_COUNT", 1)
                if kind == "gang":
                    raise SetupError("--array: a gang runs in one Slurm job; submit it without --array")
                if index >= count and not joined:
                    raise SetupError(
                        f"--array: expected indices 0 to N-1, found index {index} among {count}; submit the whole "
                        "array again (tasks that are done end at once)"
                    )
            place = cls(
                rank=index * tasks + get("SLURM_PROCID", 0),
                world_size=count * tasks,
                local_rank=get("SLURM_LOCALID", 0),
                restart=get("SLURM_RESTART_COUNT", 0),
                launch=f"slurm:{job}",
            )
        else:
            launch = env.get("SORAHPC_LAUNCH", launch)
            place = cls(get("RANK", 0), get("WORLD_SIZE", 1), get("LOCAL_RANK", 0), 0, launch)
        if place.rank >= place.world_size and not joined:
            raise SetupError(f"RANK: expected less than the world size {place.world_size}, found {place.rank}")
        return place


def section_of(job: str) -> str:
    """The config section that a job is described in: `train` for train and for profile-train."""
    return job.removeprefix("profile-").replace("-", "_")


def resources(config: Config, job: str) -> Any:
    """What a job asks for (ArrayResources or GangResources); None for a job without it.

    A profile of an array of tasks is that of one of them.
    """
    wanted = getattr(getattr(config, section_of(job), None), "resources", None)
    if job.startswith("profile-") and isinstance(wanted, ArrayResources):
        return wanted.model_copy(update={"tasks": 1})
    return wanted


def export_gang(place: Place, env: Any) -> None:
    """Set what a process group is built from: RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT.

    Raises:
        SetupError: Slurm's host list can't be read.
    """
    env.update(RANK=str(place.rank), WORLD_SIZE=str(place.world_size), LOCAL_RANK=str(place.local_rank))
    if "SLURM_PROCID" not in env:
        env.setdefault("MASTER_ADDR", "127.0.0.1")
        env.setdefault("MASTER_PORT", "29500")
        return
    nodes = env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST", "")
    command = ["scontrol", "show", "hostnames", nodes]
    try:
        hosts = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout.split()
    except (OSError, subprocess.SubprocessError) as error:
        raise SetupError(f"{' '.join(command)}: {error}; scontrol is needed to find the first node") from None
    if not hosts:
        raise SetupError(f"{' '.join(command)}: expected host names, found none")
    # A requeued job may meet the sockets of its former life on the same node: another port each time.
    port = FIRST_PORT + (int(env.get("SLURM_JOB_ID", "0")) * 16 + place.restart) % NUM_PORTS
    env.update(MASTER_ADDR=hosts[0], MASTER_PORT=str(port))


def check_progress(folder: JobFolder, task: int, restart: int) -> None:
    """End a job that is requeued again and again without getting further.

    Progress is what is left to do, so that it means the same for jobs that count all items and for those that count
    what is missing. Call it before the first status of this life is written.

    Raises:
        NoProgressError: this is at least the third restart in a row that found no less to do than the best before.
    """
    path = folder.restarts(task)
    if restart == 0:
        path.unlink(missing_ok=True)
        return
    seen = {"left": None, "stuck": 0} | (read_state(path) or {})
    status = read_state(folder.status(task)) or {}
    left = status["total"] - status["done"] if "total" in status and "done" in status else None
    if left is not None and (seen["left"] is None or left < seen["left"]):
        seen = {"left": left, "stuck": 0}
    else:
        seen = {"left": seen["left"], "stuck": seen["stuck"] + 1}
    write_json(path, seen)
    if seen["stuck"] >= MAX_STUCK_RESTARTS:
        left_now = "" if seen["left"] is None else f"{number(seen['left'])} {status.get('unit', '')}".strip()
        still = f"{left_now} left" if left_now else "nothing was ever reported"
        cause = f" (last: {status['message']})" if status.get("message") else ""
        raise NoProgressError(
            f"{folder.job}: {seen['stuck']} restarts without progress, {still}{cause}; "
            f"see {folder.log(task)}, mend the cause and launch it again"
        )


def other_launch(folder: JobFolder, place: Place) -> dict[str, Any] | None:
    """The lease of the first task where another launch, perhaps split otherwise, has it now."""
    first = read_state(folder.lease(0))
    return first if first and first.get("launch") != place.launch and is_alive(first) else None


def first_failure(folder: JobFolder, restart: int) -> dict[str, Any] | None:
    """Status of the rank that failed first in this life of a gang, or None."""
    failed = [s for s in folder.statuses() if s.get("state") == "failed" and s.get("restart") == restart]
    return min(failed, key=lambda s: s.get("heartbeat", 0.0), default=None)


class Heartbeat:
    """Renews the lease and the status file in a thread, also while the job is deep in a long step."""

    def __init__(self, task: Task, lease: Lease, every_s: float = HEARTBEAT_S):
        self.task, self.lease, self.every_s = task, lease, every_s
        self.lost = False
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)

    def __enter__(self) -> Heartbeat:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._end.wait(self.every_s):
            try:
                if not self.lease.beat():
                    self.lost = True
                    return
                self.task.write_status("running")
            except OSError as error:  # a full or absent file system: the job will meet it too, and say so with exit 1
                log.warning("heartbeat not written: %s", error)


def execute(spec: Spec, config: Config, place: Place, stop: Callable[[], bool], *, stderr: bool) -> int:
    """Run one task to its end. Returns its exit code; writes its log, lease and status.

    Faults that users and clusters cause are one line each, in the log and on stderr; a bug of ours is a traceback in
    the log and one line on stderr.
    """
    folder = JobFolder(config.run_dir, spec.job)
    # The writer of a gang is rank 0; the others only compute, and keep a log.
    writer = spec.kind == "array" or place.rank == 0
    lost: Callable[[], bool] = bool

    def stop_requested() -> bool:
        if lost():
            raise SetupError(f"{spec.job} of {config.run_dir}: the lease was lost to another writer; this one stops")
        return stop()

    task = Task(
        run_dir=config.run_dir,
        job=spec.job,
        rank=place.rank,
        world_size=place.world_size,
        local_rank=place.local_rank,
        restart=place.restart,
        launch=place.launch,
        writes=writer,
        stop_requested=stop_requested,
    )
    with task_logging(folder.log(place.rank), place.rank, stderr=stderr):
        held = False
        heartbeat: Heartbeat | None = None
        state, code, message = "done", 0, ""
        what = f"{spec.job} of {config.run_dir}" + (f", task {place.rank}" if spec.kind == "array" else "")
        lease = Lease(folder.lease(place.rank), what, place.launch, place.restart)
        try:
            wanted = resources(config, spec.job)
            if spec.kind == "gang" and wanted is not None and wanted.world_size != place.world_size:
                raise ConfigError(
                    f"{spec.job}.resources: {wanted.nodes} nodes x {wanted.tasks_per_node} tasks_per_node = "
                    f"{wanted.world_size} ranks expected, {place.world_size} were started"
                )
            if writer:
                if spec.job not in JOINED and (other := other_launch(folder, place)):
                    raise lease.refuse(other)
                lease.acquire()
                held = True
                check_progress(folder, place.rank, place.restart)
                task.write_status("running", process=identity())
                heartbeat = Heartbeat(task, lease)
                heartbeat.__enter__()
                lost = lambda: heartbeat is not None and heartbeat.lost  # noqa: E731
            else:
                folder.status(place.rank).unlink(missing_ok=True)  # told by a former life
            log.info(
                "start: %s, %s %d of %d, restart %d, pid %d",
                spec.job,
                "task" if spec.kind == "array" else "rank",
                place.rank,
                place.world_size,
                place.restart,
                os.getpid(),
            )
            started = time.monotonic()
            spec.load()(config, task)
            log.info("done in %.1f s", time.monotonic() - started)
        except Stopped as error:
            state, code, message = "stopped", error.exit_code, str(error)
            log.warning("stopped: %s", message)
            # srun ends a gang with TERM when a rank fails, and gives the highest exit code: this rank's 10 would hide
            # the cause, and have the job requeued for ever.
            cause = first_failure(folder, place.restart) if spec.kind == "gang" else None
            if cause is not None:
                state, code, message = "failed", cause.get("exit_code", 1), cause.get("message", "")
                log.error("was stopped because rank %s failed: %s", cause.get("task", "?"), message)
        except SoraHPCError as error:
            state, code, message = "failed", error.exit_code, str(error)
            for line in message.splitlines():
                log.error("%s", line)
        except KeyboardInterrupt:
            state, code, message = "failed", 130, "interrupted twice: left without saving"
            log.error("%s", message)
        except BaseException as error:
            state, code = "failed", 1
            message = f"{type(error).__name__}: {error}"
            if isinstance(error, SystemExit):
                message = f"end: the job called sys.exit({error.code!r})"
            unexpected = "unexpected "
            if _lacks_memory(error):
                code, unexpected = SetupError.exit_code, ""
                less = MEMORY.get(spec.job.removeprefix("profile-"), "what it has at a time")
                message = (
                    f"{spec.job}: the GPU's memory is too small: {_first_line(error)}; what was saved is kept. "
                    f"Take a GPU with more, or less of {less}"
                )
            log.error("%s%s (traceback in %s)", unexpected, message, folder.log(place.rank), exc_info=error)
        finally:
            if heartbeat is not None:
                heartbeat.__exit__()
        if not writer and state == "failed":
            task.writes = True  # rank 0 may never learn why it was ended
            task.write_status(state, message=message, exit_code=code)
        if held:
            try:
                # A lease that was lost has another writer: the status file is now theirs.
                if not (heartbeat is not None and heartbeat.lost):
                    task.write_status(state, message=message, exit_code=code)
            finally:
                lease.release()
        return code


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _lacks_memory(error: BaseException) -> bool:
    torch = sys.modules.get("torch")  # not imported for it: a job without has no GPU
    return torch is not None and isinstance(error, torch.OutOfMemoryError)


def raw_output(task: Task) -> str:
    """Where what this process writes past its log is found."""
    if "SORAHPC_LAUNCH" in os.environ:
        return str(task.folder.log(task.rank).with_suffix(".out"))
    return "the output of the Slurm job" if "SLURM_JOB_ID" in os.environ else "the lines above"


def main(argv: list[str] | None = None) -> int:
    """Entry of a task process. Returns the exit code."""
    stop = StopFlag().install()  # first of all: by default USR2 kills
    argv = sys.argv[1:] if argv is None else argv
    os.umask(0o077)
    told = ""
    task: Task | None = None  # to tell of a failure before the job's own begins
    try:
        if parent := os.environ.pop("SORAHPC_PARENT", ""):
            # Between the launcher and what Nsight runs is Nsight, which may outlive the one and not end the other.
            (die_after if nsight.INSIDE in os.environ else die_with)(int(parent))
        nsight.note()
        if len(argv) == 2 and argv[0] == "--spec":
            spec = Spec.read(Path(argv[1]))
            place = Place.of(os.environ, spec.kind, spec.job in JOINED)
            task = Task(Path(spec.config).parents[2], spec.job, place.rank, place.world_size, restart=place.restart)
            os.chdir(spec.cwd)
            config = load_config(spec.config)
        elif len(argv) >= 2 and not argv[0].startswith("-"):
            from sorahpc.cluster.launch import describe_job, make_spec, record

            job = describe_job(argv[0])
            config = load_config(argv[1], argv[2:])
            config.need(*job.sections)
            spec = make_spec(config, job)
            place = Place.of(os.environ, spec.kind, spec.job in JOINED)
            task = Task(config.run_dir, spec.job, place.rank, place.world_size, restart=place.restart)
            if place.rank == 0:
                record(config, job, place.launch, place.restart, place.world_size)
        else:
            raise ConfigError("usage: python -m sorahpc.cluster.worker --spec SPEC.json | JOB CONFIG [key=value ...]")
        if nsight_command := nsight.command(config, spec.job, place.rank, place.world_size, os.environ):
            code = nsight.run(nsight_command, stop, raw_output(task))
        else:
            wanted = resources(config, spec.job)
            cpus = os.environ.get("SLURM_CPUS_PER_TASK") or str(wanted.cpus_per_task if wanted else 1)
            os.environ.setdefault("OMP_NUM_THREADS", cpus)
            # A compute node has no network: what looks for one anyway fails at once, not after minutes of retries.
            os.environ.setdefault("HF_HUB_OFFLINE", "1")
            if spec.kind == "gang":
                export_gang(place, os.environ)
            # The local launcher shows a display of its own, and keeps what is written past the log.
            code = execute(spec, config, place, stop, stderr="SORAHPC_LAUNCH" not in os.environ)
    except SoraHPCError as error:
        for line in str(error).splitlines():
            print(f"sorahpc: {line}", file=sys.stderr)
        code, told = error.exit_code, str(error)
    except OSError as error:
        told = f"{error}; is the file system there, writable and not full?"
        print(f"sorahpc: {told}", file=sys.stderr)
        code = SetupError.exit_code
    with contextlib.suppress(OSError):  # that file system is perhaps the fault
        if told and task is not None and not other_launch(task.folder, place):  # whose the status file is
            task.write_status("failed", message=told, exit_code=code)
        nsight.note(code)
    ignore_stop_signals()
    return code


def end(code: int) -> NoReturn:
    """End this process.

    At once, where an error left it in a process group: Python would end that first, and NCCL may wait for ranks that
    wait for this one. Slurm and the local launcher end them as soon as this one is gone.
    """
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_initialized():
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    raise SystemExit(code)


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    end(main())
