"""`tta serve`: run the daemon."""

from pathlib import Path
from typing import Annotated

import typer

from tta.errors import ConfigError


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("serve")(serve)


def parse_overrides(pairs: list[str]) -> dict[str, str]:
    """`KEY=VALUE` flags as a mapping.

    Raises:
        ConfigError: one has no `=`.
    """
    for pair in pairs:
        if "=" not in pair:
            raise ConfigError(f"--set {pair!r}: write KEY=VALUE, as in --set server.threads=2")
    return dict(pair.split("=", 1) for pair in pairs)


def serve(
    bundle: Annotated[Path | None, typer.Argument(help="Bundle to serve; default: the configuration's.")] = None,
    config: Annotated[Path | None, typer.Option("--config", help="YAML file with settings.")] = None,
    state: Annotated[Path | None, typer.Option(help="State folder.")] = None,
    deploy: Annotated[
        bool, typer.Option("--deploy", help="If the bundle is another than before, put the state of that aside.")
    ] = False,
    settings: Annotated[list[str] | None, typer.Option("--set", help="Any setting: server.threads=2.")] = None,
) -> None:
    """Serve, watch, adapt, until SIGTERM or SIGINT. Logs are JSON lines on standard error."""
    from tta import log
    from tta.config import load_config
    from tta.daemon.daemon import serve as run

    overrides: dict[str, object] = dict(parse_overrides(settings or []))
    if bundle is not None:
        overrides["bundle"] = bundle
    if state is not None:
        overrides["state"] = state
    raise typer.Exit(run(load_config(config, overrides), log.setup("daemon"), deploy))
