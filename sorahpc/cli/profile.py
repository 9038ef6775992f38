"""`sorahpc profile`: time the kernels, or trace training or sampling."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from sorahpc.cli.launching import AsJson, ClusterOpt, ConfigArg, DryRun, Overrides, Wait, launch_job, say
from sorahpc.errors import ConfigError

app = typer.Typer(help="Time the kernels, or trace training or sampling.", no_args_is_help=True, rich_markup_mode=None)


Warmup = Annotated[int | None, typer.Option("--warmup", help="Steps before the first that counts.")]
Steps = Annotated[int | None, typer.Option("--steps", help="Steps that are recorded.")]
Tool = Annotated[str | None, typer.Option("--tool", help="torch, nsys or ncu: what records.")]


def _given(**options: object) -> list[str]:
    """Overrides of the options that were given; `a__b` is the key a.b. JSON, so that YAML reads a text as this text."""
    return [
        f"{key.replace('__', '.')}={json.dumps(value, default=str, ensure_ascii=False)}"
        for key, value in options.items()
        if value is not None
    ]


@app.command("kernels")
def profile_kernels(
    config: Annotated[str, typer.Argument(metavar="[CONFIG]", help="YAML file or shipped name.")] = "profile",
    overrides: Overrides = None,
    baseline: Annotated[
        Path | None, typer.Option("--baseline", help="An earlier <device>.json, or the folder that it is in.")
    ] = None,
    margin: Annotated[
        float | None, typer.Option("--margin", help="Exit 17 if an op is slower than the baseline by this share.")
    ] = None,
    only: Annotated[str | None, typer.Option("--only", help="Cases whose name begins so, such as K1.")] = None,
    cluster: ClusterOpt = None, dry_run: DryRun = False, as_json: AsJson = False, wait: Wait = False,
) -> int:  # fmt: skip
    """The ops beside their peers and this node's limits: CSV, JSON and a page with a roofline."""
    given = _given(kernels__baseline=baseline, kernels__margin=margin, kernels__only=only)
    if "=" in config and not Path(config).exists():  # no config named, only overrides
        config, overrides = "profile", [config, *(overrides or [])]
    given = [*(overrides or []), *given]
    return launch_job("profile-kernels", config, given, cluster, dry_run=dry_run, as_json=as_json, wait=wait)


@app.command("train")
def profile_train(
    config: ConfigArg, overrides: Overrides = None, warmup: Warmup = None, steps: Steps = None,
    ranks: Annotated[str | None, typer.Option("--ranks", help="Ranks that are recorded, such as 0,8.")] = None,
    tool: Tool = None, cluster: ClusterOpt = None, dry_run: DryRun = False, as_json: AsJson = False, wait: Wait = False,
) -> int:  # fmt: skip
    """Some steps of training under a profiler: trace, time by layer, communication, memory."""
    chosen = None if ranks is None else ranks.split(",")
    given = _given(profile__warmup_steps=warmup, profile__steps=steps, profile__ranks=chosen, profile__tool=tool)
    given = [*(overrides or []), *given]
    return launch_job("profile-train", config, given, cluster, dry_run=dry_run, as_json=as_json, wait=wait)


@app.command("sample")
def profile_sample(
    config: ConfigArg, overrides: Overrides = None, warmup: Warmup = None, steps: Steps = None, tool: Tool = None,
    cluster: ClusterOpt = None, dry_run: DryRun = False, as_json: AsJson = False, wait: Wait = False,
) -> int:  # fmt: skip
    """A pack from its prompts to its frames under a profiler."""
    given = _given(profile__warmup_steps=warmup, profile__steps=steps, profile__tool=tool)
    given = [*(overrides or []), *given]
    return launch_job("profile-sample", config, given, cluster, dry_run=dry_run, as_json=as_json, wait=wait)


@app.command("report")
def profile_report(
    runs: Annotated[list[str], typer.Argument(metavar="RUN...", help="Runs that were profiled.")],
    out: Annotated[Path, typer.Option("--out", help="The page to write.")] = Path("profile.html"),
    as_json: AsJson = False,
) -> int:
    """One page of what several runs have measured, on A100, H100 and H200 nodes, say."""
    from sorahpc.cluster.status import find_run
    from sorahpc.profiling.page import write_profile_page

    if out.is_dir():
        raise ConfigError(f"--out: {str(out)!r} is a folder; expected the name of the page to write")
    if out.exists() and not out.is_file():  # to be replaced: of root also /dev/stdout
        raise ConfigError(f"--out: {str(out)!r} is a device, pipe or socket; expected the name of the page to write")
    path = write_profile_page([find_run(run) / "profile" for run in runs], out)
    say({"path": str(path.absolute())}, f"report: {path.absolute()}", as_json)
    return 0
