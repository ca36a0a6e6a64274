"""What the monitor knows of the reference data, and how a sample differs from it.

A residual w is a sample's whitened features minus the centroid of its predicted class, whitened again by that
class's own covariance where the reference had enough samples of it. So a new class mix moves w little, and a
shift moves it as far as it ever did.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace

import numpy as np

from tta.errors import InputError
from tta.monitor.charts import Array, Layout

CLIP = 8.0  # standard deviations: one broken image cannot alarm alone
MIN_CLASS_SAMPLES = 100  # of a class, to whiten it by its own covariance
SHRINK_SAMPLES = 20  # samples' worth of pull of a class centroid towards the common mean
FOLDS = 4
MIN_REFERENCE = 100
MAX_HELD_OUT = 4000  # samples kept in a bundle
SHRINK_RANKS = 4  # a class of n samples gets weight n / (n + 4·r) in its own covariance, the pool the rest


@dataclass(frozen=True, eq=False)
class Reference:
    """Reference data as the source model sees it; immutable.

    Attributes:
        layout: the blocks.
        centroids: (K, D) mean whitened features of each predicted class.
        whitener_of: (K,) row of `whiteners` for each class.
        whiteners: (G, D, D) float32, block-diagonal; row 0 is the identity.
        w: (N, D) held-out residuals.
        predictions: (N,) predicted classes of the same.
        labels: (N,) true classes of the same.
        confidences: (N,) negative entropy of the same, see `confidence`.
        prior: (K,) frequencies of predicted classes, none 0.
    """

    layout: Layout
    centroids: Array
    whitener_of: Array
    whiteners: Array
    w: Array
    predictions: Array
    labels: Array
    confidences: Array
    prior: Array

    @classmethod
    def load(cls, layout: Layout, arrays: Mapping[str, Array]) -> "Reference":
        """From the arrays of `reference.safetensors`."""
        return cls(layout, **{f.name: arrays[f.name] for f in fields(cls) if f.name != "layout"})

    def arrays(self) -> dict[str, Array]:
        """For `reference.safetensors`."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "layout"}

    def residuals(self, features: Array, predictions: Array) -> Array:
        """How samples differ from what is usual for their predicted classes.

        Args:
            features: (N, D) whitened features of the source model.
            predictions: (N,) classes it predicted.

        Returns:
            (N, D) float32, clipped to ±8 standard deviations.

        Raises:
            InputError: features of another length, or not finite.
        """
        d = self.layout.n_features
        if features.ndim != 2 or features.shape[1] != d:
            raise InputError(f"expected features of shape (N, {d}), got {features.shape}")
        centred = features.astype(np.float32, copy=False) - self.centroids[predictions]
        # A sum is finite if every number is; one that overflows is refused as well.
        if not math.isfinite(centred.sum()):
            raise InputError("features hold NaN or infinity")
        if len(self.whiteners) > 1:
            centred = self._whiten(centred, self.whitener_of[predictions])
        np.minimum(centred, CLIP, out=centred)  # np.clip takes three times as long for one sample
        return np.maximum(centred, -CLIP, out=centred)

    def _whiten(self, w: Array, which: Array) -> Array:
        """Each sample by its class's whitener; sorted, so that a class is one product."""
        if len(w) == 1:
            one: Array = w @ self.whiteners[which[0]]
            return one
        order = which.argsort(kind="stable")
        sorted_, out = w[order], np.empty_like(w)
        start = 0
        for group, count in enumerate(np.bincount(which).tolist()):
            if count:
                end = start + count
                np.matmul(sorted_[start:end], self.whiteners[group], out=out[start:end])
                start = end
        sorted_[order] = out
        return sorted_


def fit_whiteners(w: Array, predictions: Array, layout: Layout, n_classes: int) -> tuple[Array, Array]:
    """Whiteners of the classes with enough samples.

    Args:
        w: (N, D) class-centred whitened features, whose pooled covariance is about the identity.
        predictions: (N,) predicted classes.
        layout: the blocks.
        n_classes: K.

    Returns:
        `Reference.whitener_of` and `Reference.whiteners`.
    """
    identity = np.eye(layout.n_features)
    whitener_of, whiteners = np.zeros(n_classes, np.int64), [identity]
    for k in range(n_classes):
        own = w[predictions == k]
        if len(own) < MIN_CLASS_SAMPLES:
            continue
        table = identity.copy()
        for columns, r in zip(layout.columns, layout.widths, strict=True):
            weight = len(own) / (len(own) + SHRINK_RANKS * r)
            covariance = weight * np.cov(own[:, columns], rowvar=False).reshape(r, r) + (1 - weight) * np.eye(r)
            variance, axes = np.linalg.eigh(covariance)
            table[columns, columns] = (axes / np.sqrt(variance)) @ axes.T
        whitener_of[k] = len(whiteners)
        whiteners.append(table)
    return whitener_of, np.stack(whiteners).astype(np.float32)


def confidence(logits: Array) -> Array:
    """Negative entropy of the softmax: (N, K) logits to (N,), at most 0."""
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    log_p = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    negative: Array = (np.exp(log_p) * log_p).sum(axis=1)
    return negative


def fit(
    features: Array, logits: Array, labels: Array, layout: Layout, seed: int = 0, keep: int = MAX_HELD_OUT
) -> Reference:
    """Learn what is usual from reference samples.

    Centroids and class whiteners come from all samples; the residuals that thresholds are calibrated on are
    cross-fitted, each from centroids and whiteners of the other folds: centroids fitted on the calibration data
    halve the run length between false alarms, and half of the data for either doubles its scatter.

    Args:
        features: (N, D) whitened features.
        logits: (N, K) of the source model.
        labels: (N,) true classes.
        layout: the blocks.
        seed: of the folds.
        keep: held-out samples kept at most.

    Raises:
        InputError: features that are not finite, or fewer than `MIN_REFERENCE` samples.
    """
    n, k = logits.shape
    if n < MIN_REFERENCE:
        raise InputError(f"{n} reference samples: at least {MIN_REFERENCE} are needed (2,000 or more are better)")
    if not np.isfinite(features).all():
        raise InputError("reference features hold NaN or infinity")
    predictions = logits.argmax(axis=1)
    prior = (np.bincount(predictions, minlength=k) + 1) / (n + k)
    order = np.random.default_rng(seed).permutation(n)
    w = np.empty((n, layout.n_features), np.float32)
    nothing = np.zeros(0)

    def learned(rows: Array) -> Reference:
        centroids = _centroids(features[rows], predictions[rows], k)
        centred = features[rows] - centroids[predictions[rows]]
        whitener_of, whiteners = fit_whiteners(centred, predictions[rows], layout, k)
        return Reference(layout, centroids, whitener_of, whiteners, nothing, nothing, nothing, nothing, prior)

    for held in np.array_split(order, FOLDS):
        others = np.setdiff1d(order, held)
        w[held] = learned(others).residuals(features[held], predictions[held])
    kept = order[:keep]
    return replace(
        learned(order),
        w=w[kept],
        predictions=predictions[kept].astype(np.int64),
        labels=labels[kept].astype(np.int64),
        confidences=confidence(logits[kept]),
    )


def _centroids(features: Array, predictions: Array, n_classes: int) -> Array:
    """(K, D) float32 class means, shrunk towards the common mean."""
    mean = features.mean(axis=0)
    own = class_means(features - mean, predictions, n_classes, SHRINK_SAMPLES)
    centroids: Array = (mean + own).astype(np.float32)
    return centroids


def class_means(values: Array, predictions: Array, n_classes: int, shrink: int = 0) -> Array:
    """Mean of each class.

    Args:
        values: (N, F).
        predictions: (N,) class of each.
        n_classes: K.
        shrink: samples' worth of pull towards 0.

    Returns:
        (K, F) float64; 0 for a class that is not there.
    """
    sums = np.zeros((n_classes, values.shape[1]))
    np.add.at(sums, predictions, values)
    means: Array = sums / np.maximum(1, np.bincount(predictions, minlength=n_classes) + shrink)[:, None]
    return means
