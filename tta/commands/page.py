"""The page of `tta ask --page`: a picture, its classes, a key for each; labels go to the daemon with their ids.

One process, one person, one loopback address. The page's address holds a secret, so that no other page in the
browser can label anything.
"""

import base64
import io
import secrets
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files
from typing import Any

import msgspec
from PIL import Image

from tta.client import Client, Question
from tta.commands.output import print_json
from tta.errors import ConfigError, TTAError
from tta.protocol import MAX_ASKED_IMAGES, Metadata

MAX_BODY_BYTES = 1 << 16
STATUS = {3: 400, 5: 404, 7: 403, 8: 429, 14: 503, 16: 401}  # wire code to HTTP's; others are 500


class Answer(msgspec.Struct, forbid_unknown_fields=True):
    """What the page sends for one picture.

    Attributes:
        prediction_id: in decimal digits: a browser's numbers end at 2^53.
        label: class index; None with `correct`.
        correct: whether the prediction is right, where no class is named.
    """

    prediction_id: str
    label: int | None = None
    correct: bool | None = None


def serve_page(client: Client, n: int, port: int, as_json: bool) -> None:
    """Serve the page until interrupted.

    Args:
        client: of the daemon.
        n: pictures to ask for at a time.
        port: of 127.0.0.1; 0 takes a free one.
        as_json: tell the address as JSON.

    Raises:
        ConfigError: the port is taken.
        TTAError: the daemon does not answer.
    """
    known = client.call(Metadata())
    token = secrets.token_urlsafe(16)
    page = _Page(client, n, known["name"], known["classes"])
    try:
        server = ThreadingHTTPServer(("127.0.0.1", port), _handler(page, f"/{token}/"))
    except OSError as error:
        raise ConfigError(f"--port {port} cannot be bound: {error}") from error
    url = f"http://127.0.0.1:{server.server_address[1]}/{token}/"
    if as_json:
        print_json({"url": url})
    else:
        print(f"{url}\nlabels go to {known['name']}; end with Ctrl-C", flush=True)
    with server:
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print("" if as_json else f"\n{page.sent} labels sent")


class _Page:
    """What the page asks for."""

    def __init__(self, client: Client, n: int, name: str, classes: list[str]) -> None:
        self.client, self.n, self.name, self.classes = client, n, name, classes
        self.sent = 0
        self.lock = threading.Lock()  # a client is one thread's at a time; a browser opens several connections

    def html(self) -> bytes:
        return files("tta.commands").joinpath("page.html").read_bytes()

    def questions(self, skipped: int) -> dict[str, Any]:
        """The next pictures, besides so many that were skipped, and what is going on."""
        n = min(self.n + skipped, MAX_ASKED_IMAGES)
        status = self.client.status()
        shift = status["shift"]
        return {
            "name": self.name,
            "classes": self.classes,
            "questions": [_shown(q) for q in self.client.ask(n, images=True)],
            "state": status["state"],
            "labels": shift["labels"] if shift else None,
            "labels_wanted": shift["labels_wanted"] if shift else None,
            "sent": self.sent,
        }

    def label(self, body: bytes) -> dict[str, Any]:
        """Pass a label on."""
        answer = msgspec.json.decode(body, type=Answer)
        number = int(answer.prediction_id)
        if answer.label is not None:
            outcome = self.client.label([number], [answer.label])[0]
        else:
            outcome = self.client.label([number], correct=[bool(answer.correct)])[0]
        self.sent += outcome in ("joined", "no_input", "contested")
        return {"outcome": outcome, "sent": self.sent}


def _shown(question: Question) -> dict[str, Any]:
    x = question.image
    assert x is not None
    picture = io.BytesIO()
    Image.fromarray(x[..., 0] if x.shape[-1] == 1 else x).save(picture, "PNG")
    return {
        "prediction_id": str(question.prediction_id),
        "predicted": question.predicted,
        "uncertainty": question.uncertainty,
        "picture": "data:image/png;base64," + base64.b64encode(picture.getvalue()).decode(),
    }


def _handler(page: _Page, root: str) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        timeout = 5  # seconds for a browser to finish its request

        def do_GET(self) -> None:
            if self.path == root:
                self._reply(200, page.html(), "text/html; charset=utf-8")
            elif self.path.startswith(root + "questions"):
                skipped = self.path.partition("skipped=")[2]
                self._call(lambda: page.questions(int(skipped or 0)))
            else:
                self._reply(404, b"open the address that tta ask --page has printed\n", "text/plain")

        def do_POST(self) -> None:
            size = self.headers.get("Content-Length", "")
            if self.path != root + "labels":
                self._reply(404, b"not here\n", "text/plain")
            elif not size.isdigit() or int(size) > MAX_BODY_BYTES:
                self._reply(413, b"a label is smaller\n", "text/plain")
            else:
                body = self.rfile.read(int(size))
                self._call(lambda: page.label(body))

        def _call(self, what: Callable[[], dict[str, Any]]) -> None:
            try:
                with page.lock:
                    status, found = 200, what()
            except TTAError as error:
                status, found = STATUS.get(int(error.code), 500), {"error": str(error)}
            except (msgspec.MsgspecError, ValueError) as error:
                status, found = 400, {"error": f"not a label: {error}"}
            self._reply(status, msgspec.json.encode(found), "application/json")

        def _reply(self, status: int, body: bytes, content_type: str) -> None:
            self.send_response(status)
            self.send_header("Content-Type", content_type)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Cache-Control", "no-store")
            self.send_header("Referrer-Policy", "no-referrer")  # the address is a secret
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            """Clicks are not events."""

    return Handler
