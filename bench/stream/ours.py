"""The daemon on a stream, in one process: every decision is the daemon's own, only its sockets are left out.

The three links to the other processes are replaced by ones that do the work here and hand the answer over at the next
turn of the loop, as a socket would. The stream waits while a version is made, as it waits for the others it is compared
with; how long that takes is reported.
"""

import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import torch

from bench.stream.data import Segment
from tta.adapter.worker import Surgeon
from tta.bundle import load_bundle
from tta.config import load_config
from tta.daemon.daemon import Daemon
from tta.errors import TTAError
from tta.protocol import Label, encode
from tta.server.options import Observation
from tta.server.predictor import Predictor, Session

BATCH = 4  # images an observation
FIRST_ID = 10**16
SETTLE_S = 120.0  # seconds thresholds may take

Array = Any
Json = dict[str, Any]


class Book:
    """A log that is kept in memory."""

    def __init__(self) -> None:
        self.events: list[Json] = []

    def _keep(self, event: str, **fields: Any) -> None:
        self.events.append({"log": event, **fields})

    info = warning = error = exception = debug = _keep


class Desk:
    """Answers on their way to the daemon."""

    def __init__(self) -> None:
        self._answers: deque[Callable[[], None]] = deque()

    def put(self, answer: Callable[[], None]) -> None:
        """To be handed over at the next turn."""
        self._answers.append(answer)

    def clear(self) -> None:
        """Hand over everything, and what comes of it."""
        while self._answers:
            self._answers.popleft()()


def _process(name: str) -> Any:
    """What the daemon looks at in a process that runs."""
    done = lambda *_: None  # noqa: E731
    return SimpleNamespace(name=name, ready=True, alive=True, pid=1, restarts=0, start=done, stop=done, keep=True)


class Shadow:
    """Runs any version on images."""

    def __init__(self, predictor: Predictor, desk: Desk) -> None:
        self.process, self.waiting = _process("shadow"), 0
        self.predictor, self._desk = predictor, desk
        self._sessions: dict[Path | None, Session] = {}

    def session(self, folder: Path | None) -> Session:
        """Of a version; kept, for they come again."""
        if folder not in self._sessions:
            self._sessions[folder] = self.predictor.prepare(folder)
        return self._sessions[folder]

    def ask(self, versions: Sequence[tuple[int, Path | None]], x: Array, then: Callable[[Any], None]) -> None:
        """See `tta.daemon.links.ShadowLink`."""
        outputs = []
        for _, folder in versions:
            parts = [
                self.predictor.run_with(self.session(folder), part) for part in np.array_split(x, -(-len(x) // 32))
            ]
            logits, features = (np.concatenate([getattr(p, k) for p in parts]) for k in ("logits", "features"))
            outputs.append((logits, features))
        self._desk.put(lambda: then(outputs))


class Server:
    """Serves one version."""

    def __init__(self, shadow: Shadow, desk: Desk) -> None:
        self.ready, self.devices, self.swapping = True, ["cpu"], False
        self._shadow, self._desk = shadow, desk
        self.current = shadow.session(None)

    def swap(self, version: int, folder: Path | None, then: Callable[[Json], None]) -> None:
        """See `tta.daemon.servers.Servers`."""
        self.swapping = True

        def done() -> None:
            self.current, self.swapping = self._shadow.session(folder), False
            then({"op": "swap", "version": version})

        self._desk.put(done)

    def predict(self, x: Array) -> Any:
        """By the version in service."""
        return self._shadow.predictor.run_with(self.current, x)

    def release(self) -> None:
        """Nothing to drop here."""

    def stop(self) -> None:
        """Nothing runs by itself."""


class Adapter:
    """Makes candidates."""

    def __init__(self, surgeon: Surgeon, desk: Desk) -> None:
        self.process, self.progress, self.busy, self.idle_since = _process("adapter"), {}, False, None
        self._surgeon, self._desk = surgeon, desk
        self.seconds: list[float] = []

    def start(self) -> None:
        """It runs."""

    def cancel(self) -> None:
        """Nothing is ever under way when the daemon decides."""

    def submit(self, folder: Path, then: Callable[[Json], None]) -> None:
        """See `tta.daemon.links.AdapterLink`."""

        def work() -> None:
            began = time.process_time()
            try:
                reply = {"op": "candidate", **self._surgeon.operate(folder, lambda *_: None)}
            except TTAError as error:
                reply = {"op": "failed", "error": str(error)}
            self.seconds.append(time.process_time() - began)
            then(reply)

        self._desk.put(work)


class StreamDaemon(Daemon):
    """The daemon without its sockets."""

    def _bind(self) -> None:
        return None

    def _make_processes(self) -> None:
        self.desk = Desk()
        bundle = load_bundle(self.config.bundle)
        self.shadow = Shadow(Predictor(bundle, "cpu", 1, 32), self.desk)  # type: ignore[assignment]
        self.servers = Server(self.shadow, self.desk)  # type: ignore[arg-type, assignment]
        self.adapter = Adapter(Surgeon(bundle, "cpu"), self.desk)  # type: ignore[assignment]
        self.processes = ()  # type: ignore[assignment]

    def _start_servers(self) -> None:
        return

    def see(self, first_id: int, x: Array) -> Any:
        """Serve a batch and observe it, as the server would tell."""
        answer = self.servers.predict(x)  # type: ignore[attr-defined]
        header = Observation(epoch=1, first_id=first_id, version=answer.version, n=len(x), inputs=True)
        tensors = (answer.logits, answer.features, np.ascontiguousarray(x))
        self._observe([msgspec.msgpack.encode(header), *(np.ascontiguousarray(t).tobytes() for t in tensors)])
        return answer

    def label(self, ids: list[int], labels: list[int], feedback: bool) -> None:
        """Take labels as from a client, or only whether the answers were these."""
        replies: list[Json] = []
        if feedback:
            found = [self.ledger.find(i) for i in ids]
            correct = [e is not None and int(e.logits.argmax()) == y for e, y in zip(found, labels, strict=True)]
            request = Label(id=1, prediction_ids=ids, correct=correct)
        else:
            request = Label(id=1, prediction_ids=ids, labels=labels)
        self.control.handle(encode(request), replies.append)
        assert replies[0]["code"] == 0, replies[0]

    def turn(self) -> None:
        """One turn of the loop: answers, thresholds, counts."""
        self.desk.clear()
        monitor, until = self.treatment.watch.monitor, time.monotonic() + SETTLE_S
        self._recalibrate()
        while monitor.wanted is not None and time.monotonic() < until:
            time.sleep(0.05)
            self._recalibrate()
        self.treatment.tick()
        self.desk.clear()


def run(
    segments: Iterable[Segment],
    bundle: Path,
    state: Path,
    settings: Json,
    delay: int = 0,
    wrong: float = 0.0,
    seed: int = 0,
    feedback: bool = False,
    tell: Callable[[str], None] = lambda text: None,
) -> Json:
    """Serve a stream.

    Args:
        segments: of it.
        bundle: what to serve.
        state: folder of the daemon; empty.
        settings: that differ from the defaults.
        delay: images between a prediction and its label.
        wrong: share of the labels that name another class.
        seed: of the wrong labels.
        feedback: of a labelled image say only whether the answer was right.
        tell: told of progress.

    Returns:
        "segments": part, visit, corruption, images, errors, errors of the source, versions served, labels;
        "events": what the daemon did; "adapt_cpu_s": CPU seconds of each operation.
    """
    torch.set_num_threads(1)
    config = load_config(
        None,
        {"bundle": str(bundle), "state": str(state), "daemon.http": "127.0.0.1:0", "device": "cpu", **settings},
    )
    state.mkdir(parents=True)
    book = Book()
    daemon = StreamDaemon(config, book)  # type: ignore[arg-type]
    daemon.startup()
    source = daemon.shadow.session(None)  # type: ignore[attr-defined]
    due: deque[tuple[int, int, int]] = deque()  # at which image, prediction id, class
    rng = np.random.default_rng([seed, 11])
    found: list[Json] = []
    n = 0
    try:
        for segment in segments:
            errors = errors_source = n_labels = 0
            versions: dict[int, int] = {}
            for begin in range(0, len(segment.x), BATCH):
                x, y = segment.x[begin : begin + BATCH], segment.y[begin : begin + BATCH]
                answer = daemon.see(FIRST_ID + n, x)
                own = answer if answer.version == 0 else daemon.shadow.predictor.run_with(source, x)  # type: ignore[attr-defined]
                errors += int((answer.logits.argmax(1) != y).sum())
                errors_source += int((own.logits.argmax(1) != y).sum())
                versions[answer.version] = versions.get(answer.version, 0) + len(x)
                for i in np.flatnonzero(segment.labelled[begin : begin + BATCH]).tolist():
                    label = int(y[i])
                    if rng.random() < wrong:
                        label = (label + int(rng.integers(1, 10))) % 10
                    due.append((n + i + delay, FIRST_ID + n + i, label))
                n += len(x)
                daemon.desk.clear()
                ready = []
                while due and due[0][0] < n:
                    ready.append(due.popleft()[1:])
                if ready:
                    daemon.label(*map(list, zip(*ready, strict=True)), feedback)
                    n_labels += len(ready)
                daemon.turn()
            entry = {
                "part": segment.part,
                "visit": segment.visit,
                "corruption": segment.corruption,
                "images": len(segment.x),
                "errors": errors,
                "errors_source": errors_source,
                "versions": versions,
                "labels": n_labels,
            }
            found.append(entry)
            share, plain = (100 * k / len(segment.x) for k in (errors, errors_source))
            tell(f"{segment.part} {segment.visit} {segment.corruption}: {share:.1f} % ({plain:.1f}) {versions}")
    finally:
        daemon.shutdown()
    events = [e for e in book.events if e["log"] == "transition"]
    return {"segments": found, "events": events, "adapt_cpu_s": daemon.adapter.seconds}  # type: ignore[attr-defined]
