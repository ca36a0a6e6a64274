"""Clients that share a server, a client that uses several, and requests that are sent again."""

import asyncio
import subprocess
from collections.abc import Iterator
from pathlib import Path

import msgspec
import numpy as np
import pytest
import zmq

from tests.server.conftest import answering, launch
from tta import protocol
from tta.client import AsyncClient, Client
from tta.scenario import free_ports
from tta.server.options import Observation, ServerOptions


@pytest.fixture
def second(options: ServerOptions, tmp_path: Path) -> Iterator[ServerOptions]:
    """Options of another server of the same model, which runs."""
    folder = tmp_path / "second"
    folder.mkdir()
    other = msgspec.structs.replace(
        options,
        endpoint=f"tcp://127.0.0.1:{free_ports(1)[0]}",
        admin=f"ipc://{folder}/admin.ipc",
        observe=f"ipc://{folder}/observe.ipc",
    )
    with answering(other, folder):
        yield other


class Raw:
    """A DEALER that speaks the wire by hand."""

    def __init__(self, endpoint: str) -> None:
        self.context = zmq.Context()
        self.socket = self.context.socket(zmq.DEALER)
        self.socket.setsockopt(zmq.LINGER, 0)
        self.socket.connect(endpoint)

    def __enter__(self) -> "Raw":
        return self

    def __exit__(self, *_: object) -> None:
        self.context.destroy(linger=0)

    def send(self, request: protocol.Request, *tensors: np.ndarray) -> None:
        """Send one request."""
        self.socket.send_multipart(protocol.encode(request, *tensors))

    def receive(self) -> dict:
        """The header of the next reply."""
        assert self.socket.poll(10_000), "no reply"
        return protocol.decode_reply(self.socket.recv_multipart())[0]


def predict(x: np.ndarray, request_id: int, **fields: object) -> protocol.Predict:
    """The request for a batch."""
    return protocol.Predict(id=request_id, dtype="uint8", shape=list(x.shape), **fields)


def test_a_repeated_request_is_computed_once(
    server: subprocess.Popen, options: ServerOptions, stream: tuple
) -> None:
    """The same id of the same client gets the same prediction, from any connection; without a name it is anew."""
    x = stream[0][:2]
    with Raw(options.endpoint) as first, Raw(options.endpoint) as other:
        named = predict(x, 7, client="a-random-name")
        first.send(named, x)
        original = first.receive()
        first.send(named, x)
        other.send(named, x)
        repeated = [first.receive(), other.receive()]
        other.send(predict(x, 7, client="another-name"), x)
        other.send(predict(x, 7), x)
        other.send(predict(x, 7), x)
        anew = [other.receive() for _ in range(3)]

    assert repeated == [original, original]
    ids = [reply["prediction_id"] for reply in (original, *anew)]
    assert len(set(ids)) == 4


def test_a_request_repeated_while_it_waits_is_answered_where_it_was_repeated(
    server: subprocess.Popen, options: ServerOptions, stream: tuple
) -> None:
    """A client that has lost its connection asks again on a new one and gets each answer there, once."""
    x = stream[0][:1]
    with Raw(options.endpoint) as new:
        with Raw(options.endpoint) as old:
            for i in range(40):
                old.send(predict(x, i, client="moving"), x)
            old.receive()  # the others are queued, or answered too
            for i in range(40):
                new.send(predict(x, i, client="moving"), x)
            answers = [new.receive() for _ in range(40)]
        new.send(protocol.Ready(id=99))
        assert new.receive()["id"] == 99  # and nothing twice

    assert sorted(a["id"] for a in answers) == list(range(40))
    assert len({a["prediction_id"] for a in answers}) == 40


def test_a_flood_does_not_delay_others(server: subprocess.Popen, options: ServerOptions, stream: tuple) -> None:
    """With one client's queue full, another client's request is computed before most of it."""
    x = stream[0][:1]
    with Raw(options.endpoint) as flood, Client(options.endpoint, retry=False) as other:
        assert other.ready()
        for i in range(64):
            flood.send(predict(stream[0][:16], i), stream[0][:16])
        for i in range(4):
            flood.receive()  # it is being worked on
            answer = other.predict(x)
            flood.send(predict(stream[0][:16], 64 + i), stream[0][:16])
        replies = [flood.receive() for _ in range(64)]
    later = [r for r in replies if r["code"] == 0 and r["prediction_id"] > answer.prediction_id]

    assert any(r["code"] == 8 for r in replies)  # the flood was refused, not the other
    assert later


def test_what_is_not_observed_is_predicted_only(
    server: subprocess.Popen, options: ServerOptions, stream: tuple
) -> None:
    """Images of a load test are answered; the daemon is told only of the others, with their ids and rows."""
    x = stream[0]
    with zmq.Context() as context, context.socket(zmq.PULL) as daemon:
        daemon.setsockopt(zmq.LINGER, 0)
        daemon.bind(options.observe)
        answers = {}
        with Client(options.endpoint) as client:
            for i in range(24):
                answers[client.submit(x[i : i + 1], observe=i % 3 == 0)] = i
            found = {}
            while len(found) < 24:
                found |= dict(client.results(10.0))
        expected = {}
        for request_id, answer in found.items():
            if answers[request_id] % 3 == 0:
                expected[answer.prediction_id] = answer.logits[0]
        seen: dict[int, np.ndarray] = {}
        while len(seen) < len(expected):
            assert daemon.poll(10_000), f"{len(seen)} of {len(expected)} observed"
            frames = daemon.recv_multipart()
            header = msgspec.msgpack.decode(frames[0])
            if header["op"] != "observation":
                continue
            observation = msgspec.convert(header, Observation)
            logits = np.frombuffer(frames[1], np.float32).reshape(observation.n, -1)
            images = np.frombuffer(frames[3], np.uint8).reshape(observation.n, *x.shape[1:])
            for row in range(observation.n):
                seen[observation.first_id + row] = logits[row]
                assert any(np.array_equal(images[row], x[i]) for i in range(0, 24, 3))

    assert seen.keys() == expected.keys()
    assert all(np.array_equal(seen[i], expected[i]) for i in seen)


def test_a_server_killed_under_load_loses_no_answer(
    server: subprocess.Popen, options: ServerOptions, second: ServerOptions, stream: tuple
) -> None:
    """With two servers, kill -9 of one leaves every request answered once, by the other."""
    x = stream[0]
    with Client([options.endpoint, second.endpoint], timeout_s=60) as client:
        expected = client.predict(x[:16]).logits
        sent = {client.submit(x[i % 16][None]): i % 16 for i in range(100)}
        server.kill()
        sent |= {client.submit(x[i % 16][None]): i % 16 for i in range(100)}
        answers: dict = {}
        while len(answers) < 200:
            got = dict(client.results(60.0))
            assert got, f"{200 - len(answers)} requests unanswered"
            assert not got.keys() & answers.keys()
            answers |= got

    assert answers.keys() == sent.keys()
    assert all(np.array_equal(answers[r].logits[0], expected[i]) for r, i in sent.items())


def test_a_server_that_comes_back_answers_what_was_asked_before(
    server: subprocess.Popen, options: ServerOptions, stream: tuple, tmp_path: Path
) -> None:
    """A single server killed and started again: the blocked client gets its answer, without asking twice."""
    server.kill()
    server.wait()
    with Client(options.endpoint, timeout_s=60) as client:
        request = client.submit(stream[0][:1])
        again = launch(options, tmp_path)
        try:
            answers = dict(client.results(60.0))
        finally:
            again.kill()
            again.wait()

    assert answers[request].version == 0


def test_many_batches_come_in_order(
    server: subprocess.Popen, options: ServerOptions, second: ServerOptions, stream: tuple
) -> None:
    """`predict_many` over two servers gives the answers of all batches, in their order."""
    x = stream[0]
    batches = [x[i : i + 1 + i % 7] for i in range(120)]
    with Client(f"{options.endpoint},{second.endpoint}") as client:
        answers = list(client.predict_many(iter(batches)))
        whole = np.concatenate([client.predict(x[i : i + 32]).logits for i in range(0, 128, 32)])

    assert [len(a.logits) for a in answers] == [len(b) for b in batches]
    assert all(np.array_equal(a.logits, whole[i : i + len(a.logits)]) for i, a in enumerate(answers))


def test_a_cancelled_task_cancels_its_request(
    server: subprocess.Popen, options: ServerOptions, stream: tuple
) -> None:
    """An asyncio task that is cancelled leaves no work behind, and the others are answered."""
    x = stream[0]

    async def run() -> list:
        async with AsyncClient(options.endpoint) as client:
            assert await client.ready()
            tasks = [asyncio.create_task(client.predict(x[i : i + 1])) for i in range(60)]
            await asyncio.sleep(0)  # all are sent
            for task in tasks[20:40]:
                task.cancel()
            return await asyncio.gather(*tasks, return_exceptions=True)

    answers = asyncio.run(run())

    assert all(isinstance(a, asyncio.CancelledError) for a in answers[20:40])
    assert all(a.logits.shape == (1, 10) for a in (*answers[:20], *answers[40:]))


def test_two_hundred_connections_are_served(
    server: subprocess.Popen, options: ServerOptions, stream: tuple
) -> None:
    """Two hundred clients at once each get their own image's answer."""
    x = stream[0]
    with Client(options.endpoint) as client:
        expected = client.predict(x[:32]).logits
    clients = [Raw(options.endpoint) for _ in range(200)]
    try:
        for i, client in enumerate(clients):
            client.send(predict(x[:1], i, client=f"client-{i}"), x[i % 32][None])
        for i, client in enumerate(clients):
            while True:  # the queue of this server holds 64 images: some are refused and ask again
                frames = client.socket.recv_multipart() if client.socket.poll(10_000) else None
                assert frames, f"client {i} has no answer"
                header, tensors = protocol.decode_reply(frames)
                if header["code"] == 0:
                    break
                client.send(predict(x[:1], i, client=f"client-{i}"), x[i % 32][None])
            assert np.array_equal(np.frombuffer(tensors[0], np.float32), expected[i % 32])
    finally:
        for client in clients:
            client.context.destroy(linger=0)
