"""Load a running server and measure it: how many, how fast, what was refused, by which version.

Open loop sends at a constant rate whatever comes back, and a latency counts from when the request should have
been sent, so that a slow server cannot hide behind a generator that waits for it. Closed loop keeps a number of
requests unanswered.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from select import select
from typing import Any

import numpy as np
import numpy.typing as npt
import zmq

from tta import protocol
from tta.errors import Code, ConfigError

TELL_S = 0.1  # seconds between two reports of progress
QUANTILES = (0.5, 0.95, 0.99)


@dataclass(frozen=True)
class Load:
    """What to send.

    Attributes:
        rate: requests a second, evenly spaced; None: closed loop.
        outstanding: requests unanswered at a time, in closed loop.
        duration_s: seconds of sending.
        warmup_s: seconds at the start that are not counted.
        timeout_s: seconds to wait for the last answers.
        deadline_s: of each request; None: none.
        observe: whether the monitor sees it.
    """

    rate: float | None = None
    outstanding: int = 8
    duration_s: float = 10.0
    warmup_s: float = 1.0
    timeout_s: float = 10.0
    deadline_s: float | None = None
    observe: bool = False


@dataclass
class Measured:
    """What came back after the warm-up.

    Attributes:
        seconds: of the measured part.
        requests: answered in these seconds.
        images: answered in these seconds.
        sent: requests that were due in these seconds; all that follows is of them.
        latencies_s: seconds to each answer, by version.
        queue_s: seconds that answered requests waited in the server.
        compute_s: seconds of their batches.
        refused: replies that were no answer, by code.
        unanswered: requests without any reply.
        late_s: seconds that the generator itself was late, of each request; 0 in closed loop.
    """

    seconds: float = 0.0
    requests: int = 0
    images: int = 0
    sent: int = 0
    latencies_s: dict[int, list[float]] = field(default_factory=dict)
    queue_s: list[float] = field(default_factory=list)
    compute_s: list[float] = field(default_factory=list)
    refused: dict[str, int] = field(default_factory=dict)
    unanswered: int = 0
    late_s: list[float] = field(default_factory=list)

    def report(self) -> dict[str, Any]:
        """Numbers for people and programs; seconds, and images or requests a second."""
        every = [s for values in self.latencies_s.values() for s in values]
        return {
            "seconds": round(self.seconds, 3),
            "requests": self.sent,
            "answered": len(every),
            "requests_per_s": round(self.requests / self.seconds, 2) if self.seconds else 0.0,
            "images_per_s": round(self.images / self.seconds, 2) if self.seconds else 0.0,
            "latency_s": quantiles(every),
            "queue_s": quantiles(self.queue_s),
            "compute_s": quantiles(self.compute_s),
            "refused": dict(self.refused),
            "unanswered": self.unanswered,
            "generator_late_s": quantiles(self.late_s),
            "versions": {
                str(version): {"answered": len(values), "latency_s": quantiles(values)}
                for version, values in sorted(self.latencies_s.items())
            },
        }


def quantiles(values: Sequence[float]) -> dict[str, float]:
    """Median, 95th and 99th percentile and largest; empty for nothing."""
    if not values:
        return {}
    found = np.quantile(values, QUANTILES)
    named = {f"p{round(100 * q)}": round(float(v), 6) for q, v in zip(QUANTILES, found, strict=True)}
    return {**named, "max": round(float(max(values)), 6)}


def drive(
    endpoints: Sequence[str],
    batches: Sequence[npt.NDArray[np.uint8]],
    load: Load,
    progress: Callable[[float, Measured], None] = lambda done, measured: None,
) -> Measured:
    """Send requests and take their answers, in this thread.

    Args:
        endpoints: servers, in turn.
        batches: (N, H, W, C) uint8 each; one a request, in turn.
        load: how many, how fast, how long.
        progress: told the share of the time that has passed, and what was measured so far.

    Raises:
        ConfigError: an endpoint is no address.
    """
    return _Generator(endpoints, batches, load, progress).run()


class _Generator:
    def __init__(
        self,
        endpoints: Sequence[str],
        batches: Sequence[npt.NDArray[np.uint8]],
        load: Load,
        progress: Callable[[float, Measured], None],
    ) -> None:
        self.load = load
        self.progress = progress
        self.measured = Measured()
        self.payloads = [np.ascontiguousarray(b).tobytes() for b in batches]
        self.shapes = [list(b.shape) for b in batches]
        self.due: dict[int, tuple[float, int]] = {}  # request to when it should have gone, and its images
        self.next_id = 0
        self.context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.sockets = [self._connect(e) for e in endpoints]
        self.descriptors = [int(s.getsockopt(zmq.FD)) for s in self.sockets]

    def _connect(self, endpoint: str) -> "zmq.Socket[bytes]":
        socket = self.context.socket(zmq.DEALER)
        for option in (zmq.RCVHWM, zmq.SNDHWM, zmq.LINGER):
            socket.setsockopt(option, 0)
        try:
            socket.connect(endpoint)
        except zmq.ZMQError as error:
            self.context.destroy(linger=0)
            raise ConfigError(
                f"endpoint {endpoint!r} is no address: write tcp://HOST:PORT or ipc://PATH"
            ) from error
        return socket

    def run(self) -> Measured:
        """Send for `duration_s` after the warm-up, then wait for what is unanswered."""
        start = time.monotonic()
        self.counted_from = start + self.load.warmup_s
        self.end = end = self.counted_from + self.load.duration_s
        told = start
        try:
            while (now := time.monotonic()) < end:
                self._send(start, now, end)
                if not self._receive():
                    self._wait(min(self._next_due(start), end))
                if now - told > TELL_S:
                    told = now
                    self.measured.seconds = max(0.0, now - self.counted_from)
                    self.progress((now - start) / (end - start), self.measured)
            self.measured.seconds = time.monotonic() - self.counted_from
            last = time.monotonic() + self.load.timeout_s
            while self.due and time.monotonic() < last:
                if not self._receive():
                    self._wait(last)
        finally:
            self.context.destroy(linger=0)
        self.measured.unanswered = sum(at >= self.counted_from for at, _ in self.due.values())
        self.progress(1.0, self.measured)
        return self.measured

    def _next_due(self, start: float) -> float:
        return float("inf") if self.load.rate is None else start + self.next_id / self.load.rate

    def _send(self, start: float, now: float, end: float) -> None:
        """Everything that is due."""
        if self.load.rate is None:
            while len(self.due) < self.load.outstanding:
                self._send_one(time.monotonic())
            return
        while (at := start + self.next_id / self.load.rate) <= now and at < end:
            if at >= self.counted_from:
                self.measured.late_s.append(time.monotonic() - at)
            self._send_one(at)

    def _send_one(self, at: float) -> None:
        number = self.next_id
        self.next_id += 1
        which = number % len(self.payloads)
        request = protocol.Predict(
            id=number,
            dtype="uint8",
            shape=self.shapes[which],
            deadline_s=self.load.deadline_s,
            observe=self.load.observe,
        )
        self.due[number] = (at, self.shapes[which][0])
        self.measured.sent += at >= self.counted_from
        socket = self.sockets[number % len(self.sockets)]
        socket.send_multipart([*protocol.encode(request), self.payloads[which]])

    def _receive(self) -> int:
        """Take every answer that has arrived; how many."""
        n = 0
        for socket in self.sockets:
            while True:
                try:
                    frames = socket.recv_multipart(zmq.NOBLOCK)
                except zmq.Again:
                    break
                n += 1
                self._take(protocol.decode_reply(frames)[0], time.monotonic())
        return n

    def _take(self, header: dict[str, Any], now: float) -> None:
        at, n_images = self.due.pop(header["id"], (0.0, 0))
        m, answered = self.measured, header["code"] == Code.OK
        if answered and self.counted_from <= now <= self.end:
            m.requests += 1
            m.images += n_images
        if at < self.counted_from:
            return
        if not answered:
            name = Code(header["code"]).name.lower()
            m.refused[name] = m.refused.get(name, 0) + 1
            return
        m.latencies_s.setdefault(header["version"], []).append(now - at)
        m.queue_s.append(header["queue_s"])
        m.compute_s.append(header["compute_s"])

    def _wait(self, until: float) -> None:
        """Until something arrives or the next is due; zmq's own poll knows whole milliseconds only."""
        left_s = min(TELL_S, until - time.monotonic())
        # A socket's descriptor tells edges only: what came while sending has to be looked for first.
        if left_s > 0 and not any(int(s.getsockopt(zmq.EVENTS)) & zmq.POLLIN for s in self.sockets):
            select(self.descriptors, (), (), left_s)
