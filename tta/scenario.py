"""Drive a real daemon through phases of traffic with a real client, and measure what it did.

Used by `tta demo` and by the benchmarks. Accuracy is always on images that were never labelled; every reply is
checked afterwards against the version it names; the source's accuracy is that of the source on the same images.
"""

import json
import os
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tta.bundle import load_bundle
from tta.client import Client, Prediction
from tta.errors import TTAError, UnavailableError

Array = npt.NDArray[Any]
POLL_S = 0.25
START_S = 90.0
REPLY_TOLERANCE = 1e-3  # of the largest logit, between a reply and the version it names
MAX_LABELS_A_CALL = 64


@dataclass(frozen=True)
class Phase:
    """A stretch of traffic.

    Attributes:
        name: shown to people.
        shift_kind: "none", "input" or "output".
        x: (N, H, W, C) uint8, sent in order and again from the start if the phase needs more.
        y: (N,) what they really show.
        label_fraction: share of predictions that get a label.
        max_labels: of the phase.
        cured: whether the phase waits for another version before it counts `after` images.
        after: images measured after that.
        limit_s: seconds after which the phase ends anyway.
    """

    name: str
    shift_kind: str
    x: Array
    y: Array
    label_fraction: float
    max_labels: int
    cured: bool
    after: int
    limit_s: float = 60.0


@dataclass
class Sent:
    """One request and its answer."""

    phase: int
    index: int
    at_s: float
    labelled: bool = False
    answered_s: float | None = None
    version: int = -1
    logits: Array | None = None
    prediction_id: int = -1


@dataclass
class Moment:
    """One look at the daemon's status."""

    at_s: float
    sent: int
    state: str
    version: int
    drift: dict[str, float]


@dataclass
class PhaseReport:
    """What a phase showed; accuracies are shares of unlabelled images, None where there were none."""

    name: str
    shift_kind: str
    alarm_after_samples: int | None
    accuracy_source: float | None
    accuracy_before: float | None
    accuracy_after: float | None
    block: str
    version: int
    labels: int
    seconds_to_recover: float | None
    from_library: bool
    images_after: int
    state: str


@dataclass
class Report:
    """What a scenario showed."""

    requests: int
    lost: int
    errors: int
    mixed_version_replies: int
    promotions_clean: int
    alarms_clean: int
    alarms_clean_expected: float
    labels_used: int
    home_recognised: int
    phases: list[PhaseReport]
    failures: list[str] = field(default_factory=list)
    seconds: float = 0.0


class DaemonProcess:
    """`tta serve` in a process of its own, on free ports."""

    def __init__(self, bundle: Path, folder: Path, settings: dict[str, Any]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.log_path = folder / "daemon.log"
        ports = free_ports(3)
        self.endpoint, self.control = (f"tcp://127.0.0.1:{p}" for p in ports[:2])
        self.http = f"127.0.0.1:{ports[2]}"
        values = {
            "server.endpoint": self.endpoint,
            "daemon.control": self.control,
            "daemon.http": self.http,
            **settings,
        }
        self.argv = [sys.executable, "-m", "tta", "serve", str(bundle), "--state", str(folder / "state")]
        for key, value in values.items():
            self.argv += ["--set", f"{key}={json.dumps(value)}"]
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it and wait until it answers.

        Raises:
            UnavailableError: it ended or did not answer in time; the message holds its last log line.
        """
        with self.log_path.open("ab") as log:
            self.process = subprocess.Popen(self.argv, stderr=log, stdout=log, stdin=subprocess.DEVNULL)
        end = time.monotonic() + START_S
        while time.monotonic() < end and self.process.poll() is None:
            with Client(self.endpoint, self.control, timeout_s=1.0) as client:
                try:
                    if client.daemon_ready():
                        return
                except TTAError:
                    continue
        lines = self.log_path.read_text().strip().splitlines()
        self.stop()
        raise UnavailableError(f"the daemon did not start; its log ends with: {lines[-1] if lines else 'nothing'}")

    def stop(self) -> int | None:
        """SIGTERM and wait; its exit status."""
        if self.process is None:
            return None
        self.process.terminate()
        try:
            return self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return self.process.wait()

    def client(self, timeout_s: float = 10.0) -> Client:
        """A client of this daemon."""
        return Client(self.endpoint, self.control, timeout_s)


def free_ports(n: int) -> list[int]:
    """Ports nobody listens on now."""
    sockets = [socket.socket() for _ in range(n)]
    for s in sockets:
        s.bind(("127.0.0.1", 0))
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


class Scenario:
    """Phases sent at a steady rate to a daemon.

    Args:
        daemon: running.
        phases: in order.
        rate: images a second, one a request.
        label_delay_s: seconds between a prediction and its label.
        seed: of who gets a label.
        view: told the scenario at every look at the daemon.
    """

    def __init__(
        self,
        daemon: DaemonProcess,
        phases: Sequence[Phase],
        rate: float,
        label_delay_s: float = 1.0,
        seed: int = 0,
        view: Callable[["Scenario"], None] = lambda scenario: None,
    ) -> None:
        self.daemon = daemon
        self.phases = list(phases)
        self.rate = rate
        self.label_delay_s = label_delay_s
        self.sent: list[Sent] = []
        self.moments: list[Moment] = []
        self.events: list[dict[str, Any]] = []
        self.status: dict[str, Any] = {}
        self.phase = 0
        self.starts: list[tuple[int, float]] = []  # (requests sent before it, seconds) of each phase
        self.errors = 0
        self.outcomes: dict[str, int] = {}
        self.source_logits: Array | None = None  # of every image of every phase, once `report` has run
        self._began = 0.0
        self._view = view
        self._rng = np.random.default_rng(seed)
        self._by_request: dict[int | str, int] = {}
        self._due: deque[tuple[float, int]] = deque()
        self._labels = [0] * len(self.phases)
        self._cure: dict[int, int] = {}  # phase → first request answered by the version it ended with

    def run(self) -> None:
        """Send everything and collect every answer."""
        self._began = time.monotonic()
        with self.daemon.client() as client:
            looked = 0.0
            next_at = 0.0
            for number in range(len(self.phases)):
                self.phase = number
                self.starts.append((len(self.sent), self._now()))
                while not self._phase_done():
                    now = self._now()
                    while next_at <= now:
                        self._send(client, now)
                        next_at = max(next_at + 1 / self.rate, now - 0.5)
                    self._collect(client, max(0.0, min(next_at - self._now(), 0.02)))
                    self._label(client)
                    if self._now() - looked >= POLL_S:
                        looked = self._now()
                        self._look(client)
            end = self._now() + 10
            while self._by_request and self._now() < end:
                self._collect(client, 0.1)
            self._look(client)

    def _now(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self._began

    def _send(self, client: Client, now: float) -> None:
        phase = self.phases[self.phase]
        index = (len(self.sent) - self.starts[self.phase][0]) % len(phase.x)
        request = client.submit(phase.x[index])
        self._by_request[request] = len(self.sent)
        self.sent.append(Sent(self.phase, index, now))

    def _collect(self, client: Client, wait_s: float) -> None:
        for request, answer in client.results(wait_s):
            number = self._by_request.pop(request, None)
            if number is None:
                continue
            sent = self.sent[number]
            if not isinstance(answer, Prediction):
                self.errors += 1
                continue
            sent.answered_s, sent.version, sent.logits = self._now(), answer.version, answer.logits[0]
            sent.prediction_id = answer.prediction_id
            phase = self.phases[sent.phase]
            if (
                sent.phase == self.phase
                and self._labels[sent.phase] < phase.max_labels
                and self._rng.random() < phase.label_fraction
            ):
                self._labels[sent.phase] += 1
                sent.labelled = True
                self._due.append((sent.answered_s + self.label_delay_s, number))

    def _label(self, client: Client) -> None:
        due: list[Sent] = []
        while self._due and self._due[0][0] <= self._now() and len(due) < MAX_LABELS_A_CALL:
            due.append(self.sent[self._due.popleft()[1]])
        if due:
            labels = [int(self.phases[s.phase].y[s.index]) for s in due]
            for outcome in client.label([s.prediction_id for s in due], labels):
                self.outcomes[outcome] = self.outcomes.get(outcome, 0) + 1

    def _look(self, client: Client) -> None:
        self.status = client.status()
        seen = {e["time_s"] for e in self.events[-40:]}
        self.events += [e for e in self.status["events"] if e["time_s"] not in seen]
        s = self.status
        self.moments.append(Moment(self._now(), len(self.sent), s["state"], s["version"], s["drift"]))
        self._view(self)

    def _phase_done(self) -> bool:
        phase, (first, began) = self.phases[self.phase], self.starts[self.phase]
        if self._now() - began > phase.limit_s:
            return True
        sent = len(self.sent) - first
        if not phase.cured:
            return sent >= phase.after
        settled = self.status.get("state") == "stable" and self._settled_version()
        if not settled:
            self._cure.pop(self.phase, None)
            return False
        if self.phase not in self._cure:
            self._cure[self.phase] = self._first_of_version(self.status["version"])
        return len(self.sent) - self._cure[self.phase] >= phase.after

    def _settled_version(self) -> bool:
        """Whether the version now serving is another than when the phase began."""
        before = self.phase_start_version(self.phase)
        return int(self.status["version"]) != before and bool(self._answered(self.status["version"]))

    def phase_start_version(self, phase: int) -> int:
        """Version that served when the phase began."""
        first = self.starts[phase][0]
        for sent in reversed(self.sent[:first]):
            if sent.version >= 0:
                return sent.version
        return 0

    def _answered(self, version: int) -> bool:
        return any(s.version == version for s in self.sent[self.starts[self.phase][0] :])

    def _first_of_version(self, version: int) -> int:
        first = self.starts[self.phase][0]
        return next(i for i, s in enumerate(self.sent[first:], first) if s.version == version)

    def recent_accuracy(self, n: int = 100) -> float | None:
        """Of the last answered, unlabelled images."""
        right = []
        for sent in reversed(self.sent):
            if sent.logits is not None and not sent.labelled:
                right.append(self._right(sent))
                if len(right) == n:
                    break
        return sum(right) / len(right) if right else None

    def _right(self, sent: Sent) -> bool:
        assert sent.logits is not None
        return int(sent.logits.argmax()) == int(self.phases[sent.phase].y[sent.index])

    # -- afterwards ---------------------------------------------------------------------------------------

    def report(self, bundle: Path) -> Report:
        """Measure; needs the `serve` extra, since it runs every version again."""
        expected = self._expected_logits(bundle)
        self.source_logits = expected[0]
        mixed = 0
        for sent in self.sent:
            if sent.logits is not None:
                want = expected[sent.version][self._flat(sent)]
                limit = REPLY_TOLERANCE * max(1.0, float(np.abs(want).max()))
                mixed += int(np.abs(sent.logits - want).max() > limit)
        answered = sum(s.logits is not None for s in self.sent)
        reports = [self._phase_report(i, expected[0]) for i in range(len(self.phases))]
        clean = [i for i, p in enumerate(self.phases) if p.shift_kind == "none"]
        promoted = [e for e in self.events if e["event"] == "swapped" and e.get("reason") == "promotion"]
        alarms = [e for e in self.events if e["event"] == "alarm"]
        n_clean = sum(1 for s in self.sent if s.phase in clean)
        report = Report(
            requests=len(self.sent),
            lost=len(self.sent) - answered - self.errors,
            errors=self.errors,
            mixed_version_replies=mixed,
            promotions_clean=sum(self._phase_at(e["sequence"]) in clean for e in promoted),
            alarms_clean=sum(self._phase_at(e.get("sample", e["sequence"])) in clean for e in alarms),
            alarms_clean_expected=round(n_clean / float(self.status["arl"]), 4),
            labels_used=sum(self._labels),
            home_recognised=sum(e["event"] == "home_recognised" for e in self.events),
            phases=reports,
            seconds=round(self._now(), 1),
        )
        report.failures = self._failures(report)
        return report

    def _flat(self, sent: Sent) -> int:
        return sum(len(p.x) for p in self.phases[: sent.phase]) + sent.index

    def _phase_at(self, sequence: int) -> int:
        return max(i for i, (first, _) in enumerate(self.starts) if first <= sequence or i == 0)

    def _expected_logits(self, bundle: Path) -> dict[int, Array]:
        """Logits of every image under every version that answered, recomputed from the store."""
        from tta.server.predictor import Predictor

        predictor = Predictor(load_bundle(bundle), "cpu", threads=os.cpu_count() or 1, max_batch_size=64)
        used = np.concatenate([[0], [s.version for s in self.sent if s.version >= 0]])
        result = {}
        for version in sorted({int(v) for v in used}):
            folder = self.daemon.folder / "state" / "versions" / f"{version:06d}" if version else None
            session = predictor.prepare(folder)
            parts = [
                predictor.run_with(session, p.x[i : i + 64]).logits
                for p in self.phases
                for i in range(0, len(p.x), 64)
            ]
            result[version] = np.concatenate(parts)
        return result

    def _phase_report(self, number: int, source_logits: Array) -> PhaseReport:
        phase, (first, began) = self.phases[number], self.starts[number]
        end = self.starts[number + 1][0] if number + 1 < len(self.starts) else len(self.sent)
        mine = self.sent[first:end]
        labelled = {s.index for s in mine if s.labelled}
        final = next((s.version for s in reversed(mine) if s.version >= 0), 0)
        before_version = self.phase_start_version(number)
        changed = final != before_version
        cure = next((i for i, s in enumerate(mine) if s.version == final), 0) if changed else None
        offset = sum(len(p.x) for p in self.phases[:number])
        free = sorted({s.index for s in mine} - labelled)
        source_right = source_logits[[offset + i for i in free]].argmax(axis=1) == phase.y[free]
        swap: dict[str, Any] = next(
            (
                e
                for e in reversed(self.events)
                if e["event"] == "swapped" and first <= e["sequence"] <= end + 1 and e["serving"] == final
            ),
            {},
        )
        alarm = next((e for e in self.events if e["event"] == "alarm" and first <= e["sequence"] < end), None)
        known = next((e for e in self.events if e["event"] == "known" and first <= e["sequence"] < end), None)
        noticed = alarm or known
        cured_at = mine[cure].answered_s if cure is not None else None
        return PhaseReport(
            name=phase.name,
            shift_kind=phase.shift_kind,
            alarm_after_samples=self._noticed(noticed) - first + 1 if noticed else None,
            accuracy_source=_mean(source_right.tolist()),
            accuracy_before=self._accuracy(mine[:cure], labelled),
            accuracy_after=self._accuracy(mine[cure:], labelled) if cure is not None else None,
            block=self._block_of(final),
            version=final,
            labels=self._labels[number],
            seconds_to_recover=round(cured_at - began, 2) if cured_at is not None else None,
            from_library=swap.get("reason") == "recall",
            images_after=self._unique(mine[cure:], labelled) if cure is not None else 0,
            state=self.moments[-1].state if end == len(self.sent) else "",
        )

    def _noticed(self, event: dict[str, Any]) -> int:
        """Image at which the charts crossed; for labelled errors, the one at which enough labels had come."""
        return int(event.get("sample", event["sequence"]))

    def _accuracy(self, sent: Sequence[Sent], labelled: set[int]) -> float | None:
        """Share right, each unlabelled image counted once."""
        right: dict[int, bool] = {}
        for s in sent:
            if s.logits is not None and s.index not in labelled:
                right.setdefault(s.index, self._right(s))
        return _mean(list(right.values()))

    def _unique(self, sent: Sequence[Sent], labelled: set[int]) -> int:
        return len({s.index for s in sent if s.logits is not None and s.index not in labelled})

    def _block_of(self, version: int) -> str:
        if version == 0:
            return ""
        path = self.daemon.folder / "state" / "versions" / f"{version:06d}" / "manifest.json"
        return str(json.loads(path.read_text())["block"])

    def _failures(self, report: Report) -> list[str]:
        """What a user would call broken."""
        failures = []
        for name in ("lost", "errors", "mixed_version_replies", "promotions_clean"):
            if getattr(report, name):
                failures.append(f"{name} = {getattr(report, name)}")
        home = report.phases[0].accuracy_source or 0.0
        for phase in report.phases:
            if phase.shift_kind == "none":
                if phase.version != 0:
                    failures.append(f"{phase.name}: version {phase.version} still serves, home was not recognised")
                continue
            cost = home - (phase.accuracy_source or 0.0)
            gained = (phase.accuracy_after or 0.0) - (phase.accuracy_source or 0.0)
            if gained < cost / 2:
                failures.append(f"{phase.name}: regained {100 * gained:.1f} of {100 * cost:.1f} points")
        return failures


def _mean(values: Sequence[bool]) -> float | None:
    return round(sum(values) / len(values), 4) if values else None


def as_json(report: Report) -> dict[str, Any]:
    """The report for `--json`."""
    return asdict(report)


def draw_timeline(scenario: Scenario, path: Path, title: str) -> None:
    """A picture of accuracy, drift statistic and versions over the stream; needs matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(
        3, 1, figsize=(11, 7), sharex=True, height_ratios=[3, 2, 1.2], layout="constrained"
    )
    kinds = {"none": "#ffffff", "input": "#fde8d7", "output": "#e3e6fb"}
    ends = [first for first, _ in scenario.starts[1:]] + [len(scenario.sent)]
    for (first, _), end, phase in zip(scenario.starts, ends, scenario.phases, strict=True):
        for axis in axes:
            axis.axvspan(first, end, color=kinds[phase.shift_kind], zorder=0)
        axes[0].text((first + end) / 2, 1.04, phase.name, ha="center", va="bottom", fontsize=9)
    right = np.array(
        [scenario._right(s) if s.logits is not None and not s.labelled else np.nan for s in scenario.sent]
    )
    if scenario.source_logits is not None:
        classes = scenario.source_logits.argmax(axis=1)
        source = np.array(
            [
                float(classes[scenario._flat(s)] == scenario.phases[s.phase].y[s.index])
                if not s.labelled
                else np.nan
                for s in scenario.sent
            ]
        )
        axes[0].plot(_rolling(source, 100), color="#9a9a9a", linewidth=1.2, label="source model, same images")
    axes[0].plot(_rolling(right, 100), color="#1f6f4a", linewidth=1.6, label="served, last 100 unlabelled")
    axes[0].set_ylim(0, 1.02)
    axes[0].set_ylabel("accuracy")
    axes[0].legend(loc="lower left", fontsize=8, frameon=False)
    samples = [m.sent for m in scenario.moments]
    names = list(scenario.moments[0].drift)
    colours = plt.get_cmap("viridis")(np.linspace(0, 0.9, len(names)))
    for name, colour in zip(names, colours, strict=True):
        values = [max(m.drift[name], 1e-2) for m in scenario.moments]
        axes[1].plot(samples, values, color=colour, linewidth=1, label=name)
    axes[1].axhline(1, color="#b3261e", linewidth=1, linestyle="--")
    axes[1].set_yscale("log")
    axes[1].set_ylim(top=20 * max(1.0, *(v for m in scenario.moments for v in m.drift.values())))
    axes[1].set_ylabel("drift / threshold")
    axes[1].legend(loc="upper left", ncols=len(names), fontsize=8, frameon=False)
    versions = [s.version if s.version >= 0 else np.nan for s in scenario.sent]
    axes[2].plot(versions, color="#333333", linewidth=1.6, drawstyle="steps-post")
    axes[2].set_yticks(sorted({int(v) for v in versions if v == v}))
    axes[2].set_ylabel("version")
    axes[2].set_xlabel("images")
    marks = {
        "alarm": ("#b3261e", "alarm"),
        "swapped": ("#1f6f4a", "swap"),
        "home_recognised": ("#2457a6", "home"),
    }
    used = set()
    for event in scenario.events:
        if event["event"] in marks:
            colour, text = marks[event["event"]]
            axes[2].axvline(
                event["sequence"], color=colour, linewidth=1, alpha=0.7, label=None if text in used else text
            )
            used.add(text)
    axes[2].legend(loc="upper left", ncols=3, fontsize=8, frameon=False)
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.margins(x=0)
    figure.suptitle(title, fontsize=11)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _rolling(values: Array, n: int) -> Array:
    """Mean of the last n values that are not NaN."""
    known = ~np.isnan(values)
    total = np.cumsum(np.where(known, values, 0.0))
    count = np.cumsum(known)
    index = np.searchsorted(count, np.maximum(count - n, 0), side="right") - 1
    base_total = np.where(count > n, total[np.maximum(index, 0)], 0.0)
    base_count = np.where(count > n, count[np.maximum(index, 0)], 0)
    return (total - base_total) / np.maximum(count - base_count, 1)  # type: ignore[no-any-return]
