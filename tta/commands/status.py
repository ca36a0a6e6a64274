"""`tta status`: what the daemon is doing."""

from typing import Any

import typer

from tta.client import Client
from tta.commands.output import CONTROL, ENDPOINT, ControlEndpoint, Json, Timeout, console, print_json

BAR = 20


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("status")(status)


def status(control: ControlEndpoint = CONTROL, timeout_s: Timeout = 10.0, as_json: Json = False) -> None:
    """Show state, version, drift by block, accuracy, labels, processes and the last events."""
    with Client(ENDPOINT, control, timeout_s) as client:
        now = client.status()
    if as_json:
        print_json({k: v for k, v in now.items() if k not in ("v", "id", "code")})
    else:
        for line in status_lines(now):
            console.print(line, markup=False, highlight=False)


def status_lines(now: dict[str, Any], events: int = 8) -> list[str]:
    """The status as lines of text, for this command and the demo's live view."""
    state = now["state"] + (" (paused)" if now["paused"] else "")
    lines = [f"{now['name']}: {state}, version {now['version']}, regime {now['regime']}, mode {now['mode']}"]
    shift = now["shift"]
    if shift:
        lines.append(
            f"  shift      {shift['kind'] or 'not diagnosed yet'}, found by {shift['cause']}, "
            f"{shift['labels']} of {shift['labels_wanted']} labels"
            + (f", version {shift['proposal']} waits for `tta approve`" if shift["proposal"] else "")
        )
    if now["adapter"]:
        a = now["adapter"]
        lines.append(f"  adapter    {a['stage']} {a['done']} of {a['total']}")
    for name, value in now["drift"].items():
        filled = min(BAR, round(value * BAR / 2))
        bar = "█" * filled + "·" * (BAR - filled)
        lines.append(f"  drift      {name:<8} {bar} {value:7.2f}{'  over' if value > 1 else ''}")
    accuracy = ", ".join(f"{model} {100 * value:.0f} %" for model, value in now["accuracy"].items())
    lines.append(f"  labelled   {accuracy or 'no labels yet'} ({now['labels_buffered']} labels on disk)")
    up = ", ".join(
        f"{name} {'up' if p['ready'] else 'idle' if p['pid'] is None else 'starting'}"
        + (f" ({p['restarts']} restarts)" if p["restarts"] else "")
        for name, p in now["processes"].items()
    )
    lines.append(f"  processes  {up}")
    for event in now["events"][-events:] if events else []:
        known = {"event", "sequence", "time_s", "version", "before", "after"}
        detail = ", ".join(
            f"{k} {v}" for k, v in event.items() if k not in known and not isinstance(v, dict | list)
        )
        lines.append(f"  {event['sequence']:>9}  {event['event']}: {detail[:100]}")
    return lines
