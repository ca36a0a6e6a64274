"""Load a running server and measure it: how many, how fast, what was refused, by which version.

Open loop sends at a constant rate whatever comes back, and a latency counts from when the request should have
been sent, so that a slow server cannot hide behind a generator that waits for it. Closed loop keeps a number of
requests unanswered; in the place of a refused one it sends the next when the server has asked it to.
"""

import heapq
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from select import select
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import zmq

from tta import protocol
from tta.connection import connect
from tta.errors import Code, ConfigError
from tta.keys import Credentials

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


@dataclass(frozen=True)
class Reply:
    """What became of one request.

    Attributes:
        number: of the request.
        refused: why it was not answered; "" if it was.
        version: of the model.
        queue_s: seconds it waited in the server, if that says so.
        compute_s: seconds of its batch, if the server says so.
        retry_after_s: seconds that a server asks whom it refuses to wait.
    """

    number: int
    refused: str = ""
    version: int = 0
    queue_s: float = 0.0
    compute_s: float = 0.0
    retry_after_s: float = 0.0


class Transport(Protocol):
    """How requests get to a server and replies back; nothing in it may wait but `wait`."""

    def send(self, number: int, batch: int) -> None:
        """Send the batch of this index as the request of this number."""

    def receive(self) -> list[Reply]:
        """Everything that has arrived."""

    def wait(self, seconds: float) -> None:
        """Until something arrives, or so long."""

    def close(self) -> None:
        """Forget what is unanswered."""


@dataclass
class Measured:
    """What came back after the warm-up.

    Attributes:
        seconds: of the measured part.
        requests: answered in these seconds.
        images: answered in these seconds.
        images_ever: answered at any time, warm-up and last answers included.
        sent: requests that were due in these seconds; all that follows is of them.
        latencies_s: seconds to each answer, by version.
        queue_s: seconds that answered requests waited in the server.
        compute_s: seconds of their batches.
        refused: replies that were no answer, by code.
        refused_s: seconds to each of them.
        unanswered: requests without any reply.
        late_s: seconds that the generator itself was late, of each request; 0 in closed loop.
    """

    seconds: float = 0.0
    requests: int = 0
    images: int = 0
    images_ever: int = 0
    sent: int = 0
    latencies_s: dict[int, list[float]] = field(default_factory=dict)
    queue_s: list[float] = field(default_factory=list)
    compute_s: list[float] = field(default_factory=list)
    refused: dict[str, int] = field(default_factory=dict)
    refused_s: list[float] = field(default_factory=list)
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
            "refused_s": quantiles(self.refused_s),
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
    transport: Transport,
    sizes: Sequence[int],
    load: Load,
    progress: Callable[[float, Measured], None] = lambda done, measured: None,
) -> Measured:
    """Send requests and take their answers, in this thread; the transport is closed at the end.

    Args:
        transport: to a server.
        sizes: images of each batch that can be sent; they are sent in turn.
        load: how many, how fast, how long.
        progress: told the share of the time that has passed, and what was measured so far.
    """
    return _Generator(transport, sizes, load, progress).run()


class _Generator:
    def __init__(
        self,
        transport: Transport,
        sizes: Sequence[int],
        load: Load,
        progress: Callable[[float, Measured], None],
    ) -> None:
        self.transport = transport
        self.sizes = sizes
        self.load = load
        self.progress = progress
        self.measured = Measured()
        self.due: dict[int, float] = {}  # request to when it should have gone
        self.held: list[float] = []  # when the places of refused requests may be filled again, the first first
        self.next_id = 0

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
            if self.load.rate is not None:
                self._send(start, end, end)  # what was due while this thread had to wait
            self.measured.seconds = time.monotonic() - self.counted_from
            last = time.monotonic() + self.load.timeout_s
            while self.due and time.monotonic() < last:
                if not self._receive():
                    self._wait(last)
        finally:
            self.transport.close()
        self.measured.unanswered = sum(at >= self.counted_from for at in self.due.values())
        self.progress(1.0, self.measured)
        return self.measured

    def _next_due(self, start: float) -> float:
        if self.load.rate is None:
            return self.held[0] if self.held else float("inf")
        return start + self.next_id / self.load.rate

    def _send(self, start: float, now: float, end: float) -> None:
        """Everything that is due."""
        if self.load.rate is None:
            while self.held and self.held[0] <= now:
                heapq.heappop(self.held)
            while len(self.due) + len(self.held) < self.load.outstanding:
                self._send_one(time.monotonic())
            return
        while (at := start + self.next_id / self.load.rate) <= now and at < end:
            if at >= self.counted_from:
                self.measured.late_s.append(time.monotonic() - at)
            self._send_one(at)

    def _send_one(self, at: float) -> None:
        number = self.next_id
        self.next_id += 1
        self.due[number] = at
        self.measured.sent += at >= self.counted_from
        self.transport.send(number, number % len(self.sizes))

    def _receive(self) -> int:
        """Take every answer that has arrived; how many."""
        replies = self.transport.receive()
        now = time.monotonic()
        for reply in replies:
            self._take(reply, now)
        return len(replies)

    def _take(self, reply: Reply, now: float) -> None:
        at, m = self.due.pop(reply.number), self.measured
        n_images = 0 if reply.refused else self.sizes[reply.number % len(self.sizes)]
        m.images_ever += n_images
        if n_images and self.counted_from <= now <= self.end:
            m.requests += 1
            m.images += n_images
        if reply.retry_after_s > 0 and self.load.rate is None:
            heapq.heappush(self.held, now + reply.retry_after_s)
        if at < self.counted_from:
            return
        if reply.refused:
            m.refused[reply.refused] = m.refused.get(reply.refused, 0) + 1
            m.refused_s.append(now - at)
            return
        m.latencies_s.setdefault(reply.version, []).append(now - at)
        m.queue_s.append(reply.queue_s)
        m.compute_s.append(reply.compute_s)

    def _wait(self, until: float) -> None:
        left_s = min(TELL_S, until - time.monotonic())
        if left_s > 0:
            self.transport.wait(left_s)


class Wire:
    """A server of tta: one DEALER an endpoint, in turn.

    Args:
        endpoints: servers.
        batches: (N, H, W, C) uint8 each.
        load: what its requests say: deadline, whether the monitor sees them.
        credentials: where the daemon asks for keys.

    Raises:
        ConfigError: an endpoint is no address.
    """

    def __init__(
        self,
        endpoints: Sequence[str],
        batches: Sequence[npt.NDArray[np.uint8]],
        load: Load,
        credentials: Credentials | None = None,
    ) -> None:
        self._load = load
        self._payloads = [np.ascontiguousarray(b).tobytes() for b in batches]
        self._shapes = [list(b.shape) for b in batches]
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        try:
            self._sockets = [connect(self._context, e, load.timeout_s, True, credentials) for e in endpoints]
        except ConfigError:
            self.close()
            raise
        self._descriptors = [int(s.getsockopt(zmq.FD)) for s in self._sockets]

    def send(self, number: int, batch: int) -> None:
        """See `Transport`; so are the others."""
        request = protocol.Predict(
            id=number,
            dtype="uint8",
            shape=self._shapes[batch],
            deadline_s=self._load.deadline_s,
            observe=self._load.observe,
        )
        socket = self._sockets[number % len(self._sockets)]
        socket.send_multipart([*protocol.encode(request), self._payloads[batch]])

    def receive(self) -> list[Reply]:
        """Every reply that is there."""
        replies = []
        for socket in self._sockets:
            while True:
                try:
                    frames = socket.recv_multipart(zmq.NOBLOCK)
                except zmq.Again:
                    break
                replies.append(self.reply(*protocol.decode_reply(frames)))
        return replies

    def reply(self, header: dict[str, Any], tensors: list[bytes]) -> Reply:
        """What a decoded reply says."""
        if header["code"] != Code.OK:
            refused, retry_after_s = Code(header["code"]).name.lower(), header.get("retry_after_s") or 0.0
            return Reply(header["id"], refused, retry_after_s=retry_after_s)
        return Reply(header["id"], "", header["version"], header["queue_s"], header["compute_s"])

    def wait(self, seconds: float) -> None:
        """Finer than zmq's own poll, which knows whole milliseconds."""
        # A socket's descriptor tells edges only: what came while sending has to be looked for first.
        if not any(int(s.getsockopt(zmq.EVENTS)) & zmq.POLLIN for s in self._sockets):
            select(self._descriptors, (), (), seconds)

    def close(self) -> None:
        """Drop what is unsent."""
        self._context.destroy(linger=0)
