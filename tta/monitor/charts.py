"""MEWMA charts over whitened block features: one chart a block and speed, judged sample by sample.

Idea: z ← (1-λ)·z + λ·w follows the mean of the whitened features w; T² = ‖z‖² / (λ/(2-λ)·(1-(1-λ)^{2t})) is
its squared length in units of its own variance. Small λ sees small shifts late, large λ large ones at once.
A chart alarms when T²/r exceeds its threshold; the thresholds are calibrated jointly, so that all charts
together give one false alarm in `arl` samples (`tta.monitor.calibration`).

Source: Lowry et al., A multivariate EWMA control chart, Technometrics 1992.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from tta.errors import InputError

LAMBDAS = (0.3, 0.1, 0.03)
CLIP = 8.0  # standard deviations: one broken image cannot alarm alone, a stuck sensor still does
QUIET = 0.5  # of the threshold, under which nothing has begun
CHUNK = 64  # samples a batch is cut into, so that the path matrix stays small

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Layout:
    """Where each block's features stand in the feature vector.

    Attributes:
        names: of the blocks, in the order of depth, the head last.
        widths: number of features r of each.
    """

    names: tuple[str, ...]
    widths: tuple[int, ...]

    @property
    def starts(self) -> list[int]:
        """First column of each block."""
        return [sum(self.widths[:i]) for i in range(len(self.widths))]

    @property
    def n_features(self) -> int:
        """Length D of the feature vector."""
        return sum(self.widths)

    def squares(self, w: Array) -> Array:
        """Mean square of each block's features: (..., D) to (..., blocks)."""
        totals = np.add.reduceat(np.square(w), self.starts, axis=-1)
        means: Array = totals / np.asarray(self.widths, totals.dtype)
        return means


def centre(features: Array, predictions: Array, centroids: Array) -> Array:
    """Subtract each sample's predicted-class centroid and clip, so that a new class mix is no shift.

    Args:
        features: (N, D) whitened features of the source model.
        predictions: (N,) classes the source model predicted.
        centroids: (K, D) mean whitened features of each predicted class.

    Raises:
        InputError: features of another length, or not finite.
    """
    if features.ndim != 2 or features.shape[1] != centroids.shape[1]:
        raise InputError(f"expected features of shape (N, {centroids.shape[1]}), got {features.shape}")
    if not np.isfinite(features).all():
        raise InputError("features hold NaN or infinity")
    w: Array = np.clip(features - centroids[predictions], -CLIP, CLIP)
    return w


@dataclass(frozen=True)
class Alarm:
    """One chart over its threshold.

    Attributes:
        index: of the first sample over it, within the update.
        lag: samples between the estimated onset (the last time all charts were quiet) and that sample.
        block: of the chart that crossed.
        statistic: the chart's T²/r over its threshold, > 1.
    """

    index: int
    lag: int
    block: str
    statistic: float


class DriftCharts:
    """All charts of one regime, fed with class-centred features. Owned by one thread.

    Args:
        layout: the blocks.
        thresholds: (speeds, blocks) of T²/r.
        mean: (D,) of the regime; charts watch deviations from it.
        scale: (D,) standard deviations of the regime.
    """

    def __init__(
        self,
        layout: Layout,
        thresholds: Array,
        mean: Array | None = None,
        scale: Array | None = None,
        lambdas: Sequence[float] = LAMBDAS,
    ) -> None:
        self.layout = layout
        self.lambdas = tuple(lambdas)
        self.thresholds = np.asarray(thresholds, np.float64)
        self._mean = np.zeros(layout.n_features) if mean is None else np.asarray(mean, np.float64)
        self._scale = np.ones(layout.n_features) if scale is None else np.asarray(scale, np.float64)
        self._paths = [_path_matrix(lam) for lam in self.lambdas]
        self.reset()

    def reset(self) -> None:
        """Start the charts anew, as if nothing had been seen."""
        self._z = np.zeros((len(self.lambdas), self.layout.n_features))
        self.n_samples = 0
        self._quiet_until = 0  # samples taken when all charts were last quiet
        self.statistic = np.zeros(len(self.layout.names))  # by block: largest T²/(r·threshold) over the speeds

    @property
    def drift_detected(self) -> bool:
        """Whether a chart is over its threshold now."""
        return bool(self.statistic.max() > 1.0)

    def update(self, w: Array) -> Alarm | None:
        """Take samples in order and judge after each one.

        Args:
            w: (N, D) class-centred features (`centre`), any N.

        Returns:
            The first alarm among these samples, if any.
        """
        first: Alarm | None = None
        for start in range(0, len(w), CHUNK):
            alarm = self._update_chunk((w[start : start + CHUNK] - self._mean) / self._scale)
            if alarm is not None and first is None:
                first = replace(alarm, index=alarm.index + start)
        return first

    def _update_chunk(self, w: Array) -> Alarm | None:
        n = len(w)
        t = self.n_samples + np.arange(1, n + 1)
        worst = np.zeros((n, len(self.layout.names)))
        for i, lam in enumerate(self.lambdas):
            decay = (1 - lam) ** np.arange(1, n + 1)
            z = self._paths[i][:n, :n] @ w + decay[:, None] * self._z[i]  # (n, D)
            self._z[i] = z[-1]
            variance = lam / (2 - lam) * (1 - (1 - lam) ** (2 * t))
            np.maximum(worst, self.layout.squares(z) / variance[:, None] / self.thresholds[i], out=worst)
        self.statistic = worst[-1]
        largest = worst.max(axis=1)
        over = np.flatnonzero(largest > 1.0)
        quiet = np.flatnonzero(largest[: over[0] if len(over) else n] < QUIET)
        if len(quiet):
            self._quiet_until = self.n_samples + int(quiet[-1]) + 1
        before, self.n_samples = self.n_samples, self.n_samples + n
        if not len(over):
            return None
        index = int(over[0])
        block = int(worst[index].argmax())
        lag = before + index - self._quiet_until
        return Alarm(index, lag, self.layout.names[block], float(worst[index, block]))

    def state(self) -> dict[str, Array]:
        """What `load_state` needs to go on where this left off."""
        return {"z": self._z.copy(), "n_samples": np.array(self.n_samples)}

    def load_state(self, state: dict[str, Array]) -> None:
        """Go on from `state()` of charts with the same layout."""
        self._z = np.array(state["z"], np.float64)
        self.n_samples = int(state["n_samples"])


def _path_matrix(lam: float) -> Array:
    """(CHUNK, CHUNK): row i weighs samples 0..i as i steps of the EWMA do."""
    i, j = np.indices((CHUNK, CHUNK))
    return np.where(j <= i, lam * (1 - lam) ** np.maximum(i - j, 0), 0.0)
