"""Charts: the same numbers as the textbook recursion, and the run lengths they promise."""

import numpy as np
import pytest

from tta.errors import InputError
from tta.monitor.calibration import calibrate
from tta.monitor.charts import LAMBDAS, DriftCharts, Layout, centre

LAYOUT = Layout(("block1", "block2", "head"), (6, 6, 3))


def reference(n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """White features and predicted classes."""
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, LAYOUT.n_features)), rng.integers(0, 4, n)


def test_a_batch_gives_what_the_recursion_gives() -> None:
    """Charts fed in batches of any size hold the textbook MEWMA statistic after each sample."""
    w, _ = reference(150, 1)
    charts = DriftCharts(LAYOUT, np.ones((len(LAMBDAS), 3)) * 1e9)
    for part in np.split(w, [1, 8, 100]):
        charts.update(part)

    expected = np.zeros(3)
    for lam in LAMBDAS:
        z = np.zeros(LAYOUT.n_features)
        for row in w:
            z = (1 - lam) * z + lam * row
        variance = lam / (2 - lam) * (1 - (1 - lam) ** (2 * len(w)))
        squares = [np.mean(z[a : a + n] ** 2) for a, n in zip(LAYOUT.starts, LAYOUT.widths, strict=True)]
        expected = np.maximum(expected, np.array(squares) / variance / 1e9)
    np.testing.assert_allclose(charts.statistic, expected, rtol=1e-9)


def test_an_alarm_names_its_sample_and_block() -> None:
    """A jump in one block alarms at the first sample over the threshold, in a batch as one by one."""
    w, predictions = reference(2000, 2)
    thresholds = calibrate(w, predictions, LAYOUT, 2000).thresholds
    quiet, _ = reference(40, 3)
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
    """On fresh in-control streams the mean run length is within a factor of three of the target."""
    w, predictions = reference(4000, 4)
    thresholds = calibrate(w, predictions, LAYOUT, arl).thresholds
    samples = alarms = 0
    for seed in range(60):
        stream, _ = reference(1000, 100 + seed)
        alarm = DriftCharts(LAYOUT, thresholds).update(stream)
        samples += 1000 if alarm is None else alarm.index + 1
        alarms += alarm is not None

    assert arl / 3 < samples / max(alarms, 1) < 3 * arl


def test_a_state_restored_goes_on_alike() -> None:
    """Charts restored from a saved state give the same statistic as charts that were never stopped."""
    w, _ = reference(90, 5)
    thresholds = np.ones((len(LAMBDAS), 3))
    whole, first, second = (DriftCharts(LAYOUT, thresholds) for _ in range(3))
    whole.update(w)
    first.update(w[:37])
    second.load_state(first.state())
    second.update(w[37:])

    np.testing.assert_allclose(second.statistic, whole.statistic, rtol=1e-12)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_features_that_are_not_finite_are_refused(bad: float) -> None:
    """NaN or infinity is an error, not a silent alarm."""
    features = np.zeros((2, 15))
    features[1, 3] = bad

    with pytest.raises(InputError, match="NaN or infinity"):
        centre(features, np.zeros(2, np.int64), np.zeros((4, 15)))


def test_too_small_a_reference_is_refused() -> None:
    """Fewer than a hundred held-out samples cannot be calibrated."""
    w, predictions = reference(99, 6)

    with pytest.raises(InputError, match="at least 100"):
        calibrate(w, predictions, LAYOUT, 1000)
