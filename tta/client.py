"""Client and AsyncClient: predictions and labels over ZeroMQ. Needs numpy, msgspec and pyzmq only.

One client belongs to one thread. Errors are those of `tta.errors`, raised as the daemon answered them. Where a
request goes, and when again, is decided in `tta.outstanding`; here is only the sending and waiting.
"""

import asyncio
import itertools
import math
import secrets
import time
from collections import deque
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt
import zmq
import zmq.asyncio

from tta import protocol
from tta.connection import NEXT_KEY_S, Connection
from tta.errors import (
    ConfigError,
    DeadlineError,
    InputError,
    PreconditionError,
    TTAError,
    UnauthenticatedError,
    UnavailableError,
)
from tta.keys import Credentials
from tta.outstanding import Answer, Outstanding, Send

DEFAULT_ENDPOINT = "tcp://127.0.0.1:5555"
DEFAULT_CONTROL = "tcp://127.0.0.1:5556"
MAX_WAITING = 64  # images that a blocking client holds back before `submit` waits
ATTEMPTS = 4  # at most, of a request without an answer, in its time
MAX_POLL_S = 60.0  # a poll takes no infinity

Images = npt.NDArray[np.uint8]
Pictures = bytes | Sequence[bytes]  # JPEG or PNG files


@dataclass(frozen=True)
class Prediction:
    """The answer to one request.

    Attributes:
        request_id: the client's id of the request.
        logits: (N, K) float32.
        version: the one version of the model that computed all rows; 0 is the source.
        prediction_id: id of the first image; image i has `prediction_id + i`.
        queue_s: seconds the request waited in the server.
        compute_s: seconds its batch took to compute.
    """

    request_id: int | str
    logits: npt.NDArray[np.float32]
    version: int
    prediction_id: int
    queue_s: float
    compute_s: float

    @property
    def classes(self) -> npt.NDArray[np.int64]:
        """(N,) index of the largest logit of each image."""
        classes: npt.NDArray[np.int64] = self.logits.argmax(axis=1)
        return classes

    @property
    def prediction_ids(self) -> list[int]:
        """The id of every image."""
        return list(range(self.prediction_id, self.prediction_id + len(self.logits)))


@dataclass(frozen=True)
class Question:
    """A prediction whose label would help.

    Attributes:
        prediction_id: for `Client.label`.
        predicted: class index of the answer.
        uncertainty: of the answer, in [0, 1].
        image: (H, W, C) uint8, if images were asked for.
    """

    prediction_id: int
    predicted: int
    uncertainty: float
    image: Images | None


def _questions(reply: tuple[dict[str, Any], list[bytes]]) -> list[Question]:
    header, tensors = reply
    images: Iterable[Images | None] = itertools.repeat(None)
    if tensors:
        images = np.frombuffer(tensors[0], np.uint8).reshape(header["shape"])
    return [
        Question(p["prediction_id"], p["predicted"], p["uncertainty"], image)
        for p, image in zip(header["predictions"], images, strict=False)
    ]


def _batch(x: Images) -> Images:
    x = np.asarray(x)
    if x.dtype != np.uint8 or x.ndim not in (3, 4):
        raise InputError(f"expected images (N, H, W, C) or (H, W, C) of uint8, got {x.dtype}{x.shape}")
    return x[None] if x.ndim == 3 else x


Payload = tuple[str, list[int], list[int], bytes]


def _payload(x: Images | Pictures) -> Payload:
    """Dtype, shape and sizes of a request for images or files, and its bytes."""
    given = [x] if isinstance(x, bytes) else x
    files = [file for file in given if isinstance(file, bytes)] if isinstance(given, list | tuple) else []
    if files and len(files) == len(given):
        return protocol.PICTURES, [len(files)], [len(file) for file in files], b"".join(files)
    images = _batch(np.asarray(x))
    return str(images.dtype), list(images.shape), [], protocol.tensor_bytes(images)


def _largest_of(metadata: dict[str, Any]) -> float:
    """Bytes of a frame that who told these metadata takes."""
    return float(metadata.get("max_message_bytes", math.inf))


def _refuse_larger(n_bytes: int, largest: float) -> None:
    if n_bytes > largest:
        raise InputError(
            f"{n_bytes} bytes in one request: {largest:.0f} are taken (`server.max_message_bytes`); "
            "send fewer or smaller images"
        )


def _opened(answer: Answer) -> tuple[dict[str, Any], list[bytes]]:
    """Header and tensors of an answer, or the error it is."""
    if isinstance(answer, TTAError):
        raise answer
    return answer


def _prediction(answer: Answer) -> Prediction:
    header, tensors = _opened(answer)
    logits = np.frombuffer(tensors[0], "<f4").reshape(header["shape"])
    return Prediction(
        header["id"],
        logits,
        header["version"],
        header["prediction_id"],
        header["queue_s"],
        header["compute_s"],
    )


def _checked(frames: list[bytes]) -> tuple[dict[str, Any], list[bytes]]:
    """Header and tensors of a reply on the control socket, or the error it tells."""
    header, tensors = protocol.decode_reply(frames)
    error = protocol.reply_error(header)
    if error is not None:
        raise error
    return header, tensors


def _label_request(
    request_id: int,
    prediction_ids: Sequence[int],
    labels: Sequence[int] | None,
    correct: Sequence[bool] | None,
    x: Images | None,
) -> list[bytes]:
    request = protocol.Label(
        id=request_id,
        prediction_ids=[int(i) for i in prediction_ids],
        labels=[] if labels is None else [int(i) for i in labels],
        correct=[] if correct is None else [bool(i) for i in correct],
    )
    if x is None:
        return protocol.encode(request)
    request.shape = list(x.shape)
    request.dtype = str(x.dtype)
    return protocol.encode(request, x)


def endpoints_of(endpoint: str | Sequence[str]) -> list[str]:
    """One address, several with commas between, or a sequence of them."""
    names = endpoint.split(",") if isinstance(endpoint, str) else endpoint
    return [name.strip() for name in names]


class _Connections:
    """What both clients have: names, endpoints, and the requests that are not answered."""

    _context: Any

    def __init__(
        self,
        endpoint: str | Sequence[str],
        control: str,
        timeout_s: float,
        window: int | None,
        retry: bool,
        credentials: Credentials | None,
    ) -> None:
        self.timeout_s = timeout_s
        self._endpoints = endpoints_of(endpoint)
        self._control = control
        self._credentials = credentials
        self._servers: list[Connection] = []
        self._daemon: Connection | None = None
        self._name = secrets.token_hex(8)  # under which servers know a request that comes again
        self._ids = itertools.count(1)
        self._largest: float = protocol.ALWAYS_TAKEN_BYTES  # of a frame that the servers are known to take
        self._outstanding = Outstanding(
            len(self._endpoints),
            self._name,
            window,
            timeout_s / ATTEMPTS if retry else None,
            lambda: self._silence(self._servers, self._endpoints),
        )

    def _add(
        self, content: Payload, deadline_s: float | None, key: str | None, observe: bool, began: float
    ) -> int:
        """Take a request for images or files of a call that `began` then; it goes with the next turn."""
        dtype, shape, sizes, payload = content
        request = protocol.Predict(
            id=next(self._ids),
            dtype=dtype,
            shape=shape,
            sizes=sizes,
            deadline_s=deadline_s,
            key=key,
            client=self._name,
            observe=observe,
        )
        deadline = float("inf") if deadline_s is None else began + deadline_s
        self._outstanding.add(request, [payload], shape[0], began + self.timeout_s, deadline)
        return int(request.id)

    def _add_question(self, request: protocol.Request, wait_s: float | None = None) -> int | str:
        """Take a request without images."""
        request.id = next(self._ids)
        wait_s = self.timeout_s if wait_s is None else min(wait_s, self.timeout_s)
        self._outstanding.add(request, [], 0, time.monotonic() + wait_s)
        return request.id

    def _connect(self, endpoint: str, queue: bool = False, former: Connection | None = None) -> Connection:
        return Connection(self._context, endpoint, self.timeout_s, queue, self._credentials, former)

    def _connect_servers(self) -> None:
        try:
            for name in self._endpoints:
                self._servers.append(self._connect(name))
        except ConfigError:
            self._close_all()
            raise

    def _listen(self, endpoint: int) -> None:
        """Begin to hear what comes from a server."""
        raise NotImplementedError

    def _drop(self, connection: Connection) -> None:
        """Hear it no more, and close it."""
        raise NotImplementedError

    def _knock(self) -> None:
        """Try again where a server has refused us a while ago."""
        for endpoint, connection in enumerate(self._servers):
            if connection.is_due:
                self._drop(connection)
                self._servers[endpoint] = self._connect(connection.endpoint, former=connection)
                self._listen(endpoint)
                self._outstanding.knock(endpoint, time.monotonic())

    def _close_all(self) -> None:
        for connection in (*self._servers, self._daemon):
            if connection is not None:
                connection.close()
        self._servers, self._daemon = [], None

    def _notice(self, endpoint: int, message: list[bytes]) -> None:
        """Take what the monitor of a server's connection tells."""
        try:
            if self._servers[endpoint].lost(message):
                self._largest = protocol.ALWAYS_TAKEN_BYTES  # whoever answers next may take less
                self._outstanding.lost(endpoint, time.monotonic())
        except UnauthenticatedError as error:
            self._outstanding.shut_out(endpoint, str(error))

    def _silence(self, connections: Sequence[Connection], endpoints: Sequence[str]) -> TTAError:
        """What to say when nobody has answered."""
        names = ", ".join(endpoints)
        if connections and all(connection.is_shut for connection in connections):
            has = "is the server key right" if self._credentials is not None else "does it ask for a key"
            return UnauthenticatedError(f"{names} closes every connection before anything is said: {has}?")
        return DeadlineError(f"no answer from {names} within {self.timeout_s} s: is tta serving?")


class Client(_Connections):
    """A blocking client.

    Args:
        endpoint: where servers take predictions; several (a list, or one text with commas) share the load, and one
            that falls silent is left out until it answers again.
        control: where the daemon takes labels and commands.
        timeout_s: how long any call waits for its answer.
        window: images unanswered at one server at most; None: what the server grants. Further requests wait.
        retry: send a request again that was refused for overload, or whose server has been silent for a quarter
            of `timeout_s`; a server knows it by its id and computes it once.
        credentials: where the daemon asks for keys, `tta.Credentials.read(MINE_key_secret, SERVERS_key)`; with the
            daemon's next key as well while that is being renewed.
    """

    def __init__(
        self,
        endpoint: str | Sequence[str] = DEFAULT_ENDPOINT,
        control: str = DEFAULT_CONTROL,
        timeout_s: float = 10.0,
        window: int | None = None,
        retry: bool = True,
        credentials: Credentials | None = None,
    ) -> None:
        super().__init__(endpoint, control, timeout_s, window, retry, credentials)
        self._context = zmq.Context()
        self._poller = zmq.Poller()

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Close the sockets; what was not sent is dropped. The client is of no more use."""
        if not self._context.closed:
            self._close_all()
            self._context.destroy(linger=0)

    def predict(
        self, x: Images | Pictures, deadline_s: float | None = None, key: str | None = None, observe: bool = True
    ) -> Prediction:
        """Classify images.

        Args:
            x: (N, H, W, C) or (H, W, C) uint8 of the model's size; or a JPEG or PNG file's bytes, or a list of
                those, which the server decodes and brings to size as the model's reference was.
            deadline_s: let the server drop the request if it cannot start in time.
            key: who sent it (a camera, say).
            observe: False keeps the images away from the monitor: probes and load tests are no traffic.

        Raises:
            TTAError: whatever the server answered; DeadlineError also if nothing came in `timeout_s`.
        """
        return _prediction(self._wait(self.submit(x, deadline_s, key, observe)))

    def predict_many(
        self,
        batches: Iterable[Images | Pictures],
        deadline_s: float | None = None,
        key: str | None = None,
        observe: bool = True,
    ) -> Iterator[Prediction]:
        """Classify many batches, as many at a time as the servers grant; the answers come in order.

        Args:
            batches: each as `predict` takes it.
            deadline_s: see `predict`; so are the others.
            key: see `predict`.
            observe: see `predict`.

        Raises:
            TTAError: the first that any of them was answered.
        """
        waiting: deque[int] = deque()
        try:
            for x in batches:
                waiting.append(self.submit(x, deadline_s, key, observe))
                while waiting and waiting[0] in self._outstanding.finished:
                    yield _prediction(self._wait(waiting.popleft()))
            while waiting:
                yield _prediction(self._wait(waiting.popleft()))
        finally:
            for request_id in waiting:  # an error, or nobody wants the rest
                self._outstanding.forget(request_id)

    def submit(
        self, x: Images | Pictures, deadline_s: float | None = None, key: str | None = None, observe: bool = True
    ) -> int:
        """Send a request without waiting for its answer, which comes out of `results`. Returns its id.

        Before the first of more than 1 MiB it asks the server how much that takes.
        Where as many images are unanswered as the servers grant, `MAX_WAITING` more wait in the client; then this
        waits.
        """
        began, content = time.monotonic(), _payload(x)
        self._check_size(len(content[-1]), deadline_s)
        request_id = self._add(content, deadline_s, key, observe, began)
        self._turn(0.0)
        while self._outstanding.waiting_images > MAX_WAITING:
            self._turn(float("inf"))
        return request_id

    def results(self, timeout_s: float = 0.0) -> Iterator[tuple[int | str, Prediction | Exception]]:
        """Answers that have arrived, in order of arrival, waiting up to `timeout_s` for the first."""
        end = time.monotonic() + timeout_s
        self._turn(0.0)
        while not self._outstanding.finished and time.monotonic() < end:
            self._turn(end)
        while self._outstanding.finished:
            request_id = next(iter(self._outstanding.finished))
            try:
                yield request_id, _prediction(self._outstanding.finished.pop(request_id))
            except TTAError as error:  # handed to the caller beside the id it belongs to
                yield request_id, error

    def cancel(self, request_id: int) -> None:
        """Ask for a submitted request to be dropped; its result is a CancelledError, or it came too late."""
        send = self._outstanding.cancel(request_id)
        if send is not None:
            self._send(send)

    def metadata(self) -> dict[str, Any]:
        """Name, inputs, outputs, classes and version of the served model."""
        return self._ask(protocol.Metadata())

    def ready(self) -> bool:
        """Whether a server takes predictions."""
        return bool(self._ask(protocol.Ready())["ready"])

    def daemon_ready(self) -> bool:
        """Whether the daemon answers and its server takes predictions."""
        return bool(self.call(protocol.Ready())["ready"])

    def label(
        self,
        prediction_ids: Sequence[int] = (),
        labels: Sequence[int] | None = None,
        correct: Sequence[bool] | None = None,
        x: Images | None = None,
    ) -> list[str]:
        """Say what images really showed.

        Args:
            prediction_ids: predictions the labels belong to; empty if the images themselves are sent.
            labels: class index for each.
            correct: instead of `labels`: was the answer right?
            x: (N, H, W, C) uint8 images the labels belong to, instead of `prediction_ids`.

        Returns:
            For each: "joined", "no_input" (counted, but the image is not kept), "expired", "unknown", or
            "contested": another client has labelled it differently, and neither label is used.
            When this returns, joined labels are on disk.
        """
        frames = _label_request(next(self._ids), prediction_ids, labels, correct, x)
        if (n_bytes := max(map(len, frames))) > protocol.ALWAYS_TAKEN_BYTES:
            _refuse_larger(n_bytes, _largest_of(self.call(protocol.Metadata())))
        return list(self._exchange(frames)[0]["outcomes"])

    def ask(self, n: int = 16, images: bool = False) -> list[Question]:
        """Recent predictions whose labels would help most: since the shift, spread over the predicted classes.

        Args:
            n: how many at most; with images 64 at most.
            images: whether to send the images too.
        """
        request = protocol.Ask(id=next(self._ids), n=n, images=images)
        return _questions(self._exchange(protocol.encode(request)))

    def call(self, request: protocol.Request) -> dict[str, Any]:
        """Send any control request and return its reply's fields."""
        request.id = next(self._ids)
        return self._exchange(protocol.encode(request))[0]

    def status(self) -> dict[str, Any]:
        """The daemon's state."""
        return self.call(protocol.Status())

    def versions(self) -> list[dict[str, Any]]:
        """Every version in the store, oldest first."""
        return list(self.call(protocol.Versions())["versions"])

    def _exchange(self, message: list[bytes]) -> tuple[dict[str, Any], list[bytes]]:
        """Send a control request and wait for its reply."""
        if self._context.closed:
            raise PreconditionError("the client is closed")
        end = time.monotonic() + self.timeout_s
        connection, undelivered, renewed = self._daemon_connection(), True, False
        while undelivered and time.monotonic() < end:
            undelivered, n_opened = not connection.is_open, connection.n_opened
            try:
                connection.socket.send_multipart(message, zmq.NOBLOCK)
                reply = self._reply(connection, protocol.request_id(message), end)
                if reply is not None:
                    return _checked(reply)
                renewed = connection.wrong_key
                if not renewed:
                    break
                undelivered &= connection.n_opened == n_opened
                time.sleep(NEXT_KEY_S)
            except zmq.Again:  # refused since we last looked: libzmq does not knock again
                undelivered = True
            connection = self._connect_daemon()
        if renewed and not undelivered:
            raise UnavailableError(
                f"{self._control} renewed its key before it answered: it may have done it or not"
            )
        raise self._silence([connection], [self._control])

    def _daemon_connection(self) -> Connection:
        """To the daemon; another, if the one there was is known to be refused."""
        if self._daemon is None:
            return self._connect_daemon()
        while self._daemon.monitor.poll(0):
            try:
                self._daemon.lost(self._daemon.monitor.recv_multipart())
            except UnauthenticatedError:
                break
        return self._daemon if self._daemon.refused_at is None else self._connect_daemon()

    def _connect_daemon(self) -> Connection:
        if self._daemon is not None:
            self._daemon.close()
        self._daemon = self._connect(self._control, queue=True, former=self._daemon)
        return self._daemon

    def _reply(self, connection: Connection, request_id: int | str, end: float) -> list[bytes] | None:
        """The reply to a control request; None, if there is none in time or the daemon has another of its keys."""
        poller = zmq.Poller()
        for each in (connection.socket, connection.monitor):
            poller.register(each, zmq.POLLIN)
        while ready := dict(poller.poll(max(0, round((end - time.monotonic()) * 1000)))):
            if connection.monitor in ready:
                try:
                    connection.lost(connection.monitor.recv_multipart())
                except UnauthenticatedError:
                    connection.close()  # the next request tries anew
                    self._daemon = None
                    raise
                if connection.wrong_key:
                    return None
            if connection.socket in ready:
                frames: list[bytes] = connection.socket.recv_multipart()
                if protocol.reply_id(frames) == request_id:
                    return frames
        return None

    def _check_size(self, n_bytes: int, wait_s: float | None) -> None:
        """Refuse a frame for which a server would close the connection, with all that is under way on it."""
        if n_bytes > self._largest:
            with suppress(DeadlineError):  # who does not answer this will not answer the request
                self._largest = _largest_of(self._ask(protocol.Metadata(), wait_s))
                _refuse_larger(n_bytes, self._largest)

    def _ask(self, request: protocol.Request, wait_s: float | None = None) -> dict[str, Any]:
        return _opened(self._wait(self._add_question(request, wait_s)))[0]

    def _wait(self, request_id: int | str) -> Answer:
        while request_id not in self._outstanding.finished:
            if not self._outstanding.is_known(request_id):
                raise PreconditionError(f"the answer to request {request_id} was taken by `results`")
            self._turn(float("inf"))
        return self._outstanding.finished.pop(request_id)

    def _turn(self, until: float) -> None:
        """Take what has arrived, send what is due; if that finished nothing, wait for more up to `until`."""
        if not self._servers:
            self._open()
        self._knock()
        before = len(self._outstanding.finished)
        self._take(0.0)
        now = time.monotonic()
        for send in self._outstanding.advance(now):
            self._send(send)
        if len(self._outstanding.finished) == before and until > now:
            self._take(min(until, self._outstanding.wake_at()) - now)

    def _send(self, send: Send) -> None:
        try:
            self._servers[send.endpoint].socket.send_multipart(send.frames, zmq.NOBLOCK)
        except zmq.Again:  # not connected
            self._outstanding.unsent(send, time.monotonic())

    def _take(self, timeout_s: float) -> None:
        """Hand over every reply that has arrived, waiting for the first."""
        for ready, _ in self._poller.poll(math.ceil(min(MAX_POLL_S, max(0.0, timeout_s)) * 1000)):
            endpoint = next(i for i, c in enumerate(self._servers) if ready in (c.socket, c.monitor))
            if ready is self._servers[endpoint].monitor:
                self._notice(endpoint, ready.recv_multipart())
                continue
            while True:
                try:
                    frames = ready.recv_multipart(zmq.NOBLOCK)
                except zmq.Again:
                    break
                self._outstanding.receive(endpoint, frames, time.monotonic())

    def _open(self) -> None:
        if self._context.closed:
            raise PreconditionError("the client is closed")
        self._connect_servers()
        for endpoint in range(len(self._servers)):
            self._listen(endpoint)

    def _listen(self, endpoint: int) -> None:
        connection = self._servers[endpoint]
        for socket in (connection.socket, connection.monitor):
            self._poller.register(socket, zmq.POLLIN)

    def _drop(self, connection: Connection) -> None:
        for socket in (connection.socket, connection.monitor):
            self._poller.unregister(socket)
        connection.close()


class AsyncClient(_Connections):
    """The same over asyncio; many requests may be in flight at once.

    Use as `async with AsyncClient(...) as client`. The arguments are those of `Client`.
    """

    def __init__(
        self,
        endpoint: str | Sequence[str] = DEFAULT_ENDPOINT,
        control: str = DEFAULT_CONTROL,
        timeout_s: float = 10.0,
        window: int | None = None,
        retry: bool = True,
        credentials: Credentials | None = None,
    ) -> None:
        super().__init__(endpoint, control, timeout_s, window, retry, credentials)
        self._context = zmq.asyncio.Context()
        self._tasks: dict[Connection, list[asyncio.Task[None]]] = {}
        self._predicting: dict[int | str, asyncio.Future[Answer]] = {}
        self._calling: dict[int | str, asyncio.Future[list[bytes]]] = {}
        self._undelivered: dict[int | str, list[bytes]] = {}  # sent while there was no connection to the daemon
        self._timer: asyncio.TimerHandle | None = None

    async def __aenter__(self) -> "AsyncClient":
        try:
            self._connect_servers()
            self._connect_daemon()
        except ConfigError:
            self._close_all()
            self._context.destroy(linger=0)
            raise
        for endpoint in range(len(self._servers)):
            self._listen(endpoint)
        return self

    def _connect_daemon(self) -> Connection:
        former = self._daemon
        if former is not None:
            self._drop(former)
        self._daemon = None
        self._daemon = connection = self._connect(self._control, queue=True, former=former)
        for frames in self._undelivered.values():  # nobody has seen them
            _sent(connection, frames)
        work = (self._read_control(connection.socket), self._watch_control(connection))
        self._tasks[connection] = [asyncio.create_task(each) for each in work]
        return connection

    def _listen(self, endpoint: int) -> None:
        connection = self._servers[endpoint]
        work = (self._read(endpoint, connection.socket), self._watch(endpoint, connection.monitor))
        self._tasks[connection] = [asyncio.create_task(each) for each in work]

    def _drop(self, connection: Connection) -> None:
        for task in self._tasks.pop(connection, []):
            task.cancel()
        connection.close()

    async def __aexit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._timer is not None:
            self._timer.cancel()
        tasks = [task for each in self._tasks.values() for task in each]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._close_all()
        self._context.destroy(linger=0)
        self._fail(UnavailableError("the client was closed before an answer came"))

    async def predict(
        self, x: Images | Pictures, deadline_s: float | None = None, key: str | None = None, observe: bool = True
    ) -> Prediction:
        """Classify images; see `Client.predict`. A task that is cancelled cancels its request at the server."""
        self._check_open()
        began, content = time.monotonic(), _payload(x)
        await self._check_size(len(content[-1]), deadline_s)
        request_id = self._add(content, deadline_s, key, observe, began)
        return _prediction(await self._answer(request_id))

    async def metadata(self) -> dict[str, Any]:
        """Name, inputs, outputs, classes and version of the served model."""
        return await self._ask(protocol.Metadata())

    async def ready(self) -> bool:
        """Whether a server takes predictions."""
        return bool((await self._ask(protocol.Ready()))["ready"])

    async def label(
        self,
        prediction_ids: Sequence[int] = (),
        labels: Sequence[int] | None = None,
        correct: Sequence[bool] | None = None,
        x: Images | None = None,
    ) -> list[str]:
        """Say what images really showed; see `Client.label`."""
        frames = _label_request(next(self._ids), prediction_ids, labels, correct, x)
        if (n_bytes := max(map(len, frames))) > protocol.ALWAYS_TAKEN_BYTES:
            _refuse_larger(n_bytes, _largest_of(await self.call(protocol.Metadata())))
        return list((await self._exchange(frames))[0]["outcomes"])

    async def ask(self, n: int = 16, images: bool = False) -> list[Question]:
        """Predictions whose labels would help most; see `Client.ask`."""
        request = protocol.Ask(id=next(self._ids), n=n, images=images)
        return _questions(await self._exchange(protocol.encode(request)))

    async def call(self, request: protocol.Request) -> dict[str, Any]:
        """Send any control request and return its reply's fields."""
        request.id = next(self._ids)
        return (await self._exchange(protocol.encode(request)))[0]

    async def status(self) -> dict[str, Any]:
        """The daemon's state."""
        return await self.call(protocol.Status())

    async def versions(self) -> list[dict[str, Any]]:
        """Every version in the store, oldest first."""
        return list((await self.call(protocol.Versions()))["versions"])

    async def _check_size(self, n_bytes: int, wait_s: float | None) -> None:
        """See `Client`."""
        if n_bytes > self._largest:
            with suppress(DeadlineError):
                self._largest = _largest_of(await self._ask(protocol.Metadata(), wait_s))
                _refuse_larger(n_bytes, self._largest)

    async def _ask(self, request: protocol.Request, wait_s: float | None = None) -> dict[str, Any]:
        self._check_open()
        return _opened(await self._answer(self._add_question(request, wait_s)))[0]

    def _check_open(self) -> None:
        if not self._servers:
            raise PreconditionError("use AsyncClient in an `async with` block")

    async def _answer(self, request_id: int | str) -> Answer:
        future: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self._predicting[request_id] = future
        try:
            self._turn()
            return await future
        finally:
            send = self._outstanding.cancel(request_id)  # nothing, if it was answered
            if send is not None and self._servers:
                self._send(send)
            self._outstanding.forget(request_id)
            del self._predicting[request_id]

    def _send(self, send: Send) -> None:
        if not _sent(self._servers[send.endpoint], send.frames):
            self._outstanding.unsent(send, time.monotonic())

    def _fail(self, error: TTAError) -> None:
        """Tell everybody who waits."""
        futures: list[asyncio.Future[Any]] = [*self._predicting.values(), *self._calling.values()]
        for future in futures:
            if not future.done():
                future.set_exception(error)

    def _turn(self) -> None:
        """Send what is due, hand out what is finished, and come back when something is due next."""
        self._knock()
        for send in self._outstanding.advance(time.monotonic()):
            self._send(send)
        finished = self._outstanding.finished
        while finished:
            request_id = next(iter(finished))
            answer, future = finished.pop(request_id), self._predicting.get(request_id)
            if future is not None and not future.done():
                future.set_result(answer)
        if self._timer is not None:
            self._timer.cancel()
        wake_at = self._outstanding.wake_at()
        if wake_at != float("inf"):
            delay = max(0.0, wake_at - time.monotonic())
            self._timer = asyncio.get_running_loop().call_later(delay, self._turn)

    async def _read(self, endpoint: int, socket: Any) -> None:
        while True:
            frames = await socket.recv_multipart()
            try:
                self._outstanding.receive(endpoint, frames, time.monotonic())
            except TTAError as error:  # what answers there is no tta
                self._fail(error)
            self._turn()

    async def _watch(self, endpoint: int, monitor: Any) -> None:
        while True:
            self._notice(endpoint, await monitor.recv_multipart())
            self._turn()

    async def _watch_control(self, connection: Connection) -> None:
        while not connection.wrong_key:
            try:
                connection.lost(await connection.monitor.recv_multipart())
                if connection.is_open:
                    self._undelivered.clear()
            except UnauthenticatedError as error:
                for future in self._calling.values():
                    if not future.done():
                        future.set_exception(UnauthenticatedError(str(error)))
        await asyncio.sleep(NEXT_KEY_S)
        if connection is self._daemon:
            self._connect_daemon()  # ends this task at its next wait

    async def _exchange(self, frames: list[bytes]) -> tuple[dict[str, Any], list[bytes]]:
        self._check_open()
        connection = self._daemon
        if connection is None or connection.refused_at is not None:  # knock again
            connection = self._connect_daemon()
        request_id = protocol.request_id(frames)
        async with self._expect(request_id) as answer:
            if not _sent(connection, frames):  # refused since we last heard: libzmq does not knock again
                connection = self._connect_daemon()
                _sent(connection, frames)
            if not connection.is_open:
                self._undelivered[request_id] = frames
            try:
                return _checked(await asyncio.wait_for(answer, self.timeout_s))
            except TimeoutError:
                raise self._silence([connection], [self._control]) from None

    @asynccontextmanager
    async def _expect(self, request_id: int | str) -> AsyncIterator["asyncio.Future[list[bytes]]"]:
        self._calling[request_id] = asyncio.get_running_loop().create_future()
        try:
            yield self._calling[request_id]
        finally:
            del self._calling[request_id]
            self._undelivered.pop(request_id, None)

    async def _read_control(self, socket: Any) -> None:
        while True:
            frames = await socket.recv_multipart()
            answer = self._calling.get(protocol.reply_id(frames))
            if answer is not None and not answer.done():
                answer.set_result(frames)


def _sent(connection: Connection, frames: list[bytes]) -> bool:
    """Send over a connection of asyncio's; False if the message cannot go now."""
    sent: Any = connection.socket.send_multipart(frames, zmq.NOBLOCK)
    return not (sent.done() and isinstance(sent.exception(), zmq.Again))  # then it is done at once
