"""Deployment files agree with the code."""

import importlib.util
import json
import re
from pathlib import Path

import pytest
import yaml
from grafana_foundation_sdk.models.dashboard import Dashboard
from prometheus_client import generate_latest

from tta.bundle import Bundle
from tta.commands import app
from tta.config import known_keys, load_config
from tta.daemon.metrics import Metrics
from tta.errors import ConfigError
from tta.server.options import BATCH_BUCKETS, DURATION_BUCKETS_S, Counters

ROOT = Path(__file__).parents[1]
DEPLOY = ROOT / "deploy"


def names_in(text: str) -> set[str]:
    """Metric names in a query."""
    return set(re.findall(r"\btta_[a-z_]+", text))


def exported(bundle: Bundle) -> set[str]:
    """Every sample name a daemon can export."""
    metrics = Metrics(bundle.manifest)
    metrics.adaptations.labels("block1", "accepted").inc()
    metrics.swaps.labels("promotion", "ok").inc()
    metrics.swap_s.labels("flip").observe(1)
    metrics.phase_s.labels("gate").observe(1)
    metrics.accuracy.labels("serving").set(1)
    metrics.transitions.labels("alarm").inc()
    metrics.gate_accuracy.labels("candidate", "gate").set(1)
    metrics.show_disagreeing(["anna"])
    metrics.server.update(
        Counters(
            epoch=1,
            requests={"ok": 1},
            rejected={"resource_exhausted": 1},
            undeliverable=0,
            repeated=0,
            images=1,
            batches=1,
            observations_dropped=0,
            queue_images=0,
            histograms={
                name: ([0] * (len(BATCH_BUCKETS if name == "batch_size" else DURATION_BUCKETS_S) + 1), 0.0)
                for name in (
                    "request_duration_seconds",
                    "queue_duration_seconds",
                    "compute_duration_seconds",
                    "batch_size",
                )
            },
        )
    )
    lines = generate_latest(metrics.registry).decode().splitlines()
    return {re.split(r"[ {]", line)[0] for line in lines if not line.startswith("#")}


def test_every_query_names_metrics_that_exist(bundle: Bundle) -> None:
    """Dashboard panels, annotations and alerts only ask for metrics the daemon exports."""
    dashboard = json.loads((DEPLOY / "grafana" / "dashboards" / "tta.json").read_text())
    queries = [t["expr"] for p in dashboard["panels"] for t in p.get("targets", [])]
    queries += [a["expr"] for a in dashboard["annotations"]["list"]]
    rules = yaml.safe_load((DEPLOY / "alerts.yml").read_text())
    queries += [r["expr"] for g in rules["groups"] for r in g["rules"]]

    asked = set().union(*map(names_in, queries))

    assert len(queries) > 20
    assert asked <= exported(bundle)


def test_the_dashboard_is_the_script_s() -> None:
    """dashboards/tta.json is what make_dashboard.py writes, and Grafana's own types read it."""
    path = DEPLOY / "grafana" / "make_dashboard.py"
    spec = importlib.util.spec_from_file_location("make_dashboard", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    written = json.loads((DEPLOY / "grafana" / "dashboards" / "tta.json").read_text())
    read = Dashboard.from_json(written)

    assert written == module.dashboard()
    assert read.panels is not None
    assert len({panel.id_val for panel in read.panels}) == len(read.panels) == len(written["panels"])


def test_server_totals_survive_a_restart(bundle: Bundle) -> None:
    """Counters go on rising when a new server starts from zero, over any number of restarts."""
    metrics = Metrics(bundle.manifest)

    def counters(epoch: int, images: int) -> Counters:
        buckets = {
            name: ([1] + [0] * len(BATCH_BUCKETS if name == "batch_size" else DURATION_BUCKETS_S), 0.5)
            for name in (
                "request_duration_seconds",
                "queue_duration_seconds",
                "compute_duration_seconds",
                "batch_size",
            )
        }
        return Counters(
            epoch=epoch,
            requests={"ok": images},
            rejected={},
            undeliverable=0,
            repeated=0,
            images=images,
            batches=1,
            observations_dropped=0,
            queue_images=0,
            histograms=buckets,
        )

    for epoch in (1, 2, 3, 4):
        metrics.server.update(counters(epoch, 5))
        metrics.server.update(counters(epoch, 10))

    assert metrics.registry.get_sample_value("tta_images_total") == 40
    assert metrics.registry.get_sample_value("tta_requests_total", {"code": "ok"}) == 40
    assert metrics.registry.get_sample_value("tta_request_duration_seconds_count") == 4


def test_scenario_configurations_hold_only_known_settings() -> None:
    """Every file in configs/ loads, docker's once it is said whether keys are asked for."""
    for path in (ROOT / "configs").glob("*.yaml"):
        load_config(path, {"security.plaintext": "true"} if path.name == "docker.yaml" else {})
    with pytest.raises(ConfigError, match=r"docker.yaml: daemon.control .* lets other machines in"):
        load_config(ROOT / "configs" / "docker.yaml")
    assert "adapt.labels" in known_keys()


def test_every_alert_says_what_to_do() -> None:
    """The operator's page has a section for each alert and no other, and names commands and settings there are."""
    page = (DEPLOY / "README.md").read_text()
    rules = yaml.safe_load((DEPLOY / "alerts.yml").read_text())
    alerts = [rule["alert"] for group in rules["groups"] for rule in group["rules"]]
    commands = {c.name or c.callback.__name__ for c in app.registered_commands if c.callback is not None}

    assert [h for h in re.findall(r"^## (\w+)$", page, re.MULTILINE) if h.startswith("Tta")] == alerts
    assert set(re.findall(r"`tta (\w+)", page)) <= commands
    settings = re.findall(r"`((?:adapt|daemon|server|security)\.\w+)", page)
    assert len(settings) > 5
    assert set(settings) <= set(known_keys())


def test_compose_points_at_files_that_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    """What compose mounts is in the repository, and Prometheus scrapes the daemon's port."""
    compose = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
    mounts = [
        v.split(":")[0] for s in compose["services"].values() for v in s.get("volumes", []) if v.startswith("./")
    ]
    prometheus = yaml.safe_load((DEPLOY / "prometheus.yml").read_text())

    assert len(mounts) >= 4
    assert all((DEPLOY / m).exists() for m in mounts)
    assert prometheus["scrape_configs"][0]["static_configs"][0]["targets"] == ["tta:9100"]
    for name, value in compose["services"]["tta"]["environment"].items():
        monkeypatch.setenv(name, value)
    assert load_config(ROOT / "configs" / "docker.yaml").daemon.http.endswith(":9100")
    dockerfile = (ROOT / "Dockerfile").read_text()
    assert f"AS {compose['services']['tta']['build']['target']}" in dockerfile
