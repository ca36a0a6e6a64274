"""Tests on labels: their bounds hold, and they find what is there."""

import itertools
import math

import numpy as np
import pytest

from tests.monitor.stream import make_reference
from tta.monitor.accuracy import (
    ConfidenceModel,
    ErrorDetector,
    PairedTest,
    binomial_tail,
    more_errors_p_value,
    paired_p_value,
)


def test_false_alarms_stay_under_the_bound() -> None:
    """With errors at the null rate, alarms come less often than once in `arl` labels."""
    rng = np.random.default_rng(0)
    alarms = labels = 0
    for _ in range(40):
        detector = ErrorDetector(0.1, arl=1000)
        for error in rng.random(2000) < 0.1:
            detector.update(bool(error))
            labels += 1
            if detector.drift_detected:
                alarms += 1
                detector.reset()

    assert labels / max(alarms, 1) > 1000


def test_a_rise_of_errors_is_found_and_dated() -> None:
    """Errors up from 5 % to 40 % alarm within 60 labels, and the onset is put near the change."""
    rng = np.random.default_rng(1)
    detector = ErrorDetector(0.1, arl=2000)
    for error in rng.random(300) < 0.05:
        detector.update(bool(error))
    taken = 0
    while not detector.drift_detected and taken < 60:
        detector.update(bool(rng.random() < 0.4))
        taken += 1

    assert detector.drift_detected
    assert detector.labels_since_onset <= taken + 10


def test_a_worse_version_is_noticed_and_an_equal_one_is_not() -> None:
    """The paired test disagrees when the previous version is right more often, and rarely otherwise."""
    rng = np.random.default_rng(2)

    def disagrees(p_new_only: float, seed_draws: int) -> bool:
        test = PairedTest(alpha=0.05)
        for _ in range(seed_draws):
            new = rng.random() < p_new_only
            test.update(new, not new)
            if test.disagrees:
                return True
        return False

    assert sum(disagrees(0.2, 60) for _ in range(50)) >= 45
    assert sum(disagrees(0.5, 60) for _ in range(200)) <= 16


@pytest.mark.parametrize(("k", "n", "p"), [(0, 5, 0.5), (3, 5, 0.5), (5, 5, 0.5), (9, 60, 0.1), (40, 50, 0.7)])
def test_the_binomial_tail_is_exact(k: int, n: int, p: float) -> None:
    """The tail equals the sum of the binomial probabilities."""
    expected = sum(math.comb(n, i) * p**i * (1 - p) ** (n - i) for i in range(k, n + 1))

    assert binomial_tail(k, n, p) == pytest.approx(expected, rel=1e-10)


def test_four_labels_cannot_pass_a_five_percent_test() -> None:
    """Winning all of four labels has p = 1/16, which is not below 5 %."""
    assert paired_p_value([True] * 4, [False] * 4) == pytest.approx(1 / 16)


def test_the_residual_test_excuses_errors_the_model_expects() -> None:
    """Harder inputs raise the error test and not the residual test; a changed meaning of labels raises both."""
    rng = np.random.default_rng(3)

    def alarms(expected: float, happening: float) -> tuple[bool, bool]:
        errors, residuals = ErrorDetector(0.1, 2000), ErrorDetector(0.1, 2000)
        for _ in range(200):
            wrong = bool(rng.random() < happening)
            errors.update(wrong)
            residuals.update(wrong, expected + 0.05)
        return errors.statistic > 1, residuals.statistic > 1

    assert alarms(0.4, 0.4) == (True, False)
    assert alarms(0.05, 0.4) == (True, True)


def test_a_detector_restored_goes_on_alike() -> None:
    """An error detector restored from its state stands where the other stands."""
    rng = np.random.default_rng(4)
    whole, first, second = (ErrorDetector(0.1, 2000) for _ in range(3))
    outcomes = [bool(e) for e in rng.random(60) < 0.2]
    for error in outcomes:
        whole.update(error)
    for error in outcomes[:25]:
        first.update(error)
    second.load_state(first.state())
    for error in outcomes[25:]:
        second.update(error)

    assert second.statistic == whole.statistic
    assert second.labels_since_onset == whole.labels_since_onset


def test_confidence_predicts_accuracy() -> None:
    """On the reference the predicted accuracy is the real one; with confidence gone it is far lower."""
    reference = make_reference(2000, 12)
    model = ConfidenceModel(reference)

    assert model.predicted_accuracy(reference.confidences) == pytest.approx(model.accuracy, abs=0.01)
    assert model.predicted_accuracy(reference.confidences * 3 - 1) < model.accuracy - 0.3
    assert 0 < model.error_rate(-0.01) < 1
    assert 0 < model.error_rate(-10.0) < 1


def test_rates_of_two_samples_are_compared_exactly() -> None:
    """The chance of so many errors in the first sample is that of drawing them from both, counted out."""
    for errors, n, other, m in ((5, 6, 1, 6), (2, 5, 5, 8), (0, 5, 3, 7), (6, 6, 0, 6)):
        draws = [sum(i < errors + other for i in rows) for rows in itertools.combinations(range(n + m), n)]
        expected = sum(d >= errors for d in draws) / len(draws)
        assert more_errors_p_value(errors, n, other, m) == pytest.approx(expected)
