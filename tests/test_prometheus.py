"""A real Prometheus scrapes a live daemon through a shift and its cure; the rules are held to their own tests."""

import contextlib
import re
import shutil
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from bench.panels import DEPLOY, Prometheus, queries
from tests.traffic import Traffic, status
from tests.waiting import until
from tta.packaging.digits import corrupt, digits
from tta.protocol import Rollback
from tta.scenario import DaemonProcess

pytestmark = pytest.mark.skipif(
    shutil.which("prometheus") is None or shutil.which("promtool") is None, reason="no prometheus on this machine"
)
ONLY_WITH_KEYS = {"tta_client_disagrees"}  # a series for each client that has ever disagreed, and there is none


@pytest.fixture
def watched(
    start_daemon: Callable[..., DaemonProcess], tmp_path: Path
) -> Iterator[tuple[DaemonProcess, Prometheus]]:
    """A daemon and the Prometheus that scrapes it."""
    daemon = start_daemon()
    prometheus = Prometheus(daemon, tmp_path)
    try:
        until(prometheus.sees_the_daemon, "the first scrape")
        yield daemon, prometheus
    finally:
        prometheus.stop()


def test_every_panel_and_rule_has_data(watched: tuple[DaemonProcess, Prometheus]) -> None:
    """After a shift, its cure and a rollback every query of panels, annotations and rules has returned data."""
    daemon, prometheus = watched
    began = time.time()
    x, y = digits("stream", 800, seed=9)
    traffic = Traffic(daemon, x, y)
    traffic.start()
    try:
        until(lambda: traffic.answered > 200, "clean traffic")
        traffic.show(corrupt(x, "noise", 1), y)
        until(lambda: (s := status(daemon)).get("version") and s["state"] == "stable", "the cure", 120)
        with daemon.client() as client:
            client.call(Rollback())
        until(lambda: prometheus.series('tta_swaps_total{reason="rollback"} > 0', began), "the rollback's scrape")

        def without_data() -> list[str]:
            rules = [r for group in prometheus.get("rules")["groups"] for r in group["rules"]]
            named = {name for r in rules for name in re.findall(r"\btta_[a-z_]+", r["query"])} - ONLY_WITH_KEYS
            wanted = {
                **{title: [query for query, _ in asked] for title, asked in queries().items()},
                "recording rules": [r["name"] for r in rules if r["type"] == "recording"],
                "named by rules": sorted(named),
            }
            bad = [f"{r['name']}: {r['lastError']}" for r in rules if r["health"] != "ok"]
            return bad + [
                f"{t}: {q}" for t, asked in wanted.items() for q in asked if not prometheus.series(q, began)
            ]

        with contextlib.suppress(TimeoutError):
            until(lambda: not without_data(), "data", 40)
        missing = without_data()
    finally:
        traffic.stop()

    assert missing == []
    assert len(queries()) > 25
    assert traffic.failure is None


def test_rules_do_what_their_tests_say() -> None:
    """Promtool finds alerts firing when, and only when, `deploy/rules_test.yml` says so, and tests every alert."""
    tested = set(re.findall(r"alertname: (\w+)", (DEPLOY / "rules_test.yml").read_text()))
    alerts = set(re.findall(r"alert: (\w+)", (DEPLOY / "alerts.yml").read_text()))

    done = subprocess.run(
        ["promtool", "test", "rules", str(DEPLOY / "rules_test.yml")], capture_output=True, text=True, timeout=60
    )

    assert done.returncode == 0, done.stdout + done.stderr
    assert tested == alerts


def test_the_scrape_passes_prometheus_own_linter(
    watched: tuple[DaemonProcess, Prometheus], tmp_path: Path
) -> None:
    """Promtool check metrics has nothing to say about what the daemon exports."""
    daemon, _ = watched
    with urllib.request.urlopen(f"http://{daemon.http}/metrics", timeout=10) as reply:
        text = reply.read()

    done = subprocess.run(["promtool", "check", "metrics"], input=text, capture_output=True, timeout=60)

    assert done.stdout + done.stderr == b""
    assert done.returncode == 0
