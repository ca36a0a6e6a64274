"""The ROUTER loop: admit, reject, reply. Owns every socket that clients and the daemon talk to.

Runs in the server's main thread: a synchronous poll, after which each socket is read until it is empty. Computed
batches come from the inference thread as objects, requests whose files are images now from the decoder thread,
answers to the daemon from the builder thread; a byte in a pipe wakes the poll.
"""

import os
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from select import select
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import structlog
import zmq

from tta import protocol
from tta.auth import Doorkeeper, key_of
from tta.bundle import Manifest
from tta.connection import prepare_listener
from tta.errors import (
    CancelledError,
    Code,
    DeadlineError,
    InputError,
    OverloadedError,
    TTAError,
    UnavailableError,
)
from tta.server.batcher import Batcher, Pending
from tta.server.decoder import Decoder
from tta.server.options import ServerOptions
from tta.server.outbox import RETRY_MS, Outbox
from tta.server.repeats import Repeats
from tta.server.statistics import Statistics, count

BIND_S = 3.0  # that an endpoint may be held after its process has gone
POLL_MS = 100  # how late a signal is noticed
FILE_BYTES = 64 << 20  # of a client's files that wait to be decoded, unless it has one request only
ALL_FILE_BYTES = 512 << 20  # of everybody's
FILES_RETRY_S = 0.1
MAX_NAMES = 4096  # of classes in one answer: they are made where all answers are sent
BACKLOG_S = 0.002  # between two readings while a batch or more is queued anyway
# pyzmq's recv_multipart costs 7 us for three frames, these 5 (measured).
_RECEIVE, _GET = zmq.backend.Socket.recv, zmq.backend.Socket.get
_NOBLOCK = int(zmq.NOBLOCK)
_POLLIN = int(zmq.POLLIN)
MANY = 4  # images queued, beyond which more requests are likely to wait in the socket
BURST = 256  # messages taken from one socket before the others get a turn


@dataclass(frozen=True)
class Computed:
    """A batch's answers, for the frontend to send.

    Attributes:
        requests: whose images they are, in order.
        version: that computed all of them.
        first_id: prediction id of the first row.
        logits: (N, K) float32.
        started: monotonic seconds.
        compute_s: seconds of the whole batch.
    """

    requests: Sequence[Pending]
    version: int
    first_id: int
    logits: npt.NDArray[np.float32]
    started: float
    compute_s: float


@dataclass(frozen=True)
class Failed:
    """Requests that were not computed; without an error they were cancelled or too late."""

    requests: Sequence[Pending]
    error: BaseException | None = None


def _bind(socket: "zmq.Socket[bytes]", endpoint: str, wait_s: float) -> None:
    """Bind, trying for so many seconds: the system may hold a moment longer what a killed process had."""
    end = time.monotonic() + wait_s
    while True:
        try:
            socket.bind(endpoint)
        except zmq.ZMQError:
            if time.monotonic() > end:
                raise
            time.sleep(0.01)
        else:
            return


class Frontend:
    """Sockets and admission of one server."""

    def __init__(
        self,
        context: "zmq.Context[zmq.Socket[bytes]]",
        options: ServerOptions,
        manifest: Manifest,
        batcher: Batcher,
        statistics: Statistics,
        admin: Callable[[dict[str, Any], Callable[[dict[str, Any]], None]], None],
        version: Callable[[], int],
        log: structlog.typing.FilteringBoundLogger,
        doorkeeper: Doorkeeper | None = None,
    ) -> None:
        self.options = options
        self.manifest = manifest
        self.batcher = batcher
        self.statistics = statistics
        self.draining = False
        self.retry_after_s = 1.0  # told to whom it refuses then
        self._admin = admin
        self._version = version
        self._log = log
        self._data = context.socket(zmq.ROUTER)
        prepare_listener(self._data, options.endpoint, options.max_message_bytes)
        self._data.setsockopt(zmq.HEARTBEAT_IVL, 5000)
        self._data.setsockopt(zmq.HEARTBEAT_TIMEOUT, 20000)
        guarded = doorkeeper is not None and doorkeeper.guard(self._data, options.endpoint)
        self._doorkeeper = doorkeeper if guarded else None
        _bind(self._data, options.endpoint, BIND_S if options.standby else 0.0)
        self._admin_socket = context.socket(zmq.ROUTER)
        self._admin_socket.setsockopt(zmq.LINGER, 1000)
        self._admin_socket.bind(options.admin)
        self._outbox = Outbox(self._data, statistics)
        self._repeats = Repeats()
        self._finished: deque[Computed | Failed] = deque()  # from the inference thread
        self._admin_replies: deque[list[bytes]] = deque()  # from the builder thread
        self._decoded: deque[tuple[Pending, BaseException | None]] = deque()  # from the decoder thread
        self._decoder = Decoder(options, manifest, self._hand_over, log)
        self._undecoded: set[Pending] = set()  # requests whose files are not in the batcher yet
        self._file_bytes: dict[bytes, int] = {}  # of them, by client
        self._wake, self._waker = os.pipe()
        os.set_blocking(self._wake, False)
        os.set_blocking(self._waker, False)
        self._poller = zmq.Poller()
        for source in (self._data, self._admin_socket, self._wake):
            self._poller.register(source, zmq.POLLIN)
        if self._doorkeeper is not None:
            self._poller.register(self._doorkeeper.socket, zmq.POLLIN)

    @property
    def decoding(self) -> int:
        """Requests whose files are not in the batcher yet."""
        return len(self._undecoded)

    def tick(self) -> None:
        """Wait for something to happen, then drain every socket that has something."""
        if self.batcher.images >= self.batcher.max_batch_size and not self.batcher.absent:
            # Nobody is served sooner by being read at once, and waking for every message takes twice the time of
            # reading them together: time of the model's, where cores are few.
            select((self._wake,), (), (), BACKLOG_S)
        ready = dict(self._poller.poll(RETRY_MS if self._outbox.waiting else POLL_MS))
        if self._outbox.waiting:
            self._outbox.retry()
        if self._doorkeeper is not None:
            for _ in range(self._doorkeeper.attend()):
                count(self.statistics.rejected, Code.UNAUTHENTICATED)
        if self._wake in ready:
            os.read(self._wake, 4096)
            self._deliver()
        if self._data in ready:
            self._take()
        if self._admin_socket in ready:
            for frames in drain(self._admin_socket):
                self._handle_admin(frames)

    def _take(self) -> None:
        """Handle the requests that have arrived, up to `BURST`."""
        for _ in range(BURST):
            try:
                identity = _RECEIVE(self._data, _NOBLOCK)
            except zmq.Again:
                return
            self._handle(identity, *self._rest())
            # Asking for more costs 4 us a message; an EAGAIN raised and caught up to 45, but once a burst.
            if self.batcher.images < MANY and not int(_GET(self._data, zmq.EVENTS)) & _POLLIN:
                return

    def close(self) -> None:
        """Send what is queued (up to a second) and close."""
        self._deliver()
        self._outbox.retry(at_once=True)
        for socket in (self._data, self._admin_socket):
            socket.close()
        if self._doorkeeper is not None:
            self._doorkeeper.socket.close()
        self._decoder.stop()

    def finish(self, batch: Computed | Failed) -> None:
        """Inference thread: hand a batch over."""
        self._finished.append(batch)
        self.wake()

    def _hand_over(self, request: Pending, error: BaseException | None) -> None:
        """Decoder thread: hand a request over whose files are images now, or are none."""
        self._decoded.append((request, error))
        self.wake()

    def answer_admin(self, identity: bytes, reply: dict[str, Any]) -> None:
        """Builder thread: answer the daemon."""
        self._admin_replies.append([identity, msgspec.msgpack.encode(reply)])
        self.wake()

    def wake(self) -> None:
        """Any thread: have the poll look at what it was given."""
        try:
            os.write(self._waker, b"!")
        except BlockingIOError:  # so many bytes wait that it will wake anyway
            return

    def _rest(self) -> tuple[list[protocol.Buffer], str]:
        """The frames after the identity, and the sender's key: "" where none is asked for.

        The header is copied, tensors are as they lie in the socket's memory. Of more frames than any message has,
        one too many is kept, so that it is refused.
        """
        frame = _RECEIVE(self._data, _NOBLOCK, False)
        key = key_of(frame) if self._doorkeeper is not None else ""
        frames: list[protocol.Buffer] = [frame.bytes]
        while frame.more:
            frame = _RECEIVE(self._data, _NOBLOCK, False)
            if len(frames) <= protocol.MAX_FRAMES:
                frames.append(frame.buffer)
        return frames, key

    def _handle(self, identity: bytes, body: list[protocol.Buffer], key: str) -> None:
        try:
            request = protocol.decode_data(body)
            if self._doorkeeper is not None:
                asks_only = isinstance(request, protocol.Ready | protocol.Metadata)
                self._doorkeeper.clients.check(key, None if asks_only else "predict")
                if isinstance(request, protocol.Predict | protocol.Cancel) and request.client:
                    request.client = f"{key} {request.client}"  # a name is worth something beside its key only
            if isinstance(request, protocol.Predict):
                self._admit(identity, request, body, key)
                return
            reply = self._answer(identity, request)
        except TTAError as error:
            count(self.statistics.rejected, error.code)
            reply = protocol.error_reply(protocol.request_id(body), error)
        except Exception as error:  # no message may end the loop
            count(self.statistics.rejected, Code.INTERNAL)
            self._log.exception("request_failed", error=str(error))
            reply = protocol.error_reply(protocol.request_id(body), error)
        self._outbox.send([identity, *protocol.encode(reply)])

    def _admit(self, identity: bytes, request: protocol.Predict, frames: list[protocol.Buffer], key: str) -> None:
        client = request.client or ""
        if client and self._is_repeated(identity, client, request.id):
            self.statistics.repeated += 1
            return
        if self.draining:
            raise UnavailableError("draining: the server is going down", self.retry_after_s)
        if request.preprocessing is not None and request.preprocessing != self.manifest.preprocessing_sha256:
            raise InputError(
                f"images were prepared by recipe {request.preprocessing!r}, the model is made for "
                f"{self.manifest.preprocessing_sha256!r}: see `preprocessing` of its metadata"
            )
        files: Sequence[memoryview] = ()
        if request.dtype == protocol.PICTURES:
            files = protocol.split_pictures(frames, request.shape, request.sizes)
            x = np.empty((len(files), 0), np.uint8)
        else:
            x = protocol.decode_images(frames, request.dtype, request.shape, self.manifest.image_shape)
        if len(x) > self.options.queue_images:
            raise InputError(f"{len(x)} images in one request: at most {self.options.queue_images} are taken")
        if self._doorkeeper is not None:
            self._doorkeeper.clients.spend(key, images=len(x))
        now = time.monotonic()
        expires = now + request.deadline_s if request.deadline_s is not None else float("inf")
        top_k = min(request.top_k or 0, self.manifest.n_classes)
        if top_k * len(x) > MAX_NAMES:
            raise InputError(f"top_k = {top_k} of {len(x)} images: at most {MAX_NAMES:,} names in one answer")
        admitted = Pending(
            identity, request.id, x, now, expires, request.key or "", request.observe, client, top_k, files
        )
        if files:
            self._decode(admitted, len(frames[1]))
        else:
            self._queue(admitted, self.batcher)
        self._repeats.admitted(admitted)

    def _decode(self, request: Pending, n_bytes: int) -> None:
        """Queue a request whose files have to be decoded first; their bytes are bounded beside their number."""
        own, total = self._file_bytes.get(request.identity, 0), sum(self._file_bytes.values())
        if (own and own + n_bytes > FILE_BYTES) or (total and total + n_bytes > ALL_FILE_BYTES):
            raise OverloadedError(
                f"{own:,} bytes of files wait to be decoded, {total:,} of all clients", FILES_RETRY_S
            )
        self._decoder.start()
        request.file_bytes = n_bytes
        self._queue(request, self._decoder.queue)
        self._undecoded.add(request)
        self._file_bytes[request.identity] = self._file_bytes.get(request.identity, 0) + n_bytes

    def _decoded_or_gone(self, request: Pending) -> None:
        """A request that waits for its files no longer."""
        self._undecoded.remove(request)
        left = self._file_bytes[request.identity] - request.file_bytes
        self._file_bytes[request.identity] = left
        if not left:
            del self._file_bytes[request.identity]

    def _queue(self, request: Pending, queue: Batcher) -> None:
        """Put a request into a queue; those that give way to it are refused."""
        for evicted in queue.put(request):
            if queue is not self.batcher:
                self._decoded_or_gone(evicted)
            error = queue.overloaded(queue.images)
            count(self.statistics.rejected, error.code)
            self._refuse(evicted, error)

    def _take_decoded(self, request: Pending, error: BaseException | None) -> None:
        """A request whose files have become images, or not, goes on to be computed, or is refused."""
        if request not in self._undecoded:  # it was refused when the server went down
            return
        try:
            if error is not None:
                raise error
            self._queue(request, self.batcher)
        except Exception as refusal:
            waited = isinstance(error, CancelledError | DeadlineError)  # it had been admitted
            code = refusal.code if isinstance(refusal, TTAError) else Code.INTERNAL
            count(self.statistics.requests if waited else self.statistics.rejected, code)
            self._refuse(request, refusal)
        finally:
            self._decoded_or_gone(request)  # last: the inference thread waits for it before it ends

    def give_up_files(self) -> list[Pending]:
        """The requests whose files are not decoded any more: the server ends."""
        left = list(self._undecoded)
        self._undecoded.clear()
        self._file_bytes.clear()
        return left

    def _cancel_undecoded(self, identity: bytes, request_id: int | str) -> bool:
        """Mark a request whose files wait or are being decoded; False if there is none."""
        for request in self._undecoded:
            if request.identity == identity and request.request_id == request_id:
                request.cancelled = True
                return True
        return False

    def _is_repeated(self, identity: bytes, client: str, request_id: int | str) -> bool:
        """Whether this request is known already; if so it is answered, or will be, where it came from last."""
        queued = self._repeats.queued(client, request_id)
        if queued is not None and not queued.cancelled:
            queued.reply_to = identity
            return True
        answer = self._repeats.answer(client, request_id)
        if answer is not None:
            self._outbox.send([identity, *answer])
        return answer is not None

    def _deliver(self) -> None:
        """Answer the requests of all batches that are finished, and what the daemon has asked."""
        while self._admin_replies:
            self._admin_socket.send_multipart(self._admin_replies.popleft())
        while self._decoded:
            self._take_decoded(*self._decoded.popleft())
        while self._finished:
            batch = self._finished.popleft()
            if isinstance(batch, Computed):
                self._answer_batch(batch)
                continue
            for request in batch.requests:
                error = batch.error or expired_error(request)
                count(self.statistics.requests, error.code if isinstance(error, TTAError) else Code.INTERNAL)
                self._refuse(request, error)

    def _answer_batch(self, batch: Computed) -> None:
        row, credit = 0, self.batcher.credit()
        n_classes = batch.logits.shape[1]
        tensor, row_bytes = protocol.tensor_bytes(batch.logits), n_classes * batch.logits.itemsize
        for request in batch.requests:
            n = len(request.x)
            header = {
                "v": protocol.PROTOCOL_VERSION,
                "id": request.request_id,
                "code": 0,
                "version": batch.version,
                "prediction_id": batch.first_id + row,
                "credit": min(credit, self._decoder.queue.credit()) if request.file_bytes else credit,
                "queue_s": batch.started - request.received,
                "compute_s": batch.compute_s,
                "shape": [n, n_classes],
            }
            if request.top_k:
                header["top"] = top_classes(batch.logits[row : row + n], request.top_k, self.manifest.classes)
                frames = protocol.encode(header)
            else:
                frames = [*protocol.encode(header), tensor[row * row_bytes : (row + n) * row_bytes]]
            self._repeats.answered(request, frames)
            self._outbox.send([request.reply_to, *frames])
            row += n
            self.statistics.queue_s.observe(batch.started - request.received)
            self.statistics.request_s.observe(time.monotonic() - request.received)
        count(self.statistics.requests, Code.OK, len(batch.requests))
        self.statistics.compute_s.observe(batch.compute_s)
        self.statistics.batch_size.observe(row)

    def _refuse(self, request: Pending, error: BaseException) -> None:
        self._repeats.refused(request)
        self._outbox.send([request.reply_to, *protocol.encode(protocol.error_reply(request.request_id, error))])

    def _answer(self, identity: bytes, request: protocol.DataRequest) -> dict[str, Any]:
        reply: dict[str, Any] = {"v": protocol.PROTOCOL_VERSION, "id": request.id, "code": 0}
        if isinstance(request, protocol.Cancel):
            named = self._repeats.queued(request.client, request.id) if request.client else None
            owner = named.identity if named is not None else identity
            cancelled = self.batcher.cancel(owner, request.id) or self._cancel_undecoded(owner, request.id)
            return {**reply, "cancelled": cancelled}
        if isinstance(request, protocol.Ready):
            return {**reply, "ready": not self.draining}
        m = self.manifest
        return {
            **reply,
            "name": m.name,
            "platform": "onnxruntime",
            "versions": [str(self._version())],
            "inputs": [{"name": "x", "datatype": "UINT8", "shape": [-1, *m.image_shape]}],
            "outputs": [{"name": "logits", "datatype": "FP32", "shape": [-1, m.n_classes]}],
            "classes": m.classes,
            "resize": m.resize,
            "max_message_bytes": self.options.max_message_bytes,
            "preprocessing": {**m.preprocessing, "sha256": m.preprocessing_sha256},
        }

    def _handle_admin(self, frames: list[bytes]) -> None:
        identity = frames[0]
        try:
            command = msgspec.msgpack.decode(frames[1], type=dict[str, Any])
        except (msgspec.DecodeError, IndexError) as error:
            self._log.warning("admin_message_refused", error=str(error))
            return

        def respond(reply: dict[str, Any]) -> None:
            # Called in this thread for quick commands; the builder thread has `answer_admin`.
            self._admin_socket.send_multipart([identity, msgspec.msgpack.encode(reply)])

        command["identity"] = identity
        self._admin(command, respond)


def top_classes(logits: npt.NDArray[np.float32], k: int, classes: Sequence[str]) -> list[list[dict[str, Any]]]:
    """The k likeliest classes of each row, the likeliest first.

    Args:
        logits: (N, K).
        k: at most K.
        classes: K names.

    Returns:
        For each row k maps of `class` (index), `name` and `probability` (softmax of the logits, in [0, 1]).
    """
    shifted = np.exp(logits - logits.max(axis=1, keepdims=True))
    shares = shifted / shifted.sum(axis=1, keepdims=True)
    order = np.argsort(-shares, axis=1, kind="stable")[:, :k]
    return [
        [{"class": int(i), "name": classes[i], "probability": round(float(row[i]), 6)} for i in best]
        for row, best in zip(shares, order, strict=True)
    ]


def drain(socket: "zmq.Socket[bytes]") -> list[list[bytes]]:
    """All messages that wait on a socket, up to `BURST`."""
    messages = []
    for _ in range(BURST):
        try:
            messages.append(socket.recv_multipart(zmq.NOBLOCK))
        except zmq.Again:
            break
    return messages


def expired_error(request: Pending) -> TTAError:
    """Why a request that was taken from the queue is not computed."""
    if request.cancelled:
        return CancelledError("cancelled before it started")
    return DeadlineError("the deadline passed while the request was queued")
