"""Sockets of both sides, and a client's connection: what its monitor tells, and why it was not let in."""

import itertools
import time
from typing import Any

import zmq
from zmq.utils.monitor import parse_monitor_message

from tta.errors import ConfigError, UnauthenticatedError
from tta.keys import Credentials

BROKEN_HANDSHAKES = 3  # in a row, after which a silent server has not just gone down in the middle of one
HANDSHAKE_MS = 5000  # that a connection may last without saying who it is
REFUSED_S = 1.0  # after a refusal until somebody may have changed the list of clients
NEXT_KEY_S = 0.05  # before the next of the daemon's keys is tried
SEALED_BYTES = 64  # by which a frame may be longer on a connection with keys; 33 in libzmq 4.3.5
LONGEST_RECONNECT_MS = 1000  # between two attempts to reach an endpoint
EVENTS = (
    zmq.EVENT_DISCONNECTED
    | zmq.EVENT_HANDSHAKE_SUCCEEDED
    | zmq.EVENT_HANDSHAKE_FAILED_AUTH
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
    | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
)
_numbers = itertools.count()


def connect(
    context: Any,
    endpoint: str,
    timeout_s: float,
    queue: bool = False,
    credentials: Credentials | None = None,
) -> Any:
    """A connected DEALER; unless it may `queue`, it takes nothing to send while there is no connection.

    Raises:
        ConfigError: the endpoint is no address.
    """
    socket = _dealer(context, endpoint, timeout_s, queue, credentials, 0)
    _connect(socket, endpoint)
    return socket


def _dealer(
    context: Any, endpoint: str, timeout_s: float, queue: bool, credentials: Credentials | None, turn: int
) -> Any:
    """One that is not connected yet; `turn` says which of the daemon's keys the credentials use."""
    socket = context.socket(zmq.DEALER)
    socket.setsockopt(zmq.LINGER, 0)
    socket.setsockopt(zmq.SNDTIMEO, round(timeout_s * 1000))
    socket.setsockopt(zmq.RCVHWM, 0)  # the client asked for every answer: none is dropped on its side
    socket.setsockopt(zmq.SNDHWM, 0)
    socket.setsockopt(zmq.IMMEDIATE, int(not queue))
    socket.setsockopt(zmq.RECONNECT_IVL_MAX, LONGEST_RECONNECT_MS)
    socket.setsockopt(zmq.IPV6, int("[" in endpoint))
    if credentials is not None and endpoint.startswith("tcp:"):
        credentials.show_on(socket, turn)
    return socket


def _connect(socket: Any, endpoint: str) -> None:
    try:
        socket.connect(endpoint)
    except zmq.ZMQError as error:
        socket.close()
        raise ConfigError(f"endpoint {endpoint!r} is no address: write tcp://HOST:PORT or ipc://PATH") from error


def prepare_listener(socket: Any, endpoint: str, max_message_bytes: int) -> None:
    """Set what a ROUTER that clients connect to needs, before it is bound."""
    socket.setsockopt(zmq.ROUTER_MANDATORY, 1)  # a reply that cannot be delivered is an error, not silence
    # No ROUTER_HANDOVER: with heartbeats, a second client of the same identity aborts libzmq 4.3.5.
    socket.setsockopt(zmq.MAXMSGSIZE, max_message_bytes + SEALED_BYTES)
    socket.setsockopt(zmq.LINGER, 1000)
    socket.setsockopt(zmq.HANDSHAKE_IVL, HANDSHAKE_MS)
    socket.setsockopt(zmq.IPV6, int("[" in endpoint))


class Connection:
    """One endpoint's socket and monitor. Owned by one thread.

    Args:
        context: of pyzmq, or of its asyncio part.
        endpoint: to connect to.
        timeout_s: of a send that has to wait.
        queue: take messages before there is a connection.
        credentials: to show over tcp.
        former: the connection in whose place this is: where the daemon has closed that one before anything was
            said, the next of the keys that it may have is tried.

    Attributes:
        socket: DEALER.
        monitor: its events, for `lost`. It has no bound: libzmq's own thread waits for whoever does not read.
        refused_at: monotonic seconds at which it was refused; libzmq does not try again, or not with another key,
            so that another connection has to.
        is_open: whether both sides have said who they are, as far as `lost` has heard.
        n_opened: how often that was so.
        wrong_key: whether the daemon may have another of its keys.

    Raises:
        ConfigError: the endpoint is no address.
    """

    def __init__(
        self,
        context: Any,
        endpoint: str,
        timeout_s: float,
        queue: bool,
        credentials: Credentials | None,
        former: "Connection | None" = None,
    ) -> None:
        self.endpoint = endpoint
        self.refused_at: float | None = None
        self.is_open = self.wrong_key = False
        self.n_opened = 0
        self._has_key = credentials is not None and endpoint.startswith("tcp:")
        self._has_choice = credentials is not None and self._has_key and credentials.n_server_keys > 1
        self._broken: int = former._broken if former is not None else 0
        self._turn: int = former._turn + former.wrong_key if former is not None else 0
        self.socket = _dealer(context, endpoint, timeout_s, queue, credentials, self._turn)
        address = f"inproc://monitor-{next(_numbers)}"
        self.socket.monitor(address, EVENTS)
        self.monitor = context.socket(zmq.PAIR)
        self.monitor.setsockopt(zmq.LINGER, 0)
        self.monitor.setsockopt(zmq.RCVHWM, 0)
        self.monitor.connect(address)
        # Only now: a refusal can come before this thread goes on, is told once, and libzmq does not knock again.
        try:
            _connect(self.socket, endpoint)
        except ConfigError:
            self.monitor.close()
            raise

    def close(self) -> None:
        """Drop what was not sent."""
        self.socket.disable_monitor()
        self.socket.close()
        self.monitor.close()

    @property
    def is_due(self) -> bool:
        """Whether it was refused a while ago, so that another may be let in."""
        wait_s = NEXT_KEY_S if self.wrong_key else REFUSED_S
        return self.refused_at is not None and time.monotonic() - self.refused_at >= wait_s

    @property
    def is_shut(self) -> bool:
        """Whether connections are closed again and again before anything is said.

        A wrong key may be why, but a proxy whose server is starting does the same: no reason to give up early.
        """
        return self._broken >= BROKEN_HANDSHAKES

    def lost(self, message: list[bytes]) -> bool:
        """Whether the connection is gone, by a message of the monitor.

        Raises:
            UnauthenticatedError: it was refused.
        """
        event = parse_monitor_message(message)["event"]
        if event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
            self._broken = 0
            self.is_open = True
            self.n_opened += 1
        elif event == zmq.EVENT_HANDSHAKE_FAILED_AUTH:
            self.refused_at = time.monotonic()
            raise UnauthenticatedError(
                f"{self.endpoint} does not know this client's key: let the operator add it to the list of clients"
            )
        elif event == zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL:
            self.refused_at = time.monotonic()
            wants = "takes no keys: connect without" if self._has_key else "asks for a key: give the client one"
            raise UnauthenticatedError(f"{self.endpoint} {wants} (credentials; --key and --server-key)")
        elif event == zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL:
            self._broken += 1
            if self._has_choice:
                self.refused_at, self.wrong_key = time.monotonic(), True
        elif event == zmq.EVENT_DISCONNECTED:
            self.is_open = False
        return bool(event == zmq.EVENT_DISCONNECTED)
