"""`tta export`: a version's weights as a checkpoint that PyTorch loads, or the labelled images as an `.npz`."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tta.commands.output import Json, print_json
from tta.errors import ConfigError, DeltaError, NotFoundError

if TYPE_CHECKING:
    import numpy.typing as npt

SUFFIXES = (".safetensors", ".pth", ".pt")


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("export")(export)


def export(
    bundle: Annotated[Path, typer.Argument(help="The bundle that the version was made for.")],
    out: Annotated[Path, typer.Option("--out", help="File to write: .safetensors, .pth, .pt; .npz for labels.")],
    version: Annotated[int | None, typer.Argument(min=0, help="Number of the version; 0 is the source.")] = None,
    labels: Annotated[bool, typer.Option("--labels", help="The labelled images, to train on.")] = False,
    state: Annotated[Path, typer.Option("--state", help="The daemon's state folder.")] = Path("tta-state"),
    as_json: Json = False,
) -> None:
    """Write a version's weights under the model's own state_dict names, or with --labels the labelled images.

    The labelled images are x (N, H, W, C) uint8, y (N,) and the names of the classes, as `tta package --reference`
    and `tta replay` take them, and `clients` (N,), who labelled: those whose class was named and not contested,
    also those of clients that may not label any more. The file of weights is what `tta package --checkpoint`
    takes, and `model.load_state_dict(..., strict=False)`: counters of batches are not in it. The daemon may
    run meanwhile. Signatures are not asked for: see `tta check`.
    """
    if labels == (version is not None):
        raise ConfigError("name a version, or --labels: one of them")
    if version is None:
        _export_labels(bundle, out, state, as_json)
        return
    import numpy as np

    from tta.bundle import check_delta, load_bundle
    from tta.versions import SOURCE, has_weights, load_version, version_folders

    if out.suffix not in SUFFIXES:
        raise ConfigError(f"--out {out}: write a name that ends in {', '.join(SUFFIXES)}")
    loaded = load_bundle(bundle)
    delta: Mapping[str, npt.NDArray[Any]] = {}
    if version != SOURCE:
        folders = {number: folder for number, folder in version_folders(state).items() if has_weights(folder)}
        folder = folders.get(version)
        if folder is None:
            raise NotFoundError(
                f"no version {version} in {state}: there are {', '.join(map(str, [SOURCE, *folders]))}"
            )
        manifest, delta, _ = load_version(folder)
        if manifest.bundle_sha256 != loaded.sha256:
            raise DeltaError(f"version in {folder} was made for another bundle than {bundle}")
        check_delta(loaded, delta)
    weights = {name: np.ascontiguousarray(delta.get(name, array)) for name, array in loaded.weights.items()}
    temporary = out.with_name(f".{out.name}.tmp")
    try:
        if out.suffix == ".safetensors":
            from safetensors.numpy import save

            temporary.write_bytes(save(weights))
        else:
            from tta.packaging.source import save_checkpoint

            save_checkpoint(weights, temporary)
        temporary.replace(out)
    except OSError as error:
        raise ConfigError(f"{out} cannot be written: {error.strerror or error}") from error
    found = {"out": str(out), "version": version, "tensors": len(weights), "changed": len(delta)}
    if as_json:
        print_json(found)
    else:
        print(f"{out}: {len(weights)} tensors of version {version}, {len(delta)} of them not the source's")


def _check_belongs(state: Path, sha256: str, bundle: Path) -> None:
    """Labels are indices of one bundle's classes."""
    from tta.daemon.files import read_json
    from tta.errors import DamagedError

    try:
        owner = read_json(state / "state.json").get("bundle_sha256", sha256)
    except DamagedError as error:
        raise ConfigError(f"{error}: whose labels these are is not known; see `tta check --repair`") from error
    if owner != sha256:
        raise ConfigError(f"{state} belongs to another bundle ({owner[:12]}…) than {bundle} ({sha256[:12]}…)")


def _export_labels(bundle: Path, out: Path, state: Path, as_json: bool) -> None:
    import numpy as np

    from tta.bundle import load_bundle
    from tta.daemon.labels import read_labelled_images

    if out.suffix != ".npz":
        raise ConfigError(f"--out {out}: labelled images are written as .npz")
    loaded = load_bundle(bundle)
    manifest = loaded.manifest
    _check_belongs(state, loaded.sha256, bundle)
    x, y, clients = read_labelled_images(state / "labels.sqlite", manifest.image_shape)
    temporary = out.with_name(f".{out.name}.tmp.npz")
    try:
        np.savez(temporary, x=x, y=y, classes=np.array(manifest.classes), clients=np.array(clients, str))
        temporary.replace(out)
    except OSError as error:
        raise ConfigError(f"{out} cannot be written: {error.strerror or error}") from error
    counts = dict(zip(manifest.classes, np.bincount(y, minlength=manifest.n_classes).tolist(), strict=True))
    if as_json:
        print_json({"out": str(out), "images": len(x), "classes": counts})
    else:
        named = ", ".join(f"{n} of {name}" for name, n in counts.items() if n)
        print(f"{out}: {len(x)} labelled images{': ' + named if named else ''}")
