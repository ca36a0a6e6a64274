"""Admitted requests, waiting to become batches: bounded, fair between clients, deadline-aware.

The frontend puts, the inference thread takes. A batch starts at once when the model was idle; while it is
busy, requests gather, and a batch that is not full then waits `max_wait_s` (by default not at all: at half load
one request in twenty paid a millisecond for it). It is full when a larger one would not be computed faster, image
for image: more would only make all of them wait for the last. A request is never split: one version computes its
images.

Order is start-time fair queueing (Goyal, Vin and Cheng, SIGCOMM 1996): every client's images advance its own
clock, and the request whose clock is furthest behind goes next. One client's requests stay in their order; a
client that sends ten times its share waits for itself. Its images do not make the batch that another has been
waiting for much longer; nor, while another may come at any moment, the one that this other would have to wait for.
A full queue refuses whoever holds most of it (longest queue drop, Suter et al., INFOCOM 1998), so that nobody is
refused for what another has sent.
"""

import heapq
import queue
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy.typing as npt

from tta.errors import DeadlineError, OverloadedError

SMOOTHING = 0.1  # weight of the newest batch in the moving average of compute seconds
# The same where sizes are compared, of one faster or slower than before: what disturbs a batch only slows it.
FASTER, SLOWER = 0.5, 0.02
FAIR = 2.0  # times as long as one image a batch of one client may take, where it would make others wait
ACTIVE_S = 1.0  # after its last request a client may come again at any moment
STRETCH = 1.5  # times as long a batch may take for being filled up by clients who are ahead of others in it
BESIDE_S = 2e-4  # that a batch costs beside its computing: waking and being woken, an observation
REMEASURE_S = 60.0  # after which a batch size is tried again
TRIES = 5  # then: the first batch of a size costs more than the next
LEAST_RETRY_S = 0.01
MAX_FINISHED = 256
CLOSED_S = 0.005  # between two looks for what the decoder still brings


@dataclass(eq=False, slots=True)
class Pending:
    """One admitted request.

    Attributes:
        identity: ZeroMQ identity of the client.
        request_id: the client's id.
        x: (N, H, W, C) uint8 view of the payload.
        received: monotonic seconds of arrival.
        expires: monotonic seconds after which nobody wants the answer; infinity for never.
        key: who sent it; "" for nobody in particular.
        observed: whether the daemon learns of it.
        client: the client's own name, under which a repeated id is known; "" if it gave none.
        top_k: classes to name in the answer instead of logits; 0 for logits.
        files: JPEG or PNG, until they are decoded; `x` is then a placeholder of the same length.
        file_bytes: of them.
        reply_to: identity that the answer goes to: another one if the client has asked again from there.
        cancelled: nobody wants the answer any more.
        evicted: refused after all, to make room for others.
    """

    identity: bytes
    request_id: Any
    x: npt.NDArray[Any]
    received: float
    expires: float
    key: str = ""
    observed: bool = True
    client: str = ""
    top_k: int = 0
    files: Sequence[memoryview] = ()
    file_bytes: int = 0
    reply_to: bytes = field(default=b"", init=False)
    cancelled: bool = field(default=False, init=False)
    evicted: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        self.reply_to = self.identity


class ComputeTime:
    """Seconds that a batch takes, by its size: a moving average each for 1, 2, 3-4, 5-8 ... images."""

    def __init__(self, max_batch_size: int) -> None:
        self.max_batch_size = max_batch_size
        self._seconds: dict[int, float] = {}  # by bucket: the size's bit length
        self._each_s: dict[int, float] = {}  # an image
        self._tried: dict[int, deque[float]] = {}  # when, monotonic seconds, the latest ones

    def observe(self, n_images: int, seconds: float, now: float, cost_s: float | None = None) -> None:
        """Learn at `now` how long a batch took.

        Args:
            n_images: of the batch.
            seconds: it took.
            now: monotonic seconds.
            cost_s: seconds by which sizes are compared: without what others did meanwhile on the same core. None:
                this batch is not compared; after a pause a batch costs a third more, and those are small ones.
        """
        bucket = (n_images - 1).bit_length()
        known = self._seconds.setdefault(bucket, seconds)
        self._seconds[bucket] = known + SMOOTHING * (seconds - known)
        if cost_s is not None:
            each_s = (cost_s + BESIDE_S) / n_images
            known = self._each_s.setdefault(bucket, each_s)
            self._each_s[bucket] = known + (FASTER if each_s < known else SLOWER) * (each_s - known)
            self._note(bucket, now)

    def fastest(self) -> int:
        """The least images to compute together for the most images a second."""
        if (self.max_batch_size - 1).bit_length() not in self._each_s:
            return self.max_batch_size
        least_s = min(self._each_s.values())
        return min(1 << min(b for b, each_s in self._each_s.items() if each_s <= least_s), self.max_batch_size)

    def short(self) -> int:
        """The most images that take at most `FAIR` times as long as one, but no more than `fastest`.

        What it costs is bounded: where a batch takes a fixed time and one for each image, such batches do at least
        half as many images a second as the largest could.
        """
        fastest, one_s = self.fastest(), self._each_s.get(0)
        if one_s is None:
            return fastest
        sizes = {b: min(1 << b, self.max_batch_size) for b in self._each_s}
        most = max(n for b, n in sizes.items() if n == 1 or n * self._each_s[b] <= FAIR * one_s)
        return min(most, fastest)

    def batch_size(self, queued: int, now: float, short: bool = False) -> int:
        """Images to compute together while so many are queued: `fastest`, or a size to try.

        Tried is what was not measured or `tried` so many times in `REMEASURE_S`, when as many are queued.

        Args:
            queued: images.
            now: monotonic seconds.
            short: `short` instead of `fastest`; nothing larger than the next size is tried then.
        """
        enough, largest = self.short() if short else self.fastest(), (self.max_batch_size - 1).bit_length()
        for bucket in range(largest + 1 if largest in self._each_s else 0):
            size = min(1 << bucket, self.max_batch_size)
            if size > queued or (short and size > 2 * enough):
                break
            if self._is_stale(bucket, now):
                return size
        return enough

    def tried(self, size: int, now: float) -> None:
        """A batch of at most `size` was made; requests of several images may have kept it from being so large."""
        self._note((size - 1).bit_length(), now)

    def _note(self, bucket: int, now: float) -> None:
        self._tried.setdefault(bucket, deque(maxlen=TRIES)).append(now)

    def _is_stale(self, bucket: int, now: float) -> bool:
        tried = self._tried.get(bucket)
        return tried is None or len(tried) < TRIES or now - tried[0] >= REMEASURE_S

    def of(self, n_images: int) -> float:
        """Expected seconds for so many images in full batches and a rest; 0 while nothing is known."""
        full, rest = divmod(n_images, self.max_batch_size)
        return full * self._of_batch(self.max_batch_size) + (self._of_batch(rest) if rest else 0.0)

    def _of_batch(self, n: int) -> float:
        bucket = (n - 1).bit_length()
        if bucket in self._seconds:
            return self._seconds[bucket]
        larger = [b for b in self._seconds if b > bucket]
        if larger:  # at most as long as a larger one
            return self._seconds[min(larger)]
        smaller = max(self._seconds, default=None)  # at most in proportion
        return 0.0 if smaller is None else self._seconds[smaller] * float(1 << (bucket - smaller))


class _Client:
    """What one client has queued, in order, and the clock of its share."""

    def __init__(self) -> None:
        self.queue: deque[Pending] = deque()
        self.images = 0
        self.clock = 0


class Batcher:
    """Bounded queue of requests. `take` and `observe` belong to the inference thread, the rest to the frontend.

    Args:
        max_batch_size: images computed together at most.
        max_wait_s: seconds a batch waits to fill.
        capacity: images queued at most.
        capacity_s: expected seconds of computation queued at most.
    """

    def __init__(self, max_batch_size: int, max_wait_s: float, capacity: int, capacity_s: float) -> None:
        self.max_batch_size = max_batch_size
        self.max_wait_s = max_wait_s
        self.capacity = capacity
        self.capacity_s = capacity_s
        self.images = 0  # queued now
        self._room = capacity  # images queued at most, by number and by time
        self.compute_time = ComputeTime(max_batch_size)
        self._clients: dict[bytes, _Client] = {}  # those with something queued
        self._active: dict[bytes, float] = {}  # when each client last sent, monotonic seconds, the latest last
        self.absent = False  # one of them has nothing queued
        self._busy = True  # the batch now computed followed another at once
        self._heap: list[tuple[int, int, Pending]] = []  # evicted ones stay until their turn
        self._clock = 0  # of the request taken last
        self._finished: dict[bytes, int] = {}  # clocks of clients with nothing queued that are ahead of it
        self._count = 0
        self._busy_until = 0.0  # when the batch now computed should be done
        self._wanted = 0  # images that the inference thread waits for; 0: it does not wait
        self._lock = threading.Lock()
        self._ready: queue.SimpleQueue[None] = queue.SimpleQueue()  # a wake-up each; half the cost of a Condition
        self._closed = False

    def put(self, request: Pending) -> list[Pending]:
        """Queue a request.

        Returns:
            Requests of other clients that have to give way, to be refused as `overloaded`; without their images.

        Raises:
            OverloadedError: the queue is full, of the client's own requests more than of any other's.
            DeadlineError: by the present speed it could not start before it expires.
        """
        n = len(request.x)
        with self._lock:
            client = self._clients.get(request.identity) or _Client()
            if request.expires != float("inf"):
                self._check_deadline(request, client)
            evicted = self._make_room(n, client)
            if not client.queue:  # nobody gains by having been silent, nor by having just been served
                client.clock = max(self._clock, self._finished.pop(request.identity, 0))
            heapq.heappush(self._heap, (client.clock, self._count, request))
            self._count += 1
            client.clock += n
            client.queue.append(request)
            client.images += n
            self._clients[request.identity] = client
            self._active.pop(request.identity, None)
            self._active[request.identity] = request.received
            self.images += n
            if 0 < self._wanted <= self.images:  # a wake-up for every request would cost more than the request
                self._wanted = 0
                self._ready.put(None)
            return evicted

    def _check_deadline(self, request: Pending, client: _Client) -> None:
        left = request.expires - time.monotonic()
        if left >= self._wait(self.images):  # even as the very last it is in time
            return
        wait = self._wait(self._ahead(client, len(request.x)))
        if wait > left:
            raise DeadlineError(
                f"it could start in about {wait:.3f} s, later than its deadline ({max(0.0, left):.3f} s left)",
                max(LEAST_RETRY_S, round(wait, 3)),
            )

    def _make_room(self, n: int, client: _Client) -> list[Pending]:
        """Evict the newest requests of those who have more queued; refuse where that is not enough.

        One request of everybody has twice the room, so that a large one is not kept out by a trickle of small
        ones, nor pushed out by one.
        """
        room = self._room if client.queue else 2 * self._room
        excess, own = self.images + n - room, client.images + n
        if excess <= 0 or not self.images:
            return []
        others = [c for c in self._clients.values() if c is not client and len(c.queue) > 1]
        if sum(max(0, c.images - max(own, len(c.queue[0].x))) for c in others) < excess:
            raise self.overloaded(self._ahead(client, n))
        evicted = []
        while excess > 0:
            longest = max((c for c in others if len(c.queue) > 1), key=lambda c: c.images)
            victim = longest.queue.pop()
            longest.clock -= len(victim.x)  # it was the newest: nothing stands behind it
            excess -= len(victim.x)
            self._forget(victim)
            victim.evicted = True
            victim.x, victim.files = victim.x[:0].copy(), ()  # the heap holds it until its turn, without images
            evicted.append(victim)
        return evicted

    def overloaded(self, ahead: int) -> OverloadedError:
        """Why a request is refused that a full queue has no place for, with so many images ahead of it."""
        wait_s = self._wait(ahead)
        return OverloadedError(
            f"queue is full ({self.images} images; room for {self._room}, {wait_s:.3f} s)",
            max(LEAST_RETRY_S, round(wait_s, 3)),
        )

    def _forget(self, request: Pending) -> None:
        """Account for a request that has left its client's queue."""
        client = self._clients[request.identity]
        client.images -= len(request.x)
        self.images -= len(request.x)
        if not client.queue:
            del self._clients[request.identity]
            self._finished[request.identity] = client.clock
            if len(self._finished) > 2 * len(self._clients) + MAX_FINISHED:
                self._finished = {c: clock for c, clock in self._finished.items() if clock > self._clock}

    def _ahead(self, client: _Client, n: int) -> int:
        """Images computed before a new request of n images: of each other client at most as many as of its own."""
        own = client.images
        return own + sum(min(c.images, own + n) for c in self._clients.values() if c is not client)

    def _wait(self, images: int) -> float:
        """Expected seconds until so many queued images are computed."""
        return max(0.0, self._busy_until - time.monotonic()) + self.compute_time.of(images)

    def credit(self) -> int:
        """Images that a client may have queued, if all that have something queued share alike."""
        return max(1, self._room // max(1, len(self._clients)))

    def observe(self, n_images: int, seconds: float, cost_s: float | None = None) -> None:
        """Inference thread: learn how long a batch took, and so how many images there is time for.

        Args:
            n_images: of the batch.
            seconds: it took.
            cost_s: of them, those not spent on anything else; None: all.
        """
        with self._lock:
            cost_s = seconds if cost_s is None else cost_s
            self.compute_time.observe(n_images, seconds, time.monotonic(), cost_s if self._busy else None)
            each_s = self.compute_time.of(self.max_batch_size) / self.max_batch_size
            self._room = max(1, min(self.capacity, int(self.capacity_s / each_s))) if each_s else self.capacity

    def cancel(self, identity: bytes, request_id: Any) -> bool:
        """Mark a queued request as cancelled; False if it is not queued (any more)."""
        with self._lock:
            client = self._clients.get(identity)
            for request in client.queue if client else ():
                if request.request_id == request_id:
                    request.cancelled = True
                    return True
        return False

    def take(self, timeout_s: float) -> tuple[list[Pending], list[Pending]]:
        """Wait for work.

        Returns:
            The next batch, and requests that are not worth computing: cancelled or expired. Both are empty on
            time-out or close.
        """
        with self._lock:
            self._busy = bool(self._clients)
            if not self._busy:
                self._busy_until = 0.0
                self._finished.clear()
                self._wait_for(1, min(timeout_s, CLOSED_S) if self._closed else timeout_s)
            elif self.max_wait_s:
                self._fill()
            batch: list[Pending] = []
            dropped: list[Pending] = []
            size, now = 0, time.monotonic()
            self._see_who_is_absent(now)
            if self.absent:
                full = self.compute_time.fastest()
                fair = self.compute_time.batch_size(self.images, now, short=True)
            else:
                full = fair = self.compute_time.batch_size(self.images, now)
            served: set[bytes] = set()  # clients in the batch
            longest_s = float("inf")  # the batch may take, once someone in it has no more to send
            while self._heap:
                clock, _, request = self._heap[0]
                n = len(request.x)
                if not request.evicted:
                    # Who can fill a batch alone, or has some in this one, does not make others wait for it.
                    alone = longest_s < float("inf") and self._clients[request.identity].images > full
                    ahead = alone or request.identity in served
                    if batch and (
                        size + n > (fair if ahead else full)
                        or (ahead and self.compute_time.of(size + n) > longest_s)
                    ):
                        break
                    self._clock = clock
                    self._clients[request.identity].queue.popleft()  # a client's requests are taken in order
                    self._forget(request)
                    if request.cancelled or request.expires < now:
                        dropped.append(request)
                    else:
                        batch.append(request)
                        size += n
                        served.add(request.identity)
                        if request.identity not in self._clients or (longest_s < float("inf") and not ahead):
                            longest_s = STRETCH * self.compute_time.of(size)
                heapq.heappop(self._heap)
            if batch:
                self.compute_time.tried(fair, now)
            self._busy_until = now + self.compute_time.of(size)
            return batch, dropped

    def _see_who_is_absent(self, now: float) -> None:
        """Tell whether a client that has sent something lately has nothing queued."""
        while self._active and now - self._active[oldest := next(iter(self._active))] > ACTIVE_S:
            del self._active[oldest]
        self.absent = len(self._active) > len(self._clients)

    def _fill(self) -> None:
        """Give a batch that is not full up to `max_wait_s` from its first request's arrival."""
        first = min(c.queue[0].received for c in self._clients.values())
        end = first + self.max_wait_s
        while not self._closed:
            now = time.monotonic()
            full = self.compute_time.batch_size(self.images, now)
            if self.images >= full or now >= end:
                return
            self._wait_for(full, end - now)

    def _wait_for(self, images: int, timeout_s: float) -> None:
        """Let go of the lock until so many images are queued; it may be woken early."""
        self._wanted = images
        self._lock.release()
        try:
            self._ready.get(timeout=timeout_s)
        except queue.Empty:
            pass
        finally:
            self._lock.acquire()
            self._wanted = 0

    def clear(self) -> list[Pending]:
        """Everything that is queued, which is not computed any more."""
        with self._lock:
            left = [request for _, _, request in sorted(self._heap) if not request.evicted]
            self._heap.clear()
            self._clients.clear()
            self.images = 0
            return left

    def close(self) -> None:
        """Wake the inference thread for good; what is queued can still be taken."""
        with self._lock:
            self._closed = True
            self._ready.put(None)
