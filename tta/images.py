"""Pictures as arrays: folders of class folders, single files, `.npz`. Needs Pillow and numpy only."""

import io
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from tta.errors import InputError

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm")
WIRE_FORMATS = ["JPEG", "PNG"]
MAX_PIXELS = 50_000_000  # of a picture; a small file can claim to be any size

Array = npt.NDArray[Any]


def read_image(path: Path, image_shape: Sequence[int], resize: str) -> Array:
    """Read one picture and bring it to the model's size as the manifest says.

    Args:
        path: a picture.
        image_shape: (H, W, C); C is 3 (RGB) or 1 (grey).
        resize: "crop" scales the shorter side and cuts out the centre, "stretch" ignores the aspect.

    Returns:
        (H, W, C) uint8.

    Raises:
        InputError: not a picture.
    """
    try:
        return _decoded(path, image_shape, resize, None)
    except Exception as error:  # of damaged pictures the decoders raise whatever they like
        raise InputError(f"{path} cannot be read as a picture: {error}") from error


def decode_picture(data: bytes | memoryview, image_shape: Sequence[int], resize: str) -> Array:
    """Decode a JPEG or PNG file that came over the wire, exactly as `read_image` reads one from disk.

    Args:
        data: the file's bytes.
        image_shape: see `read_image`.
        resize: see `read_image`.

    Returns:
        (H, W, C) uint8.

    Raises:
        InputError: neither JPEG nor PNG, damaged, or of more than `MAX_PIXELS`.
    """
    try:
        return _decoded(io.BytesIO(data), image_shape, resize, WIRE_FORMATS)
    except Exception as error:
        raise InputError(f"not a JPEG or PNG file that can be read: {error}") from error


def picture_pixels(data: bytes | memoryview) -> int:
    """How many pixels a file claims to have; 0 if it is none that can be decoded."""
    try:
        with Image.open(io.BytesIO(data), formats=WIRE_FORMATS) as opened:
            return opened.width * opened.height
    except Exception:  # `decode_picture` tells why
        return 0


def _decoded(file: Path | io.BytesIO, image_shape: Sequence[int], resize: str, formats: list[str] | None) -> Array:
    height, width, channels = image_shape
    with Image.open(file, formats=formats) as opened:
        if opened.width * opened.height > MAX_PIXELS:
            raise ValueError(f"{opened.width}x{opened.height} are more than {MAX_PIXELS:,} pixels")
        image = opened.convert("L" if channels == 1 else "RGB")
    if image.size != (width, height):
        if resize == "crop":
            scale = max(width / image.width, height / image.height)
            size = (max(width, round(image.width * scale)), max(height, round(image.height * scale)))
            image = image.resize(size, Image.Resampling.BILINEAR)
            left, top = (size[0] - width) // 2, (size[1] - height) // 2
            image = image.crop((left, top, left + width, top + height))
        else:
            image = image.resize((width, height), Image.Resampling.BILINEAR)
    return np.asarray(image, np.uint8).reshape(height, width, channels)


def find_images(path: Path) -> list[Path]:
    """All pictures at or below a path, sorted.

    Raises:
        InputError: there are none.
    """
    if path.is_file():
        return [path]
    if not path.exists():
        raise InputError(f"{path} does not exist")
    found = sorted(p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES)
    if not found:
        raise InputError(f"no pictures ({', '.join(SUFFIXES)}) in {path}")
    return found


def read_labelled(
    path: Path,
    image_shape: Sequence[int],
    resize: str,
    track: Callable[[Sequence[Path]], Iterable[Path]] = iter,
) -> tuple[Array, Array, list[str]]:
    """Read a labelled set: a folder with one folder a class, or an `.npz` with `x`, `y` and perhaps `classes`.

    Args:
        path: the folder or file.
        image_shape: (H, W, C).
        resize: see `read_image`.
        track: wraps the list of files, for a progress bar.

    Returns:
        x (N, H, W, C) uint8, y (N,) int64, class names in the order of their index.

    Raises:
        InputError: empty, no class folders, wrong shapes or labels.
    """
    if path.suffix == ".npz":
        return _read_npz(path, image_shape)
    if not path.is_dir():
        raise InputError(f"{path} is neither a folder of class folders nor an .npz file")
    classes = sorted(d.name for d in path.iterdir() if d.is_dir())
    if not classes:
        raise InputError(f"{path} has no class folders: expected {path}/CLASS/picture.jpg")
    files = find_images(path)
    index = {name: i for i, name in enumerate(classes)}
    x = np.stack([read_image(f, image_shape, resize) for f in track(files)])
    y = np.array([index[f.relative_to(path).parts[0]] for f in files], np.int64)
    return x, y, classes


def _read_npz(path: Path, image_shape: Sequence[int]) -> tuple[Array, Array, list[str]]:
    try:
        with np.load(path, allow_pickle=False) as data:
            x, y = np.asarray(data["x"]), np.asarray(data["y"], np.int64)
            classes = [str(c) for c in data["classes"]] if "classes" in data else []
    except (OSError, KeyError, ValueError) as error:
        reason = "it needs numeric arrays x and y, without pickled objects"
        raise InputError(f"{path} is not a usable .npz ({type(error).__name__}): {reason}") from error
    if x.dtype != np.uint8 or x.ndim != 4 or x.shape[1:] != tuple(image_shape):
        raise InputError(
            f"{path}: expected x of shape (N, {', '.join(map(str, image_shape))}) uint8, got {x.dtype}{x.shape}"
        )
    if y.shape != (len(x),) or len(x) == 0 or y.min() < 0:
        raise InputError(
            f"{path}: y must hold one class index >= 0 for each of {len(x)} images, got shape {y.shape}"
            + (f" with {y.min()}" if y.size and y.min() < 0 else "")
        )
    return x, y, classes or [str(i) for i in range(int(y.max()) + 1)]
