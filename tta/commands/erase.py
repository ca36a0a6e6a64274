"""`tta erase`: delete stored images and their labels."""

from typing import Annotated

import typer

from tta.commands.output import CONTROL, ControlEndpoint, Json, Timeout, connect, print_json
from tta.errors import InputError
from tta.protocol import Erase

AT_A_TIME = 1024


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("erase")(erase)


def erase(
    prediction_ids: Annotated[
        list[int] | None, typer.Argument(help="Predictions whose image and label go.")
    ] = None,
    everything: Annotated[
        bool, typer.Option("--everything", help="All of them, and the images of regimes and former bundles.")
    ] = False,
    control: ControlEndpoint = CONTROL,
    timeout_s: Timeout = 60.0,
    as_json: Json = False,
) -> None:
    """Delete images and labels from the daemon's memory and disk, and write zeros in their place in the database.

    Images of regimes have no prediction ids: they go with `--everything`, or by age (`daemon.images_age_s`).
    Versions stay, which are weights that have learned from them. An adaptation under way is given up.
    """
    ids = list(prediction_ids or [])
    if bool(ids) == everything:
        raise InputError("name the predictions whose images go, or --everything")
    erased = {"labels": 0, "images": 0}
    set_aside = 0
    with connect(control, timeout_s=timeout_s) as client:
        for begin in range(0, max(1, len(ids)), AT_A_TIME):
            reply = client.call(Erase(prediction_ids=ids[begin : begin + AT_A_TIME], everything=everything))
            erased = {what: n + reply[what] for what, n in erased.items()}
            set_aside = reply["set_aside"]
    if as_json:
        print_json({**erased, "set_aside": set_aside})
    else:
        print(f"{erased['labels']} labels erased with their images, and {erased['images']} images of regimes")
        if set_aside:
            print(f"{set_aside} damaged files in the state folder may hold more: --everything deletes them too")
