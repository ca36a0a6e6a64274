"""Deployment files agree with the code."""

import importlib.util
import json
import re
import shutil
import subprocess
import sys
from importlib.metadata import requires
from pathlib import Path
from types import ModuleType

import kubernetes_validate
import pytest
import yaml
from grafana_foundation_sdk.models.dashboard import Dashboard
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from prometheus_client import generate_latest

from tta.bundle import Bundle
from tta.commands import app
from tta.config import known_keys, load_config
from tta.daemon.metrics import Metrics
from tta.errors import ConfigError
from tta.server.options import BATCH_BUCKETS, DURATION_BUCKETS_S, Counters

ROOT = Path(__file__).parents[1]
DEPLOY = ROOT / "deploy"
EXTRAS = ("", "daemon", "serve", "serve-cpu", "adapt")


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


def script(path: Path) -> ModuleType:
    """A script of `deploy/`, as a module."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_metric_is_in_the_reference(bundle: Bundle) -> None:
    """deploy/metrics.md is what make_metrics.py writes, and has every metric once."""
    page = (DEPLOY / "metrics.md").read_text()
    listed = re.findall(r"^\| `(\w+)`", page, re.MULTILINE)
    plain = {re.sub(r"_(bucket|count|sum|created)$", "", name) for name in exported(bundle)}

    assert page == script(DEPLOY / "make_metrics.py").document()
    assert len(listed) == len(set(listed))
    assert {name.removesuffix("_total") for name in plain} <= {name.removesuffix("_total") for name in listed}
    assert len(listed) > 40


def test_the_dashboard_is_the_script_s() -> None:
    """dashboards/tta.json is what make_dashboard.py writes, and Grafana's own types read it."""
    module = script(DEPLOY / "grafana" / "make_dashboard.py")
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


def test_kubernetes_takes_the_manifests() -> None:
    """Kubernetes' own schema has nothing against them, and ports, settings and labels are those of the daemon."""
    folder = DEPLOY / "kubernetes"
    names = yaml.safe_load((folder / "kustomization.yaml").read_text())["resources"]
    made = [each for name in names for each in yaml.safe_load_all((folder / name).read_text())]
    by_kind = {each["kind"]: each for each in made}
    pod = by_kind["StatefulSet"]["spec"]["template"]["spec"]
    config = load_config(folder / "tta.yaml")
    container, service = pod["containers"][0], by_kind["Service"]["spec"]["ports"]
    gpu = yaml.safe_load((folder / "gpu.yaml").read_text())["spec"]["template"]["spec"]["containers"][0]

    for each in made:
        if each["kind"] != "ServiceMonitor":  # the Prometheus operator's own, of which no schema is at hand
            kubernetes_validate.validate(each, kubernetes_validate.latest_version(), strict=True)
    labels = by_kind["StatefulSet"]["spec"]["template"]["metadata"]["labels"]
    selectors = [
        by_kind["StatefulSet"]["spec"]["selector"]["matchLabels"],
        by_kind["Service"]["spec"]["selector"],
        by_kind["NetworkPolicy"]["spec"]["podSelector"]["matchLabels"],
    ]
    assert selectors == [labels] * 3
    assert by_kind["ServiceMonitor"]["spec"]["selector"]["matchLabels"] == by_kind["Service"]["metadata"]["labels"]
    clients = [
        peer["podSelector"]["matchLabels"]
        for rule in by_kind["NetworkPolicy"]["spec"]["ingress"][:2]
        for peer in rule["from"]
    ]
    assert clients == [{"tta.io/client": "true"}, {"tta.io/operator": "true"}]
    # It would select clients by our name.
    assert "includeSelectors" not in (folder / "kustomization.yaml").read_text()
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert {port["name"]: port["port"] for port in service} == ports
    addresses = (config.server.endpoint, config.daemon.control, config.daemon.http)
    assert [int(address.rpartition(":")[2]) for address in addresses] == list(ports.values())
    mounted = {mount["mountPath"] for mount in container["volumeMounts"]}
    needed = (config.bundle, config.state, config.security.key, config.security.clients)
    assert all(mounted & {str(path), str(path and path.parent)} for path in needed)
    assert gpu["name"] == container["name"]
    assert by_kind["ServiceMonitor"]["spec"]["endpoints"][0]["port"] in ports


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="no systemd on this machine")
def test_systemd_takes_the_unit(tmp_path: Path) -> None:
    """systemd-analyze verify has nothing against the unit once tta is where it says."""
    unit = (DEPLOY / "systemd" / "tta.service").read_text()
    (tmp_path / "tta.service").write_text(unit.replace("/opt/tta/bin/tta", sys.executable))

    command = ["systemd-analyze", "verify", str(tmp_path / "tta.service")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)

    assert done.stdout + done.stderr == ""
    assert done.returncode == 0


def test_constraints_pin_what_is_installed() -> None:
    """Every pin of the images is a release that tta asks for, and nothing it needs is without one."""
    lines = (DEPLOY / "constraints.txt").read_text().splitlines()
    pinned = dict(line.split("==") for line in lines if not line.startswith("#"))
    needs = [Requirement(text) for text in requires("tta-daemon") or []]
    served = [n for n in needs if n.marker is None or any(n.marker.evaluate({"extra": e}) for e in EXTRAS)]

    assert len(served) > 10
    for need in served:
        if need.name != "tta-daemon":
            assert need.specifier.contains(pinned[canonicalize_name(need.name)], prereleases=True), need
