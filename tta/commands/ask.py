"""`tta ask`: which predictions are worth a label; as a list, or as a page on which to label them."""

from typing import Annotated

import typer

from tta.commands.output import CONTROL, ControlEndpoint, Json, Timeout, connect, print_json, print_table
from tta.protocol import Metadata


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("ask")(ask)


def ask(
    n: Annotated[int, typer.Option("-n", min=1, help="How many; on a page, at a time.")] = 16,
    page: Annotated[bool, typer.Option("--page", help="Label them on a web page of this machine.")] = False,
    port: Annotated[int, typer.Option(min=0, max=65535, help="Of the page; 0: a free one.")] = 0,
    control: ControlEndpoint = CONTROL,
    timeout_s: Timeout = 10.0,
    as_json: Json = False,
) -> None:
    """List recent predictions whose labels would help most: since the shift, spread over the predicted classes."""
    with connect(control, timeout_s=timeout_s) as client:
        if page:
            from tta.commands.page import serve_page

            serve_page(client, n, port, as_json)
            return
        questions = client.ask(n)
        classes = client.call(Metadata())["classes"]
    if as_json:
        shown = ("prediction_id", "predicted", "uncertainty")
        print_json([{name: getattr(q, name) for name in shown} for q in questions])
    elif not questions:
        print("no recent prediction with an image waits for a label")
    else:
        rows = [[q.prediction_id, classes[q.predicted], q.uncertainty] for q in questions]
        print_table(["prediction id", "predicted", "uncertainty"], rows)
