"""A retrained model takes over: two daemons side by side, clients that know both endpoints, nothing lost."""

import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.waiting import until
from tta.bundle import Bundle, load_bundle
from tta.client import Client, Prediction
from tta.packaging import Recipe, package
from tta.packaging.digits import IMAGE_SHAPE, KWARGS, SOURCE, digits
from tta.packaging.source import build_model
from tta.scenario import DaemonProcess
from tta.server.predictor import Predictor


@pytest.fixture
def retrained(digits_model: torch.nn.Module, tmp_path: Path) -> Bundle:
    """The same network with another head bias, as a bundle of its own."""
    model = build_model(SOURCE, KWARGS)
    weights = {name: tensor.clone() for name, tensor in digits_model.state_dict().items()}
    head = next(reversed(weights))
    weights[head] = weights[head] + torch.linspace(-0.3, 0.3, 10)
    model.load_state_dict(weights)
    x, y = digits("reference", 600, seed=11)
    path = tmp_path / "retrained.tta"
    recipe = Recipe("retrained", SOURCE, IMAGE_SHAPE, KWARGS, arl=1000)
    package(model.eval(), recipe, x, y, [str(i) for i in range(10)], path)
    return load_bundle(path)


def test_a_retrained_model_takes_over_without_a_gap(
    start_daemon: Callable[..., DaemonProcess], bundle: Bundle, retrained: Bundle, tmp_path: Path
) -> None:
    """Start the new daemon beside the old, stop the old: all requests are answered, in the end by the new."""
    old = start_daemon()
    new = DaemonProcess(retrained.path, tmp_path / "new", {})
    x, _ = digits("stream", 64, seed=5)
    expected = [Predictor(b, "cpu", 1) for b in (bundle, retrained)]
    of_old, of_new = (p.run_with(p.prepare(None), x).logits for p in expected)
    by: list[str] = []
    failures: list[object] = []
    done = threading.Event()

    def send() -> None:
        with Client(f"{old.endpoint},{new.endpoint}", old.control, timeout_s=20) as client:
            number = 0
            while not done.is_set():
                pending = {client.submit(x[(number + i) % 64]): (number + i) % 64 for i in range(4)}
                number += 4
                while pending:
                    for request, answer in client.results(5.0):
                        row = pending.pop(request)
                        if not isinstance(answer, Prediction):
                            failures.append(answer)
                            continue
                        near = [float(np.abs(answer.logits[0] - logits[row]).max()) for logits in (of_old, of_new)]
                        by.append("old" if near[0] < 1e-3 else "new" if near[1] < 1e-3 else "neither")

    sender = threading.Thread(target=send)
    sender.start()
    try:
        until(lambda: len(by) > 100, "traffic")
        before = set(by)
        new.start()
        until(lambda: "new" in by, "answers of the new model")
        old.stop()
        mark = len(by)
        until(lambda: len(by) > mark + 200, "traffic after the old model has gone")
    finally:
        done.set()
        sender.join(30)
        new.stop()

    assert failures == []
    assert before == {"old"}
    assert set(by) == {"old", "new"}
    assert set(by[mark + 20 :]) == {"new"}
