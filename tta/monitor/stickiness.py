"""How far traffic is from independent samples: near-copies in a row (video), and runs of one class.

A mean over n sticky samples varies as one over fewer of them, so charts calibrated on independent samples raise
false alarms on video within a few frames. The thresholds are therefore calibrated for a stated stickiness, and
it is measured on the traffic itself.
"""

from dataclasses import dataclass

import numpy as np

from tta.monitor.charts import Array

REPEATS = (0.0, 0.15, 0.3, 0.5, 0.65, 0.8, 0.9, 0.95)  # thresholds are calibrated for these
CLASS_RUNS = (1, 5, 20, 50, 100, 200)  # 1: not by class
TOLERANCE = 0.05  # by which traffic may be stickier than its thresholds
LAGS = 16
FAR = 64  # samples apart that no longer know of each other
SEGMENT = 128  # samples; a longer window is cut into such, so that a shift within it spoils one only
NOISE = 0.1  # correlation under which a lag counts as none
MIN_SAMPLES = 6
MIN_CUT = 24  # samples; in fewer, runs of copies cannot be told from a change
MIN_PART = 4  # samples on either side of a change
CUT_BIAS = 4.0  # slow traffic is taken for a change in part: measured repeat is low by this over n
COPIES = 0.15  # of the distances of neighbours the 20 % quantile over the 95 % one, under which some are copies
MIN_CLASS_SAMPLES = 64
ORDERS = 24  # that samples are put into by chance, to see what chance makes of them
STILL = 0.01  # of what independent samples of the reference differ, under which all are copies of one


@dataclass(frozen=True)
class Stickiness:
    """What thresholds are calibrated for.

    Attributes:
        repeat: probability that a sample repeats the one before, in [0, 1); mean run of copies 1/(1 - repeat).
        class_run: mean length of runs of one predicted class, in samples, in traffic that comes by class.
    """

    repeat: float = 0.0
    class_run: int = CLASS_RUNS[0]

    def covers(self, other: "Stickiness") -> bool:
        """Whether thresholds for this will do for traffic like `other`."""
        return other.repeat <= self.repeat and other.class_run <= self.class_run

    @property
    def inflation(self) -> float:
        """Variance of a mean over many such samples, in units of independent ones: (1 + ρ)/(1 - ρ)."""
        return (1 + self.repeat) / (1 - self.repeat)


def measure(w: Array, predictions: Array, orders: int = ORDERS) -> tuple[float, float]:
    """Repeat and mean class run of samples in order.

    Near samples are compared with samples far apart, not with the reference: a shift leaves the result as it is.
    Copies some samples apart (cameras in turn) count as much as neighbours.

    Args:
        w: (N, D) residuals.
        predictions: (N,) predicted classes.
        orders: other orders of the samples, in none of which they may seem as sticky; for 0 that may be chance.

    Returns:
        (repeat in [0, 1), mean class run in samples); (0, 1) for fewer than 6 samples.
    """
    n = len(w)
    if n < MIN_SAMPLES:
        return 0.0, 1.0
    if n > SEGMENT:
        # As precise as is needed, at a fifth of the cost.
        w = np.ascontiguousarray(w[:, :: max(1, w.shape[1] // LAGS)])
    segments = [w[i : i + SEGMENT] for i in range(0, max(1, n - SEGMENT + 1), SEGMENT)]
    return float(np.median([_repeat(segment, orders) for segment in segments])), class_run(predictions)


def _repeat(w: Array, orders: int) -> float:
    """Of one segment; see `measure`."""
    found = _repeat_by_order(w)
    if TOLERANCE < found < 1:
        rng = np.random.default_rng(len(w))
        others = (_repeat_by_order(rng.permutation(w)) for _ in range(orders))
        found = 0.0 if any(other >= found for other in others) else found
    return found


def _repeat_by_order(w: Array) -> float:
    """As it seems; of few samples, or of features that are much alike, it is often chance."""
    n = len(w)
    copies = _share_of_copies(w) if n >= MIN_CUT else None
    if n >= MIN_CUT and copies is None:
        w = _without_change(w)
    lags, far = min(LAGS, n // 4), min(FAR, n // 2)
    apart = float(np.mean([_apart(w, far + extra) for extra in range(0, min(FAR, n // 4), FAR // 4)]))
    if apart <= 2 * STILL:  # two whitened samples differ by 2; copies by rounding, which is no pattern
        return 1.0
    correlation = [1 - _apart(w, lag) / apart for lag in range(1, lags + 1)]
    # One lag suffices where near-copies are neighbours; the sum over lags also sees cameras that take turns.
    total = 1 + 2 * sum(c for c in correlation if c > NOISE)
    repeat = max(correlation[0], (total - 1) / (total + 1))
    if copies is not None:
        repeat = min(repeat, copies)  # of the two only copies raise both: spread that differs is neither
    elif n >= MIN_CUT and repeat > NOISE:
        repeat += CUT_BIAS / n
    return float(np.clip(repeat, 0.0, 1.0))


def _share_of_copies(w: Array) -> float | None:
    """How many neighbours are copies, where some are much nearer than others; a change leaves all alike."""
    distances = np.square(w[1:] - w[:-1]).sum(axis=1)
    low, high = np.quantile(distances, (0.2, 0.95))
    return float((distances <= 2 * COPIES * high).mean()) if low <= COPIES * high else None


def _without_change(w: Array) -> Array:
    """Less the means before and after the cut that explains most.

    Across a change far samples differ more than near ones, as copies would make them: unless its place is known, a
    shift within the samples would pass for stickiness.
    """
    n = len(w)
    total = np.cumsum(w, axis=0)
    cuts = np.arange(MIN_PART, n - MIN_PART + 1)
    before = total[cuts - 1] / cuts[:, None]
    after = (total[-1] - total[cuts - 1]) / (n - cuts)[:, None]
    explained = cuts * (n - cuts) * np.square(before - after).sum(axis=1)
    best = int(explained.argmax())
    cut = int(cuts[best])
    return np.concatenate([w[:cut] - before[best], w[cut:] - after[best]])


def _apart(w: Array, lag: int) -> float:
    """Mean squared difference of samples `lag` apart."""
    apart = (w[lag:] - w[:-lag]).ravel()
    return float(apart @ apart) / len(apart)


def class_run(predictions: Array, least: int = MIN_CLASS_SAMPLES) -> float:
    """Mean length of runs of one class beyond those that chance makes.

    Args:
        predictions: (N,) classes in order.
        least: samples to say anything but 1 of.
    """
    if len(predictions) < least:
        return 1.0
    shares = np.bincount(predictions) / len(predictions)
    by_chance = float(np.square(shares).sum())
    same = float((predictions[1:] == predictions[:-1]).mean())
    stay = (same - by_chance) / (1 - by_chance) if by_chance < 1 else 1.0
    return float(1 / max(1 / len(predictions), 1 - stay)) if stay > 0 else 1.0


def nearest(repeat: float, run: float) -> Stickiness:
    """The smallest of the calibrated steps that covers a repeat and a class run, within `TOLERANCE`."""
    repeats = [r for r in REPEATS if r >= repeat - TOLERANCE]
    runs = [r for r in CLASS_RUNS if r >= run / 1.5]
    return Stickiness(repeats[0] if repeats else REPEATS[-1], runs[0] if runs else CLASS_RUNS[-1])
