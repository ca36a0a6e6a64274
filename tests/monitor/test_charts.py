"""Charts: the same numbers as the textbook recursions, and the run lengths they promise."""

import numpy as np
import pytest

from tests.monitor.stream import LAYOUT, make_logits, make_reference, stream
from tta.errors import InputError
from tta.monitor.calibration import calibrate, reference_warning
from tta.monitor.charts import CLASS_LAMBDAS, LAMBDAS, ClassHistogram, DriftCharts
from tta.monitor.reference import fit
from tta.monitor.stickiness import Stickiness


def test_a_batch_gives_what_the_recursion_gives() -> None:
    """Charts fed in batches of any size hold the textbook MEWMA statistic after each sample."""
    w = stream(150, 1).w
    charts = DriftCharts(LAYOUT, np.ones((len(LAMBDAS), 3)) * 1e3)
    for part in np.split(w, [1, 2, 8, 100]):
        charts.update(part)

    expected = np.zeros(3)
    for lam in LAMBDAS:
        z = np.zeros(LAYOUT.n_features)
        for row in w:
            z = (1 - lam) * z + lam * row
        variance = lam / (2 - lam)
        squares = [np.mean(z[columns] ** 2) for columns in LAYOUT.columns]
        expected = np.maximum(expected, np.array(squares) / variance / 1e3)
    np.testing.assert_allclose(charts.statistic, expected, rtol=1e-4)


def test_the_histogram_is_the_pearson_statistic_of_an_ewma() -> None:
    """Fed in batches of any size, the class histogram holds Σ (z - π)²/π of its slowest and fastest EWMA."""
    prior = np.array([0.1, 0.2, 0.3, 0.4])
    classes = np.random.default_rng(0).integers(0, 4, 700)
    charts = ClassHistogram(prior, np.ones(3))
    for part in np.split(classes, [1, 2, 70, 71, 300]):
        charts.update(part)

    expected = []
    for lam in CLASS_LAMBDAS:
        z = prior.copy()
        for c in classes:
            z *= 1 - lam
            z[c] += lam
        variance = lam / (2 - lam)
        expected.append(np.sum((z - prior) ** 2 / prior) / variance / 3)
    assert charts.statistic == pytest.approx(max(expected), rel=1e-5)


def test_an_alarm_names_its_sample_and_block() -> None:
    """A jump in one block alarms at the first sample over the threshold, in a batch as one by one."""
    thresholds = calibrate(make_reference(2000, 2), 2000).thresholds
    quiet = stream(40, 3).w
    quiet[20:, 6:12] += 3.0

    alarm = DriftCharts(LAYOUT, thresholds).update(quiet)
    one_by_one = DriftCharts(LAYOUT, thresholds)
    first = next(i for i in range(40) if one_by_one.update(quiet[i : i + 1]))

    assert alarm is not None
    assert (alarm.block, alarm.index) == ("block2", first)
    assert 20 <= first < 26
    assert 18 <= first - alarm.lag <= 21


@pytest.mark.parametrize("arl", [500, 2000])
def test_the_run_length_is_as_calibrated(arl: float) -> None:
    """On fresh in-control streams the mean run length is at least the target, and within six times it."""
    thresholds = calibrate(make_reference(4000, 4), arl).thresholds
    samples = alarms = 0
    for seed in range(60):
        alarm = DriftCharts(LAYOUT, thresholds).update(stream(1000, 100 + seed).w)
        samples += 1000 if alarm is None else alarm.index + 1
        alarms += alarm is not None

    assert arl < samples / max(alarms, 1) < 6 * arl


def test_odd_samples_raise_no_more_alarms_at_the_start_than_later() -> None:
    """Of 1,000 charts just started on heavy tails, hardly more alarm in 8 samples than `arl` has it."""
    rng = np.random.default_rng(3)
    logits = make_logits(4000, rng)
    heavy = rng.standard_t(4, (4000, LAYOUT.n_features))
    reference = fit(heavy, logits, logits.argmax(axis=1), LAYOUT)
    thresholds = calibrate(reference, 2000).thresholds

    alarms = 0
    for _ in range(1000):
        rows = rng.integers(0, len(reference.w), 8)
        alarms += DriftCharts(LAYOUT, thresholds).update(reference.w[rows]) is not None
    assert alarms <= 10  # 4 expected; 30 in units of the variance after as many samples


def test_sticky_traffic_needs_higher_thresholds_and_classes_in_runs_too() -> None:
    """Thresholds rise with the stickiness they are for, and each calibration says what it is for."""
    reference = make_reference(1000, 5)
    plain = calibrate(reference, 1000)
    sticky = calibrate(reference, 1000, Stickiness(0.8, 1))

    assert sticky.thresholds.mean() > 4 * plain.thresholds.mean()
    assert sticky.stickiness == Stickiness(0.8, 1)
    assert plain.margin >= 1.0
    assert 500 < plain.realised < 10_000


def test_an_unlike_class_has_its_own_covariance() -> None:
    """Residuals of a class with ten times the variance are as long as those of the others."""
    rng = np.random.default_rng(6)
    logits = np.eye(4)[rng.integers(0, 4, 3000)]
    features = rng.normal(size=(3000, LAYOUT.n_features)) * np.where(logits[:, [2]] > 0, 10**0.5, 1)

    reference = fit(features, logits, logits.argmax(axis=1), LAYOUT)

    assert len(reference.whiteners) == 5
    lengths = [np.square(reference.w[reference.predictions == k]).mean() for k in range(4)]
    np.testing.assert_allclose(lengths, 1.0, atol=0.2)


def test_residuals_are_the_same_alone_and_in_a_batch() -> None:
    """Each row of a batch has the residual it has alone."""
    reference = make_reference(1000, 7, classes_differ=True)
    rng = np.random.default_rng(8)
    features, predictions = rng.normal(size=(50, LAYOUT.n_features)), rng.integers(0, 4, 50)

    together = reference.residuals(features, predictions)

    alone = [reference.residuals(features[i : i + 1], predictions[i : i + 1])[0] for i in range(50)]
    np.testing.assert_allclose(together, alone, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_features_that_are_not_finite_are_refused(bad: float) -> None:
    """NaN or infinity is an error, not a silent alarm, in the reference as later."""
    features = np.zeros((200, 15))
    features[1, 3] = bad

    with pytest.raises(InputError, match="NaN or infinity"):
        make_reference(200, 9).residuals(features, np.zeros(200, np.int64))
    with pytest.raises(InputError, match="NaN or infinity"):
        fit(features, np.eye(4)[np.arange(200) % 4], np.arange(200) % 4, LAYOUT)


def test_features_of_another_length_are_refused() -> None:
    """A feature vector of the wrong length is named with the right one."""
    with pytest.raises(InputError, match=r"expected features of shape \(N, 15\), got \(1, 14\)"):
        make_reference(200, 10).residuals(np.zeros((1, 14)), np.zeros(1, np.int64))


def test_too_small_a_reference_is_refused_and_a_small_one_named() -> None:
    """Fewer than a hundred samples cannot be calibrated; few of them give a warning with the number needed."""
    with pytest.raises(InputError, match="99 reference samples: at least 100"):
        make_reference(99, 11)
    assert "at least 1000 images" in reference_warning(600, 20_000)
    assert reference_warning(1000, 20_000) == ""
