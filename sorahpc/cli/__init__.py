"""The command line. Heavy modules are imported by the verb that needs them: --help and status start at once."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sorahpc.cli import cache, config, data, profile
from sorahpc.cli.launching import (
    AsJson,
    ClusterOpt,
    ConfigArg,
    DryRun,
    JobArg,
    Overrides,
    RunArg,
    Wait,
    launch_job,
    left_out,
    say,
)
from sorahpc.errors import ConfigError, SetupError, SoraHPCError

if TYPE_CHECKING:
    from sorahpc.config import Config

app = typer.Typer(
    name="sorahpc",
    help="Train and sample video diffusion transformers, on one machine or on a Slurm cluster.",
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,  # rich costs 0.1 s of every start
    pretty_exceptions_enable=False,
)
app.add_typer(cache.app, name="cache")
app.add_typer(config.app, name="config")
app.add_typer(data.app, name="data")
app.add_typer(profile.app, name="profile")


@app.command()
def prepare(
    config: ConfigArg, overrides: Overrides = None, cluster: ClusterOpt = None, dry_run: DryRun = False,
    as_json: AsJson = False, wait: Wait = False,
) -> int:  # fmt: skip
    """Folder of videos -> manifest."""
    return launch_job("prepare", config, overrides or [], cluster, dry_run=dry_run, as_json=as_json, wait=wait)


@app.command()
def caption(
    config: ConfigArg, overrides: Overrides = None, cluster: ClusterOpt = None, dry_run: DryRun = False,
    as_json: AsJson = False, wait: Wait = False,
) -> int:  # fmt: skip
    """Manifest -> detailed captions, by a language model."""
    return launch_job("caption", config, overrides or [], cluster, dry_run=dry_run, as_json=as_json, wait=wait)


@app.command()
def encode(
    config: ConfigArg, overrides: Overrides = None, cluster: ClusterOpt = None, dry_run: DryRun = False,
    as_json: AsJson = False, wait: Wait = False,
) -> int:  # fmt: skip
    """Manifest -> HDF5 latent cache."""
    return launch_job("encode", config, overrides or [], cluster, dry_run=dry_run, as_json=as_json, wait=wait)


@app.command()
def train(
    config: ConfigArg, overrides: Overrides = None, cluster: ClusterOpt = None, dry_run: DryRun = False,
    as_json: AsJson = False, wait: Wait = False,
) -> int:  # fmt: skip
    """Latent cache -> checkpoints."""
    return launch_job("train", config, overrides or [], cluster, dry_run=dry_run, as_json=as_json, wait=wait)


@app.command()
def sample(
    config: ConfigArg, overrides: Overrides = None, cluster: ClusterOpt = None, dry_run: DryRun = False,
    as_json: AsJson = False, wait: Wait = False,
) -> int:  # fmt: skip
    """Checkpoint and prompts -> mp4 files."""
    return launch_job("sample", config, overrides or [], cluster, dry_run=dry_run, as_json=as_json, wait=wait)


@app.command()
def evaluate(
    config: ConfigArg, overrides: Overrides = None, cluster: ClusterOpt = None, dry_run: DryRun = False,
    as_json: AsJson = False, wait: Wait = False,
) -> int:  # fmt: skip
    """Samples and VAE -> figures and clips for the report."""
    return launch_job("evaluate", config, overrides or [], cluster, dry_run=dry_run, as_json=as_json, wait=wait)


@app.command("train-vae")
def train_vae(
    config: ConfigArg, overrides: Overrides = None, cluster: ClusterOpt = None, dry_run: DryRun = False,
    as_json: AsJson = False, wait: Wait = False,
) -> int:  # fmt: skip
    """Manifest -> an autoencoder of your own, from scratch or fine-tuned."""
    return launch_job("train-vae", config, overrides or [], cluster, dry_run=dry_run, as_json=as_json, wait=wait)


@app.command()
def pipeline(
    config: ConfigArg, overrides: Overrides = None, cluster: ClusterOpt = None, dry_run: DryRun = False,
    as_json: AsJson = False, wait: Wait = False,
) -> int:  # fmt: skip
    """prepare, caption (if asked for), encode, train and sample, each after the other; again: only what is missing."""
    from sorahpc.configfile import load_config

    loaded = load_config(config, overrides or [], cluster)
    if dry_run:
        return _pipeline_plan(loaded, as_json)
    if loaded.cluster.kind == "slurm":
        return _pipeline_slurm(loaded, as_json, wait)
    return _pipeline_here(loaded, as_json)


def _pipeline_plan(config: Config, as_json: bool) -> int:
    from sorahpc.cluster.launch import pipeline_jobs, plan

    plans, after = [], list[str]()
    for job in pipeline_jobs(config):
        plans.append(plan(config, job, after))
        after = [f"{job.name.upper()}_JOB_ID"]  # known only once it is submitted
    say(plans, "\n".join(p["script"] for p in plans).rstrip("\n"), as_json)
    return 0


def _pipeline_here(config: Config, as_json: bool) -> int:
    from sorahpc.cluster.launch import launch, pipeline_jobs

    results: list[dict[str, Any]] = []
    for job in pipeline_jobs(config):
        code, _ = launch(config, job)
        results.append({"job": job.name, "exit_code": code})
        if code:
            break
        number, lines = left_out(config, job.name)
        results[-1] |= number
        if not as_json:
            print("".join(f"{job.name}: {line}\n" for line in lines), end="", flush=True)
    code = results[-1]["exit_code"]
    if as_json:
        say({"run_dir": str(config.run_dir.absolute()), "jobs": results, "exit_code": code}, "", True)
    elif code == 0:
        print(f"pipeline: done; run folder {config.run_dir}")
    return int(code)


def _pipeline_slurm(config: Config, as_json: bool, wait: bool) -> int:
    from sorahpc.cluster.launch import launch, pipeline_jobs, queued, wait_for_slurm

    results: list[dict[str, Any]] = []
    jobs, after = pipeline_jobs(config), list[str]()
    for job in jobs:
        # What an earlier pipeline has in the queue stays there, and what comes after it waits for it.
        job_id = queued(config, job)
        results.append({"job": job.name, "already_queued": job_id is not None})
        if job_id is None:
            _, job_id = launch(config, job, after=after)
            assert job_id is not None
        results[-1]["job_id"] = job_id
        after = [job_id]
        if not as_json:
            print(f"{job.name}: {'already in the queue' if results[-1]['already_queued'] else 'submitted'} as {job_id}")
    code = 0
    if wait:
        for job, result in zip(jobs, results, strict=True):
            code = result["exit_code"] = wait_for_slurm(config, job, result["job_id"], progress=not as_json)
            if code:
                break
    value = {"run_dir": str(config.run_dir.absolute()), "jobs": results, "exit_code": code if wait else None}
    say(value, f"see `sorahpc status {config.run_dir}`", as_json)
    return code


@app.command()
def fetch(
    what: Annotated[
        str | None, typer.Argument(metavar="[NAME]", help="Such as wan-2.1 or owner/repository/folder@revision.")
    ] = None,
    store: Annotated[
        Path | None, typer.Option("--store", help="Folder; by default $SORAHPC_STORE or ~/.cache/sorahpc.")
    ] = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="Read what is there and hold it against its hashes.")
    ] = False,
    as_json: AsJson = False,
) -> int:
    """Weights into the store, on a machine with a network; without a name, what can be named and what is there."""
    from sorahpc import store as weights

    place = store or weights.store_dir()
    if verify:
        results = weights.verify(what, place)
        lines = [f"{r['name']}: ok, {r['files']} files, {r['bytes']} bytes, revision {r['revision']}" for r in results]
        say(results, "\n".join(lines) or f"{place}: nothing in it", as_json)
    elif what is None:
        listed = {n: (place / n / weights.MANIFEST).is_file() for n in sorted(weights.NAMES)}
        lines = [f"{n}: {weights.NAMES[n].kind}{', in the store' if there else ''}" for n, there in listed.items()]
        say({"store": str(place), "names": listed}, "\n".join(lines), as_json)
    else:
        result = weights.fetch(what, place)
        said = "fetched" if result["fetched"] else "already there"
        say(result, f"{what}: {said}, revision {result['revision']}; {result['path']}", as_json)
    return 0


@app.command()
def demo(overrides: Overrides = None, cluster: ClusterOpt = None) -> int:
    """The whole pipeline on the toy world, and its report; again: only what is missing."""
    from sorahpc.demo import main as run_demo

    return run_demo("demo", overrides or [], cluster)


@app.command()
def report(run: RunArg, as_json: AsJson = False) -> int:
    """One self-contained HTML page of a run: its clips, charts and figures."""
    from sorahpc.cluster.status import find_run
    from sorahpc.report import write_report

    path = write_report(find_run(run))
    say({"path": str(path.absolute())}, f"report: {path.absolute()}", as_json)
    return 0


@app.command()
def status(run: RunArg, as_json: AsJson = False) -> int:
    """How far the jobs of a run are."""
    from sorahpc.cluster.status import find_run, run_status, status_table

    value = run_status(find_run(run))
    say(value, status_table(value), as_json)
    return 0


@app.command()
def logs(
    run: RunArg,
    job: JobArg = None,
    rank: Annotated[int, typer.Option("--rank", min=0, help="Rank of a gang, or task of an array.")] = 0,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the job ends.")] = False,
    as_json: AsJson = False,
) -> int:
    """The log of a job, by default of the one that was launched last."""
    from sorahpc.cluster.status import find_jobs, find_run, log_lines, write_text

    folder = find_jobs(find_run(run), job)[-1:]
    if not folder:
        raise ConfigError(f"{run}: no job was launched yet")
    if as_json:
        if follow:
            raise ConfigError("--json: has no meaning with --follow")
        lines = "".join(log_lines(folder[0], rank, False)).splitlines()
        say({"job": folder[0].job, "rank": rank, "path": str(folder[0].log(rank)), "lines": lines}, "", True)
    else:
        write_text(log_lines(folder[0], rank, follow))
    return 0


@app.command()
def cancel(run: RunArg, job: JobArg = None, as_json: AsJson = False) -> int:
    """End the jobs of a run (or one), here or on Slurm. They save their progress where they can."""
    from sorahpc.cluster.status import cancel_job, find_jobs, find_run

    folders = find_jobs(find_run(run), job)
    said = {folder.job: cancel_job(folder) for folder in reversed(folders)}  # the last first: it waits for the others
    say(said, "\n".join(said.values()), as_json)
    return 0


def main(argv: list[str] | None = None) -> int:
    """Entry point. Returns the exit code; every expected fault is one line on stderr, without a traceback."""
    os.umask(0o077)
    try:
        code = typer.main.get_command(app).main(argv, prog_name="sorahpc", standalone_mode=False)
        sys.stdout.flush()
        return int(code or 0)
    except SoraHPCError as error:
        _complain(str(error))
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # `sorahpc logs x | head`; the signal itself would also end a job that is waited for
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:
        _complain(f"{error}; is the file system there, writable and not full?")
        return SetupError.exit_code
    except Exception as error:
        if type(error).__name__ == "Abort":  # click's Ctrl-C
            return 130
        if hasattr(error, "format_message"):  # click's UsageError and its kin
            _complain(f"{error.format_message()}; see `sorahpc --help`")
            return ConfigError.exit_code
        if os.environ.get("SORAHPC_TRACEBACK"):
            raise
        text = " ".join(str(error).split())
        _complain(f"bug in sorahpc: {type(error).__name__}: {text} (SORAHPC_TRACEBACK=1 shows where)")
        return 1


def _complain(message: str) -> None:
    for line in message.splitlines() or [""]:
        print(f"sorahpc: {line}", file=sys.stderr)
