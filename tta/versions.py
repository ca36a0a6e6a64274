"""One version of the model on disk: a folder with a delta against the source and its manifest.

    versions/000007/delta.safetensors   what differs from the source, under state_dict names
    versions/000007/probe.safetensors   probe images and the logits the adapter saw for them
    versions/000007/manifest.json       where it came from, the verdict, sha256 of the files

A version is the source plus one delta, never a chain. Version 0 is the source and has no folder.
"""

import hashlib
from pathlib import Path
from typing import Any

import msgspec
import numpy.typing as npt

from tta.errors import DeltaError

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


def load_version(
    folder: Path,
) -> tuple[VersionManifest, dict[str, npt.NDArray[Any]], dict[str, npt.NDArray[Any]]]:
    """Read and verify one version.

    Returns:
        Its manifest, its delta, and its probe ("x" images, "logits").

    Raises:
        DeltaError: a file is missing, truncated or changed; the message names it.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load

    arrays = {}
    try:
        manifest = msgspec.json.decode((folder / "manifest.json").read_bytes(), type=VersionManifest)
        for name in ("delta.safetensors", "probe.safetensors"):
            data = (folder / name).read_bytes()
            if hashlib.sha256(data).hexdigest() != manifest.sha256.get(name):
                raise DeltaError(f"{folder / name} does not match its manifest's sha256")
            arrays[name] = load(data)
    except (OSError, ValueError, KeyError, msgspec.MsgspecError, SafetensorError) as error:
        raise DeltaError(f"version in {folder} cannot be read: {error}") from error
    return manifest, arrays["delta.safetensors"], arrays["probe.safetensors"]
