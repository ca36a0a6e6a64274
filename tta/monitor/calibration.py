"""Thresholds for a wanted average run length, from held-out reference data, in seconds.

Streams are bootstrapped from held-out samples, four in five under the reference's class mix and the others under
a Dirichlet prior each, so that a new class mix is not mistaken for a shift. In sticky traffic a sample repeats the
one before; in traffic that comes by class, another set of streams has runs of one class. Each chart's threshold is
the exp(-T/arl) quantile of its maximum over T samples; one common factor then makes all charts together meet
`arl`, in either set. The histogram of classes is calibrated on the reference's own mix only: to it, another mix is
what it looks for.

A finite reference knows neither its own tails nor its class centroids: from another draw, the thresholds would
be a factor off. The outer bootstrap redraws the held-out set, moves the centroids and calibrates as that redraw
would have it, and asks which factor would have made it good for the original; the 90 % quantile of that factor is
applied (the idea of spcadjust, Gandy and Kvaløy 2013).
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from tta.errors import InputError
from tta.monitor.charts import CLASS_LAMBDAS, LAMBDAS, Array, Layout, variances
from tta.monitor.reference import MAX_HELD_OUT, MIN_REFERENCE, Reference, class_means
from tta.monitor.stickiness import Stickiness

N_STREAMS = 800
SKEWED = 0.2  # of the streams have a class mix of their own
N_OUTER = 16  # redraws of the held-out set
N_OUTER_STREAMS = 160
N_RUN_STREAMS = 100  # a redraw, where traffic comes by class
CONFIDENCE = 0.9  # that the run length is at least `arl`, over draws of the reference
CONFORMAL_SHARE = 0.1  # of all false alarms, left to the conformal detector


@dataclass(frozen=True)
class Calibration:
    """Result of `calibrate`.

    Attributes:
        thresholds: (speeds, blocks) of T²/r.
        class_thresholds: (speeds,) of the class histogram.
        arl: wanted samples between two false alarms.
        realised: the same, estimated on other bootstrap streams of the held-out set.
        margin: common factor on the thresholds that the outer bootstrap asked for, at least 1.
        stickiness: of the traffic it is for.
    """

    thresholds: Array
    class_thresholds: Array
    arl: float
    realised: float
    margin: float
    stickiness: Stickiness

    def arrays(self) -> dict[str, Array]:
        """For a file; see `load`."""
        numbers = [self.arl, self.realised, self.margin, self.stickiness.repeat, self.stickiness.class_run]
        return {
            "thresholds": self.thresholds,
            "class_thresholds": self.class_thresholds,
            "calibration": np.array(numbers, np.float64),
        }

    @classmethod
    def load(cls, arrays: Mapping[str, Array]) -> "Calibration":
        """From `arrays`."""
        arl, realised, margin, repeat, class_run = (float(v) for v in arrays["calibration"])
        stickiness = Stickiness(repeat, int(class_run))
        return cls(arrays["thresholds"], arrays["class_thresholds"], arl, realised, margin, stickiness)

    @property
    def conformal_arl(self) -> float:
        """Samples between two false alarms of the conformal detector."""
        return self.arl / CONFORMAL_SHARE


def reference_warning(n_samples: int, arl: float) -> str:
    """What to say of a reference too small for a run length: its tails must have been seen. "" if it will do."""
    wanted = int(min(MAX_HELD_OUT, max(500, arl / 20)))
    if n_samples >= wanted:
        return ""
    return (
        f"{n_samples} reference images are few for one false alarm in {arl:,.0f} samples: the real rate may be "
        f"several times higher or lower; give at least {wanted} images, or a smaller arl"
    )


def calibrate(
    reference: Reference, arl: float, stickiness: Stickiness | None = None, seed: int = 0
) -> Calibration:
    """Find thresholds that give one false alarm in `arl` samples over all charts together.

    Args:
        reference: whose held-out residuals are resampled.
        arl: samples, at least 100.
        stickiness: of the traffic; independent samples by default.
        seed: of the bootstrap.

    Raises:
        InputError: fewer than 100 held-out samples, or `arl` too small to calibrate.
    """
    w, predictions = reference.w, reference.predictions
    stickiness = stickiness or Stickiness()
    if len(w) < MIN_REFERENCE:
        raise InputError(f"{len(w)} held-out reference samples: at least {MIN_REFERENCE} are needed to calibrate")
    if arl < 100:
        raise InputError(f"arl {arl:g} is less than 100 samples: nothing can be watched at that rate of alarms")
    share = arl / (1 - CONFORMAL_SHARE)  # the charts' own run length
    # Long enough for some runs, of copies or of a class, to fall within it.
    runs = 4 * max(stickiness.class_run, 1 / (1 - stickiness.repeat))
    horizon = int(min(max(share / 16, runs, 50), share, 2000))
    quantile = float(np.exp(-horizon / share))
    rng = np.random.default_rng(seed)

    def peaks(w: Array, rows: Array, n_streams: int, in_runs: bool = False) -> tuple[Array, Array]:
        mixed = Stickiness(stickiness.repeat, stickiness.class_run if in_runs else 1)
        return _peaks(reference, w, rows, Bootstrap(predictions[rows], n_streams, mixed, rng), horizon)

    everything = np.arange(len(w))
    thresholds, class_thresholds = _joint(*peaks(w, everything, N_STREAMS), quantile)

    def redrawn() -> tuple[Array, Array]:
        rows = rng.choice(everything, len(w))
        return rows, w - class_means(w[rows], predictions[rows], len(reference.prior))[predictions]

    if stickiness.class_run > 1:
        # A run of one class shows how far off its centroid is: streams of one redraw about centroids of another.
        factors = []
        for _ in range(N_STREAMS // N_RUN_STREAMS):
            in_runs = peaks(redrawn()[1], redrawn()[0], N_RUN_STREAMS, in_runs=True)
            factors.append(np.quantile(_largest(*in_runs, thresholds, class_thresholds), quantile))
        thresholds = thresholds * max(1.0, float(np.quantile(factors, CONFIDENCE)))

    factors = []
    for _ in range(N_OUTER):
        rows, moved = redrawn()
        theirs, own = (
            np.quantile(_largest(*peaks(moved, r, N_OUTER_STREAMS), thresholds, class_thresholds), quantile)
            for r in (rows, everything)
        )
        factors.append(own / theirs)
    margin = float(max(1.0, np.quantile(factors, CONFIDENCE)))
    thresholds, class_thresholds = thresholds * margin, class_thresholds * margin

    fresh = peaks(w, everything, N_STREAMS)
    alarms = int((_largest(*fresh, thresholds, class_thresholds) > 1).sum())
    # Exponential run lengths, censored at the horizon: exposure per alarm, half an alarm for none.
    charts = -horizon / np.log(1 - max(alarms, 0.5) / N_STREAMS)
    realised = 1 / (1 / charts + CONFORMAL_SHARE / arl)
    return Calibration(thresholds, class_thresholds, arl, float(realised), margin, stickiness)


def _joint(blocks: Array, classes: Array, quantile: float) -> tuple[Array, Array]:
    """Thresholds of each chart, times the factor that makes all together keep the quantile."""
    thresholds = np.quantile(blocks, quantile, axis=0)
    class_thresholds = np.nanquantile(classes, quantile, axis=0)
    factor = np.quantile(_largest(blocks, classes, thresholds, class_thresholds), quantile)
    return thresholds * factor, class_thresholds * factor


def _largest(blocks: Array, classes: Array, thresholds: Array, class_thresholds: Array) -> Array:
    """(streams,) largest chart of each over its threshold."""
    features = (blocks / thresholds).max(axis=(1, 2))
    largest: Array = np.fmax(features, (classes / class_thresholds).max(axis=1))
    return largest


def _peaks(
    reference: Reference, w: Array, rows: Array, bootstrap: "Bootstrap", horizon: int
) -> tuple[Array, Array]:
    """Largest value of every chart over one horizon, for each bootstrap stream.

    Returns:
        (streams, speeds, blocks) of T²/r, and (streams, speeds) of the class histogram, NaN under another mix.
    """
    layout: Layout = reference.layout
    w, predictions = w.astype(np.float32), reference.predictions
    n = bootstrap.n_streams
    averages = layout.averages
    inverse = 1 / reference.prior
    lam = np.array(LAMBDAS, np.float32)[:, None, None]
    z = np.zeros((len(LAMBDAS), n, layout.n_features), np.float32)
    shares = np.tile(reference.prior, (len(CLASS_LAMBDAS), bootstrap.n_natural, 1))
    class_lam = np.array(CLASS_LAMBDAS)[:, None]
    pearson = np.square(shares) @ inverse  # (speeds, natural streams)
    work = np.empty_like(z)
    peaks = np.zeros((len(LAMBDAS), n, len(layout.names)), np.float32)
    values = np.empty_like(peaks)
    class_peaks = np.zeros((len(CLASS_LAMBDAS), bootstrap.n_natural))
    gain = (1 / variances(LAMBDAS)).astype(np.float32)
    class_gain = 1 / (variances(CLASS_LAMBDAS) * max(1, len(reference.prior) - 1))
    streams = np.arange(bootstrap.n_natural)
    scale = np.ones((len(CLASS_LAMBDAS), 1))  # of `shares`, so that a step touches one class only
    for _ in range(horizon):
        index = rows[bootstrap.next()]
        np.subtract(w[index], z, out=work)
        work *= lam
        z += work
        np.multiply(z, z, out=work)
        np.matmul(work, averages, out=values)
        values *= gain[:, None, None]
        np.maximum(peaks, values, out=peaks)
        # Σ z²/π after z ← (1-λ)·z + λ·e_c.
        c = predictions[index[: bootstrap.n_natural]]
        there = shares[:, streams, c] * scale
        keep = 1 - class_lam
        pearson = keep**2 * pearson + (2 * class_lam * keep * there + class_lam**2) * inverse[c]
        scale *= keep
        shares[:, streams, c] += class_lam / scale
        np.maximum(class_peaks, (pearson - 1) * class_gain[:, None], out=class_peaks)
    classes = np.full((n, len(CLASS_LAMBDAS)), np.nan)
    classes[: bootstrap.n_natural] = class_peaks.T
    return peaks.transpose(1, 0, 2).astype(np.float64), classes


class Bootstrap:
    """Indices of many streams at once: the first under the natural class mix, the last skewed.

    With class runs every stream comes in runs of one class, and none is natural.
    """

    def __init__(
        self, predictions: Array, n_streams: int, stickiness: Stickiness, rng: np.random.Generator
    ) -> None:
        self.n_streams = n_streams
        n_like = n_streams - round(SKEWED * n_streams)
        self.n_natural = n_like if stickiness.class_run <= 1 else 0
        self._rng = rng
        self._repeat = stickiness.repeat
        self._stay = 1 - 1 / stickiness.class_run
        self._order = np.argsort(predictions, kind="stable")
        classes, self._first, self._count = np.unique(
            predictions[self._order], return_index=True, return_counts=True
        )
        prior = np.tile(self._count / self._count.sum(), (n_streams, 1))
        prior[n_like:] = rng.dirichlet(np.full(len(classes), 0.5), n_streams - n_like)
        self._cumulative = prior.cumsum(axis=1)
        self._cumulative[:, -1] = 1.0
        self._class = self._draw_class()
        self._index = self._draw()

    def _draw_class(self) -> Array:
        u = self._rng.random((self.n_streams, 1))
        drawn: Array = (u > self._cumulative).sum(axis=1)
        return drawn

    def _draw(self) -> Array:
        within = (self._rng.random(self.n_streams) * self._count[self._class]).astype(np.int64)
        drawn: Array = self._order[self._first[self._class] + within]
        return drawn

    def next(self) -> Array:
        """(n_streams,) index of each stream's next sample."""
        again = self._rng.random(self.n_streams) < self._repeat
        stay = again | (self._rng.random(self.n_streams) < self._stay) if self._stay else again
        self._class = np.where(stay, self._class, self._draw_class())
        self._index = np.where(again, self._index, self._draw())
        return self._index
