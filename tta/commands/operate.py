"""`tta pause`, `resume`, `adapt`, `approve`, `accept`: the operator's hand on the cycle."""

from typing import Any

import typer

from tta.commands.output import CONTROL, ControlEndpoint, Json, Timeout, connect, print_json
from tta.protocol import Accept, Adapt, Approve, Pause, Request, Resume


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command("pause")(pause)
    app.command("resume")(resume)
    app.command("adapt")(adapt)
    app.command("approve")(approve)
    app.command("accept")(accept)


def pause(control: ControlEndpoint = CONTROL, timeout_s: Timeout = 10.0, as_json: Json = False) -> None:
    """Go on serving and watching, but change nothing until `tta resume`."""
    _send(Pause(), control, timeout_s, as_json, "paused: serving goes on, nothing will be changed")


def resume(control: ControlEndpoint = CONTROL, timeout_s: Timeout = 10.0, as_json: Json = False) -> None:
    """Decide again after `tta pause`."""
    _send(Resume(), control, timeout_s, as_json, "resumed")


def adapt(control: ControlEndpoint = CONTROL, timeout_s: Timeout = 10.0, as_json: Json = False) -> None:
    """Adapt now with the labels there are; the gate still decides."""
    _send(Adapt(), control, timeout_s, as_json, "adapting with {labels} labels: see `tta status`")


def approve(control: ControlEndpoint = CONTROL, timeout_s: Timeout = 10.0, as_json: Json = False) -> None:
    """Promote the candidate that `mode: propose` has prepared."""
    _send(Approve(), control, timeout_s, as_json, "version {version} is being promoted")


def accept(control: ControlEndpoint = CONTROL, timeout_s: Timeout = 10.0, as_json: Json = False) -> None:
    """Take the present shift for normal: what serves goes on, and the shift is no alarm when it returns."""
    _send(Accept(), control, timeout_s, as_json, "regime {regime} is normal from now on")


def _send(request: Request, control: str, timeout_s: float, as_json: bool, text: str) -> None:
    with connect(control, timeout_s=timeout_s) as client:
        reply: dict[str, Any] = client.call(request)
    shown = {k: v for k, v in reply.items() if k not in ("v", "id", "code")}
    print_json(shown) if as_json else print(text.format(**shown))
