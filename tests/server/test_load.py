"""The load generator and `tta bench` against a real server."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import pytest

from tests.server.conftest import answering
from tta.client import Client
from tta.scenario import DaemonProcess
from tta.scenario.load import Load, Measured, Wire, drive
from tta.server.batcher import LEAST_RETRY_S
from tta.server.options import ServerOptions


def loaded(
    endpoint: str,
    batches: list[np.ndarray],
    load: Load,
    progress: Callable[[float, Measured], None] = lambda *_: None,
) -> Measured:
    """What came back of a load."""
    return drive(Wire([endpoint], batches, load), [len(b) for b in batches], load, progress)


def test_closed_loop_counts_every_answer(server: subprocess.Popen, options: ServerOptions, stream: tuple) -> None:
    """Every request of the measured time is answered, by the version in service, with its images counted."""
    batches = [stream[0][i : i + 2] for i in range(0, 64, 2)]
    told: list[float] = []
    measured = loaded(
        options.endpoint,
        batches,
        Load(outstanding=4, duration_s=0.5, warmup_s=0.1),
        lambda done, _: told.append(done),
    )
    report = measured.report()

    assert report["versions"].keys() == {"0"}
    assert report["answered"] == report["requests"] > 0
    assert measured.images == 2 * measured.requests
    assert (report["unanswered"], report["refused"]) == (0, {})
    assert told == sorted(told)
    assert told[-1] == 1.0


def test_open_loop_sends_what_is_due_whatever_comes_back(
    server: subprocess.Popen, options: ServerOptions, stream: tuple
) -> None:
    """A stopped server gets every request of the rate, and all are reported as unanswered."""
    os.kill(server.pid, signal.SIGSTOP)
    load = Load(rate=200.0, duration_s=0.25, warmup_s=0.0, timeout_s=0.1)
    stopped = loaded(options.endpoint, [stream[0][:1]], load)
    os.kill(server.pid, signal.SIGCONT)
    running = loaded(options.endpoint, [stream[0][:1]], Load(rate=100.0, duration_s=0.5, timeout_s=30.0))

    assert (stopped.sent, stopped.unanswered, stopped.requests) == (50, 50, 0)
    assert running.unanswered == 0
    assert sum(map(len, running.latencies_s.values())) == running.sent == 50


def test_refusals_are_counted_by_code(server: subprocess.Popen, options: ServerOptions, stream: tuple) -> None:
    """Deadlines that are over and shapes that do not fit are refused, counted, and no answers."""
    late = loaded(options.endpoint, [stream[0][:1]], Load(duration_s=0.2, warmup_s=0.0, deadline_s=-1.0)).report()
    wrong = loaded(options.endpoint, [np.zeros((1, 3, 3, 3), np.uint8)], Load(duration_s=0.2, warmup_s=0.0))

    assert late["answered"] == 0
    assert late["refused"].keys() == {"deadline_exceeded"}
    assert wrong.refused.keys() == {"invalid_argument"}


def test_a_closed_loop_waits_as_it_is_asked_to(options: ServerOptions, tmp_path: Path, stream: tuple) -> None:
    """Whoever is refused comes back no sooner than the server says: few are refused, nothing is lost."""
    load = Load(outstanding=16, duration_s=0.5, warmup_s=0.0)
    with answering(msgspec.structs.replace(options, queue_images=2), tmp_path):
        measured = loaded(options.endpoint, [stream[0][:1]], load)

    refused = measured.refused.get("resource_exhausted", 0)
    assert 0 < refused <= load.outstanding * (1 + load.duration_s / LEAST_RETRY_S)
    assert measured.unanswered == 0
    assert measured.requests > 0


@pytest.fixture
def daemon(start_daemon: Callable[..., DaemonProcess]) -> DaemonProcess:
    """A running daemon."""
    return start_daemon()


def test_tta_bench_reports_and_is_no_traffic(daemon: DaemonProcess) -> None:
    """The command prints a table or JSON, noise raises no alarm, and nobody there is one line and status 2."""

    def tta(*arguments: str) -> subprocess.CompletedProcess:
        argv = [sys.executable, "-m", "tta", "bench", "--duration-s", "0.5", "--warmup-s", "0.1", *arguments]
        return subprocess.run(argv, capture_output=True, text=True, timeout=60)

    machine = tta("--endpoint", daemon.endpoint, "--json", "--batch", "3", "--rate", "100")
    people = tta("--endpoint", daemon.endpoint, "--outstanding", "2")
    nobody = tta("--endpoint", "tcp://127.0.0.1:1", "--timeout-s", "0.2")
    with daemon.client() as client:
        status = client.status()
    with Client(daemon.endpoint, daemon.control) as client:
        metadata = client.metadata()

    report = json.loads(machine.stdout)
    assert (report["model"], report["batch"], report["rate"]) == (metadata["name"], 3, 100.0)
    assert report["requests"] == report["answered"] == 50
    assert "images/s" in people.stdout
    assert "refused: none" in people.stdout
    assert nobody.returncode == 2
    assert "is tta serving" in nobody.stderr
    assert status["state"] == "stable"
