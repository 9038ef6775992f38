"""`profile.tool: nsys` and `ncu`: a chosen rank of a profile job starts itself again as what Nsight runs."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import IO

from sorahpc.cluster.signals import StopFlag, die_with, ignore_stop_signals
from sorahpc.config import Config
from sorahpc.errors import ConfigError, SetupError
from sorahpc.runs import read_json, write_json

INSIDE = "SORAHPC_NSIGHT"  # set in the environment of what Nsight runs: a file for `note`
POLL_S = 0.1


def command(config: Config, job: str, rank: int, world_size: int, env: Mapping[str, str]) -> list[str] | None:
    """What this process has to `run`, or None where it goes on as it is.

    The job marks with cudaProfilerStart and -Stop what is recorded, and names its ranges by NVTX.

    Raises:
        ConfigError: ncu for ranks that wait for each other. SetupError: the tool is not on this node.
    """
    how = config.profile
    chosen = job == "profile-sample" or (job == "profile-train" and rank in how.ranks)
    if not chosen or how.tool == "torch" or INSIDE in env:
        return None
    if how.tool == "ncu" and world_size > 1:
        raise ConfigError(
            f"profile.tool: ncu runs each kernel several times, and the {world_size} ranks of this job would wait for "
            "each other for ever; use nsys, or one rank"
        )
    tool = shutil.which(how.tool)
    if tool is None:
        raise SetupError(
            f"{how.tool}: not found on this node; load its module in slurm/env.sh, or use profile.tool=torch"
        )
    out = report_path(config, job, rank)
    out.parent.mkdir(parents=True, exist_ok=True)
    options = {
        "nsys": [
            "profile", "--trace=cuda,nvtx,osrt", "--sample=none", "--capture-range=cudaProfilerApi",
            "--capture-range-end=stop", "--force-overwrite=true", f"--output={out}",
        ],
        "ncu": [
            "--profile-from-start=off", "--set=basic", "--nvtx", "--target-processes=all", "--force-overwrite",
            f"--export={out}",
        ],
    }  # fmt: skip
    return [tool, *options[how.tool], sys.executable, "-u", "-m", "sorahpc.cluster.worker", *sys.argv[1:]]


def warning(config: Config, job: str, gpus: list[str]) -> str:
    """What to tell whoever launches a job on this machine, with these GPUs, before it starts; empty: nothing."""
    tool = config.profile.tool
    if gpus or tool == "torch" or job not in ("profile-train", "profile-sample"):
        return ""
    return f"profile.tool: {tool} records a GPU, and this machine has none: no report will come; use profile.tool=torch"


def report_path(config: Config, job: str, rank: int) -> Path:
    """Without the suffix, which the tool adds: .nsys-rep or .ncu-rep."""
    name = f"{config.profile.tool}_{socket.gethostname()}_rank{rank}"
    return (config.run_dir / "profile" / job.removeprefix("profile-") / name).absolute()


def run(command: list[str], stop: StopFlag, output: str) -> int:
    """Run `command` to its end, its output passed on to stderr. Returns the exit code of the task inside.

    The task is a child of a child, and the tool may end without having started it, fail after it, or hide its exit
    code: the task notes its process id and its exit code in a file that the environment names (`note`). It gets the
    stop signals through this process, also where the tool keeps them to itself, and does not outlive it.

    Args:
        stop: which has the stop signals of this process.
        output: where the output goes, for the message.

    Raises:
        SetupError: the tool failed, in its own words.
    """
    tool, me = Path(command[0]).name, os.getpid()

    def prepare() -> None:
        die_with(me)
        ignore_stop_signals()  # Slurm sends them to every process; the task takes them over again

    with tempfile.TemporaryDirectory() as folder:
        notes = Path(folder) / "task.json"
        try:
            process = subprocess.Popen(
                command,
                env={**os.environ, INSIDE: str(notes), "SORAHPC_PARENT": str(me)},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                preexec_fn=prepare,
            )
        except OSError as error:
            raise SetupError(
                f"{command[0]}: can't be run: {error.strerror}; mend it, or use profile.tool=torch"
            ) from None
        lines: deque[str] = deque(maxlen=1)
        reader = threading.Thread(target=_pass_on, args=(process.stdout, lines), daemon=True)
        reader.start()
        told = False
        try:
            while (code := _ended(process)) is None:
                task = read_json(notes)
                if task and task.get("exit_code") is None and stop() and not told:
                    told = True
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(task["pid"], signal.SIGTERM)
        except KeyboardInterrupt:  # the second: tool and task end with this process
            return 130
        reader.join(timeout=2.0)  # a daemon of the tool may keep the pipe open
        task = read_json(notes) or {}
    inside = task.get("exit_code")
    if inside or (inside == 0 and code == 0):
        return int(inside)
    when = "without having run the job" if not task else "while the job ran" if inside is None else "after the job"
    how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit {code}"
    said = lines[0] if lines else "no word"
    raise SetupError(f"{tool}: {how} {when}: {said}; see {output} and mend the cause, or use profile.tool=torch")


def note(exit_code: int | None = None) -> None:
    """In the task: tell `run` that it has begun, or how it ended. Does nothing where no tool runs it."""
    if INSIDE in os.environ:
        write_json(Path(os.environ[INSIDE]), {"pid": os.getpid(), "exit_code": exit_code}, durable=False)


def _ended(process: subprocess.Popen[bytes]) -> int | None:
    try:
        return process.wait(POLL_S)
    except subprocess.TimeoutExpired:
        return None


def _pass_on(stream: IO[bytes], last: deque[str]) -> None:
    """Write what comes to stderr, and keep the last line that is not empty."""
    for line in stream:
        sys.stderr.buffer.write(line)
        sys.stderr.buffer.flush()
        if line.strip():
            last.append(line.decode(errors="replace").strip())
