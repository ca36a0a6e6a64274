"""Start each server as its users would, on one core, and stop it with everything it has started."""

import base64
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from bench.cifar import CACHE
from bench.serving.http import Http
from bench.serving.models import SHAPES, model_files
from tta.config import ServerConfig
from tta.keys import Credentials, read_public_key, write_key_pair
from tta.process import memory_bytes
from tta.scenario import free_ports
from tta.scenario.load import Load, Transport, Wire, drive
from tta.server.options import ServerOptions

HERE = Path(__file__).parent
START_S = 180.0
MAX_BATCH_IMAGES = 32
MAX_WAIT_S = 0.001  # of the peers; tta does not wait

Batches = Sequence[npt.NDArray[np.uint8]]


@dataclass(frozen=True)
class Peer:
    """A server that is not ours.

    Attributes:
        requirements: of its own environment.
        argv: after the environment's Python.
        path: to POST to.
        raw: takes the images' bytes as the body; else base64 in JSON.
    """

    requirements: tuple[str, ...]
    argv: tuple[str, ...]
    path: str
    raw: bool = True


ORT = ("onnxruntime==1.31.1", "numpy")
PEERS = {
    "mosec": Peer(("mosec==0.9.8", *ORT), ("mosec_server.py",), "/inference"),
    "LitServe": Peer(("litserve==0.2.19", *ORT), ("litserve_server.py",), "/predict"),
    "BentoML": Peer(
        ("bentoml==1.4.40", *ORT), ("-m", "bentoml", "serve", "bentoml_server:Classify"), "/predict", raw=False
    ),
    "Ray Serve": Peer(("ray[serve]==2.60.0", *ORT), ("ray_server.py",), "/"),
    "TorchServe": Peer(
        ("torchserve==0.12.0", "torch", "psutil", "pyyaml", "setuptools<81", *ORT),
        ("torchserve_server.py",),
        "/predictions/model",
    ),
    "PyTriton": Peer(("nvidia-pytriton==0.7.0", *ORT), ("pytriton_server.py",), "/v2/models/model/infer"),
}


def environment(name: str) -> Path:
    """The Python of a peer's own environment, made once (`bench/.cache/peers`)."""
    folder = CACHE / "peers" / name.lower().replace(" ", "-")
    python = folder / "bin" / "python"
    if not (folder / "ready").exists():
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        subprocess.run([python, "-m", "pip", "install", "-q", *PEERS[name].requirements], check=True)
        (folder / "ready").touch()
    return python


@dataclass
class Running:
    """A server that answers.

    Attributes:
        process: the first of its processes.
        connect: makes a transport for batches.
        endpoint: of tta's server.
        admin: where tta's server takes the daemon's commands.
        credentials: what a client shows, where tta's server asks for keys.
    """

    process: subprocess.Popen[bytes]
    connect: Callable[[Batches, Load], Transport]
    endpoint: str = ""
    admin: str = ""
    credentials: Credentials | None = None

    def cpu_s(self) -> float:
        """CPU seconds of all its processes so far."""
        return sum(_cpu_s(pid) for pid in _group(self.process.pid))

    def rss_bytes(self) -> int:
        """Memory of all its processes."""
        return sum(memory_bytes(pid) for pid in _group(self.process.pid))


@contextmanager
def serving(
    name: str, model: str, n_images: int, core: int | None, keys: bool = False, **options: Any
) -> Iterator[Running]:
    """Run a server while the block lasts.

    Args:
        name: "tta" or one of `PEERS`.
        model: of `SHAPES`.
        n_images: a request.
        core: it may use; None: all.
        keys: whether tta's server asks for keys, so that the connection is encrypted.
        options: others of tta's server; see `ServerOptions`.

    Raises:
        RuntimeError: it does not answer in time; the message holds the end of its log.
    """
    with tempfile.TemporaryDirectory() as folder:
        if name == "tta":
            running = _start_tta(model, n_images, core, Path(folder), keys, options)
        else:
            running = _start_peer(name, model, n_images, core, Path(folder))
        try:
            yield running
        finally:
            for pid in _group(running.process.pid):
                _kill(pid, signal.SIGKILL)
            running.process.wait()


def _start_tta(
    model: str, n_images: int, core: int | None, folder: Path, keys: bool, others: dict[str, Any]
) -> Running:
    bundle, _ = model_files(model)
    endpoint = f"tcp://127.0.0.1:{free_ports(1)[0]}"
    settings = ServerConfig(
        endpoint=endpoint,
        threads=1,
        max_batch_size=MAX_BATCH_IMAGES,
        input_sample_rate=0.0,
        drain_s=1.0,
    )
    options = ServerOptions(
        bundle=str(bundle.resolve()),
        version_folder=None,
        admin=f"ipc://{folder}/admin.ipc",
        observe=f"ipc://{folder}/observe.ipc",
        device="cpu",
        **settings.model_dump(),
    )
    options = msgspec.structs.replace(options, **others)
    credentials = None
    if keys:
        (public, secret), (_, own) = (write_key_pair(folder, who) for who in ("daemon", "client"))
        clients = folder / "clients.yaml"
        clients.write_text(f"client: {{key: '{read_public_key(own).decode()}', roles: [predict]}}\n")
        options = msgspec.structs.replace(options, key=str(secret), clients=str(clients))
        credentials = Credentials.read(own, public)
    path = folder / "server.json"
    path.write_bytes(msgspec.json.encode(options))
    process = _popen([sys.executable, "-m", "tta.server", str(path)], core, folder, {}, None)

    def connect(batches: Batches, load: Load) -> Transport:
        return Wire([endpoint], batches, load, credentials)

    running = Running(process, connect, endpoint, options.admin, credentials)
    return _await(running, model, n_images, folder)


def _start_peer(name: str, model: str, n_images: int, core: int | None, folder: Path) -> Running:
    peer, port = PEERS[name], free_ports(1)[0]
    _, graph = model_files(model)
    python = environment(name)
    settings = {
        "SERVING_MODEL": str(graph.resolve()),
        "SERVING_SHAPE": ",".join(map(str, SHAPES[model])),
        "SERVING_IMAGES": str(n_images),
        "SERVING_MAX_BATCH": str(max(1, MAX_BATCH_IMAGES // n_images)),
        "SERVING_MAX_WAIT_S": str(MAX_WAIT_S),
        "SERVING_PORT": str(port),
        "SERVING_FOLDER": str(folder),
    }
    argv = [str(python), *peer.argv]
    if name == "BentoML":
        argv += ["--port", str(port), "--host", "127.0.0.1"]
    if name == "PyTriton":  # else its stub links another libpython and dies
        settings["LD_LIBRARY_PATH"] = str(Path(os.path.realpath(python)).parents[1] / "lib")
    process = _popen(argv, core, folder, settings, HERE / "peers")

    def connect(batches: Batches, load: Load) -> Transport:
        bodies = [_body(name, np.ascontiguousarray(b)) for b in batches]
        headers = [f"Content-Type: application/{'octet-stream' if peer.raw else 'json'}"]
        if name == "PyTriton":
            headers += [f"Inference-Header-Content-Length: {len(_triton_header(batches[0]))}"]
        return Http(port, peer.path, bodies, headers)

    return _await(Running(process, connect), model, n_images, folder)


def _body(name: str, x: npt.NDArray[np.uint8]) -> bytes:
    if name == "BentoML":
        return json.dumps({"bodies": [base64.b64encode(x.tobytes()).decode()]}).encode()
    return (_triton_header(x) if name == "PyTriton" else b"") + x.tobytes()


def _triton_header(x: npt.NDArray[np.uint8]) -> bytes:
    """KServe v2: a JSON head, then the tensor's bytes."""
    tensor = {
        "name": "x",
        "shape": list(x.shape),
        "datatype": "UINT8",
        "parameters": {"binary_data_size": x.nbytes},
    }
    output = {"name": "logits", "parameters": {"binary_data": True}}
    return json.dumps({"inputs": [tensor], "outputs": [output]}).encode()


def _popen(
    argv: list[str], core: int | None, folder: Path, settings: dict[str, str], cwd: Path | None
) -> "subprocess.Popen[bytes]":
    with (folder / "log").open("wb") as log:
        return subprocess.Popen(
            [*(() if core is None else ("taskset", "-c", str(core))), *argv],
            cwd=cwd,
            env={**os.environ, "OMP_NUM_THREADS": "1", "BENTOML_DO_NOT_TRACK": "True", **settings},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )


def _await(running: Running, model: str, n_images: int, folder: Path) -> Running:
    """Wait for the first right answer."""
    x = [np.zeros((n_images, *SHAPES[model]), np.uint8)]
    load = Load(outstanding=1, duration_s=0.1, warmup_s=0.0, timeout_s=5.0)
    end = time.monotonic() + START_S
    while time.monotonic() < end and running.process.poll() is None:
        try:
            if drive(running.connect(x, load), [n_images], load).latencies_s:
                return running
        except OSError:
            time.sleep(0.2)
    for pid in _group(running.process.pid):
        _kill(pid, signal.SIGKILL)
    raise RuntimeError(f"no answer: {(folder / 'log').read_text(errors='replace')[-1500:]}")


def _group(session: int) -> list[int]:
    """Every process of a session, and those that have left it but descend from it."""
    parents: dict[int, int] = {}
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            fields = _stat(int(entry.name))
            if fields:
                parents[int(entry.name)] = int(fields[1])
                if int(fields[3]) == session:
                    found.append(int(entry.name))
    queue = list(found)
    while queue:
        pid = queue.pop()
        children = [p for p, parent in parents.items() if parent == pid and p not in found]
        found += children
        queue += children
    return found


def _stat(pid: int) -> list[str]:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def _cpu_s(pid: int) -> float:
    fields = _stat(pid)
    ticks: Any = os.sysconf("SC_CLK_TCK")
    return sum(int(f) for f in fields[11:13]) / ticks if fields else 0.0


def _kill(pid: int, signum: int) -> None:
    try:
        os.kill(pid, signum)
    except ProcessLookupError:
        return
