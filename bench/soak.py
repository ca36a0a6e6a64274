"""An hour at 60 % load, shifting, adapting and rolling back all the while: does anything grow?

    python -m bench.soak [--minutes 60] [--share 0.6]

A daemon serves the digits; first how many requests a second it, its client and everything else can do together on the
machine's cores (closed loop, all of them watched), then `share` of that in an open loop. The pictures change by turns
between clean ones and twelve shifts; a twentieth of the answers is labelled. Once a shift is cured an operator rolls
back, resets, or lets it be, by turns: a cure that was rolled back is forgotten, so that the next time it is made anew.
Every ten seconds: latencies, and of each process its memory and open files, and what the state folder holds, whose
retention is set low enough to be reached. Writes `results/soak.{json,md,png}`.
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from bench.digits import digits_bundle
from bench.stamp import stamp
from tta import protocol
from tta.client import Client, Prediction
from tta.errors import TTAError
from tta.packaging.digits import corrupt, digits
from tta.process import memory_bytes
from tta.scenario import DaemonProcess

RESULTS = Path(__file__).parent / "results"
SETTINGS: dict[str, Any] = {
    **{"adapt.labels": 96, "adapt.retry_labels": 24, "adapt.augment": ["crop"], "adapt.epochs": 4},
    "adapt.window": 512,
    **{"monitor.window": 256, "gate.probation_s": 1.0},
    **{"labels.capacity": 4000, "library.capacity": 8, "library.images": 256, "library.versions": 16},
}
LABEL_EVERY = 20
SAMPLE_S = 10.0
CLEAN_S, CURED_S = 10.0, 10.0  # seconds of clean pictures, and of a cured shift
LIMIT_S = 120.0  # seconds a shift may take to be cured
BY_TURNS = ("rollback", "nothing", "reset")  # what the operator does then
CAPACITY_S = 15.0  # seconds of the closed loop
UNANSWERED, MAX_UNANSWERED = 64, 2000  # in the closed loop, and in the open one

Json = dict[str, Any]
Array = Any


def shifts(x: Array, y: Array) -> dict[str, tuple[Array, Array]]:
    """Name to pictures and what they show; the first is clean."""
    low = (x.astype(np.float32) * 0.3 + 20).astype(np.uint8)
    bright = np.clip(x.astype(np.int16) + 90, 0, 255).astype(np.uint8)
    coarse = x[:, ::4, ::4].repeat(4, axis=1).repeat(4, axis=2)
    striped = x.copy()
    striped[:, ::3] = 255
    images = {
        "clean": x,
        "noise": corrupt(x, "noise", 1),
        "blur": corrupt(x, "blur", 1),
        "low contrast": low,
        "inverted": 255 - x,
        "bright": bright,
        "coarse": coarse,
        "striped": striped,
        "turned": np.rot90(x, 1, axes=(1, 2)),
        "mirrored": x[:, :, ::-1],
        "noisy and dark": corrupt(low, "noise", 2),
        "blurred and inverted": corrupt(255 - x, "blur", 3),
    }
    found = {name: (np.ascontiguousarray(each), y) for name, each in images.items()}
    return {**found, "other labels": (x, 9 - y)}


class Traffic:
    """One client that asks at a steady rate and labels some of the answers, in the thread that calls `run`."""

    def __init__(
        self,
        daemon: DaemonProcess,
        shown: dict[str, tuple[Array, Array]],
        rate: float,
        unanswered: int = MAX_UNANSWERED,
    ) -> None:
        self._daemon, self._shown, self._rate, self._most = daemon, shown, rate, unanswered
        self.show = "clean"
        self.sent = self.answered = 0
        self.refused: Counter[str] = Counter()
        self.unanswered = 0
        self.versions: Counter[int] = Counter()
        self.latencies_s: list[float] = []  # since they were taken last
        self.labels: deque[tuple[int, int]] = deque(maxlen=200)
        self._random = np.random.default_rng(0)
        self.right = [0, 0]  # right, of all, since taken last

    def run(self, until: Callable[[], bool]) -> None:
        """Send until then, and wait for what is due."""
        due: dict[int | str, tuple[float, int]] = {}
        began = time.monotonic()
        with Client(self._daemon.endpoint, self._daemon.control, timeout_s=30.0) as client:
            while due or not until():
                now = time.monotonic()
                while not until() and began + self.sent / self._rate <= now and len(due) < self._most:
                    x, y = self._shown[self.show]
                    i = int(self._random.integers(len(y)))
                    due[client.submit(x[i])] = (began + self.sent / self._rate, int(y[i]))
                    self.sent += 1
                for request, answer in client.results(0.001):
                    at, label = due.pop(request)
                    self._take(answer, time.monotonic() - at, label)
                if until() and time.monotonic() - now > 30:
                    break
        self.unanswered = len(due)

    def _take(self, answer: Prediction | Exception, latency_s: float, label: int) -> None:
        if not isinstance(answer, Prediction):
            self.refused[getattr(getattr(answer, "code", None), "name", type(answer).__name__).lower()] += 1
            print(f"refused after {latency_s:.3f} s: {answer}", file=sys.stderr, flush=True)
            return
        self.answered += 1
        self.versions[answer.version] += 1
        self.latencies_s.append(latency_s)
        self.right[0] += int(answer.classes[0]) == label
        self.right[1] += 1
        if self.answered % LABEL_EVERY == 0:
            self.labels.append((answer.prediction_id, label))


class Operator(threading.Thread):
    """Labels, changes the pictures, and rolls back or resets."""

    def __init__(self, daemon: DaemonProcess, traffic: Traffic, names: list[str], done: threading.Event) -> None:
        super().__init__(daemon=True)
        self._daemon, self._traffic, self._names, self._done = daemon, traffic, names, done
        self.cycles: list[Json] = []
        self.n_labels = 0
        self.failure = ""

    def run(self) -> None:
        """The thread."""
        with Client(self._daemon.endpoint, self._daemon.control, timeout_s=20.0) as client:
            number = 0
            while not self._done.is_set():
                try:
                    self._cycle(client, self._names[number % len(self._names)], BY_TURNS[number % len(BY_TURNS)])
                except TTAError as error:  # told in the report
                    self.failure = repr(error)
                number += 1

    def _for(self, client: Client, seconds: float, until: Callable[[Json], bool] = lambda status: False) -> bool:
        """Label until the status is so, or for so long; whether it was."""
        end = time.monotonic() + seconds
        while time.monotonic() < end and not self._done.wait(0.25):
            rows = [self._traffic.labels.popleft() for _ in range(min(64, len(self._traffic.labels)))]
            if rows:
                outcomes = client.label([i for i, _ in rows], [label for _, label in rows])
                self.n_labels += sum(outcome == "joined" for outcome in outcomes)
            if until(client.status()):
                return True
        return False

    def _cycle(self, client: Client, name: str, then: str) -> None:
        self._traffic.show = "clean"
        self._for(client, LIMIT_S, lambda s: s["state"] == "stable" and s["regime"] == 0)
        self._for(client, CLEAN_S)
        before = client.status()["version"]
        self._traffic.show = name
        began = time.monotonic()
        cured = self._for(client, LIMIT_S, lambda s: s["state"] == "stable" and s["version"] != before)
        took = time.monotonic() - began
        self._for(client, CURED_S)
        if self._done.is_set():
            return
        if cured and then == "rollback":
            client.call(protocol.Rollback())
        elif cured and then == "reset":
            client.call(protocol.Reset())
        self.cycles.append(
            {"shift": name, "cured_s": round(took, 1) if cured else None, "then": then if cured else ""}
        )


def processes(status: Json, daemon_pid: int) -> dict[str, int]:
    """Name to pid of those that run."""
    found = {name: p["pid"] for name, p in status.get("processes", {}).items() if p["pid"]}
    return {"daemon": daemon_pid, **found}


def measure(pid: int) -> Json | None:
    """Resident memory in bytes and the number of open files; None if it has gone."""
    try:
        return {"pid": pid, "rss": memory_bytes(pid), "files": len(os.listdir(f"/proc/{pid}/fd"))}
    except OSError:
        return None


def on_disk(folder: Path) -> tuple[dict[str, int], int]:
    """Bytes of each thing in a folder, and how many versions are kept."""
    sizes: Counter[str] = Counter()
    for path in folder.rglob("*"):
        try:
            sizes[path.relative_to(folder).parts[0]] += path.stat().st_size if path.is_file() else 0
        except FileNotFoundError:
            continue
    return dict(sizes), sum(1 for _ in folder.glob("versions/[0-9]*"))


class Sampler(threading.Thread):
    """Looks at everything now and then."""

    def __init__(self, daemon: DaemonProcess, traffic: Traffic, minutes: float, done: threading.Event) -> None:
        super().__init__(daemon=True)
        self._daemon, self._traffic, self._minutes, self._done = daemon, traffic, minutes, done
        self.samples: list[Json] = []

    def run(self) -> None:
        """The thread."""
        began = time.monotonic()
        assert self._daemon.process is not None
        with Client(self._daemon.endpoint, self._daemon.control, timeout_s=20.0) as client:
            while not self._done.wait(SAMPLE_S):
                status = client.status()
                latencies, self._traffic.latencies_s = self._traffic.latencies_s, []
                right, self._traffic.right = self._traffic.right, [0, 0]
                parts, n_versions = on_disk(self._daemon.folder / "state")
                found = {n: measure(pid) for n, pid in processes(status, self._daemon.process.pid).items()}
                p50, p99 = np.quantile(latencies, (0.5, 0.99)) if latencies else (np.nan, np.nan)
                self.samples.append(
                    {
                        "at_s": round(time.monotonic() - began, 1),
                        "p50": float(p50),
                        "p99": float(p99),
                        "answered": len(latencies),
                        "accuracy": right[0] / max(1, right[1]),
                        "shown": self._traffic.show,
                        "version": status["version"],
                        "state": status["state"],
                        "disk": sum(parts.values()),
                        "parts": parts,
                        "versions": n_versions,
                        "processes": {name: m for name, m in found.items() if m},
                    }
                )
                if len(self.samples) % 6 == 0:
                    s = self.samples[-1]
                    print(
                        f"{s['at_s'] / 60:.0f} of {self._minutes:.0f} min: {s['shown']}, version {s['version']}, "
                        f"p50 {1e3 * s['p50']:.2f} ms, p99 {1e3 * s['p99']:.1f} ms",
                        file=sys.stderr,
                        flush=True,
                    )


def transitions(log: Path) -> dict[str, int]:
    """How often each thing has happened, by the daemon's log."""
    found: Counter[str] = Counter()
    for line in log.read_text().splitlines():
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if entry.get("event") == "transition":
            found[entry["what"]] += 1
    return dict(found)


def run(minutes: float, share: float) -> Json:
    """The whole hour."""
    x, y = digits("stream", 1200, seed=31)
    shown = shifts(x, y)
    with tempfile.TemporaryDirectory(prefix="tta-soak-") as folder:
        daemon = DaemonProcess(digits_bundle(), Path(folder) / "daemon", SETTINGS)
        daemon.start()
        try:
            full = Traffic(daemon, shown, float("inf"), UNANSWERED)
            end = time.monotonic() + CAPACITY_S
            full.run(lambda: time.monotonic() >= end)
            capacity = full.answered / CAPACITY_S
            done = threading.Event()
            traffic = Traffic(daemon, shown, share * capacity)
            operator = Operator(daemon, traffic, [name for name in shown if name != "clean"], done)
            sampler = Sampler(daemon, traffic, minutes, done)
            operator.start()
            sampler.start()
            end = time.monotonic() + 60 * minutes
            traffic.run(lambda: time.monotonic() >= end)
            done.set()
            operator.join(30)
            sampler.join(30)
            with daemon.client() as client:
                last = client.status()
            return {
                "minutes": minutes,
                "share": share,
                "capacity": capacity,
                "settings": SETTINGS,
                "sent": traffic.sent,
                "answered": traffic.answered,
                "refused": dict(traffic.refused),
                "unanswered": traffic.unanswered,
                "versions_answering": len(traffic.versions),
                "labels": operator.n_labels,
                "operator_failed": operator.failure,
                "cycles": operator.cycles,
                "events": transitions(daemon.log_path),
                "restarts": {name: p["restarts"] for name, p in last["processes"].items()},
                "tracebacks": daemon.log_path.read_text().count("Traceback"),
                "samples": sampler.samples,
            }
        finally:
            daemon.stop()
            shutil.copy(daemon.log_path, Path(tempfile.gettempdir()) / "tta-soak.log")


def compared(result: Json) -> list[tuple[str, str, float, float]]:
    """What is measured, its unit, the median of the second sixth and of the last: the first sixth fills buffers."""
    samples = result["samples"]
    sixth = max(1, len(samples) // 6)
    early, late = samples[sixth : 2 * sixth] or samples, samples[-sixth:]

    def medians(of: Callable[[Json], float | None]) -> tuple[float, float]:
        found = [[v for v in map(of, part) if v is not None] for part in (early, late)]
        return tuple(float(np.median(values)) if values else float("nan") for values in found)  # type: ignore[return-value]

    rows = [("p50", "ms", *medians(lambda s: 1e3 * s["p50"])), ("p99", "ms", *medians(lambda s: 1e3 * s["p99"]))]
    for name in ("server", "daemon", "shadow"):
        rows += [
            (f"memory of the {name}", "MB", *medians(lambda s, n=name: _of(s, n, "rss", 1e6))),
            (f"open files of the {name}", "", *medians(lambda s, n=name: _of(s, n, "files", 1))),
        ]
    rows += [
        ("state folder", "MB", *medians(lambda s: s["disk"] / 1e6)),
        *(
            (f"of it {part}", "MB", *medians(lambda s, part=part: s["parts"].get(part, 0) / 1e6))
            for part in sorted({part for s in samples for part, size in s["parts"].items() if size > 1e6})
        ),
        ("versions on disk", "", *medians(lambda s: s["versions"])),
    ]
    return rows


def _of(sample: Json, process: str, what: str, unit: float) -> float | None:
    found = sample["processes"].get(process)
    return found[what] / unit if found else None


def table(result: Json) -> list[str]:
    """As Markdown."""
    events, cycles = result["events"], result["cycles"]
    cured = [c["cured_s"] for c in cycles if c["cured_s"] is not None]
    lines = [
        "# Soak",
        "",
        f"{result['date']}, commit {result['commit']}, `{result['command']}`; digits, {result['minutes']:.0f} minutes at "
        f"{result['share'] * result['capacity']:.0f} requests a second: {100 * result['share']:.0f} % of what the daemon, "
        f"its client and everything else do together on {result['cores']} cores.",
        "",
        "| | |",
        "| --- | --- |",
        f"| requests | {result['sent']:,} |",
        f"| answered | {result['answered']:,} |",
        f"| refused with a code | {sum(result['refused'].values())} {result['refused'] or ''} |",
        f"| neither | {result['unanswered']} |",
        f"| labels | {result['labels']:,} |",
        f"| shifts shown, cured | {len(cycles)}, {len(cured)} (in {np.median(cured) if cured else np.nan:.0f} s, median) |",
        f"| alarms | {events.get('alarm', 0)} |",
        f"| versions promoted after an operation | {events.get('accepted', 0)} |",
        f"| known regimes recalled | {events.get('known', 0)} |",
        f"| rolled back or reset by the operator | {events.get('operator', 0)} |",
        f"| rolled back by the daemon | {events.get('disagreed', 0)} |",
        f"| versions that answered | {result['versions_answering']} |",
        f"| processes restarted | {sum(result['restarts'].values())} |",
        "",
        "| | second sixth | last sixth | ratio |",
        "| --- | --- | --- | --- |",
    ]
    for name, unit, early, late in compared(result):
        lines.append(
            f"| {name}{f', {unit}' if unit else ''} | {early:.4g} | {late:.4g} | {late / early if early else 1.0:.2f} |"
        )
    adapter = [_of(s, "adapter", "rss", 1e6) for s in result["samples"]]
    most = max((v for v in adapter if v is not None), default=float("nan"))
    return [
        *lines,
        "",
        f"Medians of ten-second samples. The adapter comes and goes; it took {most:.0f} MB at most. The state folder holds "
        f"{SETTINGS['labels.capacity']:,} labels, {SETTINGS['library.capacity']} regimes and {SETTINGS['library.versions']} "
        "versions besides those in use at most, as set for this run.",
    ]


def draw(result: Json, path: Path) -> None:
    """Latency, memory, files and disk over time."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    samples = result["samples"]
    at = [s["at_s"] / 60 for s in samples]
    figure, axes = pyplot.subplots(5, 1, figsize=(9, 11), sharex=True, layout="constrained")
    axes[0].plot(at, [1e3 * s["p50"] for s in samples], color="#1f6f4a", label="p50")
    axes[0].plot(at, [1e3 * s["p99"] for s in samples], color="#b5651d", lw=0.8, label="p99")
    axes[0].set(ylabel="latency, ms", yscale="log")
    axes[1].plot(at, [100 * s["accuracy"] for s in samples], color="#1f6f4a", lw=0.8, label="served accuracy, %")
    right = axes[1].twinx()
    right.step(at, [s["version"] for s in samples], color="0.6", lw=0.8, where="post")
    right.set_ylabel("version (grey)")
    for name, color in (("server", "#1f6f4a"), ("daemon", "#b5651d"), ("shadow", "#3b5b92"), ("adapter", "0.6")):
        axes[2].plot(at, [_of(s, name, "rss", 1e6) or np.nan for s in samples], color=color, label=name)
        if name != "adapter":
            axes[3].plot(at, [_of(s, name, "files", 1) or np.nan for s in samples], color=color, label=name)
    axes[2].set(ylabel="memory, MB", ylim=(0, None))
    axes[3].set(ylabel="open files", ylim=(0, None))
    axes[4].plot(at, [s["disk"] / 1e6 for s in samples], color="#1f6f4a", label="state folder, MB")
    axes[4].plot(at, [s["versions"] for s in samples], color="#b5651d", label="versions on disk")
    axes[4].set(xlabel="minutes", ylim=(0, None))
    for each in axes:
        each.legend(fontsize=8, loc="upper left")
        each.grid(alpha=0.3)
    figure.savefig(path, dpi=110)


def main() -> int:
    """Run and write the report; 1 if a request was lost or a process ended."""
    parser = argparse.ArgumentParser(prog="python -m bench.soak", description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=60.0, help="how long")
    parser.add_argument("--share", type=float, default=0.6, help="of what the machine can do")
    parser.add_argument("--json", action="store_true", help="print the results as JSON")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the report")
    arguments = parser.parse_args()
    result: Json = {
        **stamp(" ".join(("python -m bench.soak", *sys.argv[1:]))),
        "cores": len(os.sched_getaffinity(0)),
        **run(arguments.minutes, arguments.share),
    }
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "soak.json").write_text(json.dumps(result, indent=1) + "\n")
    text = "\n".join(table(result)) + "\n"
    (arguments.out / "soak.md").write_text(text)
    draw(result, arguments.out / "soak.png")
    print(json.dumps(result) if arguments.json else text)
    return int(bool(result["unanswered"]) or any(result["restarts"].values()))


if __name__ == "__main__":
    sys.exit(main())
