"""The screen of `tta top`, drawn by textual: one thread asks the daemon, the terminal shows and takes keys."""

import queue
import time
from dataclasses import dataclass
from typing import Any, ClassVar

from rich.text import Text
from textual.app import App, ComposeResult
from textual.binding import BindingType
from textual.containers import Horizontal, Vertical
from textual.widgets import DataTable, Footer, Sparkline, Static

from tta.client import DEFAULT_ENDPOINT, Client
from tta.commands.status import describe, shift_lines
from tta.commands.top import WINDOW_S, Rates, Recent
from tta.commands.versions import gate_line
from tta.errors import TTAError
from tta.keys import Credentials
from tta.protocol import Adapt, Approve, Pause, Request, Reset, Resume, Rollback

BAR = 24  # characters; the threshold is in the middle
LOOKS = 240  # in the curves
COMMAND_S = 60.0  # seconds a command may take: a swap prepares its version first
SURE_S = 5.0  # seconds in which a key that changes what is served has to be pressed again
EVENTS = 8
COLOURS = {"stable": "green", "drifted": "yellow", "adapting": "magenta", "probation": "cyan"}


@dataclass(frozen=True)
class Look:
    """What the daemon said at one time.

    Attributes:
        status: its `status`.
        versions: its `versions`.
        rates: of its traffic.
    """

    status: dict[str, Any]
    versions: list[dict[str, Any]]
    rates: Rates


class Screen(App[None]):
    """Traffic, drift, shift and versions of one daemon, and the operator's keys."""

    TITLE = "tta top"
    ENABLE_COMMAND_PALETTE = False
    CSS = """
    #head { height: 1; background: $boost; padding: 0 1; }
    #columns { height: 1fr; }
    .panel { border: round $surface-lighten-2; border-title-color: $text-muted; padding: 0 1; }
    #left, #right { width: 1fr; }
    #traffic { height: 9; }
    #drift { height: 1fr; }
    #shift { height: 9; }
    #versions { height: 1fr; }
    #events { height: 10; }
    Sparkline { height: 2; }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        ("p", "pause", "pause / resume"),
        ("a", "adapt", "adapt now"),
        ("y", "approve", "approve"),
        ("b", "rollback", "roll back"),
        ("x", "reset", "reset"),
        ("q", "quit", "quit"),
    ]

    def __init__(self, control: str, timeout_s: float, every_s: float, credentials: Credentials | None) -> None:
        """Watch the daemon at `control`, looking every `every_s` seconds."""
        super().__init__()
        self._control, self._timeout_s, self._every_s = control, timeout_s, every_s
        self._credentials = credentials
        self._requests: queue.Queue[Request | None] = queue.Queue()  # None: the end
        self._look: Look | None = None
        self._heard = time.monotonic()
        self._pressed: tuple[str, float] = ("", 0.0)
        self._curve: list[float] = []
        self._commanding = False

    def compose(self) -> ComposeResult:
        """The panels."""
        yield Static("", id="head")
        with Horizontal(id="columns"):
            with Vertical(id="left"):
                with Vertical(id="traffic", classes="panel"):
                    yield Static("", id="rates")
                    yield Sparkline([], id="curve")
                yield Static("", id="drift", classes="panel")
            with Vertical(id="right"):
                yield Static("", id="shift", classes="panel")
                yield DataTable(id="versions", classes="panel", cursor_type="none", show_cursor=False)
        yield Static("", id="events", classes="panel")
        yield Footer()

    def on_mount(self) -> None:
        """Start asking."""
        for name, title in (
            ("traffic", f"traffic, last {WINDOW_S:.0f} s"),
            ("drift", "drift over its threshold, by block"),
            ("shift", "shift and labels"),
            ("versions", "versions"),
            ("events", "events"),
        ):
            self.query_one(f"#{name}").border_title = title
        self.query_one(DataTable).add_columns("", "version", "block", "gate")
        self._head(Text(f"asking {self._control} …"))
        self.run_worker(self._ask, thread=True, exit_on_error=True)

    def on_unmount(self) -> None:
        """Stop asking."""
        self._requests.put(None)

    # -- the thread that asks -----------------------------------------------------------------------------

    def _ask(self) -> None:
        recent = Recent()
        with Client(DEFAULT_ENDPOINT, self._control, self._timeout_s, credentials=self._credentials) as client:
            while self.is_running:
                client.timeout_s = self._timeout_s
                try:
                    status = client.status()
                    look = Look(status, client.versions(), recent.take(time.monotonic(), status["traffic"]))
                    self.call_from_thread(self._show, look)
                except TTAError as error:
                    self.call_from_thread(self._lost, str(error))
                try:
                    request = self._requests.get(timeout=self._every_s)
                except queue.Empty:
                    continue
                if request is None:
                    return
                self._command(client, request)

    def _command(self, client: Client, request: Request) -> None:
        name = type(request).__name__.lower()
        client.timeout_s = COMMAND_S
        try:
            reply = client.call(request)
        except TTAError as error:
            self.call_from_thread(self.notify, str(error), title=name, severity="error", markup=False)
            return
        finally:
            self._commanding = False
        said = ", ".join(f"{key} {value}" for key, value in reply.items() if key not in ("v", "id", "code"))
        self.call_from_thread(self.notify, said or "done", title=name, markup=False)

    # -- what is shown ------------------------------------------------------------------------------------

    def _show(self, look: Look) -> None:
        self._look, self._heard = look, time.monotonic()
        now, rates = look.status, look.rates
        head = Text(f"{now['name']}  ", style="bold")
        head.append(now["state"], style=f"bold {COLOURS.get(now['state'], '')}")
        head.append("  PAUSED" if now["paused"] else "", style="bold red")
        head.append(
            f"  version {now['version']}  regime {now['regime']}  mode {now['mode']}  {now['device']}", style=""
        )
        for name, process in now["processes"].items():
            mark = ("●", "green") if process["ready"] else ("○", "dim" if process["pid"] is None else "red")
            head.append(f"  {mark[0]}", style=mark[1]).append(f" {name}", style="dim")
        self._head(head)
        self._curve = [*self._curve, rates.images_per_s][-LOOKS:]
        self.query_one("#curve", Sparkline).data = self._curve
        self._update("rates", _traffic(now, rates))
        self._update("drift", _drift(now))
        self._update("shift", _shift(now))
        self._update("events", Text("\n".join(describe(e) for e in now["events"][-EVENTS:])))
        self._show_versions(look.versions)

    def _show_versions(self, versions: list[dict[str, Any]]) -> None:
        table = self.query_one(DataTable)
        rows = [
            ("→" if v["serving"] else "", str(v["version"]), v["block"] or "–", gate_line(v))
            for v in reversed(versions)
        ]
        if rows != [tuple(table.get_row_at(i)) for i in range(table.row_count)]:
            table.clear()
            table.add_rows(rows)

    def _lost(self, error: str) -> None:
        silent = time.monotonic() - self._heard
        self._head(Text(f"no answer for {silent:.0f} s, asking on: {error}", style="bold white on red"))

    def _head(self, text: Text) -> None:
        self._update("head", text)

    def _update(self, name: str, text: Text) -> None:
        self.query_one(f"#{name}", Static).update(text)

    # -- keys ---------------------------------------------------------------------------------------------

    def action_pause(self) -> None:
        """Pause, or resume."""
        paused = self._look is not None and self._look.status["paused"]
        self._send(Resume() if paused else Pause())

    def action_adapt(self) -> None:
        """Adapt with the labels there are; the gate still decides."""
        self._send(Adapt())

    def action_approve(self) -> None:
        """Promote the candidate that waits."""
        self._send_when_sure("y", "promote the candidate", Approve())

    def action_rollback(self) -> None:
        """Serve the version before."""
        self._send_when_sure("b", "serve the version before", Rollback())

    def action_reset(self) -> None:
        """Serve the source."""
        self._send_when_sure("x", "serve the source model", Reset())

    def _send(self, request: Request) -> None:
        """One command at a time: pressed again, a key is not meant for what its first press has brought about."""
        if not self._commanding:
            self._commanding = True
            self._requests.put(request)

    def _send_when_sure(self, key: str, what: str, request: Request) -> None:
        """What changes the serving version asks for the key twice."""
        now = time.monotonic()
        if self._pressed[0] == key and now - self._pressed[1] <= SURE_S:
            self._pressed = ("", 0.0)
            self._send(request)
        else:
            self._pressed = (key, now)
            self.notify(f"press {key} again to {what}", timeout=SURE_S)


def _traffic(now: dict[str, Any], rates: Rates) -> Text:
    def ms(seconds: float | None) -> str:
        return "–" if seconds is None else f"{1000 * seconds:.1f} ms"

    refused = f"{rates.refused_per_s:,.1f} refused/s"
    text = Text(f"{rates.images_per_s:,.0f} images/s   {rates.requests_per_s:,.0f} requests/s   ")
    text.append(refused, style="bold red" if rates.refused_per_s else "")
    text.append(f"\np50 {ms(rates.p50_s)}   p99 {ms(rates.p99_s)}   queued {now['traffic']['queue_images']}")
    accuracy = "   ".join(f"{model} {100 * value:.0f} %" for model, value in now["accuracy"].items())
    text.append(f"\naccuracy   {accuracy or 'no labels yet'}")
    text.append(f"   by confidence {100 * now['predicted_accuracy']:.0f} %", style="dim")
    return text


def _drift(now: dict[str, Any]) -> Text:
    """A bar for each block and for the other detectors; the threshold is in its middle."""
    values = {
        **now["drift"],
        "classes": now["class_statistic"],
        "slow": now["conformal_statistic"],
        "labels": now["label_statistic"],
    }
    width = max(map(len, values))
    text = Text()
    for name, value in values.items():
        filled = min(BAR, round(value * BAR / 2))
        colour = "red" if value > 1 else "yellow" if value > 0.7 else "green"
        bar = "█" * filled + "·" * (BAR - filled)
        text.append(f"{name:<{width}} ")
        text.append(bar[: BAR // 2], style=colour).append("│", style="bold").append(bar[BAR // 2 :], style=colour)
        text.append(f" {value:6.2f}\n", style="bold red" if value > 1 else "")
    text.append(f"{now['false_alarms_per_day']:,.2g} false alarms a day expected", style="dim")
    return text


def _shift(now: dict[str, Any]) -> Text:
    shift, adapter = now["shift"], now["adapter"]
    if not shift:
        return Text(f"none; {now['labels_buffered']} labels on disk", style="dim")
    wanted = shift["labels_wanted"]
    filled = BAR if not wanted else min(BAR, BAR * shift["labels"] // wanted)
    text = Text("labels  ").append("█" * filled, style="cyan").append("·" * (BAR - filled), style="dim")
    text.append(f" {shift['labels']} of {wanted}\n")
    if adapter:
        text.append(f"adapter {adapter['stage']} {adapter['done']} of {adapter['total']}\n", style="magenta")
    return text.append("\n".join(shift_lines(shift)))
