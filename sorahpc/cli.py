"""The command line. Heavy modules are imported by the verb that needs them: --help and status start at once."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sorahpc.errors import ConfigError, DataError, SetupError, SoraHPCError

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
config_app = typer.Typer(help="Look at a config.", no_args_is_help=True, rich_markup_mode=None)
profile_app = typer.Typer(
    help="Time the kernels, or trace training or sampling.", no_args_is_help=True, rich_markup_mode=None
)
data_app = typer.Typer(help="Make data.", no_args_is_help=True, rich_markup_mode=None)
cache_app = typer.Typer(help="Look after a latent cache.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(cache_app, name="cache")
app.add_typer(config_app, name="config")
app.add_typer(data_app, name="data")
app.add_typer(profile_app, name="profile")

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


def _say(value: Any, text: str, as_json: bool) -> None:
    print(json.dumps(value, indent=1) if as_json else text)


def _launch(job_name: str, config: str, overrides: list[str], cluster: str | None, **how: bool) -> int:
    from sorahpc.cluster.launch import describe_job, launch, plan, wait_for_slurm
    from sorahpc.config import load_config

    job = describe_job(job_name)
    loaded = load_config(config, overrides, cluster)
    loaded.need(*job.sections)
    if job.name == "profile-kernels":  # not after hours in a queue
        from sorahpc.profiling.results import check_baseline

        check_baseline(loaded.kernels, loaded.run_dir / "profile" / "kernels")
    if how["dry_run"]:
        planned = plan(loaded, job)
        _say(planned, planned["script"].rstrip("\n"), how["as_json"])
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
        number, lines = _rejected(loaded, job.name)
        result |= number
        text = "\n".join([text, *lines])
    if code == 0 or how["as_json"]:
        _say(result, text, how["as_json"])
    return code


def _rejected(config: Config, job: str) -> tuple[dict[str, int], list[str]]:
    """What a finished prepare, caption or encode could not use: its number as JSON, and the first names with their
    reasons."""
    if job == "caption":
        return _kept(config)
    if job not in ("prepare", "encode"):
        return {}, []
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
    """The clips whose own caption stays, after caption: as `_rejected`."""
    from sorahpc.data.captions import CAPTIONS, read_captions
    from sorahpc.data.manifest import shown

    path = config.run_dir / CAPTIONS
    rows = [row for row in (read_captions(path)[0] if path.exists() else []) if not row.caption]
    lines = [f"clip {shown(row.key)} keeps its caption: {shown(row.reason)}" for row in rows[:MAX_REJECTED_SHOWN]]
    if len(rows) > MAX_REJECTED_SHOWN:
        lines.append(f"and {len(rows) - MAX_REJECTED_SHOWN} more; see {path}")
    return {"kept": len(rows)}, lines


@app.command()
def prepare(
    config: ConfigArg, overrides: Overrides = None, cluster: ClusterOpt = None, dry_run: DryRun = False,
    as_json: AsJson = False, wait: Wait = False,
) -> int:  # fmt: skip
    """Folder of videos -> manifest."""
    return _launch("prepare", config, overrides or [], cluster, dry_run=dry_run, as_json=as_json, wait=wait)


@app.command()
def caption(
    config: ConfigArg, overrides: Overrides = None, cluster: ClusterOpt = None, dry_run: DryRun = False,
    as_json: AsJson = False, wait: Wait = False,
) -> int:  # fmt: skip
    """Manifest -> detailed captions, by a language model."""
    return _launch("caption", config, overrides or [], cluster, dry_run=dry_run, as_json=as_json, wait=wait)


@app.command()
def encode(
    config: ConfigArg, overrides: Overrides = None, cluster: ClusterOpt = None, dry_run: DryRun = False,
    as_json: AsJson = False, wait: Wait = False,
) -> int:  # fmt: skip
    """Manifest -> HDF5 latent cache."""
    return _launch("encode", config, overrides or [], cluster, dry_run=dry_run, as_json=as_json, wait=wait)


@app.command()
def train(
    config: ConfigArg, overrides: Overrides = None, cluster: ClusterOpt = None, dry_run: DryRun = False,
    as_json: AsJson = False, wait: Wait = False,
) -> int:  # fmt: skip
    """Latent cache -> checkpoints."""
    return _launch("train", config, overrides or [], cluster, dry_run=dry_run, as_json=as_json, wait=wait)


@app.command()
def sample(
    config: ConfigArg, overrides: Overrides = None, cluster: ClusterOpt = None, dry_run: DryRun = False,
    as_json: AsJson = False, wait: Wait = False,
) -> int:  # fmt: skip
    """Checkpoint and prompts -> mp4 files."""
    return _launch("sample", config, overrides or [], cluster, dry_run=dry_run, as_json=as_json, wait=wait)


@app.command()
def evaluate(
    config: ConfigArg, overrides: Overrides = None, cluster: ClusterOpt = None, dry_run: DryRun = False,
    as_json: AsJson = False, wait: Wait = False,
) -> int:  # fmt: skip
    """Samples and VAE -> figures and clips for the report."""
    return _launch("evaluate", config, overrides or [], cluster, dry_run=dry_run, as_json=as_json, wait=wait)


@app.command("train-vae")
def train_vae(
    config: ConfigArg, overrides: Overrides = None, cluster: ClusterOpt = None, dry_run: DryRun = False,
    as_json: AsJson = False, wait: Wait = False,
) -> int:  # fmt: skip
    """Manifest -> a small autoencoder of your own."""
    return _launch("train-vae", config, overrides or [], cluster, dry_run=dry_run, as_json=as_json, wait=wait)


@app.command()
def pipeline(
    config: ConfigArg, overrides: Overrides = None, cluster: ClusterOpt = None, dry_run: DryRun = False,
    as_json: AsJson = False, wait: Wait = False,
) -> int:  # fmt: skip
    """prepare, caption (if asked for), encode, train and sample, each after the other; again: only what is missing."""
    from sorahpc.config import load_config

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
    _say(plans, "\n".join(p["script"] for p in plans).rstrip("\n"), as_json)
    return 0


def _pipeline_here(config: Config, as_json: bool) -> int:
    from sorahpc.cluster.launch import launch, pipeline_jobs

    results: list[dict[str, Any]] = []
    for job in pipeline_jobs(config):
        code, _ = launch(config, job)
        results.append({"job": job.name, "exit_code": code})
        if code:
            break
        number, lines = _rejected(config, job.name)
        results[-1] |= number
        if not as_json:
            print("".join(f"{job.name}: {line}\n" for line in lines), end="", flush=True)
    code = results[-1]["exit_code"]
    if as_json:
        _say({"run_dir": str(config.run_dir.absolute()), "jobs": results, "exit_code": code}, "", True)
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
    _say(value, f"see `sorahpc status {config.run_dir}`", as_json)
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
        _say(results, "\n".join(lines) or f"{place}: nothing in it", as_json)
    elif what is None:
        listed = {n: (place / n / weights.MANIFEST).is_file() for n in sorted(weights.NAMES)}
        lines = [f"{n}: {weights.NAMES[n].kind}{', in the store' if there else ''}" for n, there in listed.items()]
        _say({"store": str(place), "names": listed}, "\n".join(lines), as_json)
    else:
        result = weights.fetch(what, place)
        said = "fetched" if result["fetched"] else "already there"
        _say(result, f"{what}: {said}, revision {result['revision']}; {result['path']}", as_json)
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
    _say({"path": str(path.absolute())}, f"report: {path.absolute()}", as_json)
    return 0


@app.command()
def status(run: RunArg, as_json: AsJson = False) -> int:
    """How far the jobs of a run are."""
    from sorahpc.cluster.status import find_run, run_status, status_table

    value = run_status(find_run(run))
    _say(value, status_table(value), as_json)
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
        _say({"job": folder[0].job, "rank": rank, "path": str(folder[0].log(rank)), "lines": lines}, "", True)
    else:
        write_text(log_lines(folder[0], rank, follow))
    return 0


@app.command()
def cancel(run: RunArg, job: JobArg = None, as_json: AsJson = False) -> int:
    """End the jobs of a run (or one), here or on Slurm. They save their progress where they can."""
    from sorahpc.cluster.status import cancel_job, find_jobs, find_run

    folders = find_jobs(find_run(run), job)
    said = {folder.job: cancel_job(folder) for folder in reversed(folders)}  # the last first: it waits for the others
    _say(said, "\n".join(said.values()), as_json)
    return 0


@config_app.command("show")
def config_show(
    config: ConfigArg, overrides: Overrides = None, cluster: ClusterOpt = None, as_json: AsJson = False
) -> int:
    """The resolved config, with all defaults."""
    from sorahpc.config import dump_config, load_config

    loaded = load_config(config, overrides or [], cluster)
    _say(loaded.model_dump(mode="json"), dump_config(loaded).rstrip("\n"), as_json)
    return 0


@config_app.command("schema")
def config_schema() -> int:
    """JSON schema of a config file, for editors."""
    from sorahpc.config import json_schema

    _say(json_schema(), "", True)
    return 0


@config_app.command("check")
def config_check(
    config: ConfigArg, overrides: Overrides = None, cluster: ClusterOpt = None, as_json: AsJson = False
) -> int:
    """Say what is wrong with a config, one line a fault."""
    from sorahpc.config import load_config

    loaded = load_config(config, overrides or [], cluster)
    _say({"ok": True, "run": loaded.run}, f"{config}: ok", as_json)
    return 0


@data_app.command("toyworld")
def data_toyworld(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write to.")],
    clips: Annotated[int, typer.Option("--clips", min=1, help="Number of clips.")] = 64,
    seed: Annotated[int, typer.Option("--seed", min=0)] = 0,
    as_json: AsJson = False,
) -> int:
    """Captioned mp4 files of simple scenes with known physics, the same for the same seed."""
    from sorahpc.data.toyworld import write_world

    write_world(out, clips, seed)
    _say({"path": str(out.absolute()), "clips": clips, "seed": seed}, f"{out}: {clips} clips", as_json)
    return 0


@data_app.command("tiny-t5")
def data_tiny_t5(
    config: ConfigArg,
    overrides: Overrides = None,
    dim: Annotated[int, typer.Option("--dim", min=16, help="Size of its embeddings, a multiple of 16.")] = 64,
    seed: Annotated[int, typer.Option("--seed", min=0)] = 0,
    as_json: AsJson = False,
) -> int:
    """A tiny T5 with random weights at text.path, for a try-out without a real one; its words are the manifest's."""
    from sorahpc.config import load_config
    from sorahpc.data.manifest import MANIFEST, read_manifest
    from sorahpc.models.text import make_tiny_t5

    if dim % 16:
        raise ConfigError(f"--dim: expected a multiple of 16, found {dim}")
    loaded = load_config(config, overrides or [])
    loaded.need("text")
    assert loaded.text is not None
    out = loaded.text.path
    if (out / "config.json").exists():
        raise ConfigError(f"text.path: {out} holds a text encoder already; choose another folder")
    captions = [video.caption for video in read_manifest(loaded.run_dir / MANIFEST) if video.ok]
    make_tiny_t5(out, captions, dim, seed)
    _say({"path": str(out.absolute()), "captions": len(captions)}, f"{out}: from {len(captions)} captions", as_json)
    return 0


CacheArg = Annotated[Path, typer.Argument(metavar="PATH", help="Folder of a latent cache, such as runs/x/cache.")]


@cache_app.command("verify")
def cache_verify(path: CacheArg, as_json: AsJson = False) -> int:
    """Read every byte and name what is damaged. Exit code 4 if anything is."""
    from sorahpc.data.maintenance import verify

    found = verify(path)
    lines = [f"{path}/{fault}" for fault in found.faults]
    lines += [f"{path}: {len(found.unlisted)} shards are not of the index; no longer read"] if found.unlisted else []
    whole = f"{found.samples} samples in {found.shards} shards, {found.nbytes / 1e9:.3f} GB"
    lines.append(f"{path}: {f'{len(found.faults)} faults in ' if found.faults else 'whole: '}{whole}")
    if found.faults:
        lines.append(f"`sorahpc cache repair {path}` sets what is damaged aside; then `sorahpc encode` makes it anew")
    _say(found.to_json(), "\n".join(lines), as_json)
    return DataError.exit_code if found.faults else 0


@cache_app.command("stats")
def cache_stats(
    path: CacheArg,
    read: Annotated[int, typer.Option("--read", min=1, help="Samples to read for the check of normalising.")] = 1000,
    as_json: AsJson = False,
) -> int:
    """Counts, sizes, distributions, and whether normalised samples have mean 0 and std 1."""
    from sorahpc.data.maintenance import stats

    found = stats(path, read)
    spread = ("frames", "duration_s", "tokens", "text_len", "aspect")
    columns = ("min", "p10", "median", "mean", "p90", "max")
    lines = [f"samples {found['samples']}, shards {found['shards']}, on disk {found['bytes_on_disk'] / 1e9:.3f} GB"]
    lines.append(
        f"a sample {found['bytes_on_disk'] / found['samples'] / 1e3:.1f} kB, {found['disk_ratio']:.4f} x its data"
    )
    lines.append(f"{'':10}" + "".join(f"{c:>11}" for c in columns))
    lines += [f"{name:10}" + "".join(f"{found[name][c]:>11.5g}" for c in columns) for name in spread]
    lines.append("TxHxW: " + ", ".join(f"{shape} {n}" for shape, n in list(found["shapes"].items())[:20]))
    normal = found["normalised"]
    lines.append(
        f"normalised, {normal['samples']} samples: mean {min(normal['mean']):.2g} to {max(normal['mean']):.2g}, "
        f"std {min(normal['std']):.3g} to {max(normal['std']):.3g} over the channels"
    )
    _say(found, "\n".join(lines), as_json)
    return 0


@cache_app.command("ls")
def cache_ls(path: CacheArg, as_json: AsJson = False) -> int:
    """A line a sample: key, latent shape, seconds, tokens, words' tokens, caption."""
    from sorahpc.data.maintenance import list_samples

    rows = list_samples(path)
    lines = [f"{'key':16} {'C x T x H x W':18} {'s':>6} {'tokens':>8} {'text':>5} caption"]
    for row in rows:
        shape = " x ".join(map(str, row["shape"]))
        size = f"{row['duration_s']:>6.2f} {row['tokens']:>8} {row['text_len']:>5}"
        lines.append(f"{row['key']} {shape:18} {size} {row['caption'][:80]}")
    _say(rows, "\n".join(lines), as_json)
    return 0


@cache_app.command("show")
def cache_show(
    path: CacheArg,
    key: Annotated[str, typer.Argument(metavar="KEY", help="Of the sample, as `cache ls` prints it.")],
    vae: Annotated[Path | None, typer.Option("--vae", help="Folder of the autoencoder.")] = None,
    config: Annotated[str | None, typer.Option("--config", help="Config that names the autoencoder.")] = None,
    out: Annotated[Path | None, typer.Option("--out", help="File to write; KEY.mp4 without it.")] = None,
    as_json: AsJson = False,
) -> int:
    """Decode a sample back to an mp4 file, with the autoencoder that the cache was made with."""
    from sorahpc.config import load_config
    from sorahpc.data.maintenance import show

    if (vae is None) == (config is None):
        raise ConfigError("cache show: expected one of --vae FOLDER and --config CONFIG")
    if config is not None:
        loaded = load_config(config, [])
        loaded.need("vae")
        assert loaded.vae is not None
        vae = loaded.vae.path
    assert vae is not None
    row = show(path, key, vae, out or Path(f"{key}.mp4"))
    _say(row, f"{row['path']}: {row['frames']} frames, {row['caption']}", as_json)
    return 0


@cache_app.command("merge")
def cache_merge(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder of the new cache.")],
    caches: Annotated[
        list[Path], typer.Argument(metavar="CACHE...", help="Finished caches, all of the same settings.")
    ],
    as_json: AsJson = False,
) -> int:
    """Join caches into a new one; shards are linked, or copied to another file system."""
    from sorahpc.data.maintenance import merge

    done = merge(out, caches)
    shared = f"; {done['shared']} were in two of the caches" if done["shared"] else ""
    how = f"{done['linked']} linked, {done['copied']} copied{shared}"
    _say(done, f"{out}: {done['samples']} samples in {done['shards']} shards: {how}", as_json)
    return 0


@cache_app.command("repair")
def cache_repair(path: CacheArg, as_json: AsJson = False) -> int:
    """Set damaged shards aside, and build the index from what is whole. Nothing is deleted but dead writers' parts."""
    from sorahpc.data.maintenance import repair

    done = repair(path)
    lines = [f"{path}/{old}: damaged; renamed {new}" for old, new in done["set_aside"].items()]
    lines += [f"{path}/{name}: missing" for name in done["missing"]]
    lines += [f"{path}/cache.json: put back from the index"] if done["restored"] else []
    lines += [f"{path}/{name}: removed; its writer is gone" for name in done["removed"]]
    lines.append(f"{path}: {done['samples'] or 'no'} samples are whole and in the index")
    if done["set_aside"] or done["missing"]:
        lines.append("run `sorahpc encode` to make the rest anew")
    _say(done, "\n".join(lines), as_json)
    return 0


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


@profile_app.command("kernels")
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
    return _launch("profile-kernels", config, given, cluster, dry_run=dry_run, as_json=as_json, wait=wait)


@profile_app.command("train")
def profile_train(
    config: ConfigArg, overrides: Overrides = None, warmup: Warmup = None, steps: Steps = None,
    ranks: Annotated[str | None, typer.Option("--ranks", help="Ranks that are recorded, such as 0,8.")] = None,
    tool: Tool = None, cluster: ClusterOpt = None, dry_run: DryRun = False, as_json: AsJson = False, wait: Wait = False,
) -> int:  # fmt: skip
    """Some steps of training under a profiler: trace, time by layer, communication, memory."""
    chosen = None if ranks is None else ranks.split(",")
    given = _given(profile__warmup_steps=warmup, profile__steps=steps, profile__ranks=chosen, profile__tool=tool)
    given = [*(overrides or []), *given]
    return _launch("profile-train", config, given, cluster, dry_run=dry_run, as_json=as_json, wait=wait)


@profile_app.command("sample")
def profile_sample(
    config: ConfigArg, overrides: Overrides = None, warmup: Warmup = None, steps: Steps = None, tool: Tool = None,
    cluster: ClusterOpt = None, dry_run: DryRun = False, as_json: AsJson = False, wait: Wait = False,
) -> int:  # fmt: skip
    """A pack from its prompts to its frames under a profiler."""
    given = _given(profile__warmup_steps=warmup, profile__steps=steps, profile__tool=tool)
    given = [*(overrides or []), *given]
    return _launch("profile-sample", config, given, cluster, dry_run=dry_run, as_json=as_json, wait=wait)


@profile_app.command("report")
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
    path = write_profile_page([find_run(run) / "profile" for run in runs], out)
    _say({"path": str(path.absolute())}, f"report: {path.absolute()}", as_json)
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


if __name__ == "__main__":
    raise SystemExit(main())
