"""Send phases of traffic at a steady rate, label late, and keep a book of every request."""

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from tta.client import Client, Prediction
from tta.scenario.process import DaemonProcess

Array = npt.NDArray[Any]
POLL_S = 0.25  # seconds between two looks at the daemon's status
MAX_LABELS_A_CALL = 64


@dataclass(frozen=True)
class Phase:
    """A stretch of traffic.

    Attributes:
        name: shown to people.
        shift_kind: "none", "input" or "output".
        x: (N, H, W, C) uint8, sent in order and again from the start if the phase needs more.
        y: (N,) what they really show; -1: nobody knows, and it gets no label.
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


class Scenario:
    """Phases sent at a steady rate to a daemon.

    Args:
        daemon: running.
        phases: in order.
        rate: images a second, one a request.
        label_delay_s: seconds between a prediction and its label.
        seed: of who gets a label.
        hold: send nothing while a candidate is being made and judged, as if that took no time.
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
        hold: bool = False,
    ) -> None:
        self.daemon = daemon
        self.phases = list(phases)
        self.rate = rate
        self.label_delay_s = label_delay_s
        self._hold = hold
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
        self.labels_sent = [0] * len(self.phases)  # by phase
        self._cure: dict[int, int] = {}  # phase → first request answered by the version it ended with

    def run(self) -> None:
        """Send everything and collect every answer."""
        self._began = time.monotonic()
        with self.daemon.client() as client:
            looked = 0.0
            next_at = 0.0
            for number in range(len(self.phases)):
                self.phase = number
                self.starts.append((len(self.sent), self.seconds()))
                while not self._phase_done():
                    now = self.seconds()
                    if self._hold and self.status.get("state") == "adapting":
                        next_at = now + POLL_S
                    while next_at <= now and not self._all_sent():
                        self._send(client, now)
                        next_at = max(next_at + 1 / self.rate, now - 0.5)
                    self._collect(client, max(0.0, min(next_at - self.seconds(), 0.02)))
                    self._label(client)
                    if self.seconds() - looked >= POLL_S:
                        looked = self.seconds()
                        self._look(client)
            end = self.seconds() + 10
            while self._by_request and self.seconds() < end:
                self._collect(client, 0.1)
            for _, number in self._due:  # their time did not come
                self.sent[number].labelled = False
                self.labels_sent[self.sent[number].phase] -= 1
            self._look(client)

    def seconds(self) -> float:
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
            sent.answered_s, sent.version, sent.logits = self.seconds(), answer.version, answer.logits[0]
            sent.prediction_id = answer.prediction_id
            phase = self.phases[sent.phase]
            if (
                sent.phase == self.phase
                and phase.y[sent.index] >= 0
                and self.labels_sent[sent.phase] < phase.max_labels
                and self._rng.random() < phase.label_fraction
            ):
                self.labels_sent[sent.phase] += 1
                sent.labelled = True
                self._due.append((sent.answered_s + self.label_delay_s, number))

    def _label(self, client: Client) -> None:
        due: list[Sent] = []
        while self._due and self._due[0][0] <= self.seconds() and len(due) < MAX_LABELS_A_CALL:
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
        self.moments.append(Moment(self.seconds(), len(self.sent), s["state"], s["version"], s["drift"]))
        self._view(self)

    def _all_sent(self) -> bool:
        """Whether a phase that waits for no cure has sent what it has to."""
        phase = self.phases[self.phase]
        return not phase.cured and len(self.sent) - self.starts[self.phase][0] >= phase.after

    def _phase_done(self) -> bool:
        phase, (_, began) = self.phases[self.phase], self.starts[self.phase]
        if self.seconds() - began > phase.limit_s:
            return True
        if not phase.cured:
            return self._all_sent()
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
        """Of the last answered, unlabelled images whose class is known."""
        right = []
        for sent in reversed(self.sent):
            if sent.logits is not None and self.is_scored(sent):
                right.append(self.is_right(sent))
                if len(right) == n:
                    break
        return sum(right) / len(right) if right else None

    def flat_index(self, sent: Sent) -> int:
        """Place of its image among the images of all phases."""
        return sum(len(p.x) for p in self.phases[: sent.phase]) + sent.index

    def is_scored(self, sent: Sent) -> bool:
        """Whether its answer counts: what the image shows is known, and was not told to the daemon."""
        return not sent.labelled and bool(self.phases[sent.phase].y[sent.index] >= 0)

    def is_right(self, sent: Sent) -> bool:
        """Whether its answer names what the image shows."""
        assert sent.logits is not None
        return int(sent.logits.argmax()) == int(self.phases[sent.phase].y[sent.index])
