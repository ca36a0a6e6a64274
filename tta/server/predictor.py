"""Run the served graph, prepare another version of its weights beside it, and flip between the two.

A version is a session of its own, built from the same graph bytes with every weight replaced through
`add_external_initializers` (never `add_initializer`, which keeps serving the old weights). Building takes
8 to 200 ms and does not stall the running session.
"""

import ctypes
import glob
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from tta.bundle import Bundle, check_delta
from tta.errors import BundleError, DeltaError, DeviceError
from tta.versions import SOURCE, load_version

PROBE_TOLERANCE = 1e-3  # of the largest logit, as in packaging's parity check

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Session:
    """One version ready to serve; immutable, safe to share between threads."""

    version: int
    run: ort.InferenceSession


@dataclass(frozen=True)
class Prediction:
    """What one batch gave.

    Attributes:
        version: the one version that computed every row.
        logits: (N, K) float32.
        features: (N, D) float32, whitened, all blocks side by side.
    """

    version: int
    logits: Array
    features: Array


def resolve_device(device: str) -> str:
    """Turn "auto" into "cuda" or "cpu".

    Raises:
        DeviceError: "cuda" was asked for and there is no GPU or no CUDA provider.
    """
    if device == "cpu":
        return "cpu"
    present = bool(glob.glob("/dev/nvidia[0-9]*") or glob.glob("/dev/dxg"))
    usable = present and "CUDAExecutionProvider" in ort.get_available_providers()
    if device == "cuda" and not usable:
        why = "onnxruntime has no CUDA provider" if present else "no NVIDIA GPU is visible"
        raise DeviceError(f"device: cuda was asked for, but {why}: set device: auto or cpu, or fix the driver")
    return "cuda" if usable else "cpu"


class Predictor:
    """The model in service and, for instant rollback, the one before it.

    `run` belongs to one thread, `prepare` and `activate` may be called from another: the only thing they
    share is the attribute `current`, assigned once and read once a batch.
    """

    def __init__(self, bundle: Bundle, device: str = "auto", threads: int = 1, max_batch_size: int = 32) -> None:
        self.bundle = bundle
        self.device = resolve_device(device)
        self.threads = threads
        # A new shape costs an algorithm search on CUDA, so batches are padded to a few warmed sizes there.
        self.buckets = [max_batch_size]
        while self.device == "cuda" and self.buckets[0] > 1:
            self.buckets.insert(0, (self.buckets[0] + 1) // 2)
        self.current: Session | None = None
        self.previous: Session | None = None

    def prepare(self, folder: Path | None = None) -> Session:
        """Build, verify and warm a version; nothing in service changes.

        Args:
            folder: the version's folder in the store; None for the source.

        Raises:
            DeltaError: the version does not verify, does not fit, or does not compute what the adapter saw.
        """
        if folder is None:
            return self._build(SOURCE, {})
        manifest, delta, probe = load_version(folder)
        if manifest.bundle_sha256 != self.bundle.sha256:
            raise DeltaError(f"version in {folder} was made for another bundle")
        check_delta(self.bundle, delta)
        session = self._build(manifest.version, delta)
        self._check_probe(session, probe, folder)
        return session

    def activate(self, session: Session) -> None:
        """Serve `session` from the next batch on and keep the present one for rollback."""
        if self.current is not None and self.current.version != session.version:
            self.previous = self.current
        self.current = session

    def release(self, previous: bool = True) -> None:
        """Drop the previous version's session and give its memory back to the system."""
        if previous:
            self.previous = None
        try:
            ctypes.CDLL("libc.so.6").malloc_trim(0)
        except (OSError, AttributeError):  # not glibc: the allocator does what it does
            return

    def run(self, x: Array) -> Prediction:
        """Predict with the version in service, `max_batch_size` images at a time.

        Args:
            x: (N, H, W, C) uint8, any N.
        """
        session = self.current  # read once: one version computes every row
        if session is None:
            raise DeltaError("no version is active")
        size = self.buckets[-1]
        if len(x) <= size:
            return self.run_with(session, x)
        parts = [self.run_with(session, x[i : i + size]) for i in range(0, len(x), size)]
        return Prediction(
            session.version,
            np.concatenate([p.logits for p in parts]),
            np.concatenate([p.features for p in parts]),
        )

    def run_with(self, session: Session, x: Array) -> Prediction:
        """Predict one batch with a given session; see `run`."""
        n = len(x)
        if self.device == "cuda":
            size = next((b for b in self.buckets if b >= n), n)
            if size > n:
                x = np.concatenate([x, np.zeros((size - n, *x.shape[1:]), x.dtype)])
        logits, features = session.run.run(["logits", "features"], {"x": x})
        return Prediction(session.version, logits[:n], features[:n])

    def _build(self, version: int, delta: Mapping[str, Array]) -> Session:
        options = ort.SessionOptions()
        options.intra_op_num_threads = self.threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        # Spinning burns a core for nothing at the rates of a camera.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        names, values = [], []
        for name, array in {**self.bundle.weights, **delta}.items():
            if np.issubdtype(array.dtype, np.floating):
                names.append(name)
                values.append(ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array)))
        options.add_external_initializers(names, values)
        providers: list[Any] = ["CPUExecutionProvider"]
        if self.device == "cuda":
            if hasattr(ort, "preload_dlls"):
                ort.preload_dlls()
            # An exhaustive search costs up to a second per shape and gains nothing measurable.
            providers.insert(0, ("CUDAExecutionProvider", {"cudnn_conv_algo_search": "HEURISTIC"}))
        try:
            session = ort.InferenceSession(self.bundle.graph, options, providers=providers)
        except Exception as error:  # onnxruntime raises many types; all mean the same here
            raise BundleError(f"the graph of {self.bundle.path} cannot be loaded: {error}") from error
        if self.device == "cuda" and session.get_providers()[0] != "CUDAExecutionProvider":
            raise DeviceError(
                "onnxruntime fell back to the CPU: its CUDA or cuDNN libraries are missing "
                "(pip install 'onnxruntime-gpu[cuda,cudnn]'), or set device: cpu"
            )
        built = Session(version, session)
        for size in {1, *self.buckets}:
            self.run_with(built, np.zeros((size, *self.bundle.manifest.image_shape), np.uint8))
        return built

    def _check_probe(self, session: Session, probe: Mapping[str, Array], folder: Path) -> None:
        logits = self.run_with(session, probe["x"]).logits
        expected = probe["logits"]
        if not np.isfinite(logits).all():
            raise DeltaError(f"version in {folder} gives NaN or infinity on the probe images")
        difference = float(np.abs(logits - expected).max())
        # On CUDA, TF32 convolutions alone differ by more than on the CPU.
        tolerance = PROBE_TOLERANCE * (10 if self.device == "cuda" else 1)
        limit = tolerance * max(1.0, float(np.abs(expected).max()))
        if difference > limit:
            raise DeltaError(
                f"version in {folder} differs from the adapter's logits by {difference:.2g} (limit {limit:.2g})"
            )
