"""HTTP/1.1 without a library between: what a fast client would cost, so that peers are measured and not their client.

One request a connection at a time, connections kept alive; request bytes are made beforehand.
"""

import socket
from collections import deque
from collections.abc import Sequence
from select import EPOLLIN, EPOLLOUT, epoll

from tta.scenario.load import Reply

MAX_CONNECTIONS = 512


class _Connection:
    def __init__(self, port: int) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port), timeout=30)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket.setblocking(False)
        self.number = -1
        self.unsent = memoryview(b"")
        self.received = bytearray()


class Http:
    """A `tta.scenario.load.Transport` to a server on loopback.

    Args:
        port: where it listens.
        path: to POST to.
        bodies: of each batch.
        headers: besides Host and Content-Length.
    """

    def __init__(self, port: int, path: str, bodies: Sequence[bytes], headers: Sequence[str]) -> None:
        self._port = port
        self._requests = [_request(path, body, headers) for body in bodies]
        self._idle: list[_Connection] = []
        self._connections: dict[int, _Connection] = {}
        self._queue: deque[tuple[int, int]] = deque()  # requests without a connection
        self._poll = epoll()
        self._ready: list[tuple[int, int]] = []

    def send(self, number: int, batch: int) -> None:
        """See `Transport`; so are the others."""
        if not self._idle and len(self._connections) >= MAX_CONNECTIONS:
            self._queue.append((number, batch))
            return
        self._start(self._idle.pop() if self._idle else self._open(), number, batch)

    def _open(self) -> _Connection:
        connection = _Connection(self._port)
        self._connections[connection.socket.fileno()] = connection
        self._poll.register(connection.socket, EPOLLIN)
        return connection

    def _start(self, connection: _Connection, number: int, batch: int) -> None:
        connection.number = number
        connection.unsent = memoryview(self._requests[batch])
        self._write(connection)

    def _write(self, connection: _Connection) -> None:
        try:
            while connection.unsent:
                connection.unsent = connection.unsent[connection.socket.send(connection.unsent) :]
        except BlockingIOError:
            self._poll.modify(connection.socket, EPOLLIN | EPOLLOUT)
        except OSError:
            return  # the reading side finds it closed
        else:
            self._poll.modify(connection.socket, EPOLLIN)

    def receive(self) -> list[Reply]:
        """Every reply that is complete."""
        replies = []
        events, self._ready = self._ready or self._poll.poll(0), []
        for descriptor, event in events:
            connection = self._connections[descriptor]
            if event & EPOLLOUT:
                self._write(connection)
            if event & ~EPOLLOUT and (reply := self._read(connection)):
                replies.append(reply)
        return replies

    def _read(self, connection: _Connection) -> Reply | None:
        try:
            data = connection.socket.recv(1 << 20)
        except BlockingIOError:
            return None
        except OSError:
            data = b""
        number = connection.number
        if not data:
            del self._connections[connection.socket.fileno()]
            connection.socket.close()
            return Reply(number, "connection closed") if number >= 0 else None
        connection.received += data
        status = _complete(connection.received)
        if status is None:
            return None
        connection.received = bytearray()
        connection.number = -1
        if self._queue:
            self._start(connection, *self._queue.popleft())
        else:
            self._idle.append(connection)
        return Reply(number, "" if status == 200 else f"http {status}")

    def wait(self, seconds: float) -> None:
        """Until a connection has something."""
        self._ready = self._poll.poll(seconds)

    def close(self) -> None:
        """Close every connection."""
        for connection in self._connections.values():
            connection.socket.close()
        self._poll.close()


def _request(path: str, body: bytes, headers: Sequence[str]) -> bytes:
    lines = [f"POST {path} HTTP/1.1", "Host: 127.0.0.1", f"Content-Length: {len(body)}", *headers]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def _complete(received: bytearray) -> int | None:
    """The status of a response that has arrived whole; None before."""
    end = received.find(b"\r\n\r\n")
    if end < 0:
        return None
    head = bytes(received[:end]).lower()
    status = int(head.split(b" ", 2)[1])
    at = head.find(b"content-length:")
    if at >= 0:
        length = int(head[at + 15 :].split(b"\r\n", 1)[0])
        return status if len(received) >= end + 4 + length else None
    return status if received.endswith(b"0\r\n\r\n") else None  # chunked
