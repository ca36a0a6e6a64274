"""Charts that watch a mean: MEWMA over whitened block features, and a histogram of predicted classes.

MEWMA: z ← (1-λ)·z + λ·w follows the mean of the whitened features w; T² = ‖z‖² / (λ/(2-λ)) is its squared length
in units of the variance it settles at. (In units of its variance after t samples, smaller at first, a single odd
sample that comes first would alarm: thresholds of slow charts are for means, whose tails are light.) Small λ sees
small shifts late, large λ large ones at once. One
chart a block and speed alarms when T²/r exceeds its threshold; the thresholds are calibrated jointly, so that all
charts together give one false alarm in `arl` samples (`tta.monitor.calibration`). Samples are judged one by one,
also inside a batch.

Source: Lowry et al., A multivariate EWMA control chart, Technometrics 1992; for the histogram, the Pearson
statistic of an EWMA of class indicators as in QT-EWMA (Frittoli et al., 2022), with classes for bins.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

LAMBDAS = (0.3, 0.1, 0.03)
CLASS_LAMBDAS = (0.1, 0.03, 0.01)
QUIET = 0.5  # of the threshold, under which nothing has begun
CHUNK = 64  # samples a batch is cut into, so that the path matrix stays small
TINY = 1e-100  # of a scale, before numbers run out

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

    @cached_property
    def columns(self) -> list[slice]:
        """Columns of each block."""
        return [slice(a, a + n) for a, n in zip(self.starts, self.widths, strict=True)]

    @cached_property
    def averages(self) -> Array:
        """(D, blocks) float32 matrix that takes the mean over each block's features."""
        matrix = np.zeros((self.n_features, len(self.widths)), np.float32)
        for i, columns in enumerate(self.columns):
            matrix[columns, i] = 1 / self.widths[i]
        return matrix

    def squares(self, w: Array) -> Array:
        """Mean square of each block's features: (..., D) to (..., blocks)."""
        means: Array = np.square(w) @ self.averages
        return means


@dataclass(frozen=True)
class Alarm:
    """One chart over its threshold.

    Attributes:
        index: of the first sample over it, within the update.
        lag: samples between the estimated onset (the last time the charts were quiet) and that sample.
        block: of the chart that crossed.
        statistic: the chart's value over its threshold, > 1.
        chart: "mewma", "conformal", or "fingerprint" where a regime was left without either having seen it.
    """

    index: int
    lag: int
    block: str
    statistic: float
    chart: str = "mewma"


class DriftCharts:
    """MEWMA charts of one regime, fed with residuals (`Reference.residuals`). Owned by one thread.

    Args:
        layout: the blocks.
        thresholds: (speeds, blocks) of T²/r.
        mean: (D,) of the regime; charts watch deviations from it.
        scale: (D,) standard deviations of the regime.
    """

    def __init__(
        self, layout: Layout, thresholds: Array, mean: Array | None = None, scale: Array | None = None
    ) -> None:
        self.layout = layout
        self.thresholds = np.asarray(thresholds, np.float64)
        self._averages = layout.averages
        self._shift = None if mean is None else np.asarray(mean, np.float32)
        self._stretch = None if scale is None else (1 / np.asarray(scale)).astype(np.float32)
        self._lambdas = np.array(LAMBDAS, np.float32)[:, None]
        self._paths, self._decay = paths(LAMBDAS)
        # (speeds, blocks): what turns ‖z‖²/r into the chart over its threshold.
        self._gain = (1 / (variances(LAMBDAS)[:, None] * self.thresholds)).astype(np.float32)
        self.reset()

    def reset(self) -> None:
        """Start the charts anew, as if nothing had been seen."""
        self._z = np.zeros((len(LAMBDAS), self.layout.n_features), np.float32)
        self.n_samples = 0
        self._quiet_until = 0  # samples taken when all charts were last quiet
        self._values = np.zeros((len(LAMBDAS), len(self.layout.names)), np.float32)  # charts over thresholds

    @property
    def statistic(self) -> Array:
        """(blocks,) largest over the speeds."""
        largest: Array = self._values.max(axis=0)
        return largest

    @property
    def drift_detected(self) -> bool:
        """Whether a chart is over its threshold now."""
        return bool(self._values.max() > 1.0)

    def update(self, w: Array) -> Alarm | None:
        """Take samples in order and judge after each one.

        Args:
            w: (N, D) residuals, any N.

        Returns:
            The first alarm among these samples, if any.
        """
        w = np.asarray(w, np.float32)
        if self._shift is not None:
            w = w - self._shift
        if self._stretch is not None:
            w = w * self._stretch
        if len(w) == 1:
            return self._step(w[0])
        first: Alarm | None = None
        for start in range(0, len(w), CHUNK):
            alarm = self._judge(self._walk(w[start : start + CHUNK]), start)
            first = first or alarm
        return first

    def _step(self, w: Array) -> Alarm | None:
        """One sample."""
        z = self._z
        z += self._lambdas * (w - z)
        values = (z * z) @ self._averages
        values *= self._gain
        self._values = values
        largest = float(values.max())
        self.n_samples += 1
        if largest < QUIET:
            self._quiet_until = self.n_samples
        if largest <= 1.0:
            return None
        lag = self.n_samples - 1 - self._quiet_until
        return Alarm(0, lag, self.layout.names[int(values.argmax()) % len(self.layout.names)], largest)

    def _walk(self, w: Array) -> Array:
        """Up to `CHUNK` samples at once; (n, blocks) statistics after each."""
        n = len(w)
        z = self._paths[:, :n, :n] @ w  # (speeds, n, D)
        z += self._decay[:, :n, None] * self._z[:, None]
        self._z = z[:, -1].copy()
        values = (z * z) @ self._averages
        values *= self._gain[:, None]
        self._values = values[:, -1]
        worst: Array = values.max(axis=0)
        return worst

    def _judge(self, worst: Array, offset: int) -> Alarm | None:
        """The first of (n, blocks) statistics over 1."""
        before, self.n_samples = self.n_samples, self.n_samples + len(worst)
        largest = worst.max(axis=1)
        if largest.max() <= 1.0:
            quiet = np.flatnonzero(largest < QUIET)
            if len(quiet):
                self._quiet_until = before + int(quiet[-1]) + 1
            return None
        index = int((largest > 1.0).argmax())
        quiet = np.flatnonzero(largest[:index] < QUIET)
        if len(quiet):
            self._quiet_until = before + int(quiet[-1]) + 1
        block = int(worst[index].argmax())
        lag = before + index - self._quiet_until
        return Alarm(offset + index, lag, self.layout.names[block], float(worst[index, block]))

    def state(self) -> dict[str, Array]:
        """What `load_state` needs to go on where this left off."""
        counts = np.array([self.n_samples, self._quiet_until])
        return {"z": self._z.copy(), "counts": counts, "values": self._values.copy()}

    def load_state(self, state: dict[str, Array]) -> None:
        """Go on from `state()` of charts with the same layout."""
        self._z = np.array(state["z"], np.float32)
        self.n_samples, self._quiet_until = (int(n) for n in state["counts"])
        self._values = np.array(state["values"], np.float32)


class ClassHistogram:
    """Does the mix of predicted classes differ from the reference's? EWMAs of one-hot predictions.

    The Pearson statistic Σ (z_k - π_k)²/π_k, in units of what chance gives, at three speeds. The features do not
    see a new class mix, and it is no reason to operate; but it is worth a notice, and tells a prior shift from
    the others.

    Args:
        prior: (K,) class frequencies π of the reference's predictions, none of them 0.
        thresholds: (speeds,) of the statistic.
    """

    def __init__(self, prior: Array, thresholds: Array) -> None:
        self.prior = np.asarray(prior, np.float64)
        self.thresholds = np.asarray(thresholds, np.float64)
        self._inverse = 1 / self.prior
        self._lambdas = np.array(CLASS_LAMBDAS)[:, None]
        paths_, decay = paths(CLASS_LAMBDAS)
        self._paths, self._decay = paths_.astype(np.float64), decay.astype(np.float64)
        i, j = np.indices((CHUNK, CHUNK))
        keep = (1 - self._lambdas)[..., None] ** 2
        self._sums = np.where(j <= i, keep ** np.maximum(i - j, 0), 0.0)  # how Σ z²/π adds up
        degrees = max(1, len(self.prior) - 1)
        self._gain = 1 / (variances(CLASS_LAMBDAS) * degrees * self.thresholds)  # (speeds,)
        self.reset()

    def reset(self) -> None:
        """Start anew, from the reference's mix."""
        self._z = np.tile(self.prior, (len(CLASS_LAMBDAS), 1))  # times `_scale`, so that a step touches one class
        self._scale = [1.0] * len(CLASS_LAMBDAS)
        self._sum = [1.0] * len(CLASS_LAMBDAS)  # Σ z²/π
        self.n_samples = 0
        self.statistic = 0.0

    @property
    def drift_detected(self) -> bool:
        """Whether the mix differs now."""
        return self.statistic > 1.0

    def update(self, predictions: Array) -> int | None:
        """Take predicted classes in order.

        Args:
            predictions: (N,) class indices.

        Returns:
            Index of the first sample over the threshold, if any.
        """
        if len(predictions) == 1:
            return self._step(int(predictions[0]))
        first = None
        for start in range(0, len(predictions), CHUNK):
            index = self._walk(predictions[start : start + CHUNK])
            if index is not None and first is None:
                first = start + index
        return first

    def _step(self, c: int) -> int | None:
        """One sample."""
        inverse, largest = float(self._inverse[c]), 0.0
        for i, lam in enumerate(CLASS_LAMBDAS):
            keep = 1 - lam
            there = float(self._z[i, c]) * self._scale[i]
            self._sum[i] = keep * keep * self._sum[i] + (2 * lam * keep * there + lam * lam) * inverse
            self._scale[i] *= keep
            self._z[i, c] = (keep * there + lam) / self._scale[i]
            largest = max(largest, (self._sum[i] - 1) * float(self._gain[i]))
            if self._scale[i] < TINY:
                self._settle()
        self.statistic = largest
        self.n_samples += 1
        return 0 if largest > 1.0 else None

    def _settle(self) -> None:
        """Put the scale back into z, and take the sum anew so that rounding cannot add up."""
        self._z *= np.array(self._scale)[:, None]
        self._scale = [1.0] * len(CLASS_LAMBDAS)
        self._sum = (np.square(self._z) @ self._inverse).tolist()

    def _walk(self, c: Array) -> int | None:
        """Up to `CHUNK` samples at once, at a cost that hardly grows with the number of classes."""
        self._settle()
        n = len(c)
        decay, inverse = self._decay[:, :n], self._inverse[c]
        # Σ z²/π after each sample follows from the z of its class before it, term by term.
        before = self._z[:, c]
        before[:, 1:] *= decay[:, :-1]
        many = len(self.prior) > CHUNK
        present, place = np.unique(c, return_inverse=True) if many else (np.arange(len(self.prior)), c)
        one_hot = np.zeros((n, len(present)))
        one_hot[np.arange(n), place] = 1.0
        added = self._paths[:, :n, :n] @ one_hot  # (speeds, n, present) to z after each sample
        before[:, 1:] += added[:, np.arange(n - 1), place[1:]]
        keep = 1 - self._lambdas
        gained = (2 * self._lambdas * keep * before + self._lambdas**2) * inverse  # (speeds, n)
        sums = decay**2 * np.array(self._sum)[:, None] + (self._sums[:, :n, :n] @ gained[..., None])[..., 0]
        largest = ((sums - 1) * self._gain[:, None]).max(axis=0)
        self._z *= decay[:, -1:]
        self._z[:, present] += added[:, -1]
        self._sum = sums[:, -1].tolist()
        self.n_samples += n
        self.statistic = float(largest[-1])
        return int((largest > 1.0).argmax()) if largest.max() > 1.0 else None

    def state(self) -> dict[str, Array]:
        """What `load_state` needs to go on where this left off."""
        self._settle()
        return {
            "z": self._z.copy(),
            "counts": np.array([self.n_samples]),
            "statistic": np.array([self.statistic]),
        }

    def load_state(self, state: dict[str, Array]) -> None:
        """Go on from `state()`."""
        self._z = np.array(state["z"], np.float64)
        self._settle()
        self.n_samples, self.statistic = int(state["counts"][0]), float(state["statistic"][0])


def variances(lambdas: tuple[float, ...]) -> Array:
    """(speeds,): variance that an EWMA of unit noise settles at."""
    lam = np.array(lambdas)
    result: Array = lam / (2 - lam)
    return result


def paths(lambdas: tuple[float, ...]) -> tuple[Array, Array]:
    """How i steps of an EWMA weigh samples 0..i, (speeds, CHUNK, CHUNK), and what was before, (speeds, CHUNK)."""
    i, j = np.indices((CHUNK, CHUNK))
    lam = np.array(lambdas)[:, None, None]
    weights = np.where(j <= i, lam * (1 - lam) ** np.maximum(i - j, 0), 0.0)
    decay = (1 - lam[..., 0]) ** np.arange(1, CHUNK + 1)
    return weights.astype(np.float32), decay.astype(np.float32)
