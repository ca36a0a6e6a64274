"""What every peer runs: the same graph with the same onnxruntime settings. Needs onnxruntime and numpy only."""

import os

import numpy as np
import onnxruntime as ort

SHAPE = tuple(int(n) for n in os.environ["SERVING_SHAPE"].split(","))
MAX_BATCH = int(os.environ["SERVING_MAX_BATCH"])  # requests computed together
MAX_WAIT_S = float(os.environ["SERVING_MAX_WAIT_S"])
PORT = int(os.environ["SERVING_PORT"])


class Model:
    """One session; `run` takes images of several requests together."""

    def __init__(self) -> None:
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        self.session = ort.InferenceSession(os.environ["SERVING_MODEL"], options, ["CPUExecutionProvider"])

    def images(self, body: bytes) -> np.ndarray:
        """(N, H, W, C) uint8 of a request's body."""
        return np.frombuffer(body, np.uint8).reshape(-1, *SHAPE)

    def run(self, x: np.ndarray) -> np.ndarray:
        """(N, K) float32 logits; the taps are computed as well, as tta does."""
        return self.session.run(["logits", "features"], {"x": x})[0]

    def run_requests(self, bodies: list[bytes]) -> list[bytes]:
        """Logits of each request's images."""
        xs = [self.images(body) for body in bodies]
        logits = self.run(xs[0] if len(xs) == 1 else np.concatenate(xs))
        ends = np.cumsum([len(x) for x in xs])
        return [part.tobytes() for part in np.split(logits, ends[:-1])]
