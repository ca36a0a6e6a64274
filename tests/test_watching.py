"""Watching through the real daemon: what is worth acting on, sticky traffic, keys, restarts, bad features."""

import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from tests.traffic import status
from tests.waiting import until
from tta.bundle import Bundle
from tta.commands import app
from tta.config import MonitorConfig
from tta.daemon.library import HOME, Library
from tta.daemon.watch import Finding, Watch
from tta.errors import InputError
from tta.monitor.calibration import Calibration
from tta.monitor.regimes import fingerprint
from tta.packaging.digits import corrupt, digits
from tta.scenario import DaemonProcess
from tta.server.predictor import Predictor


def send(
    daemon: DaemonProcess, x: np.ndarray, key: Callable[[int], str | None] = lambda i: None
) -> dict[str, Any]:
    """Predict images in messages of four, and wait until the daemon has seen them all; its status then."""
    before = status(daemon)["samples"]
    with daemon.client() as client:
        for start in range(0, len(x), 4):
            client.predict(x[start : start + 4], key=key(start))
    return until(lambda: (s := status(daemon)).get("samples") == before + len(x) and s, "all observations")


def events(daemon: DaemonProcess) -> list[str]:
    """Names of what happened, oldest first."""
    return [e["event"] for e in status(daemon)["events"]]


def test_a_shift_that_costs_nothing_is_a_notice(start_daemon: Callable[..., DaemonProcess]) -> None:
    """Slightly brighter digits alarm and are weighed; nobody is asked for labels, and they become a regime."""
    daemon = start_daemon()
    x, _ = digits("stream", 700, seed=41)
    brighter = np.minimum(x.astype(np.int64) + 14, 255).astype(np.uint8)

    send(daemon, x[:100])
    send(daemon, brighter[100:])

    found = until(lambda: (s := status(daemon))["state"] == "stable" and s["regime"] and s, "a harmless regime")
    assert {"alarm", "notice", "harmless"} <= set(events(daemon))
    assert "actionable" not in events(daemon)
    assert found["version"] == 0
    assert found["processes"]["adapter"]["pid"] is None


def test_labels_overrule_the_model_s_own_view(start_daemon: Callable[..., DaemonProcess]) -> None:
    """The same mild shift with labels that say every other answer is wrong is worth acting on."""
    daemon = start_daemon(**{"monitor.window": 1024})  # so that it is not soon taken for harmless
    x, _ = digits("stream", 260, seed=41)
    brighter = np.minimum(x.astype(np.int64) + 14, 255).astype(np.uint8)
    send(daemon, x[:100])
    send(daemon, brighter[100:])
    until(lambda: "alarm" in events(daemon), "an alarm")

    with daemon.client() as client:
        answer = client.predict(brighter[200:260])
        labels = [(int(k) + i % 2) % 10 for i, k in enumerate(answer.classes)]
        assert set(client.label(answer.prediction_ids, labels)) == {"joined"}

    found = until(lambda: (s := status(daemon))["shift"] and s["shift"]["actionable"] and s, "a verdict")
    actionable = next(e for e in found["events"] if e["event"] == "actionable")
    assert actionable["cause"] == "labels"


def test_a_shift_that_costs_accuracy_is_actionable_without_a_label(
    start_daemon: Callable[..., DaemonProcess],
) -> None:
    """Noise is told from the model's own confidence: it is diagnosed, and labels are wanted."""
    daemon = start_daemon()
    x, _ = digits("stream", 300, seed=42)

    send(daemon, x[:100])
    send(daemon, corrupt(x[100:], "noise", 1))

    found = until(lambda: (s := status(daemon))["shift"] and s["shift"]["actionable"] and s, "a verdict")
    diagnosis = found["shift"]["diagnosis"]
    assert found["shift"]["kind"] == diagnosis["kind"] == "input"
    assert diagnosis["block"] == "block1"
    assert diagnosis["confidence"] > 0.8
    assert diagnosis["channels"]
    assert found["predicted_accuracy"] < 0.9
    assert found["shift"]["labels_wanted"] > 0


def test_copies_in_a_row_are_not_taken_for_drift(start_daemon: Callable[..., DaemonProcess]) -> None:
    """Every picture shown ten times raises no alarm: the stickiness is measured and the thresholds follow."""
    daemon = start_daemon()
    x, _ = digits("stream", 60, seed=43)

    send(daemon, np.repeat(x, 10, axis=0))

    until(lambda: status(daemon)["stickiness"]["repeat"] >= 0.65, "thresholds for sticky traffic")
    send(daemon, np.repeat(x, 10, axis=0))
    assert "alarm" not in events(daemon)
    assert "recalibrated" in events(daemon)
    repeat = status(daemon)["stickiness"]["repeat"]
    daemon.stop()
    daemon.start()
    assert status(daemon)["stickiness"]["repeat"] == repeat  # what was measured is not forgotten
    assert len(list((daemon.folder / "state" / "calibrations").glob("*.safetensors"))) >= 1


def test_one_camera_s_shift_is_named(start_daemon: Callable[..., DaemonProcess]) -> None:
    """Of four cameras one turns noisy: the shift is hers, and home is not recognised in the others' traffic."""
    daemon = start_daemon()
    x, _ = digits("stream", 800, seed=44)
    cameras = ("north", "east", "south", "west")

    def camera(start: int) -> str:
        return cameras[start // 4 % 4]

    send(daemon, x[:160], camera)
    noisy = x[160:].copy()
    mine = np.arange(len(noisy)) // 4 % 4 == 2
    noisy[mine] = corrupt(noisy[mine], "noise", 2)
    send(daemon, noisy, camera)

    found = until(lambda: (s := status(daemon))["shift"] and s["shift"]["kind"] and s, "a diagnosis")
    assert found["shift"]["keys"] == ["south"]
    assert "quiet" not in events(daemon)


def test_a_key_too_long_is_refused(start_daemon: Callable[..., DaemonProcess]) -> None:
    """A key of 65 characters is refused by name, and the next request is answered."""
    daemon = start_daemon()
    x, _ = digits("stream", 1, seed=45)
    with daemon.client() as client:
        with pytest.raises(InputError, match="key"):
            client.predict(x, key="k" * 65)
        assert len(client.predict(x, key="k" * 64).logits) == 1


def test_the_charts_survive_kill_9(start_daemon: Callable[..., DaemonProcess]) -> None:
    """A daemon killed and started again goes on with the charts it had saved, and says what it expects a day."""
    daemon = start_daemon()
    x, _ = digits("stream", 200, seed=46)
    send(daemon, x)
    saved = daemon.folder / "state" / "watch.safetensors"
    first = saved.stat().st_mtime_ns if saved.exists() else 0
    until(lambda: saved.exists() and saved.stat().st_mtime_ns > first, "the next save")
    before = status(daemon)
    assert before["false_alarms_per_day"] > 0
    assert before["realised_arl"] > before["arl"] / 2

    assert daemon.process is not None
    daemon.process.send_signal(signal.SIGKILL)
    daemon.process.wait()
    daemon.start()

    after = status(daemon)
    assert after["charts_samples"] == before["charts_samples"] == 200
    assert after["drift"] == before["drift"]


def test_a_regime_of_one_camera_is_hers_alone(bundle: Bundle, watch: Watch) -> None:
    """In a regime of one camera hers is quiet, the others are watched against home, and it is recognised."""
    predictor = Predictor(bundle, "cpu", 1)
    predictor.activate(predictor.prepare())
    x, _ = digits("stream", 1200, seed=49)
    noisy = corrupt(x, "noise", 3)
    mine, other = watch.sources.number("south"), watch.sources.number("north")
    quiet, moved = predictor.run(x[:600]), predictor.run(noisy[:600])
    later, moved_later = predictor.run(x[600:]), predictor.run(noisy[600:])

    def feed(first: int, south: Any, north: Any) -> list[Any]:
        found = []
        for i in range(0, 600, 4):
            for k, (source, result) in enumerate(((mine, south), (other, north))):
                place = first + 2 * i + 4 * k
                places, rows = range(place, place + 4), slice(i, i + 4)
                sources = np.full(4, source)
                found.append(watch.features(places, result.features[rows], result.logits[rows], sources))
        return [f for f in found if f is not None]

    watch.look_from(0)
    feed(0, moved, quiet)
    assert watch.find_keys() == ("south",)
    shape = watch.fingerprint()
    regime = watch.library.add(1, "input", 0.8, shape, 0, watch.keys)
    watch.enter(regime, 2000)
    assert feed(2000, moved_later, later) == []
    found = watch.recognised()
    assert found is not None
    assert found.number == regime.number

    alarms = feed(6000, moved_later, moved)
    assert alarms
    assert alarms[0].elsewhere


@pytest.fixture
def watch(bundle: Bundle, tmp_path: Path) -> Watch:
    """The daemon's monitor, without the daemon."""
    home = fingerprint(bundle.reference["w"], bundle.reference["predictions"])
    library = Library(tmp_path, home, bundle.manifest.reference_accuracy, 8)
    return Watch(bundle, Calibration.load(bundle.reference), MonitorConfig(stickiness=0.0), library)


def test_samples_that_are_not_finite_are_left_out_and_counted(bundle: Bundle, watch: Watch) -> None:
    """Of a batch with NaN and infinity in two samples, the others are watched."""
    predictor = Predictor(bundle, "cpu", 1)
    predictor.activate(predictor.prepare())
    result = predictor.run(digits("stream", 16, seed=47)[0])
    features, logits = result.features.copy(), result.logits.copy()
    features[3, 5], logits[9, 0] = np.nan, np.inf

    watch.features(range(16), features, logits, np.zeros(16, np.int64))

    assert watch.n_refused == 2
    assert watch.monitor.history.newest(16).sequences.tolist() == [i for i in range(16) if i not in (3, 9)]
    assert np.isfinite(watch.monitor.charts.statistic).all()


def test_the_residual_test_tells_a_change_of_meaning(watch: Watch) -> None:
    """Errors the model was sure of alarm in both tests; as many that it was unsure of, in the error test alone."""
    found = {}
    for what, confidence in (("sure", -0.0001), ("unsure", -1.5)):
        watch.enter(watch.regime, 0)
        assert any(watch.label(i, i % 2 == 0, confidence) for i in range(1, 40))
        found[what] = (watch.errors.statistic > 1, watch.residuals.statistic > 1)
    assert found == {"sure": (True, True), "unsure": (True, False)}


def feed(watch: Watch, first: int, result: Any, rows: slice, source: int) -> None:
    """Show the watch some of a batch's rows as one key's."""
    n = rows.stop - rows.start
    places = range(first, first + n)
    watch.features(places, result.features[rows], result.logits[rows], np.full(n, source))


def test_labels_of_the_traffic_before_say_nothing_of_the_present(watch: Watch) -> None:
    """Errors on samples from before the regime was entered, a day late say, raise no alarm; later ones do."""
    watch.enter(watch.library.regimes[HOME], 5000)

    assert not any(watch.label(sequence, True, None) for sequence in range(4000, 5000))
    assert watch.label_statistic == 0
    assert any(watch.label(sequence, True, None) for sequence in range(5000, 5100))


def test_samples_that_come_late_are_left_out(bundle: Bundle, watch: Watch) -> None:
    """What arrives behind its successors, by way of the shadow, is not judged again."""
    predictor = Predictor(bundle, "cpu", 1)
    predictor.activate(predictor.prepare())
    result = predictor.run(digits("stream", 16, seed=50)[0])

    feed(watch, 100, result, slice(0, 8), 0)
    feed(watch, 96, result, slice(4, 12), 0)

    assert watch.monitor.history.newest(99).sequences.tolist() == list(range(100, 108))
    assert watch.n_watched == 8


def test_a_rare_camera_s_shift_is_seen_through_and_a_silent_one_let_go(bundle: Bundle, watch: Watch) -> None:
    """One camera in thirty collects enough for a fingerprint; one that falls silent is not waited for."""
    predictor = Predictor(bundle, "cpu", 1)
    predictor.activate(predictor.prepare())
    x, _ = digits("stream", 300, seed=51)
    quiet, moved = predictor.run(x), predictor.run(corrupt(x, "noise", 4))
    rare, *others = (watch.sources.number(f"camera {i}") for i in range(30))
    watch.look_from(0)
    place = 0
    for i in range(280):
        for j, source in enumerate((rare, *others)):
            row = i if source == rare else (7 * i + 11 * j) % 300
            feed(watch, place, moved if source == rare else quiet, slice(row, row + 1), source)
            place += 1
        if i == 20:
            assert watch.find_keys() == ("camera 0",)

    assert watch.fingerprint() is not None
    assert not watch.forget_silent_keys()
    for i in range(0, 5000, 250):
        feed(watch, place + i, quiet, slice(0, 250), others[i // 250])
    assert watch.forget_silent_keys()
    assert watch.keys == ()


def test_unknown_traffic_that_moves_on_is_noticed_and_that_which_stays_is_not(
    bundle: Bundle, watch: Watch
) -> None:
    """Within a shift nobody knows, its own samples go on as they began; another shift is seen in 32 samples."""
    predictor = Predictor(bundle, "cpu", 1)
    predictor.activate(predictor.prepare())
    x, _ = digits("stream", 480, seed=52)
    noise, blur = predictor.run(corrupt(x[:400], "noise", 4)), predictor.run(corrupt(x[400:], "blur", 4))
    watch.look_from(0)
    source = watch.sources.number("camera")

    def moved(result: Any, first: int) -> list[int]:
        found = []
        for i in range(0, len(result.logits), 4):
            places, rows = range(first + i, first + i + 4), slice(i, i + 4)
            watch.features(places, result.features[rows], result.logits[rows], np.full(4, source))
            place = watch.moved_on()
            found += [] if place is None else [place]
        return found

    assert moved(noise, 0) == []
    assert 380 <= moved(blur, 400)[0] <= 432


def test_a_regime_is_left_for_its_nearest_neighbour(bundle: Bundle, watch: Watch) -> None:
    """Traffic that 48 samples take for a known regime is seen to have left it by 128; the regime's own has not."""
    predictor = Predictor(bundle, "cpu", 1)
    predictor.activate(predictor.prepare())
    x, _ = digits("stream", 900, seed=53)
    noise = predictor.run(corrupt(x, "noise", 4))
    predictions = noise.logits.argmax(axis=1)
    known = fingerprint(watch.reference.residuals(noise.features[:400], predictions[:400]), predictions[:400])
    regime = watch.library.add(1, "input", 0.8, known, 0)
    watch.enter(regime, 0)
    source = watch.sources.number("camera")
    near = replace(noise, features=noise.features + np.float32(0.22))
    residuals = watch.reference.residuals(near.features, predictions)
    few = [known.distance(residuals[i : i + 48]) / known.threshold for i in range(600, 850, 10)]
    assert np.median(few) < 1

    def found(result: Any, rows: range) -> list[Finding]:
        every = []
        for i in rows[::4]:
            part = slice(i, i + 4)
            watch.features(range(i, i + 4), result.features[part], result.logits[part], np.full(4, source))
            left = watch.left()
            every += [] if left is None else [left]
        return every

    assert found(noise, range(400, 600)) == []
    left = found(near, range(600, 900))
    assert left[0].alarm.chart == "fingerprint"
    assert left[0].sequence < 800
    assert 560 <= left[0].onset <= 660


def test_without_torch_it_watches_and_says_so(
    start_daemon: Callable[..., DaemonProcess], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where torch cannot be imported, as in small images, shifts alarm, nothing is started, status says why."""
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\n"
        "class NoTorch:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.partition('.')[0] == 'torch':\n"
        "            raise ModuleNotFoundError(name)\n"
        "sys.meta_path.insert(0, NoTorch())\n"
    )
    monkeypatch.setenv(
        "PYTHONPATH", os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    )
    daemon = start_daemon(mode="auto")
    x, _ = digits("stream", 600, seed=44)
    send(daemon, corrupt(x, "noise", 1))
    now = until(lambda: (s := status(daemon)).get("state") == "drifted" and s, "the alarm")
    shown = CliRunner().invoke(app, ["status", "--control", daemon.control]).stdout

    assert (now["mode"], now["version"], now["processes"]["adapter"]["pid"]) == ("off", 0, None)
    assert "torch is not installed" in now["mode_reason"]
    assert "mode       torch is not installed" in shown
    assert '"event": "monitor_only"' in daemon.log_path.read_text()
