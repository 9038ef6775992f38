"""`sorahpc data`: make data."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sorahpc.cli.launching import AsJson, ConfigArg, Overrides, say
from sorahpc.errors import ConfigError

app = typer.Typer(help="Make data.", no_args_is_help=True, rich_markup_mode=None)


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
