"""The wire: golden bytes, and frames nobody should send."""

import msgspec
import numpy as np
import pytest

from tta import protocol
from tta.errors import Code, InputError, OverloadedError, ProtocolError, from_wire

SHAPE = (4, 4, 3)


def test_a_predict_request_has_these_bytes() -> None:
    """A predict request is the msgpack map and raw bytes that the protocol page promises."""
    x = np.arange(48, dtype=np.uint8).reshape(1, *SHAPE)

    frames = protocol.encode(protocol.Predict(id=7, dtype="uint8", shape=list(x.shape)), x)

    assert frames[0] == bytes.fromhex(
        "84a26f70a770726564696374a2696407a56474797065a575696e7438a573686170659401040403"
    )
    assert frames[1] == bytes(range(48))


def test_images_come_back_as_sent() -> None:
    """Decoding a predict request gives the images without copying them."""
    x = np.arange(96, dtype=np.uint8).reshape(2, *SHAPE)
    frames = protocol.encode(
        protocol.Predict(id=1, dtype="uint8", shape=[2, *SHAPE], deadline_s=0.5, key="cam"), x
    )

    request = protocol.decode_data(frames)

    assert isinstance(request, protocol.Predict)
    assert (request.deadline_s, request.key) == (0.5, "cam")
    assert np.array_equal(protocol.decode_images(frames, request.dtype, request.shape, SHAPE), x)


def test_every_truncation_is_a_protocol_error() -> None:
    """Every proper prefix of a good header is refused as a protocol error, nothing else."""
    header = protocol.encode(protocol.Label(id=1, prediction_ids=[5], labels=[2]))[0]

    for n in range(len(header)):
        with pytest.raises(ProtocolError):
            protocol.decode_control([header[:n]])


@pytest.mark.parametrize(
    ("frames", "text"),
    [
        ([], "1 or 2 frames"),
        ([b"", b"", b""], "1 or 2 frames"),
        ([b"\xc1"], "not a request"),
        ([msgspec.msgpack.encode({"v": 2, "op": "predict", "id": 1})], "protocol version 2"),
        ([msgspec.msgpack.encode({"v": 1, "op": "explode", "id": 1})], "explode"),
        ([msgspec.msgpack.encode([1, 2])], "not a request"),
        (
            [msgspec.msgpack.encode({"v": 1, "op": "predict", "id": 1, "dtype": "uint8", "shape": "big"})],
            "not a request",
        ),
    ],
)
def test_what_is_no_request_is_named(frames: list[bytes], text: str) -> None:
    """A frame that is no request is refused with a message that says what is wrong."""
    with pytest.raises(ProtocolError, match=text):
        protocol.decode_data(frames)


def test_another_version_is_refused_even_if_it_would_decode() -> None:
    """A request of another protocol version is refused although its fields are known."""
    with pytest.raises(ProtocolError, match="protocol version 9"):
        protocol.decode_data([msgspec.msgpack.encode({"v": 9, "op": "ready", "id": 1})])


@pytest.mark.parametrize(
    ("dtype", "shape", "payload", "error", "text"),
    [
        ("float32", [1, 4, 4, 3], 192, InputError, "uint8"),
        ("uint8", [1, 3, 4, 4], 48, InputError, "channels last"),
        ("uint8", [4, 4, 3], 48, InputError, "expected shape"),
        ("uint8", [0, 4, 4, 3], 0, InputError, "N >= 1"),
        ("uint8", [2, 4, 4, 3], 48, ProtocolError, "needs 96"),
    ],
)
def test_images_that_do_not_fit_are_named(
    dtype: str, shape: list[int], payload: int, error: type[Exception], text: str
) -> None:
    """Wrong dtype, shape or length is refused with the value and what to send instead."""
    with pytest.raises(error, match=text):
        protocol.decode_images([b"", bytes(payload)], dtype, shape, SHAPE)


def test_an_error_keeps_its_code_and_hint_over_the_wire() -> None:
    """An error raised in the server is the same error in the client, with its retry hint."""
    reply = protocol.error_reply(3, OverloadedError("queue is full", 0.25))

    error = from_wire(reply["code"], reply["error"], reply["retry_after_s"])

    assert isinstance(error, OverloadedError)
    assert error.retry_after_s == 0.25


def test_an_unexpected_error_says_nothing_of_the_inside() -> None:
    """A client never sees the text of an exception that was not meant for it."""
    reply = protocol.error_reply(3, ValueError("secret path /home/x"))

    assert reply["code"] == Code.INTERNAL
    assert "secret" not in reply["error"]
