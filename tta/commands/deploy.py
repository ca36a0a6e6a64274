"""`tta deploy`: another bundle in the place of the present one, without a gap."""

import time
from pathlib import Path
from typing import Annotated, Any

import typer

from tta.commands.output import CONTROL, ControlEndpoint, Json, connect, print_json, progress_console
from tta.errors import PreconditionError, TTAError, UnavailableError
from tta.protocol import Deploy

LOOK_S = 0.25
CALL_S = 60.0  # seconds to read and copy the bundle


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("deploy")(deploy)


def deploy(
    bundle: Annotated[Path, typer.Argument(help="Bundle, at this path on the daemon's machine.")],
    force: Annotated[
        bool, typer.Option("--force", help="Also if clients notice: other classes, image shape or preprocessing.")
    ] = False,
    control: ControlEndpoint = CONTROL,
    timeout_s: Annotated[float, typer.Option("--timeout-s", min=0.0, help="Seconds until it serves.")] = 300.0,
    as_json: Json = False,
) -> None:
    """Serve another bundle in the place of the present one: the present one serves until the other is warm.

    Labels, versions and regimes of the present one are put aside, and come back when it is deployed again. If the
    other does not start, the present one serves on.
    """
    start = time.monotonic()
    with connect(control, timeout_s=min(CALL_S, timeout_s)) as client:
        reply = client.call(Deploy(bundle=str(bundle.absolute()), force=force))
        wanted, former = reply["bundle_sha256"], reply["former_sha256"]
        if not as_json:
            for change in reply["changes"]:
                progress_console.print(f"clients notice: {change}")
    with progress_console.status(
        f"{reply['name']} ({wanted[:12]}…) is checked and copied; it loads beside the present one"
    ):
        status = _await(control, wanted, start + timeout_s)
    took = time.monotonic() - start
    if as_json:
        print_json(
            {"name": reply["name"], "bundle_sha256": wanted, "former_sha256": former, "took_s": round(took, 3)}
        )
    else:
        print(f"{status['name']} ({wanted[:12]}…) serves, {took:.1f} s after the command; before: {former[:12]}…")


def _await(control: str, wanted: str, end: float) -> dict[str, Any]:
    """The daemon's status once it serves the bundle.

    Raises:
        PreconditionError: it serves the former again, and says why.
        UnavailableError: no end in time.
    """
    while time.monotonic() < end:
        time.sleep(LOOK_S)
        try:
            with connect(control, timeout_s=1.0) as client:
                status = client.status()
        except TTAError:  # the daemon is between the two
            continue
        if status["bundle_sha256"] == wanted:
            return status
        last: dict[str, Any] = next((e for e in reversed(status["events"]) if e["event"].startswith("deploy")), {})
        if last.get("event") == "deploy_failed":
            raise PreconditionError(f"the former bundle serves on: {last['error']}")
    raise UnavailableError("the bundle does not serve yet: see `tta status` and the daemon's log", 1.0)
