"""From a config to running tasks: the job folder, and the choice between this process, this machine and Slurm.

Every launch writes what its tasks execute (resolved config, spec), what ran (commit and diff, installed packages) and
how it was started (script, ids) before anything starts. Never the environment: it may hold secrets.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sorahpc.cluster import nsight
from sorahpc.cluster.worker import Heartbeat, Place, Spec, execute, resources, section_of
from sorahpc.config import Config
from sorahpc.configfile import dump_config, load_config
from sorahpc.errors import ConfigError, SetupError, Stopped
from sorahpc.lease import Lease, identity, is_alive
from sorahpc.runs import JobFolder, Task, atomic_write, read_state, write_json

MAX_DIFF_BYTES = 16 << 20


@dataclass(frozen=True)
class Job:
    """A box of the pipeline: its name, ``array`` or ``gang``, and the config sections that it can't do without."""

    name: str
    kind: str
    sections: tuple[str, ...]
    help: str

    @property
    def module(self) -> str:
        return f"sorahpc.jobs.{section_of(self.name)}"

    @property
    def function(self) -> str:
        """`profile` of the module that it profiles, for a job that profiles another."""
        return "profile" if self.name.startswith("profile-") else "run"


JOBS = {
    job.name: job
    for job in (
        Job("prepare", "array", ("prepare",), "Folder of videos -> manifest."),
        Job("caption", "array", ("caption",), "Manifest -> detailed captions, by a language model."),
        Job("encode", "array", ("vae", "text"), "Manifest -> HDF5 latent cache."),
        Job("train", "gang", ("model", "train"), "Latent cache -> checkpoints."),
        Job("sample", "array", ("vae", "text", "sample"), "Checkpoint and prompts -> mp4 files."),
        Job("evaluate", "array", ("vae",), "Samples and VAE -> figures and clips for the report."),
        Job("train-vae", "gang", ("train_vae",), "Manifest -> an autoencoder of your own."),
        Job("profile-kernels", "array", (), "The ops beside their peers and this node's limits."),
        Job("profile-train", "gang", ("model", "train"), "Steps of training under a profiler."),
        Job("profile-sample", "array", ("vae", "text", "sample"), "Steps of sampling under a profiler."),
    )
}
PIPELINE = ("prepare", "caption", "encode", "train", "sample")


def describe_job(name: str) -> Job:
    if name not in JOBS:
        raise ConfigError(f"job: expected one of {', '.join(JOBS)}, found {name!r}")
    return JOBS[name]


def num_tasks(config: Config, job: Job) -> int:
    """Processes that a launch starts: the world size of a gang, the tasks of an array."""
    wanted = resources(config, job.name)
    return 1 if wanted is None else wanted.world_size if job.kind == "gang" else wanted.tasks


def gpus_per_task(config: Config, job: Job) -> int:
    """GPUs that a task is given: none where it has no use for one, since others wait for them."""
    asks_a_server = job.name == "caption" and config.caption is not None and config.caption.endpoint is not None
    return 0 if job.name == "prepare" or asks_a_server else config.cluster.gpus_per_task


def folder_of(config: Config, job: Job) -> JobFolder:
    return JobFolder(config.run_dir, job.name)


def make_spec(config: Config, job: Job) -> Spec:
    path = folder_of(config, job).config.absolute()
    spec = Spec(job.name, job.module, job.function, job.kind, str(path), os.getcwd())
    spec.check("spec")
    return spec


def python_of(config: Config) -> str:
    return config.cluster.python or sys.executable


def worker_command(config: Config, job: Job) -> list[str]:
    """What every task executes."""
    spec = folder_of(config, job).spec.absolute()
    return [python_of(config), "-u", "-m", "sorahpc.cluster.worker", "--spec", str(spec)]


def check_free(folder: JobFolder) -> None:
    """Refuse a job that somebody runs, or that waits in Slurm's queue. Raises SetupError that names the holder."""
    from sorahpc.cluster.status import queue_of

    launch = read_state(folder.launch) or {}
    what = f"{folder.job} of {folder.run_dir}"
    if launch.get("kind") == "slurm" and launch.get("job_id"):
        queue = queue_of([str(launch["job_id"])])
        entry = queue.get(str(launch["job_id"])) if queue is not None else None
        if entry:
            raise SetupError(
                f"{what}: is held by Slurm job {launch['job_id']} ({entry['state']}); wait for it, or end it with "
                f"`sorahpc cancel {folder.run_dir} {folder.job}`"
            )
    for path in sorted(folder.lease("x").parent.glob("[0-9]*.json")):
        holder = read_state(path)
        if holder and is_alive(holder):
            raise Lease(path, what, "").refuse(holder)


def write_job_folder(config: Config, job: Job, script: str) -> None:
    """Everything that a launch leaves behind, except ``launch.json``: the caller knows the ids only later."""
    folder = folder_of(config, job)
    folder.path.mkdir(parents=True, exist_ok=True)
    for kind in ("status", "restarts", "lease"):  # of a former launch; check_free has seen that nobody uses them
        for path in (folder.path / kind).glob("[0-9]*.json"):
            path.unlink(missing_ok=True)
    write_what_ran(config, job)
    make_spec(config, job).write(folder.spec)
    atomic_write(folder.submit, script)


def write_what_ran(config: Config, job: Job) -> None:
    folder = folder_of(config, job)
    atomic_write(folder.config, dump_config(config))
    names = {f"{d.metadata['Name']}=={d.version}" for d in importlib.metadata.distributions()}
    lines = [f"python=={platform.python_version()}", f"platform=={platform.platform()}", *sorted(names, key=str.lower)]
    atomic_write(folder.path / "env.txt", "\n".join(lines) + "\n", durable=False)
    commit, diff = code_state()
    atomic_write(folder.path / "code" / "commit.txt", commit + "\n", durable=False)
    if diff:
        atomic_write(folder.path / "code" / "diff.patch", diff, durable=False)
    else:
        (folder.path / "code" / "diff.patch").unlink(missing_ok=True)


def code_state() -> tuple[str, bytes]:
    """Commit and uncommitted changes of the checkout that this package runs from; its version where it is installed."""
    root = Path(__file__).resolve().parents[2]

    def git(*args: str) -> bytes:
        command = ["git", "-C", str(root), *args]
        return subprocess.run(command, capture_output=True, timeout=30, check=True).stdout

    if (root / ".git").exists():
        try:
            return git("rev-parse", "HEAD").decode().strip(), git("diff", "HEAD")[:MAX_DIFF_BYTES]
        except (OSError, subprocess.SubprocessError) as error:
            return f"unknown: {str(error).splitlines()[0]}", b""
    try:
        return f"sorahpc=={importlib.metadata.version('sorahpc')}", b""
    except importlib.metadata.PackageNotFoundError:
        return "unknown: neither a checkout nor an installed package", b""


def write_launch(folder: JobFolder, kind: str, **values: Any) -> None:
    write_json(folder.launch, {"kind": kind, "job": folder.job, "time": time.time(), "cwd": os.getcwd(), **values})


def record(config: Config, job: Job, launch: str, restart: int, tasks: int) -> None:
    """The job folder of a task that was not started by us but by ``sbatch slurm/<job>.sbatch`` or by hand."""
    if restart:
        return  # as written by its first life
    folder = folder_of(config, job)
    for path in sorted(folder.lease("x").parent.glob("[0-9]*.json")):
        holder = read_state(path)
        if holder and holder.get("launch") != launch and is_alive(holder):
            raise Lease(path, f"{job.name} of {config.run_dir}", launch).refuse(holder)
    folder.path.mkdir(parents=True, exist_ok=True)
    write_what_ran(config, job)
    make_spec(config, job).write(folder.spec)
    if launch.startswith("slurm:"):
        write_launch(folder, "slurm", job_id=launch.removeprefix("slurm:"), tasks=tasks)
    else:
        write_launch(folder, "local", launcher=identity(), tasks=tasks)


def plan(config: Config, job: Job, after: list[str] | None = None) -> dict[str, Any]:
    """What a launch would do, as plain data: kind, script, tasks. Nothing is written or started."""
    if config.cluster.kind == "slurm":
        from sorahpc.cluster import submit

        script = submit.script(config, job, after or [])
    else:
        script = local_script(config, job)
    return {
        "job": job.name,
        "kind": config.cluster.kind,
        "run_dir": str(config.run_dir.absolute()),
        "tasks": 1 if config.cluster.kind == "inline" else num_tasks(config, job),
        "script": script,
    }


def local_script(config: Config, job: Job) -> str:
    """What the local launcher does, as a script that does the same by hand."""
    tasks = 1 if config.cluster.kind == "inline" else num_tasks(config, job)
    lines = ["#!/bin/bash", f"cd {shlex.quote(os.getcwd())}"]
    lines += [f"export {key}={shlex.quote(value)}" for key, value in config.cluster.env.items()]
    command = shlex.join(worker_command(config, job))
    if tasks == 1:
        return "\n".join([*lines, command, ""])
    lines += [f"export WORLD_SIZE={tasks}"]
    lines += [f"RANK={i} LOCAL_RANK={i if job.kind == 'gang' else 0} {command} &" for i in range(tasks)]
    return "\n".join([*lines, "wait", ""])


def launch(
    config: Config, job: Job, *, after: list[str] | None = None, progress: bool = True
) -> tuple[int, str | None]:
    """Start a job where ``cluster.kind`` says; wait for it, except on Slurm.

    Args:
        after: Slurm job ids that must end well first.
        progress: show the progress of what is waited for, on stderr.

    Returns:
        (exit code, Slurm job id): the worst exit code of the tasks, or 0 and the id of what was submitted.

    Raises:
        ConfigError: a section that the job needs is missing.
        SetupError: somebody holds the job, or a program or folder is missing.
    """
    config.need(*job.sections)
    kind, folder = config.cluster.kind, folder_of(config, job)
    script = plan(config, job, after)["script"]
    if kind == "inline" and job.kind == "gang" and num_tasks(config, job) != 1:
        raise ConfigError(
            f"cluster.kind: inline is one rank, {job.name}.resources ask for {num_tasks(config, job)}; "
            "use local or slurm"
        )
    try:
        folder.path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SetupError(f"{folder.path}: can't be made: {error.strerror}; set runs_dir to a writable folder") from None
    mine = f"launcher:{identity()['machine']}:{os.getpid()}:{time.time_ns()}"
    lease = Lease(folder.lease("launch"), f"{job.name} of {config.run_dir}", mine).acquire()
    try:
        # The lease of a launcher that waits for hours needs its heartbeat, for those who look from another machine.
        with Heartbeat(Task(config.run_dir, job.name, writes=False), lease):
            check_free(folder)
            write_job_folder(config, job, script)
            if kind == "slurm":
                from sorahpc.cluster import submit

                job_id = submit.submit(folder, script)
                write_launch(folder, "slurm", job_id=job_id, tasks=num_tasks(config, job), after=after or [])
                return 0, job_id
            write_launch(folder, kind, launcher=identity(), tasks=1 if kind == "inline" else num_tasks(config, job))
            if kind == "inline":
                return run_inline(config, job, mine, progress), None
            from sorahpc.cluster.local import run_local

            return run_local(config, job, mine, progress), None
    finally:
        lease.release()


def run_inline(config: Config, job: Job, launch_id: str, progress: bool) -> int:
    """The job in this process, as the one task of one. Prints how it ended, unless well, as the local launcher does."""
    import contextlib

    if nsight.command(config, job.name, 0, 1, os.environ):
        raise ConfigError(f"profile.tool: {config.profile.tool} starts a process of its own; use cluster kind local")

    from sorahpc.cluster.local import log_sizes, tell_end
    from sorahpc.cluster.signals import StopFlag
    from sorahpc.cluster.worker import export_gang
    from sorahpc.log import Progress

    place = Place(launch=launch_id)
    before = dict(os.environ)
    os.environ.update(config.cluster.env)
    if job.kind == "gang":
        for name in [n for n in os.environ if n.startswith("SLURM_")]:
            del os.environ[name]  # this process may sit inside an allocation; its ranks are none of ours
        export_gang(place, os.environ)
    stop = StopFlag().install()
    folder = folder_of(config, job)
    sizes = log_sizes(folder)
    try:
        with Progress(folder) if progress else contextlib.nullcontext():
            loaded = load_config(folder.config)
            code = execute(make_spec(config, job), loaded, place, stop, stderr=False)
        if code:
            tell_end(folder, job.kind, {0: code}, [] if code == Stopped.exit_code else [0], sizes, sys.stderr)
        return 130 if code == Stopped.exit_code and stop.signal == signal.SIGINT else code
    finally:
        stop.restore()
        os.environ.clear()
        os.environ.update(before)


def pipeline_jobs(config: Config) -> list[Job]:
    """The jobs of the pipeline that this config has sections for, in order. Raises ConfigError where one can't run."""
    for_clips = config.caption if config.caption and config.caption.clips else None  # else it is for prompts only
    has: dict[str, Any] = {"prepare": config.prepare, "caption": for_clips, "encode": config.vae}
    has |= {"train": config.train, "sample": config.sample}
    jobs = [JOBS[name] for name in PIPELINE if has[name] is not None]
    if not jobs:
        raise ConfigError("pipeline: expected at least one of the sections prepare, vae, train, sample; found none")
    needed = [(section, job.name) for job in jobs for section in job.sections]
    missing = [f"{s}: missing; `{job}` needs the section `{s}:`" for s, job in needed if getattr(config, s) is None]
    if missing:
        raise ConfigError("\n".join(missing))
    return jobs


def queued(config: Config, job: Job) -> str | None:
    """Slurm job id of a job that waits or runs there now."""
    from sorahpc.cluster.status import queue_of

    job_id = (read_state(folder_of(config, job).launch) or {}).get("job_id")
    return str(job_id) if job_id and str(job_id) in (queue_of([str(job_id)]) or {}) else None


def wait_for_slurm(config: Config, job: Job, job_id: str, progress: bool) -> int:
    """Stay until a Slurm job has left the queue, through requeues. Returns its exit code, as `launch` does.

    Slurm's controller is asked once in 30 s, and more often only when all tasks have told that they ended.
    """
    import contextlib

    from sorahpc.cluster.status import ACTIVE, job_status, queue_of
    from sorahpc.log import Progress

    folder = folder_of(config, job)
    asked = -1e9
    with Progress(folder) if progress else contextlib.nullcontext():
        while True:
            told = job_status(folder, {})
            ended = told["state"] not in ACTIVE and sum(told["tasks"].values()) > 0
            if time.monotonic() - asked >= (2.0 if ended else 30.0):
                asked = time.monotonic()
                queue = queue_of([job_id])
                if queue is not None and job_id not in queue:
                    break
            time.sleep(1.0)
    status = job_status(folder, queue)
    if status["message"]:
        for line in str(status["message"]).splitlines():
            print(f"sorahpc: {job.name}: {line}", file=sys.stderr)
    if status["state"] == "done":
        return 0
    return int(status["exit_code"] or 1)
