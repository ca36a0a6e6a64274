"""One server process on real sockets: hostile frames, limits, signals."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import msgspec
import numpy as np
import pytest
import zmq

from tests.server.conftest import answering, launch
from tests.server.test_predictor import write_version
from tests.slices import needs_slices, slice_ns
from tta import protocol
from tta.bundle import Bundle
from tta.client import Client
from tta.errors import Code, DeadlineError, InputError, OverloadedError
from tta.process import LONG_SLICE_NS, SHORT_SLICE_NS
from tta.server.__main__ import BUILDER_NICE
from tta.server.options import ServerOptions
from tta.server.predictor import Predictor


def exchange(endpoint: str, frames: list[bytes]) -> dict:
    """Send raw frames and read one reply's header."""
    with zmq.Context() as context, context.socket(zmq.DEALER) as socket:
        socket.setsockopt(zmq.LINGER, 0)
        socket.connect(endpoint)
        socket.send_multipart(frames)
        assert socket.poll(10_000), "no reply"
        return msgspec.msgpack.decode(socket.recv_multipart()[0])


def commanded(options: ServerOptions, commands: list[dict]) -> list[dict]:
    """What the server answers to the daemon's commands, each sent when the one before was answered."""
    replies = []
    with zmq.Context() as context, context.socket(zmq.DEALER) as daemon:
        daemon.setsockopt(zmq.LINGER, 0)
        daemon.connect(options.admin)
        for command in commands:
            daemon.send(msgspec.msgpack.encode(command))
            assert daemon.poll(20_000), f"{command} was not answered"
            replies.append(msgspec.msgpack.decode(daemon.recv()))
    return replies


def test_bad_frames_are_answered_with_a_code_and_harm_nobody(
    server: subprocess.Popen, options: ServerOptions, stream: tuple
) -> None:
    """Malformed frames, another version, a wrong shape or dtype each get INVALID_ARGUMENT and serving goes on."""
    good = {"v": 1, "op": "predict", "id": 5, "dtype": "uint8", "shape": [1, 32, 32, 3]}
    payload = bytes(32 * 32 * 3)
    encode = msgspec.msgpack.encode
    for frames in (
        [b"\xc1 garbage"],
        [b""],
        [encode(good)],
        [encode(good), payload[:-1]],
        [encode(good), payload, b"more"],
        [encode({**good, "v": 2}), payload],
        [encode({**good, "dtype": "float32"}), payload],
        [encode({**good, "shape": [1, 3, 32, 32]}), payload],
        [encode({**good, "shape": [1 << 40, 32, 32, 3]}), payload],
        [encode({**good, "op": "destroy"}), payload],
        # An int64 product of these is 0, as long as an empty payload; and a time stamp of the year 10000.
        [encode({**good, "shape": [1 << 63, 32, 32, 3]}), b""],
        [encode({**good, "shape": [1 << 60, 32, 32, 3]}), b""],
        [bytes.fromhex("83a17601a26f70a57265616479a26964c70cff000000000000003afff44180")],
        [encode({**good, "id": "x" * 1000}), payload],
        [b"\xdd\x00\x04\x00\x00" + b"\x80" * (1 << 18), payload],
    ):
        reply = exchange(options.endpoint, frames)
        assert reply["code"] == Code.INVALID_ARGUMENT, frames[0][:40]
        assert reply["error"]

    with Client(options.endpoint) as client:
        assert client.predict(stream[0][:3]).logits.shape == (3, 10)


def test_replies_carry_the_rows_of_their_request(
    server: subprocess.Popen, options: ServerOptions, stream: tuple
) -> None:
    """Requests of mixed sizes in flight together each get their own images' logits and consecutive ids."""
    x = stream[0]
    with Client(options.endpoint) as client:
        alone = client.predict(x[:16]).logits
        sizes = [1, 3, 7, 2, 1, 5]
        ids, start = {}, 0
        for size in sizes:
            ids[client.submit(x[start : start + size])] = (start, size)
            start += size
            if start > 11:
                start = 0
        seen = []
        while len(seen) < len(sizes):
            for request, answer in client.results(5.0):
                first, size = ids[request]
                expected = np.concatenate([alone])[first : first + size]
                assert np.array_equal(answer.logits[: len(expected)], expected)
                seen += [answer]
    taken = sorted(i for a in seen for i in a.prediction_ids)
    assert len(set(taken)) == sum(sizes)


def test_more_than_the_queue_holds_is_refused_at_once(
    server: subprocess.Popen, options: ServerOptions, stream: tuple
) -> None:
    """Requests beyond the queue's images are refused with a hint when to retry; the others are answered."""
    with Client(options.endpoint, window=10_000, retry=False) as client:
        sent = {client.submit(stream[0][:60]) for _ in range(20)}
        answers: dict = {}
        while len(answers) < 20:
            got = dict(client.results(10.0))
            assert got, "a request was not answered"
            answers |= got
    refused = [a for a in answers.values() if isinstance(a, OverloadedError)]

    assert set(answers) == sent
    assert refused
    assert all(a.retry_after_s is not None for a in refused)
    assert len(refused) < 20


def test_a_request_that_never_fits_is_not_called_overload(
    server: subprocess.Popen, options: ServerOptions, stream: tuple
) -> None:
    """More images than the queue can ever hold are the client's mistake, not a reason to retry."""
    with Client(options.endpoint) as client, pytest.raises(InputError, match="at most 64"):
        client.predict(stream[0][:65])


def test_a_large_request_is_of_one_version_and_in_order(
    server: subprocess.Popen, options: ServerOptions, stream: tuple
) -> None:
    """A request of several batches' size is answered whole, its rows as if sent alone."""
    with Client(options.endpoint) as client:
        whole = client.predict(stream[0][:50])
        assert np.array_equal(whole.logits[40:], client.predict(stream[0][40:50]).logits)


def test_two_clients_of_one_identity_do_not_end_the_server(
    server: subprocess.Popen, options: ServerOptions, stream: tuple
) -> None:
    """A second client with the same ZeroMQ identity is ignored, the first is served on (libzmq aborted)."""
    ready = protocol.encode(protocol.Ready(id=1))
    with zmq.Context() as context:
        first, second = context.socket(zmq.DEALER), context.socket(zmq.DEALER)
        for socket in (first, second):
            socket.setsockopt(zmq.LINGER, 0)
            socket.setsockopt(zmq.IDENTITY, b"same")
            socket.connect(options.endpoint)
            socket.send_multipart(ready)
        assert first.poll(5000)
        first.send_multipart(ready)
        assert first.poll(5000)
        second.close()
        first.close()
    with Client(options.endpoint) as client:
        assert client.predict(stream[0][:1]).version == 0
    assert server.poll() is None


def test_a_deadline_in_the_past_is_not_computed(
    server: subprocess.Popen, options: ServerOptions, stream: tuple
) -> None:
    """A request whose deadline has passed is answered with DEADLINE_EXCEEDED."""
    with Client(options.endpoint) as client, pytest.raises(DeadlineError):
        client.predict(stream[0][:1], deadline_s=-1.0)


def test_sigterm_finishes_what_was_admitted(
    server: subprocess.Popen, options: ServerOptions, stream: tuple
) -> None:
    """After SIGTERM every admitted request is answered and the exit status is 0."""
    with Client(options.endpoint, retry=False) as client:
        requests = {client.submit(stream[0][i : i + 1]) for i in range(50)}
        first = next(iter(client.results(5.0)))
        server.send_signal(signal.SIGTERM)
        answered = {first[0]}
        while len(answered) < 50:
            got = list(client.results(5.0))
            assert got, f"{50 - len(answered)} requests unanswered"
            answered |= {request for request, _ in got}

    assert answered == requests
    assert server.wait(10) == 0


def test_a_server_outlives_whoever_reads_its_log(options: ServerOptions, tmp_path: Path) -> None:
    """With the other end of its standard error closed, it still drains and exits with status 0."""
    path = tmp_path / "server.json"
    path.write_bytes(msgspec.json.encode(options))
    argv = [sys.executable, "-m", "tta.server", str(path)]
    with subprocess.Popen(argv, stderr=subprocess.PIPE) as process:
        assert process.stderr is not None
        assert b"server_ready" in process.stderr.readline()
        process.stderr.close()
        process.terminate()

        assert process.wait(30) == 0


def test_a_swap_may_follow_the_answer_to_the_last(server: subprocess.Popen, options: ServerOptions) -> None:
    """Commands sent as soon as the last was answered are all carried out."""
    replies = commanded(options, [{"op": "swap", "id": i, "version": 0, "folder": None} for i in range(8)])

    assert [r["id"] for r in replies] == list(range(8))
    assert not any("error" in r for r in replies)


def test_two_versions_live_at_a_time_while_a_third_is_built_one(
    options: ServerOptions, bundle: Bundle, stream: tuple, tmp_path: Path
) -> None:
    """Whenever a version is built, the only other session in memory is the one that serves."""
    x = stream[0][:4]
    source = Predictor(bundle, "cpu")
    logits = source.run_with(source.prepare(), x).logits
    folders = {n: write_version(tmp_path / f"v{n}", bundle, {}, x, logits, n) for n in (1, 2, 3)}
    counted = tmp_path / "counted"
    program = f"""
import gc, sys
import onnxruntime as ort
from tta.server import __main__ as server
from tta.server.predictor import Predictor
build = Predictor.build
def counting(self, *arguments):
    with open({str(counted)!r}, "a") as file:
        print(sum(isinstance(thing, ort.InferenceSession) for thing in gc.get_objects()), file=file)
    return build(self, *arguments)
Predictor.build = counting
sys.exit(server.main())
"""
    swaps = [{"op": "swap", "id": 0, "version": n, "folder": str(folders[n])} for n in (1, 2, 3, 1, 2)]
    with answering(options, tmp_path, ("-c", program)):
        replies = commanded(options, swaps)

    assert not any("error" in r for r in replies)
    assert counted.read_text().split() == ["0", *5 * ["1"]]


@needs_slices
def test_requests_are_read_while_the_model_computes_and_versions_built_when_nobody_waits(
    options: ServerOptions, tmp_path: Path
) -> None:
    """Whoever reads goes first, the model takes turns with others, and the builder gives way to everybody."""
    with answering(msgspec.structs.replace(options, threads=1), tmp_path) as server:
        commanded(options, [{"op": "swap", "id": 0, "version": 0, "folder": None}])
        threads = {int(p.name): p for p in Path(f"/proc/{server.pid}/task").iterdir()}
        slices = {thread: slice_ns(thread) for thread in sorted(threads)}
        builders = [thread for thread, ns in slices.items() if ns == LONG_SLICE_NS]
        niceness = [os.getpriority(os.PRIO_PROCESS, thread) for thread in builders]
        policies = [os.sched_getscheduler(thread) for thread in builders]
        readers = [t for t, p in threads.items() if (p / "comm").read_text().startswith("ZMQbg/IO")]

    assert slices[server.pid] == SHORT_SLICE_NS
    assert readers
    assert {slices[t] for t in readers} == {SHORT_SLICE_NS}
    assert list(slices.values())[-2:] == [slice_ns(0), LONG_SLICE_NS]  # the inference thread, and the builder
    assert niceness == [max(BUILDER_NICE, os.nice(0))]
    assert policies == [os.SCHED_BATCH]


def test_a_port_in_use_is_a_clear_error(server: subprocess.Popen, options: ServerOptions, tmp_path: Path) -> None:
    """A second server on the same port ends with status 2 and names the endpoint."""
    other = tmp_path / "other"
    other.mkdir()
    second = launch(msgspec.structs.replace(options, admin=f"ipc://{other}/admin.ipc"), other)

    assert second.wait(60) == 2
    assert options.endpoint in json.loads((other / "server.log").read_text().splitlines()[-1])["endpoint"]


def test_a_client_that_does_not_read_is_counted_and_hurts_nobody(
    server: subprocess.Popen, options: ServerOptions, stream: tuple
) -> None:
    """While one client sends and never reads, another is answered."""
    with zmq.Context() as context, context.socket(zmq.DEALER) as deaf:
        deaf.setsockopt(zmq.LINGER, 0)
        deaf.setsockopt(zmq.RCVHWM, 1)
        deaf.connect(options.endpoint)
        frames = protocol.encode(protocol.Predict(id=1, dtype="uint8", shape=[1, 32, 32, 3]), stream[0][:1])
        for _ in range(300):
            deaf.send_multipart(frames)
        with Client(options.endpoint) as client:
            assert client.predict(stream[0][:1]).logits.shape == (1, 10)


def test_replies_wait_for_a_client_that_is_slow_to_read(options: ServerOptions, tmp_path: Path) -> None:
    """Of 5,000 questions asked before the first answer is read, far more than a socket holds, all are answered."""
    other = tmp_path / "slow"
    other.mkdir()
    endpoint = f"ipc://{other}/data.ipc"
    server = launch(msgspec.structs.replace(options, endpoint=endpoint, admin=f"ipc://{other}/admin.ipc"), other)
    try:
        with (
            zmq.Context() as context,
            context.socket(zmq.DEALER) as slow,
            Client(endpoint, timeout_s=60) as client,
        ):
            slow.setsockopt(zmq.LINGER, 0)
            slow.setsockopt(zmq.RCVHWM, 1)
            slow.setsockopt(zmq.SNDHWM, 0)
            slow.connect(endpoint)
            for i in range(5000):
                slow.send_multipart(protocol.encode(protocol.Metadata(id=i)))
            for _ in range(20):
                assert client.ready()
            answered = []
            while len(answered) < 5000:
                assert slow.poll(20_000), f"{len(answered)} answers"
                answered.append(protocol.decode_reply(slow.recv_multipart())[0]["id"])
    finally:
        server.terminate()
        server.wait(30)

    assert answered == list(range(5000))


def test_the_observation_queue_never_blocks_predictions(
    server: subprocess.Popen, options: ServerOptions, stream: tuple
) -> None:
    """With nobody taking observations, predictions go on."""
    with Client(options.endpoint) as client:
        for _ in range(40):
            assert client.predict(stream[0][:8]).version == 0


def test_the_server_needs_no_torch(server: subprocess.Popen) -> None:
    """The hot process has not loaded torch."""
    maps = Path(f"/proc/{server.pid}/maps").read_text()

    assert "onnxruntime" in maps
    assert "libtorch" not in maps
