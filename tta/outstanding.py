"""What a client has asked and not been answered: where each request goes, when it goes again, when it is given up.

No sockets and no clock, so that `Client` and `AsyncClient` are the same but for waiting. Rules:

- A request goes to the endpoint with the fewest images unanswered, within the window that the server grants
  (`credit` of its newest reply). Where none has room, it waits here, in order.
- One that is refused for overload, or because a server is going down, goes again after `retry_after_s`. So does
  one whose endpoint has said nothing at all for `retry_s`, or whose connection is lost: to the same endpoint,
  which knows it by its id and computes it once, or to another, and the one before is told to forget it.
- With several endpoints, one that is silent or draining is left out until it says that it is ready.
- After its time is up, a request is given up.
"""

import heapq
import itertools
import random
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tta import protocol
from tta.errors import CancelledError, Code, DeadlineError, TTAError, UnauthenticatedError, UnavailableError

FIRST_WINDOW = 64  # images, until the server has said how many
PROBE_S = 1.0  # seconds between two questions to an endpoint that does not answer
PROBE_ID = "ready?"
JITTER = 0.25  # of retry_after_s, so that those refused together do not come back together
LOST_S = 0.05  # seconds before a request goes again whose connection was lost
UNSENT_S, LONGEST_UNSENT_S = 0.005, 0.25  # seconds that an endpoint without a connection is left alone, doubling

RequestId = int | str
Header = dict[str, Any]
Answer = tuple[Header, list[bytes]] | TTAError  # header and tensors, or what went wrong


@dataclass(eq=False)
class _Request:
    request: protocol.Request
    tensors: list[bytes]
    n_images: int
    expires: float
    deadline: float  # when it has to start
    endpoint: int | None = None  # where it is now; None: it waits here
    sent: float = 0.0
    due: float = 0.0  # when it goes (again)
    queued: bool = True  # it goes as soon as there is room
    refused: TTAError | None = None  # the newest refusal, told if there is no time for another attempt


@dataclass(eq=False)
class _Endpoint:
    window: int
    usable: bool
    images: int = 0  # unanswered
    heard: float = 0.0  # when it last said anything
    probe_at: float = 0.0
    connects_at: float = 0.0  # without a connection: when to try again
    unsent_s: float = UNSENT_S
    shut: str = ""  # why it does not let us in
    answered: float = float("-inf")  # when the newest request was sent that it has answered


@dataclass(frozen=True)
class Send:
    """A message to be sent; `Outstanding.unsent` takes it back if it cannot be."""

    endpoint: int
    frames: list[bytes]
    request_id: RequestId | None = None  # of a request that waits for an answer


class Outstanding:
    """The requests of one client; owned by one thread.

    Args:
        n_endpoints: servers that can answer.
        client: name under which servers know requests that come again.
        window: images unanswered at one endpoint at most; None: what the server grants.
        retry_s: seconds of silence after which a request goes again; None: nothing is sent twice.
        silence: makes the error of a request that was given up.

    Attributes:
        finished: the answers nobody has taken yet, in order of arrival.
        waiting_images: of requests that are not sent (again) yet, for want of room, a connection or time.
    """

    def __init__(
        self,
        n_endpoints: int,
        client: str,
        window: int | None,
        retry_s: float | None,
        silence: Callable[[], TTAError],
    ) -> None:
        self.finished: dict[RequestId, Answer] = {}
        self.waiting_images = 0
        self._client = client
        self._window = window
        self._retry_s = retry_s
        self._silence = silence
        self._alone = n_endpoints == 1  # no other to turn to: it is always asked
        self._endpoints = [_Endpoint(window or FIRST_WINDOW, self._alone) for _ in range(n_endpoints)]
        self._requests: dict[RequestId, _Request] = {}
        self._queue: deque[_Request] = deque()
        self._unsent: list[_Request] = []  # back to the front of it
        self._again: list[_Request] = []  # to be sent to the endpoint where they are
        self._cancels: list[Send] = []  # of requests that have left an endpoint
        self._alarms: list[tuple[float, int, _Request]] = []  # when a request is due or given up
        self._count = itertools.count()
        self._random = random.Random()

    def add(
        self,
        request: protocol.Request,
        tensors: list[bytes],
        n_images: int,
        expires: float,
        deadline: float = float("inf"),
    ) -> None:
        """Take a request.

        Args:
            request: with an id of which there is no other here.
            tensors: the frames after its header.
            n_images: that count against the window.
            expires: when to give up.
            deadline: when it has to have started; the server is told how long that is when it is sent.
        """
        entry = _Request(request, tensors, n_images, expires, deadline)
        self._requests[request.id] = entry
        self._queue.append(entry)
        self.waiting_images += n_images
        self._alarm(expires, entry)

    def advance(self, now: float) -> list[Send]:
        """What is to be sent now. Requests whose time is up move to `finished`."""
        if all(e.shut for e in self._endpoints):
            for entry in list(self._requests.values()):
                self._finish(entry, UnauthenticatedError(self._endpoints[-1].shut))
        while self._alarms and self._alarms[0][0] <= now:
            entry = heapq.heappop(self._alarms)[2]
            if not self._is_alive(entry):
                continue
            if entry.expires <= now:
                self._finish(entry, entry.refused or self._silence())
            elif entry.due <= now and not entry.queued:
                self._is_due(entry, now)
        sends = self._cancels
        sends += [
            Send(e.endpoint, self._frames(e, now), e.request.id) for e in self._again if e.endpoint is not None
        ]
        self._cancels, self._again = [], []
        for i, endpoint in enumerate(self._endpoints):
            if not endpoint.usable and endpoint.probe_at <= now:
                endpoint.probe_at = now + PROBE_S
                sends.append(Send(i, protocol.encode(protocol.Ready(id=PROBE_ID))))
        self._queue.extendleft(reversed(self._unsent))
        self._unsent = []
        while self._queue:
            entry = self._queue[0]
            if self._is_alive(entry) and entry.deadline <= now:
                late = DeadlineError("its deadline passed before it could be sent")
                self._finish(entry, entry.refused or late)
            place = self._place(entry.n_images, now) if self._is_alive(entry) else -1
            if place is None:
                break
            self._queue.popleft().queued = False
            if place >= 0:
                entry.endpoint, entry.sent = place, now
                self.waiting_images -= entry.n_images
                self._endpoints[place].images += entry.n_images
                if self._retry_s is not None:
                    self._due(entry, now + self._retry_s)
                sends.append(Send(place, self._frames(entry, now), entry.request.id))
        return sends

    def unsent(self, send: Send, now: float) -> None:
        """A message could not be sent for want of a connection: it is tried again, even without retries."""
        place = self._endpoints[send.endpoint]
        if place.connects_at <= now:
            place.connects_at = now + place.unsent_s
            place.unsent_s = min(LONGEST_UNSENT_S, 2 * place.unsent_s)
        place.probe_at = min(place.probe_at, place.connects_at)
        entry = self._requests.get(send.request_id) if send.request_id is not None else None
        if entry is not None and entry.endpoint == send.endpoint:
            self._leave(entry)
            entry.queued = True
            self._unsent.append(entry)

    def receive(self, endpoint: int, frames: Sequence[bytes], now: float) -> None:
        """Take a reply; an answer moves its request to `finished`.

        Raises:
            ProtocolError: this is no reply of the protocol.
        """
        header, tensors = protocol.decode_reply(frames)
        place, request_id, code = self._endpoints[endpoint], header.get("id", 0), header.get("code", 0)
        place.heard, place.connects_at, place.unsent_s, place.shut = now, 0.0, UNSENT_S, ""
        if request_id == PROBE_ID:
            place.usable = bool(header.get("ready"))
            return
        if code == Code.UNAVAILABLE and not self._alone:
            place.usable = False
        if self._window is None and "credit" in header:
            place.window = max(1, int(header["credit"]))
        entry = self._requests.get(request_id) if isinstance(request_id, int | str) else None
        if entry is None or "cancelled" in header:  # answered before; or the answer to a cancel
            return
        error = protocol.reply_error(header)
        if error is None:
            if entry.endpoint == endpoint and entry.n_images:
                place.answered = max(place.answered, entry.sent)
            self._finish(entry, (header, tensors))
        elif entry.endpoint != endpoint:
            return  # it has left: another endpoint decides
        elif not self._goes_again(entry, endpoint, error, now):
            self._finish(entry, error)

    def lost(self, endpoint: int, now: float) -> None:
        """A connection is gone: what was sent over it goes again, or is given up."""
        place = self._endpoints[endpoint]
        place.usable = self._alone
        place.probe_at = now + LOST_S
        for entry in [r for r in self._requests.values() if r.endpoint == endpoint]:
            if self._retry_s is None:
                self._finish(entry, UnavailableError("the connection was lost before an answer came"))
            else:
                self._later(entry, now + LOST_S)

    def shut_out(self, endpoint: int, why: str) -> None:
        """An endpoint does not let us in. If none does, all that is asked is answered so until we knock again."""
        self._endpoints[endpoint].shut = why

    def knock(self, endpoint: int, now: float) -> None:
        """Another connection has been opened where one was refused."""
        place = self._endpoints[endpoint]
        place.shut, place.connects_at, place.unsent_s, place.probe_at = "", 0.0, UNSENT_S, now

    def cancel(self, request_id: RequestId) -> Send | None:
        """What to send so that a request is dropped; one that is nowhere else is finished here."""
        entry = self._requests.get(request_id)
        if entry is None:
            return None
        if entry.endpoint is None:
            self._finish(entry, CancelledError("cancelled before it was sent"))
            return None
        entry.deadline, entry.refused = float("-inf"), CancelledError("cancelled")  # it is not sent again
        return self._cancel(entry.endpoint, request_id)

    def _cancel(self, endpoint: int, request_id: RequestId) -> Send:
        return Send(endpoint, protocol.encode(protocol.Cancel(id=request_id, client=self._client)))

    def forget(self, request_id: RequestId) -> None:
        """Nobody waits for this answer: neither send the request again nor keep the answer."""
        entry = self._requests.get(request_id)
        if entry is not None:
            self._finish(entry, CancelledError("forgotten"))
        self.finished.pop(request_id, None)

    def is_known(self, request_id: RequestId) -> bool:
        """Whether a request is unanswered, or its answer not taken."""
        return request_id in self._requests or request_id in self.finished

    def wake_at(self) -> float:
        """When `advance` has something to do, if nothing arrives before."""
        alarm = self._alarms[0][0] if self._alarms else float("inf")
        if not self._requests:
            return alarm
        probes = [e.probe_at for e in self._endpoints if not e.usable]
        connections = [e.connects_at for e in self._endpoints if e.connects_at and (self._queue or self._unsent)]
        return min([alarm, *probes, *connections])

    def _is_alive(self, entry: _Request) -> bool:
        return self._requests.get(entry.request.id) is entry

    def _frames(self, entry: _Request, now: float) -> list[bytes]:
        if isinstance(entry.request, protocol.Predict) and entry.deadline != float("inf"):
            entry.request.deadline_s = entry.deadline - now
        return [*protocol.encode(entry.request), *entry.tensors]

    def _place(self, n_images: int, now: float) -> int | None:
        """The endpoint that has room and least to do."""
        open_ = [
            (e.images, i)
            for i, e in enumerate(self._endpoints)
            if e.usable and e.connects_at <= now and (e.images == 0 or e.images + n_images <= e.window)
        ]
        return min(open_)[1] if open_ else None

    def _due(self, entry: _Request, at: float) -> None:
        entry.due = at
        self._alarm(at, entry)

    def _alarm(self, at: float, entry: _Request) -> None:
        heapq.heappush(self._alarms, (at, next(self._count), entry))
        if len(self._alarms) > 64 + 4 * len(self._requests):  # most are of requests that were answered long ago
            self._alarms = [alarm for alarm in self._alarms if self._is_alive(alarm[2])]
            heapq.heapify(self._alarms)

    def _later(self, entry: _Request, at: float) -> None:
        """Take a request off its endpoint and send it again at a time."""
        self._leave(entry)
        self._due(entry, at)

    def _leave(self, entry: _Request) -> None:
        if entry.endpoint is not None:
            self._endpoints[entry.endpoint].images -= entry.n_images
            self.waiting_images += entry.n_images
            entry.endpoint = None

    def _is_due(self, entry: _Request, now: float) -> None:
        """A request is due: after a refusal, or since no answer came."""
        if entry.endpoint is None:
            entry.queued = True
            self._queue.append(entry)
            return
        place = self._endpoints[entry.endpoint]
        if self._retry_s is None or now >= entry.deadline:
            return
        # Answers to images come in order: this one's was lost, unless nothing comes any more.
        overtaken = place.answered > entry.sent and now - place.heard < self._retry_s
        if place.heard > entry.sent and now - place.heard < self._retry_s and not overtaken:
            self._due(entry, place.heard + self._retry_s)  # it is slow, not silent
        elif self._alone or overtaken:
            self._again.append(entry)
            self._due(entry, now + self._retry_s)
        else:
            place.usable = False
            self._cancels.append(self._cancel(entry.endpoint, entry.request.id))
            self._leave(entry)
            entry.queued = True
            self._queue.append(entry)

    def _goes_again(self, entry: _Request, endpoint: int, error: TTAError, now: float) -> bool:
        """Whether a refused request is to be tried again, and when."""
        if self._retry_s is None or error.code not in (Code.RESOURCE_EXHAUSTED, Code.UNAVAILABLE):
            return False
        place = self._endpoints[endpoint]
        after = (error.retry_after_s or LOST_S) * (1 + JITTER * self._random.random())
        if not self._alone and error.code == Code.UNAVAILABLE:
            after = 0.0
        if now + after >= min(entry.expires, entry.deadline):
            return False
        if self._window is None:
            place.window = max(1, place.window // 2)  # until an answer says what is granted now
        entry.refused = error
        self._later(entry, now + after)
        return True

    def _finish(self, entry: _Request, answer: Answer) -> None:
        self._leave(entry)
        self.waiting_images -= entry.n_images
        entry.tensors = []  # an alarm may hold the entry for a while
        del self._requests[entry.request.id]
        self.finished[entry.request.id] = answer
