"""`tta predict`: classify pictures."""

from pathlib import Path
from typing import Annotated, Any

import typer

from tta.client import Client
from tta.commands.output import CONTROL, ENDPOINT, Endpoint, Json, Timeout, print_json, print_table

BATCH = 16


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("predict")(predict)


def predict(
    paths: Annotated[list[Path], typer.Argument(help="Pictures or folders of them.")],
    endpoint: Endpoint = ENDPOINT,
    timeout_s: Timeout = 10.0,
    as_json: Json = False,
) -> None:
    """Classify pictures, resized as the model's manifest says; prints class, confidence and prediction id."""
    import numpy as np

    from tta.images import find_images, read_image

    files = [f for path in paths for f in find_images(path)]
    rows: list[dict[str, Any]] = []
    with Client(endpoint, CONTROL, timeout_s) as client:
        about = client.metadata()
        shape = about["inputs"][0]["shape"][1:]
        for start in range(0, len(files), BATCH):
            batch = files[start : start + BATCH]
            x = np.stack([read_image(f, shape, about["resize"]) for f in batch])
            answer = client.predict(x)
            p = np.exp(answer.logits - answer.logits.max(axis=1, keepdims=True))
            p /= p.sum(axis=1, keepdims=True)
            for i, file in enumerate(batch):
                top = int(p[i].argmax())
                rows.append(
                    {
                        "file": str(file),
                        "class": about["classes"][top],
                        "index": top,
                        "confidence": round(float(p[i, top]), 4),
                        "prediction_id": answer.prediction_id + i,
                        "version": answer.version,
                    }
                )
    if as_json:
        print_json(rows)
    else:
        print_table(
            ["file", "class", "confidence", "prediction id", "version"],
            [[r["file"], r["class"], r["confidence"], r["prediction_id"], r["version"]] for r in rows],
        )
