"""`tta top`: a live view of a running daemon in the terminal, with the operator's keys."""

import time
from collections import deque
from dataclasses import dataclass
from typing import Annotated, Any

import typer

from tta.commands.output import CONTROL, ControlEndpoint, Timeout, connect, credentials

WINDOW_S = 10.0  # that rates and latencies are of


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("top")(top)


def top(
    control: ControlEndpoint = CONTROL,
    timeout_s: Timeout = 3.0,
    every_s: Annotated[float, typer.Option("--every-s", min=0.1, help="Seconds between two looks.")] = 1.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print each look as a line of JSON instead.")] = False,
) -> None:
    """Watch a daemon live: traffic, drift by block, labels, versions; keys to pause, adapt, roll back."""
    if as_json:
        _print_looks(control, timeout_s, every_s)
        return
    from tta.commands.screen import Screen  # textual takes a moment to import

    Screen(control, timeout_s, every_s, credentials()).run()


def _print_looks(control: str, timeout_s: float, every_s: float) -> None:
    """One line of JSON a look, until interrupted or until the daemon does not answer."""
    import json

    recent = Recent()
    with connect(control, timeout_s=timeout_s) as client:
        while True:
            now = client.status()
            rates = recent.take(time.monotonic(), now["traffic"])
            print(json.dumps({**{k: v for k, v in now.items() if k not in ("v", "id", "code")}, **vars(rates)}))
            time.sleep(every_s)


@dataclass(frozen=True)
class Rates:
    """Of the last `WINDOW_S`.

    Attributes:
        requests_per_s: answered.
        images_per_s: predicted.
        refused_per_s: on arrival.
        p50_s: seconds half of the requests took at most, to a bucket of the server's histogram; None: no request.
        p99_s: the same for 99 %.
    """

    requests_per_s: float = 0.0
    images_per_s: float = 0.0
    refused_per_s: float = 0.0
    p50_s: float | None = None
    p99_s: float | None = None


class Recent:
    """Turns the totals that `status` tells into rates."""

    def __init__(self) -> None:
        self._looks: deque[tuple[float, dict[str, Any]]] = deque()

    def take(self, now_s: float, totals: dict[str, Any]) -> Rates:
        """The rates since about `WINDOW_S` ago.

        Args:
            now_s: monotonic seconds of the look.
            totals: `traffic` of the status.
        """
        if self._looks and totals["images"] < self._looks[-1][1]["images"]:
            self._looks.clear()  # another daemon, which counts from zero
        self._looks.append((now_s, totals))
        while len(self._looks) > 2 and self._looks[1][0] <= now_s - WINDOW_S:
            self._looks.popleft()
        began, before = self._looks[0]
        if now_s <= began:
            return Rates()
        counts = [b - a for a, b in zip(before["durations"], totals["durations"], strict=True)]
        refused = sum(totals["rejected"].values()) - sum(before["rejected"].values())
        return Rates(
            sum(counts) / (now_s - began),
            (totals["images"] - before["images"]) / (now_s - began),
            refused / (now_s - began),
            quantile(0.5, totals["bounds_s"], counts),
            quantile(0.99, totals["bounds_s"], counts),
        )


def quantile(q: float, bounds: list[float], counts: list[int]) -> float | None:
    """Estimate a quantile from a histogram, evenly within its bucket, as Prometheus' `histogram_quantile` does.

    Args:
        q: in [0, 1].
        bounds: upper bounds of the buckets, ascending.
        counts: of each bucket, and of what lies beyond the last bound.

    Returns:
        The quantile, at most the last bound; None if there is nothing.
    """
    total = sum(counts)
    if not total:
        return None
    rank, below, low = q * total, 0, 0.0
    for bound, count in zip(bounds, counts, strict=False):
        if below + count >= rank and count:
            return low + (bound - low) * (rank - below) / count
        below, low = below + count, bound
    return bounds[-1]
