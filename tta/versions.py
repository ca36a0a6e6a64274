"""One version of the model on disk: a folder with a delta against the source and its manifest.

    versions/000007/delta.safetensors   what differs from the source, under state_dict names
    versions/000007/probe.safetensors   probe images and the logits the adapter saw for them
    versions/000007/manifest.json       where it came from, the verdict, sha256 of the files
    versions/000007/manifest.sig        if the daemon signs versions: see `tta.signatures`

A version is the source plus one delta, never a chain. Version 0 is the source and has no folder.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import numpy.typing as npt

from tta.errors import DeltaError
from tta.signatures import read_signatures, signer_of

SOURCE = 0


class VersionManifest(msgspec.Struct, kw_only=True):
    """What a version is.

    Attributes:
        block: block operated on; "" where only normalisation buffers differ.
        start: where surgery began ("source", "batch-norm", "serving", "library").
        created_s: wall clock, seconds since the epoch.
        verdict: every number of the gate.
        report: what the adapter tried.
    """

    version: int
    bundle_sha256: str
    block: str
    start: str
    created_s: float
    sha256: dict[str, str]
    verdict: dict[str, Any] = {}
    report: dict[str, Any] = {}


def version_folders(state: Path) -> dict[int, Path]:
    """Number to folder of every version in a state folder, in order; of those not served the weights may be gone.

    Copies that somebody has put there under other names are none.
    """
    found = {int(path.name): path for path in state.glob("versions/[0-9]*") if path.name.isdigit()}
    return dict(sorted(found.items()))


def has_weights(folder: Path) -> bool:
    """Whether a version can be served: a candidate that was dropped has left its manifest only."""
    return (folder / "delta.safetensors").is_file()


def load_version(
    folder: Path, signers: Mapping[str, str] | None = None
) -> tuple[VersionManifest, dict[str, npt.NDArray[Any]], dict[str, npt.NDArray[Any]]]:
    """Read and verify one version.

    Args:
        folder: where it is.
        signers: names and public keys of those who may sign versions; None: no signature is asked for.

    Returns:
        Its manifest, its delta, and its probe ("x" images, "logits").

    Raises:
        DeltaError: a file is missing, truncated or changed, or the version is not signed; the message names it.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load

    arrays = {}
    try:
        raw = (folder / "manifest.json").read_bytes()
        if signers is not None and not is_signed(folder, raw, signers):
            raise DeltaError(
                f"version in {folder} is signed neither with security.signing_key nor by any of security.signers: "
                "if you know where it comes from, sign the state folder with tta sign"
            )
        manifest = msgspec.json.decode(raw, type=VersionManifest)
        if signers is not None and f"{manifest.version:06d}" != folder.name:
            raise DeltaError(f"version in {folder} is version {manifest.version}: it was put there")
        for name in ("delta.safetensors", "probe.safetensors"):
            data = (folder / name).read_bytes()
            if hash_of(data) != manifest.sha256.get(name):
                raise DeltaError(f"{folder / name} does not match its manifest's sha256")
            arrays[name] = load(data)
    except (OSError, ValueError, KeyError, msgspec.MsgspecError, SafetensorError) as error:
        raise DeltaError(f"version in {folder} cannot be read: {error}") from error
    return manifest, arrays["delta.safetensors"], arrays["probe.safetensors"]


def hash_of(data: bytes) -> str:
    """As manifests write it."""
    return hashlib.sha256(data).hexdigest()


def is_signed(folder: Path, manifest: bytes, signers: Mapping[str, str]) -> bool:
    """Whether one of `signers` vouches for the bytes of a version's manifest."""
    return signer_of("version", hash_of(manifest), read_signatures(folder), signers) is not None
