"""`tta label`: say what a picture really showed."""

from pathlib import Path
from typing import Annotated

import typer

from tta.commands.output import CONTROL, ControlEndpoint, Json, Timeout, connect, print_json
from tta.errors import InputError
from tta.protocol import Metadata


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("label")(label)


def label(
    pairs: Annotated[
        list[str] | None, typer.Argument(help="PREDICTION_ID=CLASS (index or name), or =correct, or =wrong.")
    ] = None,
    csv: Annotated[Path | None, typer.Option(help="File with lines PREDICTION_ID,CLASS.")] = None,
    control: ControlEndpoint = CONTROL,
    timeout_s: Timeout = 10.0,
    as_json: Json = False,
) -> None:
    """Send labels for predictions; they are on disk when this returns."""
    lines = list(pairs or [])
    if csv is not None:
        try:
            lines += [line.replace(",", "=", 1) for line in csv.read_text().splitlines() if line.strip()]
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{csv} cannot be read: {error}") from error
    if not lines:
        raise InputError("nothing to send: give PREDICTION_ID=CLASS or --csv FILE")
    with connect(control, timeout_s=timeout_s) as client:
        classes = client.call(Metadata())["classes"]
        ids, labels, judged_ids, judgements = [], [], [], []
        for line in lines:
            identifier, _, value = line.partition("=")
            value = value.strip()
            if not identifier.strip().isdigit() or not value:
                raise InputError(f"{line!r}: write PREDICTION_ID=CLASS")
            if value in ("correct", "wrong"):
                judged_ids.append(int(identifier))
                judgements.append(value == "correct")
            elif value in classes:
                ids.append(int(identifier))
                labels.append(classes.index(value))
            elif value.isdigit():
                ids.append(int(identifier))
                labels.append(int(value))
            else:
                raise InputError(f"{value!r} is no class: the model has {', '.join(classes)}")
        outcomes = dict(zip(ids, client.label(ids, labels), strict=True)) if ids else {}
        if judged_ids:
            outcomes |= dict(zip(judged_ids, client.label(judged_ids, correct=judgements), strict=True))
    if as_json:
        print_json({str(k): v for k, v in outcomes.items()})
    else:
        for prediction_id, outcome in outcomes.items():
            print(f"{prediction_id}: {outcome}")
    if any(o in ("unknown", "expired") for o in outcomes.values()):
        raise typer.Exit(1)
