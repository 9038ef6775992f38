"""How the verbs of a job start it and say what came of it."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from sorahpc.config import Config

ConfigArg = Annotated[str, typer.Argument(metavar="CONFIG", help="YAML file, or the name of a shipped one.")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Overrides of dotted keys.")]
ClusterOpt = Annotated[
    str | None, typer.Option("--cluster", help="Where to run: local, slurm, or a YAML file of your site.")
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the exact script; start and write nothing.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Wait = Annotated[bool, typer.Option("--wait", help="On Slurm: stay until the job has ended.")]
RunArg = Annotated[str, typer.Argument(metavar="RUN", help="Name of a run under runs/, or the path of its folder.")]
JobArg = Annotated[str | None, typer.Argument(metavar="[JOB]", help="One job of the run, such as train.")]

MAX_REJECTED_SHOWN = 10


def say(value: Any, text: str, as_json: bool) -> None:
    print(json.dumps(value, indent=1) if as_json else text)


def launch_job(job_name: str, config: str, overrides: list[str], cluster: str | None, **how: bool) -> int:
    from sorahpc.cluster.launch import describe_job, launch, plan, wait_for_slurm
    from sorahpc.configfile import load_config

    job = describe_job(job_name)
    loaded = load_config(config, overrides, cluster)
    loaded.need(*job.sections)
    if job.name == "profile-kernels":  # not after hours in a queue
        from sorahpc.profiling.results import check_baseline

        check_baseline(loaded.kernels, loaded.run_dir / "profile" / "kernels")
    if how["dry_run"]:
        planned = plan(loaded, job)
        say(planned, planned["script"].rstrip("\n"), how["as_json"])
        return 0
    code, job_id = launch(loaded, job)
    result: dict[str, Any] = {
        "job": job.name,
        "kind": loaded.cluster.kind,
        "run_dir": str(loaded.run_dir.absolute()),
        "job_id": job_id,
    }
    if job_id is not None and how["wait"]:
        code = wait_for_slurm(loaded, job, job_id, progress=True)
    finished = job_id is None or how["wait"]
    result["exit_code"] = code if finished else None
    text = f"{job.name}: {'done' if code == 0 else f'ended with exit code {code}'}; run folder {loaded.run_dir}"
    if not finished:
        text = f"{job.name}: submitted as Slurm job {job_id}; see `sorahpc status {loaded.run_dir}`"
    if finished and code == 0:
        number, lines = left_out(loaded, job.name)
        result |= number
        text = "\n".join([text, *lines])
    if code == 0 or how["as_json"]:
        say(result, text, how["as_json"])
    return code


def left_out(config: Config, job: str) -> tuple[dict[str, int], list[str]]:
    """What a finished job could not use or judge: its number as JSON, and lines of the first, with reasons."""
    if job == "caption":
        return _kept(config)
    if job == "profile-kernels":
        return _compared(config)
    if job in ("prepare", "encode"):
        return _rejected(config, job)
    return {}, []


def _rejected(config: Config, job: str) -> tuple[dict[str, int], list[str]]:
    """The videos that prepare or encode could not use."""
    from sorahpc.data.manifest import MANIFEST, REJECTED, read_manifest, shown

    path = config.run_dir / MANIFEST if job == "prepare" else config.cache_dir / REJECTED
    if not path.exists():
        return {}, []
    if job == "prepare":
        assert config.prepare is not None
        root = config.prepare.videos.absolute()
        rows = [(os.path.relpath(v.path, root), v.reason) for v in read_manifest(path) if not v.ok]
    else:
        rows = [(entry["source"], entry["reason"]) for entry in json.loads(path.read_text(encoding="utf-8"))]
    lines = [f"rejected {shown(name)}: {shown(reason)}" for name, reason in rows[:MAX_REJECTED_SHOWN]]
    if len(rows) > MAX_REJECTED_SHOWN:
        lines.append(f"and {len(rows) - MAX_REJECTED_SHOWN} more; see {path}")
    return {"rejected": len(rows)}, lines


def _kept(config: Config) -> tuple[dict[str, int], list[str]]:
    """The clips whose own caption stays, after caption: as `rejected`."""
    from sorahpc.data.captions import CAPTIONS, read_captions
    from sorahpc.data.manifest import shown

    path = config.run_dir / CAPTIONS
    rows = [row for row in (read_captions(path)[0] if path.exists() else []) if not row.caption]
    lines = [f"clip {shown(row.key)} keeps its caption: {shown(row.reason)}" for row in rows[:MAX_REJECTED_SHOWN]]
    if len(rows) > MAX_REJECTED_SHOWN:
        lines.append(f"and {len(rows) - MAX_REJECTED_SHOWN} more; see {path}")
    return {"kept": len(rows)}, lines


def _compared(config: Config) -> tuple[dict[str, int], list[str]]:
    """How much of the kernels was held against a baseline, where there is one."""
    from sorahpc.profiling.results import COMPARED
    from sorahpc.runs import JobFolder, read_json

    found = read_json(JobFolder(config.run_dir, "profile-kernels").path / COMPARED)
    if found is None:
        return {}, []
    line = f"{found['compared']} ops are no slower than kernels.baseline allows"
    if found["not_in_baseline"]:
        line += f"; {found['not_in_baseline']} have no counterpart in it and are held to nothing"
    return found, [line]
