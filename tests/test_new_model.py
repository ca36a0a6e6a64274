"""Another model takes over, in the same daemon or beside it: nothing is lost, and each keeps its own."""

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save

from tests.rebundle import rebundle
from tests.waiting import until
from tta.bundle import Bundle, load_bundle
from tta.client import Client, Prediction
from tta.errors import InputError, UnavailableError
from tta.packaging import Recipe, package
from tta.packaging.digits import IMAGE_SHAPE, KWARGS, SOURCE, digits
from tta.packaging.source import build_model
from tta.process import is_alive
from tta.protocol import Deploy
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


class Sender:
    """Sends images one after another, and knows which of two models each answer is of.

    Attributes:
        by: the model of each answer: "old", "new" or "neither".
        ids: prediction ids, with the row that was sent.
        failures: what came instead of an answer.
    """

    def __init__(self, endpoint: str, control: str, bundles: tuple[Bundle, Bundle]) -> None:
        self.x, self.y = digits("stream", 64, seed=5)
        predictors = [Predictor(b, "cpu", 1) for b in bundles]
        self._of = [p.run_with(p.prepare(None), self.x).logits for p in predictors]
        self.by: list[str] = []
        self.ids: list[tuple[int, int]] = []
        self.failures: list[object] = []
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._send, args=(endpoint, control))

    def __enter__(self) -> "Sender":
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._done.set()
        self._thread.join(30)

    def _send(self, endpoint: str, control: str) -> None:
        with Client(endpoint, control, timeout_s=20) as client:
            number = 0
            while not self._done.is_set():
                pending = {client.submit(self.x[(number + i) % 64]): (number + i) % 64 for i in range(4)}
                number += 4
                while pending:
                    for request, answer in client.results(5.0):
                        self._take(pending.pop(request), answer)

    def _take(self, row: int, answer: object) -> None:
        if not isinstance(answer, Prediction):
            self.failures.append(answer)
            return
        near = [float(np.abs(answer.logits[0] - logits[row]).max()) for logits in self._of]
        self.ids.append((answer.prediction_id, row))
        self.by.append("old" if near[0] < 1e-3 else "new" if near[1] < 1e-3 else "neither")

    def more(self, n: int) -> int:
        """Wait for so many answers more; how many there were before."""
        mark = len(self.by)
        until(lambda: len(self.by) > mark + n, "traffic")
        return mark


def tta(daemon: DaemonProcess, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run a command against a daemon."""
    argv = [sys.executable, "-m", "tta", *map(str, arguments), "--control", daemon.control]
    return subprocess.run(argv, capture_output=True, text=True, timeout=120, check=False)


def anywhere(bundle: Bundle) -> dict[str, str]:
    """Setting by which bundles are taken from all the tests' folders."""
    return {"daemon.bundles": str(bundle.path.parents[1])}


def status(daemon: DaemonProcess) -> dict[str, Any]:
    """What the daemon says of itself."""
    with daemon.client() as client:
        return client.status()


def server_of(daemon: DaemonProcess) -> int:
    """Process id of the server, as its log line says; also when the daemon is gone."""
    lines = [json.loads(line) for line in daemon.log_path.read_text().splitlines() if "server_ready" in line]
    return int(lines[-1]["pid"])


def test_a_model_is_deployed_under_load_and_the_former_comes_back(
    start_daemon: Callable[..., DaemonProcess], bundle: Bundle, retrained: Bundle
) -> None:
    """Every request is answered, by the old model, then the new, then the old, which finds its labels again."""
    daemon = start_daemon(**anywhere(bundle))
    with Sender(daemon.endpoint, daemon.control, (bundle, retrained)) as sender:
        sender.more(100)
        ids, rows = map(list, zip(*sender.ids[-20:], strict=True))
        with daemon.client() as client:
            assert client.label(ids, [int(sender.y[row]) for row in rows]) == ["joined"] * 20
        before = set(sender.by)
        deployed = tta(daemon, "deploy", retrained.path)
        new_from = sender.more(200)
        with daemon.client() as client:
            assert set(client.label(ids, [int(sender.y[row]) for row in rows])) <= {"expired", "unknown"}
        new = status(daemon)
        back = tta(daemon, "deploy", bundle.path, "--json")
        old_from = sender.more(200)
        old = status(daemon)

    assert sender.failures == []
    assert deployed.returncode == 0, deployed.stderr
    assert f"retrained ({retrained.sha256[:12]}…) serves" in deployed.stdout
    assert before == {"old"}
    assert set(sender.by[new_from + 20 : new_from + 200]) == {"new"}
    assert set(sender.by[old_from + 20 :]) == {"old"}
    assert "neither" not in sender.by
    assert len({number for number, _ in sender.ids}) == len(sender.ids)
    assert (new["bundle_sha256"], new["name"], new["labels_buffered"]) == (retrained.sha256, "retrained", 0)
    assert json.loads(back.stdout)["bundle_sha256"] == bundle.sha256
    assert (old["bundle_sha256"], old["labels_buffered"]) == (bundle.sha256, 20)


def test_a_bundle_that_cannot_be_served_leaves_the_present_one_in_service(
    start_daemon: Callable[..., DaemonProcess], bundle: Bundle, tmp_path: Path
) -> None:
    """A model that the runtime refuses: the old server answers throughout, and the command says what was wrong."""
    bad = rebundle(bundle.path, tmp_path / "bad.tta", {"model.onnx": b"no graph"}, name="bad")
    daemon = start_daemon(**anywhere(bundle))
    server = status(daemon)["processes"]["server"]["pid"]
    with Sender(daemon.endpoint, daemon.control, (bundle, bundle)) as sender:
        sender.more(50)
        refused = tta(daemon, "deploy", bad)
        sender.more(50)

    assert refused.returncode == 2
    assert "the former bundle serves on: the server did not start: the graph of" in refused.stderr
    assert (sender.failures, set(sender.by)) == ([], {"old"})
    after = status(daemon)
    assert (after["bundle_sha256"], after["processes"]["server"]["pid"]) == (bundle.sha256, server)
    # Traffic goes on meanwhile: it may raise an alarm after the refusal.
    assert "deploy_failed" in [event["event"] for event in after["events"]]
    assert after["samples"] > 50  # the very same daemon, which knows its predictions still


def test_a_bundle_that_fails_at_the_last_step_gives_everything_back(
    start_daemon: Callable[..., DaemonProcess], bundle: Bundle, tmp_path: Path
) -> None:
    """A model that serves but cannot be watched: the present one answers on, and has its labels still."""
    reference = {name: array for name, array in bundle.reference.items() if name != "cut"}
    bad = rebundle(bundle.path, tmp_path / "bad.tta", {"reference.safetensors": save(reference)}, name="bad")
    daemon = start_daemon(**anywhere(bundle))
    server = server_of(daemon)
    with Sender(daemon.endpoint, daemon.control, (bundle, bundle)) as sender:
        sender.more(50)
        ids, rows = map(list, zip(*sender.ids[-20:], strict=True))
        with daemon.client() as client:
            assert client.label(ids, [int(sender.y[row]) for row in rows]) == ["joined"] * 20
        refused = tta(daemon, "deploy", bad)
        sender.more(50)

    assert refused.returncode == 2
    assert "the former bundle serves on: 'cut'" in refused.stderr
    assert (sender.failures, set(sender.by)) == ([], {"old"})
    after = status(daemon)
    assert (after["bundle_sha256"], after["labels_buffered"]) == (bundle.sha256, 20)
    assert after["processes"]["server"]["pid"] == server
    state = daemon.folder / "state"
    assert list((state / "former").glob("*")) == []
    assert [p.name for p in (state / "bundles").iterdir()] == [f"{bundle.sha256[:16]}.tta"]


def test_what_is_not_to_be_deployed_is_refused(
    start_daemon: Callable[..., DaemonProcess], bundle: Bundle, tmp_path: Path
) -> None:
    """The present bundle, none, a damaged one, and one that clients would notice: errors, and nothing changes."""
    daemon = start_daemon(**anywhere(bundle))
    other = rebundle(bundle.path, tmp_path / "other.tta", classes=[f"digit {i}" for i in range(10)])
    damaged = tmp_path / "damaged.tta"
    damaged.write_bytes(bundle.path.read_bytes()[:-2000])
    for path, why in (
        (bundle.path, "is the bundle in service"),
        (tmp_path / "none.tta", "no such bundle"),
        (damaged, "damaged.tta"),
        (other, "clients would notice: 10 classes, without 0, 1, 2, 3, 4 and with digit 0"),
    ):
        refused = tta(daemon, "deploy", path)
        assert refused.returncode == 2, path
        assert why in refused.stderr
    elsewhere = tmp_path / "elsewhere.tta"
    elsewhere.symlink_to("/dev/shm/other.tta")
    for path, why in (("other.tta", "absolute path"), ("/etc/passwd", "taken from"), (elsewhere, "taken from")):
        with daemon.client() as client, pytest.raises(InputError, match=why):
            client.call(Deploy(bundle=str(path)))
    assert status(daemon)["bundle_sha256"] == bundle.sha256

    forced = tta(daemon, "deploy", other, "--force")
    assert forced.returncode == 0, forced.stderr
    with daemon.client() as client:
        assert client.metadata()["classes"][0] == "digit 0"


def test_a_deployed_model_serves_over_a_crash_of_the_daemon(
    start_daemon: Callable[..., DaemonProcess], bundle: Bundle, retrained: Bundle
) -> None:
    """Started again with the old configuration after kill -9, a daemon serves what was deployed, and says so."""
    daemon = start_daemon(**anywhere(bundle))
    assert tta(daemon, "deploy", retrained.path).returncode == 0
    retrained.path.unlink()
    with Sender(daemon.endpoint, daemon.control, (bundle, retrained)) as sender:
        sender.more(20)
        assert daemon.process is not None
        daemon.process.kill()
        daemon.process.wait()
        os.kill(server_of(daemon), signal.SIGKILL)
        daemon.start()
        sender.more(50)

    assert (sender.failures, set(sender.by)) == ([], {"new"})
    assert status(daemon)["bundle_sha256"] == retrained.sha256
    assert "configuration_outdated" in daemon.log_path.read_text()


def test_a_server_with_other_settings_succeeds_the_one_that_outlived_its_daemon(
    start_daemon: Callable[..., DaemonProcess], bundle: Bundle
) -> None:
    """The former server answers until the next is warm: all requests are answered, over the exchange too."""
    daemon = start_daemon(**anywhere(bundle))
    former = server_of(daemon)
    with Sender(daemon.endpoint, daemon.control, (bundle, bundle)) as sender:
        sender.more(50)
        assert daemon.process is not None
        daemon.process.kill()
        daemon.process.wait()
        daemon.argv += ["--set", "server.max_batch_size=8"]
        daemon.start()
        sender.more(50)

    assert sender.failures == []
    assert server_of(daemon) != former
    assert not is_alive(former)
    (succeeded,) = (line for line in daemon.log_path.read_text().splitlines() if "server_succeeds" in line)
    assert json.loads(succeeded)["pid"] == former


def test_serve_deploy_puts_the_state_of_another_bundle_aside(
    start_daemon: Callable[..., DaemonProcess], bundle: Bundle, retrained: Bundle
) -> None:
    """A state folder of another bundle is refused, the error names `--deploy`, and with it the new one serves."""
    daemon = start_daemon(**anywhere(bundle))
    until(lambda: (daemon.folder / "state" / "state.json").exists(), "state on disk")
    daemon.stop()
    daemon.argv[daemon.argv.index(str(bundle.path))] = str(retrained.path)
    with pytest.raises(UnavailableError, match=r"belongs to another bundle.*start with --deploy"):
        daemon.start()
    daemon.argv.append("--deploy")
    daemon.start()

    assert status(daemon)["bundle_sha256"] == retrained.sha256
    assert [p.name for p in (daemon.folder / "state" / "former").iterdir()] == [bundle.sha256[:16]]


def pids_of(name: str, daemon: DaemonProcess) -> list[int]:
    """Process ids in a daemon's log, of processes that it started under this name."""
    lines = [json.loads(line) for line in daemon.log_path.read_text().splitlines() if "process_started" in line]
    return [line["pid"] for line in lines if line["name"] == name]


def begin_deploying(daemon: DaemonProcess, path: Path) -> int:
    """Deploy, and return while the new server loads; its process id."""
    with daemon.client() as client:
        client.call(Deploy(bundle=str(path)))
    return pids_of("standby0", daemon)[-1]


def test_a_stop_during_a_deployment_stops_everything(
    start_daemon: Callable[..., DaemonProcess], bundle: Bundle, retrained: Bundle
) -> None:
    """SIGTERM while the new server loads ends daemon, old server and new server, with exit status 0."""
    daemon = start_daemon(**anywhere(bundle))
    old, new = server_of(daemon), begin_deploying(daemon, retrained.path)

    assert daemon.stop() == 0
    until(lambda: not is_alive(old) and not is_alive(new), "the end of both servers")
    daemon.start()
    assert status(daemon)["bundle_sha256"] == bundle.sha256


def test_a_daemon_killed_during_a_deployment_leaves_the_old_server_alone(
    start_daemon: Callable[..., DaemonProcess], bundle: Bundle, retrained: Bundle
) -> None:
    """Kill -9 of the daemon while the new server loads: that goes too, the old one answers and is adopted."""
    daemon = start_daemon(**anywhere(bundle))
    old = server_of(daemon)
    with Sender(daemon.endpoint, daemon.control, (bundle, retrained)) as sender:
        sender.more(20)
        new = begin_deploying(daemon, retrained.path)
        assert daemon.process is not None
        daemon.process.kill()
        daemon.process.wait()
        until(lambda: not is_alive(new), "the end of the new server")
        daemon.start()
        sender.more(50)

    assert (sender.failures, set(sender.by)) == ([], {"old"})
    assert status(daemon)["processes"]["server"]["pid"] == old


def test_a_server_that_hangs_is_succeeded_too(
    start_daemon: Callable[..., DaemonProcess], bundle: Bundle, retrained: Bundle
) -> None:
    """The old server is stopped by SIGSTOP and answers nothing: it is killed for its endpoint; the new serves."""
    daemon = start_daemon(**anywhere(bundle), **{"server.drain_s": 1.0})
    old = server_of(daemon)
    os.kill(old, signal.SIGSTOP)

    deployed = tta(daemon, "deploy", retrained.path)

    assert deployed.returncode == 0, deployed.stderr
    assert not is_alive(old)
    with daemon.client() as client:
        assert client.metadata()["name"] == "retrained"


def test_several_servers_are_succeeded_together(
    start_daemon: Callable[..., DaemonProcess], bundle: Bundle, retrained: Bundle
) -> None:
    """With two servers both give way to the new model's, under load, and nothing is lost."""
    daemon = start_daemon(n_servers=2, **anywhere(bundle))
    with Sender(daemon.endpoint, daemon.control, (bundle, retrained)) as sender:
        sender.more(50)
        deployed = tta(daemon, "deploy", retrained.path)
        mark = sender.more(100)

    assert deployed.returncode == 0, deployed.stderr
    assert sender.failures == []
    assert set(sender.by[mark + 20 :]) == {"new"}
    processes = status(daemon)["processes"]
    assert {processes[name]["pid"] for name in ("server", "server1")} == {
        pids_of(f"standby{number}", daemon)[-1] for number in (0, 1)
    }


def test_a_retrained_model_takes_over_from_a_daemon_beside_it(
    start_daemon: Callable[..., DaemonProcess], bundle: Bundle, retrained: Bundle, tmp_path: Path
) -> None:
    """Start the new daemon beside the old, stop the old: all requests are answered, in the end by the new."""
    old = start_daemon()
    new = DaemonProcess(retrained.path, tmp_path / "new", {})
    try:
        with Sender(f"{old.endpoint},{new.endpoint}", old.control, (bundle, retrained)) as sender:
            sender.more(100)
            before = set(sender.by)
            new.start()
            until(lambda: "new" in sender.by, "answers of the new model")
            old.stop()
            mark = sender.more(200)
    finally:
        new.stop()

    assert sender.failures == []
    assert before == {"old"}
    assert set(sender.by) == {"old", "new"}
    assert set(sender.by[mark + 20 :]) == {"new"}
