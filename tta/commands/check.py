"""`tta check`: would it serve? Load everything, warm up, exit."""

import time
from pathlib import Path
from typing import Annotated

import typer

from tta.commands.output import Json, print_json
from tta.commands.serve import parse_overrides


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("check")(check)


def check(
    bundle: Annotated[Path | None, typer.Argument(help="Bundle to check; default: the configuration's.")] = None,
    config: Annotated[Path | None, typer.Option("--config", help="YAML file with settings.")] = None,
    settings: Annotated[list[str] | None, typer.Option("--set", help="Any setting.")] = None,
    as_json: Json = False,
) -> None:
    """Load configuration and bundle, build and warm the model, predict the anchor set, exit."""
    import numpy as np

    from tta.bundle import load_bundle, source_is_importable
    from tta.config import load_config
    from tta.server.predictor import Predictor, resolve_precision

    overrides: dict[str, object] = dict(parse_overrides(settings or []))
    if bundle is not None:
        overrides["bundle"] = bundle
    c = load_config(config, overrides)
    loaded = load_bundle(c.bundle)
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
        "device": predictor.device,
        "precision": precision,
        "warm_up_s": round(warm_s, 3),
        "anchor_accuracy": round(right / len(x), 4),
        "blocks": [b.name for b in loaded.manifest.blocks],
        "can_adapt": importable,
        "finite": bool(all(np.isfinite(w).all() for w in loaded.weights.values())),
    }
    if as_json:
        print_json(result)
    else:
        print(
            f"ok: {result['name']} on {result['device']} in {precision}, warm in {warm_s:.2f} s, "
            f"{100 * right / len(x):.1f} % on the anchor set"
        )
        if not importable:
            source = loaded.manifest.source
            print(f"warning: {source!r} cannot be imported from here, so nothing can be adapted: set PYTHONPATH")
