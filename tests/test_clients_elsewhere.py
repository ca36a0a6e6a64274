"""Clients in other languages: the protocol document is what the code does, and the JavaScript client works."""

import importlib.util
import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import zmq

from tests.rebundle import rebundle
from tta import protocol
from tta.bundle import Bundle
from tta.keys import Credentials, read_key_pair, write_key_pair
from tta.packaging.digits import digits
from tta.scenario import DaemonProcess

CLIENTS = Path(__file__).parents[1] / "deploy" / "clients"
SCRIPT = """
import { readFileSync } from "node:fs";
import { Client, TTAError } from "./tta.mjs";
const { endpoint, control, keys, timeoutS, shape, labels } = JSON.parse(process.argv[2]);
const client = new Client({ endpoint, control, keys, timeoutS });
const found = {};
const failing = async (name, call) => {
  try { await call(); found[name] = "no error"; } catch (error) { found[name] = [error.code, error.message]; }
};
if (shape) {
  const images = readFileSync("images");
  const answer = await client.predict(images, shape, { key: "javascript" });
  found.logits = answer.logits.map((row) => Array.from(row));
  found.classes = answer.classes;
  found.version = answer.version;
  found.ids = answer.predictionIds;
  const one = images.length / shape[0];
  const many = Array.from({ length: 40 }, (_, i) =>
    client.predict(images.subarray(one * (i % shape[0]), one * (i % shape[0] + 1)), [1, ...shape.slice(1)]));
  found.many = (await Promise.all(many)).map((each) => each.classes[0]);
  found.outcomes = await client.label(answer.predictionIds, labels);
  found.name = (await client.metadata()).name;
  found.state = (await client.call("status")).state;
  await failing("shape", () => client.predict(images, [shape[0], 3, 3, 3]));
  await failing("label", () => client.label(answer.predictionIds, labels.map(() => 99)));
} else {
  await failing("silence", () => client.predict(new Uint8Array(12), [1, 2, 2, 3]));
}
client.close();
console.log(JSON.stringify(found));
"""


@pytest.fixture(scope="module")
def writer() -> ModuleType:
    """The script that writes the document."""
    spec = importlib.util.spec_from_file_location("make_protocol", CLIENTS / "make_protocol.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_document_is_what_the_code_does(writer: ModuleType) -> None:
    """Rules and examples are those the code gives now: `python deploy/clients/make_protocol.py` writes them."""
    assert json.loads((CLIENTS / "vectors.json").read_text()) == writer.vectors()
    assert (CLIENTS / "README.md").read_text() == writer.document()


def test_the_examples_decode_to_what_they_say() -> None:
    """Each example's frames are a request that the daemon takes or a reply that a client reads."""
    vectors = json.loads((CLIENTS / "vectors.json").read_text())
    decoders: dict[str, Callable[[list[bytes]], Any]] = {
        "data": protocol.decode_data,
        "control": protocol.decode_control,
    }

    assert len(vectors) > 10
    for vector in vectors:
        frames = [bytes.fromhex(frame) for frame in vector["frames"]]
        if vector["sender"] == "client":
            request = decoders[vector["socket"]](frames)
            assert request.id == vector["header"]["id"]
            assert protocol.encode(request)[0] == frames[0]
        else:
            assert protocol.decode_reply(frames)[0] == vector["header"]


def test_replies_say_what_the_document_says(
    start_daemon: Callable[..., DaemonProcess], bundle: Bundle, tmp_path: Path
) -> None:
    """Every operation's reply from a live daemon has all fields of the document and no others."""
    daemon = start_daemon(mode="propose", **{"daemon.bundles": str(tmp_path)})
    other = rebundle(bundle.path, tmp_path / "other.tta", name="other")
    x, y = digits("stream", 64, seed=5)
    with daemon.client() as client:
        first = client.predict(x).prediction_id
        labels = {"prediction_ids": list(range(first, first + 64)), "labels": y.tolist()}
        on_data: list[tuple[protocol.Request, tuple[np.ndarray, ...]]] = [
            (protocol.Predict(id=1, dtype="uint8", shape=list(x.shape)), (x,)),
            (protocol.Predict(id=2, dtype="uint8", shape=list(x.shape), top_k=2), (x,)),
            *((request(id=3), ()) for request in (protocol.Cancel, protocol.Metadata, protocol.Ready)),
        ]
        on_control = [
            protocol.Label(**labels),
            *(request() for request in (protocol.Metadata, protocol.Ready, protocol.Status, protocol.Versions)),
            *(request() for request in (protocol.Adapt, protocol.Pause, protocol.Resume, protocol.Reset)),
            *(protocol.Ask(), protocol.Ask(images=True), protocol.Erase(everything=True)),
            protocol.Deploy(bundle=str(other)),
        ]
        replies = [(request, answer_to(daemon.endpoint, request, tensors)) for request, tensors in on_data]
        replies += [(request, answer_to(daemon.control, request)) for request in on_control]

    seen: dict[str, list[set[str]]] = {}
    for request, reply in replies:
        assert reply["code"] == 0, (request, reply)
        seen.setdefault(str(request.__struct_config__.tag), []).append(set(reply) - {"v", "id", "code"})
    for operation, found in seen.items():
        fields = protocol.REPLIES[operation]
        assert set.union(*found) == {name.removesuffix("?") for name in fields}, operation
        assert {name for name in fields if "?" not in name} <= set.intersection(*found), operation
    assert set(protocol.REPLIES) - set(seen) == {"rollback", "approve", "accept"}  # they need a cure, or a shift


def answer_to(endpoint: str, request: protocol.Request, tensors: tuple[np.ndarray, ...] = ()) -> dict[str, Any]:
    """The header of the reply to a request."""
    context = zmq.Context()
    socket = context.socket(zmq.DEALER)
    socket.connect(endpoint)
    try:
        socket.send_multipart(protocol.encode(request, *tensors))
        assert socket.poll(30_000), f"no answer to {request}"
        return protocol.decode_reply(socket.recv_multipart())[0]
    finally:
        context.destroy(linger=0)


def test_the_javascript_client_is_short() -> None:
    """It can be read, and written again in another language, in one sitting."""
    assert len((CLIENTS / "javascript" / "tta.mjs").read_text().splitlines()) < 150


@pytest.fixture(scope="module")
def javascript(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The client with its two packages, installed."""
    if shutil.which("node") is None or shutil.which("npm") is None:
        pytest.skip("no node")
    folder = tmp_path_factory.mktemp("javascript") / "client"
    shutil.copytree(CLIENTS / "javascript", folder, ignore=shutil.ignore_patterns("node_modules"))
    command = ["npm", "install", "--no-audit", "--no-fund", "--no-package-lock"]
    try:
        subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=90, check=True)
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:  # no network, as a rule
        pytest.skip(f"npm cannot install its packages: {(error.stderr or '')[-200:]}")
    (folder / "check.mjs").write_text(SCRIPT)
    return folder


def run(folder: Path, **told: Any) -> dict[str, Any]:
    """What the script finds."""
    done = subprocess.run(
        ["node", "check.mjs", json.dumps(told)], cwd=folder, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("with_keys", [False, True])
def test_javascript_predicts_and_labels(
    start_daemon: Callable[..., DaemonProcess],
    javascript: Path,
    bundle_path: Path,
    tmp_path: Path,
    with_keys: bool,
) -> None:
    """Over a real daemon, with and without keys, it gets Python's answers, labels them, and errors with codes."""
    x, y = digits("stream", 6, seed=5)
    keys = None
    if with_keys:
        for name in ("daemon", "app"):
            write_key_pair(tmp_path, name)
        own, server = (read_key_pair(tmp_path / f"{name}.key_secret") for name in ("app", "daemon"))
        keys = {
            "public": own.public.decode(),
            "secret": own.secret.decode(),
            "server": server.public.decode(),
        }
        (tmp_path / "clients.yaml").write_text(f"app: {{key: '{own.public.decode()}', roles: [predict, label]}}")
        settings = {
            "security.key": str(tmp_path / "daemon.key_secret"),
            "security.clients": str(tmp_path / "clients.yaml"),
        }
        daemon = start_daemon(
            credentials=Credentials.read(tmp_path / "app.key_secret", server.public.decode()), **settings
        )
    else:
        daemon = start_daemon()
    (javascript / "images").write_bytes(x.tobytes())
    told = {"endpoint": daemon.endpoint, "control": daemon.control, "keys": keys, "timeoutS": 20}
    found = run(javascript, shape=list(x.shape), labels=y.tolist(), **told)
    with daemon.client() as client:
        expected = client.predict(x)

    np.testing.assert_allclose(found["logits"], expected.logits, atol=1e-4)
    assert found["classes"] == expected.classes.tolist()
    assert found["many"] == [found["classes"][i % 6] for i in range(40)]
    assert found["ids"] == list(range(found["ids"][0], found["ids"][0] + 6))
    assert found["outcomes"] == ["joined"] * 6
    assert (found["name"], found["version"]) == ("digits", 0)
    assert found["state"] in ("stable", "drifted")  # six pictures over and over may well be a shift
    assert found["shape"][0] == found["label"][0] == 3
    assert "expected shape" in found["shape"][1]


def test_javascript_does_not_wait_for_ever(javascript: Path) -> None:
    """Where nobody answers it raises an error with a code within its timeout."""
    nobody = "tcp://127.0.0.1:9"
    code, message = run(javascript, endpoint=nobody, control=nobody, timeoutS=0.5)["silence"]

    assert code == 4
    assert "no answer" in message


@pytest.fixture(scope="module")
def cpp(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The C++ example, compiled with every warning an error."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++")
    program = tmp_path_factory.mktemp("cpp") / "classify"
    flags = ["-std=c++17", "-Wall", "-Wextra", "-Werror", "-DMSGPACK_NO_BOOST"]
    command = [compiler, *flags, str(CLIENTS / "cpp" / "classify.cpp"), "-lzmq", "-o", str(program)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    if "No such file or directory" in done.stderr or "cannot find -lzmq" in done.stderr:
        pytest.skip("no cppzmq or msgpack-cxx")
    assert done.returncode == 0, done.stderr
    return program


def test_cpp_predicts_and_labels(start_daemon: Callable[..., DaemonProcess], cpp: Path) -> None:
    """Over a real daemon it gets Python's answers and labels them; a bad request is an error with its code."""
    daemon = start_daemon()
    x, y = digits("stream", 6, seed=5)

    def classify(*numbers: int) -> subprocess.CompletedProcess[bytes]:
        argv = [str(cpp), daemon.endpoint, daemon.control, *map(str, numbers)]
        return subprocess.run(argv, input=x.tobytes(), capture_output=True, timeout=60)

    with daemon.client() as client:
        expected = client.predict(x).classes.tolist()
    done = classify(*x.shape[1:], *y.tolist())
    assert done.returncode == 0, done.stderr
    rows = [line.split() for line in done.stdout.decode().splitlines()]
    assert [int(row[2]) for row in rows] == expected
    assert [(row[1], row[3]) for row in rows] == [("0", "joined")] * 6
    refused = classify(9, 9, 3, *y.tolist())
    assert refused.returncode == 1
    assert b"expected shape (N, 32, 32, 3)" in refused.stderr
    assert b"(code 3)" in refused.stderr


def test_the_cpp_client_is_short() -> None:
    """It can be read in one sitting too."""
    assert len((CLIENTS / "cpp" / "tta.hpp").read_text().splitlines()) < 160
