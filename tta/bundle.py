"""Read and verify a deployed model: a directory, or a `.tta` zip of it, made by `tta package`.

    manifest.json           what the model is and the sha256 of every other file
    model.onnx              graph without weights: uint8 NHWC in, logits and whitened features out
    weights.safetensors     source weights under their state_dict names
    reference.safetensors   what the monitor needs to know of the reference data
    anchor.safetensors      a small labelled set of source images
    model-fp16.onnx         if it was packaged with --fp16: the graph with weights of half precision
    manifest.sig            if it was signed with `tta sign`: see `tta.signatures`

Knows nothing of torch, onnxruntime or sockets.
"""

import hashlib
import importlib.util
import json
import os
import shutil
import struct
import sys
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from tta.errors import BundleError
from tta.preprocessing import RESIZES, recipe, recipe_hash
from tta.signatures import SIGNATURES, SigningKey, read_signatures, signer_of, with_signature

FORMAT = 3
NAMED = 5  # classes at most that a message names
FILES = ("model.onnx", "weights.safetensors", "reference.safetensors", "anchor.safetensors")
FP16 = "model-fp16.onnx"


class Block(msgspec.Struct, frozen=True):
    """A contiguous part of the network, the unit of surgery.

    Attributes:
        name: "block1" .. "blockN", or "head" for the classifier.
        tensors: state_dict names of its parameters and normalisation buffers.
        tap: module whose output the block's features summarise; "" for the head (its logits).
        n_features: number of whitened features r of the block in the graph's output.
    """

    name: str
    tensors: list[str]
    tap: str
    n_features: int


class Manifest(msgspec.Struct, frozen=True):
    """Everything about a bundle but its arrays.

    Attributes:
        image_shape: (H, W, C) of the uint8 input.
        resize: how a client brings a picture to that shape.
        mean: per-channel mean the graph subtracts, of values in [0, 1].
        std: per-channel standard deviation the graph divides by.
        kwargs: keyword arguments for the source's factory.
        arl: average run length between false alarms, in samples, of the stored thresholds.
    """

    format: int
    name: str
    source: str
    kwargs: dict[str, Any]
    image_shape: tuple[int, int, int]
    resize: str
    mean: list[float]
    std: list[float]
    classes: list[str]
    blocks: list[Block]
    reference_accuracy: float
    n_reference: int
    arl: float
    parity: dict[str, float]
    tools: dict[str, str]
    sha256: dict[str, str]
    preprocessing_sha256: str = ""

    @property
    def preprocessing(self) -> dict[str, Any]:
        """What happens to a picture before the network sees it; see `tta.preprocessing`."""
        return recipe(self.image_shape, self.resize, self.mean, self.std)

    @property
    def n_classes(self) -> int:
        """Number of classes K."""
        return len(self.classes)

    @property
    def n_features(self) -> int:
        """Length of a feature vector, all blocks together."""
        return sum(b.n_features for b in self.blocks)

    def block(self, name: str) -> Block:
        """The block of that name.

        Raises:
            BundleError: there is none.
        """
        for b in self.blocks:
            if b.name == name:
                return b
        raise BundleError(f"no block {name!r} in {self.name}: it has {', '.join(b.name for b in self.blocks)}")


@dataclass(frozen=True)
class Bundle:
    """A verified deployed model; immutable, safe to share between threads.

    Attributes:
        graph: the ONNX file's bytes, without weights.
        weights: state_dict name to array.
        reference: arrays of `reference.safetensors`, see `tta.packaging.reference`.
        anchor: "x" (N, H, W, C) uint8 and "y" (N,) int64.
        sha256: of the manifest, which names the hash of everything else: the bundle's identity.
        graph_fp16: the same with weights of half precision; None if it was not packaged.
    """

    path: Path
    manifest: Manifest
    graph: bytes
    weights: Mapping[str, npt.NDArray[Any]]
    reference: Mapping[str, npt.NDArray[Any]]
    anchor: Mapping[str, npt.NDArray[Any]]
    sha256: str
    graph_fp16: bytes | None = None


# What zipfile raises for archives that are damaged, encrypted, or compressed in a way it does not know.
_UNREADABLE = (
    *(zipfile.BadZipFile, zlib.error, struct.error),
    *(OSError, EOFError, KeyError, IndexError, ValueError, RuntimeError),
)


def load_bundle(path: str | os.PathLike[str], sha256: str = "") -> Bundle:
    """Read a bundle and verify every checksum in it.

    Args:
        path: the directory or `.tta` file that `tta package` wrote.
        sha256: of the bundle that is wanted; "" for whatever is there.

    Raises:
        BundleError: missing, truncated, changed, or of another format; the message names the file.
    """
    from safetensors.numpy import load

    root = Path(path)
    raw = _read(root, "manifest.json")
    found = hashlib.sha256(raw).hexdigest()
    if sha256 not in ("", found):
        raise BundleError(
            f"{root} is another bundle ({found[:12]}…) than the daemon has started with ({sha256[:12]}…): "
            "put the former back, or restart the daemon; `tta deploy` is for another model"
        )
    try:
        manifest = msgspec.json.decode(raw, type=Manifest)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise BundleError(f"{root}: manifest.json cannot be read ({error}): package the model again") from error
    if manifest.format != FORMAT:
        raise BundleError(f"{root}: bundle format {manifest.format}, this tta reads {FORMAT}: package again")
    if manifest.resize not in RESIZES:
        raise BundleError(f"{root}: resize {manifest.resize!r} is none of {', '.join(RESIZES)}: package again")
    computed = recipe_hash(manifest.preprocessing)
    if manifest.preprocessing_sha256 not in ("", computed):
        raise BundleError(
            f"{root}: the manifest's preprocessing has hash {computed}, it says {manifest.preprocessing_sha256}: "
            "package the model again with this release"
        )
    manifest = msgspec.structs.replace(manifest, preprocessing_sha256=computed)
    files: dict[str, bytes] = {}
    for name in (*FILES, *({FP16} & set(manifest.sha256))):
        files[name] = _read(root, name)
        hashed = hashlib.sha256(files[name]).hexdigest()
        if hashed != manifest.sha256.get(name):
            raise BundleError(
                f"{root}: {name} has sha256 {hashed[:12]}…, the manifest says "
                f"{manifest.sha256.get(name, 'nothing')[:12]}…: copy or package the bundle again"
            )
    return Bundle(
        path=root,
        manifest=manifest,
        graph=files["model.onnx"],
        weights=load(files["weights.safetensors"]),
        reference=load(files["reference.safetensors"]),
        anchor=load(files["anchor.safetensors"]),
        sha256=found,
        graph_fp16=files.get(FP16),
    )


def bundle_sha256(path: str | os.PathLike[str]) -> str:
    """A bundle's identity, as its manifest says; nothing else is read.

    Raises:
        BundleError: there is none.
    """
    return hashlib.sha256(_read(Path(path), "manifest.json")).hexdigest()


def interface_changes(old: Manifest, new: Manifest) -> list[str]:
    """What the clients of one model would notice of another in its place, in words."""
    changes = []
    if old.image_shape != new.image_shape:
        changes.append(
            f"images are {'x'.join(map(str, new.image_shape))}, not {'x'.join(map(str, old.image_shape))}"
        )
    if old.preprocessing_sha256 != new.preprocessing_sha256:
        changes.append(f"preprocessing is {new.preprocessing_sha256}, not {old.preprocessing_sha256}")
    if old.classes != new.classes:
        by_set = (set(old.classes) - set(new.classes), set(new.classes) - set(old.classes))
        named = [", ".join(sorted(names)[:NAMED]) for names in by_set]
        words = [f"{word} {names}" for word, names in zip(("without", "with"), named, strict=True) if names]
        changes.append(f"{len(new.classes)} classes, {' and '.join(words) or 'in another order'}")
    return changes


def check_signed(bundle: Bundle, signers: Mapping[str, str]) -> str:
    """Who of those who may has signed a bundle.

    Args:
        bundle: what was read.
        signers: names and public keys.

    Raises:
        BundleError: nobody of them has.
    """
    signer = signer_of("bundle", bundle.sha256, signatures_of(bundle.path), signers)
    if signer is None:
        raise BundleError(
            f"{bundle.path} is not signed by any of security.signers ({', '.join(signers)}): look where it comes "
            "from, then sign it with tta sign"
        )
    return signer


def signatures_of(path: Path) -> bytes:
    """The lines of a bundle's signatures; empty if nobody has signed it.

    Raises:
        BundleError: they cannot be read.
    """
    if path.is_dir():
        return read_signatures(path)
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.read(SIGNATURES) if SIGNATURES in archive.namelist() else b""
    except _UNREADABLE as error:
        raise BundleError(
            f"{path}: {SIGNATURES} cannot be read ({error}): copy or sign the bundle again"
        ) from error


def sign_bundle(path: Path, key: SigningKey) -> None:
    """Vouch for a bundle that verifies; its identity stays.

    Args:
        path: the bundle; its file or its `manifest.sig` is replaced.
        key: to sign with.

    Raises:
        BundleError: it does not verify.
        OSError: it cannot be written.
    """
    lines = with_signature(signatures_of(path), key.sign("bundle", load_bundle(path).sha256))
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    if path.is_dir():
        temporary.write_bytes(lines)
        os.replace(temporary, path / SIGNATURES)
        return
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(temporary, "w") as new:
        for entry in old.infolist():
            if entry.filename != SIGNATURES:
                new.writestr(entry, old.read(entry))
        new.writestr(SIGNATURES, lines)
    shutil.copymode(path, temporary)
    os.replace(temporary, path)


def _read(root: Path, name: str) -> bytes:
    try:
        if root.is_dir():
            return (root / name).read_bytes()
        with zipfile.ZipFile(root) as archive:
            return archive.read(name)
    except FileNotFoundError as error:
        raise BundleError(
            f"{root}: {name + ' is missing' if root.exists() else 'no such bundle'}: see `tta package`"
        ) from error
    except _UNREADABLE as error:
        raise BundleError(f"{root}: {name} cannot be read ({error}): copy or package the bundle again") from error


def source_is_importable(source: str) -> bool:
    """Whether the adapter will find the module of a `module:factory` source; nothing is imported."""
    module = source.partition(":")[0].partition(".")[0]  # for a name with dots Python would import the package
    if module == "timm":
        return True
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    return is_installed(module)


def is_installed(module: str) -> bool:
    """Whether a top-level module is there; nothing is imported."""
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        return False


def write_bundle(path: Path, manifest: Mapping[str, Any], files: Mapping[str, bytes]) -> None:
    """Write a bundle: to a temporary name first, so that a half-written one is never found.

    Args:
        path: directory to make, or a name ending in `.tta` for a zip. Replaced if it is a bundle.
        manifest: the fields of `Manifest` without `format` and `sha256`.
        files: contents of `FILES`, and of `FP16` if there is one.

    Raises:
        BundleError: `path` exists and is no bundle.
    """
    full = {
        "format": FORMAT,
        **manifest,
        "sha256": {name: hashlib.sha256(data).hexdigest() for name, data in files.items()},
    }
    text = json.dumps(full, indent=1).encode()
    msgspec.json.decode(text, type=Manifest)  # what we write, we can read
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    if path.suffix == ".tta":
        with zipfile.ZipFile(temporary, "w") as archive:
            for name, data in {**files, "manifest.json": text}.items():
                archive.writestr(name, data)
        os.replace(temporary, path)
        return
    if path.exists() and not (path / "manifest.json").exists() and any(path.iterdir()):
        raise BundleError(f"{path} exists and is not a bundle: choose another --out")
    temporary.mkdir()
    for name, data in {**files, "manifest.json": text}.items():
        (temporary / name).write_bytes(data)
    if path.exists():
        for old in path.iterdir():
            old.unlink()
        path.rmdir()
    temporary.rename(path)


def check_delta(bundle: Bundle, delta: Mapping[str, npt.NDArray[Any]]) -> None:
    """Refuse a delta that does not fit the model: names, shapes, dtypes, finite values.

    Raises:
        DeltaError: naming the first tensor that does not fit.
    """
    from tta.errors import DeltaError

    for name, array in delta.items():
        source = bundle.weights.get(name)
        if source is None:
            raise DeltaError(f"delta has a tensor {name!r} that {bundle.manifest.name} has not")
        if array.shape != source.shape or array.dtype != source.dtype:
            raise DeltaError(
                f"delta's {name!r} is {array.dtype}{array.shape}, the model's is {source.dtype}{source.shape}"
            )
        if np.issubdtype(array.dtype, np.floating) and not np.isfinite(array).all():
            raise DeltaError(f"delta's {name!r} holds NaN or infinity: it must not be served")
