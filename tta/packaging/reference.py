"""What the monitor must know of the reference data: whitening, centroids, a held-out sample, thresholds.

Half of the reference fits the whitening and the class centroids, the other half calibrates; centroids fitted on
the calibration data halve the run length between false alarms.

Arrays of `reference.safetensors`:

    centroids     (K, D)       mean whitened features of each predicted class
    features      (N, D)       held-out sample, class-centred
    predictions   (N,)         classes the source predicted for it
    labels        (N,)         and the true ones
    thresholds    (L, blocks)  of the charts, see tta.monitor.charts
    realised_arl  (1,)         estimated samples between two false alarms
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from tta.errors import InputError
from tta.monitor.calibration import MIN_REFERENCE, calibrate
from tta.monitor.charts import Layout, centre
from tta.packaging.export import Taps

RANK = 16
SHRINK = 20  # samples' worth of pull of a class centroid towards the common mean
MAX_HELD_OUT = 4000  # samples kept in the bundle
BATCH = 128

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Whitening:
    """Per block: features = raw @ matrix + offset, so that held-in residuals have unit variance."""

    projections: list[tuple[Array, Array]]
    widths: list[int]
    centroids: Array


def raw_features(taps: Taps, x: Array, advance: Callable[[int], None]) -> tuple[Array, list[Array]]:
    """Run the source over images.

    Args:
        taps: the model with its taps.
        x: (N, H, W, C) uint8.
        advance: told how many images were done, for a progress bar.

    Returns:
        Logits (N, K) and, for each block, raw statistics (N, F_b), all float32.
    """
    logits, raw = [], []
    with torch.inference_mode():
        for start in range(0, len(x), BATCH):
            batch = x[start : start + BATCH]
            out, statistics = taps(torch.from_numpy(batch))
            logits.append(out.numpy())
            raw.append([s.numpy() for s in statistics])
            advance(len(batch))
    return np.concatenate(logits), [np.concatenate(block) for block in zip(*raw, strict=True)]


def fit_whitening(raw: list[Array], predictions: Array, n_classes: int) -> Whitening:
    """Fit each block's projection and the class centroids in whitened coordinates.

    Args:
        raw: per block, (N, F_b).
        predictions: (N,) predicted classes.
        n_classes: K; the last block is the logits, whose rank is at most K - 1.
    """
    projections, widths, centroids = [], [], []
    for i, statistics in enumerate(raw):
        values = statistics.astype(np.float64)
        mean, scale = values.mean(axis=0), values.std(axis=0)
        alive = scale > 1e-6 * max(1e-6, float(scale.max()))
        scale = np.where(alive, scale, np.inf)  # a constant channel carries nothing: its column becomes zero
        standard = (values - mean) / scale
        table = _centroids(standard, predictions, n_classes)
        residual = standard - table[predictions]
        variance, axes = np.linalg.eigh(np.cov(residual, rowvar=False).reshape(len(scale), len(scale)))
        order = np.argsort(variance)[::-1]
        most = min(RANK, n_classes - 1 if i == len(raw) - 1 else RANK, len(values) - 1)
        keep = [j for j in order[:most] if variance[j] > 1e-6 * variance[order[0]]]
        matrix = axes[:, keep] / np.sqrt(variance[keep]) / scale[:, None]
        projections.append((matrix, -(mean @ matrix)))
        widths.append(len(keep))
        centroids.append(table[:, alive] @ (matrix[alive] * scale[alive, None]))
    return Whitening(projections, widths, np.concatenate(centroids, axis=1))


def _centroids(values: Array, predictions: Array, n_classes: int) -> Array:
    """(K, F) class means, shrunk towards the common mean, which is 0 for standardised values."""
    sums = np.zeros((n_classes, values.shape[1]))
    np.add.at(sums, predictions, values)
    counts = np.bincount(predictions, minlength=n_classes)[:, None]
    return sums / (counts + SHRINK)


def reference_arrays(
    features: Array,
    predictions: Array,
    labels: Array,
    centroids: Array,
    layout: Layout,
    arl: float,
    seed: int,
) -> dict[str, Array]:
    """Everything for `reference.safetensors`.

    Args:
        features: (N, D) whitened features of held-out reference images.
        predictions: (N,) predicted classes.
        labels: (N,) true classes.
        centroids: (K, D).
        layout: the blocks.
        arl: wanted samples between two false alarms.
        seed: of the bootstrap.

    Raises:
        InputError: too few held-out samples.
    """
    if len(features) < MIN_REFERENCE:
        raise InputError(
            f"{len(features)} held-out reference images are too few to calibrate: "
            f"give at least {2 * MIN_REFERENCE} reference images (2,000 or more are better)"
        )
    w = centre(features, predictions, centroids)
    calibration = calibrate(w, predictions, layout, arl, seed=seed)
    keep = slice(0, MAX_HELD_OUT)
    return {
        "centroids": centroids.astype(np.float32),
        "features": w[keep].astype(np.float32),
        "predictions": predictions[keep].astype(np.int64),
        "labels": labels[keep].astype(np.int64),
        "thresholds": calibration.thresholds.astype(np.float64),
        "realised_arl": np.array([calibration.realised]),
    }
