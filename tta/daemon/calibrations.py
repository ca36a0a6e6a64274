"""Thresholds for how sticky the traffic is, computed in a process of their own and kept on disk.

`python -m tta.daemon.calibrations BUNDLE SHA256 OUT ARL REPEAT CLASS_RUN NICE PARENT` is that process: seconds of
work that the daemon's loop must not wait for.
"""

import hashlib
import os
import subprocess
import sys
import time
from pathlib import Path

import tta
from tta.bundle import Bundle, load_bundle
from tta.daemon.files import read_arrays, write_arrays
from tta.daemon.processes import Logger
from tta.errors import DamagedError
from tta.monitor.calibration import Calibration, calibrate
from tta.monitor.charts import Layout
from tta.monitor.reference import Reference
from tta.monitor.stickiness import Stickiness
from tta.process import become_worker

COMPUTE_S = 120.0  # seconds that alarms wait for thresholds
LONGEST_S = 1800.0  # seconds a calibration may take


class Calibrations:
    """All thresholds of one bundle at one `arl`. Owned by the daemon's main thread.

    Args:
        root: folder they are kept in.
        bundle: what they are for; its own thresholds are used where they fit.
        arl: samples between two false alarms; None for the bundle's.
        nice: of the process that computes them.
    """

    def __init__(self, root: Path, bundle: Bundle, arl: float | None, nice: int, log: Logger) -> None:
        self.arl = bundle.manifest.arl if arl is None else arl
        self._root = root
        self._bundle = bundle
        self._nice = nice
        self._log = log
        self._process: subprocess.Popen[bytes] | None = None
        self._wanted: Stickiness | None = None
        self._began = self._asked = 0.0  # monotonic seconds
        self._told = False  # that it takes long
        root.mkdir(exist_ok=True)

    def kept(self, stickiness: Stickiness) -> Calibration | None:
        """Thresholds that are there already."""
        own = Calibration.load(self._bundle.reference)
        if own.arl == self.arl and own.stickiness == stickiness:
            return own
        try:
            arrays = read_arrays(self._path(stickiness))
        except DamagedError as error:  # the next one is written over it
            self._log.warning("calibration_damaged", error=str(error))
            return None
        return Calibration.load(arrays) if arrays else None

    def now(self, stickiness: Stickiness) -> Calibration:
        """Thresholds, computed here if need be; takes seconds."""
        found = self.kept(stickiness)
        if found is None:
            found = _compute(self._bundle, self.arl, stickiness)
            write_arrays(self._path(stickiness), found.arrays())
        return found

    def request(self, stickiness: Stickiness) -> None:
        """Have thresholds computed; one at a time, a second request waits for its turn by being made again."""
        if self._process is not None or self.kept(stickiness) is not None:
            if self._wanted is None or self._told:  # asked for anew, it may wait for as long again
                self._asked, self._told = time.monotonic(), False
            self._wanted = self._wanted or stickiness
            return
        self._wanted = stickiness
        arguments = [
            str(self._bundle.path.resolve()),
            self._bundle.sha256,
            str(self._path(stickiness)),
            repr(self.arl),
            repr(stickiness.repeat),
            str(stickiness.class_run),
            str(self._nice),
            str(os.getpid()),
        ]
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tta.daemon.calibrations", *arguments],
                stdin=subprocess.DEVNULL,
                env={**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
            )
        except OSError as error:  # `poll` finds no thresholds
            self._log.error("calibration_not_started", error=str(error))
            return
        self._began = self._asked = time.monotonic()
        self._told = False
        self._log.info("calibration_started", pid=self._process.pid, arl=self.arl, **vars(stickiness))

    def poll(self) -> tuple[Stickiness, Calibration | None] | None:
        """What was requested, once it is there; None in place of thresholds that could not be computed.

        Also None once for those that take long, as on a machine that is busy: they may come later.
        """
        if self._wanted is None:
            return None
        if self._process is not None and self._process.poll() is None:
            now = time.monotonic()
            if now - self._began < LONGEST_S:
                if self._told or now - self._asked < COMPUTE_S:
                    return None
                self._told = True  # alarms must not wait for ever
                self._log.warning("calibration_slow", seconds=round(now - self._began), **vars(self._wanted))
                return self._wanted, None
            self.close()
        status, self._process = self._process.returncode if self._process else 0, None
        wanted, self._wanted = self._wanted, None
        found = self.kept(wanted)
        if found is None:
            self._log.error("calibration_failed", exit_status=status, **vars(wanted))
        return wanted, found

    def close(self) -> None:
        """Stop the process."""
        if self._process is not None:
            self._process.kill()
            self._process.wait(5)

    def _path(self, stickiness: Stickiness) -> Path:
        text = f"{tta.__version__} {self._bundle.sha256} {self.arl!r} {stickiness.repeat!r} {stickiness.class_run}"
        return self._root / f"{hashlib.sha256(text.encode()).hexdigest()[:24]}.safetensors"


def reference_of(bundle: Bundle) -> Reference:
    """What the monitor knows of a bundle's reference data."""
    blocks = bundle.manifest.blocks
    layout = Layout(tuple(b.name for b in blocks), tuple(b.n_features for b in blocks))
    return Reference.load(layout, bundle.reference)


def _compute(bundle: Bundle, arl: float, stickiness: Stickiness) -> Calibration:
    return calibrate(reference_of(bundle), arl, stickiness)


def main() -> int:
    """Compute thresholds and write them."""
    path, sha256, out, arl, repeat, class_run, nice, parent = sys.argv[1:9]
    become_worker(int(nice), int(parent))
    calibration = _compute(load_bundle(path, sha256), float(arl), Stickiness(float(repeat), int(class_run)))
    write_arrays(Path(out), calibration.arrays())
    return 0


if __name__ == "__main__":
    sys.exit(main())
