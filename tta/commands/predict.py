"""`tta predict`: classify pictures."""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from tta.commands.output import ENDPOINT, Endpoint, Json, Timeout, connect, print_json, print_table
from tta.errors import InputError

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
    unreadable = 0
    rows: list[dict[str, Any]] = []
    with connect(endpoint=endpoint, timeout_s=timeout_s) as client:
        about = client.metadata()
        shape = about["inputs"][0]["shape"][1:]
        for start in range(0, len(files), BATCH):
            batch = files[start : start + BATCH]
            images = []
            for file in list(batch):
                try:
                    images.append(read_image(file, shape, about["resize"]))
                except InputError as error:  # one broken file does not stop a folder
                    print(f"tta: {error}", file=sys.stderr)
                    batch.remove(file)
                    unreadable += 1
            if not batch:
                continue
            answer = client.predict(np.stack(images))
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
    if unreadable:
        raise typer.Exit(1)
