"""Both clients against a real daemon."""

import asyncio
import signal
from collections.abc import Callable

import msgspec
import numpy as np
import pytest
import zmq

import tta
import tta.protocol
from tests.waiting import until
from tta.client import AsyncClient, Client
from tta.errors import ConfigError, DeadlineError, InputError, PreconditionError, UnavailableError
from tta.protocol import Status
from tta.scenario import DaemonProcess, free_ports


@pytest.fixture
def daemon(start_daemon: Callable[..., DaemonProcess]) -> DaemonProcess:
    """A running daemon."""
    return start_daemon()


def test_the_public_names() -> None:
    """`tta` exports what it says and nothing else."""
    assert set(tta.__all__) == {"AsyncClient", "Client", "Credentials", "__version__", "load_bundle"}
    assert all(hasattr(tta, name) for name in tta.__all__)


def test_predict_label_and_status(daemon: DaemonProcess, stream: tuple) -> None:
    """A batch is predicted, its labels joined; correct/wrong, labelled images and unknown ids are told apart."""
    x, y = stream
    with daemon.client() as client:
        answer = client.predict(x[:32], key="camera-1")
        joined = client.label(answer.prediction_ids[:8], y[:8])
        judged = client.label(answer.prediction_ids[8:10], correct=[True, False])
        given = client.label(labels=y[10:14], x=x[10:14])
        unknown = client.label([answer.prediction_id + 10_000, 5], [1, 1])
        status = client.status()
        about = client.metadata()

    assert (answer.classes == y[:32]).mean() > 0.9
    assert answer.prediction_ids == list(range(answer.prediction_id, answer.prediction_id + 32))
    assert joined == ["joined"] * 8
    assert judged == ["joined"] * 2
    assert given == ["joined"] * 4
    assert unknown == ["unknown", "unknown"]
    assert (status["state"], status["version"], status["labels_buffered"]) == ("stable", 0, 14)
    assert about["inputs"][0]["shape"] == [-1, 32, 32, 3]


def test_what_is_too_large_is_not_sent(start_daemon: Callable[..., DaemonProcess], stream: tuple) -> None:
    """A frame beyond `server.max_message_bytes` is refused by both clients, and breaks no other request."""
    x = np.concatenate([stream[0][:50]] * 8)
    daemon = start_daemon(**{"server.max_message_bytes": x.nbytes - 1})
    with daemon.client() as client:
        others = [client.submit(x[:8]) for _ in range(20)]
        with pytest.raises(InputError, match=f"{x.nbytes} bytes in one request: {x.nbytes - 1} are taken"):
            client.predict(x)
        largest = client.predict(x[:-1])
        answers: dict = {}
        until(lambda: answers.update(client.results(1.0)) or len(answers) == len(others), "the others' answers")
    with daemon.client() as client, pytest.raises(InputError, match="send fewer"):
        client.label(labels=[0] * len(x), x=x)

    async def refused(call: str, *arguments: object, **named: object) -> None:
        async with AsyncClient(daemon.endpoint, daemon.control) as client:
            with pytest.raises(InputError, match="send fewer"):
                await getattr(client, call)(*arguments, **named)

    asyncio.run(refused("predict", x))
    asyncio.run(refused("label", labels=[0] * len(x), x=x))
    assert len(largest.classes) == len(x) - 1
    assert all(len(answers[other].classes) == 8 for other in others)


def test_a_large_request_keeps_its_deadline() -> None:
    """Where nobody answers, what the server takes is asked no longer than the request may wait."""
    port = free_ports(1)[0]
    with Client(f"tcp://127.0.0.1:{port}", timeout_s=3600.0) as client, pytest.raises(DeadlineError):
        client.predict(np.zeros((400, 32, 32, 3), np.uint8), deadline_s=0.1)


def test_bad_labels_are_refused_and_store_nothing(daemon: DaemonProcess, stream: tuple) -> None:
    """A class out of range, a count that does not match, or both kinds at once are refused as a whole."""
    with daemon.client() as client:
        answer = client.predict(stream[0][:4])
        for arguments in (
            {"labels": [0, 1, 2, 10]},
            {"labels": [0, 1]},
            {"labels": [0, 1, 2, 3], "correct": [True] * 4},
            {},
        ):
            with pytest.raises(InputError):
                client.label(answer.prediction_ids, **arguments)
        assert client.status()["labels_buffered"] == 0


def test_nobody_there_is_a_deadline_error() -> None:
    """A client without a server fails within its time-out and says what to check."""
    endpoint = f"tcp://127.0.0.1:{free_ports(1)[0]}"

    with Client(endpoint, timeout_s=0.2) as client, pytest.raises(DeadlineError, match="is tta serving"):
        client.predict(np.zeros((1, 4, 4, 3), np.uint8))


def test_a_closed_client_leaves_nobody_waiting() -> None:
    """Tasks that wait when the block ends are told; closing twice is harmless; a closed client says so."""

    async def run() -> object:
        async with AsyncClient(f"tcp://127.0.0.1:{free_ports(1)[0]}", timeout_s=60) as client:
            task = asyncio.create_task(client.predict(np.zeros((1, 4, 4, 3), np.uint8)))
            await asyncio.sleep(0)
        with pytest.raises(PreconditionError, match="async with"):
            await client.predict(np.zeros((1, 4, 4, 3), np.uint8))
        return await asyncio.gather(task, return_exceptions=True)

    assert isinstance(asyncio.run(run())[0], UnavailableError)
    with Client() as client:
        client.close()
        with pytest.raises(PreconditionError, match="closed"):
            client.predict(np.zeros((1, 4, 4, 3), np.uint8))


def test_many_requests_in_flight_over_asyncio(daemon: DaemonProcess, stream: tuple) -> None:
    """Two hundred concurrent requests each get their own image's answer, beside labels and status."""
    x, y = stream

    async def run() -> tuple:
        async with AsyncClient(daemon.endpoint, daemon.control) as client:
            answers = await asyncio.gather(*(client.predict(x[i]) for i in range(200)))
            outcomes = await client.label([a.prediction_id for a in answers[:5]], y[:5])
            with pytest.raises(InputError, match="channels last"):
                await client.predict(x[:1].transpose(0, 3, 1, 2))
            return answers, outcomes, await client.status(), await client.call(Status())

    answers, outcomes, status, again = asyncio.run(run())

    with daemon.client() as client:
        expected = client.predict(x[:16]).logits
    assert all(np.array_equal(answers[i].logits[0], expected[i]) for i in range(16))
    assert len({a.prediction_id for a in answers}) == 200
    assert outcomes == ["joined"] * 5
    assert status["version"] == again["version"] == 0


def test_ask_names_unlabelled_predictions_of_every_class(daemon: DaemonProcess, stream: tuple) -> None:
    """`ask` spreads over the predicted classes and never names a prediction that has its label."""
    x, y = stream
    with daemon.client() as client:
        answer = client.predict(x[:64])
        client.predict(x[64:128])
        client.label(answer.prediction_ids[:20], y[:20])
        asked = client.call(tta.protocol.Ask(n=10))["predictions"]

    assert len({a["predicted"] for a in asked}) >= 8
    assert not {a["prediction_id"] for a in asked} & set(answer.prediction_ids[:20])


def test_a_hostile_control_message_harms_nobody(daemon: DaemonProcess, stream: tuple) -> None:
    """Messages that once ended the daemon get a code, and labels go on."""
    encode = msgspec.msgpack.encode
    for frames in (
        [bytes.fromhex("83a17601a26f70a57265616479a26964c70cff000000000000003afff44180")],
        [encode({"v": 1, "op": "label", "id": 1, "labels": [1], "shape": [1 << 63, 32, 32, 3]}), b""],
        [encode({"v": 1, "op": "label", "id": 1, "prediction_ids": [1] * 2000, "labels": [1] * 2000})],
        [encode({"v": 1, "op": "rollback", "id": 1, "version": 2**64 - 1})],
        [encode({"v": 1, "op": "ask", "id": 1, "n": -5})],
        [b""],
    ):
        with zmq.Context() as context, context.socket(zmq.DEALER) as socket:
            socket.setsockopt(zmq.LINGER, 0)
            socket.connect(daemon.control)
            socket.send_multipart(frames)
            assert socket.poll(10_000), frames[0][:40]
            assert msgspec.msgpack.decode(socket.recv_multipart()[0])["code"] in (3, 5)

    with daemon.client() as client:
        answer = client.predict(stream[0][:1])
        assert client.label(answer.prediction_ids, [1]) == ["joined"]


def test_a_label_sent_twice_is_no_new_evidence(daemon: DaemonProcess, stream: tuple) -> None:
    """The same wrong label repeated forty times raises no alarm and is one label on disk."""
    with daemon.client() as client:
        answer = client.predict(stream[0][:1])
        wrong = [(int(answer.classes[0]) + 1) % 10]
        for _ in range(40):
            assert client.label(answer.prediction_ids, wrong) == ["joined"]
        status = client.status()

    assert (status["state"], status["labels_buffered"]) == ("stable", 1)


def test_a_label_always_finds_its_prediction(daemon: DaemonProcess, stream: tuple) -> None:
    """Labels sent at once after the answer are joined, also while others flood the control socket."""
    with daemon.client() as client, zmq.Context() as context, context.socket(zmq.DEALER) as busy:
        busy.setsockopt(zmq.LINGER, 0)
        busy.connect(daemon.control)
        outcomes = []
        for i in range(60):
            for _ in range(8):
                busy.send_multipart(tta.protocol.encode(Status(id=i)))
            answer = client.predict(stream[0][i])
            outcomes += client.label(answer.prediction_ids, [0])

    assert outcomes == ["joined"] * 60


def test_an_address_that_is_none_says_how_to_write_one() -> None:
    """An endpoint without tcp:// is an error with the form to use."""
    with Client("localhost:5555") as client, pytest.raises(ConfigError, match="tcp://HOST:PORT"):
        client.predict(np.zeros((1, 4, 4, 3), np.uint8))
    with Client() as client, pytest.raises(InputError, match="uint8"):
        client.predict([[1]])


def test_a_daemon_that_falls_silent_is_a_deadline_error(daemon: DaemonProcess) -> None:
    """A command that a stopped daemon does not answer ends in time with an error that says so."""
    assert daemon.process is not None
    with daemon.client(3.0) as client:
        assert client.status()["state"] == "stable"
        daemon.process.send_signal(signal.SIGSTOP)
        try:
            with pytest.raises(DeadlineError, match="no answer"):
                client.status()
        finally:
            daemon.process.send_signal(signal.SIGCONT)
        assert client.status()["state"] == "stable"
