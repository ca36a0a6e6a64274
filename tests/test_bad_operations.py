"""Labels and settings no operation can be made with: a verdict that says why, and what serves goes on serving."""

from collections.abc import Callable

import numpy as np
import pytest

from tests.waiting import until
from tta.commands.versions import gate_line
from tta.packaging.digits import digits
from tta.protocol import Adapt
from tta.scenario import DaemonProcess

QUIET = {"monitor.arl": 1e9, "monitor.label_arl": 1e9, "adapt.labels": 5000}


def verdict_on(daemon: DaemonProcess, x: np.ndarray, y: np.ndarray) -> dict:
    """Predict and label these, adapt by hand, and wait for what comes of it."""
    with daemon.client() as client:
        answers = [client.predict(image) for image in x]
        assert set(client.label([a.prediction_id for a in answers], y)) == {"joined"}
        client.call(Adapt())

        def found() -> dict | None:
            events = client.status()["events"]
            return next((e for e in events if e["event"] in ("not_accepted", "accepted")), None)

        event = until(found, "a verdict", 120)
        assert client.predict(x[0]).version == client.status()["version"] == 0
    return event


@pytest.mark.parametrize(
    ("settings", "one_class", "why"),
    [
        ({}, True, "are of one class"),
        ({"adapt.budget_s": 0.001}, False, "adapt.budget_s = 0.001 s is too short"),
    ],
)
def test_what_cannot_be_operated_on_says_why(
    start_daemon: Callable[..., DaemonProcess], settings: dict, one_class: bool, why: str
) -> None:
    """Labels of one class, no time: the verdict names it, and the source serves on."""
    x, y = digits("stream", 120, seed=61)

    event = verdict_on(start_daemon(**QUIET, **settings), x[:48], np.zeros_like(y[:48]) if one_class else y[:48])

    assert event["event"] == "not_accepted"
    assert why in event["error"]


def test_labels_that_contradict_each_other_move_nothing(start_daemon: Callable[..., DaemonProcess]) -> None:
    """One picture labelled as every class in turn counts once: nothing is learned from it or judged by it."""
    same = np.repeat(digits("stream", 1, seed=62)[0], 60, axis=0)

    event = verdict_on(start_daemon(**QUIET), same, np.arange(60) % 10)

    assert event["event"] == "not_accepted"
    assert event["error"] in ("all 1 labels are of one class: nothing can be told apart", "no labels to fit")


def test_what_is_turned_down_is_listed_with_the_reason(start_daemon: Callable[..., DaemonProcess]) -> None:
    """Labels at random give a verdict in numbers, which the version's manifest keeps, and nothing is promoted."""
    x, y = digits("stream", 60, seed=63)
    daemon = start_daemon(**QUIET)

    event = verdict_on(daemon, x, np.random.default_rng(0).permutation(y))

    assert event["event"] == "not_accepted"
    assert event["n_labels"] > 0
    assert event["outcome"] in ("rejected", "undecided")
    with daemon.client() as client:
        (turned_down,) = (v for v in client.versions() if v["version"] == event["candidate"])
    assert not turned_down["has_weights"]
    assert turned_down["verdict"] == {name: event[name] for name in turned_down["verdict"]}
    listed = gate_line(turned_down)
    assert listed.startswith(f"{event['outcome']}, {event['reason']}: ")
    assert f" on {event['n_labels']} labels" in listed
