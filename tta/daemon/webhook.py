"""Tell another program what happens: every event of the cycle, posted as JSON, in a thread of the daemon.

An event that cannot be delivered is tried again and then given up: nothing here waits for, or fails with, whoever
listens. The address may hold a secret, so it is never logged.
"""

import queue
import threading
import urllib.error
import urllib.request
from collections.abc import Callable
from http.client import HTTPException
from typing import Any

import msgspec

from tta.daemon.processes import Logger

WAITING = 256  # events; beyond, the newest are dropped
ATTEMPTS = 4
AGAIN_S = (0.5, 2.0, 8.0)  # seconds before each further attempt
TIMEOUT_S = 5.0
TOO_MANY = 429
CLOSE_S = 2.0


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A POST that is sent elsewhere would arrive there as a GET, without the event."""

    def redirect_request(self, *_: Any, **__: Any) -> None:
        """Not followed: it is an error of its code."""


class Webhook:
    """Posts events to an address.

    Args:
        url: http or https.
        name: of the model, told with each event.
        log: told when an event is given up.
        count: told "delivered", "failed" or "dropped", for each event.
    """

    def __init__(self, url: str, name: str, log: Logger, count: Callable[[str], None]) -> None:
        self._url, self._name, self._log, self._count = url, name, log, count
        self._events: queue.Queue[dict[str, Any]] = queue.Queue(WAITING)
        self._closing = threading.Event()
        self._opener = urllib.request.build_opener(_NoRedirect)
        self._thread = threading.Thread(target=self._run, name="webhook", daemon=True)
        self._thread.start()

    def tell(self, event: dict[str, Any]) -> None:
        """Post an event soon; at once dropped and counted where too many wait."""
        try:
            self._events.put_nowait(event)
        except queue.Full:
            self._count("dropped")

    def close(self) -> None:
        """Give what waits two seconds."""
        self._closing.set()
        self._thread.join(CLOSE_S)

    def _run(self) -> None:
        while not (self._closing.is_set() and self._events.empty()):
            try:
                event = self._events.get(timeout=0.2)
            except queue.Empty:
                continue
            problem = self._post(event)
            self._count("failed" if problem else "delivered")
            if problem:
                self._log.warning("webhook_failed", of=event.get("event"), error=problem)

    def _post(self, event: dict[str, Any]) -> str:
        """Why an event could not be delivered; "" if it was."""
        shown = {k: v for k, v in event.items() if isinstance(v, str | int | float) and v != ""}
        said = ", ".join(f"{k} {v}" for k, v in shown.items() if k not in ("event", "time_s"))
        text = f"{self._name}: {event.get('event')} ({said})"  # what chat programs show
        body = msgspec.json.encode({"name": self._name, "text": text, **event}, enc_hook=str)
        headers = {"Content-Type": "application/json", "User-Agent": "tta"}
        problem = ""
        for attempt in range(ATTEMPTS):
            if attempt and self._closing.wait(AGAIN_S[attempt - 1]):
                break
            try:
                request = urllib.request.Request(self._url, body, headers)  # config takes http and https only
                with self._opener.open(request, timeout=TIMEOUT_S):
                    return ""
            except urllib.error.HTTPError as error:
                problem = f"it answered {error.code}"
                if error.code < 500 and error.code != TOO_MANY:
                    break
            except (OSError, HTTPException, ValueError) as error:
                reason = f": {error.reason}" if isinstance(error, urllib.error.URLError) else ""
                problem = type(error).__name__ + reason
        return problem
