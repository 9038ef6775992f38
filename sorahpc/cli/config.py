"""`sorahpc config`: look at a config."""

from __future__ import annotations

import typer

from sorahpc.cli.launching import AsJson, ClusterOpt, ConfigArg, Overrides, say

app = typer.Typer(help="Look at a config.", no_args_is_help=True, rich_markup_mode=None)


@app.command("show")
def config_show(
    config: ConfigArg, overrides: Overrides = None, cluster: ClusterOpt = None, as_json: AsJson = False
) -> int:
    """The resolved config, with all defaults."""
    from sorahpc.configfile import dump_config, load_config

    loaded = load_config(config, overrides or [], cluster)
    say(loaded.model_dump(mode="json"), dump_config(loaded).rstrip("\n"), as_json)
    return 0


@app.command("schema")
def config_schema() -> int:
    """JSON schema of a config file, for editors."""
    from sorahpc.configfile import json_schema

    say(json_schema(), "", True)
    return 0


@app.command("check")
def config_check(
    config: ConfigArg, overrides: Overrides = None, cluster: ClusterOpt = None, as_json: AsJson = False
) -> int:
    """Say what is wrong with a config, one line a fault."""
    from sorahpc.configfile import load_config

    loaded = load_config(config, overrides or [], cluster)
    say({"ok": True, "run": loaded.run}, f"{config}: ok", as_json)
    return 0
