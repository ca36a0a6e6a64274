"""One bundle on its way into the place of another, while the daemon goes on with everything else.

It is read, compared and copied in a thread; then its servers load, and its thresholds are computed where they are
not its own, beside those that serve. Only then does the daemon end, and one with the new bundle begins, which has
the servers succeed those before.
"""

import contextlib
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from tta.bundle import Bundle, Manifest, check_signed, interface_changes, load_bundle
from tta.config import Config
from tta.daemon.calibrations import Calibrations
from tta.daemon.deployment import Deployment, former_folder
from tta.daemon.labels import room_for_labels
from tta.daemon.processes import Logger
from tta.daemon.standby import Standby
from tta.errors import InputError, PreconditionError, TTAError, UnavailableError
from tta.monitor.stickiness import nearest

DISK_RETRY_S = 60.0  # seconds after which a copy may be tried again

Reply = dict[str, Any]
Answer = Callable[[Reply], None]
Fail = Callable[[BaseException], None]


class Exchange:
    """Deploys one bundle at a time. Owned by the daemon's main thread.

    Args:
        config: of the daemon.
        deployment: of its state folder.
        present: manifest of the bundle in service.
        present_sha256: its identity.
        configured: bundle that the configuration names.
        warm_up: starts the servers of a bundle that lies at a path.
        told: hears of what happens, by name and evidence.
        log: where to.
    """

    def __init__(
        self,
        config: Config,
        deployment: Deployment,
        present: Manifest,
        present_sha256: str,
        configured: Path,
        warm_up: Callable[[Path, str], Standby],
        told: Callable[..., None],
        log: Logger,
    ) -> None:
        self._config = config
        self._deployment = deployment
        self._present = present
        self._present_sha256 = present_sha256
        self._configured = configured
        self._warm_up = warm_up
        self._told = told
        self._log = log
        self._thread: threading.Thread | None = None
        self._checked: tuple[Bundle, list[str], Path] | BaseException | None = None  # by the thread
        self._answer: tuple[Answer, Fail] | None = None
        self.standby: Standby | None = None
        self.copy: Path | None = None  # of the bundle under way
        self.sha256 = ""  # its identity
        self.has_served_before = False
        self._calibrations: Calibrations | None = None
        self._calibrated = False

    def begin(self, path: Path, force: bool, answer: Answer, fail: Fail) -> None:
        """Deploy a bundle: the answer comes from `turn` when it has been read and copied.

        Raises:
            PreconditionError: another is on its way.
            InputError: bundles are not taken from there.
        """
        if self._thread is not None or self.standby is not None:
            raise PreconditionError("a bundle is being deployed already: see `tta status`")
        resolved = path.resolve()  # where a link leads
        self._check_place(resolved)
        self._answer, self._checked = (answer, fail), None
        self._thread = threading.Thread(target=self._check, args=(resolved, force), name="exchange", daemon=True)
        self._thread.start()

    def _check_place(self, path: Path) -> None:
        """Bundles name code to import: only whoever may write a folder of the operator's choice has them served.

        Raises:
            InputError: it does not lie beside the configured one, nor in or below `daemon.bundles`.
        """
        chosen = self._config.daemon.bundles
        if chosen is not None:
            folder, right = chosen.resolve(), chosen.resolve() in path.parents
        else:
            folder = self._configured.resolve().parent
            right = path.parent == folder
        if not right:
            raise InputError(f"bundles are taken from {folder} (daemon.bundles): put {path.name} there")

    def _check(self, path: Path, force: bool) -> None:
        try:
            bundle = load_bundle(path)
            if bundle.sha256 == self._present_sha256:
                raise PreconditionError(
                    f"{path} is the bundle in service ({bundle.sha256[:12]}…): nothing to deploy"
                )
            if self._config.security.signers is not None:
                check_signed(bundle, self._config.security.signers)
            self._config.check_model([b.name for b in bundle.manifest.blocks])
            room_for_labels(self._config, bundle.manifest.image_shape)
            changes = interface_changes(self._present, bundle.manifest)
            if changes and not force:
                raise PreconditionError(f"clients would notice: {'; '.join(changes)}: --force if they know")
            try:
                copy = self._deployment.keep(path, bundle.sha256)
            except OSError as error:
                raise UnavailableError(f"no copy of {path} can be kept: {error}", DISK_RETRY_S) from error
            self._checked = (bundle, changes, copy)
        except BaseException as error:  # for whoever asked
            self._checked = error

    def turn(self) -> bool:
        """Go on with what is under way; whether the daemon may end, for its successor's servers are warm."""
        if self._thread is not None and not self._thread.is_alive():
            self._thread = None
            self._conclude_check()
        if self.standby is None:
            return False
        try:
            return self.standby.look() and self._has_thresholds()
        except TTAError as error:
            self._told("deploy_failed", error=str(error))
            self.close()
            return False

    def _has_thresholds(self) -> bool:
        """Whether a start finds them; one that must compute them answers nobody meanwhile."""
        if self._calibrations is not None and self._calibrations.poll() is not None:
            self._calibrated = True  # or they could not be computed, and the start tries that again
        return self._calibrated

    def _conclude_check(self) -> None:
        assert self._answer is not None
        answer, fail = self._answer
        self._answer = None
        if self._checked is None or isinstance(self._checked, BaseException):
            error = self._checked or RuntimeError("the check ended without a result")
            if not isinstance(error, TTAError):
                self._log.error("deploy_check_failed", error=repr(error))
            fail(error)
            return
        bundle, changes, self.copy = self._checked
        self.sha256 = bundle.sha256
        self.has_served_before = former_folder(self._deployment.root, bundle.sha256).is_dir()
        try:
            self._calibrate(replace(bundle, path=self.copy))
            self.standby = self._warm_up(self.copy, bundle.sha256)
        except (OSError, TTAError) as error:
            fail(error if isinstance(error, TTAError) else UnavailableError(str(error), DISK_RETRY_S))
            self.close()
            return
        self._told("deploying", bundle=bundle.sha256, model=bundle.manifest.name)
        answer(
            {
                "name": bundle.manifest.name,
                "bundle_sha256": bundle.sha256,
                "former_sha256": self._present_sha256,
                "changes": changes,
            }
        )

    def _calibrate(self, bundle: Bundle) -> None:
        """Have the thresholds computed that a start begins with, in the folder that is moved to its place then."""
        monitor = self._config.monitor
        root = former_folder(self._deployment.root, bundle.sha256) / "calibrations"
        root.mkdir(parents=True, exist_ok=True)
        self._calibrations = Calibrations(root, bundle, monitor.arl, self._config.adapt.nice, self._log)
        wanted = nearest(monitor.stickiness or 0.0, 1.0)
        self._calibrated = self._calibrations.kept(wanted) is not None
        if not self._calibrated:
            self._calibrations.request(wanted)

    def close(self) -> None:
        """Give up what is under way, and leave nothing of it."""
        self.end_standby()
        if self._calibrations is not None:
            self._calibrations.close()
        if self.copy is not None:
            with contextlib.suppress(OSError):
                if self.has_served_before:
                    self._deployment.drop_copy(self.sha256)
                else:
                    self._deployment.discard(self.sha256)
        self.copy = self._calibrations = None

    def end_standby(self) -> None:
        """Stop the servers that were not told to succeed others."""
        if self.standby is not None:
            self.standby.close()
        self.standby = None
