"""What commands share: where the daemon is, and printing for people or for programs."""

import json
from collections.abc import Iterable, Sequence
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from tta.client import DEFAULT_CONTROL, DEFAULT_ENDPOINT

Endpoint = Annotated[
    str, typer.Option("--endpoint", envvar="TTA_ENDPOINT", help="Where the server takes predictions.")
]
ControlEndpoint = Annotated[
    str, typer.Option("--control", envvar="TTA_CONTROL", help="Where the daemon takes commands.")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]
Timeout = Annotated[float, typer.Option("--timeout-s", min=0.0, help="Seconds to wait for an answer.")]
ENDPOINT, CONTROL = DEFAULT_ENDPOINT, DEFAULT_CONTROL

console = Console()
progress_console = Console(stderr=True)


def print_json(value: Any) -> None:
    """One JSON document on standard output."""
    print(json.dumps(value, indent=1, default=str))


def print_table(columns: Sequence[str], rows: Iterable[Sequence[Any]], title: str | None = None) -> None:
    """A table for people."""
    table = Table(
        title=title, title_justify="left", header_style="bold", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0)
    )
    for column in columns:
        table.add_column(column, no_wrap=True)
    for row in rows:
        table.add_row(*("" if cell is None else str(cell) for cell in row))
    console.print(table)
