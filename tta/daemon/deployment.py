"""Which bundle a state folder belongs to, and how another takes its place.

    STATE/deployed.json     which bundle serves, if the configuration names another; how far a move has come
    STATE/bundles/HASH.tta  the bundle that serves, found at a restart whatever becomes of the file it came from
    STATE/former/HASH/      labels, versions, regimes and charts of one that served before: they come back with it

What belongs to a model is moved by renaming. A crash leaves a move that the next start finishes.
"""

import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tta.bundle import bundle_sha256, load_bundle, signatures_of
from tta.daemon.files import read_json, set_aside, sync, write_json
from tta.errors import BundleError, ConfigError, DamagedError
from tta.versions import SOURCE, has_weights

RECORD = "deployed.json"
BUNDLES = "bundles"
FORMER = "former"
# Everything in a state folder that is of one model; patterns also find what was set aside as damaged.
OF_A_MODEL = (
    *("labels.sqlite*", ".labels.sqlite*", "library.json*", "rehearsed.*", "watch.safetensors*"),
    *("regimes", "versions", "calibrations", "state.json*"),
)
HASH_CHARS = 16  # of a bundle's identity, in names of files


def former_folder(root: Path, sha256: str) -> Path:
    """Where what a bundle had is kept while another serves."""
    return root / FORMER / sha256[:HASH_CHARS]


def former_folders(root: Path) -> list[Path]:
    """Those there are."""
    return list((root / FORMER).glob("*"))


class Deployment:
    """The bundle of one state folder.

    Args:
        root: the state folder.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.damaged: dict[str, str] = {}  # files set aside, by their new name, and why

    def bundle_in_force(self, configured: Path, deploy: bool = False) -> Path:
        """The bundle to start with: the configured one, or the copy of one that was deployed in its place.

        Args:
            configured: what the configuration names.
            deploy: a third is served; what was deployed stays while the configuration is as it was then, so that a
                restart does not take it back.

        Raises:
            ConfigError: the configuration names a third by now, and it is not to be served.
        """
        named = _identity(configured)
        try:
            record = read_json(self.root / RECORD)
        except DamagedError:  # `claim` sets it aside; what it said, the state says too
            record = {"bundle": self._owner(), "instead_of": named}
        deployed = record.get("bundle", "") or ("" if named else self._owner())
        copy = self._copy_of(deployed)
        if deployed in ("", named) or not copy.exists():
            return configured
        if named in ("", record.get("instead_of")):
            return copy
        if deploy:
            return configured
        raise ConfigError(
            f"{configured} ({named[:12]}…) is neither the bundle deployed last ({deployed[:12]}…, {copy}) nor the "
            "one configured then: start with --deploy to serve it, or set `bundle` to that one"
        )

    def claim(self, sha256: str, configured: Path, deploy: bool) -> None:
        """Make the folder that of a bundle; the caller holds its lock.

        Args:
            sha256: the bundle's identity.
            configured: what the configuration names, which may be another.
            deploy: put the state of another bundle aside; False: finish what was begun, and no more.

        Raises:
            ConfigError: it is another bundle's and must not be put aside, or the disk refuses.
        """
        try:
            record = self._record()
            self._finish(record)
            owner = self._owner() or record.get("bundle", "")
            if owner not in ("", sha256) and not deploy:
                raise ConfigError(
                    f"state folder {self.root} belongs to another bundle ({owner[:12]}…): start with --deploy to "
                    "put its state aside and serve this one, or choose another --state"
                )
            if owner not in ("", sha256):
                moved = {"bundle": sha256, "instead_of": _identity(configured), "out": owner, "step": "out"}
                self._write(moved)
                self._finish(moved)
            elif not owner and former_folder(self.root, sha256).is_dir():
                self._finish({"bundle": sha256, "instead_of": _identity(configured), "step": "in"})
        except OSError as error:
            raise ConfigError(f"state folder {self.root} cannot be written: {error}") from error

    def settle(self, sha256: str, configured: Path, keep: int) -> list[str]:
        """The bundle serves: delete what is left of those before, but for the last.

        Args:
            sha256: the bundle's identity.
            configured: what the configuration names; a record is needed only where that is another.
            keep: of so many bundles that served before the state stays.

        Returns:
            Beginnings of the identities of those whose state was deleted.

        Raises:
            OSError: the disk refuses.
        """
        former = former_folders(self.root)
        # A file's time goes with it: the state was written last when the bundle served last.
        former.sort(key=lambda folder: _mtime(folder / "state.json"))
        gone = former[: max(0, len(former) - keep)]
        for folder in gone:
            shutil.rmtree(folder)
        for copy in list((self.root / BUNDLES).glob("*")):
            if copy != self._copy_of(sha256):
                _remove(copy)
        if _identity(configured) == sha256:
            (self.root / RECORD).unlink(missing_ok=True)
        return [folder.name for folder in gone]

    def keep(self, bundle: Path, sha256: str) -> Path:
        """Copy a bundle into the folder and to the disk, unless it is there and verifies; where it lies.

        Raises:
            OSError: the disk refuses, or the bundle has changed meanwhile.
        """
        copy = self._copy_of(sha256)
        if bundle == copy:  # which has just been read
            return copy
        try:
            load_bundle(copy, sha256)
            if signatures_of(copy) == signatures_of(bundle):
                return copy
        except BundleError:
            pass
        copy.parent.mkdir(parents=True, exist_ok=True)
        temporary = copy.with_name(f".tmp-{copy.name}")
        _remove(temporary)
        try:
            if bundle.is_dir():
                shutil.copytree(bundle, temporary)
            else:
                shutil.copyfile(bundle, temporary)
            for path in (temporary, *temporary.rglob("*")):
                sync(path)
            if _identity(temporary) != sha256:
                raise OSError(f"{bundle} has changed while it was copied")
            _remove(copy)
            temporary.rename(copy)
            sync(copy.parent)
        except OSError:
            _remove(temporary)
            raise
        return copy

    def discard(self, sha256: str) -> None:
        """Delete what a bundle left that did not come into service, and has not served before."""
        shutil.rmtree(former_folder(self.root, sha256), ignore_errors=True)
        self.drop_copy(sha256)

    def drop_copy(self, sha256: str) -> None:
        """Delete the copy of a bundle that does not serve."""
        _remove(self._copy_of(sha256))

    def version_of_former(self, sha256: str) -> Path | None:
        """Folder of the version that a bundle served last; None for the source, or if it never did."""
        folder = former_folder(self.root, sha256)
        try:
            version = int(read_json(folder / "state.json").get("case", {}).get("serving", SOURCE))
        except (DamagedError, TypeError, ValueError):
            return None
        found = folder / "versions" / f"{version:06d}"
        return found if version != SOURCE and has_weights(found) else None

    def _owner(self) -> str:
        """Whose state lies here; "" if there is none, or it is damaged, which who reads it for good tells."""
        try:
            return str(read_json(self.root / "state.json").get("bundle_sha256", ""))
        except DamagedError:
            return ""

    def _finish(self, record: dict[str, Any]) -> None:
        """Move what is still to be moved."""
        if record.get("step") == "out":
            _move(self.root, former_folder(self.root, record["out"]))
            record["step"] = "in"
            self._write(record)
        if record.get("step") == "in":
            back = former_folder(self.root, record["bundle"])
            if back.is_dir():
                _move(back, self.root)
                shutil.rmtree(back)
            record["step"] = ""
            self._write(record)

    def _copy_of(self, sha256: str) -> Path:
        return self.root / BUNDLES / f"{sha256[:HASH_CHARS]}.tta"

    def _record(self) -> dict[str, Any]:
        path = self.root / RECORD
        try:
            return read_json(path)
        except DamagedError as error:
            self.damaged[str(set_aside(path))] = str(error)
            return {}

    def _write(self, record: dict[str, Any]) -> None:
        write_json(self.root / RECORD, record)


def _identity(bundle: Path) -> str:
    """Of a bundle; "" if it is not there or not readable."""
    try:
        return bundle_sha256(bundle)
    except BundleError:
        return ""


def of_a_model(folder: Path) -> Iterator[Path]:
    """What lies in a state folder, or one of `former`, and belongs to one model; its state last."""
    for pattern in OF_A_MODEL:
        yield from folder.glob(pattern)


def _move(source: Path, target: Path) -> None:
    """Rename a model's files into another folder; what has been moved already is not there any more.

    What is in the way there, which nothing we know of leaves, is set aside.
    """
    target.mkdir(parents=True, exist_ok=True)
    for path in list(of_a_model(source)):
        there = target / path.name
        if there.is_dir() and not any(there.iterdir()):
            there.rmdir()
        elif there.exists():
            there.rename(there.with_name(f"{there.name}.damaged-{time.time_ns()}"))
        path.rename(there)
    for folder in (target, source, target.parent):
        sync(folder)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _mtime(path: Path) -> float:
    """Seconds since the epoch; 0 if it is not there."""
    return path.stat().st_mtime if path.exists() else 0.0
