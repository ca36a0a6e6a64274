"""The slow tier: a detector whose run length is bounded by construction, not by a bootstrap.

Each sample's score is compared with the held-out scores of its predicted class: a conformal p-value. It is turned
into an e-value, at most 1 on average while nothing has changed, and R ← (R + 1)·e is a Shiryaev–Roberts
e-detector: an alarm at R ≥ arl comes at most once in `arl` samples on average. A finite reference knows the tail
of its own distribution only so far: the chance to exceed its k-th largest score is Beta(k, n - k + 1), so p is the
upper end of that, for k = 1, 2, 4, ... together, and with `CONFIDENCE` over the draw of the reference the bound
holds. It assumes independent samples; of sticky traffic only every n-th is taken.

Source: Shin, Ramdas and Rinaldo, E-detectors, NEJSDS 2024; Vovk et al. for the p-values.
"""

import math
from bisect import bisect_left
from weakref import WeakKeyDictionary

import numpy as np

from tta.monitor.charts import Array
from tta.monitor.reference import Reference

CONFIDENCE = 0.9  # that the bound holds for the reference that was drawn
POWERS = (0.2, 0.5, 0.8)  # e(p) is the mean of κ·p^(κ-1) over these κ
MIN_SCORES = 50  # of a class, to be judged by its own; else by all
LIMIT = 1e12


class ConformalDetector:
    """One number R, one sample at a time.

    Args:
        reference: whose held-out residuals are what is usual.
        arl: samples between two false alarms, at least.
        stride: only every so many samples are taken, see `stride`.
    """

    def __init__(self, reference: Reference, arl: float, stride: int = 1) -> None:
        self.arl = arl
        self.stride = stride
        self._layout = reference.layout
        self._tables = _tables(reference)
        self.reset()

    def scores(self, w: Array) -> Array:
        """(N,) largest mean square of a block of each sample's residuals (N, D)."""
        largest: Array = self._layout.squares(w).max(axis=1)
        return largest

    def reset(self) -> None:
        """Start anew."""
        self._r = 0.0
        self.n_samples = 0

    @property
    def statistic(self) -> float:
        """R over its threshold."""
        return self._r / self.arl

    def update(self, w: Array, predictions: Array) -> int | None:
        """Take samples in order.

        Args:
            w: (N, D) residuals.
            predictions: (N,) predicted classes.

        Returns:
            Index of the first sample over the threshold, if any.
        """
        if len(w) == 1 and (self.stride == 1 or self.n_samples % self.stride == 0):
            self.n_samples += 1
            sorted_scores, e_values = self._tables[predictions[0]]
            score = float(((w * w) @ self._layout.averages).max())
            self._r = min((self._r + 1.0) * e_values[bisect_left(sorted_scores, score)], LIMIT)
            return 0 if self._r >= self.arl else None
        first = None
        chosen = range(-self.n_samples % self.stride, len(w), self.stride)
        self.n_samples += len(w)
        if not len(chosen):
            return None
        taken = slice(chosen.start, None, self.stride)
        scores, classes = self.scores(w[taken]).tolist(), predictions[taken].tolist()
        r, arl, tables = self._r, self.arl, self._tables
        for i, score, k in zip(chosen, scores, classes, strict=True):
            sorted_scores, e_values = tables[k]
            r = (r + 1.0) * e_values[bisect_left(sorted_scores, score)]
            if r >= arl:
                r = min(r, LIMIT)
                first = i if first is None else first
        self._r = r
        return first

    def state(self) -> dict[str, Array]:
        """What `load_state` needs to go on where this left off."""
        return {"r": np.array([self._r]), "counts": np.array([self.n_samples])}

    def load_state(self, state: dict[str, Array]) -> None:
        """Go on from `state()`."""
        self._r, self.n_samples = float(state["r"][0]), int(state["counts"][0])


def stride(repeat: float) -> int:
    """How many samples of traffic this sticky lie between two that are about independent."""
    return max(1, math.ceil(math.log(0.05) / math.log(repeat))) if repeat > 0.05 else 1


Table = tuple[list[float], list[float]]
_known: WeakKeyDictionary[Reference, list[Table]] = WeakKeyDictionary()


def _tables(reference: Reference) -> list[Table]:
    """For each class: scores, and the e-value of a sample by how many of them lie below it. Made once."""
    if reference not in _known:
        scores = reference.layout.squares(reference.w).max(axis=1)
        own = [scores[reference.predictions == k] for k in range(len(reference.prior))]
        judged = [len(scores_) >= MIN_SCORES for scores_ in own]
        alpha = (1 - CONFIDENCE) / (sum(judged) + 1)
        everybody = _table(scores, alpha)
        _known[reference] = [_table(s, alpha) if j else everybody for s, j in zip(own, judged, strict=True)]
    return _known[reference]


def _table(scores: Array, alpha: float) -> Table:
    n = len(scores)
    ranks = [2**i for i in range(n.bit_length()) if 2**i <= n // 2]
    edges = np.sort(scores)[[-k for k in reversed(ranks)]]
    tails = [_upper_tail(k, n, alpha / len(ranks)) for k in reversed(ranks)]
    p = np.array([1.0, *tails])  # of a sample over none of the edges, over the lowest, ..., over all
    e = np.mean([power * p ** (power - 1) for power in POWERS], axis=0)
    return edges.tolist(), e.tolist()


def _upper_tail(k: int, n: int, alpha: float) -> float:
    """Of a score beyond the k-th largest of n, with confidence 1 - alpha: a Beta quantile."""
    low, high = 0.0, 1.0
    for _ in range(50):
        x = (low + high) / 2
        # P(Beta(k, n - k + 1) > x) = P(Binomial(n, x) < k)
        log_term, below = n * math.log1p(-x), 0.0
        for i in range(k):
            below += math.exp(log_term)
            log_term += math.log((n - i) / (i + 1)) + math.log(x) - math.log1p(-x)
        low, high = (x, high) if below > alpha else (low, x)
    return high
