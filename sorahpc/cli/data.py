"""`sorahpc data`: make data, and look at it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sorahpc.cli.launching import AsJson, ConfigArg, Overrides, say
from sorahpc.errors import ConfigError, DataError

if TYPE_CHECKING:
    from sorahpc.config import Config
    from sorahpc.data.manifest import Video

app = typer.Typer(help="Make data, and look at it.", no_args_is_help=True, rich_markup_mode=None)


@app.command("toyworld")
def data_toyworld(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write to.")],
    clips: Annotated[int, typer.Option("--clips", min=1, help="Number of clips.")] = 64,
    seed: Annotated[int, typer.Option("--seed", min=0)] = 0,
    as_json: AsJson = False,
) -> int:
    """Captioned mp4 files of simple scenes with known physics, the same for the same seed."""
    from sorahpc.data.toyworld import write_world

    write_world(out, clips, seed)
    say({"path": str(out.absolute()), "clips": clips, "seed": seed}, f"{out}: {clips} clips", as_json)
    return 0


@app.command("tiny-t5")
def data_tiny_t5(
    config: ConfigArg,
    overrides: Overrides = None,
    dim: Annotated[int, typer.Option("--dim", min=16, help="Size of its embeddings, a multiple of 16.")] = 64,
    seed: Annotated[int, typer.Option("--seed", min=0)] = 0,
    as_json: AsJson = False,
) -> int:
    """A tiny T5 with random weights at text.path, for a try-out without a real one; its words are the manifest's."""
    from sorahpc.configfile import load_config
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
    say({"path": str(out.absolute()), "captions": len(captions)}, f"{out}: from {len(captions)} captions", as_json)
    return 0


@app.command("show")
def data_show(
    what: Annotated[str, typer.Argument(metavar="RUN|MANIFEST", help="A run, its folder, or a manifest.parquet.")],
    config: Annotated[
        str | None, typer.Option("--config", help="Count tokens as encode with this config would make them.")
    ] = None,
    html: Annotated[Path | None, typer.Option("--html", help="Write a page to this file.")] = None,
    as_json: AsJson = False,
) -> int:
    """What is in a manifest: counts, hours, distributions, and why clips were rejected."""
    from sorahpc.configfile import load_config
    from sorahpc.data.manifest import read_manifest, shown
    from sorahpc.data.overview import as_page, as_text, overview
    from sorahpc.runs import atomic_write

    path = _manifest(what)
    found = overview(read_manifest(path), _planned(load_config(config, [])) if config else None)
    found = {"path": str(path.absolute()), **found}
    text = as_text(found)
    if html is not None:
        if html.exists() and not (html.is_file() or html.is_dir()):  # to be replaced: of root also /dev/stdout
            raise ConfigError(f"--html: {shown(html)}: a file expected, found a device, pipe or socket")
        try:
            atomic_write(html, as_page(found, str(path)))
        except OSError as error:
            raise DataError(f"--html: {html}: can't write it: {error.strerror}") from None
        text += f"\n\npage: {html.absolute()}"
    say(found, text, as_json)
    return 0


def _manifest(what: str) -> Path:
    from sorahpc.cluster.status import find_run
    from sorahpc.data.manifest import MANIFEST

    path = Path(what)
    if path.suffix == ".parquet":  # of a file of another kind it would be said that it should be deleted
        return path
    return (path if (path / MANIFEST).is_file() else find_run(what)) / MANIFEST


def _planned(config: Config) -> Callable[[Video], tuple[int, int, int] | str]:
    """What encode makes of a clip, by the autoencoder's config.json: tokens, height and width; or why it can't."""
    from sorahpc.data.decode import VideoError, plan_clip
    from sorahpc.models.vae import read_rule

    config.need("vae")
    assert config.vae is not None
    stride, lengths = read_rule(config.vae.path)
    patch = config.model.patch if config.model else (1, 1, 1)
    known: dict[tuple[int, int, float], tuple[int, int, int] | str] = {}

    def plan(video: Video) -> tuple[int, int, int] | str:
        # All that a plan depends on; of a long clip only that it is long enough.
        clip = (video.width, video.height, min(video.duration_s, config.clip.max_frames / config.clip.fps + 1))
        if clip not in known:
            try:
                made = plan_clip(
                    video, config.clip, stride=stride, patch=patch, lengths=lengths,
                )  # fmt: skip
            except VideoError as error:
                known[clip] = error.reason
            else:
                cells = (made.height // (stride[1] * patch[1])) * (made.width // (stride[2] * patch[2]))
                tokens = lengths.latent(len(made.times_s)) // patch[0] * cells
                known[clip] = (tokens, made.height, made.width)
        return known[clip]

    return plan
