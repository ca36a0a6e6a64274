"""`tta versions`, `tta rollback`, `tta reset`."""

from typing import Annotated, Any

import typer

from tta.commands.output import CONTROL, ControlEndpoint, Json, Timeout, connect, print_json, print_table
from tta.protocol import Reset, Rollback


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command("versions")(versions)
    app.command("rollback")(rollback)
    app.command("reset")(reset)


def versions(control: ControlEndpoint = CONTROL, timeout_s: Timeout = 10.0, as_json: Json = False) -> None:
    """List every version, what was operated on, and the gate's numbers; rejected ones too."""
    with connect(control, timeout_s=timeout_s) as client:
        found = client.versions()
    if as_json:
        print_json(found)
        return
    rows = []
    for v in found:
        rows.append(
            ["→" if v["serving"] else "", v["version"], v["block"] or "–", v["start"] or "–", gate_line(v)]
        )
    print_table(["", "version", "block", "start", "gate"], rows)


def gate_line(version: dict[str, Any]) -> str:
    """What the gate found of one of `versions`, in a line."""
    verdict = version.get("verdict", {})
    if "damaged" in version:
        return f"damaged: {version['damaged']}"
    if "accuracy_serving" in verdict:
        dropped = "" if version.get("has_weights", True) else f"{verdict['outcome']}, {verdict['reason']}: "
        return (
            f"{dropped}{100 * verdict['accuracy_serving']:.1f} → {100 * verdict['accuracy_candidate']:.1f} % "
            f"on {verdict['n_labels']} labels, p {verdict['p_val']:.2g}"
        )
    return str(verdict.get("reason") or ("not judged yet" if version["version"] else "the source model"))


def rollback(
    version: Annotated[int | None, typer.Argument(help="Version to serve; default: the one before.")] = None,
    control: ControlEndpoint = CONTROL,
    timeout_s: Timeout = 60.0,
    as_json: Json = False,
) -> None:
    """Serve an earlier version again."""
    with connect(control, timeout_s=timeout_s) as client:
        now = client.call(Rollback(version=version))["version"]
    print_json({"version": now}) if as_json else print(f"serving version {now}")


def reset(control: ControlEndpoint = CONTROL, timeout_s: Timeout = 60.0, as_json: Json = False) -> None:
    """Serve the source model again, forget the cure it leaves, and watch from home."""
    with connect(control, timeout_s=timeout_s) as client:
        now = client.call(Reset())["version"]
    print_json({"version": now}) if as_json else print(f"serving version {now}")
