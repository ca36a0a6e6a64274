"""Thresholds for a wanted average run length, from held-out reference data, in seconds.

Streams are bootstrapped from held-out samples under three class mixes: as the reference, a Dirichlet prior a
stream, and runs of one class; so neither a new class mix nor sorted traffic is mistaken for a shift. Each
chart's threshold is the exp(-T/arl) quantile of its maximum over T samples; one common factor then makes all
charts together meet `arl`.

Measured on other data: realised run lengths lie within a factor of two of the target for one draw of the
reference, which is what a reference of a few thousand samples can promise.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tta.errors import InputError
from tta.monitor.charts import LAMBDAS, Array, Layout

N_STREAMS = 900  # a third under each class mix
MEAN_CLASS_RUN = 20
MIN_REFERENCE = 100


@dataclass(frozen=True)
class Calibration:
    """Result of `calibrate`.

    Attributes:
        thresholds: (speeds, blocks) of T²/r.
        arl: wanted samples between two false alarms.
        realised: the same, estimated on other bootstrap streams.
    """

    thresholds: Array
    arl: float
    realised: float


def calibrate(
    w: Array,
    predictions: Array,
    layout: Layout,
    arl: float,
    lambdas: Sequence[float] = LAMBDAS,
    seed: int = 0,
) -> Calibration:
    """Find thresholds that give one false alarm in `arl` samples over all charts together.

    Args:
        w: (N, D) class-centred features of held-out reference data.
        predictions: (N,) predicted classes of the same.
        layout: the blocks.
        arl: samples, at least 100.
        lambdas: speeds of the charts.
        seed: of the bootstrap.

    Raises:
        InputError: fewer than 100 samples, or `arl` too small to calibrate.
    """
    if len(w) < MIN_REFERENCE:
        raise InputError(f"{len(w)} held-out reference samples: at least {MIN_REFERENCE} are needed to calibrate")
    if arl < 100:
        raise InputError(f"arl {arl:g} is less than 100 samples: nothing can be watched at that rate of alarms")
    horizon = int(np.clip(arl / 16, 50, 2000))
    quantile = float(np.exp(-horizon / arl))
    rng = np.random.default_rng(seed)
    peaks = _peaks(w, predictions, layout, lambdas, horizon, rng)  # (streams, speeds, blocks)
    thresholds = np.quantile(peaks, quantile, axis=0)
    thresholds *= np.quantile((peaks / thresholds).max(axis=(1, 2)), quantile)
    fresh = _peaks(w, predictions, layout, lambdas, horizon, rng)
    alarms = int(((fresh / thresholds).max(axis=(1, 2)) > 1).sum())
    # Exponential run lengths, censored at the horizon: exposure per alarm, half an alarm for none.
    survived = 1 - max(alarms, 0.5) / N_STREAMS
    return Calibration(thresholds, arl, float(-horizon / np.log(survived)))


def _peaks(
    w: Array,
    predictions: Array,
    layout: Layout,
    lambdas: Sequence[float],
    horizon: int,
    rng: np.random.Generator,
) -> Array:
    """Largest T²/r of every chart over one horizon, for each bootstrap stream."""
    w = w.astype(np.float32)
    draw = ClassMix(predictions, N_STREAMS, rng)
    z = np.zeros((len(lambdas), N_STREAMS, w.shape[1]), np.float32)
    lam = np.asarray(lambdas, np.float32)[:, None, None]
    peaks = np.zeros((N_STREAMS, len(lambdas), len(layout.names)))
    for t in range(1, horizon + 1):
        z += lam * (w[draw.next()] - z)
        variance = lam / (2 - lam) * (1 - (1 - lam) ** (2 * t))
        np.maximum(peaks, (layout.squares(z) / variance).transpose(1, 0, 2), out=peaks)
    return peaks


class ClassMix:
    """Bootstrap indices for many streams at once, a third of them under each class mix."""

    def __init__(self, predictions: Array, n_streams: int, rng: np.random.Generator) -> None:
        self._rng = rng
        self._order = np.argsort(predictions, kind="stable")
        classes, self._first, self._count = np.unique(
            predictions[self._order], return_index=True, return_counts=True
        )
        k = len(classes)
        natural = np.tile(self._count / self._count.sum(), (n_streams, 1))
        skewed = rng.dirichlet(np.full(k, 0.5), n_streams)
        third = n_streams // 3
        prior = np.where(np.arange(n_streams)[:, None] < third, skewed, natural)
        self._cumulative = prior.cumsum(axis=1)
        self._cumulative[:, -1] = 1.0
        self._runs = (np.arange(n_streams) >= third) & (np.arange(n_streams) < 2 * third)
        self._class = self._draw_class()

    def _draw_class(self) -> Array:
        u = self._rng.random((len(self._cumulative), 1))
        drawn: Array = (u > self._cumulative).sum(axis=1)
        return drawn

    def next(self) -> Array:
        """(n_streams,) index of each stream's next sample."""
        stay = self._runs & (self._rng.random(len(self._runs)) > 1 / MEAN_CLASS_RUN)
        self._class = np.where(stay, self._class, self._draw_class())
        within = (self._rng.random(len(self._runs)) * self._count[self._class]).astype(np.int64)
        return self._order[self._first[self._class] + within]  # type: ignore[no-any-return]
