"""The slow tier: a detector whose run length is bounded by construction, not by a bootstrap.

The mean of every `GROUP` consecutive residuals has a score, its largest mean square over the blocks. It is
compared with the scores of such groups of the held-out residuals: a conformal p-value. That is turned into an
e-value, at most 1 on average while nothing has changed, and R ← (R + GROUP)·e is a Shiryaev–Roberts e-detector: an
alarm at R ≥ arl comes at most once in `arl` samples on average. A finite reference knows the tail of its own
distribution only so far: the chance to exceed its k-th largest score is Beta(k, n - k + 1), so p is the upper end
of that, for k = 1, 2, 4, ... together, and with `CONFIDENCE` over the draw of the reference the bound holds. It
assumes independent samples in the reference's class mix; of sticky traffic only every n-th is taken.

A shift of the mean that hardly lengthens one residual stands out of a mean of six; longer groups leave too few of
them in a reference of 2,000 to be surprised by.

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
GROUP = 6  # samples whose mean is judged
LIMIT = 1e12


class ConformalDetector:
    """One number R; a step every `GROUP` samples.

    Args:
        reference: whose held-out residuals are what is usual.
        arl: samples between two false alarms, at least.
        stride: only every so many samples are taken, see `stride`.
    """

    def __init__(self, reference: Reference, arl: float, stride: int = 1) -> None:
        self.arl = arl
        self.stride = stride
        self._layout = reference.layout
        self._edges, self._e_values = _table(reference)
        self.reset()

    def reset(self) -> None:
        """Start anew."""
        self._r = 0.0
        self._open = np.zeros((GROUP, self._layout.n_features), np.float32)  # the group that is not full yet
        self._n_open = 0
        self.n_samples = 0
        self.block = 0  # with the largest score of the group that last raised an alarm

    @property
    def statistic(self) -> float:
        """R over its threshold."""
        return self._r / self.arl

    @property
    def span(self) -> int:
        """Samples from the first of a group to its last."""
        return (GROUP - 1) * self.stride

    def update(self, w: Array) -> int | None:
        """Take samples in order.

        Args:
            w: (N, D) residuals.

        Returns:
            Index of the first sample that ends a group over the threshold, if any.
        """
        if len(w) == 1:
            taken = self.n_samples % self.stride == 0
            self.n_samples += 1
            if not taken:
                return None
            self._open[self._n_open] = w[0]
            self._n_open += 1
            if self._n_open < GROUP:
                return None
            self._n_open = 0
            scores = _scores(self._open[None], self._layout.averages)[0]
            if not self._step(float(scores.max())):
                return None
            self.block = int(scores.argmax())
            return 0
        chosen = range(-self.n_samples % self.stride, len(w), self.stride)
        self.n_samples += len(w)
        rows = np.concatenate([self._open[: self._n_open], w[chosen.start :: self.stride]])
        n_groups = len(rows) // GROUP
        groups = rows[: n_groups * GROUP].reshape(n_groups, GROUP, w.shape[1])
        first, last_place = None, GROUP - 1 - self._n_open
        scores = _scores(groups, self._layout.averages)
        for i, score in enumerate(scores.max(axis=1).tolist()):
            if self._step(score) and first is None:
                first, self.block = chosen[last_place + i * GROUP], int(scores[i].argmax())
        left = rows[n_groups * GROUP :]
        self._n_open = len(left)
        self._open[: len(left)] = left
        return first

    def _step(self, score: float) -> bool:
        """One group; whether R is over its threshold."""
        r = (self._r + GROUP) * self._e_values[bisect_left(self._edges, score)]
        self._r = min(r, LIMIT)
        return r >= self.arl

    def state(self) -> dict[str, Array]:
        """What `load_state` needs to go on where this left off."""
        return {
            "r": np.array([self._r]),
            "open": self._open.copy(),
            "counts": np.array([self.n_samples, self._n_open]),
        }

    def load_state(self, state: dict[str, Array]) -> None:
        """Go on from `state()`."""
        self._r, self._open = float(state["r"][0]), np.array(state["open"], np.float32)
        self.n_samples, self._n_open = (int(n) for n in state["counts"])


def stride(repeat: float) -> int:
    """How many samples of traffic this sticky lie between two that are about independent."""
    return max(1, math.ceil(math.log(0.05) / math.log(repeat))) if repeat > 0.05 else 1


Table = tuple[list[float], list[float]]
_known: WeakKeyDictionary[Reference, Table] = WeakKeyDictionary()


def _scores(groups: Array, averages: Array) -> Array:
    """(n, GROUP, D) residuals to (n, blocks) mean squares of their sums."""
    scores: Array = np.square(groups.sum(axis=1)) @ averages
    return scores


def _table(reference: Reference) -> Table:
    """Scores of the reference's groups, and the e-value of a group by how many of them lie below it. Made once."""
    if reference not in _known:
        n = len(reference.w) // GROUP
        order = np.random.default_rng(0).permutation(len(reference.w))[: n * GROUP]
        groups = reference.w[order].astype(np.float32).reshape(n, GROUP, -1)
        _known[reference] = _e_values(_scores(groups, reference.layout.averages).max(axis=1), 1 - CONFIDENCE)
    return _known[reference]


def _e_values(scores: Array, alpha: float) -> Table:
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
