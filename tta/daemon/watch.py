"""Turn features and labels into findings: alarms, recognised regimes, rising errors. No I/O.

The charts and fingerprints always see the source model's features, whatever version serves.
"""

from collections import deque
from collections.abc import Sequence

import numpy as np

from tta.bundle import Bundle
from tta.config import MonitorConfig
from tta.daemon.library import HOME, Library, Regime
from tta.monitor.accuracy import ErrorDetector
from tta.monitor.calibration import calibrate
from tta.monitor.charts import Alarm, Array, DriftCharts, Layout, centre
from tta.monitor.diagnosis import Diagnosis, diagnose
from tta.monitor.regimes import WINDOW, Fingerprint, fingerprint

CHECK_EVERY = 16  # samples between two looks at which regime this is
AGREEING_CHECKS = 2  # looks in a row that must agree
REGIME_SLACK = 3.0  # a regime's own scale is known from a few hundred samples only


class Watch:
    """The monitor of one daemon. Owned by its main thread."""

    def __init__(self, bundle: Bundle, config: MonitorConfig, library: Library) -> None:
        manifest, reference = bundle.manifest, bundle.reference
        self.layout = Layout(tuple(b.name for b in manifest.blocks), tuple(b.n_features for b in manifest.blocks))
        self.config = config
        self.library = library
        self.arl = manifest.arl
        self._centroids = np.asarray(reference["centroids"], np.float64)
        self._thresholds = reference["thresholds"]
        if config.arl is not None and config.arl != manifest.arl:
            calibration = calibrate(reference["features"], reference["predictions"], self.layout, config.arl)
            self._thresholds, self.arl = calibration.thresholds, config.arl
        # Newest source features, whatever the regime: (sequence, w, predicted class).
        self._recent: deque[tuple[int, Array, int]] = deque(maxlen=2 * config.window)
        self.enter(library.regimes[HOME], 0)

    def enter(self, regime: Regime, sequence: int) -> None:
        """Watch traffic as being in `regime` from `sequence` on."""
        found = regime.fingerprint
        if regime.number == HOME or found is None:
            self.charts = DriftCharts(self.layout, self._thresholds)
        else:
            thresholds = self._thresholds * REGIME_SLACK
            self.charts = DriftCharts(self.layout, thresholds, found.mean, np.sqrt(found.variance))
        null = 1 - regime.accuracy + self.config.error_tolerance
        self.errors = ErrorDetector(null, self.config.label_arl)
        self._error_sequences: deque[int] = deque(maxlen=512)
        self.look_from(sequence)

    def look_from(self, sequence: int) -> None:
        """Recognise regimes only from samples at or after `sequence`."""
        self._since = sequence
        self._unchecked = 0
        self._last_checks: list[int | None] = []

    def features(self, sequences: Sequence[int], features: Array, logits: Array) -> Alarm | None:
        """Take source features of observed samples in order.

        Args:
            sequences: place of each in the stream.
            features: (N, D) whitened, of the source.
            logits: (N, K) of the source.

        Returns:
            The first alarm among them.

        Raises:
            InputError: features that are not finite or of another length; nothing is changed.
        """
        predictions = logits.argmax(axis=1)
        w = centre(np.asarray(features, np.float64), predictions, self._centroids)
        for i, sequence in enumerate(sequences):
            self._recent.append((sequence, w[i], int(predictions[i])))
        self._unchecked += len(w)
        return self.charts.update(w)

    def recognised(self) -> Regime | None:
        """The regime of the last samples, once two looks in a row agree on one."""
        if self._unchecked < CHECK_EVERY:
            return None
        window, _ = self.window(WINDOW)
        if len(window) < WINDOW:
            return None
        self._unchecked = 0
        found = self.library.recognise(window)
        self._last_checks = [*self._last_checks, found.number if found else None][-AGREEING_CHECKS:]
        if found is None or self._last_checks != [found.number] * AGREEING_CHECKS:
            return None
        return found

    def window(self, n: int) -> tuple[Array, Array]:
        """The newest samples since the last `look_from`, at most n: w (n, D) and predicted classes (n,)."""
        rows: list[tuple[Array, int]] = []
        for sequence, w, prediction in reversed(self._recent):
            if sequence < self._since or len(rows) == n:
                break
            rows.append((w, prediction))
        rows.reverse()
        if not rows:
            return np.zeros((0, self.layout.n_features)), np.zeros(0, np.int64)
        return np.stack([r[0] for r in rows]), np.array([r[1] for r in rows])

    def fingerprint(self) -> Fingerprint | None:
        """Of the samples since the last `look_from`; None until there are enough."""
        w, predictions = self.window(self.config.window)
        return fingerprint(w, predictions) if len(w) >= min(self.config.window, 256) else None

    def diagnose(self, errors_up: bool) -> Diagnosis:
        """What kind of shift the samples since the last `look_from` show."""
        return diagnose(self.window(WINDOW)[0], self.layout, errors_up)

    def label(self, sequence: int, error: bool) -> bool:
        """Take one labelled outcome of the serving version; True if the error test alarms."""
        self._error_sequences.append(sequence)
        self.errors.update(error)
        return self.errors.drift_detected

    def error_onset(self) -> int:
        """Place in the stream where labelled errors began to rise."""
        back = min(max(1, self.errors.labels_since_onset), len(self._error_sequences))
        return min(list(self._error_sequences)[-back:])
