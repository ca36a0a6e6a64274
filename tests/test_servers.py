"""Several servers of one daemon: they answer, swap and recover as one."""

import os
import signal
import urllib.request
from collections.abc import Callable

import pytest

from tests.traffic import Traffic, status
from tests.waiting import until
from tta.client import Client
from tta.daemon.processes import is_alive
from tta.packaging.digits import corrupt, digits
from tta.scenario import DaemonProcess


def versions_served(daemon: DaemonProcess) -> list[int]:
    """By each server of a daemon, asked by itself."""
    x = digits("stream", 1, seed=5)[0]
    found = []
    for endpoint in daemon.endpoint.split(","):
        with Client(endpoint, daemon.control, timeout_s=5.0) as client:
            found.append(client.predict(x).version)
    return found


def metric(daemon: DaemonProcess, name: str) -> float:
    """A sample of the metrics page."""
    with urllib.request.urlopen(f"http://{daemon.http}/metrics") as page:
        lines = page.read().decode().splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(f"{name} "))


def test_two_servers_are_cured_together_and_one_comes_back_cured(
    start_daemon: Callable[..., DaemonProcess],
) -> None:
    """A cure reaches both servers; one that is killed comes back with it, the other answers meanwhile."""
    x, y = digits("stream", 1200, seed=14)
    daemon = start_daemon(n_servers=2)
    traffic = Traffic(daemon, corrupt(x, "noise", 4), y)
    traffic.start()
    try:
        cured = until(
            lambda: (s := status(daemon)) and s["state"] == "stable" and s["version"] > 0 and s,
            "the cure",
            120,
        )
        both = versions_served(daemon)
        victim = cured["processes"]["server1"]["pid"]
        os.kill(victim, signal.SIGKILL)
        answered = traffic.answered
        until(lambda: traffic.answered > answered + 50, "answers of the other")
        back = until(
            lambda: (s := status(daemon)) and s["processes"]["server1"]["ready"] and s["processes"]["server1"],
            "the return",
        )
        again = versions_served(daemon)
    finally:
        traffic.stop()

    assert both == [cured["version"]] * 2
    assert back["pid"] != victim
    assert back["restarts"] == 1
    assert again == both
    assert traffic.failure is None
    assert not traffic.refused
    # The totals of both servers, of the killed one's first process too (but for its last second).
    until(lambda: metric(daemon, "tta_images_total") >= traffic.answered - 200, "the counters")


def test_servers_left_by_a_daemon_are_adopted_together(start_daemon: Callable[..., DaemonProcess]) -> None:
    """After kill -9 of the daemon both servers answer on, and the next daemon takes over the same processes."""
    daemon = start_daemon(n_servers=2)
    pids = {name: p["pid"] for name, p in status(daemon)["processes"].items() if name.startswith("server")}
    assert daemon.process is not None
    daemon.process.kill()
    daemon.process.wait()

    alone = versions_served(daemon)
    daemon.start()
    after = {name: p["pid"] for name, p in status(daemon)["processes"].items() if name.startswith("server")}

    assert alone == [0, 0]
    assert set(pids) == {"server", "server1"}
    assert after == pids


@pytest.mark.parametrize("kept", [[0], [1], [1, 0]])
def test_other_endpoints_leave_no_server_behind(
    start_daemon: Callable[..., DaemonProcess], kept: list[int]
) -> None:
    """After kill -9 of the daemon and a start with one endpoint less, or another order, no old server is left."""
    daemon = start_daemon(n_servers=2)
    before = {p["pid"] for name, p in status(daemon)["processes"].items() if name.startswith("server")}
    assert daemon.process is not None
    daemon.process.kill()
    daemon.process.wait()
    old = daemon.endpoint
    daemon.endpoint = ",".join(old.split(",")[i] for i in kept)
    daemon.argv = [arg.replace(old, daemon.endpoint) for arg in daemon.argv]

    daemon.start()
    after = {p["pid"] for name, p in status(daemon)["processes"].items() if name.startswith("server")}

    assert versions_served(daemon) == [0] * len(kept)
    assert len(after) == len(kept)
    assert not any(is_alive(pid) for pid in before - after)
    assert (before & after != set()) == (kept == [0])


def test_prediction_ids_of_two_servers_never_meet(start_daemon: Callable[..., DaemonProcess]) -> None:
    """Ids of two servers differ by more than any run counts, stay exact in a double, and take their labels."""
    x, y = digits("stream", 2, seed=6)
    daemon = start_daemon(n_servers=2)
    ids = []
    for endpoint in daemon.endpoint.split(","):
        with Client(endpoint, daemon.control) as client:
            ids.append(client.predict(x[:1]).prediction_id)

    with daemon.client() as client:
        outcomes = client.label(ids, [int(y[0]), int(y[1])])

    assert ids[1] - ids[0] > 10**13
    assert all(float(i) == i and int(float(i)) == i for i in ids)
    assert outcomes == ["joined", "joined"]
