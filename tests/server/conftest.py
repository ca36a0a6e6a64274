"""A server process of its own, without a daemon."""

import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import msgspec
import pytest

from tta.client import Client
from tta.config import ServerConfig
from tta.scenario import free_ports
from tta.server.options import ServerOptions


@pytest.fixture
def options(bundle_path: Path, tmp_path: Path) -> ServerOptions:
    """A server that holds at most 64 images."""
    settings = ServerConfig(
        endpoint=f"tcp://127.0.0.1:{free_ports(1)[0]}",
        max_batch_size=16,
        max_wait_s=0.0,
        queue_images=64,
        queue_s=60.0,
        max_message_bytes=1 << 20,
        observation_queue=8,
        drain_s=5.0,
    )
    return ServerOptions(
        bundle=str(bundle_path),
        version_folder=None,
        admin=f"ipc://{tmp_path}/admin.ipc",
        observe=f"ipc://{tmp_path}/observe.ipc",
        device="cpu",
        **settings.model_dump(),
    )


def launch(
    options: ServerOptions, folder: Path, program: Sequence[str] = ("-m", "tta.server")
) -> subprocess.Popen:
    """Start a server process."""
    path = folder / "server.json"
    path.write_bytes(msgspec.json.encode(options))
    with (folder / "server.log").open("wb") as log:
        return subprocess.Popen([sys.executable, *program, str(path)], stderr=log)


@contextmanager
def answering(
    options: ServerOptions, folder: Path, program: Sequence[str] = ("-m", "tta.server")
) -> Iterator[subprocess.Popen]:
    """A server process that answers, until the block ends."""
    process = launch(options, folder, program)
    try:
        with Client(options.endpoint, timeout_s=30) as client:
            assert client.ready()
        yield process
    finally:
        process.kill()
        process.wait()


@pytest.fixture
def server(options: ServerOptions, tmp_path: Path) -> Iterator[subprocess.Popen]:
    """The same, answering."""
    with answering(options, tmp_path) as process:
        yield process
