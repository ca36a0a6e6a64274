"""What a client has asked and not been answered: where each request goes, when it goes again, when it is given up.

No sockets and no clock, so that `Client` and `AsyncClient` are the same but for waiting. Rules:

- A request goes to the endpoint with the fewest images unanswered, within the window that the server grants
  (`credit` of its newest reply). Where none has room, it waits here, in order.
- One that is refused for overload, or because a server is going down, goes again after `retry_after_s`; one
  without an answer after `retry_s`, or at once if the connection is lost. It keeps its id: a server computes it
  once.
- With several endpoints, one that is silent or draining is left out until it answers a `ready` again.
- After its time is up, a request is given up.
"""

import heapq
import itertools
import random
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tta import protocol
from tta.errors import CancelledError, Code, DeadlineError, TTAError, from_wire

FIRST_WINDOW = 64  # images, until the server has said how many
PROBE_S = 1.0  # seconds between two questions to an endpoint that does not answer
PROBE_ID = "ready?"
JITTER = 0.25  # of retry_after_s, so that those refused together do not come back together
LOST_S = 0.05  # seconds before a request goes again on a connection that was lost

RequestId = int | str
Header = dict[str, Any]
Answer = tuple[Header, list[bytes]] | TTAError  # header and tensors, or what went wrong


@dataclass(eq=False)
class _Request:
    request_id: RequestId
    frames: list[bytes]
    n_images: int
    expires: float
    retry_until: float
    endpoint: int | None = None  # where it is now; None: it waits here
    due: float = 0.0  # when it goes (again)
    queued: bool = True  # it goes as soon as there is room
    refused: TTAError | None = None  # the newest refusal, told if there is no time for another attempt


@dataclass(eq=False)
class _Endpoint:
    window: int
    usable: bool
    images: int = 0  # unanswered
    probe_at: float = 0.0


class Outstanding:
    """The requests of one client; owned by one thread.

    Args:
        n_endpoints: servers that can answer.
        window: images unanswered at one endpoint at most; None: what the server grants.
        retry_s: seconds without an answer after which a request goes again; None: nothing is sent twice.
        silence: what to say of a request that was given up.

    Attributes:
        finished: the answers nobody has taken yet, in order of arrival.
    """

    def __init__(self, n_endpoints: int, window: int | None, retry_s: float | None, silence: str) -> None:
        self.finished: dict[RequestId, Answer] = {}
        self._window = window
        self._retry_s = retry_s
        self._silence = silence
        self._alone = n_endpoints == 1  # no other to turn to: it is always asked
        self._endpoints = [_Endpoint(window or FIRST_WINDOW, self._alone) for _ in range(n_endpoints)]
        self._requests: dict[RequestId, _Request] = {}
        self._queue: deque[_Request] = deque()
        self._alarms: list[tuple[float, int, _Request]] = []  # when a request is due or given up
        self._count = itertools.count()
        self._random = random.Random()

    def add(
        self, request_id: RequestId, frames: list[bytes], n_images: int, expires: float, retry_until: float
    ) -> None:
        """Take a request.

        Args:
            request_id: of which there is no other here.
            frames: what to send.
            n_images: that count against the window.
            expires: when to give up.
            retry_until: when to stop trying again.
        """
        request = _Request(request_id, frames, n_images, expires, retry_until)
        self._requests[request_id] = request
        self._queue.append(request)
        self._alarm(expires, request)

    def advance(self, now: float) -> list[tuple[int, list[bytes]]]:
        """What is to be sent now: (endpoint, frames). Requests whose time is up move to `finished`."""
        while self._alarms and self._alarms[0][0] <= now:
            request = heapq.heappop(self._alarms)[2]
            if self._requests.get(request.request_id) is not request:
                continue
            if request.expires <= now:
                self._finish(request, request.refused or DeadlineError(self._silence))
            elif request.due <= now and not request.queued:
                self._silent(request, now)
        sends = []
        for i, endpoint in enumerate(self._endpoints):
            if not endpoint.usable and endpoint.probe_at <= now:
                endpoint.probe_at = now + PROBE_S
                sends.append((i, protocol.encode(protocol.Ready(id=PROBE_ID))))
        while self._queue:
            place = self._place(self._queue[0].n_images)
            if place is None:
                break
            request = self._queue.popleft()
            request.queued = False
            if self._requests.get(request.request_id) is request:
                self._go(request, place, now)
                sends.append((place, request.frames))
        return sends

    def receive(self, endpoint: int, frames: Sequence[bytes], now: float) -> None:
        """Take a reply; an answer moves its request to `finished`.

        Raises:
            ProtocolError: this is no reply of the protocol.
        """
        header, tensors = protocol.decode_reply(frames)
        place, request_id, code = self._endpoints[endpoint], header.get("id", 0), header.get("code", 0)
        if request_id == PROBE_ID:
            place.usable = bool(header.get("ready"))
            return
        place.usable = place.usable or code != Code.UNAVAILABLE
        if self._window is None and "credit" in header:
            place.window = max(1, int(header["credit"]))
        request = self._requests.get(request_id)
        if (
            request is None or "cancelled" in header
        ):  # answered before; or the answer to `cancel`, not to the request
            return
        if code == Code.OK:
            self._finish(request, (header, tensors))
            return
        error = from_wire(code, header.get("error", ""), header.get("retry_after_s"))
        error.add_note(f"request {request_id}")
        if not self._again(request, endpoint, error, now):
            self._finish(request, error)

    def lost(self, endpoint: int, now: float) -> None:
        """A connection is gone: what was sent over it goes again."""
        place = self._endpoints[endpoint]
        place.usable = self._alone
        place.probe_at = now + LOST_S
        for request in [r for r in self._requests.values() if r.endpoint == endpoint]:
            if self._retry_s is not None and now < request.retry_until:
                self._later(request, now + LOST_S)

    def cancel(self, request_id: RequestId) -> int | None:
        """Where to tell that a request is not wanted any more; one that was not sent is finished here."""
        request = self._requests.get(request_id)
        if request is not None and request.endpoint is None:
            self._finish(request, CancelledError("cancelled before it was sent"))
        return request.endpoint if request is not None else None

    def forget(self, request_id: RequestId) -> None:
        """Nobody waits for this answer: neither send the request again nor keep the answer."""
        request = self._requests.get(request_id)
        if request is not None:
            self._finish(request, CancelledError("forgotten"))
        self.finished.pop(request_id, None)

    def is_waiting(self, request_id: RequestId) -> bool:
        """Whether a request has not been sent (again) for want of room."""
        request = self._requests.get(request_id)
        return request is not None and request.endpoint is None

    def wake_at(self) -> float:
        """When `advance` has something to do, if nothing arrives before."""
        alarm = self._alarms[0][0] if self._alarms else float("inf")
        if self._requests:
            return min([alarm, *(e.probe_at for e in self._endpoints if not e.usable)])
        return alarm

    def _place(self, n_images: int) -> int | None:
        """The endpoint that has room and least to do."""
        open_ = [
            (e.images, i)
            for i, e in enumerate(self._endpoints)
            if e.usable and (e.images == 0 or e.images + n_images <= e.window)
        ]
        return min(open_)[1] if open_ else None

    def _go(self, request: _Request, place: int, now: float) -> None:
        request.endpoint = place
        self._endpoints[place].images += request.n_images
        if self._retry_s is not None:
            self._due(request, now + self._retry_s)

    def _due(self, request: _Request, at: float) -> None:
        request.due = at
        self._alarm(at, request)

    def _alarm(self, at: float, request: _Request) -> None:
        heapq.heappush(self._alarms, (at, next(self._count), request))

    def _leave(self, request: _Request) -> None:
        """Take a request off its endpoint's account."""
        if request.endpoint is not None:
            self._endpoints[request.endpoint].images -= request.n_images
            request.endpoint = None

    def _later(self, request: _Request, at: float) -> None:
        self._leave(request)
        self._due(request, at)

    def _silent(self, request: _Request, now: float) -> None:
        """A request is due: for the first time after a refusal, or again since no answer came."""
        if request.endpoint is not None:
            if now >= request.retry_until:
                return
            if not self._alone:
                self._endpoints[request.endpoint].usable = False
            self._leave(request)
        request.queued = True
        self._queue.append(request)

    def _again(self, request: _Request, endpoint: int, error: TTAError, now: float) -> bool:
        """Whether a refused request is to be tried again, and when."""
        if self._retry_s is None or error.code not in (Code.RESOURCE_EXHAUSTED, Code.UNAVAILABLE):
            return False
        place = self._endpoints[endpoint]
        after = (error.retry_after_s or LOST_S) * (1 + JITTER * self._random.random())
        if not self._alone:
            after = 0.0 if error.code == Code.UNAVAILABLE else after
            place.usable = place.usable and error.code != Code.UNAVAILABLE
        if now + after >= request.retry_until:
            return False
        if self._window is None:
            place.window = max(1, place.window // 2)  # until an answer says what is granted now
        request.refused = error
        self._later(request, now + after)
        return True

    def _finish(self, request: _Request, answer: Answer) -> None:
        self._leave(request)
        del self._requests[request.request_id]
        self.finished[request.request_id] = answer
