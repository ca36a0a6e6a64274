"""Files of the state folder: replaced as a whole, with a checksum inside, set aside when they are damaged.

A crash, or a power cut, leaves the old file or the new one. What a disk does to it later shows when it is read. A
damaged file is renamed, never deleted: somebody may get more out of it than we do.
"""

import hashlib
import json
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load, save

from tta.errors import DamagedError

Array = npt.NDArray[Any]
T = TypeVar("T")
CHECKSUM = "sha256"


def write_atomically(path: Path, data: bytes) -> None:
    """Replace a file so that a reader, or a crash, sees the old or the new one and nothing between."""
    temporary = path.with_name(f".{path.name}.tmp")
    write_synced(temporary, data)
    os.replace(temporary, path)
    sync(path.parent)


def write_synced(path: Path, data: bytes) -> None:
    """Write a file and wait until the disk has it."""
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def sync(path: Path) -> None:
    """Wait until the disk has a file, or a folder's entries."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Replace a JSON file; `sha256` beside the content is of it."""
    plain = json.loads(json.dumps(content))
    write_atomically(path, json.dumps({CHECKSUM: _of_json(plain), **plain}, indent=1).encode())


def read_json(path: Path) -> dict[str, Any]:
    """What `write_json` wrote; empty if there is no file.

    Raises:
        DamagedError: it is not what was written, or cannot be read.
    """

    def opened(data: bytes) -> tuple[dict[str, Any], str]:
        content: dict[str, Any] = json.loads(data)
        return content, content.pop(CHECKSUM)

    return _read(path, opened, _of_json)


def _of_json(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def write_arrays(path: Path, arrays: Mapping[str, Array]) -> None:
    """Replace a safetensors file; its metadata hold a checksum of the arrays."""
    whole = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    write_atomically(path, save(whole, metadata={CHECKSUM: _of_arrays(whole)}))


def read_arrays(path: Path) -> dict[str, Array]:
    """What `write_arrays` wrote; empty if there is no file.

    Raises:
        DamagedError: it is not what was written, or cannot be read.
    """

    def opened(data: bytes) -> tuple[dict[str, Array], str]:
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        return load(data), header["__metadata__"][CHECKSUM]

    return _read(path, opened, _of_arrays)


def _of_arrays(arrays: Mapping[str, Array]) -> str:
    digest = hashlib.sha256()
    for name, array in sorted(arrays.items()):
        digest.update(f"{name} {array.dtype} {array.shape}".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def _read(
    path: Path, opened: Callable[[bytes], tuple[dict[str, T], str]], checksum_of: Callable[[Mapping[str, T]], str]
) -> dict[str, T]:
    try:
        content, checksum = opened(path.read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise DamagedError(f"{path} is damaged: {error!r}") from error
    if checksum != checksum_of(content):
        raise DamagedError(f"{path} is damaged: its checksum is of other content")
    return content


def set_aside(path: Path) -> Path:
    """Rename a damaged file, so that another can take its place; the new name."""
    aside = path.with_name(f"{path.name}.damaged-{time.time_ns()}")
    path.rename(aside)
    return aside
