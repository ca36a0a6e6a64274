"""Regimes and diagnosis: home is home, a shift is itself, and depth tells kinds apart."""

import numpy as np
import pytest

from tta.monitor.charts import Layout
from tta.monitor.diagnosis import diagnose, fit_cut
from tta.monitor.regimes import LONG, WINDOW, fingerprint, recognise

D = 20


def draw(n: int, mean: float, seed: int) -> np.ndarray:
    """Features about a mean."""
    return np.random.default_rng(seed).normal(loc=mean, size=(n, D))


def test_windows_are_recognised_as_the_regime_they_come_from() -> None:
    """Over fifty fresh windows of each regime, at least 48 are recognised as it."""
    classes = np.arange(600) % 5
    regimes = [fingerprint(draw(600, mean, i), classes) for i, mean in enumerate((0.0, 1.0, -1.5))]

    for number, mean in enumerate((0.0, 1.0, -1.5)):
        right = sum(
            recognise([(r, draw(WINDOW, mean, 1000 + 50 * number + i)) for r in regimes]) == number
            for i in range(50)
        )
        assert right >= 48


def test_an_unknown_regime_is_not_taken_for_a_known_one() -> None:
    """A window far from every fingerprint is recognised as none."""
    home = fingerprint(draw(600, 0.0, 1), np.zeros(600, np.int64))

    assert recognise([(home, draw(WINDOW, 2.5, 2))]) is None


def test_a_regime_is_not_left_for_one_that_is_only_near() -> None:
    """Traffic that differs a little from the reference does not leave home for a neighbour; a neighbour's does."""
    classes = np.zeros(600, np.int64)
    to_neighbour, elsewhere = np.zeros(D), np.zeros(D)
    to_neighbour[:4], elsewhere[4:] = 0.45, 0.14
    home, neighbour = (
        fingerprint(draw(600, 0.0, 1), classes),
        fingerprint(draw(600, 0.0, 2) + to_neighbour, classes),
    )
    wide = fingerprint(1.3 * draw(600, 0.0, 2) + to_neighbour + elsewhere, classes)

    def found(way: np.ndarray, candidate: object, seed: int) -> bool:
        window = draw(LONG, 0.0, seed) + way
        return recognise([(home, window), (candidate, window)], present=0) == 1

    def beyond(seed: int) -> bool:
        return home.distance(draw(LONG, 0.0, seed) + elsewhere) > home.threshold

    looks = range(1000, 2000)
    assert sum(map(beyond, looks)) > 100  # the window alone says that it is not home
    assert sum(found(elsewhere, wide, seed) for seed in looks) <= 5  # 367 by distances alone
    assert sum(found(to_neighbour, neighbour, seed) for seed in looks) > 950


LAYOUT = Layout(("block1", "block2", "block3", "head"), (5, 5, 5, 5))


def test_depth_tells_input_from_feature_level() -> None:
    """Deviation that fades with depth is input level, one that grows with depth is feature level; both surely."""
    fading = np.repeat([3.0, 1.0, 0.3, 0.2], 5) + draw(WINDOW, 0.0, 3)

    early, late = diagnose(fading, LAYOUT), diagnose(fading[:, ::-1], LAYOUT)

    assert (early.kind, early.block) == ("input", "block1")
    assert (late.kind, late.block) == ("feature", "head")
    assert min(early.confidence, late.confidence) > 0.95
    assert early.effect == pytest.approx(3.0 * 5**0.5, rel=0.1)


def test_quiet_features_leave_labels_and_classes_to_speak() -> None:
    """With every block quiet, errors up point at the head, and a moved class mix at the prior."""
    quiet = draw(WINDOW, 0.0, 4)

    output, prior = diagnose(quiet, LAYOUT, errors_up=True), diagnose(quiet, LAYOUT, classes_moved=True)

    assert (output.kind, output.block) == ("output", "head")
    assert (prior.kind, prior.block) == ("prior", "")


def test_the_cut_is_fitted_between_corruptions_and_populations() -> None:
    """The cut lies between the depths of both kinds, wherever those are in the model."""
    corrupted = [
        np.repeat(profile, 5) + draw(300, 0.0, 5) for profile in ([3.0, 2.5, 1.5, 0.5], [2.0, 2.0, 1.8, 0.3])
    ]
    populations = [np.repeat([0.0, 0.5, 1.0, 2.0], 5) + draw(300, 0.0, 6)]

    cut, right = fit_cut(corrupted, populations, LAYOUT)

    assert right == 1.0
    assert 0.4 < cut < 0.85
    assert diagnose(corrupted[0][:WINDOW], LAYOUT, cut).kind == "input"
    assert diagnose(populations[0][:WINDOW], LAYOUT, cut).kind == "feature"


def test_the_channels_that_moved_most_are_named() -> None:
    """A whitened deviation is told in the raw statistics it is made of."""
    loadings = {"block1": np.zeros((8, 5)), "head": np.zeros((10, 5))}
    loadings["block1"][6, 0], loadings["head"][3, 1] = 2.0, -1.5
    window = draw(WINDOW, 0.0, 7) * 0.1
    window[:, 0] += 2.0
    window[:, 16] += 2.0

    first, second, *_ = diagnose(window, LAYOUT, loadings=loadings).channels

    assert first.startswith("block1: log-variance of channel 2, +4")
    assert second.startswith("head: logit of class 3, -3")


def test_a_far_regime_is_known_at_once_and_its_own_samples_never_leave_one() -> None:
    """Eight samples of another regime are enough; in 500 looks at its own a regime is never left."""
    classes = np.arange(600) % 5
    regimes = [fingerprint(draw(600, mean, i), classes) for i, mean in enumerate((0.0, 1.0, -1.5))]

    def look(samples: np.ndarray, present: int) -> int | None:
        return recognise([(r, samples) for r in regimes], present=present)

    assert all(look(draw(8, 1.0, seed), present=0) == 1 for seed in range(50))
    assert all(look(draw(WINDOW - 1, 0.0, seed), present=0) is None for seed in range(500))
    assert look(draw(WINDOW, 0.0, 7), present=0) == 0


def test_a_regime_s_own_scatter_decides_what_is_near() -> None:
    """Moved where a regime never moves, a window does not belong to it; moved where it always does, it may."""
    rng = np.random.default_rng(0)
    spread = np.ones(D)
    spread[0] = 5.0
    home = fingerprint(rng.normal(size=(600, D)) * spread, np.arange(600) % 5)
    window = rng.normal(size=(WINDOW, D)) * spread
    window -= window.mean(axis=0)
    along, across = window.copy(), window.copy()
    along[:, 0] += 1.5
    across[:, 1] += 1.5

    assert recognise([(home, along)]) == 0
    assert recognise([(home, across)]) is None


def test_one_odd_sample_does_not_decide_where_a_window_is() -> None:
    """Without its farthest two, a window with two wild samples is as near as one without them."""
    rng = np.random.default_rng(0)
    known = fingerprint(rng.normal(size=(500, 6)), rng.integers(0, 3, 500))
    window = rng.normal(size=(16, 6))
    wild = window.copy()
    wild[[3, 9]] = 60.0

    assert known.distance(wild) > 5 * known.threshold
    typical = known.without_outliers(wild, 2)
    assert len(typical) == 14
    assert known.distance(typical) <= known.threshold
