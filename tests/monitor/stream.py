"""White features and predicted classes, as a reference and as streams."""

import numpy as np

from tta.monitor.charts import Layout
from tta.monitor.history import Samples
from tta.monitor.reference import Reference, fit

LAYOUT = Layout(("block1", "block2", "head"), (6, 6, 3))


def make_logits(n: int, rng: np.random.Generator) -> np.ndarray:
    """(n, 4) of a fairly sure classifier."""
    logits: np.ndarray = 3 * np.eye(4)[rng.integers(0, 4, n)] + rng.normal(size=(n, 4)) * 0.5
    return logits


def make_reference(n: int, seed: int, classes_differ: bool = False) -> Reference:
    """Of n samples in four classes, nine in ten of them classified rightly."""
    rng = np.random.default_rng(seed)
    logits = make_logits(n, rng)
    labels = np.where(rng.random(n) < 0.9, logits.argmax(axis=1), rng.integers(0, 4, n))
    scale = 1 + 0.5 * logits.argmax(axis=1)[:, None] if classes_differ else 1.0
    return fit(rng.normal(size=(n, LAYOUT.n_features)) * scale, logits, labels, LAYOUT)


def stream(n: int, seed: int, mean: float = 0.0, repeat: float = 0.0, first: int = 0, key: int = 0) -> Samples:
    """In-control samples about a mean, each repeating the one before with probability `repeat`."""
    rng = np.random.default_rng(seed)
    fresh = rng.random(n) >= repeat
    fresh[0] = True
    rows = np.maximum.accumulate(np.where(fresh, np.arange(n), 0))
    w = rng.normal(loc=mean, size=(n, LAYOUT.n_features)).astype(np.float32)
    logits = make_logits(n, rng)
    return Samples(
        w[rows],
        logits.argmax(axis=1)[rows],
        logits[rows],
        np.arange(first, first + n),
        np.full(n, key),
    )
