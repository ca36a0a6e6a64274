"""What is damaged in a state folder, and what can be done about it: `tta check`.

A daemon's start mends what keeps it from serving; this reads every file to its end, also those that a start only
looks at when they are used.
"""

import sqlite3
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from tta.daemon.files import read_arrays, read_json, set_aside
from tta.daemon.labels import check_labels, salvage
from tta.daemon.store import lock
from tta.errors import DamagedError, DeltaError
from tta.versions import has_weights, load_version, version_folders

SEALED = {  # by name or pattern: what is lost with it
    "deployed.json": "the state says which bundle serves",
    "state.json": "the newest version that verifies serves, and what was under way is forgotten",
    "library.json": "known regimes are learned again",
    "rehearsed.json": "the next rehearsal begins anew",
    "rehearsed.safetensors": "what regimes have learned from one another is no start until the next rehearsal",
    "watch.safetensors": "the charts start anew",
    "calibrations/*.safetensors": "thresholds are computed again",
    "regimes/*.safetensors": "this regime, or its images, is learned again",
}


@dataclass(frozen=True)
class Finding:
    """One file.

    Attributes:
        file: path.
        problem: why it cannot be used; "" if it is sound.
        consequence: of being without it.
        repaired: what was done; "" if nothing was.
    """

    file: str
    problem: str = ""
    consequence: str = ""
    repaired: str = ""


def inspect(root: Path, repair: bool = False, signers: Mapping[str, str] | None = None) -> list[Finding]:
    """Read every file of a state folder.

    Args:
        root: the folder.
        repair: set damaged files aside, so that a daemon goes on without them; of labels keep what can be read.
        signers: of versions, see `load_version`.

    Raises:
        ConfigError: it is to be repaired and a daemon uses it; or the labels cannot be read now.
        OSError: a file cannot be renamed.
    """
    if not repair:
        return list(_every(root, repair, signers))
    with lock(root):
        return list(_every(root, repair, signers))


def _every(root: Path, repair: bool, signers: Mapping[str, str] | None) -> Iterator[Finding]:
    for path in sorted((*root.rglob("*.damaged-*"), *root.glob("versions/.tmp-*"))):
        if not path.name.endswith(("-wal", "-shm")):
            what = "left by a crash" if path.name.startswith(".tmp-") else "set aside earlier"
            yield Finding(str(path), consequence=f"{what}: nothing uses it")
    for pattern, consequence in SEALED.items():
        read = read_json if pattern.endswith(".json") else read_arrays
        for path in sorted(root.glob(pattern)):
            yield _checked(path, read, consequence, repair)
    for number, folder in version_folders(root).items():
        if not has_weights(folder):
            continue
        path = folder / "delta.safetensors"
        consequence = f"version {number} cannot serve, and its regime is forgotten"
        found = _checked(path, lambda p: load_version(p.parent), consequence, repair)
        if not found.problem:  # a version that is only unsigned may be signed yet
            found = _checked(path, lambda p: load_version(p.parent, signers), consequence, False)
        yield found
    yield from _labels(root / "labels.sqlite", repair)


def _checked(path: Path, read: Callable[[Path], object], consequence: str, repair: bool) -> Finding:
    try:
        read(path)
    except (DamagedError, DeltaError, OSError) as error:
        repaired = f"kept as {set_aside(path).name}" if repair else ""
        return Finding(str(path), str(error), consequence, repaired)
    return Finding(str(path))


def _labels(path: Path, repair: bool) -> Iterator[Finding]:
    if not path.exists():
        return
    try:
        check_labels(path)
        yield Finding(str(path))
    except sqlite3.DatabaseError as error:
        consequence, repaired = "labels that cannot be read are lost", ""
        if repair:
            aside, n = salvage(path)
            repaired = f"{n} labels kept, the damaged file as {aside.name}"
        yield Finding(str(path), f"{path} is damaged: {' '.join(str(error).split())}", consequence, repaired)
