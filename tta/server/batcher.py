"""Admitted requests, waiting to become batches: bounded, in order, deadline-aware.

The frontend puts, the inference thread takes. A batch starts at once when the model was idle; while it is
busy, requests gather, and a batch that is not full then waits `max_wait_s`. A request is never split: its images
are computed by one version.
"""

import threading
import time
from collections import deque
from dataclasses import dataclass, field
from typing import Any

import numpy.typing as npt

from tta.errors import DeadlineError, OverloadedError


@dataclass(eq=False)
class Pending:
    """One admitted request.

    Attributes:
        identity: ZeroMQ identity of the client.
        request_id: the client's id.
        x: (N, H, W, C) uint8 view of the payload.
        received: monotonic seconds of arrival.
        expires: monotonic seconds after which nobody wants the answer; infinity for never.
        key: who sent it; "" for nobody in particular.
    """

    identity: bytes
    request_id: Any
    x: npt.NDArray[Any]
    received: float
    expires: float
    key: str = ""
    cancelled: bool = field(default=False, init=False)


class Batcher:
    """Bounded queue of requests. `put` and `cancel` belong to the frontend, `take` to the inference thread."""

    def __init__(self, max_batch_size: int, max_wait_s: float, capacity: int) -> None:
        self.max_batch_size = max_batch_size
        self.max_wait_s = max_wait_s
        self.capacity = capacity
        self.images = 0  # queued now
        self.image_s = 0.0  # moving average of compute seconds an image, for retry_after_s
        self._queue: deque[Pending] = deque()
        self._ready = threading.Condition()
        self._closed = False

    def put(self, request: Pending) -> None:
        """Queue a request.

        Raises:
            OverloadedError: it would take the queue past its capacity in images.
            DeadlineError: by the present speed it could not start before it expires.
        """
        with self._ready:
            wait_s = self.images * self.image_s
            if self.images + len(request.x) > self.capacity:
                raise OverloadedError(
                    f"queue is full ({self.images} of {self.capacity} images)", max(0.01, round(wait_s, 3))
                )
            if request.received + wait_s > request.expires:
                raise DeadlineError(f"the queue takes about {wait_s:.3f} s, longer than the deadline")
            self._queue.append(request)
            self.images += len(request.x)
            self._ready.notify()

    def cancel(self, identity: bytes, request_id: Any) -> bool:
        """Mark a queued request as cancelled; False if it is not queued (any more)."""
        with self._ready:
            for request in self._queue:
                if request.identity == identity and request.request_id == request_id:
                    request.cancelled = True
                    return True
        return False

    def take(self, timeout_s: float) -> list[Pending]:
        """Wait for work and return the next batch in order of arrival; empty on time-out or close."""
        with self._ready:
            idle = not self._queue
            if idle:
                self._ready.wait(timeout_s)
            if not self._queue:
                return []
            if not idle:
                self._fill()
            batch = [self._queue.popleft()]
            size = len(batch[0].x)
            while self._queue and size + len(self._queue[0].x) <= self.max_batch_size:
                batch.append(self._queue.popleft())
                size += len(batch[-1].x)
            self.images -= size
            return batch

    def _fill(self) -> None:
        """Give a batch that is not full up to `max_wait_s` from its first request's arrival."""
        end = self._queue[0].received + self.max_wait_s
        while self.images < self.max_batch_size and not self._closed:
            left = end - time.monotonic()
            if left <= 0:
                return
            self._ready.wait(left)

    def observe(self, n_images: int, compute_s: float) -> None:
        """Learn how long images take now."""
        each = compute_s / n_images
        self.image_s = each if self.image_s == 0 else 0.9 * self.image_s + 0.1 * each

    def close(self) -> None:
        """Wake the inference thread for good; what is queued can still be taken."""
        with self._ready:
            self._closed = True
            self._ready.notify_all()
