"""`tta keygen`: a key pair for the daemon or for a client, or a key to sign with."""

import re
from pathlib import Path
from typing import Annotated

import typer

from tta.commands.output import Json, print_json
from tta.errors import InputError
from tta.keys import ROLES, Role, read_public_key, write_key_pair
from tta.signatures import SigningKey, write_signing_key


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("keygen")(keygen)


def keygen(
    name: Annotated[str, typer.Argument(help="Whose: the files are called NAME.key and NAME.key_secret.")],
    folder: Annotated[Path, typer.Option("--folder", help="Where to write them.")] = Path("keys"),
    roles: Annotated[
        str, typer.Option("--roles", help=f"Of a client, with commas: {', '.join(ROLES)} (which may everything).")
    ] = "predict",
    signing: Annotated[
        bool, typer.Option("--signing", help="A key to sign bundles or versions with: NAME.pem and NAME.pub.pem.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Make a key pair and print the line that lets a client in. The secret half is readable by its owner only."""
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*", name):
        raise InputError(f"name {name!r}: use letters, digits, dots, dashes and underscores")
    if signing:
        _signing(name, folder, as_json)
        return
    wanted: list[Role] = [role for role in ROLES if role in roles.split(",")]
    unknown = sorted(set(roles.split(",")) - set(ROLES))
    if unknown:
        raise InputError(f"role {unknown[0]!r} is none: write some of {', '.join(ROLES)}, with commas")
    public, secret = write_key_pair(folder, name)
    key = read_public_key(public).decode()
    entry = f"'{name}': {{key: '{key}', roles: [{', '.join(wanted)}]}}"
    if as_json:
        print_json({"public": str(public), "secret": str(secret), "key": key, "client": entry})
        return
    print(f"{public}: to give away\n{secret}: to keep")
    print(f"for a client, add this line to the daemon's list (security.clients):\n{entry}")


def _signing(name: str, folder: Path, as_json: bool) -> None:
    public, secret = write_signing_key(folder, name)
    key = SigningKey(secret).public
    if as_json:
        print_json({"public": str(public), "secret": str(secret), "key": key})
        return
    print(f"{public}: to give away\n{secret}: to keep, for tta sign or as the daemon's security.signing_key")
    print(f"for those who are to trust it, add to security.signers:\n{name}: '{key}'")
