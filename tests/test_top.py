"""`tta top`, driven in a real terminal."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.traffic import Traffic, status
from tests.waiting import until
from tta.commands.top import Recent, quantile
from tta.packaging.digits import corrupt, digits
from tta.scenario import DaemonProcess

TMUX = shutil.which("tmux")


class Terminal:
    """A window of tmux in which a command runs."""

    def __init__(self, socket: Path, command: list[str]) -> None:
        self._socket = str(socket)
        self.tmux("-f", "/dev/null", "new-session", "-d", "-s", "top", "-x", "130", "-y", "44", *command)

    def tmux(self, *arguments: str) -> str:
        """Run tmux; its output."""
        assert TMUX is not None
        done = subprocess.run([TMUX, "-S", self._socket, *arguments], capture_output=True, text=True, timeout=20)
        return done.stdout

    def shown(self) -> str:
        """The text on the screen."""
        return self.tmux("capture-pane", "-p", "-t", "top")

    def press(self, keys: str) -> None:
        """Type."""
        self.tmux("send-keys", "-t", "top", keys)


@pytest.fixture
def terminal(tmp_path: Path) -> Iterator[Callable[[DaemonProcess], Terminal]]:
    """Open `tta top` of a daemon in a terminal."""
    if TMUX is None:
        pytest.skip("no tmux on this machine")
    opened: list[Terminal] = []

    def open_it(daemon: DaemonProcess) -> Terminal:
        command = [sys.executable, "-m", "tta", "top", "--control", daemon.control, "--every-s", "0.3"]
        opened.append(Terminal(tmp_path / "tmux", command))
        return opened[0]

    yield open_it
    for each in opened:
        each.tmux("kill-server")


def test_top_shows_a_shift_and_obeys_keys(
    start_daemon: Callable[..., DaemonProcess], terminal: Callable[[DaemonProcess], Terminal]
) -> None:
    """Traffic, state, drift and versions appear; keys pause, resume, roll back at the second press, and quit."""
    daemon = start_daemon()
    x, y = digits("stream", 800, seed=9)
    traffic = Traffic(daemon, corrupt(x, "noise", 1), y)
    traffic.start()
    try:
        screen = terminal(daemon)
        until(lambda: "digits  drifted" in screen.shown(), "the alarm on the screen")
        until(lambda: "█████████" in screen.shown() and "images/s" in screen.shown(), "bars")
        cured = until(lambda: status(daemon).get("version"), "a cure", 120)
        until(lambda: f"version {cured}" in screen.shown(), "the version on the screen")
        screen.press("p")
        until(lambda: status(daemon)["paused"] and "PAUSED" in screen.shown(), "the pause")
        screen.press("b")
        until(lambda: "press b again" in screen.shown(), "the question")
        assert status(daemon)["version"] == cured
        screen.press("b")
        until(lambda: status(daemon)["version"] == 0 and "version 0" in screen.shown(), "the rollback")
        screen.press("p")
        until(lambda: not status(daemon)["paused"], "the end of the pause")
        screen.press("y")
        screen.press("y")
        until(lambda: "no candidate" in screen.shown(), "why nothing can be approved")
        screen.press("q")
        until(lambda: "digits" not in screen.shown(), "the end")
    finally:
        traffic.stop()
    assert traffic.failure is None


def test_top_says_when_nobody_answers(
    start_daemon: Callable[..., DaemonProcess], terminal: Callable[[DaemonProcess], Terminal]
) -> None:
    """The screen stays, says since when there is no answer, and goes on when the daemon is back."""
    daemon = start_daemon()
    screen = terminal(daemon)
    until(lambda: "digits  stable" in screen.shown(), "the first look")
    daemon.stop()
    until(lambda: "no answer for" in screen.shown(), "the silence on the screen")
    daemon.start()

    until(lambda: "digits  stable" in screen.shown(), "the daemon on the screen again")


def test_looks_are_lines_of_json(start_daemon: Callable[..., DaemonProcess]) -> None:
    """`tta top --json` prints the status and the rates, a line a look."""
    daemon = start_daemon()
    x, _ = digits("stream", 100, seed=1)
    command = [sys.executable, "-m", "tta", "top", "--json", "--every-s", "0.2", "--control", daemon.control]
    with (
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process,
        daemon.client() as client,
    ):
        assert process.stdout is not None
        first = json.loads(process.stdout.readline())
        for image in x:
            client.predict(image)
        later = until(
            lambda: (look := json.loads(process.stdout.readline()))["traffic"]["images"] == 100 and look, "it"
        )
        process.terminate()

    assert first["traffic"]["images"] == 0
    assert (first["state"], first["p50_s"]) == ("stable", None)
    assert later["traffic"]["requests"] == {"ok": 100}
    assert later["images_per_s"] > 0
    assert 0 < later["p50_s"] <= later["p99_s"] <= later["traffic"]["bounds_s"][-1]


def test_quantiles_lie_within_their_bucket() -> None:
    """As Prometheus' histogram_quantile: even within a bucket, the last bound beyond it, nothing of nothing."""
    bounds = [1.0, 2.0, 4.0]

    assert quantile(0.5, bounds, [10, 0, 0, 0]) == 0.5
    assert quantile(0.5, bounds, [5, 0, 5, 0]) == 1.0
    assert quantile(0.75, bounds, [5, 0, 5, 0]) == 3.0
    assert quantile(0.99, bounds, [0, 0, 0, 7]) == 4.0
    assert quantile(0.5, bounds, [0, 0, 0, 0]) is None


def test_rates_begin_anew_with_another_daemon() -> None:
    """Totals that fall are those of a daemon that counts from zero: no rate is ever negative."""

    def totals(n: int) -> dict:
        return {"images": 2 * n, "rejected": {"unavailable": n}, "bounds_s": [1.0], "durations": [n, 0]}

    recent = Recent()
    recent.take(0.0, totals(100))
    steady = recent.take(5.0, totals(150))
    fallen = recent.take(6.0, totals(3))
    again = recent.take(8.0, totals(13))

    assert (steady.requests_per_s, steady.images_per_s, steady.refused_per_s) == (10.0, 20.0, 10.0)
    assert fallen.requests_per_s == 0.0
    assert again.requests_per_s == 5.0
