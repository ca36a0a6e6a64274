"""The webhook: every event arrives at a real HTTP server, and a server that fails or hangs is nobody's problem."""

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from tests.waiting import until
from tta.config import load_config
from tta.errors import ConfigError
from tta.protocol import Pause, Resume
from tta.scenario import DaemonProcess, free_ports


class Listener:
    """An HTTP server that answers with the next of `codes`, and 200 after them; None: not at all."""

    def __init__(self) -> None:
        self.events: list[dict[str, Any]] = []
        self.codes: list[int | None] = []
        self.release = threading.Event()
        listener = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                code = listener.codes.pop(0) if listener.codes else 200
                if code is None:
                    listener.release.wait(30)
                    return
                if code == 200:
                    listener.events.append({**json.loads(body), "path": self.path})
                self.send_response(code)
                self.end_headers()

            def log_message(self, format: str, *args: object) -> None:
                """Nothing."""

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/hook?secret=abc"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def named(self) -> list[str]:
        """What has arrived."""
        return [event["event"] for event in self.events]


@pytest.fixture
def listener() -> Iterator[Listener]:
    """One that listens."""
    made = Listener()
    yield made
    made.release.set()
    made.server.shutdown()
    made.server.server_close()


def test_events_arrive(start_daemon: Callable[..., DaemonProcess], listener: Listener) -> None:
    """What the operator does arrives in order, with model, place and text, also after a listener's error."""
    daemon = start_daemon(**{"daemon.webhook": listener.url})
    listener.codes = [503]
    with daemon.client() as client:
        client.call(Pause())
        client.call(Resume())
    until(lambda: len(listener.events) == 2, "both events")
    first = listener.events[0]

    assert listener.named() == ["paused", "resumed"]
    assert first["name"] == "digits"
    assert first["path"] == "/hook?secret=abc"
    assert first["text"] == "digits: paused (sequence 0, version 0)"
    assert first["time_s"] > 1.7e9
    assert "secret" not in daemon.log_path.read_text()


def test_a_webhook_that_fails_harms_nobody(
    start_daemon: Callable[..., DaemonProcess], listener: Listener, stream: tuple
) -> None:
    """A listener that hangs, refuses or is not there is logged, not its address; the daemon answers and stops."""
    (port,) = free_ports(1)
    gone = start_daemon(**{"daemon.webhook": f"http://127.0.0.1:{port}/secret"})
    hung = start_daemon(**{"daemon.webhook": listener.url})
    listener.codes = [302, None]
    for daemon in (gone, hung):
        with daemon.client() as client:
            client.call(Pause())
            client.call(Resume())
            assert client.predict(stream[0][:2]).logits.shape == (2, 10)
            assert client.status()["paused"] is False
    until(lambda: "it answered 302" in hung.log_path.read_text(), "the refusal in the log")
    until(lambda: "URLError" in gone.log_path.read_text(), "the failure in the log", 30)

    assert [daemon.stop() for daemon in (gone, hung)] == [0, 0]
    assert "secret" not in gone.log_path.read_text()


def test_an_address_that_is_none_is_refused() -> None:
    """Only http and https are taken."""
    for bad in ("file:///etc/passwd", "ftp://host/x", "host:80"):
        with pytest.raises(ConfigError, match=r"daemon\.webhook"):
            load_config(None, {"daemon.webhook": bad})
