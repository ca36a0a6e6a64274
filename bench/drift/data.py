"""Features of clean and corrupted CIFAR-10, reference draws, and streams.

The 5,000 test images are split anew for each draw: 2,000 make the reference, the other 3,000 every stream, null and
shifted. Training images are not used: the model knows them too well.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from bench.cifar import CACHE, MEAN, SHAPE, STD, data_folder, images
from bench.corruptions import CORRUPTIONS, corrupt
from tta.monitor.charts import Layout
from tta.monitor.reference import Reference, confidence, fit

N_REFERENCE = 2000
N_POOL = 3000
SEVERITIES = (1, 2, 3, 4, 5)

Array = npt.NDArray[Any]
Rng = np.random.Generator


@dataclass(frozen=True)
class Raw:
    """Of 5,000 images: logits (N, K) and each block's raw statistics (N, F)."""

    logits: Array
    blocks: tuple[Array, ...]


def _folder() -> Path:
    """Cached features, by a hash of what makes them."""
    digest = hashlib.sha256()
    for path in (data_folder() / "resnet20-cifar10.safetensors", Path(__file__).parents[1] / "corruptions.py"):
        digest.update(path.read_bytes())
    folder = CACHE / "drift" / digest.hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@lru_cache(maxsize=1)
def _taps() -> Any:
    from tta.packaging.blocks import partition
    from tta.packaging.export import Taps
    from tta.packaging.source import build_model, load_checkpoint

    model = build_model("bench.resnet20:resnet20", {})
    load_checkpoint(model, data_folder() / "resnet20-cifar10.safetensors")
    model.eval()
    return Taps(model, partition(model, SHAPE), MEAN, STD).eval()


@lru_cache(maxsize=100)
def raw(name: str = "clean", severity: int = 0) -> Raw:
    """Features of all test images under a corruption; computed once."""
    path = _folder() / f"{name}{severity}.npz"
    if not path.exists():
        from tta.packaging.reference import raw_features

        x = images("test")[0]
        x = x if name == "clean" else corrupt(name, x, severity)
        logits, blocks = raw_features(_taps(), x, lambda n: None)
        np.savez(path, logits=logits, **{f"block{i}": b for i, b in enumerate(blocks)})
    found = np.load(path)
    return Raw(found["logits"], tuple(found[f"block{i}"] for i in range(len(found.files) - 1)))


def prepare(progress: Callable[[str], None]) -> None:
    """Compute all features that are not cached."""
    for name in CORRUPTIONS:
        for severity in SEVERITIES:
            if not (_folder() / f"{name}{severity}.npz").exists():
                progress(f"features of {name} {severity}")
                raw(name, severity)


def labels() -> Array:
    """(5000,) true classes of the test images."""
    return images("test")[1]


@dataclass(frozen=True)
class Pool:
    """What streams are drawn from: 3,000 images as one condition shows them.

    Attributes:
        sets: feature set to (N, d): "last", "all" and "ours".
        logits: (N, K).
        labels: (N,) true classes.
    """

    sets: dict[str, Array]
    logits: Array
    labels: Array

    @cached_property
    def predictions(self) -> Array:
        """(N,) predicted classes."""
        classes: Array = self.logits.argmax(axis=1)
        return classes

    @cached_property
    def confidences(self) -> Array:
        """(N,) negative entropy."""
        return confidence(self.logits)


class Draw:
    """One draw of the reference, and the pools that do not overlap with it."""

    def __init__(self, seed: int, n_reference: int = N_REFERENCE) -> None:
        from tta.packaging.reference import fit_whitening

        order = np.random.default_rng(seed).permutation(len(labels()))
        self._fit, self._pool = order[:n_reference], order[-N_POOL:]
        clean = raw()
        logits = clean.logits[self._fit]
        blocks = [b[self._fit] for b in clean.blocks]
        self.whitening = fit_whitening(blocks, logits.argmax(axis=1), logits.shape[1])
        names = ("block1", "block2", "block3", "head")
        self.layout = Layout(names, self.whitening.widths)
        self.reference: Reference = fit(
            self.whitening.apply(blocks), logits, labels()[self._fit], self.layout, keep=n_reference
        )
        self.reference_sets = {
            "last": blocks[2],
            "all": np.concatenate(blocks[:3], axis=1),
            "ours": self.reference.w,  # cross-fitted, as calibration has them; in another order
        }
        self.reference_confidences = confidence(logits)
        self._pools: dict[tuple[str, int], Pool] = {}

    def pool(self, name: str = "clean", severity: int = 0) -> Pool:
        """The pool under a corruption."""
        key = (name, severity)
        if key not in self._pools:
            found = raw(name, severity)
            logits, blocks = found.logits[self._pool], [b[self._pool] for b in found.blocks]
            predictions = logits.argmax(axis=1)
            w = self.reference.residuals(self.whitening.apply(blocks), predictions)
            sets = {"last": blocks[2], "all": np.concatenate(blocks[:3], axis=1), "ours": w}
            self._pools[key] = Pool(sets, logits, labels()[self._pool])
        return self._pools[key]

    def clean_features(self) -> tuple[Array, Array]:
        """Whitened features (N, D) and logits (N, K) of the clean pool, as the server sends them."""
        clean = raw()
        return self.whitening.apply([b[self._pool] for b in clean.blocks]), clean.logits[self._pool]

    def shift(self, name: str) -> Pool:
        """The pool after any shift: "gaussian_noise 3", "population 2", or the clean one for a "prior 50"."""
        kind, _, number = name.partition(" ")
        if kind == "prior":
            return self.pool()
        if kind == "population":
            return self._population(int(number))
        return self.pool(kind, int(number or 0))

    def _population(self, number: int) -> Pool:
        """A sub-population: one cluster in ten of class-centred last-block features (the model's own embedding).

        Packaging fits its cut on halves along random directions; these are k-means clusters.
        """
        from sklearn.cluster import KMeans

        clean = self.pool()
        embedding = clean.sets["last"][:, : clean.sets["last"].shape[1] // 2].astype(np.float64)
        for k in range(10):
            embedding[clean.predictions == k] -= embedding[clean.predictions == k].mean(axis=0)
        cluster = KMeans(10, n_init=3, random_state=0).fit_predict(embedding)
        rows = np.flatnonzero(cluster == number)
        return Pool(
            {k: v[rows] for k, v in clean.sets.items()},
            clean.logits[rows],
            clean.labels[rows],
        )


def null_indices(kind: str, predictions: Array, n: int, rng: Rng) -> Array:
    """Rows of a clean pool that make a null stream of n samples.

    Args:
        kind: "iid", "runs M" (classes in runs of mean length M), "half" (half of one class), "sticky M" (near-copies
            in runs of mean length M).
        predictions: (N,) of the pool.
        n: samples.
        rng: of the stream.
    """
    name, _, number = kind.partition(" ")
    mean_run = float(number or 1)
    if name == "runs":
        begins = rng.random(n) < 1 / mean_run
        begins[0] = True
        classes = rng.integers(10, size=n)[np.maximum.accumulate(np.where(begins, np.arange(n), 0))]
        rows = [np.flatnonzero(predictions == k) for k in range(10)]
        return np.array([rows[k][int(u * len(rows[k]))] for k, u in zip(classes, rng.random(n), strict=True)])
    drawn = rng.integers(len(predictions), size=n)
    if name == "half":
        one = np.flatnonzero(predictions == rng.integers(10))
        return np.where(rng.random(n) < 0.5, rng.choice(one, n), drawn)
    if name == "sticky":
        fresh = rng.random(n) < 1 / mean_run
        fresh[0] = True
        return drawn[np.maximum.accumulate(np.where(fresh, np.arange(n), 0))]
    return drawn


def shift_indices(name: str, predictions: Array, n: int, rng: Rng) -> tuple[Array, Array]:
    """Rows of the shifted pool, and which samples are shifted at all, after the change.

    Args:
        name: "corruption severity", "population k", "prior P" (one class with probability P in percent), with
            " contaminated P" (percent shifted) or " ramp N" (share grows to all over N samples) appended.
        predictions: (N,) of the shifted pool.
        n: samples.
        rng: of the stream.
    """
    rows = rng.integers(len(predictions), size=n)
    if name.startswith("prior"):
        one = np.flatnonzero(predictions == rng.integers(10))
        return np.where(rng.random(n) < float(name.split()[1]) / 100, rng.choice(one, n), rows), np.ones(n, bool)
    share = np.ones(n)
    if " contaminated " in name:
        share[:] = float(name.split()[-1]) / 100
    elif " ramp " in name:
        share = np.minimum(1, np.arange(1, n + 1) / float(name.split()[-1]))
    return rows, rng.random(n) < share
