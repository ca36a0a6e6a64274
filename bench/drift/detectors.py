"""Detectors over many streams at once: ours, and re-implementations of the peers'.

A stream is rows of a table of all samples that may occur (clean pool, then shifted pool). Each detector turns
(streams, n) rows into (streams, n) statistics; it alarms where the statistic exceeds a threshold. `test_detectors`
holds MMD to alibi-detect's and ours to `tta.monitor.charts`.
"""

from collections.abc import Callable

import numpy as np

from bench.drift.data import Array, Draw
from tta.monitor.calibration import Calibration
from tta.monitor.charts import LAMBDAS, variances

Statistic = Callable[[Array], Array]


def ours(draw: Draw, calibration: Calibration, table: Array) -> Statistic:
    """MEWMA over all blocks and speeds, over its thresholds; as `DriftCharts`."""
    lam = np.array(LAMBDAS, np.float32)[:, None, None]
    gain = (1 / (variances(LAMBDAS)[:, None] * calibration.thresholds)).astype(np.float32)[:, None]
    averages = draw.layout.averages

    def run(rows: Array) -> Array:
        z = np.zeros((len(LAMBDAS), len(rows), table.shape[1]), np.float32)
        out = np.empty(rows.shape, np.float32)
        for t in range(rows.shape[1]):
            z += lam * (table[rows[:, t]] - z)
            values = ((z * z) @ averages) * gain
            out[:, t] = values.max(axis=(0, 2))
        return out

    return run


def gaussian_kernel(a: Array, b: Array, sigma: float) -> Array:
    """(len(a), len(b)) exp(-‖a - b‖²/(2σ²)) in float32."""
    a, b = a.astype(np.float32), b.astype(np.float32)
    squares = np.square(a).sum(1)[:, None] + np.square(b).sum(1) - 2 * a @ b.T
    kernel: Array = np.exp(np.maximum(squares, 0) / (-2 * sigma**2))
    return kernel


def median_sigma(reference: Array, rng: np.random.Generator) -> float:
    """The median heuristic, on a thousand samples: half the median squared distance is σ²."""
    sample = reference[rng.permutation(len(reference))[:1000]].astype(np.float64)
    squares = np.square(sample).sum(1)[:, None] + np.square(sample).sum(1) - 2 * sample @ sample.T
    return float(np.sqrt(np.median(squares[np.triu_indices(len(sample), 1)]) / 2))


def mmd(reference: Array, window: int, table: Array, sigma: float) -> Statistic:
    """Unbiased MMD² of the last `window` samples against the reference (Gretton et al. 2012)."""
    n = len(reference)
    within = gaussian_kernel(reference, reference, sigma)
    constant = (within.sum() - n) / (n * (n - 1))
    to_reference = np.concatenate(
        [gaussian_kernel(part, reference, sigma).mean(axis=1) for part in np.array_split(table, 8)]
    )
    kernel = gaussian_kernel(table, table, sigma)

    def run(rows: Array) -> Array:
        out = np.full(rows.shape, -np.inf, np.float32)
        pairs = np.zeros(len(rows))  # Σ over pairs i ≠ j in the window
        cross = np.zeros(len(rows))
        for t in range(rows.shape[1]):
            new = rows[:, t]
            recent = rows[:, max(0, t - window + 1) : t]
            pairs += 2 * kernel[new[:, None], recent].sum(axis=1)
            cross += to_reference[new]
            if t >= window:
                old = rows[:, t - window]
                pairs -= 2 * kernel[old[:, None], recent].sum(axis=1)
                cross -= to_reference[old]
            if t >= window - 1:
                out[:, t] = constant + pairs / (window * (window - 1)) - 2 * cross / window
        return out

    return run


def qt_ewma(
    reference: Array, table: Array, rng: np.random.Generator, n_bins: int = 32, lam: float = 0.03
) -> Statistic:
    """QuantTree histogram, EWMA of its bins, Pearson statistic (Frittoli et al. 2022), written from the paper."""
    left, bins = np.arange(len(reference)), np.full(len(table), n_bins - 1)
    free = np.arange(len(table))
    for k in range(n_bins - 1):
        dimension = rng.integers(reference.shape[1])
        values = np.sort(reference[left, dimension])
        take = round(len(left) / (n_bins - k))
        if rng.random() < 0.5:
            cut = values[take - 1]
            inside, ours_ = reference[left, dimension] <= cut, table[free, dimension] <= cut
        else:
            cut = values[-take]
            inside, ours_ = reference[left, dimension] >= cut, table[free, dimension] >= cut
        bins[free[ours_]] = k
        left, free = left[~inside], free[~ours_]

    def run(rows: Array) -> Array:
        streams = np.arange(len(rows))
        z = np.full((len(rows), n_bins), 1 / n_bins)
        out = np.empty(rows.shape, np.float32)
        for t in range(rows.shape[1]):
            z *= 1 - lam
            z[streams, bins[rows[:, t]]] += lam
            variance = lam / (2 - lam) * (1 - (1 - lam) ** (2 * (t + 1)))
            out[:, t] = (np.square(z - 1 / n_bins).sum(axis=1) * n_bins) / variance
        return out

    return run


def ewma_entropy(reference: Array, table: Array, lam: float = 0.03) -> Statistic:
    """EWMA of the entropy's rank in the reference, either way from a half."""
    ranks = np.searchsorted(np.sort(reference), table) / len(reference) - 0.5

    def run(rows: Array) -> Array:
        z = np.zeros(len(rows))
        out = np.empty(rows.shape, np.float32)
        for t in range(rows.shape[1]):
            z += lam * (ranks[rows[:, t]] - z)
            out[:, t] = np.abs(z) / np.sqrt(lam / (2 - lam) * (1 - (1 - lam) ** (2 * (t + 1))))
        return out

    return run


def run_lengths(statistics: Array, threshold: float) -> tuple[Array, Array]:
    """First sample over the threshold in each stream, 1-based, and whether there was one; else the length."""
    over = statistics > threshold
    alarmed = over.any(axis=1)
    return np.where(alarmed, over.argmax(axis=1) + 1, statistics.shape[1]), alarmed


def realised(statistics: Array, threshold: float) -> tuple[float, float, float]:
    """Run length of censored geometric runs and its 95 % interval (exact, from the Poisson count of alarms)."""
    from scipy.stats import chi2

    lengths, alarmed = run_lengths(statistics, threshold)
    exposure, k = float(lengths.sum()), int(alarmed.sum())
    low = 2 * exposure / chi2.ppf(0.975, 2 * k + 2)
    high = 2 * exposure / chi2.ppf(0.025, 2 * k) if k else float("inf")
    return exposure / max(k, 1), float(low), float(high)


def threshold_for(statistics: Array, arl: float) -> float:
    """The threshold at which null streams realise a run length: bisection on their running maxima."""
    candidates = np.unique(np.maximum.accumulate(statistics, axis=1)[:, -1])
    values = np.unique(np.quantile(statistics[np.isfinite(statistics)], np.linspace(0.9, 1, 2000)))
    values = np.unique(np.concatenate([values, candidates]))
    low, high = 0, len(values) - 1
    while low < high:
        middle = (low + high) // 2
        if realised(statistics, values[middle])[0] < arl:
            low = middle + 1
        else:
            high = middle
    return float(values[low])
