"""/metrics, /livez and /readyz over HTTP, in a thread of the daemon. Serves nothing that changes state."""

import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest

from tta.errors import ConfigError


class _QuietServer(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64

    def handle_error(self, request: object, client_address: object) -> None:
        """A scraper that hangs up is no event."""


class HttpServer:
    """The daemon's HTTP port.

    Args:
        address: "HOST:PORT"; port 0 takes a free one.
        registry: what /metrics shows.
        live: whether the main loop ticks.
        ready: whether predictions are being answered.

    Raises:
        ConfigError: the address is malformed or in use.
    """

    def __init__(
        self, address: str, registry: CollectorRegistry, live: Callable[[], bool], ready: Callable[[], bool]
    ) -> None:
        class Handler(BaseHTTPRequestHandler):
            timeout = 5  # seconds for a client to finish its request

            def do_GET(self) -> None:
                path = self.path.partition("?")[0]
                if path == "/metrics":
                    self._reply(200, generate_latest(registry), CONTENT_TYPE_LATEST)
                elif path in ("/livez", "/readyz"):
                    good = live() if path == "/livez" else live() and ready()
                    self._reply(200 if good else 503, b"ok\n" if good else b"not ok\n", "text/plain")
                else:
                    self._reply(404, b"try /metrics, /livez or /readyz\n", "text/plain")

            def _reply(self, status: int, body: bytes, content_type: str) -> None:
                self.send_response(status)
                self.send_header("Content-Type", content_type)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: object) -> None:
                """Scrapes are not events."""

        host, _, port = address.rpartition(":")
        try:
            self._server = _QuietServer((host or "127.0.0.1", int(port)), Handler)
        except (OSError, ValueError, OverflowError) as error:
            raise ConfigError(f"daemon.http = {address!r} cannot be bound: {error}") from error
        self.port = self._server.server_address[1]
        self._thread = threading.Thread(target=self._server.serve_forever, name="http", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop answering."""
        self._server.shutdown()
        self._server.server_close()
