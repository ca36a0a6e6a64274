"""Accuracy: sequential and exact tests on labelled predictions, and an estimate without labels.

The tests are valid whenever one looks: labels come late, in any order and amount.
"""

import math
from collections.abc import Sequence

import numpy as np

from tta.monitor.charts import Array
from tta.monitor.reference import Reference

ODDS_RATIOS = (1.5, 2.0, 4.0, 8.0, 16.0)  # alternatives to the null odds; averaged, so none has to be right
N_GROUPS = 10  # of confidence, each with an error rate of its own
ONSET_RATIO = 4.0  # the alternative whose CUSUM dates the onset


class ErrorDetector:
    """Is the labelled error rate above its bound? A Shiryaev–Roberts e-detector.

    R ← (R + 1)·e, where e is the likelihood ratio of the label under a higher error rate p and under `null`,
    averaged over several p. While the error rate stays at or below `null`, e is at most 1 on average, so an
    alarm comes at most once in `arl` labels on average.

    Given a null for each label (`ConfidenceModel.error_rate`), it tests the calibration residual: more errors
    than the model's own confidence admits. That rises when the meaning of labels changes, and stays flat when
    inputs became harder and the model knows it.

    Args:
        null: error rate that is still in order, in (0, 1).
        arl: labels between two false alarms, at least.

    Source: Shin, Ramdas and Rinaldo, E-detectors, NEJSDS 2024.
    """

    def __init__(self, null: float, arl: float) -> None:
        self.null = _bounded(null)
        self.arl = arl
        self.reset()

    def reset(self) -> None:
        """Start anew."""
        self._r = [0.0] * len(ODDS_RATIOS)
        self._cusum = 0.0
        self._last_low = 0
        self.n_labels = 0

    @property
    def statistic(self) -> float:
        """R over its threshold; above 1 is an alarm."""
        return sum(self._r) / len(self._r) / self.arl

    @property
    def drift_detected(self) -> bool:
        """Whether the error rate is above its bound."""
        return self.statistic >= 1.0

    @property
    def labels_since_onset(self) -> int:
        """How many labels ago errors began to rise: since the CUSUM of the likelihood ratio was last 0."""
        return self.n_labels - self._last_low

    def update(self, error: bool, null: float | None = None) -> None:
        """Take one label.

        Args:
            error: was the prediction wrong?
            null: chance of an error that is in order for this sample; the detector's own by default.
        """
        null = self.null if null is None else _bounded(null)
        self.n_labels += 1
        for i, ratio in enumerate(ODDS_RATIOS):
            self._r[i] = min((self._r[i] + 1.0) * _likelihood_ratio(error, null, ratio), 1e12)
        self._cusum = max(0.0, self._cusum + math.log(_likelihood_ratio(error, null, ONSET_RATIO)))
        if self._cusum == 0.0:
            self._last_low = self.n_labels

    def state(self) -> dict[str, Array]:
        """What `load_state` needs to go on where this left off."""
        return {"r": np.array([*self._r, self._cusum]), "counts": np.array([self.n_labels, self._last_low])}

    def load_state(self, state: dict[str, Array]) -> None:
        """Go on from `state()`."""
        *self._r, self._cusum = (float(v) for v in state["r"])
        self.n_labels, self._last_low = (int(n) for n in state["counts"])


def _bounded(null: float) -> float:
    return min(max(null, 0.005), 0.95)


def _likelihood_ratio(error: bool, null: float, odds_ratio: float) -> float:
    """Of one label, under the null's odds times `odds_ratio` and under the null."""
    odds = odds_ratio * null / (1 - null)
    p = odds / (1 + odds)
    return p / null if error else (1 - p) / (1 - null)


class ConfidenceModel:
    """What the source model's confidence says of its accuracy, learned on held-out reference data.

    Accuracy without labels is the share of samples over a confidence that as many held-out samples exceeded as
    were right (average thresholded confidence, Garg et al., ICLR 2022). A model is too sure of itself under a
    shift, so this is too high rather than too low: it ranks shifts, and labels decide.
    """

    def __init__(self, reference: Reference) -> None:
        right = reference.predictions == reference.labels
        self.accuracy = float(right.mean())
        order = np.argsort(reference.confidences)
        confidences = reference.confidences[order]
        self._threshold = float(np.quantile(confidences, 1 - self.accuracy))
        groups = [g for g in np.array_split(np.arange(len(order)), N_GROUPS) if len(g)]
        self._edges = np.array([confidences[g[-1]] for g in groups[:-1]])
        # One error and one right answer are imagined in each group, so that no chance is 0 or 1.
        self._errors = np.array([(np.sum(~right[order[g]]) + 1) / (len(g) + 2) for g in groups])

    def predicted_accuracy(self, confidences: Array) -> float:
        """Of samples with these confidences (N,), in [0, 1]."""
        return float((confidences >= self._threshold).mean())

    def error_rate(self, confidence: float) -> float:
        """Chance of an error at this confidence, in (0, 1)."""
        return float(self._errors[int(np.searchsorted(self._edges, confidence))])


class PairedTest:
    """Is the previous version better than the new one? An e-process on live labels.

    Only labels on which exactly one of the two is right count. While the new version is at least as good,
    the chance that this ever disagrees is at most `alpha`.
    """

    def __init__(self, alpha: float) -> None:
        self.alpha = alpha
        self.n_labels = 0
        self.new_only = 0
        self.previous_only = 0
        self._wealth = [1.0, 1.0, 1.0]

    @property
    def disagrees(self) -> bool:
        """Whether labels have shown the previous version to be better."""
        return sum(self._wealth) / len(self._wealth) >= 1 / self.alpha

    def update(self, new_correct: bool, previous_correct: bool) -> None:
        """Take one label."""
        self.n_labels += 1
        if new_correct == previous_correct:
            return
        self.new_only += new_correct
        self.previous_only += previous_correct
        sign = 1.0 if previous_correct else -1.0
        for i, bet in enumerate((0.3, 0.6, 0.9)):
            self._wealth[i] *= 1 + bet * sign


def binomial_tail(k: int, n: int, p: float) -> float:
    """P(X >= k) for X ~ Binomial(n, p), exactly (in log space)."""
    if k <= 0:
        return 1.0
    if k > n:
        return 0.0
    logs = [
        math.lgamma(n + 1)
        - math.lgamma(i + 1)
        - math.lgamma(n - i + 1)
        + i * math.log(p)
        + (n - i) * math.log1p(-p)
        for i in range(k, n + 1)
    ]
    top = max(logs)
    return min(1.0, math.exp(top) * sum(math.exp(value - top) for value in logs))


def more_errors_p_value(errors: int, n: int, other_errors: int, other_n: int) -> float:
    """One-sided exact p-value for "errs more often than the other" on different samples (Fisher's test).

    Args:
        errors: of the first.
        n: samples among which they are.
        other_errors: of the other.
        other_n: samples among which those are.
    """
    total, wrong = n + other_n, errors + other_errors

    def log_choose(a: int, b: int) -> float:
        return math.lgamma(a + 1) - math.lgamma(b + 1) - math.lgamma(a - b + 1)

    every = log_choose(total, n)
    ways = range(errors, min(n, wrong) + 1)
    return min(1.0, sum(math.exp(log_choose(wrong, k) + log_choose(total - wrong, n - k) - every) for k in ways))


def paired_p_value(new_correct: Sequence[bool], old_correct: Sequence[bool]) -> float:
    """One-sided exact p-value for "new is better than old" on the same labels (McNemar's exact test)."""
    wins = sum(1 for a, b in zip(new_correct, old_correct, strict=True) if a and not b)
    losses = sum(1 for a, b in zip(new_correct, old_correct, strict=True) if b and not a)
    return binomial_tail(wins, wins + losses, 0.5)
