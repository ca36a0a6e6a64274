"""A server process of its own, without a daemon."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from tta.client import Client
from tta.scenario import free_ports
from tta.server.options import ServerOptions


@pytest.fixture
def options(bundle_path: Path, tmp_path: Path) -> ServerOptions:
    """A server that holds at most 64 images."""
    return ServerOptions(
        bundle=str(bundle_path),
        version_folder=None,
        endpoint=f"tcp://127.0.0.1:{free_ports(1)[0]}",
        admin=f"ipc://{tmp_path}/admin.ipc",
        observe=f"ipc://{tmp_path}/observe.ipc",
        device="cpu",
        threads=1,
        max_batch_size=16,
        max_wait_s=0.0,
        queue_images=64,
        queue_s=60.0,
        max_message_bytes=1 << 20,
        input_sample_rate=1.0,
        observation_queue=8,
        drain_s=5.0,
    )


def launch(options: ServerOptions, folder: Path) -> subprocess.Popen:
    """Start a server process."""
    path = folder / "server.json"
    path.write_bytes(msgspec.json.encode(options))
    with (folder / "server.log").open("wb") as log:
        return subprocess.Popen([sys.executable, "-m", "tta.server", str(path)], stderr=log)


@pytest.fixture
def server(options: ServerOptions, tmp_path: Path) -> Iterator[subprocess.Popen]:
    """The same, answering."""
    process = launch(options, tmp_path)
    with Client(options.endpoint, timeout_s=30) as client:
        assert client.ready()
    yield process
    process.kill()
    process.wait()
