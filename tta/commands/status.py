"""`tta status`: what the daemon is doing."""

from typing import Any

import typer

from tta.commands.output import CONTROL, ControlEndpoint, Json, Timeout, connect, console, print_json

BAR = 20
WIDTH = 78  # characters of an event's line
DETAILS = (  # of an event, worth a person's glance; the log has all
    "cause",
    "kind",
    "keys",
    "onset",
    "labels",
    "errors",
    "candidate",
    "serving",
    "regime",
    "block",
    "accuracy",
    "p_val",
    "reason",
    "wanted",
    "process",
    "client",
    "error",
    "predicted_loss",
    "effect",
)


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("status")(status)


def status(control: ControlEndpoint = CONTROL, timeout_s: Timeout = 10.0, as_json: Json = False) -> None:
    """Show state, version, drift by block, accuracy, labels, processes and the last events."""
    with connect(control, timeout_s=timeout_s) as client:
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
    if now["mode_reason"]:
        lines.append(f"  mode       {now['mode_reason']}")
    for title, line in zip(("shift", "", "", ""), shift_lines(now["shift"]), strict=False):
        lines.append(f"  {title:<10} {line}")
    if now["adapter"]:
        a = now["adapter"]
        lines.append(f"  adapter    {a['stage']} {a['done']} of {a['total']}")
    for name, value in now["drift"].items():
        filled = min(BAR, round(value * BAR / 2))
        bar = "█" * filled + "·" * (BAR - filled)
        lines.append(f"  drift      {name:<8} {bar} {value:7.2f}{'  over' if value > 1 else ''}")
    if now["class_statistic"] > 1:
        lines.append(
            f"  classes    {now['class_statistic']:.1f} times the threshold: another mix of predicted classes"
        )
    lines.append(
        f"  watching   a false alarm in {now['arl']:,.0f} samples (estimated {now['realised_arl']:,}): "
        f"{_number(now['false_alarms_per_day'])} a day now"
    )
    accuracy = ", ".join(f"{model} {100 * value:.0f} %" for model, value in now["accuracy"].items())
    lines += [
        f"  accuracy   {accuracy or 'no labels yet'} ({now['labels_buffered']} labels on disk)",
        f"             source by its own confidence {100 * now['predicted_accuracy']:.0f} %",
    ]
    for each in now["clients_disagree"]:
        own, others = _share(each["errors"], each["labels"]), _share(each["others_errors"], each["others"])
        lines.append(f"  labels     client {each['client']!r} disagrees: calls {own} wrong, the others {others}")
    up = ", ".join(
        f"{name} {'up' if p['ready'] else 'idle' if p['pid'] is None else 'starting'}"
        + (f" (restarted {p['restarts']}×)" if p["restarts"] else "")
        for name, p in now["processes"].items()
    )
    lines.append(f"  processes  {up}")
    lines += ["  " + describe(event) for event in now["events"][-events:]] if events else []
    return lines


def shift_lines(shift: dict[str, Any] | None) -> list[str]:
    """Kind, labels, how sure the kind is, how far it went and where it shows most: four lines at most."""
    if not shift:
        return []
    unused = shift["labels_given"] - shift["labels"]
    worth = {None: "being weighed", True: "worth acting on", False: "no reason to act"}[shift["actionable"]]
    lines = [
        f"{shift['kind'] or 'not diagnosed yet'}, found by {shift['cause']}, {worth}, "
        f"{shift['labels']} of {shift['labels_wanted']} labels"
        + (f" ({unused} more, see labels.client_share)" if unused else "")
        + (f", only {', '.join(shift['keys'])}" if shift["keys"] else "")
        + (f", version {shift['proposal']} waits for `tta approve`" if shift["proposal"] else "")
    ]
    diagnosis = shift["diagnosis"]
    if diagnosis:
        lines.append(
            f"{100 * diagnosis['confidence']:.0f} % sure, {diagnosis['effect']:.1f} standard deviations, "
            f"depth {100 * diagnosis['depth']:.0f} %"
        )
        lines += diagnosis["channels"][:2]
    return lines


def _share(part: int, whole: int) -> str:
    return f"{part} of {whole} ({100 * part / whole:.0f} %)"


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.2g}"


def describe(event: dict[str, Any]) -> str:
    """One line of what happened: place in the stream, event, its most telling numbers."""
    if "accuracy_candidate" in event:
        gain = f"{100 * event['accuracy_serving']:.0f} → {100 * event['accuracy_candidate']:.0f} %"
        event = {**event, "accuracy": gain}
    line = f"{event['sequence']:>7}  {event['event']:<14}"
    separator = " "
    for key in DETAILS:
        value = event.get(key)
        if value in ("", None, []):
            continue
        shown = f"{value:.3g}" if isinstance(value, float) else str(value)
        if isinstance(value, list):
            shown = "+".join(map(str, value))
        part = f"{separator}{key} {shown}"
        if len(line) + len(part) <= WIDTH:
            line, separator = line + part, ", "
    return line
