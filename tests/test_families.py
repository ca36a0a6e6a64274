"""With batch normalisation and without: networks of other families, from the package to the cure."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.traffic import Traffic, status
from tests.waiting import until
from tta.packaging import Recipe, package
from tta.packaging.digits import IMAGE_SHAPE, digits, train
from tta.scenario import DaemonProcess
from tta.server.predictor import Predictor

VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 4, "num_heads": 3}
CONVNEXT = {"depths": (1, 1, 1, 1), "dims": (16, 32, 48, 64), "patch_size": 2}


def faded(x: np.ndarray) -> np.ndarray:
    """The same pictures with a third of their contrast."""
    return (0.3 * x + 40).astype(np.uint8)


@pytest.mark.parametrize(
    ("source", "kwargs", "epochs", "learning_rate", "max_class_drop"),
    [
        # This one calls most faded digits 9, its first cures hardly any: by the guard it takes up to ten attempts.
        ("timm:vit_tiny_patch16_224", VIT, 8, 1e-3, 1.0),
        ("timm:convnext_atto", CONVNEXT, 4, 4e-3, 0.2),
        ("timm:mobilenetv3_small_050", {}, 4, 4e-3, 0.2),
    ],
    ids=["vit", "convnext", "mobilenet"],
)
def test_a_family_is_packaged_operated_on_and_served(
    source: str,
    kwargs: dict[str, Any],
    epochs: int,
    learning_rate: float,
    max_class_drop: float,
    start_daemon: Callable[..., DaemonProcess],
    tmp_path: Path,
) -> None:
    """Lost contrast is found, the gate accepts a cure by labels, and the version served is 5 points better."""
    kwargs = {"num_classes": 10, **kwargs}
    model = train(epochs, 0, lambda step, steps: None, source, kwargs, learning_rate)
    recipe = Recipe("family", source, IMAGE_SHAPE, kwargs, arl=1000)
    x, y = digits("reference", 1200, seed=1)
    bundle = package(model, recipe, x, y, [str(i) for i in range(10)], tmp_path / "family.tta")
    x, y = digits("stream", 1500, seed=21)

    daemon = start_daemon(tmp_path / "family.tta", **{"gate.max_class_drop": max_class_drop})
    traffic = Traffic(daemon, faded(x), y)
    traffic.start()
    try:
        version = until(lambda: status(daemon)["version"], "the cure", 300)
    finally:
        traffic.stop()

    assert traffic.failure is None
    predictor = Predictor(bundle, "cpu")
    x, y = digits("stream", 600, seed=31)
    shown = faded(x)

    def accuracy(folder: Path | None) -> float:
        session = predictor.prepare(folder)
        parts = [predictor.run_with(session, shown[i : i + 32]).logits.argmax(axis=1) for i in range(0, 600, 32)]
        return float((np.concatenate(parts) == y).mean())

    assert accuracy(daemon.folder / "state" / "versions" / f"{version:06d}") > accuracy(None) + 0.05
