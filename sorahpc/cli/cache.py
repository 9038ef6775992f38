"""`sorahpc cache`: look after a latent cache."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sorahpc.cli.launching import AsJson, say
from sorahpc.errors import ConfigError, DataError

app = typer.Typer(help="Look after a latent cache.", no_args_is_help=True, rich_markup_mode=None)


CacheArg = Annotated[Path, typer.Argument(metavar="PATH", help="Folder of a latent cache, such as runs/x/cache.")]


@app.command("verify")
def cache_verify(path: CacheArg, as_json: AsJson = False) -> int:
    """Read every byte and name what is damaged. Exit code 4 if anything is."""
    from sorahpc.data.maintenance import verify

    found = verify(path)
    lines = [f"{path}/{fault}" for fault in found.faults]
    lines += [f"{path}: {len(found.unlisted)} shards are not of the index; no longer read"] if found.unlisted else []
    if (work := found.work).nbytes:
        told = f"{work.journals} journals, {work.leases} leases, {work.others} others, {work.nbytes / 1e9:.3f} GB"
        no_more = f"; {len(work.left)} of them, {work.left_bytes / 1e9:.3f} GB, are needed no more: repair removes them"
        lines.append(f"{path}/.work: {told}{no_more if work.left else ''}")
    whole = f"{found.samples} samples in {found.shards} shards, {found.nbytes / 1e9:.3f} GB"
    lines.append(f"{path}: {f'{len(found.faults)} faults in ' if found.faults else 'whole: '}{whole}")
    if found.faults:
        lines.append(f"`sorahpc cache repair {path}` sets what is damaged aside; then `sorahpc encode` makes it anew")
    say(found.to_json(), "\n".join(lines), as_json)
    return DataError.exit_code if found.faults else 0


@app.command("stats")
def cache_stats(
    path: CacheArg,
    read: Annotated[int, typer.Option("--read", min=1, help="Samples to read for the check of normalising.")] = 1000,
    as_json: AsJson = False,
) -> int:
    """Counts, sizes, distributions, and whether normalised samples have mean 0 and std 1."""
    from sorahpc.data.contents import stats

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
    say(found, "\n".join(lines), as_json)
    return 0


@app.command("ls")
def cache_ls(path: CacheArg, as_json: AsJson = False) -> int:
    """A line a sample: key, latent shape, seconds, tokens, words' tokens, caption."""
    from sorahpc.data.contents import list_samples
    from sorahpc.data.manifest import shown

    rows = list_samples(path)
    lines = [f"{'key':16} {'C x T x H x W':18} {'s':>6} {'tokens':>8} {'text':>5} caption"]
    for row in rows:
        shape = " x ".join(map(str, row["shape"]))
        size = f"{row['duration_s']:>6.2f} {row['tokens']:>8} {row['text_len']:>5}"
        lines.append(f"{row['key']} {shape:18} {size} {shown(row['caption'][:80])}")
    say(rows, "\n".join(lines), as_json)
    return 0


@app.command("show")
def cache_show(
    path: CacheArg,
    key: Annotated[str, typer.Argument(metavar="KEY", help="Of the sample, as `cache ls` prints it.")],
    vae: Annotated[Path | None, typer.Option("--vae", help="Folder of the autoencoder.")] = None,
    config: Annotated[str | None, typer.Option("--config", help="Config that names the autoencoder.")] = None,
    out: Annotated[Path | None, typer.Option("--out", help="File to write; KEY.mp4 without it.")] = None,
    as_json: AsJson = False,
) -> int:
    """Decode a sample back to an mp4 file, with the autoencoder that the cache was made with."""
    from sorahpc.configfile import load_config
    from sorahpc.data.contents import show
    from sorahpc.data.manifest import shown

    if (vae is None) == (config is None):
        raise ConfigError("cache show: expected one of --vae FOLDER and --config CONFIG")
    if config is not None:
        loaded = load_config(config, [])
        loaded.need("vae")
        assert loaded.vae is not None
        vae = loaded.vae.path
    assert vae is not None
    row = show(path, key, vae, out or Path(f"{key}.mp4"))
    say(row, f"{row['path']}: {row['frames']} frames, {shown(row['caption'])}", as_json)
    return 0


@app.command("merge")
def cache_merge(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder of the new cache.")],
    caches: Annotated[
        list[Path], typer.Argument(metavar="CACHE...", help="Finished caches, all of the same settings.")
    ],
    as_json: AsJson = False,
) -> int:
    """Join caches into a new one; shards are linked, or copied to another file system."""
    from sorahpc.data.merge import merge

    done = merge(out, caches)
    shared = f"; {done['shared']} were in two of the caches" if done["shared"] else ""
    how = f"{done['linked']} linked, {done['copied']} copied{shared}"
    say(done, f"{out}: {done['samples']} samples in {done['shards']} shards: {how}", as_json)
    return 0


@app.command("repair")
def cache_repair(path: CacheArg, as_json: AsJson = False) -> int:
    """Set damaged shards aside, and build the index from what is whole. Only what dead tasks left is deleted."""
    from sorahpc.data.maintenance import repair

    done = repair(path)
    lines = [f"{path}/{old}: damaged; renamed {new}" for old, new in done["set_aside"].items()]
    lines += [f"{path}/{name}: missing" for name in done["missing"]]
    lines += [f"{path}/cache.json: put back from the index"] if done["restored"] else []
    lines += [f"{path}/{name}: removed; its writer is gone" for name in done["removed"]]
    lines.append(f"{path}: {done['samples'] or 'no'} samples are whole and in the index")
    if done["set_aside"] or done["missing"]:
        lines.append("run `sorahpc encode` to make the rest anew")
    say(done, "\n".join(lines), as_json)
    return 0


@app.command("retry")
def cache_retry(path: CacheArg, as_json: AsJson = False) -> int:
    """Have encode try again those clips that took too long, needed too much memory or couldn't be read."""
    from sorahpc.data.maintenance import retry

    done = retry(path)
    lines = [f"{clip['source']}: {clip['reason']}" for clip in done["clips"]]
    if done["shards"]:
        lines.append(f"{path}: {len(done['clips'])} clips of {len(done['shards'])} shards: run `sorahpc encode`")
    else:
        lines.append(f"{path}: no clip was rejected for want of time or memory, or by the file system")
    say(done, "\n".join(lines), as_json)
    return 0
