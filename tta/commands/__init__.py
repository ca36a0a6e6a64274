"""The `tta` command: one file a command, each importing what it needs when it runs."""

import sys
from importlib.metadata import version as distribution_version
from pathlib import Path
from typing import Annotated

import typer

from tta.commands import (
    ask,
    bench,
    check,
    demo,
    deploy,
    erase,
    export,
    keygen,
    label,
    operate,
    package,
    predict,
    replay,
    serve,
    sign,
    status,
    top,
    versions,
)
from tta.commands.output import use_keys
from tta.errors import TTAError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for module in (
    demo,
    package,
    check,
    serve,
    predict,
    label,
    ask,
    status,
    top,
    versions,
    operate,
    deploy,
    bench,
    keygen,
    sign,
    export,
    erase,
    replay,
):
    module.register(app)


def _show_version(value: bool) -> None:
    if value:
        typer.echo(distribution_version("tta-daemon"))
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and exit.")
    ] = False,
    key: Annotated[
        Path | None, typer.Option(envvar="TTA_KEY", help="Your NAME.key_secret, where the daemon asks for keys.")
    ] = None,
    server_key: Annotated[
        str | None,
        typer.Option(
            envvar="TTA_SERVER_KEY", help="The daemon's NAME.key, or the key; also its next, with a comma."
        ),
    ] = None,
) -> None:
    """Serve a vision classifier, watch for shift, operate on one block, prove it, hot-swap it."""
    use_keys(key, server_key)


def main() -> None:
    """Run the command line; exit 0 for success, 2 for bad input or a failed start, 1 for a failed task."""
    try:
        app()
    except TTAError as error:
        print(f"tta: {error}", file=sys.stderr)
        sys.exit(2)
    except ModuleNotFoundError as error:
        extra = "adapt" if error.name in ("torch", "timm", "kornia", "onnx", "onnxscript") else "serve"
        extra = "all" if error.name in ("sklearn", "matplotlib", "textual") else extra
        hint = f"install tta with its [{extra}] extra, as in pip install '.[{extra}]'"
        print(f"tta: {error.name} is not installed: {hint}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
