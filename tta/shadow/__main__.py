"""`python -m tta.shadow BUNDLE WORKERS DEVICE PRECISION MEMORY NICE PARENT TRUST`: run versions on images.

The charts always see the source model's features through it, and the gate judges the very session that would
serve. One thread, one request at a time: `{op:"run", id, versions:[[number, folder]...], shape}` + images gives
logits and features of each version, in order.
"""

import sys
from collections import OrderedDict
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import zmq

from tta import log
from tta.bundle import load_bundle
from tta.errors import TTAError
from tta.process import become_worker
from tta.server.predictor import Predictor, Session, resolve_precision
from tta.signatures import Trust

KEPT_SESSIONS = 4
BATCH = 32


class Shadow:
    """Sessions of several versions, the least recently used dropped first; the source always stays."""

    def __init__(
        self, bundle: str, device: str, precision: str, gpu_memory_bytes: int | None, trust: Trust
    ) -> None:
        served = resolve_precision(precision, device)
        loaded = load_bundle(bundle, trust.bundle)
        self.predictor = Predictor(loaded, device, 1, BATCH, served, gpu_memory_bytes, trust.versions)
        self.source = self.predictor.prepare()
        self._sessions: OrderedDict[str, Session] = OrderedDict()

    def session(self, folder: str | None) -> Session:
        """The session of the version in `folder`, built if need be.

        Raises:
            DeltaError: the version does not verify.
        """
        if folder is None:
            return self.source
        if folder not in self._sessions:
            self._sessions[folder] = self.predictor.prepare(Path(folder))
            if len(self._sessions) > KEPT_SESSIONS:
                self._sessions.popitem(last=False)
                self.predictor.release()
        self._sessions.move_to_end(folder)
        return self._sessions[folder]

    def run(self, header: dict[str, Any], payload: bytes) -> tuple[dict[str, Any], list[bytes]]:
        """Answer one request: reply header and logits, features of each version."""
        x = np.frombuffer(payload, np.uint8).reshape(header["shape"])
        tensors = []
        for _, folder in header["versions"]:
            session = self.session(folder)
            parts = [self.predictor.run_with(session, x[i : i + BATCH]) for i in range(0, len(x), BATCH)]
            tensors.append(np.concatenate([p.logits for p in parts]).tobytes())
            tensors.append(np.concatenate([p.features for p in parts]).tobytes())
        return {"op": "ran", "id": header["id"], "n": len(x)}, tensors


def main() -> int:
    """Serve the daemon until it goes away."""
    bundle, workers, device, precision, memory, nice, parent, trust = sys.argv[1:9]
    become_worker(int(nice), int(parent))
    logger = log.setup("shadow")
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    socket = context.socket(zmq.DEALER)
    socket.setsockopt(zmq.IDENTITY, b"shadow")
    socket.connect(workers)
    try:
        shadow = Shadow(bundle, device, precision, int(memory) if memory else None, Trust.told(trust))
    except TTAError as error:
        logger.error("shadow_failed", error=str(error))
        return 2
    socket.send(msgspec.msgpack.encode({"op": "hello"}))
    while True:
        frames = socket.recv_multipart()
        header = msgspec.msgpack.decode(frames[0])
        try:
            reply, tensors = shadow.run(header, frames[1])
        except Exception as error:  # one request must not end the charts' eyes
            logger.warning("run_failed", error=str(error))
            reply, tensors = {"op": "ran", "id": header["id"], "error": str(error)}, []
        socket.send_multipart([msgspec.msgpack.encode(reply), *tensors])


if __name__ == "__main__":
    sys.exit(main())
