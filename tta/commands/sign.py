"""`tta sign`: vouch for a bundle, or for the versions of a state folder."""

from datetime import datetime
from pathlib import Path
from typing import Annotated

import typer

from tta.commands.output import Json, print_json
from tta.errors import ConfigError


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("sign")(sign)


def sign(
    path: Annotated[Path, typer.Argument(help="A bundle, or a daemon's state folder.")],
    key: Annotated[Path, typer.Option("--with", help="NAME.pem, made by tta keygen --signing.")],
    as_json: Json = False,
) -> None:
    """Sign a bundle, or every version in a state folder, whose files have the hashes of its manifest.

    A daemon with `security.signers` serves bundles only that one of them has signed; one with
    `security.signing_key` signs the versions it makes. Signing a state folder is for versions from before that, or
    from a daemon with another key: look at what it lists, for all of it may be served then; those of bundles that
    served before, under `former`, are among them. The daemon must not run.
    """
    from tta.bundle import sign_bundle
    from tta.daemon.deployment import former_folders
    from tta.daemon.store import lock, sign_version
    from tta.errors import DeltaError
    from tta.signatures import SigningKey
    from tta.versions import has_weights, load_version, version_folders

    secret = SigningKey(key)
    if (path / "manifest.json").exists() or not (path / "versions").is_dir():
        try:
            sign_bundle(path, secret)
        except OSError as error:
            raise ConfigError(f"{path} cannot be signed: {error.strerror or error}") from error
        if as_json:
            print_json({"signed": [str(path)], "refused": {}, "key": secret.public})
        else:
            print(f"{path}: signed with {secret.public}")
        return
    signed, refused = {}, {}
    with lock(path):
        states = (path, *sorted(former_folders(path)))
        for folder in [f for state in states for f in version_folders(state).values() if has_weights(f)]:
            try:
                raw = (folder / "manifest.json").read_bytes()
                manifest = load_version(folder)[0]
                if manifest.verdict.get("outcome") != "accepted":
                    raise DeltaError(f"version in {folder} was not accepted by the gate")
                sign_version(folder, raw, secret)
                made = datetime.fromtimestamp(manifest.created_s).isoformat(" ", "seconds")
                signed[str(folder)] = f"{manifest.block or 'normalisation'}, made {made}"
            except DeltaError as error:
                refused[str(folder)] = str(error)
            except OSError as error:
                raise ConfigError(f"{folder} cannot be signed: {error.strerror or error}") from error
    if as_json:
        print_json({"signed": list(signed), "refused": refused, "key": secret.public})
    else:
        for name, what in signed.items():
            print(f"signed: {name}: {what}")
        for problem in refused.values():
            print(f"not signed: {problem}")
        print(f"{path}: {len(signed)} versions signed with {secret.public}")
    if refused:
        raise typer.Exit(1)
