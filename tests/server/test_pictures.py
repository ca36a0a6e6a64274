"""JPEG and PNG files over the wire: decoded as from disk, classes by name, and what a file may be instead."""

import io
import signal
import subprocess
from pathlib import Path

import msgspec
import numpy as np
import pytest
from PIL import Image

from tests.server.conftest import answering, launch
from tests.server.test_server import exchange
from tta.bundle import Bundle
from tta.client import Client, Prediction
from tta.errors import CancelledError, Code, InputError
from tta.images import read_image
from tta.preprocessing import recipe, recipe_hash
from tta.server.options import ServerOptions


def picture(n: int = 0, size: tuple[int, int] = (90, 60), kind: str = "JPEG") -> bytes:
    """A file of random patches."""
    pixels = np.random.default_rng(n).integers(0, 255, (12, 16, 3), np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).resize(size).save(out, kind)
    return out.getvalue()


def test_files_are_decoded_as_from_disk(
    server: subprocess.Popen, options: ServerOptions, bundle: Bundle, tmp_path: Path
) -> None:
    """A file's logits are those of what `read_image` makes of it, for JPEG and PNG, alone and among others."""
    files = [picture(i, size, kind) for i, (size, kind) in enumerate((((90, 60), "JPEG"), ((32, 32), "PNG")))]
    files.append(picture(2, (31, 77), "PNG"))
    images = []
    for number, data in enumerate(files):
        path = tmp_path / f"{number}.png"
        path.write_bytes(data)
        images.append(read_image(path, bundle.manifest.image_shape, bundle.manifest.resize))

    with Client(options.endpoint) as client:
        expected = client.predict(np.stack(images))
        together = client.predict(files)
        alone = [client.predict(data) for data in files]

    np.testing.assert_allclose(together.logits, expected.logits, atol=1e-4)
    np.testing.assert_allclose(np.concatenate([a.logits for a in alone]), expected.logits, atol=1e-4)
    assert together.prediction_ids == [together.prediction_id + i for i in range(3)]


def test_classes_come_by_name(server: subprocess.Popen, options: ServerOptions, stream: tuple) -> None:
    """With top_k the header names the likeliest classes with their softmax, and there are no logits."""
    x = stream[0][:2]
    header = {"v": 1, "op": "predict", "id": 5, "dtype": "uint8", "shape": list(x.shape)}
    with Client(options.endpoint) as client:
        logits = client.predict(x).logits.astype(np.float64)
    shares = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)

    three = exchange(options.endpoint, [msgspec.msgpack.encode({**header, "top_k": 3}), x.tobytes()])
    every = exchange(options.endpoint, [msgspec.msgpack.encode({**header, "top_k": 99}), x.tobytes()])

    for row, found in zip(shares, three["top"], strict=True):
        best = np.argsort(-row)[:3].tolist()
        assert [each["class"] for each in found] == best
        assert [each["name"] for each in found] == [str(i) for i in best]
        np.testing.assert_allclose([each["probability"] for each in found], row[best], atol=1e-5)
    assert [len(found) for found in every["top"]] == [10, 10]
    assert exchange(options.endpoint, [msgspec.msgpack.encode({**header, "top_k": 0}), x.tobytes()])["code"] == 3


def test_what_is_no_picture_is_refused_and_harms_nobody(server: subprocess.Popen, options: ServerOptions) -> None:
    """Damaged and huge files, other formats, sizes that lie: each a code and a reason, while others are served."""
    good = picture()
    bomb = io.BytesIO()
    Image.new("L", (9000, 9000)).save(bomb, "PNG")
    gif = picture(kind="GIF")
    header = {"v": 1, "op": "predict", "id": 5, "dtype": "bytes"}
    encode = msgspec.msgpack.encode
    for fields, payload, reason in (
        ({"shape": [1], "sizes": [4]}, b"none", "picture 1 of 1: not a JPEG or PNG file"),
        ({"shape": [1], "sizes": [len(gif)]}, gif, "picture 1 of 1: not a JPEG or PNG file"),
        ({"shape": [1], "sizes": [len(good) // 2]}, good[: len(good) // 2], "picture 1 of 1"),
        ({"shape": [1], "sizes": [bomb.tell()]}, bomb.getvalue(), "more than 50,000,000 pixels"),
        ({"shape": [2], "sizes": [len(good), 3]}, good + b"abc", "picture 2 of 2"),
        ({"shape": [2], "sizes": [len(good)]}, good, "shape (2,) and 1 sizes"),
        ({"shape": [1], "sizes": [len(good) + 1]}, good, "the sizes of its files come to"),
        ({"shape": [2], "sizes": [len(good), 0]}, good, "shape (2,) and 2 sizes"),
        ({"shape": [1], "sizes": [-1]}, good, "shape (1,) and 1 sizes"),
        ({"shape": [0], "sizes": []}, b"", "shape (0,) and 0 sizes"),
        ({"shape": [65], "sizes": [len(good)] * 65}, good * 65, "at most 64 are taken"),
        ({"shape": [2000], "sizes": [1] * 2000}, b"x" * 2000, "header is not a request"),
    ):
        reply = exchange(options.endpoint, [encode({**header, **fields}), payload])
        assert reply["code"] == Code.INVALID_ARGUMENT, reason
        assert reason in reply["error"]

    with Client(options.endpoint) as client:
        assert client.predict([good, good]).logits.shape == (2, 10)


def test_another_recipe_is_refused(server: subprocess.Popen, options: ServerOptions, bundle: Bundle) -> None:
    """A request that names the model's recipe is served, one that names another is told so; metadata tells it."""
    m = bundle.manifest
    x = np.zeros((1, *m.image_shape), np.uint8)
    header = {"v": 1, "op": "predict", "id": 5, "dtype": "uint8", "shape": list(x.shape)}
    with Client(options.endpoint) as client:
        told = client.metadata()["preprocessing"]

    def code(name: str) -> int:
        return int(
            exchange(options.endpoint, [msgspec.msgpack.encode({**header, "preprocessing": name}), bytes(x)])[
                "code"
            ]
        )

    assert (
        recipe_hash({k: v for k, v in told.items() if k != "sha256"}) == told["sha256"] == m.preprocessing_sha256
    )
    assert told == {**recipe(m.image_shape, m.resize, m.mean, m.std), "sha256": m.preprocessing_sha256}
    assert code(told["sha256"]) == Code.OK
    assert code("0123456789abcdef") == Code.INVALID_ARGUMENT
    assert recipe_hash(recipe(m.image_shape, "stretch", m.mean, m.std)) != told["sha256"]


def test_files_admitted_before_the_end_are_answered(options: ServerOptions, tmp_path: Path) -> None:
    """SIGTERM while files wait to be decoded: every one of them is answered, and the server ends with 0."""
    process = launch(options, tmp_path)
    big = picture(1, (3000, 2000))
    with Client(options.endpoint, timeout_s=30, retry=False) as client:
        assert client.ready()
        sent = {client.submit(big) for _ in range(8)}
        answers: dict = {}
        while not answers:
            answers |= dict(client.results(5.0))
        process.send_signal(signal.SIGTERM)
        while len(answers) < len(sent):
            answers |= dict(client.results(10.0))

    assert set(answers) == sent
    assert all(isinstance(answer, Prediction) for answer in answers.values())
    assert process.wait(20) == 0


def test_a_flood_of_files_is_bounded(server: subprocess.Popen, options: ServerOptions) -> None:
    """More files than the queue holds are refused with `retry_after_s`, by the same bound as images."""
    big = picture(1, (2000, 1500))
    with Client(options.endpoint, timeout_s=60, window=1000, retry=False) as client:
        sent = [client.submit([big] * 2) for _ in range(100)]
        answers: dict = {}
        while len(answers) < len(sent):
            answers |= dict(client.results(10.0))
    refused = [a for a in answers.values() if not isinstance(a, Prediction)]

    assert refused
    assert all(a.code == Code.RESOURCE_EXHAUSTED and a.retry_after_s for a in refused)
    assert len(refused) < len(sent)


def test_lists_that_are_no_pictures_say_so(options: ServerOptions) -> None:
    """The client tells a list of texts, of nothing and of mixed things from images and files before it sends."""
    with Client(options.endpoint) as client:
        for bad in (["a.jpg"], [], [b"x", "y"]):
            with pytest.raises(InputError, match="expected images"):
                client.predict(bad)


def test_the_bytes_of_waiting_files_are_bounded(options: ServerOptions, tmp_path: Path) -> None:
    """Few but huge files of one client are refused once 64 MiB of them wait, and another client is served."""
    large = msgspec.structs.replace(options, max_message_bytes=64 << 20)
    slow = picture(1, (6000, 4000), "PNG")
    padded = slow + bytes((20 << 20) - len(slow))  # what follows a PNG's end is nobody's business
    with (
        answering(large, tmp_path),
        Client(large.endpoint, timeout_s=60, window=1000, retry=False) as client,
        Client(large.endpoint, timeout_s=60) as other,
    ):
        sent = [client.submit(padded) for _ in range(12)]
        answers: dict = dict(client.results(0.1))
        alone = other.predict(picture())
        while len(answers) < len(sent):
            answers |= dict(client.results(10.0))
    refused = [a for a in answers.values() if not isinstance(a, Prediction)]

    assert alone.logits.shape == (1, 10)
    assert refused
    assert {a.code for a in refused} == {Code.RESOURCE_EXHAUSTED}
    assert all("bytes of files wait" in str(a) for a in refused)
    assert len(refused) < len(sent)


def test_pixels_and_names_are_bounded(server: subprocess.Popen, options: ServerOptions, stream: tuple) -> None:
    """Small files that claim many pixels, and answers of many names, are refused before they cost anything."""
    flat = io.BytesIO()
    Image.new("1", (7000, 7000)).save(flat, "PNG")
    data = flat.getvalue()
    header = {"v": 1, "op": "predict", "id": 5}
    encode = msgspec.msgpack.encode
    many = {**header, "dtype": "bytes", "shape": [4], "sizes": [len(data)] * 4}
    named = {**header, "dtype": "uint8", "shape": [60, 32, 32, 3], "top_k": 80}

    pixels = exchange(options.endpoint, [encode(many), data * 4])
    names = exchange(options.endpoint, [encode(named), bytes(60 * 32 * 32 * 3)])

    assert (pixels["code"], names["code"]) == (Code.INVALID_ARGUMENT, Code.OK)  # of 80 names there are 10
    assert "196,000,000 pixels in one request" in pixels["error"]
    assert [len(row) for row in names["top"]] == [10] * 60


def test_a_cancelled_file_is_not_computed(server: subprocess.Popen, options: ServerOptions) -> None:
    """A request whose files wait to be decoded can be cancelled, and those behind it are served."""
    big = picture(1, (3000, 2000))
    with Client(options.endpoint, timeout_s=60, retry=False, window=1000) as client:
        sent = [client.submit(big) for _ in range(6)]
        client.results(0.0)
        client.cancel(sent[-1])
        answers: dict = {}
        while len(answers) < len(sent):
            answers |= dict(client.results(10.0))

    assert isinstance(answers[sent[-1]], CancelledError)
    assert all(isinstance(answers[request], Prediction) for request in sent[:-1])


def test_lists_of_files_do_not_make_single_ones_look_slow(
    server: subprocess.Popen, options: ServerOptions
) -> None:
    """After a request of many files one with a deadline of a second is still admitted: time is counted by file."""
    big = picture(1, (900, 700))
    with Client(options.endpoint, timeout_s=60) as client:
        for _ in range(2):
            client.predict([big] * 8)
        answer = client.predict(picture(), deadline_s=1.0)

    assert answer.logits.shape == (1, 10)
