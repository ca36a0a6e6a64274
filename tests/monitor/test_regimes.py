"""Regimes and diagnosis: home is home, a shift is itself, and depth tells kinds apart."""

import numpy as np

from tta.monitor.charts import Layout
from tta.monitor.diagnosis import diagnose
from tta.monitor.regimes import WINDOW, fingerprint, recognise

D = 20


def draw(n: int, mean: float, seed: int) -> np.ndarray:
    """Features about a mean."""
    return np.random.default_rng(seed).normal(loc=mean, size=(n, D))


def test_windows_are_recognised_as_the_regime_they_come_from() -> None:
    """Over fifty fresh windows of each regime, at least 48 are recognised as it."""
    classes = np.arange(600) % 5
    regimes = [fingerprint(draw(600, mean, i), classes) for i, mean in enumerate((0.0, 1.0, -1.5))]

    for number, mean in enumerate((0.0, 1.0, -1.5)):
        right = sum(recognise(draw(WINDOW, mean, 1000 + 50 * number + i), regimes) == number for i in range(50))
        assert right >= 48


def test_an_unknown_regime_is_not_taken_for_a_known_one() -> None:
    """A window far from every fingerprint is recognised as none."""
    home = fingerprint(draw(600, 0.0, 1), np.zeros(600, np.int64))

    assert recognise(draw(WINDOW, 2.5, 2), [home]) is None


def test_depth_tells_input_from_feature_level() -> None:
    """Deviation that fades with depth is input level, one that grows with depth is feature level."""
    layout = Layout(("block1", "block2", "block3", "head"), (5, 5, 5, 5))
    fading = np.repeat([3.0, 1.0, 0.3, 0.2], 5) + draw(WINDOW, 0.0, 3)

    assert diagnose(fading, layout, errors_up=True).kind == "input"
    assert diagnose(fading, layout, errors_up=True).block == "block1"
    assert diagnose(fading[:, ::-1], layout, errors_up=True).kind == "feature"


def test_errors_without_moved_features_are_output_level() -> None:
    """Labelled errors up while every block is quiet point at the head."""
    layout = Layout(("block1", "block2", "block3", "head"), (5, 5, 5, 5))

    found = diagnose(draw(WINDOW, 0.0, 4), layout, errors_up=True)

    assert (found.kind, found.block) == ("output", "head")
