"""The only file that imports submitit: it writes the sbatch script, and knows how to hand it over.

It does not supervise. What the tasks execute is our worker with the path of a spec, not submitit's pickle: the state of
a job is in its run folder, and the script can be read, kept and submitted again by hand.
"""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

from submitit.slurm.slurm import SlurmExecutor

from sorahpc.cluster.launch import Job, folder_of, gpus_per_task, num_tasks, worker_command
from sorahpc.cluster.worker import resources
from sorahpc.config import Config, shipped_dir
from sorahpc.errors import ConfigError, SetupError
from sorahpc.runs import JobFolder

SUBMIT_TIMEOUT_S = 120.0
SRUN_ARGS = ("--kill-on-bad-exit=1", "--wait=60")


class _Executor(SlurmExecutor):
    """submitit's Slurm executor with our worker as its payload; it also writes scripts where Slurm is not installed."""

    def __init__(self, folder: Path, payload: list[str]):
        super().__init__(folder)
        self.payload = payload

    @classmethod
    def affinity(cls) -> int:
        return 2

    @property
    def _submitit_command_str(self) -> str:
        return shlex.join(self.payload)

    def text(self) -> str:
        return self._make_submission_file_text(self._submitit_command_str, uid="")


def env_sh() -> list[str]:
    """The lines of slurm/env.sh, from the checkout or the installed package."""
    path = shipped_dir().parent / "slurm" / "env.sh"
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise SetupError(f"{path}: can't be read: {error.strerror}; reinstall sorahpc") from None


def check_folder(path: Path) -> None:
    """Slurm expands % and \\ in the names of output files, and a script has lines: such run folders are refused."""
    text = str(path)
    bad = sorted({c for c in text if c in "%\\" or not c.isprintable()})
    if bad:
        raise ConfigError(f"runs_dir: a path without {' '.join(map(repr, bad))} expected for Slurm, found {text!r}")


def parameters(config: Config, job: Job, after: list[str]) -> dict[str, Any]:
    """What is asked of Slurm for a job, in submitit's words.

    Args:
        after: job ids (or, for a display, names) that must end well before it starts.
    """
    cluster, wanted = config.cluster, resources(config, job.name)
    gang, tasks = job.kind == "gang", num_tasks(config, job)
    per_node = wanted.tasks_per_node if gang else 1
    extra: dict[str, Any] = {"requeue": True, "signal": f"USR2@{cluster.signal_lead_s}"}
    if cluster.reservation:
        extra["reservation"] = cluster.reservation
    if after:
        extra["kill-on-invalid-dep"] = "yes"  # else a job whose input never came waits for ever
    setup = [*env_sh(), *(f"export {key}={shlex.quote(value)}" for key, value in cluster.env.items())]
    values: dict[str, Any] = {
        "job_name": f"{config.run}-{job.name}",
        "comment": f"sorahpc:{config.run}:{job.name}",
        "nodes": wanted.nodes if gang else 1,
        "ntasks_per_node": per_node,
        "cpus_per_task": wanted.cpus_per_task,
        "time": wanted.time_min,
        "mem": None if wanted.mem_gb is None else f"{max(1, round(wanted.mem_gb * 1024))}M",
        "gpus_per_node": gpus_per_task(config, job) * per_node or None,
        "partition": cluster.partition,
        "account": cluster.account,
        "qos": cluster.qos,
        "constraint": cluster.constraint,
        "exclude": cluster.exclude,
        "nodelist": cluster.nodelist,
        "dependency": "afterok:" + ":".join(after) if after else None,
        "array_parallelism": cluster.max_array_parallel,
        "map_count": tasks if not gang and tasks > 1 else None,
        "wckey": None,
        "setup": setup,
        "srun_args": list(SRUN_ARGS),
        "stderr_to_stdout": True,
        "additional_parameters": extra,
    }
    return {k: v for k, v in values.items() if v is not None or k == "wckey"}


def script(config: Config, job: Job, after: list[str]) -> str:
    """The exact sbatch script of a job. Pure: nothing is written, Slurm need not be there."""
    folder = folder_of(config, job).path.absolute()
    check_folder(folder)
    payload = worker_command(config, job)
    for word in payload:
        if not word.isprintable():
            raise ConfigError(f"cluster.python: a path without control characters expected, found {word!r}")
    executor = _Executor(folder / "slurm", payload)
    values = parameters(config, job, after)
    count = values.pop("map_count", None)
    executor.update_parameters(**values)
    if count is not None:
        executor.parameters["map_count"] = count  # as submitit itself does for its arrays
    return executor.text() + "\n"


def submit(folder: JobFolder, text: str) -> str:
    """Hand the job folder's script to sbatch. Returns the job id. Raises SetupError with sbatch's own reason."""
    if shutil.which("sbatch") is None:
        raise SetupError("sbatch: not found; run this on a login node of the cluster, or use --cluster local")
    (folder.path / "slurm").mkdir(exist_ok=True)  # Slurm writes the tasks' raw output here
    command = ["sbatch", str(folder.submit.absolute())]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SUBMIT_TIMEOUT_S)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise SetupError(f"sbatch: {error}; before trying again see in `squeue --me` that it isn't there") from None
    if done.returncode != 0:
        reason = " ".join(re.sub(r"^sbatch: (error: )?", "", line) for line in done.stderr.splitlines())
        raise SetupError(f"sbatch refused the job: {reason or 'no reason given'}; its script is {folder.submit}")
    return str(SlurmExecutor._get_job_id_from_submission_command(done.stdout))
