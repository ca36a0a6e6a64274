"""Versions and state on disk: written to a temporary name, synced, renamed; the manifest last."""

import shutil
from collections.abc import Collection, Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

import msgspec
import numpy.typing as npt

from tta.daemon.files import (
    read_arrays,
    read_json,
    set_aside,
    sync,
    write_arrays,
    write_atomically,
    write_json,
    write_synced,
)
from tta.errors import ConfigError, DamagedError, DeltaError, NotFoundError
from tta.signatures import SIGNATURES, SigningKey, read_signatures, with_signature
from tta.versions import SOURCE, VersionManifest, has_weights, hash_of, is_signed, load_version, version_folders

Array = npt.NDArray[Any]


def lock(root: Path) -> IO[str]:
    """Make a state folder if there is none, and hold it until the file is closed: one daemon at a time.

    Raises:
        ConfigError: another holds it, or it cannot be written.
    """
    import fcntl

    try:
        root.mkdir(parents=True, exist_ok=True)
        file = (root / "lock").open("a+")
    except OSError as error:
        raise ConfigError(f"state folder {root} cannot be written: {error}") from error
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.close()
        raise ConfigError(f"state folder {root} is in use by another daemon") from error
    return file


def sign_version(folder: Path, manifest: bytes, key: SigningKey) -> None:
    """Vouch for a manifest, the present one of a version or its next; what vouched for the one before stays."""
    lines = with_signature(read_signatures(folder), key.sign("version", hash_of(manifest)))
    write_atomically(folder / SIGNATURES, lines)


class Store:
    """The `versions/` folder and `state.json` of one daemon.

    Args:
        root: the state folder.
        bundle_sha256: whose versions they are.
        key: to sign versions with.
        signers: names and public keys of those whose versions are served; None: no signature is asked for.

    Raises:
        ConfigError: the folder cannot be written.
    """

    def __init__(
        self,
        root: Path,
        bundle_sha256: str,
        key: SigningKey | None = None,
        signers: Mapping[str, str] | None = None,
    ) -> None:
        self.root = root
        self.bundle_sha256 = bundle_sha256
        self._key = key
        self._signers = signers
        self.damaged: dict[str, str] = {}  # files set aside, by their new name, and why
        self._versions = root / "versions"
        self._grown = True  # there may be more versions than are kept
        try:
            self._versions.mkdir(parents=True, exist_ok=True)
            for leftover in self._versions.glob(".tmp-*"):
                shutil.rmtree(leftover)
            probe = root / ".writable"
            probe.write_bytes(b"")
            probe.unlink()
        except OSError as error:
            raise ConfigError(f"state folder {root} cannot be written: {error}") from error

    def folder(self, version: int) -> Path | None:
        """Where a version is; None for the source.

        Raises:
            NotFoundError: there is no such version.
        """
        if version == SOURCE:
            return None
        folder = self._versions / f"{version:06d}"
        if not has_weights(folder):
            have = ", ".join(str(v) for v in self.numbers())
            raise NotFoundError(f"no version {version}: there are {have}")
        return folder

    def numbers(self) -> list[int]:
        """All versions that can be served, the source first."""
        return [SOURCE, *(number for number, folder in version_folders(self.root).items() if has_weights(folder))]

    def discard(self, version: int, verdict: Mapping[str, Any] | None = None) -> None:
        """Drop a candidate's weights; its manifest stays, so that its number is never used again.

        Args:
            version: the candidate.
            verdict: the gate's, noted in the manifest where that can be written; None: it has not judged.
        """
        folder = self.folder(version)
        if folder is None:
            return
        if verdict is not None:
            # A full disk or a damaged manifest is no reason to keep weights that nobody wants.
            with suppress(OSError, ValueError, msgspec.MsgspecError):
                self.amend(version, verdict=dict(verdict))
        for name in ("delta.safetensors", "probe.safetensors"):
            (folder / name).unlink(missing_ok=True)

    def discard_candidates(self) -> None:
        """Drop what the gate never accepted; called when no candidate is under way."""
        for version in self.numbers():
            if version != SOURCE and not self.accepted(version):
                self.discard(version)

    def retire(self, in_use: Collection[int], keep: int) -> list[int]:
        """Delete old versions, and the notes on candidates that were dropped; looks only where there are more.

        Args:
            in_use: versions that stay, however old.
            keep: of the others the newest so many stay.

        Returns:
            The numbers of those deleted.
        """
        if not self._grown:
            return []
        self._grown = False
        folders = version_folders(self.root)
        unused = [n for n in folders if n not in in_use and n != max(folders)]  # numbers count up for ever
        gone = unused[: max(0, len(unused) - keep)]
        for version in gone:
            aside = folders[version].with_name(f".tmp-{version:06d}")  # what a crash leaves of it goes at a start
            folders[version].rename(aside)
            shutil.rmtree(aside)
        return gone

    def accepted(self, version: int) -> bool:
        """Whether the gate accepted a version; False if its manifest cannot be read."""
        try:
            return version == SOURCE or self.manifest(version).verdict.get("outcome") == "accepted"
        except (OSError, ValueError, msgspec.MsgspecError):
            return False

    def verified(self, wanted: int) -> int:
        """`wanted` if it verifies, else the source, which always does."""
        return SOURCE if self.problem(wanted) else wanted

    def problem(self, version: int) -> str:
        """Why a version must not be served; "" if it verifies."""
        try:
            folder = self.folder(version)
            if folder is not None and load_version(folder, self._signers)[0].bundle_sha256 != self.bundle_sha256:
                return f"version in {folder} was made for another bundle"
            return ""
        except (NotFoundError, DeltaError) as error:
            return str(error)

    def write(
        self,
        delta: bytes,
        probe: bytes,
        block: str,
        start: str,
        created_s: float,
        report: dict[str, Any],
        verdict: dict[str, Any],
    ) -> int:
        """Keep a new version for good.

        Args:
            delta: safetensors file of what differs from the source.
            probe: safetensors file of probe images and the adapter's logits.
            block: operated on.
            start: where surgery began.
            created_s: wall clock, seconds since the epoch.
            report: what the adapter tried.
            verdict: the gate's; empty until it has judged.

        Returns:
            Its number.
        """
        version = 1 + max(version_folders(self.root), default=SOURCE)
        self._grown = True
        files = {"delta.safetensors": delta, "probe.safetensors": probe}
        manifest = VersionManifest(
            version=version,
            bundle_sha256=self.bundle_sha256,
            block=block,
            start=start,
            created_s=created_s,
            sha256={name: hash_of(data) for name, data in files.items()},
            verdict=verdict,
            report=report,
        )
        temporary = self._versions / f".tmp-{version:06d}"
        temporary.mkdir()
        for name, data in files.items():
            write_synced(temporary / name, data)
        raw = msgspec.json.format(msgspec.json.encode(manifest))
        if self._key is not None:
            write_synced(temporary / SIGNATURES, with_signature(b"", self._key.sign("version", hash_of(raw))))
        write_synced(temporary / "manifest.json", raw)
        temporary.rename(self._versions / f"{version:06d}")
        sync(self._versions)
        return version

    def amend(self, version: int, **fields: Any) -> None:
        """Change fields of a version's manifest (its verdict, say)."""
        folder = self.folder(version)
        assert folder is not None
        former = (folder / "manifest.json").read_bytes()
        manifest = msgspec.structs.replace(msgspec.json.decode(former, type=VersionManifest), **fields)
        raw = msgspec.json.format(msgspec.json.encode(manifest))
        # Signed first, and beside the former: a crash between the two files spoils nothing. What somebody else has
        # changed is not made sound.
        if self._key is not None and is_signed(folder, former, self._signers or {}):
            sign_version(folder, raw, self._key)
        write_atomically(folder / "manifest.json", raw)

    def manifest(self, version: int) -> VersionManifest:
        """A version's manifest, also of a candidate that was dropped.

        Raises:
            OSError: there is none: the source has none either.
            msgspec.MsgspecError: it is damaged.
        """
        raw = (self._versions / f"{version:06d}" / "manifest.json").read_bytes()
        return msgspec.json.decode(raw, type=VersionManifest)

    def newest(self) -> int:
        """The newest version that was accepted and verifies; the source if there is none."""
        for version in reversed(self.numbers()):
            if self.accepted(version) and self.verified(version) == version:
                return version
        return SOURCE

    def save_state(self, state: Mapping[str, Any]) -> None:
        """Replace `state.json`."""
        write_json(self.root / "state.json", {"bundle_sha256": self.bundle_sha256, **state})

    def load_state(self) -> dict[str, Any] | None:
        """What `save_state` wrote last; empty at the first start, None if it was damaged and is set aside.

        Raises:
            ConfigError: the folder belongs to another bundle.
        """
        path = self.root / "state.json"
        try:
            loaded = read_json(path)
        except DamagedError as error:
            self.damaged[str(set_aside(path))] = str(error)
            return None
        if loaded and loaded.get("bundle_sha256") != self.bundle_sha256:
            raise ConfigError(f"state folder {self.root} belongs to another bundle: choose another --state")
        return loaded

    def save_watch(self, arrays: Mapping[str, npt.NDArray[Any]]) -> None:
        """Replace `watch.safetensors`: where the charts stand."""
        write_arrays(self.root / "watch.safetensors", arrays)

    def load_watch(self) -> dict[str, npt.NDArray[Any]]:
        """What `save_watch` wrote last; empty if there is none or it is damaged: charts then start anew."""
        path = self.root / "watch.safetensors"
        try:
            return read_arrays(path)
        except DamagedError as error:
            self.damaged[str(set_aside(path))] = str(error)
            return {}
