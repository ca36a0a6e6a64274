"""A real client in a thread: sends images and labels, and keeps its own book of what was acknowledged."""

import threading
from typing import Any

import numpy as np

from tta.client import Client, Prediction
from tta.errors import TTAError
from tta.scenario import DaemonProcess

RATE = 100.0
LABEL_EVERY = 4


class Traffic(threading.Thread):
    """Send images at a steady rate, label every fourth answer (or none, for 0), until `stop`.

    Args:
        feedback: instead of naming the class, only say whether the answer was right.

    Attributes:
        acknowledged: prediction ids whose label the daemon called joined.
        versions: every version that answered.
        answered: number of answers.
        refused: errors by name.
    """

    def __init__(
        self,
        daemon: DaemonProcess,
        x: np.ndarray,
        y: np.ndarray,
        label_every: int = LABEL_EVERY,
        feedback: bool = False,
    ) -> None:
        super().__init__(daemon=True)
        self._feedback = feedback
        self.label_every = label_every
        self.acknowledged: set[int] = set()
        self.versions: set[int] = set()
        self.answered = 0
        self.refused: dict[str, int] = {}
        self.failure: BaseException | None = None
        self._target = daemon
        self._images: tuple[np.ndarray, np.ndarray] = (x, y)
        self._done = threading.Event()

    def show(self, x: np.ndarray, y: np.ndarray) -> None:
        """Send these from now on."""
        self._images = (x, y)

    def run(self) -> None:
        """The thread."""
        try:
            with Client(self._target.endpoint, self._target.control, timeout_s=2.0) as client:
                self._send(client)
        except BaseException as error:
            self.failure = error
            raise

    def _send(self, client: Client) -> None:
        pending: dict[int | str, int] = {}
        to_label: list[tuple[int, int, int]] = []
        sent = 0
        while not self._done.wait(1 / RATE):
            x, y = self._images
            index = sent % len(x)
            pending[client.submit(x[index])] = int(y[index])
            sent += 1
            for request, answer in client.results():
                label = pending.pop(request)
                if isinstance(answer, Prediction):
                    self.answered += 1
                    self.versions.add(answer.version)
                    if self.label_every and self.answered % self.label_every == 0:
                        to_label.append((answer.prediction_id, label, int(answer.classes[0])))
                else:
                    name = type(answer).__name__
                    self.refused[name] = self.refused.get(name, 0) + 1
            if len(to_label) >= 8:
                self._label(client, to_label)
                to_label = []

    def _label(self, client: Client, rows: list[tuple[int, int, int]]) -> None:
        ids = [i for i, _, _ in rows]
        try:
            if self._feedback:
                outcomes = client.label(ids, correct=[label == answer for _, label, answer in rows])
            else:
                outcomes = client.label(ids, [label for _, label, _ in rows])
        except TTAError:  # the daemon is away: nothing was acknowledged
            return
        self.acknowledged |= {i for i, outcome in zip(ids, outcomes, strict=True) if outcome == "joined"}

    def stop(self) -> None:
        """End it."""
        self._done.set()
        self.join(10)


def status(daemon: DaemonProcess) -> dict[str, Any]:
    """The daemon's status; empty while it does not answer."""
    with Client(daemon.endpoint, daemon.control, timeout_s=1.0) as client:
        try:
            return client.status()
        except TTAError:
            return {}
