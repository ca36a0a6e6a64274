"""What an operation costs, while the daemon serves: seconds by part and peak memory by process.

Used by `bench.cifar_loop`, which writes it into its results.
"""

import re
import urllib.request
from pathlib import Path
from typing import Any

from tta.scenario import DaemonProcess, Scenario

Json = dict[str, Any]
STEPS = ("alarm", "actionable", "enough_labels", "accepted", "swapped", "confirmed")
SUM = re.compile(r"^(tta_\w+_seconds)_sum\{phase=\"(\w+)\"\} ([\d.e+-]+)$", re.M)
COUNT = re.compile(r"^(tta_\w+_seconds)_count\{phase=\"(\w+)\"\} ([\d.e+-]+)$", re.M)


class Costs:
    """Watches a scenario: tell it of every look at the daemon."""

    def __init__(self, daemon: DaemonProcess) -> None:
        self.daemon = daemon
        self.peak_mib: dict[str, float] = {}

    def look(self, scenario: Scenario) -> None:
        """Note the peak memory of every process there is."""
        pids = {name: p["pid"] for name, p in scenario.status.get("processes", {}).items()}
        if self.daemon.process is not None:
            pids["daemon"] = self.daemon.process.pid
        for name, pid in pids.items():
            peak = _peak_mib(pid) if pid else None
            if peak is not None:
                self.peak_mib[name] = max(self.peak_mib.get(name, 0.0), peak)

    def report(self, scenario: Scenario) -> Json:
        """Mean seconds of a phase of an operation, the path of each promotion, peak memory.

        Returns:
            "phases_s": mean by phase as the daemon's own metrics have it; "promotions": for each, seconds from the
            alarm to every later step; "peak_mib": by process.
        """
        text = urllib.request.urlopen(f"http://{self.daemon.http}/metrics", timeout=5).read().decode()
        counts = {(m[1], m[2]): float(m[3]) for m in COUNT.finditer(text)}
        phases = {
            m[2]: round(float(m[3]) / counts[m[1], m[2]], 3) for m in SUM.finditer(text) if counts[m[1], m[2]]
        }
        promotions, began = [], {}
        for event in scenario.events:
            name = event["event"]
            if name == "alarm":
                began = {"alarm": event["time_s"]}
            elif name in STEPS and "alarm" in began and (name != "swapped" or event["reason"] == "promotion"):
                began.setdefault(name, event["time_s"])
                if name == "swapped":
                    promotions.append({k: round(began[k] - began["alarm"], 2) for k in STEPS if k in began})
        return {"phases_s": phases, "promotions": promotions, "peak_mib": self.peak_mib}


def _peak_mib(pid: int) -> float | None:
    try:
        found = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    except OSError:
        return None
    return round(int(found[1]) / 1024, 1) if found else None


def table(cost: Json) -> list[str]:
    """As Markdown."""
    lines = [
        "",
        "**What it costs** on two cores, the adapter niced, one thread, while 60 images a second are served",
        "",
    ]
    lines += ["| part | seconds, mean |", "| --- | --- |"]
    lines += [f"| {name} | {seconds:.2f} |" for name, seconds in sorted(cost["phases_s"].items())]
    lines += ["", "| promotion | " + " | ".join(STEPS[1:5]) + " |", "| --- |" + " --- |" * 4]
    for i, path in enumerate(cost["promotions"], 1):
        lines.append(
            f"| {i}, seconds after the alarm | " + " | ".join(f"{path.get(s, 0):.1f}" for s in STEPS[1:5]) + " |"
        )
    lines += ["", "| process | peak memory, MiB |", "| --- | --- |"]
    return [*lines, *(f"| {name} | {mib:.0f} |" for name, mib in sorted(cost["peak_mib"].items())), ""]
