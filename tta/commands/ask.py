"""`tta ask`: which predictions are worth a label."""

from typing import Annotated

import typer

from tta.commands.output import CONTROL, ControlEndpoint, Json, Timeout, connect, print_json, print_table
from tta.protocol import Ask, Metadata


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("ask")(ask)


def ask(
    n: Annotated[int, typer.Option("-n", min=1, help="How many.")] = 16,
    control: ControlEndpoint = CONTROL,
    timeout_s: Timeout = 10.0,
    as_json: Json = False,
) -> None:
    """List recent predictions whose labels would help most: since the shift, spread over the predicted classes."""
    with connect(control, timeout_s=timeout_s) as client:
        predictions = client.call(Ask(n=n))["predictions"]
        classes = client.call(Metadata())["classes"]
    if as_json:
        print_json(predictions)
    elif not predictions:
        print("no recent prediction with an image waits for a label")
    else:
        rows = [[p["prediction_id"], classes[p["predicted"]], p["uncertainty"]] for p in predictions]
        print_table(["prediction id", "predicted", "uncertainty"], rows)
