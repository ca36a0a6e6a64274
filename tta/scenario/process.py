"""`tta serve` as a child process on free ports."""

import json
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tta.client import Client
from tta.errors import TTAError, UnavailableError
from tta.keys import Credentials

START_S = 90.0


class DaemonProcess:
    """`tta serve` in a process of its own, on free ports.

    Args:
        bundle: to serve.
        folder: for state and log.
        settings: by dotted name.
        n_servers: with an endpoint each; `endpoint` names them all, with commas.
        credentials: of its clients, where the settings ask for keys.
        arguments: more of `tta serve`'s; `settings` and the ports win.
    """

    def __init__(
        self,
        bundle: Path,
        folder: Path,
        settings: dict[str, Any],
        n_servers: int = 1,
        credentials: Credentials | None = None,
        arguments: Sequence[str] = (),
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.log_path = folder / "daemon.log"
        http, *ports = free_ports(2 + n_servers)
        self.control, *endpoints = (f"tcp://127.0.0.1:{p}" for p in ports)
        self.endpoint = ",".join(endpoints)
        self.http = f"127.0.0.1:{http}"
        values = {
            "server.endpoint": self.endpoint,
            "daemon.control": self.control,
            "daemon.http": self.http,
            **settings,
        }
        self.argv = [sys.executable, "-m", "tta", "serve", str(bundle), "--state", str(folder / "state")]
        self.argv += arguments
        for key, value in values.items():
            self.argv += ["--set", f"{key}={json.dumps(value)}"]
        self.process: subprocess.Popen[bytes] | None = None
        self.credentials = credentials

    def start(self) -> None:
        """Start it and wait until it answers.

        Raises:
            UnavailableError: it ended or did not answer in time; the message holds its last log line.
        """
        with self.log_path.open("ab") as log:
            self.process = subprocess.Popen(self.argv, stderr=log, stdout=log, stdin=subprocess.DEVNULL)
        end = time.monotonic() + START_S
        while time.monotonic() < end and self.process.poll() is None:
            with self.client(1.0) as client:
                try:
                    if client.daemon_ready():
                        return
                except TTAError:
                    continue
        lines = self.log_path.read_text().strip().splitlines()
        self.stop()
        raise UnavailableError(f"the daemon did not start; its log ends with: {lines[-1] if lines else 'nothing'}")

    def stop(self) -> int | None:
        """SIGTERM and wait; its exit status."""
        if self.process is None:
            return None
        self.process.terminate()
        try:
            return self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return self.process.wait()

    def client(self, timeout_s: float = 10.0) -> Client:
        """A client of this daemon."""
        return Client(self.endpoint, self.control, timeout_s, credentials=self.credentials)


def free_ports(n: int) -> list[int]:
    """Ports nobody listens on now."""
    sockets = [socket.socket() for _ in range(n)]
    for s in sockets:
        s.bind(("127.0.0.1", 0))
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports
