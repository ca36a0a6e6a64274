"""Regimes seen before, home first, as fingerprints in fixed coordinates: the source model's features.

A fingerprint is the mean and spread of residuals. A window of samples belongs to the regime whose mean it is
nearest to, in units of that regime's own spread, if it is as near as the regime's own windows are.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tta.errors import InputError
from tta.monitor.calibration import Bootstrap
from tta.monitor.charts import Array
from tta.monitor.stickiness import Stickiness

WINDOW = 48  # samples that are compared with a fingerprint
MATCH_QUANTILE = 0.995  # of a regime's own windows that are recognised as it
SLACK = 2.0  # a fingerprint from a few hundred samples is itself uncertain
VARIANCE_FLOOR = 0.05  # of whitened units: a frozen channel must not decide alone
N_WINDOWS = 2000
MIN_SAMPLES = 64
MEAN_CLASS_RUN = 5  # a window may come by class: what a regime is must not depend on its mix


@dataclass(frozen=True)
class Fingerprint:
    """What a regime looks like to the source model.

    Attributes:
        mean: (D,) of residuals.
        variance: (D,) of single samples.
        threshold: largest `distance` of a window that still belongs.
    """

    mean: Array
    variance: Array
    threshold: float

    def distance(self, window: Array, inflation: float = 1.0) -> float:
        """Mean squared deviation of the window's mean, in units of what chance gives (about 1 within).

        Args:
            window: (n, D) residuals.
            inflation: of the variance of a mean by stickiness.
        """
        deviation = np.square(window.mean(axis=0) - self.mean) / self.variance
        return float(deviation.mean() * len(window) / inflation)


def fingerprint(w: Array, predictions: Array, seed: int = 0) -> Fingerprint:
    """Take a regime's fingerprint.

    Args:
        w: (N, D) residuals of one regime.
        predictions: (N,) classes the source model predicted for them.
        seed: of the bootstrap of windows.

    Raises:
        InputError: fewer than `MIN_SAMPLES` samples.
    """
    if len(w) < MIN_SAMPLES:
        raise InputError(f"{len(w)} samples are too few for a fingerprint: {MIN_SAMPLES} are needed")
    mean = w.mean(axis=0)
    variance = np.maximum(w.var(axis=0), VARIANCE_FLOOR)
    draw = Bootstrap(predictions, N_WINDOWS, Stickiness(class_run=MEAN_CLASS_RUN), np.random.default_rng(seed))
    total = np.zeros((N_WINDOWS, w.shape[1]))
    for _ in range(WINDOW):
        total += w[draw.next()]
    distances = (np.square(total / WINDOW - mean) / variance).mean(axis=1) * WINDOW
    return Fingerprint(mean, variance, SLACK * float(np.quantile(distances, MATCH_QUANTILE)))


def recognise(candidates: Sequence[tuple[Fingerprint, Array]], inflation: float = 1.0) -> int | None:
    """Which regime traffic belongs to.

    Args:
        candidates: each regime, and the window of residuals (n, D) to judge it by.
        inflation: of the variance of a mean by stickiness.

    Returns:
        Index of the nearest, or None if the traffic is like none of them.
    """
    ratios = [f.distance(window, inflation) / f.threshold for f, window in candidates]
    if not ratios or min(ratios) > 1.0:
        return None
    return int(np.argmin(ratios))
