"""Client and AsyncClient: predictions and labels over ZeroMQ. Needs numpy and pyzmq only.

One client belongs to one thread. Errors are those of `tta.errors`, raised as the daemon answered them.
"""

import asyncio
import itertools
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt
import zmq
import zmq.asyncio

from tta import protocol
from tta.errors import Code, ConfigError, DeadlineError, InputError, PreconditionError, from_wire

DEFAULT_ENDPOINT = "tcp://127.0.0.1:5555"
DEFAULT_CONTROL = "tcp://127.0.0.1:5556"

Images = npt.NDArray[np.uint8]


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


def _predict_frames(request_id: int, x: Images, deadline_s: float | None, key: str | None) -> list[bytes]:
    x = np.asarray(x)
    if x.dtype != np.uint8 or x.ndim not in (3, 4):
        raise InputError(f"expected images (N, H, W, C) or (H, W, C) of uint8, got {x.dtype}{x.shape}")
    x = x[None] if x.ndim == 3 else x
    request = protocol.Predict(
        id=request_id, dtype=str(x.dtype), shape=list(x.shape), deadline_s=deadline_s, key=key
    )
    return protocol.encode(request, x)


def _prediction(frames: list[bytes]) -> Prediction:
    header, payload = _checked(frames)
    logits = np.frombuffer(payload[0], "<f4").reshape(header["shape"])
    return Prediction(
        header["id"],
        logits,
        header["version"],
        header["prediction_id"],
        header["queue_s"],
        header["compute_s"],
    )


def _checked(frames: list[bytes]) -> tuple[dict[str, Any], list[bytes]]:
    header, payload = protocol.decode_reply(frames)
    if header["code"] != Code.OK:
        error = from_wire(header["code"], header.get("error", ""), header.get("retry_after_s"))
        error.add_note(f"request {header.get('id')}")
        raise error
    return header, payload


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


class Client:
    """A blocking client.

    Args:
        endpoint: where the server takes predictions.
        control: where the daemon takes labels and commands.
        timeout_s: how long any call waits for its answer.
    """

    def __init__(
        self,
        endpoint: str = DEFAULT_ENDPOINT,
        control: str = DEFAULT_CONTROL,
        timeout_s: float = 10.0,
    ) -> None:
        self.timeout_s = timeout_s
        self._endpoints = {"data": endpoint, "control": control}
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._sockets: dict[str, zmq.Socket[bytes]] = {}
        self._ids = itertools.count(1)

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Close the sockets; what was not sent is dropped."""
        self._context.destroy(linger=0)

    def predict(self, x: Images, deadline_s: float | None = None, key: str | None = None) -> Prediction:
        """Classify images.

        Args:
            x: (N, H, W, C) or (H, W, C) uint8 of the model's size.
            deadline_s: let the server drop the request if it cannot start in time.
            key: who sent it (a camera, say).

        Raises:
            TTAError: whatever the server answered; DeadlineError also if nothing came in `timeout_s`.
        """
        request_id = self.submit(x, deadline_s, key)
        for frames in self._receive("data", self.timeout_s):
            if protocol.reply_id(frames) == request_id:
                return _prediction(frames)
        raise DeadlineError(f"no answer from {self._endpoints['data']} within {self.timeout_s} s: is tta serving?")

    def submit(self, x: Images, deadline_s: float | None = None, key: str | None = None) -> int:
        """Send a request without waiting; its answer comes out of `results`. Returns its id."""
        request_id = next(self._ids)
        self._socket("data").send_multipart(_predict_frames(request_id, x, deadline_s, key))
        return request_id

    def results(self, timeout_s: float = 0.0) -> Iterator[tuple[int | str, Prediction | Exception]]:
        """Answers that have arrived, in order of arrival, waiting up to `timeout_s` for the first."""
        for frames in self._receive("data", timeout_s, first_only=True):
            request_id = protocol.reply_id(frames)
            try:
                yield request_id, _prediction(frames)
            except Exception as error:  # handed to the caller beside the id it belongs to
                yield request_id, error

    def cancel(self, request_id: int) -> None:
        """Ask for a submitted request to be dropped; both are answered through `results`."""
        self._socket("data").send_multipart(protocol.encode(protocol.Cancel(id=request_id)))

    def metadata(self) -> dict[str, Any]:
        """Name, inputs, outputs, classes and version of the served model."""
        return self._call("data", protocol.Metadata(id=next(self._ids)))

    def ready(self) -> bool:
        """Whether the server takes predictions."""
        return bool(self._call("data", protocol.Ready(id=next(self._ids)))["ready"])

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
            For each: "joined", "no_input" (counted, but the image is not kept), "expired" or "unknown".
            When this returns, joined labels are on disk.
        """
        frames = _label_request(next(self._ids), prediction_ids, labels, correct, x)
        return list(self._exchange("control", frames)["outcomes"])

    def call(self, request: protocol.Request) -> dict[str, Any]:
        """Send any control request and return its reply's fields."""
        request.id = next(self._ids)
        return self._call("control", request)

    def status(self) -> dict[str, Any]:
        """The daemon's state."""
        return self.call(protocol.Status())

    def versions(self) -> list[dict[str, Any]]:
        """Every version in the store, oldest first."""
        return list(self.call(protocol.Versions())["versions"])

    def _call(self, kind: str, request: protocol.Request) -> dict[str, Any]:
        return self._exchange(kind, protocol.encode(request))

    def _exchange(self, kind: str, message: list[bytes]) -> dict[str, Any]:
        self._socket(kind).send_multipart(message)
        request_id = protocol.request_id(message)
        for frames in self._receive(kind, self.timeout_s):
            if protocol.reply_id(frames) == request_id:
                return _checked(frames)[0]
        raise DeadlineError(f"no answer from {self._endpoints[kind]} within {self.timeout_s} s: is tta serving?")

    def _socket(self, kind: str) -> "zmq.Socket[bytes]":
        if kind not in self._sockets:
            self._sockets[kind] = _connect(self._context, self._endpoints[kind], self.timeout_s)
        return self._sockets[kind]

    def _receive(self, kind: str, timeout_s: float, first_only: bool = False) -> Iterator[list[bytes]]:
        socket = self._socket(kind)
        end = time.monotonic() + timeout_s
        while socket.poll(max(0, round((end - time.monotonic()) * 1000))):
            yield socket.recv_multipart()
            if first_only:  # the rest only if it is there already
                end = 0.0


def _connect(context: Any, endpoint: str, timeout_s: float) -> Any:
    socket = context.socket(zmq.DEALER)
    socket.setsockopt(zmq.LINGER, 0)
    socket.setsockopt(zmq.SNDTIMEO, round(timeout_s * 1000))
    socket.setsockopt(zmq.RCVHWM, 0)  # the client asked for every answer: none is dropped on its side
    socket.setsockopt(zmq.SNDHWM, 0)
    try:
        socket.connect(endpoint)
    except zmq.ZMQError as error:
        socket.close()
        raise ConfigError(f"endpoint {endpoint!r} is no address: write tcp://HOST:PORT or ipc://PATH") from error
    return socket


class AsyncClient:
    """The same over asyncio; many requests may be in flight at once.

    Use as `async with AsyncClient(...) as client`.
    """

    def __init__(
        self,
        endpoint: str = DEFAULT_ENDPOINT,
        control: str = DEFAULT_CONTROL,
        timeout_s: float = 10.0,
    ) -> None:
        self.timeout_s = timeout_s
        self._endpoints = {"data": endpoint, "control": control}
        self._context = zmq.asyncio.Context()
        self._sockets: dict[str, Any] = {}
        self._readers: list[asyncio.Task[None]] = []
        self._waiting: dict[int | str, asyncio.Future[list[bytes]]] = {}
        self._ids = itertools.count(1)

    async def __aenter__(self) -> "AsyncClient":
        for kind, endpoint in self._endpoints.items():
            self._sockets[kind] = _connect(self._context, endpoint, self.timeout_s)
            self._readers.append(asyncio.create_task(self._read(self._sockets[kind])))
        return self

    async def __aexit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for reader in self._readers:
            reader.cancel()
        await asyncio.gather(*self._readers, return_exceptions=True)
        self._context.destroy(linger=0)

    async def predict(self, x: Images, deadline_s: float | None = None, key: str | None = None) -> Prediction:
        """Classify images; see `Client.predict`."""
        request_id = next(self._ids)
        return _prediction(
            await self._exchange("data", request_id, _predict_frames(request_id, x, deadline_s, key))
        )

    async def label(
        self,
        prediction_ids: Sequence[int] = (),
        labels: Sequence[int] | None = None,
        correct: Sequence[bool] | None = None,
        x: Images | None = None,
    ) -> list[str]:
        """Say what images really showed; see `Client.label`."""
        request_id = next(self._ids)
        frames = _label_request(request_id, prediction_ids, labels, correct, x)
        return list(_checked(await self._exchange("control", request_id, frames))[0]["outcomes"])

    async def call(self, request: protocol.Request) -> dict[str, Any]:
        """Send any control request and return its reply's fields."""
        request.id = request_id = next(self._ids)
        return _checked(await self._exchange("control", request_id, protocol.encode(request)))[0]

    async def status(self) -> dict[str, Any]:
        """The daemon's state."""
        return await self.call(protocol.Status())

    async def _exchange(self, kind: str, request_id: int, frames: list[bytes]) -> list[bytes]:
        if kind not in self._sockets:
            raise PreconditionError("use AsyncClient in an `async with` block")
        async with self._expect(request_id) as answer:
            await self._sockets[kind].send_multipart(frames)
            try:
                return await asyncio.wait_for(answer, self.timeout_s)
            except TimeoutError:
                raise DeadlineError(
                    f"no answer from {self._endpoints[kind]} within {self.timeout_s} s: is tta serving?"
                ) from None

    @asynccontextmanager
    async def _expect(self, request_id: int) -> AsyncIterator["asyncio.Future[list[bytes]]"]:
        self._waiting[request_id] = asyncio.get_running_loop().create_future()
        try:
            yield self._waiting[request_id]
        finally:
            del self._waiting[request_id]

    async def _read(self, socket: Any) -> None:
        while True:
            frames = await socket.recv_multipart()
            answer = self._waiting.get(protocol.reply_id(frames))
            if answer is not None and not answer.done():
                answer.set_result(frames)
