"""kill -9 of each process in the middle of an adaptation under load: nothing promised is lost."""

import os
import resource
import signal
import sqlite3
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from bench.faults import SITE
from tests.traffic import Traffic, status
from tests.waiting import until
from tta.errors import UnavailableError
from tta.packaging.digits import corrupt, digits
from tta.scenario import DaemonProcess
from tta.versions import VersionManifest


def promoted(daemon: DaemonProcess) -> set[int]:
    """Versions the gate accepted, and the source."""
    found = {0}
    for path in (daemon.folder / "state" / "versions").glob("*/manifest.json"):
        manifest = msgspec.json.decode(path.read_bytes(), type=VersionManifest)
        if manifest.verdict.get("outcome") == "accepted":
            found.add(manifest.version)
    return found


def labels_on_disk(daemon: DaemonProcess) -> set[int]:
    """Prediction ids in the buffer."""
    with sqlite3.connect(daemon.folder / "state" / "labels.sqlite") as db:
        return {row[0] for row in db.execute("SELECT prediction_id FROM labels")}


@pytest.mark.parametrize("victim", ["server", "shadow", "adapter", "daemon"])
def test_kill_9_in_the_middle_of_an_adaptation(start_daemon: Callable[..., DaemonProcess], victim: str) -> None:
    """The loop goes on to cure the shift, only promoted versions answer, and no acknowledged label is missing."""
    x, y = digits("stream", 1200, seed=11)
    # Many epochs, so that the adaptation is still under way when the process dies.
    daemon = start_daemon(**{"adapt.epochs": 60})
    traffic = Traffic(daemon, x, y)
    traffic.start()
    try:
        until(lambda: traffic.answered > 100, "clean traffic")
        traffic.show(corrupt(x, "noise", 1), y)
        during = until(
            lambda: (s := status(daemon)) and s["state"] == "adapting" and s["adapter"] and s,
            "an adaptation",
            120,
        )

        pid = daemon.process.pid if victim == "daemon" else during["processes"][victim]["pid"]
        os.kill(pid, signal.SIGKILL)
        if victim == "daemon":
            daemon.process.wait()
            answered = traffic.answered
            until(lambda: traffic.answered > answered + 50, "answers without a daemon")
            daemon.start()

        after = until(
            lambda: (s := status(daemon)) and s["state"] == "stable" and s["version"] > 0 and s,
            "the cure",
            120,
        )
        answered = traffic.answered
        until(lambda: traffic.answered > answered + 50, "answers after the cure")
    finally:
        traffic.stop()

    assert traffic.failure is None
    assert traffic.versions <= promoted(daemon)
    assert traffic.acknowledged <= labels_on_disk(daemon)
    assert len(traffic.acknowledged) >= 96
    if victim == "daemon":
        assert after["processes"]["server"]["pid"] == during["processes"]["server"]["pid"]
    elif victim != "adapter":
        assert after["processes"][victim]["restarts"] == 1
        assert after["processes"][victim]["pid"] != pid
    assert (
        any(e["event"] == "process_died" and e["process"] == victim for e in during["events"] + after["events"])
        or victim == "daemon"
    )


def test_a_restart_resumes_version_labels_and_state(start_daemon: Callable[..., DaemonProcess]) -> None:
    """After SIGTERM and a new start the cured version serves, with the same labels and regimes."""
    x, y = digits("stream", 1200, seed=12)
    daemon = start_daemon()
    traffic = Traffic(daemon, corrupt(x, "noise", 2), y)
    traffic.start()
    try:
        before = until(
            lambda: (s := status(daemon)) and s["state"] == "stable" and s["version"] > 0 and s,
            "a cured shift",
            120,
        )
    finally:
        traffic.stop()
    before = status(daemon)

    assert daemon.stop() == 0
    daemon.start()
    after = status(daemon)

    for key in ("version", "state", "regime", "regimes", "labels_buffered"):
        assert after[key] == before[key], key
    assert after["samples"] >= before["samples"]
    with daemon.client() as client:
        assert client.predict(x[:1]).version == before["version"]


def test_damaged_files_never_keep_it_down(start_daemon: Callable[..., DaemonProcess]) -> None:
    """Without state and library the newest version serves; without that version the source; the log says so."""
    x, y = digits("stream", 1200, seed=13)
    daemon = start_daemon()
    traffic = Traffic(daemon, corrupt(x, "noise", 3), y)
    traffic.start()
    try:
        cured = until(
            lambda: (s := status(daemon)) and s["state"] == "stable" and s["version"] > 0 and s, "the cure", 120
        )
    finally:
        traffic.stop()
    assert daemon.stop() == 0
    state = daemon.folder / "state"
    for name in ("state.json", "library.json", "watch.safetensors", "labels.sqlite"):
        data = (state / name).read_bytes()
        (state / name).write_bytes(data[: len(data) // 2])
    daemon.start()
    now = status(daemon)
    assert now["version"] == cured["version"]
    with daemon.client() as client:
        assert client.predict(x[:1]).version == cured["version"]
    assert daemon.log_path.read_text().count('"file_damaged"') == 4
    assert len(list(state.glob("*.damaged-*"))) >= 4
    assert daemon.stop() == 0

    delta = daemon.folder / "state" / "versions" / f"{cured['version']:06d}" / "delta.safetensors"
    delta.write_bytes(bytes(delta.stat().st_size))

    daemon.start()

    assert status(daemon)["version"] == 0
    assert "version_lost" in daemon.log_path.read_text()
    with daemon.client() as client:
        assert client.predict(x[:1]).version == 0


def test_a_disk_that_takes_nothing_stops_labels_only(start_daemon: Callable[..., DaemonProcess]) -> None:
    """While no file can be written predictions are answered and labels refused with a code; then all goes on."""
    x, y = digits("stream", 300, seed=14)
    daemon = start_daemon()
    limits = resource.prlimit(daemon.process.pid, resource.RLIMIT_FSIZE)
    traffic = Traffic(daemon, x, y)
    traffic.start()
    try:
        until(lambda: traffic.acknowledged, "labels")
        resource.prlimit(daemon.process.pid, resource.RLIMIT_FSIZE, (0, limits[1]))
        with daemon.client() as client:

            def refused() -> bool:
                answer = client.predict(x[:1])
                try:
                    client.label([answer.prediction_id], [int(y[0])])
                except UnavailableError as error:
                    return "none was kept" in str(error) and error.retry_after_s is not None
                return False

            until(refused, "the refusal")
            saved = daemon.folder / "state" / "state.json"
            before = saved.stat().st_mtime_ns
            samples = status(daemon)["samples"]
            # Longer than it takes to save the state twice.
            until(lambda: status(daemon)["samples"] > samples + 1000, "a thousand answers")
            assert saved.stat().st_mtime_ns == before

            resource.prlimit(daemon.process.pid, resource.RLIMIT_FSIZE, limits)
            labels = len(traffic.acknowledged)
            until(lambda: len(traffic.acknowledged) > labels, "labels again")
            until(lambda: "state_saved_again" in daemon.log_path.read_text(), "the state on disk")
    finally:
        traffic.stop()

    assert traffic.failure is None
    assert traffic.refused == {}
    assert traffic.acknowledged <= labels_on_disk(daemon)


def test_two_daemons_cannot_share_a_state_folder(start_daemon: Callable[..., DaemonProcess]) -> None:
    """A second daemon on the same state folder ends with a message and leaves the first serving."""
    first = start_daemon()
    second = DaemonProcess(first.argv[4], first.folder, {})

    with pytest.raises(UnavailableError, match="in use by another daemon"):
        second.start()

    assert status(first)["state"] == "stable"


@pytest.fixture
def faults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in which `hang` keeps servers from computing, and `clock_ns` shifts every process's wall clock."""
    folder = tmp_path / "faults"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(SITE)
    monkeypatch.setenv("PYTHONPATH", str(folder), prepend=os.pathsep)
    return folder


def test_a_server_that_computes_nothing_is_ended(start_daemon: Callable[..., DaemonProcess], faults: Path) -> None:
    """An idle server that hangs while it still answers hello is not ready, then killed; its successor answers."""
    daemon = start_daemon(**{"daemon.worker_timeout_s": 12.0})
    before = status(daemon)["processes"]["server"]["pid"]
    (faults / "hang").touch()
    with daemon.client(90.0) as client:
        until(lambda: not client.daemon_ready(), "a server that is not ready", 40)
        until(lambda: '"process_hung"' in daemon.log_path.read_text(), "the end of its patience", 40)
        (faults / "hang").unlink()
        assert client.predict(digits("stream", 1, seed=14)[0]).version == 0
    assert status(daemon)["processes"]["server"]["pid"] != before


def test_a_wall_clock_that_jumps_does_no_harm(start_daemon: Callable[..., DaemonProcess], faults: Path) -> None:
    """Set back ten years, the clock gives no prediction id twice, over restarts of both; all labels join."""
    daemon = start_daemon()
    x, y = digits("stream", 8, seed=15)
    ids: list[int] = []

    def predict() -> None:
        with daemon.client(60.0) as client:
            answer = client.predict(x)
            assert min(answer.prediction_ids) > max(ids, default=0)
            ids.extend(answer.prediction_ids)
            assert client.label(answer.prediction_ids, y.tolist()) == ["joined"] * len(x)

    predict()
    (faults / "clock_ns").write_text(str(-10 * 365 * 86_400 * 10**9))
    predict()
    os.kill(status(daemon)["processes"]["server"]["pid"], signal.SIGKILL)
    predict()
    assert daemon.stop() == 0
    daemon.start()
    predict()
    (faults / "clock_ns").write_text(str(10 * 365 * 86_400 * 10**9))
    predict()

    assert status(daemon)["labels_buffered"] == len(ids) == 40
    assert labels_on_disk(daemon) == set(ids)
