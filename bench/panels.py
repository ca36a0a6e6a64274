"""What does the dashboard show while the traffic shifts, is cured, and comes home?

    python -m bench.panels

Needs `prometheus` on the path. A daemon serves digits, clean, then noisy, then clean again; a real Prometheus scrapes it
with the rules of `deploy/`; the main panels of the dashboard are drawn from that Prometheus's range queries, panel by
panel as Grafana asks for them. Writes `results/panels.png`.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

import yaml

from bench.digits import digits_bundle
from tta.packaging.digits import corrupt, digits
from tta.scenario import DaemonProcess, Phase, Scenario, free_ports

ROOT = Path(__file__).parents[1]
DEPLOY = ROOT / "deploy"
RESULTS = Path(__file__).parent / "results"
RATE = 100.0  # images a second
PHASES = (("clean", 40.0), ("noise", 70.0), ("clean again", 30.0))  # seconds
LABEL_SHARE = 0.25
SETTINGS: dict[str, Any] = {
    **{"adapt.labels": 200, "adapt.augment": ["crop"], "adapt.epochs": 6, "adapt.window": 512},
    **{"monitor.window": 256, "gate.probation_s": 2.0},
}
SHOWN = (  # of the dashboard's panels
    "Latency",
    "Drift over threshold, by block",
    "Kind of shift",
    "Version in service",
    "Accuracy on the last labels",
    "Labels still wanted",
)


class Prometheus:
    """A real one, which scrapes one daemon every second, with the rules of `deploy/`.

    Args:
        daemon: running.
        folder: for its configuration, data and log.
    """

    def __init__(self, daemon: DaemonProcess, folder: Path) -> None:
        (port,) = free_ports(1)
        self.url = f"http://127.0.0.1:{port}"
        config = yaml.safe_load((DEPLOY / "prometheus.yml").read_text())
        config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
        config["rule_files"] = [str(DEPLOY / name) for name in config["rule_files"]]
        config["scrape_configs"][0]["static_configs"][0]["targets"] = [daemon.http]
        path = folder / "prometheus.yml"
        path.write_text(yaml.safe_dump(config))
        flags = [f"--storage.tsdb.path={folder / 'data'}", f"--web.listen-address=127.0.0.1:{port}"]
        with (folder / "prometheus.log").open("wb") as log:
            command = ["prometheus", f"--config.file={path}", *flags]
            self.process = subprocess.Popen(command, stderr=log, stdout=log)

    def get(self, path: str, **fields: Any) -> Any:
        """The data that its API answers with."""
        address = f"{self.url}/api/v1/{path}?{urllib.parse.urlencode(fields)}"
        with urllib.request.urlopen(address, timeout=10) as reply:
            return json.load(reply)["data"]

    def sees_the_daemon(self) -> bool:
        """Whether a scrape has succeeded."""
        try:
            return any(each["health"] == "up" for each in self.get("targets")["activeTargets"])
        except OSError:
            return False

    def series(self, expression: str, since: float) -> list[dict[str, Any]]:
        """Series of a range query from `since` (Unix seconds) until now, a sample a second."""
        query = {"query": expression, "start": since, "end": time.time(), "step": "1s"}
        found: list[dict[str, Any]] = self.get("query_range", **query)["result"]
        return found

    def stop(self) -> None:
        """End it."""
        self.process.terminate()
        self.process.wait(20)


def queries() -> dict[str, list[tuple[str, str]]]:
    """Title of each panel and annotation of the dashboard to its queries, for all daemons, and their legends."""
    dashboard = json.loads((DEPLOY / "grafana" / "dashboards" / "tta.json").read_text())

    def for_all(query: str) -> str:
        return query.replace("$instance", ".*").replace("$__interval", "5s")

    found = {
        p["title"] if p["type"] != "stat" else f"{p['title']} now": [
            (for_all(t["expr"]), t["legendFormat"]) for t in p["targets"]
        ]
        for p in dashboard["panels"]
        if p["type"] != "row"
    }
    return found | {
        f"annotation {a['name']}": [(for_all(a["expr"]), a["titleFormat"])]
        for a in dashboard["annotations"]["list"]
    }


def drive(daemon: DaemonProcess) -> list[tuple[str, float]]:
    """Send the phases; their names and the Unix times at which they began."""
    x, y = digits("stream", 3000, seed=5)
    images = {"clean": x, "noise": corrupt(x, "noise", 1), "clean again": x}
    phases = [
        Phase(name, "none", images[name], y, LABEL_SHARE, len(x) * 10, False, int(RATE * seconds), float("inf"))
        for name, seconds in PHASES
    ]

    def show(scenario: Scenario) -> None:
        print(f"\r{scenario.phases[scenario.phase].name}: {scenario.seconds():.0f} s   ", end="", file=sys.stderr)

    scenario, began = Scenario(daemon, phases, RATE, view=show), time.time()
    scenario.run()
    print(file=sys.stderr)
    return [(phase.name, began + seconds) for phase, (_, seconds) in zip(phases, scenario.starts, strict=True)]


def draw(prometheus: Prometheus, began: list[tuple[str, float]], path: Path) -> None:
    """The panels of `SHOWN`, from range queries."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(3, 2, figsize=(12, 8), sharex=True, layout="constrained")
    since = began[0][1]
    asked = queries()
    marks = {
        "#b3261e": prometheus.series(asked["annotation Alarm"][0][0], since),
        "#1f6f4a": prometheus.series(asked["annotation Swap"][0][0], since),
    }
    for axis, title in zip(axes.flat, SHOWN, strict=True):
        lines = [
            (_legend(legend, series["metric"]), [(t - since, float(v)) for t, v in series["values"]])
            for expression, legend in asked[title]
            for series in prometheus.series(expression, since)
        ]
        for name, points in lines:
            times, values = zip(*points, strict=True)
            if title == "Kind of shift":
                axis.plot(times, [name or "none"] * len(times), "s", markersize=4, color="#2457a6")
            else:
                style = "steps-post" if title == "Version in service" else "default"
                axis.plot(times, values, linewidth=1.2, label=name, drawstyle=style)
        if title.startswith("Drift"):
            axis.set_yscale("log")
            axis.axhline(1, color="#b3261e", linewidth=1, linestyle="--")
        for colour, found in marks.items():
            for at in {at for series in found for at in _starts([t for t, _ in series["values"]])}:
                axis.axvline(at - since, color=colour, linewidth=0.8, alpha=0.6)
        for name, at in began[1:] if axis in axes[0] else []:
            axis.annotate(name, (at - since, 1.0), xycoords=("data", "axes fraction"), fontsize=8, color="#777")
        axis.set_title(title, fontsize=10, loc="left")
        axis.spines[["top", "right"]].set_visible(False)
        if title not in ("Kind of shift", "Version in service"):
            axis.legend(fontsize=7, frameon=False, ncols=2)
    for axis in axes[-1]:
        axis.set_xlabel("seconds; red: alarms, green: swaps")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _starts(times: list[float]) -> list[float]:
    """Where samples a second apart begin: a change is seen in each of the seconds that its query looks back."""
    return [at for before, at in zip([float("-inf"), *times], times, strict=False) if at - before > 1.5]


def _legend(text: str, metric: dict[str, str]) -> str:
    for name, value in metric.items():
        text = text.replace("{{" + name + "}}", value)
    return "" if text.startswith("{{") else text


def main() -> int:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the picture")
    arguments = parser.parse_args()
    if shutil.which("prometheus") is None:
        print("bench.panels: install prometheus (Debian: apt install prometheus)", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory(prefix="tta-panels-") as name:
        folder = Path(name)
        daemon = DaemonProcess(digits_bundle(), folder / "daemon", SETTINGS)
        daemon.start()
        prometheus = Prometheus(daemon, folder)
        try:
            while not prometheus.sees_the_daemon():
                time.sleep(0.2)
            began = drive(daemon)
            draw(prometheus, began, arguments.out / "panels.png")
        finally:
            prometheus.stop()
            daemon.stop()
    print(arguments.out / "panels.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
