"""The operator's hand, and the daemon's own second thoughts, on a live shift."""

import json
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.traffic import Traffic, status
from tests.waiting import until
from tta.bundle import Bundle
from tta.daemon.processes import runtime_folder
from tta.errors import PreconditionError
from tta.packaging.digits import corrupt, digits
from tta.protocol import Accept, Adapt, Approve, Pause, Reset, Resume, Rollback
from tta.scenario import DaemonProcess
from tta.server.predictor import Predictor


@pytest.fixture
def noisy() -> tuple[np.ndarray, np.ndarray]:
    """Noisy digits and their classes."""
    x, y = digits("stream", 1500, seed=21)
    return corrupt(x, "noise", 4), y


@pytest.fixture
def shifted(start_daemon: Callable[..., DaemonProcess], noisy: tuple) -> Iterator[Callable]:
    """Start a daemon with settings and noisy, labelled traffic to it."""
    running: list[Traffic] = []

    def start(**settings: object) -> tuple[DaemonProcess, Traffic]:
        daemon = start_daemon(**settings)
        traffic = Traffic(daemon, *noisy)
        traffic.start()
        running.append(traffic)
        return daemon, traffic

    yield start
    for traffic in running:
        traffic.stop()
    assert all(t.failure is None for t in running)


def test_a_proposal_waits_for_approval(shifted: Callable) -> None:
    """In mode propose an accepted candidate is not served until it is approved; then rollback and reset work."""
    daemon, traffic = shifted(mode="propose")
    proposed = until(
        lambda: (s := status(daemon)).get("shift") and s["shift"]["proposal"] and s, "a proposal", 120
    )
    assert proposed["version"] == 0
    assert traffic.versions == {0}

    with daemon.client() as client:
        version = client.call(Approve())["version"]
        until(lambda: status(daemon)["version"] == version, "the promotion")
        client.call(Pause())
        assert client.call(Rollback())["version"] == 0
        assert status(daemon)["version"] == 0
        assert client.call(Rollback(version=version))["version"] == version
        assert client.call(Reset())["version"] == 0
        with pytest.raises(PreconditionError, match="no candidate"):
            client.call(Approve())
        client.call(Resume())

    assert version == proposed["shift"]["proposal"]


def test_what_is_cancelled_leaves_nothing_behind(shifted: Callable) -> None:
    """A reset in the middle of an adaptation ends it, and its request goes from the disk."""
    daemon, traffic = shifted(**{"adapt.epochs": 1000, "adapt.budget_s": 3600})
    work = runtime_folder(daemon.folder / "state") / "work"
    until(lambda: status(daemon).get("state") == "adapting" and list(work.glob("request-*/*")), "the request", 120)
    traffic.label_every = 0

    with daemon.client() as client:
        client.call(Reset())
        until(lambda: not list(work.glob("*")), "an empty folder")

    assert status(daemon)["adapter"] == {}


def test_an_accepted_shift_is_no_alarm_again(shifted: Callable) -> None:
    """After `accept` the source goes on serving, in a regime of the shift's own, and nothing alarms in it."""
    daemon, traffic = shifted(**{"adapt.labels": 5000})
    with daemon.client() as client:
        until(lambda: status(daemon).get("state") == "drifted", "the alarm")
        answered = traffic.answered
        until(lambda: traffic.answered > answered + 400, "a fingerprint's worth of samples")
        regime = client.call(Accept())["regime"]
        answered = traffic.answered
        until(lambda: traffic.answered > answered + 600, "more of the same")
        now = client.status()

    assert regime == 1
    assert [e["event"] for e in now["events"]].count("alarm") == 1
    assert (now["state"], now["regime"], now["version"]) == ("stable", 1, 0)


def test_a_returning_regime_waits_for_its_labels(shifted: Callable, noisy: tuple) -> None:
    """With `library.recall: confirm` a known shift is recalled once labels agree, and not before."""
    daemon, traffic = shifted(**{"library.recall": "confirm"})
    cured = until(lambda: (s := status(daemon))["state"] == "stable" and s["version"] > 0 and s, "the cure", 120)
    traffic.show(*digits("stream", 600, seed=23))
    until(lambda: (s := status(daemon))["state"] == "stable" and s["version"] == 0, "home", 60)

    traffic.show(*noisy)
    until(lambda: status(daemon)["version"] == cured["version"], "the recall", 60)

    known = [e for e in status(daemon)["events"] if e["event"] == "known"][-1]
    assert known["outcome"] == "accepted"
    assert known["n_labels"] >= 8


def test_mode_off_watches_and_changes_nothing(shifted: Callable) -> None:
    """In mode off the shift is found and shown, the adapter never starts, and the source goes on serving."""
    daemon, traffic = shifted(mode="off")
    until(lambda: status(daemon).get("state") == "drifted", "the alarm")
    answered = traffic.answered
    until(lambda: len(traffic.acknowledged) > 150 and traffic.answered > answered + 300, "labels enough to adapt")

    now = status(daemon)
    assert now["processes"]["adapter"]["pid"] is None
    assert (now["state"], now["version"]) == ("drifted", 0)
    assert traffic.versions == {0}


def test_a_pause_holds_and_resume_goes_on(shifted: Callable) -> None:
    """While paused nothing is promoted however many labels come; after resume the shift is cured."""
    daemon, traffic = shifted()
    until(lambda: status(daemon).get("state") in ("drifted", "adapting"), "the alarm")
    with daemon.client() as client:
        client.call(Pause())
        labels = len(traffic.acknowledged)
        until(lambda: len(traffic.acknowledged) > labels + 120, "more labels")
        assert status(daemon)["version"] == 0
        client.call(Resume())
        until(lambda: status(daemon)["version"] > 0, "the cure", 120)


def test_live_labels_roll_a_version_back(shifted: Callable, noisy: tuple, bundle: Bundle) -> None:
    """When labels in probation say the version before was right, it serves again and the cure is forgotten."""
    daemon, traffic = shifted(**{"gate.probation_s": 600.0, "gate.probation_labels": 10_000})
    source = Predictor(bundle, "cpu")
    source.activate(source.prepare())
    x = noisy[0]
    believed = np.concatenate([source.run(x[i : i + 32]).logits.argmax(axis=1) for i in range(0, len(x), 32)])
    until(lambda: status(daemon).get("state") == "probation", "the promotion", 120)

    traffic.show(x, believed)
    until(lambda: any(e["event"] == "disagreed" for e in status(daemon)["events"]), "the rollback", 60)
    now = until(lambda: (s := status(daemon)) and s["version"] == 0 and s, "the source serving again")

    assert now["state"] in ("drifted", "adapting")
    assert [r["regime"] for r in now["regimes"]] == [0]


def test_adapt_now_needs_labels_and_then_goes(
    start_daemon: Callable[..., DaemonProcess], noisy: tuple, tmp_path: Path
) -> None:
    """`adapt` without an alarm is refused with fewer than 16 labels and starts an adaptation with enough."""
    daemon = start_daemon(**{"monitor.arl": 1e9, "monitor.label_arl": 1e9, "adapt.labels": 5000})
    x, y = digits("stream", 80, seed=22)
    with daemon.client() as client:
        answers = [client.predict(x[i]) for i in range(80)]
        client.label([a.prediction_id for a in answers[:10]], y[:10])
        with pytest.raises(PreconditionError, match="at least 16"):
            client.call(Adapt())
        client.label([a.prediction_id for a in answers[10:]], y[10:])
        assert client.call(Adapt())["labels"] == 80
        until(
            lambda: any(e["event"] in ("not_accepted", "accepted") for e in client.status()["events"]),
            "a verdict",
            120,
        )
        assert client.predict(x[:1]).version == client.status()["version"]


def events_named(name: str, daemon: DaemonProcess) -> list[dict]:
    """What of that name happened lately, in order."""
    return [e for e in status(daemon).get("events", ()) if e["event"] == name]


def home_and_back(daemon: DaemonProcess, traffic: Traffic, noisy: tuple, version: int) -> None:
    """Show clean digits until home is served, then noise until it is met by `version` again."""
    traffic.show(*digits("stream", 600, seed=23))
    until(lambda: status(daemon)["version"] == 0, "home", 60)
    traffic.show(*noisy)
    until(lambda: status(daemon)["version"] == version, "the recall", 60)


def test_relief_needs_no_labels_and_is_remembered(
    start_daemon: Callable[..., DaemonProcess], noisy: tuple, bundle: Bundle
) -> None:
    """Without one label a shift is met by re-estimated normalisation that is better, and it returns by itself."""
    settings = {"adapt.label_free": "immediate", "monitor.window": 128}
    daemon = start_daemon(**settings)
    traffic = Traffic(daemon, *noisy, label_every=0)
    traffic.start()
    try:
        version = until(lambda: events_named("settled", daemon), "the end of the case", 120)[0]["version"]
        home_and_back(daemon, traffic, noisy, version)
    finally:
        traffic.stop()

    assert traffic.failure is None
    assert traffic.acknowledged == set()
    assert events_named("relieved", daemon)
    assert not events_named("enough_labels", daemon)
    predictor = Predictor(bundle, "cpu")
    folder = daemon.folder / "state" / "versions" / f"{version:06d}"
    x, y = corrupt(digits("stream", 600, seed=31)[0], "noise", 4), digits("stream", 600, seed=31)[1]

    def accuracy(session: object) -> float:
        parts = [predictor.run_with(session, x[i : i + 32]).logits.argmax(axis=1) for i in range(0, 600, 32)]
        return float((np.concatenate(parts) == y).mean())

    assert accuracy(predictor.prepare(folder)) > accuracy(predictor.prepare()) + 0.1


def test_a_camera_that_hangs_rolls_nothing_back(
    start_daemon: Callable[..., DaemonProcess], noisy: tuple, bundle: Bundle
) -> None:
    """In probation sixty labels of one picture take no version back, and labels of different pictures do."""
    quiet = {"monitor.arl": 1e9, "monitor.label_arl": 1e9, "adapt.labels": 5000}
    daemon = start_daemon(**quiet, **{"gate.probation_s": 600.0, "gate.probation_labels": 10_000})
    source = Predictor(bundle, "cpu")
    source.activate(source.prepare())
    x, y = noisy
    believed = np.concatenate([source.run(x[i : i + 32]).logits.argmax(axis=1) for i in range(0, 480, 32)])
    with daemon.client() as client:

        def label(rows: np.ndarray, classes: np.ndarray) -> None:
            answers = [client.predict(x[i]) for i in rows]
            assert set(client.label([a.prediction_id for a in answers], classes[rows])) == {"joined"}

        label(np.arange(240), y)
        until(lambda: status(daemon).get("state") == "drifted", "the alarm")
        client.call(Adapt())
        until(lambda: status(daemon).get("state") == "probation", "the promotion", 120)
        called = np.concatenate([client.predict(image).classes for image in x[:480]])
        differ = 240 + np.flatnonzero(called[240:] != believed[240:])

        for i in range(60):
            label(differ[:1], believed)
            for image in x[240 + 4 * (i % 60) :][:4]:  # the others see what they always do
                client.predict(image)
        assert not events_named("disagreed", daemon)
        for rows in np.array_split(differ[1:], 4):
            label(rows, believed)
        until(lambda: events_named("disagreed", daemon), "the rollback", 60)


def test_labels_take_over_from_relief(shifted: Callable) -> None:
    """Where labels come after relief, the gate compares with what served before it, and the cure is promoted."""
    daemon, _ = shifted(**{"adapt.label_free": "immediate"})
    until(lambda: events_named("confirmed", daemon), "the cure", 120)

    verdict = events_named("accepted", daemon)[0]
    assert events_named("relieved", daemon)[0]["sequence"] < verdict["sequence"]
    assert verdict["accuracy_serving"] == verdict["accuracy_source"]
    assert verdict["version"] > 0


def test_labels_can_speak_against_relief(
    start_daemon: Callable[..., DaemonProcess], noisy: tuple, bundle: Bundle
) -> None:
    """When live labels say that the source was right, relief is taken back and not tried again for this shift."""
    daemon = start_daemon(**{"adapt.label_free": "immediate", "adapt.labels": 5000})
    source = Predictor(bundle, "cpu")
    source.activate(source.prepare())
    x = noisy[0]
    believed = np.concatenate([source.run(x[i : i + 32]).logits.argmax(axis=1) for i in range(0, len(x), 32)])
    traffic = Traffic(daemon, x, believed)
    traffic.start()
    try:
        until(lambda: events_named("disagreed", daemon), "the verdict of the labels", 120)
        now = until(lambda: (s := status(daemon)) and s["version"] == 0 and s, "the source serving again")
        relieved = len(events_named("relieved", daemon))
        answered = traffic.answered
        until(lambda: traffic.answered > answered + 300, "more of the same", 120)
    finally:
        traffic.stop()

    assert now["state"] == "drifted"
    assert len(events_named("relieved", daemon)) == relieved
    assert status(daemon)["version"] == 0


def test_feedback_proves_relief(start_daemon: Callable[..., DaemonProcess], noisy: tuple) -> None:
    """Where answers are only called right or wrong, relief serves, learns from it, and is kept for erring less."""
    daemon = start_daemon(**{"adapt.label_free": "immediate", "monitor.window": 128})
    traffic = Traffic(daemon, *noisy, label_every=1, feedback=True)
    traffic.start()
    try:
        proof = until(lambda: events_named("confirmed", daemon), "the verdict of the feedback", 180)[0]
        version = status(daemon)["version"]
        home_and_back(daemon, traffic, noisy, version)
    finally:
        traffic.stop()

    assert traffic.failure is None
    assert not events_named("enough_labels", daemon)
    assert version > 0
    assert proof["wrong"] / proof["answers"] < proof["previous_wrong"] / proof["previous_answers"]
    manifest = json.loads((daemon.folder / "state" / "versions" / f"{version:06d}" / "manifest.json").read_text())
    assert manifest["verdict"]["reason"] == "called wrong less often"


def test_feedback_can_speak_against_relief(
    start_daemon: Callable[..., DaemonProcess], noisy: tuple, bundle: Bundle
) -> None:
    """When users call relief's answers wrong that they called right of the source, it is taken back."""
    daemon = start_daemon(**{"adapt.label_free": "immediate"})
    source = Predictor(bundle, "cpu")
    source.activate(source.prepare())
    x = noisy[0]
    believed = np.concatenate([source.run(x[i : i + 32]).logits.argmax(axis=1) for i in range(0, len(x), 32)])
    traffic = Traffic(daemon, x, believed, label_every=1, feedback=True)
    traffic.start()
    try:
        verdict = until(lambda: events_named("disagreed", daemon), "the verdict of the feedback", 120)[0]
        until(lambda: status(daemon)["version"] == 0, "the source serving again")
    finally:
        traffic.stop()

    assert verdict["previous_wrong"] == 0
    assert verdict["wrong"] > 0
    assert events_named("relieved", daemon)


def test_regimes_rehearse_between_shifts(start_daemon: Callable[..., DaemonProcess], noisy: tuple) -> None:
    """After two regimes the daemon rehearses by itself; what came of it is served, and survives kill -9."""
    settings = {"adapt.label_free": "immediate", "monitor.window": 128, "adapt.labels": 5000}
    daemon = start_daemon(**settings)
    x, y = digits("stream", 1500, seed=24)
    blurred = corrupt(x, "blur", 4), y
    traffic = Traffic(daemon, *noisy, label_every=2)
    traffic.start()

    def accept(images: tuple) -> None:
        traffic.show(*images)
        until(lambda: events_named("relieved", daemon), "relief", 120)
        seen = status(daemon)["samples"]
        until(lambda: status(daemon)["samples"] > seen + 300, "labels of it", 60)
        with daemon.client() as client:
            client.call(Accept())

    try:
        accept(noisy)
        known = status(daemon)["regime"]
        traffic.show(*digits("stream", 600, seed=23))
        until(lambda: status(daemon)["regime"] == 0, "home", 60)
        accept(blurred)
        found = until(lambda: events_named("rehearsed", daemon), "the end of the rehearsal", 180)[0]
        versions = found["regimes_served"]
        traffic.show(*noisy)
        if str(known) in versions:
            until(lambda: status(daemon)["version"] == versions[str(known)], "what was rehearsed", 60)
        assert daemon.process is not None
        daemon.process.send_signal(signal.SIGKILL)
        daemon.process.wait()
        weights = daemon.folder / "state" / "rehearsed.safetensors"
        weights.write_bytes(weights.read_bytes()[:100])  # what cannot be read is no start, and no reason to fail
        daemon.start()
        regimes = until(lambda: status(daemon), "the daemon again")["regimes"]
    finally:
        traffic.stop()

    assert found["n_labels"] >= 16
    assert not versions or found["accuracy_candidate"] >= found["accuracy_source"]
    lost = found["n_labels"] * (found["accuracy_serving"] - found["accuracy_candidate"])
    assert not versions or lost <= found["n_labels"] ** 0.5  # labels did not speak against what is served
    assert set(versions.values()) <= {r["version"] for r in regimes}
