"""What commands share: where the daemon is, and printing for people or for programs."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from tta.client import DEFAULT_CONTROL, DEFAULT_ENDPOINT, Client
from tta.errors import ConfigError
from tta.keys import Credentials

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


_given: dict[str, Path | str | None] = {}


def use_keys(key: Path | None, server_key: str | None) -> None:
    """Take what `--key` and `--server-key` before the command name, or their environment variables."""
    _given.update(key=key, server_key=server_key)


def credentials() -> Credentials | None:
    """Of `use_keys`; None if no keys were given.

    Raises:
        ConfigError: only one of them is given, or a file holds no key.
    """
    key, server_key = _given.get("key"), _given.get("server_key")
    if key is None and server_key is None:
        return None
    if key is None or server_key is None:
        missing = "--key (TTA_KEY)" if key is None else "--server-key (TTA_SERVER_KEY)"
        raise ConfigError(f"{missing} is missing: a client needs its own key and the daemon's public one")
    return Credentials.read(key, *str(server_key).split(","))


def connect(control: str = CONTROL, endpoint: str = ENDPOINT, timeout_s: float = 10.0) -> Client:
    """A client with the keys given before the command."""
    return Client(endpoint, control, timeout_s, credentials=credentials())


def print_json(value: Any) -> None:
    """One JSON document on standard output."""
    print(json.dumps(value, indent=1, default=str))


def print_table(columns: Sequence[str], rows: Iterable[Sequence[Any]], title: str | None = None) -> None:
    """A table for people; where it is too wide, the last column's text goes on in the next line."""
    table = Table(
        title=title, title_justify="left", header_style="bold", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0)
    )
    for i, column in enumerate(columns):
        table.add_column(column, no_wrap=i < len(columns) - 1)
    for row in rows:
        table.add_row(*("" if cell is None else str(cell) for cell in row))
    console.print(table)
