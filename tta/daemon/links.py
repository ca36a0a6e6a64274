"""What the daemon says to the other processes, and what it does with their answers.

Every request carries a callback; nothing here waits. A request to a process that dies is sent again to its
successor once (shadow, swap) or reported as failed (adapter).
"""

import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import zmq

from tta.daemon.processes import Process

Array = npt.NDArray[Any]
VersionFolder = tuple[int, Path | None]
Outputs = list[tuple[Array, Array]]


MAX_ATTEMPTS = 2  # a request that ends the shadow twice is given up
CHUNK_BYTES = 32 << 20  # images in one message to the shadow


@dataclass
class _Job:
    frames: list[bytes]
    then: Callable[[Outputs | None], None]
    sent: float | None = None  # monotonic seconds
    attempts: int = 0


class ShadowLink:
    """Runs versions on images, off the hot path; answers come in order."""

    def __init__(self, process: Process, socket: "zmq.Socket[bytes]") -> None:
        self.process = process
        self._socket = socket
        self._jobs: OrderedDict[int, _Job] = OrderedDict()
        self._next = 1

    @property
    def waiting(self) -> int:
        """Requests without an answer yet."""
        return len(self._jobs)

    def ask(self, versions: Sequence[VersionFolder], x: Array, then: Callable[[Outputs | None], None]) -> None:
        """Run images through versions.

        Args:
            versions: number and folder of each; the folder of the source is None.
            x: (N, H, W, C) uint8.
            then: gets (logits, features) of each version in order, or None if one cannot be run.
        """
        size = max(1, CHUNK_BYTES // max(1, x[:1].nbytes))
        if len(x) > size:
            self._ask_in_parts(versions, [x[i : i + size] for i in range(0, len(x), size)], then)
            return
        header = {
            "op": "run",
            "id": self._next,
            "versions": [[v, str(f) if f else None] for v, f in versions],
            "shape": list(x.shape),
        }
        frames = [msgspec.msgpack.encode(header), np.ascontiguousarray(x).tobytes()]
        self._jobs[self._next] = _Job(frames, then)
        if self.process.ready:
            self._send(self._jobs[self._next])
        self._next += 1

    def _ask_in_parts(
        self, versions: Sequence[VersionFolder], parts: list[Array], then: Callable[[Outputs | None], None]
    ) -> None:
        results: list[Outputs | None] = []

        def collect(outputs: Outputs | None) -> None:
            results.append(outputs)
            if len(results) < len(parts):
                return
            good = [r for r in results if r is not None]
            if len(good) < len(parts):
                then(None)
                return
            then(
                [
                    (np.concatenate([logits for logits, _ in parts]), np.concatenate([f for _, f in parts]))
                    for parts in zip(*good, strict=True)
                ]
            )

        for part in parts:
            self.ask(versions, part, collect)

    def _send(self, job: _Job, counts: bool = True) -> None:
        job.sent = time.monotonic()
        job.attempts = job.attempts + 1 if counts else 1
        self._socket.send_multipart([b"shadow", *job.frames])

    def oldest_s(self, now: float) -> float:
        """Seconds the oldest request has been with the shadow; 0 without one."""
        first = next(iter(self._jobs.values()), None)
        return now - first.sent if first is not None and first.sent is not None and self.process.ready else 0.0

    def handle(self, header: dict[str, Any], tensors: list[bytes]) -> None:
        """Take a message from the shadow."""
        if header["op"] == "hello":
            self.process.ready = True
            head = next(iter(self._jobs), None)  # was being run when the process ended
            for number, job in list(self._jobs.items()):
                if number == head and job.attempts >= MAX_ATTEMPTS:
                    del self._jobs[number]
                    job.then(None)
                else:
                    self._send(job, counts=number == head)
            return
        found = self._jobs.pop(header["id"], None)
        if found is None:
            return  # answered before the last restart
        following = next(iter(self._jobs.values()), None)
        if following is not None:  # its turn has come only now
            following.sent = time.monotonic()
        if "error" in header:
            found.then(None)
            return
        arrays = [np.frombuffer(t, np.float32).reshape(header["n"], -1) for t in tensors]
        found.then(list(zip(arrays[0::2], arrays[1::2], strict=True)))


class ServerLink:
    """Swaps and health of one server.

    Attributes:
        socket: to be polled; see `listen`.
        hello: what it has said of itself; empty until then.
        last_seen: monotonic seconds of its last message; 0 before the first.
    """

    def __init__(self, process: Process, socket: "zmq.Socket[bytes]") -> None:
        self.process = process
        self.socket = socket
        self.hello: dict[str, Any] = {}
        self.last_seen = 0.0
        self._swap: tuple[dict[str, Any], Callable[[dict[str, Any]], None]] | None = None
        self._again = False
        self._attempts = 0
        self._next = 1

    @property
    def swapping(self) -> bool:
        """Whether a swap is under way."""
        return self._swap is not None

    def silent_s(self, now: float) -> float:
        """Seconds since it was last heard of; or, if that is longer, since it should have computed something."""
        return max(now - self.last_seen, float(self.hello.get("stalled_s", 0.0)))

    def say_hello(self) -> None:
        """Ask whether it is there; the answer arrives in `handle`. Also repeats a swap it had no time for."""
        self._send({"op": "hello"})
        if self._again and self._swap is not None:
            self._again = False
            self._send(self._swap[0])

    def swap(self, version: int, folder: Path | None, then: Callable[[dict[str, Any]], None]) -> None:
        """Serve a version; `then` gets prepare_s and flip_s, or error. One at a time: see `swapping`."""
        assert self._swap is None, "a swap is under way"
        command = {
            "op": "swap",
            "id": self._next,
            "version": version,
            "folder": str(folder) if folder else None,
        }
        self._next += 1
        self._swap, self._attempts = (command, then), 0
        self._send(command)

    def handle(self, reply: dict[str, Any], now: float) -> None:
        """Take a message from the server."""
        if reply["op"] == "hello":
            if self.process.pid not in (None, reply["pid"]):
                return  # of the server that ours is about to replace
            self.last_seen = now
            restarted = self.hello and self.hello["epoch"] != reply["epoch"]
            self.hello = reply
            self.process.ready = True
            if restarted and self._swap is not None:
                self._attempts += 1
                if self._attempts >= MAX_ATTEMPTS:
                    then, self._swap = self._swap[1], None
                    then({"op": "swap", "error": "the server died preparing it"})
                else:
                    self._send(self._swap[0])
            return
        self.last_seen = now
        if reply["op"] == "swap" and self._swap is not None and reply["id"] == self._swap[0]["id"]:
            if reply.get("error") == "another version is being prepared":
                self._again = True  # on the next beat
                return
            if "error" not in reply:
                self.hello["version"] = reply["version"]
            then, self._swap = self._swap[1], None
            then(reply)

    def listen(self, timeout_s: float) -> None:
        """Take the messages that are there or come within so long."""
        while self.socket.poll(int(1000 * timeout_s)):
            self.handle(msgspec.msgpack.decode(self.socket.recv()), time.monotonic())

    def close(self) -> None:
        """Hear nothing more."""
        self.socket.close()

    def give_up(self) -> None:
        """Wait no longer for a swap: whoever asked gets {"gone": True}."""
        if self._swap is not None:
            then, self._swap = self._swap[1], None
            then({"op": "swap", "gone": True})

    def release(self) -> None:
        """Let it drop the version before the present one."""
        self._send({"op": "release"})

    def drain(self) -> None:
        """Ask it to finish and exit."""
        self._send({"op": "drain"})

    def _send(self, message: dict[str, Any]) -> None:
        try:
            self.socket.send(msgspec.msgpack.encode(message), zmq.NOBLOCK)
        except zmq.Again:  # not connected: the next hello finds out
            return


class AdapterLink:
    """One adaptation at a time; the process is started on demand and killed to cancel."""

    def __init__(self, process: Process, socket: "zmq.Socket[bytes]") -> None:
        self.process = process
        self.progress: dict[str, Any] = {}
        self.idle_since: float | None = None
        self._socket = socket
        self._job: tuple[int, Path, Callable[[dict[str, Any]], None]] | None = None
        self._since = 0.0
        self._next = 1

    @property
    def busy(self) -> bool:
        """Whether an adaptation is under way."""
        return self._job is not None

    def start(self) -> None:
        """Start the process unless it runs; its imports take seconds."""
        self.idle_since = None
        if not self.process.alive:
            self.process.start()

    def submit(self, folder: Path, then: Callable[[dict[str, Any]], None]) -> None:
        """Adapt by the request in `folder`; `then` gets the candidate's header or {"error"}."""
        self._job, self._since = (self._next, folder, then), time.monotonic()
        self._next += 1
        self.start()
        if self.process.ready:
            self._send_job()

    def cancel(self) -> None:
        """Give up the adaptation under way."""
        self._job, self.progress = None, {}
        self.process.stop(0.0)

    def handle(self, header: dict[str, Any], now: float) -> None:
        """Take a message from the adapter."""
        if header["op"] == "hello":
            self.process.ready = True
            self.idle_since = now
            if self._job is not None:
                self._send_job()
        elif self._job is None or header["id"] != self._job[0]:
            if header["op"] == "failed" and header["id"] == 0:  # it could not even load the model
                self._finish(header)
        elif header["op"] == "progress":
            self.progress = {k: header[k] for k in ("stage", "done", "total")}
        elif header["op"] in ("candidate", "failed"):
            self.idle_since = now
            self._finish(header)

    def busy_s(self, now: float) -> float:
        """Seconds the present adaptation has taken; 0 without one."""
        return now - self._since if self._job is not None else 0.0

    def died(self) -> None:
        """The process ended: whatever it was doing has failed."""
        self._finish({"op": "failed", "error": "the adapter process died"})

    def _send_job(self) -> None:
        assert self._job is not None
        number, folder, _ = self._job
        self._socket.send_multipart(
            [b"adapter", msgspec.msgpack.encode({"op": "adapt", "id": number, "folder": str(folder)})]
        )

    def _finish(self, header: dict[str, Any]) -> None:
        if self._job is None:
            return
        then = self._job[2]
        self._job, self.progress = None, {}
        then(header)
