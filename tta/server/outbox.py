"""Replies on their way out: sent at once, or kept within bounds while a client does not take them."""

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import zmq

from tta.server.statistics import Statistics

RETRY_MS = 10  # between two attempts to send replies that were not taken
CLIENT_BYTES = 4 << 20  # of such replies of a client; then its oldest are dropped
ALL_BYTES = 64 << 20  # of all; then the oldest of who has most
CLIENTS_AT_A_TIME = 64  # that are tried
REPLY_BYTES = 250  # of a reply beside its frames' content
# pyzmq's send_multipart costs 11 us for three frames, these 2 (measured).
_SEND = zmq.backend.Socket.send
_NOBLOCK = int(zmq.NOBLOCK)
_MORE = int(zmq.SNDMORE) | _NOBLOCK


@dataclass
class _Late:
    """Replies that a client's socket has not taken, the oldest first."""

    replies: deque[list[bytes]] = field(default_factory=deque)
    n_bytes: int = 0


class Outbox:
    """The sending side of a server's ROUTER socket; for one thread.

    Args:
        socket: with ROUTER_MANDATORY, see `tta.connection.prepare_listener`.
        statistics: where replies are counted that nobody took.
    """

    def __init__(self, socket: "zmq.Socket[bytes]", statistics: Statistics) -> None:
        self._socket = socket
        self._statistics = statistics
        self._late: dict[bytes, _Late] = {}  # by client
        self._n_bytes = 0  # of all of them
        self._retry_at = 0.0  # monotonic seconds

    @property
    def waiting(self) -> bool:
        """Whether somebody has not taken a reply yet: call `retry` every `RETRY_MS`."""
        return bool(self._late)

    def send(self, frames: list[bytes]) -> None:
        """Send a reply; what the client's full socket does not take now waits until it does, within bounds.

        Args:
            frames: the client's identity and the reply's frames.
        """
        late = self._late.get(frames[0]) if self._late else None
        if late is None:
            try:
                send(self._socket, frames)
                return
            except zmq.Again:
                late = self._late[frames[0]] = _Late()
            except zmq.ZMQError:  # EHOSTUNREACH: the client is gone
                self._statistics.undeliverable += 1
                return
        late.replies.append(frames)
        late.n_bytes += _cost(frames)
        self._n_bytes += _cost(frames)
        while late.n_bytes > CLIENT_BYTES:
            self._drop(late)
        while self._n_bytes > ALL_BYTES:
            self._drop(max(self._late.values(), key=lambda each: each.n_bytes))

    def retry(self, at_once: bool = False) -> None:
        """Send what clients did not take before: to some of them, to each until it takes no more.

        Args:
            at_once: even if the last attempt was less than `RETRY_MS` ago.
        """
        if not at_once and time.monotonic() < self._retry_at:
            return
        for identity in list(self._late)[:CLIENTS_AT_A_TIME]:
            late = self._late.pop(identity)  # and to the end of the line, if something is left
            while late.replies:
                try:
                    send(self._socket, late.replies[0])
                    self._take(late)
                except zmq.Again:
                    self._late[identity] = late
                    break
                except zmq.ZMQError:  # gone
                    self._drop(late)
        self._retry_at = time.monotonic() + RETRY_MS / 1000

    def _drop(self, late: _Late) -> None:
        """Give up the oldest of a client's replies."""
        self._take(late)
        self._statistics.undeliverable += 1

    def _take(self, late: _Late) -> None:
        cost = _cost(late.replies.popleft())
        late.n_bytes -= cost
        self._n_bytes -= cost


def _cost(frames: list[bytes]) -> int:
    """Bytes of memory that a reply holds."""
    return sum(map(len, frames)) + REPLY_BYTES


def send(socket: "zmq.Socket[bytes]", frames: Sequence[bytes]) -> None:
    """Send a message without waiting.

    Raises:
        ZMQError: it cannot be sent now (EAGAIN), or to nobody (EHOSTUNREACH).
    """
    for frame in frames[:-1]:
        _SEND(socket, frame, _MORE)
    _SEND(socket, frames[-1], _NOBLOCK)
