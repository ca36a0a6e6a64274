"""Regimes seen before, home first, as fingerprints in fixed coordinates: the source model's features.

A fingerprint is the mean of residuals and how the means of its own windows scatter about it. A window of
samples belongs to the regime whose mean it is nearest to (Mahalanobis), if it is as near as the regime's own
windows are, clearly nearer to it than to any other, and has left the regime before in just its direction. Small
windows decide clear cases: half of the returns of a CIFAR corruption are known after 4 samples, three quarters
after 8, and one look in 10,000 leaves a regime that has not ended.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tta.errors import InputError
from tta.monitor.calibration import Bootstrap
from tta.monitor.charts import Array
from tta.monitor.stickiness import Stickiness

WINDOW = 48  # samples that a fingerprint's threshold is for
# Samples that tell neighbours apart: 48 of zoom blur are within defocus blur's threshold, 128 at twice it.
LONG = 128
LOOKS = (3, 4, 6, 8, 12, 16, 24, 32, WINDOW, LONG)  # newest samples compared with fingerprints, in this order
LEAD = 0.9  # the next regime must be farther by a factor of 1 + LEAD/√n: 1.5 of 3 samples, 1.13 of 48
# Standard deviations a window must have left the present regime by, towards the other. By distances alone 15 %
# of the windows of clean digits leave home for mirrored ones, which are near; so none of 2,000 (bench.neighbours).
SURE = 6.0
MATCH_QUANTILE = 0.995  # of a regime's own windows that are recognised as it
SHRINKAGE = 0.3  # of the scatter's covariance towards its diagonal: it is known from a few hundred samples
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
        whitening: (D, D) that gives the means of its windows of `WINDOW` samples unit covariance.
        threshold: largest `distance` of a window that still belongs.
        n_samples: it was taken from; its own mean is no surer than that.
    """

    mean: Array
    variance: Array
    whitening: Array
    threshold: float
    n_samples: int

    def distance(self, window: Array, inflation: float = 1.0) -> float:
        """Mean squared deviation of the window's mean, in units of what chance gives (about 1 within).

        Args:
            window: (n, D) residuals.
            inflation: of the variance of a mean by stickiness.
        """
        deviation = self.whitening @ (window.mean(axis=0) - self.mean)
        chance = WINDOW * (1 / len(window) + 1 / self.n_samples) * inflation
        return float(deviation @ deviation / len(deviation) / chance)

    def leans(self, window: Array, other: "Fingerprint", inflation: float = 1.0) -> bool:
        """Whether a window's mean has left this regime's in the direction of another's, and lies nearer to that.

        What traffic differs from the reference by in any other direction says nothing of which of the two it is:
        long windows of it may well be beyond both thresholds.

        Args:
            window: (n, D) residuals.
            other: the regime that it may be of.
            inflation: of the variance of a mean by stickiness.
        """
        way = self.whitening @ (other.mean - self.mean)
        gone = self.whitening @ (window.mean(axis=0) - self.mean)
        # Both means are estimates: their own errors lengthen the way, and lie along it.
        here, there = (len(way) * WINDOW * inflation / n for n in (self.n_samples, other.n_samples))
        squared = float(way @ way)
        length = squared - here - there
        if length <= 0:
            return False  # nothing is known to tell them apart
        along = float(gone @ way) - here  # 0 here, `length` there
        chance = WINDOW * (1 / len(window) + 1 / self.n_samples) * inflation
        return along > length / 2 and along > SURE * float(np.sqrt(chance * squared))

    def without_outliers(self, window: Array, n: int) -> Array:
        """A window (m, D) of residuals without the n samples that are farthest away: (m - n, D)."""
        far = np.square((window - self.mean) @ self.whitening.T).sum(axis=1)
        return window[np.sort(np.argsort(far)[: len(window) - n])]


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
    w = np.asarray(w, np.float64)
    mean = w.mean(axis=0)
    variance = np.maximum(w.var(axis=0), VARIANCE_FLOOR)
    draw = Bootstrap(predictions, N_WINDOWS, Stickiness(class_run=MEAN_CLASS_RUN), np.random.default_rng(seed))
    total = np.zeros((N_WINDOWS, w.shape[1]))
    for _ in range(WINDOW):
        total += w[draw.next()]
    deviations = total / WINDOW - mean
    scatter = deviations.T @ deviations / N_WINDOWS
    own = np.maximum(np.diag(scatter), VARIANCE_FLOOR / WINDOW)
    scatter = (1 - SHRINKAGE) * scatter + np.diag(SHRINKAGE * own)
    whitening = np.linalg.inv(np.linalg.cholesky(scatter))
    distances = np.square(deviations @ whitening.T).mean(axis=1)
    return Fingerprint(mean, variance, whitening, float(np.quantile(distances, MATCH_QUANTILE)), len(w))


def recognise(
    candidates: Sequence[tuple[Fingerprint, Array]],
    inflation: float = 1.0,
    present: int | None = None,
    least: int = LOOKS[0],
    shift: tuple[Fingerprint, Array] | None = None,
) -> int | None:
    """Which regime traffic belongs to.

    Args:
        candidates: each regime, and the newest residuals (n, D) to judge it by.
        inflation: of the variance of a mean by stickiness.
        present: index of the regime the traffic was in. It is found again only by a whole `WINDOW` or more, and no
            other is found by samples that may well be its own.
        least: samples a look must have.
        shift: what the present shift looks like, if it is none of the regimes, and the newest residuals: while it
            explains those, a regime is found only by as many as there are, from `WINDOW` on.

    Returns:
        Index of the regime, or None if the traffic is like none of them, or like several.
    """

    def ratio(candidate: tuple[Fingerprint, Array], n: int) -> float:
        found, w = candidate
        return found.distance(w[-n:], inflation) / found.threshold if len(w) >= n else np.inf

    n_shift = 0 if shift is None else len(shift[1])
    for n in LOOKS if candidates else ():
        if n < least:
            continue
        if n < WINDOW and present is not None and ratio(candidates[present], n) <= 1:
            continue
        if shift is not None and n < (LONG if n_shift >= LONG else WINDOW) and ratio(shift, n) <= 1:
            continue
        ratios = [ratio(c, n) for c in candidates]
        best = int(np.argmin(ratios))
        others = min((r for i, r in enumerate(ratios) if i != best), default=np.inf)
        if ratios[best] > 1 or others < ratios[best] * (1 + LEAD / np.sqrt(n)):
            continue
        if present is None or (best == present and n >= WINDOW):
            return best
        found, w = candidates[present]
        if best != present and ratios[present] > 1 and found.leans(w[-n:], candidates[best][0], inflation):
            return best
    return None
