"""The wire, version 1: pure encode and decode, no sockets.

Every message is ZeroMQ multipart: `[msgpack header][raw tensor bytes]...`. Tensors are little-endian,
row-major and unpadded (the rules of KServe v2's raw tensors); their dtype and shape stand in the header.

    data socket      predict | cancel | metadata | ready
    control socket   label | status | versions | rollback | reset | pause | resume | adapt | approve | accept
                     | deploy | erase | ask | metadata | ready

    predict  → {v:1, op:"predict", id, dtype:"uint8", shape:[N,H,W,C], deadline_s?, key?, client?, observe?,
               top_k?, preprocessing?} + image bytes
      files  → {v:1, op:"predict", id, dtype:"bytes", shape:[N], sizes:[...], ...} + JPEG or PNG files in a row
    ←          {v:1, id, code:0, version, prediction_id, credit, queue_s, compute_s, shape:[N,K]} + float32 logits
      top_k  ← the same with top:[[{class, name, probability}...]...] instead of logits
    error ←    {v:1, id, code, error, retry_after_s?}

`id` is the client's and comes back untouched. `prediction_id` names the first image of the request, the
others follow by one; a label refers to it later. `credit` is how many images a client may have unanswered
without being refused, as long as so many clients share the queue. A late answer may be asked for again: with
a random name of its own as `client`, a client repeats the request under the same `id`, on any connection, and
it is computed once. Every request has one reply; `cancel` has the id of what it cancels, and a reply of its
own, with `cancelled`. Unknown header fields are ignored, so that fields can be added within a version. Decoding
goes: frame count, version, operation, sizes, content.
"""

import itertools
import math
import sys
from collections.abc import Sequence
from typing import Annotated, Any, TypeVar

import msgspec
import numpy as np
import numpy.typing as npt

from tta.errors import Code, InputError, ProtocolError, TTAError, from_wire

PROTOCOL_VERSION = 1
MAX_FRAMES = 2
MAX_HEADER_BYTES = 1 << 16
ALWAYS_TAKEN_BYTES = 1 << 20  # of a frame, by every server; what larger ones it takes its metadata say
MAX_ID_CHARS = 256
MAX_KEY_CHARS = 64
MAX_CLIENT_CHARS = 64
MAX_DTYPE_CHARS = 16
MAX_DIMENSIONS = 8
MAX_ASKED_IMAGES = 64
MAX_PICTURES = 1024  # files in one request
PICTURES = "bytes"  # the dtype of files, as KServe v2 names it

Array = npt.NDArray[Any]
Buffer = bytes | memoryview  # a frame: copied, or as it lies in the socket's memory

RequestId = int | Annotated[str, msgspec.Meta(max_length=MAX_ID_CHARS)]


class Request(msgspec.Struct, omit_defaults=True, kw_only=True):
    """Fields every request has."""

    v: int = PROTOCOL_VERSION
    id: RequestId = 0


class Predict(Request, tag_field="op", tag="predict", omit_defaults=True, kw_only=True):
    """Classify the images of the payload frame.

    Attributes:
        dtype: "uint8", or "bytes" for JPEG or PNG files, which the server brings to the model's size as the
            reference was: a client's own resizing is a shift of its own.
        shape: (N, H, W, C); of files (N).
        sizes: bytes of each file, at most 1024 of them; the payload is the files one after another.
        top_k: answer with the names and probabilities of so many classes, the likeliest first, and no logits.
        preprocessing: hash of the recipe the images were made by, as `metadata` tells it: another one is refused.
        deadline_s: drop the request unless it can start within this many seconds of its arrival.
        key: who sent it (camera, client), at most 64 characters: so that one chatty source does not drown the
            others in the drift charts, and a shift of one is told from a shift of all.
        client: random name of the client, at most 64 characters: a repeated `id` of it is computed once. Whoever
            knows the name can read its answers.
        observe: False keeps the images away from the monitor and the ledger: a load test or a probe is no
            traffic. They cannot be labelled.
    """

    dtype: Annotated[str, msgspec.Meta(max_length=MAX_DTYPE_CHARS)]
    shape: Annotated[list[int], msgspec.Meta(max_length=MAX_DIMENSIONS)]
    sizes: Annotated[list[int], msgspec.Meta(max_length=MAX_PICTURES)] = []
    top_k: Annotated[int, msgspec.Meta(ge=1)] | None = None
    preprocessing: Annotated[str, msgspec.Meta(max_length=MAX_KEY_CHARS)] | None = None
    deadline_s: float | None = None
    key: Annotated[str, msgspec.Meta(max_length=MAX_KEY_CHARS)] | None = None
    client: Annotated[str, msgspec.Meta(max_length=MAX_CLIENT_CHARS)] | None = None
    observe: bool = True


class Cancel(Request, tag_field="op", tag="cancel", omit_defaults=True, kw_only=True):
    """Forget the queued request with this `id`: answered with `cancelled`, and the request with CANCELLED.

    Attributes:
        client: name under which the request was sent, if it was: it may have come over another connection.
    """

    client: Annotated[str, msgspec.Meta(max_length=MAX_CLIENT_CHARS)] | None = None


class Metadata(Request, tag_field="op", tag="metadata", omit_defaults=True, kw_only=True):
    """Ask for name, inputs, outputs, classes and version (the shape of KServe v2 model metadata)."""


class Ready(Request, tag_field="op", tag="ready", omit_defaults=True, kw_only=True):
    """Ask whether predictions are being taken."""


class Label(Request, tag_field="op", tag="label", omit_defaults=True, kw_only=True):
    """Say what images really showed.

    Either `prediction_ids` with `labels` (class indices) or with `correct` (was the answer right), or
    `labels` with the images themselves (`dtype`, `shape` and a payload frame).
    """

    prediction_ids: list[int] = []
    labels: list[int] = []
    correct: list[bool] = []
    dtype: str = "uint8"
    shape: list[int] = []


class Status(Request, tag_field="op", tag="status", omit_defaults=True, kw_only=True):
    """Ask for the daemon's state."""


class Versions(Request, tag_field="op", tag="versions", omit_defaults=True, kw_only=True):
    """Ask for all versions with their verdicts, those among them that the gate turned down."""


class Rollback(Request, tag_field="op", tag="rollback", omit_defaults=True, kw_only=True):
    """Serve `version` again; without one, the version served before the present one."""

    version: int | None = None


class Reset(Request, tag_field="op", tag="reset", omit_defaults=True, kw_only=True):
    """Serve the source model (version 0) and watch from home again."""


class Pause(Request, tag_field="op", tag="pause", omit_defaults=True, kw_only=True):
    """Stop deciding: watch and answer, but do not adapt, swap or recall."""


class Resume(Request, tag_field="op", tag="resume", omit_defaults=True, kw_only=True):
    """Decide again after `pause`."""


class Adapt(Request, tag_field="op", tag="adapt", omit_defaults=True, kw_only=True):
    """Adapt now with the labels there are, whatever the charts say."""


class Approve(Request, tag_field="op", tag="approve", omit_defaults=True, kw_only=True):
    """Promote the candidate that `mode: propose` has prepared."""


class Accept(Request, tag_field="op", tag="accept", omit_defaults=True, kw_only=True):
    """Take the present shift for a normal regime: what serves goes on serving, and the shift is no alarm again."""


class Deploy(Request, tag_field="op", tag="deploy", omit_defaults=True, kw_only=True):
    """Serve another bundle in the place of the present one; the reply comes when it has been read and found fit.

    Attributes:
        bundle: absolute path, on the daemon's machine.
        force: also if clients would notice: other classes, image shape or preprocessing.
    """

    bundle: str
    force: bool = False


class Erase(Request, tag_field="op", tag="erase", omit_defaults=True, kw_only=True):
    """Delete labels with their images from the daemon's disk.

    Attributes:
        prediction_ids: of these.
        everything: of all; and the images of regimes and former bundles too, which have no ids.
    """

    prediction_ids: list[int] = []
    everything: bool = False


class Ask(Request, tag_field="op", tag="ask", omit_defaults=True, kw_only=True):
    """Ask which `n` recent predictions are most worth a label.

    Attributes:
        images: send the images too, of `dtype` and `shape` (N, H, W, C), in a payload frame; then 64 at most.
    """

    n: int = 16
    images: bool = False


class _Refusal(msgspec.Struct):
    """What a reply says of an error."""

    code: int
    error: str = ""
    retry_after_s: float | None = None


# What each reply says beside `v`, `id` and `code`, by operation; "?" where it may be missing.
REPLIES: dict[str, dict[str, str]] = {
    "predict": {
        "version": "that computed all of them",
        "prediction_id": "of the first image; the others follow by one",
        "credit": "images the client may have unanswered without being refused",
        "queue_s": "seconds the request waited",
        "compute_s": "seconds its batch was computed",
        "shape": "[N, K] of the float32 logits in the payload frame",
        "top?": "with `top_k`, instead of logits: class, name and probability of the likeliest, for each image",
    },
    "cancel": {"cancelled": "whether the request was still queued"},
    "metadata": {
        "name": "of the model",
        "classes": "their names, in the order of the logits",
        "max_message_bytes": "of the largest frame taken: on a larger one the connection is closed",
        "platform?": 'data socket: "onnxruntime"',
        "versions?": "data socket: the version in service, as a list",
        "inputs?": "data socket: name, datatype and shape, -1 for any number",
        "outputs?": "data socket: the same",
        "resize?": "data socket: how pictures of another size are brought to the model's",
        "preprocessing?": "data socket: the whole recipe, and `sha256`, its hash",
    },
    "ready": {"ready": "whether predictions are taken"},
    "label": {"outcomes": "of each label: joined, no_input, expired, unknown or contested"},
    "status": {
        "name": "of the model",
        "bundle_sha256": "its bundle's identity",
        "state": "stable, drifted, adapting or probation",
        "version": "in service",
        "regime": "that the traffic is thought to be of; 0 is home",
        "regimes": "those known: regime, version, kind, accuracy, keys",
        "mode": "off, propose or auto",
        "mode_reason": "why it is not the configured one",
        "paused": "whether it decides nothing",
        "shift": "null, or its cause, onset, kind, actionable, keys, diagnosis, proposal, and counts of labels",
        "drift": "statistic of each block over its threshold",
        "charts_samples": "samples since the charts began anew",
        "class_statistic": "of the histogram of predicted classes, over its threshold",
        "conformal_statistic": "of the slow detector, over its threshold",
        "label_statistic": "of the error test, over its threshold",
        "accuracy": "on the labels since the swap, of what serves and of the source",
        "arl": "samples between two false alarms, as set",
        "realised_arl": "the same, as the thresholds give it",
        "stickiness": "repeat and class_run, as measured on the traffic",
        "images_per_s": "observed, averaged over a minute",
        "traffic": "totals of the servers",
        "false_alarms_per_day": "expected at the present rate",
        "predicted_accuracy": "of the source on the newest samples, by its own confidence",
        "samples": "observed so far",
        "labels_buffered": "on disk",
        "clients_disagree": "clients whose labels contradict the others'",
        "labels_contested": "contested labels of each client",
        "adapter": "stage, done and total of the adaptation under way",
        "processes": "pid, ready and restarts of each",
        "device": "of the servers",
        "events": "the last 20",
    },
    "versions": {
        "versions": "each version's manifest without hashes, `serving`, and `has_weights`: false where the gate "
        "has turned it down; the source first",
    },
    "rollback": {"version": "in service now"},
    "reset": {"version": "in service now: 0"},
    "pause": {"paused": "true"},
    "resume": {"paused": "false"},
    "adapt": {"labels": "it begins with"},
    "approve": {"version": "being promoted"},
    "accept": {"regime": "number of the new normal"},
    "deploy": {
        "name": "of the model that is to serve",
        "bundle_sha256": "its bundle's identity",
        "former_sha256": "of the present one",
        "changes": "what clients would notice, in words",
    },
    "erase": {
        "labels": "erased",
        "images": "of regimes erased",
        "set_aside": "damaged files that may hold more: `everything` deletes them too",
    },
    "ask": {
        "predictions": "prediction_id, predicted and uncertainty of each, the most uncertain of each class first",
        "dtype?": "with `images`: of the payload frame",
        "shape?": "with `images`: (N, H, W, C)",
    },
}

DataRequest = Predict | Cancel | Metadata | Ready
ControlRequest = (
    Label
    | Status
    | Versions
    | Rollback
    | Reset
    | Pause
    | Resume
    | Adapt
    | Approve
    | Accept
    | Deploy
    | Erase
    | Ask
    | Metadata
    | Ready
)

_R = TypeVar("_R", bound=Request)
_encoder = msgspec.msgpack.Encoder()
_envelope = msgspec.msgpack.Decoder(Request)
_reply = msgspec.msgpack.Decoder(dict[str, Any])
# msgspec lets some errors of its own conversions through: a time stamp of the year 10000 is a ValueError.
_UNDECODABLE = (msgspec.MsgspecError, ValueError, RecursionError)
_data = msgspec.msgpack.Decoder(DataRequest)
_control = msgspec.msgpack.Decoder(ControlRequest)


def encode(header: msgspec.Struct | dict[str, Any], *tensors: Array) -> list[bytes]:
    """Frames of one message: the header, then each tensor's bytes, row-major and little-endian."""
    return [_encoder.encode(header), *map(tensor_bytes, tensors)]


def tensor_bytes(tensor: Array) -> bytes:
    """A tensor's frame: its bytes, row-major and little-endian."""
    little = tensor.dtype.isnative and sys.byteorder == "little"
    return (tensor if little else tensor.astype(tensor.dtype.newbyteorder("<"))).tobytes()


def decode_data(frames: Sequence[Buffer]) -> DataRequest:
    """Decode a request on the data socket.

    Raises:
        ProtocolError: the frames are not a request of this protocol version.
    """
    request: DataRequest = _decode(frames, _data)
    return request


def decode_control(frames: Sequence[Buffer]) -> ControlRequest:
    """Decode a request on the control socket.

    Raises:
        ProtocolError: the frames are not a request of this protocol version.
    """
    request: ControlRequest = _decode(frames, _control)
    return request


def _decode(frames: Sequence[Buffer], decoder: "msgspec.msgpack.Decoder[_R]") -> _R:
    if not 1 <= len(frames) <= MAX_FRAMES:
        raise ProtocolError(f"expected 1 or 2 frames (header, payload), got {len(frames)}")
    if len(frames[0]) > MAX_HEADER_BYTES:
        raise ProtocolError(f"header of {len(frames[0])} bytes; at most {MAX_HEADER_BYTES} are read")
    try:
        request = decoder.decode(frames[0])
    except _UNDECODABLE as error:
        envelope = _peek(frames[0])
        if envelope.v != PROTOCOL_VERSION:
            raise _version_error(envelope.v) from error
        raise ProtocolError(f"header is not a request of protocol {PROTOCOL_VERSION}: {error}") from error
    check_version(request.v)
    return request


def check_version(v: int) -> None:
    """Refuse a request of another protocol version.

    Raises:
        ProtocolError: `v` is not `PROTOCOL_VERSION`.
    """
    if v != PROTOCOL_VERSION:
        raise _version_error(v)


def _version_error(v: object) -> ProtocolError:
    return ProtocolError(f"protocol version {v!r} is not spoken here; send v={PROTOCOL_VERSION}")


def _peek(header: Buffer) -> Request:
    try:
        return _envelope.decode(header)
    except _UNDECODABLE:
        return Request()


def request_id(frames: Sequence[Buffer]) -> int | str:
    """The `id` of a request, as far as it can be read: even a bad request is answered with its own."""
    return _peek(frames[0]).id if frames and len(frames[0]) <= MAX_HEADER_BYTES else 0


def reply_id(frames: Sequence[bytes]) -> int | str:
    """The `id` of a reply, by which a client finds the request it answers."""
    return _peek(frames[0]).id if frames else 0


def decode_images(frames: Sequence[Buffer], dtype: str, shape: Sequence[int], image_shape: Sequence[int]) -> Array:
    """View the payload frame as images; nothing is copied.

    Args:
        frames: header and payload.
        dtype: what the header says; must be "uint8".
        shape: what the header says; must be (N, *image_shape) with N >= 1.
        image_shape: (H, W, C) of the model.

    Returns:
        (N, H, W, C) uint8, read-only.

    Raises:
        ProtocolError: the payload frame is missing or has another length than the shape says.
        InputError: the model does not take this dtype or shape.
    """
    if len(frames) != 2:
        raise ProtocolError("a payload frame with the image bytes must follow the header")
    if dtype != "uint8":
        raise InputError(
            f'dtype {dtype!r} is not taken: send uint8, the model normalises itself, or "bytes" of files'
        )
    if len(shape) != 4 or tuple(shape[1:]) != tuple(image_shape) or shape[0] < 1:
        hint = ": send channels last" if sorted(shape[1:]) == sorted(image_shape) else ""
        want = ", ".join(map(str, image_shape))
        raise InputError(f"expected shape (N, {want}) with N >= 1, got {tuple(shape)}{hint}")
    size = math.prod(shape)  # not numpy's, which wraps around
    if len(frames[1]) != size:
        raise ProtocolError(f"payload has {len(frames[1])} bytes, shape {tuple(shape)} of uint8 needs {size}")
    return np.frombuffer(frames[1], np.uint8).reshape(shape)


def split_pictures(frames: Sequence[Buffer], shape: Sequence[int], sizes: Sequence[int]) -> list[memoryview]:
    """View the payload frame as files; nothing is copied or decoded.

    Args:
        frames: header and payload.
        shape: what the header says; must be (N,) with N >= 1.
        sizes: bytes of each file.

    Raises:
        ProtocolError: the payload frame is missing or has another length than the sizes say.
        InputError: shape and sizes do not agree.
    """
    if len(frames) != 2:
        raise ProtocolError("a payload frame with the pictures must follow the header")
    if len(shape) != 1 or shape[0] != len(sizes) or not sizes or min(sizes) < 1:
        raise InputError(
            f"shape {tuple(shape)} and {len(sizes)} sizes: give [N] and the bytes of each of N >= 1 files"
        )
    if sum(sizes) != len(frames[1]):
        raise ProtocolError(f"payload has {len(frames[1])} bytes, the sizes of its files come to {sum(sizes)}")
    payload, ends = memoryview(frames[1]), list(itertools.accumulate(sizes, initial=0))
    return [payload[begin:end] for begin, end in itertools.pairwise(ends)]


def decode_reply(frames: Sequence[bytes]) -> tuple[dict[str, Any], list[bytes]]:
    """Split a reply into its header and its tensor frames.

    Raises:
        ProtocolError: the header is not msgpack, or of another version, or tells an error in another way.
    """
    if not frames:
        raise ProtocolError("empty reply")
    try:
        header = _reply.decode(frames[0])
        if header.get("code", Code.OK) != Code.OK:
            msgspec.convert(header, _Refusal)
    except _UNDECODABLE as error:
        raise ProtocolError(f"reply header is not one of this protocol: {error}") from error
    check_version(header.get("v", -1))
    return header, list(frames[1:])


def reply_error(header: dict[str, Any]) -> TTAError | None:
    """The error that a reply tells, with the id of its request as a note; None if it is an answer."""
    if header.get("code", Code.OK) == Code.OK:
        return None
    error = from_wire(header["code"], header.get("error", ""), header.get("retry_after_s"))
    error.add_note(f"request {header.get('id')}")
    return error


def error_reply(request_id: object, error: BaseException) -> dict[str, Any]:
    """The one place where an exception becomes a reply; unknown ones say nothing of the inside."""
    if not isinstance(error, TTAError):
        return {
            "v": PROTOCOL_VERSION,
            "id": request_id,
            "code": int(Code.INTERNAL),
            "error": "internal error; see the daemon's log",
        }
    reply = {"v": PROTOCOL_VERSION, "id": request_id, "code": int(error.code), "error": str(error)}
    if error.retry_after_s is not None:
        reply["retry_after_s"] = error.retry_after_s
    return reply
