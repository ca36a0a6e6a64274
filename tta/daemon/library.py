"""Regimes seen before and the version that cured each; home is regime 0 with version 0.

On disk: `library.json`, and for each regime `regimes/000003.safetensors` and some of its images without labels,
`regimes/000003-images.safetensors`.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open

from tta.daemon.files import read_arrays, read_json, set_aside, write_arrays, write_json
from tta.errors import DamagedError
from tta.monitor.regimes import Fingerprint

HOME = 0
Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Regime:
    """A kind of traffic and what is served for it.

    Attributes:
        number: 0 is home.
        version: that serves it best as far as is known.
        kind: of shift: "home", "input", "feature", "prior" or "output".
        accuracy: of that version on labels of the regime: the gate's, and those till it was proven.
        fingerprint: in the source's coordinates; None for an output-level regime, whose features look like
            another's.
        last_used: sequence number of the stream when it was last served.
        keys: sources whose traffic it describes; empty for all.
        n_images: of its traffic that have been offered to `Library.keep_images`.
    """

    number: int
    version: int
    kind: str
    accuracy: float
    fingerprint: Fingerprint | None
    last_used: int
    keys: tuple[str, ...] = ()
    n_images: int = 0


def stored_s(path: Path) -> Array:
    """When each image of a regime's file was stored, seconds since the epoch; the images are not read."""
    with safe_open(path, "numpy") as file:
        if "stored_s" in file.keys():  # noqa: SIM118 - it is no mapping
            return np.asarray(file.get_tensor("stored_s"))
        n = file.get_slice("x").get_shape()[0]
    return np.full(n, path.stat().st_mtime)


def expire_images(root: Path, before_s: float) -> int:
    """Delete the images of regimes that were stored before a time; how many.

    Args:
        root: a state folder, or one of a former bundle.
        before_s: seconds since the epoch.

    Raises:
        OSError: the disk refuses.
    """
    n_gone = 0
    for path in list(root.glob("regimes/*-images.safetensors")):
        try:
            stored = stored_s(path)
            keep = stored >= before_s
            if keep.all():
                continue
            images = read_arrays(path)["x"]
        except (DamagedError, SafetensorError):  # nobody can use it
            path.unlink()
            continue
        n_gone += int((~keep).sum())
        if keep.any():
            write_arrays(path, {"x": images[keep], "stored_s": stored[keep]})
        else:
            path.unlink()
    return n_gone


class Library:
    """All regimes. Owned by the daemon's main thread.

    Args:
        root: the state folder.
        home: fingerprint of home.
        home_accuracy: of the source there.
        capacity: regimes kept besides home.
        n_images: kept of each regime.
    """

    def __init__(
        self, root: Path, home: Fingerprint, home_accuracy: float, capacity: int, n_images: int = 0
    ) -> None:
        self.capacity = capacity
        self.n_images = n_images
        self._root = root
        self.damaged: dict[str, str] = {}  # files set aside, by their new name, and why
        self.unsaved = ""  # why the disk does not have what is here
        self.regimes = {HOME: Regime(HOME, 0, "home", home_accuracy, home, 0)}
        self._load()

    def _load(self) -> None:
        path = self._root / "library.json"
        try:
            entries = read_json(path).get("regimes", [])
        except DamagedError as error:
            self.damaged[str(set_aside(path))] = str(error)
            return
        for entry in entries:
            file = self._root / entry["fingerprint"]
            try:
                loaded = {"fingerprint": self._load_fingerprint(entry["fingerprint"])}
                regime = Regime(**{**entry, **loaded, "keys": tuple(entry.get("keys", ()))})
            except (DamagedError, KeyError, TypeError, ValueError) as error:  # or of another release
                self.damaged[str(set_aside(file) if file.is_file() else file)] = str(error)
                continue
            self.regimes[regime.number] = regime

    def _load_fingerprint(self, name: str) -> Fingerprint | None:
        if not name:
            return None
        arrays = read_arrays(self._root / name)
        if not arrays:
            raise DamagedError(f"{self._root / name} is missing")
        threshold, n_samples = arrays["scalars"].tolist()
        return Fingerprint(arrays["mean"], arrays["variance"], arrays["whitening"], threshold, int(n_samples))

    def add(
        self,
        version: int,
        kind: str,
        accuracy: float,
        fingerprint: Fingerprint | None,
        sequence: int,
        keys: tuple[str, ...] = (),
        another: bool = False,
    ) -> Regime:
        """Remember a cured regime; the least recently used is forgotten when there are too many.

        A version made for a regime has one: adding it again (after a crash, say) replaces the first, unless it is
        `another` regime that the version serves as well.
        """
        same = [r.number for r in self.regimes.values() if r.version == version != 0 and not another]
        number = same[0] if same else max(self.regimes) + 1
        seen = self.regimes[number].n_images if same else 0
        self.regimes[number] = Regime(number, version, kind, accuracy, fingerprint, sequence, keys, seen)
        others = sorted((r for r in self.regimes.values() if r.number != HOME), key=lambda r: r.last_used)
        for old in others[: max(0, len(others) - self.capacity)]:
            self._drop(old.number)
        self.save()
        return self.regimes[number]

    def keep_images(self, number: int, x: Array, now_s: float = 0.0) -> None:
        """Remember images (N, H, W, C) uint8 of a regime's traffic: of old and new ones a random choice stays.

        `now_s` are seconds since the epoch.

        Of home none are kept: it is not to be adapted to.
        """
        if number not in self.regimes or number == HOME or not len(x) or not self.n_images:
            return
        seen = self.regimes[number].n_images
        old = self.images(number)
        pool = x if old is None or old.shape[1:] != x.shape[1:] else np.concatenate([old, x])
        rows = np.sort(np.random.default_rng([number, seen]).permutation(len(pool))[: self.n_images])
        stored = np.full(len(pool), now_s)
        if len(pool) > len(x):
            stored[: -len(x)] = stored_s(self.images_path(number))
        try:
            (self._root / "regimes").mkdir(exist_ok=True)
            write_arrays(self.images_path(number), {"x": pool[rows], "stored_s": stored[rows]})
        except OSError:  # those there were stay
            return
        self.update(number, n_images=seen + len(x))

    def images(self, number: int) -> Array | None:
        """(N, H, W, C) uint8 of a regime; None if there are none or their file is damaged."""
        try:
            return read_arrays(self.images_path(number)).get("x")
        except DamagedError:
            return None

    def images_path(self, number: int) -> Path:
        """Where `images` are."""
        return self._root / "regimes" / f"{number:06d}-images.safetensors"

    def _drop(self, number: int) -> bool:
        if number == HOME or self.regimes.pop(number, None) is None:
            return False
        self.images_path(number).unlink(missing_ok=True)
        return True

    def update(self, number: int, **fields: Any) -> None:
        """Change a regime (what serves it, its fingerprint, when it was used)."""
        if number in self.regimes and number != HOME:
            self.regimes[number] = replace(self.regimes[number], **fields)
            self.save()

    def forget(self, number: int) -> None:
        """Drop a regime, because what was to cure it does not; home and unknown numbers stay as they are."""
        if self._drop(number):
            self.save()

    def save(self) -> None:
        """Write everything; where the disk takes nothing `unsaved` says why, and memory is right meanwhile."""
        try:
            self._write()
        except OSError as error:
            self.unsaved = str(error)
        else:
            self.unsaved = ""

    def _write(self) -> None:
        """Write everything; fingerprints first."""
        folder = self._root / "regimes"
        folder.mkdir(exist_ok=True)
        entries = []
        for regime in self.regimes.values():
            if regime.number == HOME:
                continue
            name = ""
            if regime.fingerprint is not None:
                name = f"regimes/{regime.number:06d}.safetensors"
                f = regime.fingerprint
                arrays = {
                    "mean": f.mean,
                    "variance": f.variance,
                    "whitening": f.whitening,
                    "scalars": np.array([f.threshold, f.n_samples], np.float64),
                }
                write_arrays(self._root / name, arrays)
            entries.append(
                {
                    "number": regime.number,
                    "version": regime.version,
                    "kind": regime.kind,
                    "accuracy": regime.accuracy,
                    "fingerprint": name,
                    "last_used": regime.last_used,
                    "keys": list(regime.keys),
                    "n_images": regime.n_images,
                }
            )
        write_json(self._root / "library.json", {"regimes": entries})
