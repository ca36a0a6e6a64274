"""`tta check`: would it serve? Read the state folder, load everything, warm up, exit."""

import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tta.commands.output import Json, print_json
from tta.commands.serve import parse_overrides

if TYPE_CHECKING:
    from tta.daemon.inspection import Finding


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("check")(check)


def check(
    bundle: Annotated[Path | None, typer.Argument(help="Bundle to check; default: the configuration's.")] = None,
    config: Annotated[Path | None, typer.Option("--config", help="YAML file with settings.")] = None,
    state: Annotated[Path | None, typer.Option("--state", help="State folder to check.")] = None,
    repair: Annotated[
        bool, typer.Option("--repair", help="Set damaged files aside; of labels keep what can be read.")
    ] = False,
    settings: Annotated[list[str] | None, typer.Option("--set", help="Any setting.")] = None,
    as_json: Json = False,
) -> None:
    """Read the state folder to its end, load and warm the model, predict the anchor set, exit.

    Damaged files are listed with what is lost without them; `--repair` renames them, so that a daemon goes on
    without, and never deletes one. The exit status is 1 while there are any.
    """
    import numpy as np

    from tta.bundle import check_signed, load_bundle, source_is_importable
    from tta.config import load_config
    from tta.daemon.deployment import Deployment
    from tta.daemon.inspection import inspect
    from tta.errors import ConfigError
    from tta.server.predictor import Predictor, resolve_precision
    from tta.signatures import SigningKey, signers_of_versions

    overrides: dict[str, object] = dict(parse_overrides(settings or []))
    if bundle is not None:
        overrides["bundle"] = bundle
    if state is not None:
        overrides["state"] = state
    c = load_config(config, overrides)
    if (state is not None or repair) and not c.state.is_dir():
        raise ConfigError(f"state folder {c.state} does not exist: nothing to check there")
    key = SigningKey(c.security.signing_key) if c.security.signing_key is not None else None
    whose = signers_of_versions(c.security.signers, key)
    findings = inspect(c.state, repair, whose) if c.state.is_dir() else []
    damaged = [f for f in findings if f.problem]
    if not as_json:
        for line in _lines(c.state, findings):
            print(line)
    served = Deployment(c.state).bundle_in_force(c.bundle)
    if served != c.bundle and not as_json:
        print(f"note: {c.bundle} is configured, a start serves what was deployed since: {served}")
    loaded = load_bundle(served)
    signed_by = check_signed(loaded, c.security.signers) if c.security.signers is not None else None
    c.check_model([b.name for b in loaded.manifest.blocks])
    importable = source_is_importable(loaded.manifest.source)
    start = time.perf_counter()
    precision = resolve_precision(c.precision, c.device)
    limits = (c.server.threads, c.server.max_batch_size, precision, c.server.gpu_memory_bytes)
    predictor = Predictor(loaded, c.device, *limits)
    predictor.activate(predictor.prepare())
    warm_s = time.perf_counter() - start
    x, y = loaded.anchor["x"], loaded.anchor["y"]
    size = c.server.max_batch_size
    right = sum(
        int((predictor.run(x[i : i + size]).logits.argmax(axis=1) == y[i : i + size]).sum())
        for i in range(0, len(x), size)
    )
    result = {
        "name": loaded.manifest.name,
        "bundle": str(served),
        "device": predictor.device,
        "precision": precision,
        "warm_up_s": round(warm_s, 3),
        "anchor_accuracy": round(right / len(x), 4),
        "blocks": [b.name for b in loaded.manifest.blocks],
        "can_adapt": importable,
        "signed_by": signed_by,
        "finite": bool(all(np.isfinite(w).all() for w in loaded.weights.values())),
    }
    if as_json:
        print_json({**result, "state": [asdict(f) for f in findings]})
    else:
        print(
            f"ok: {result['name']} on {result['device']} in {precision}, warm in {warm_s:.2f} s, "
            f"{100 * right / len(x):.1f} % on the anchor set{f', signed by {signed_by}' if signed_by else ''}"
        )
        if not importable:
            source = loaded.manifest.source
            print(f"warning: {source!r} cannot be imported from here, so nothing can be adapted: set PYTHONPATH")
    if any(not f.repaired for f in damaged):
        raise typer.Exit(1)


def _lines(root: Path, findings: "list[Finding]") -> list[str]:
    """What is worth reading of a state folder."""
    if not findings:
        return []
    damaged = [f for f in findings if f.problem]
    unused = [f for f in findings if f.consequence and not f.problem]
    lines = []
    for f in damaged:
        lines.append(f"damaged: {f.problem}")
        lines.append(f"         {f.repaired or 'tta check --repair sets it aside'}; without it, {f.consequence}")
    lines += [f"unused: {f.file}: {f.consequence}" for f in unused]
    sound = len(findings) - len(damaged) - len(unused)
    lines.append(f"{'ok' if not damaged else 'state'}: {root}, {sound} sound, {len(damaged)} damaged")
    return lines
