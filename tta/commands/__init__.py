"""The `tta` command: one file a command, each importing what it needs when it runs."""

import sys
from importlib.metadata import version as distribution_version

import typer

from tta.commands import ask, check, demo, label, operate, package, predict, serve, status, versions
from tta.errors import TTAError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Serve a vision classifier, watch for shift, operate on one block, prove it, hot-swap it.",
)
for module in (demo, package, check, serve, predict, label, ask, status, versions, operate):
    module.register(app)


@app.command("version")
def show_version() -> None:
    """Print the version of tta."""
    typer.echo(distribution_version("tta-daemon"))


def main() -> None:
    """Run the command line; exit 0 for success, 2 for bad input or a failed start, 1 for a failed task."""
    try:
        app()
    except TTAError as error:
        print(f"tta: {error}", file=sys.stderr)
        sys.exit(2)
    except ModuleNotFoundError as error:
        extra = "adapt" if error.name in ("torch", "timm", "kornia", "onnx", "onnxscript") else "serve"
        extra = "all" if error.name in ("sklearn", "matplotlib") else extra
        print(f"tta: {error.name} is not installed: pip install 'tta-daemon[{extra}]'", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
