"""Long measurements are made of cells: each is computed once, in a process of its own, and kept in a file."""

import json
import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any


def keep(path: Path, found: Any) -> None:
    """Write what a cell has found, whole or not at all."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(found, default=str))
    temporary.rename(path)


def run_missing(
    cells: Mapping[Path, Any], compute: Callable[[Any, Path], None], minutes: float, processes: int
) -> None:
    """Compute the cells whose files are not there, in order, until the time is up; tells of each on standard error.

    Args:
        cells: file to what is to be computed.
        compute: called with a cell and its file, in another process.
        minutes: after which no cell is begun.
        processes: at a time.
    """
    queue = [(path, cell) for path, cell in cells.items() if not path.exists()]
    n, done, end = len(queue), 0, time.monotonic() + 60 * minutes
    for path, _ in queue:
        path.parent.mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor(processes) as pool:
        running: dict[Any, Any] = {}
        while running or (queue and time.monotonic() < end):
            while queue and len(running) < processes and time.monotonic() < end:
                path, cell = queue.pop(0)
                running[pool.submit(compute, cell, path)] = cell
            future = next(as_completed(list(running)))
            cell = running.pop(future)
            future.result()
            done += 1
            print(f"{time.strftime('%H:%M:%S')} {done} of {n}: {cell}", file=sys.stderr, flush=True)
