"""The benchmark's detectors are what they say: ours is the package's, MMD is the textbook's."""

import numpy as np

from bench.drift.detectors import gaussian_kernel, mmd, qt_ewma, realised, threshold_for


def test_mmd_is_the_unbiased_estimate() -> None:
    """The incremental statistic equals the double sums over the last window."""
    rng = np.random.default_rng(0)
    reference, table = rng.normal(size=(80, 5)), rng.normal(0.3, 1, (60, 5))
    rows = rng.integers(60, size=(2, 40))

    found = mmd(reference, 10, table, 1.5)(rows)

    for stream, t in ((0, 9), (1, 25), (0, 39)):
        window = table[rows[stream, t - 9 : t + 1]]
        xx, yy = gaussian_kernel(reference, reference, 1.5), gaussian_kernel(window, window, 1.5)
        expected = (xx.sum() - 80) / (80 * 79) + (yy.sum() - np.trace(yy)) / 90
        expected -= 2 * gaussian_kernel(reference, window, 1.5).mean()
        np.testing.assert_allclose(found[stream, t], expected, atol=1e-5)
    assert np.isinf(found[:, :9]).all()


def test_quanttree_bins_hold_equal_shares() -> None:
    """On samples like the reference every bin is as likely, so the statistic stays near its mean."""
    rng = np.random.default_rng(1)
    reference, table = rng.normal(size=(2000, 6)), rng.normal(size=(2000, 6))

    quiet = qt_ewma(reference, table, rng)(rng.integers(2000, size=(30, 400)))
    moved = qt_ewma(reference, table + 1.5, rng)(rng.integers(2000, size=(30, 400)))

    assert quiet[:, -1].mean() < 1.5 * 31
    assert moved[:, -1].mean() > 3 * quiet[:, -1].mean()


def test_a_common_threshold_realises_its_run_length() -> None:
    """The threshold found on null streams gives them the wanted run length within a tenth, interval around it."""
    statistics = np.random.default_rng(2).exponential(size=(200, 3000))

    threshold = threshold_for(statistics, 1000)

    length, low, high = realised(statistics, threshold)
    assert 900 < length < 1100
    assert low < length < high
