"""Run the served graph, prepare another version of its weights beside it, and flip between the two.

A version is a session of its own, built from the same graph bytes with every weight replaced through
`add_external_initializers` (never `add_initializer`, which keeps serving the old weights). Building takes
8 to 200 ms and does not stall the running session.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from tta.bundle import Bundle, check_delta
from tta.devices import n_gpus
from tta.errors import BundleError, DeltaError, DeviceError
from tta.process import release_memory
from tta.versions import SOURCE, load_version

PROBE_TOLERANCE = 1e-3  # of the largest logit, as in packaging's parity check
TF32_TOLERANCE = 1e-2  # on CUDA convolutions alone differ by more
FP16_TOLERANCE = 5e-2

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Bound:
    """Outputs bound to memory of our own, for one batch size: saves 13 us of a call's 60 beside the computing."""

    io: ort.IOBinding
    logits: Array
    features: Array


@dataclass(frozen=True)
class Session:
    """One version ready to serve, with its buffers: for one thread at a time."""

    version: int
    run: ort.InferenceSession
    logits: Array  # of the largest batch; smaller ones use its first rows
    features: Array
    bound: dict[int, Bound] = field(default_factory=dict)  # by batch size


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
    """Turn "auto:N" or "cuda:N" into "cuda:N", or "auto" and "cpu" into "cpu"; without N it is the first GPU.

    Raises:
        DeviceError: "cuda" was asked for and there is no such GPU or no CUDA provider.
    """
    if device == "cpu":
        return "cpu"
    kind, _, number = device.partition(":")
    present, provided = n_gpus(), "CUDAExecutionProvider" in ort.get_available_providers()
    if int(number or 0) < present and provided:
        return f"cuda:{number or 0}"
    if kind == "auto":
        return "cpu"
    why = "no NVIDIA GPU is visible"
    if present:
        why = f"there are {present} GPUs" if provided else "onnxruntime has no CUDA provider"
    raise DeviceError(f"device: {device} was asked for, but {why}: set device: auto or cpu, or fix the driver")


def resolve_precision(precision: str, device: str) -> str:
    """fp16 where it pays: on a GPU; the CPU would convert back and forth.

    Args:
        precision: "fp32" or "fp16".
        device: as for `resolve_device`.
    """
    return "fp32" if resolve_device(device) == "cpu" else precision


class Predictor:
    """The model in service and, for instant rollback, the one before it.

    `run` belongs to one thread, `prepare` and `activate` may be called from another: the only thing they
    share is the attribute `current`, assigned once and read once a batch.

    Args:
        bundle: what to serve.
        device: see `resolve_device`.
        threads: of one inference on the CPU.
        max_batch_size: images computed together at most.
        precision: "fp32", or "fp16" for a bundle that has such a graph.
        gpu_memory_bytes: of one version's arena on a GPU; two live during a swap. None: no limit.
        signers: of versions, see `load_version`.

    Raises:
        BundleError: "fp16" was asked for and the bundle has no such graph.
        DeltaError: half precision cannot hold a weight.
        DeviceError: see `resolve_device`.
    """

    def __init__(
        self,
        bundle: Bundle,
        device: str = "auto",
        threads: int = 1,
        max_batch_size: int = 32,
        precision: str = "fp32",
        gpu_memory_bytes: int | None = None,
        signers: Mapping[str, str] | None = None,
    ) -> None:
        self.bundle = bundle
        self._signers = signers
        self.device = resolve_device(device)
        self.on_gpu = self.device != "cpu"
        self.threads = threads
        self.precision = precision
        self.gpu_memory_bytes = gpu_memory_bytes
        graph = bundle.graph if precision == "fp32" else bundle.graph_fp16
        if graph is None:
            raise BundleError(f"{bundle.path} has no fp16 graph: package with --fp16, or set precision: fp32")
        self._graph = graph
        # A new shape costs an algorithm search on CUDA, so batches are padded to a few warmed sizes there. On the
        # CPU padding would cost as much as the images it stands for.
        self.buckets = [max_batch_size]
        while self.on_gpu and self.buckets[0] > 1:
            self.buckets.insert(0, (self.buckets[0] + 1) // 2)
        # Kept, since beside a running model making them anew for every version is a millisecond that it waits.
        self.source = self._values(bundle.weights)
        self.current: Session | None = None
        self.previous: Session | None = None

    def prepare(self, folder: Path | None = None, n_probe: int | None = None) -> Session:
        """Build, verify and warm a version; nothing in service changes.

        Args:
            folder: the version's folder in the store; None for the source.
            n_probe: of its probe images to compute at most; None: all.

        Raises:
            DeltaError: the version does not verify, does not fit, or does not compute what the adapter saw.
        """
        if folder is None:
            return self.build(SOURCE, {})
        manifest, delta, probe = load_version(folder, self._signers)
        if manifest.bundle_sha256 != self.bundle.sha256:
            raise DeltaError(f"version in {folder} was made for another bundle")
        check_delta(self.bundle, delta)
        session = self.build(manifest.version, delta)
        self._check_probe(session, {name: array[:n_probe] for name, array in probe.items()}, folder)
        return session

    def find(self, version: int) -> Session | None:
        """The session of a version in service, or of the one before it."""
        live = (self.current, self.previous)
        return next((s for s in live if s is not None and s.version == version), None)

    def activate(self, session: Session) -> None:
        """Serve `session` from the next batch on and keep the present one for rollback."""
        if self.current is not None and self.current.version != session.version:
            self.previous = self.current
        self.current = session

    def release(self) -> None:
        """Drop the previous version's session and give its memory back to the system."""
        self.previous = None
        release_memory()

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
        if self.on_gpu:
            size = next((b for b in self.buckets if b >= n), n)
            if size > n:
                x = np.concatenate([x, np.zeros((size - n, *x.shape[1:]), x.dtype)])
        if len(x) > self.buckets[-1]:  # no size that comes again
            logits, features = session.run.run(["logits", "features"], {"x": x})
            return Prediction(session.version, logits, features)
        bound = session.bound.get(len(x)) or self._bind(session, len(x))
        bound.io.bind_cpu_input("x", np.ascontiguousarray(x))  # anew each time: on CUDA it is copied at once
        session.run.run_with_iobinding(bound.io)
        bound.io.clear_binding_inputs()  # else it keeps the client's message
        # Copies, since whoever answers the clients may still read them during the next batch.
        return Prediction(session.version, bound.logits[:n].copy(), bound.features[:n].copy())

    def _bind(self, session: Session, n: int) -> Bound:
        io = session.run.io_binding()
        logits, features = session.logits[:n], session.features[:n]
        for name, output in (("logits", logits), ("features", features)):
            io.bind_ortvalue_output(name, ort.OrtValue.ortvalue_from_numpy(output))
        return session.bound.setdefault(n, Bound(io, logits, features))

    def build(self, version: int, delta: Mapping[str, Array]) -> Session:
        """Build a session of the source's weights with those of `delta` in their place, and warm it.

        Raises:
            BundleError: the graph cannot be loaded, or computes nothing.
            DeltaError: half precision cannot hold a weight.
            DeviceError: onnxruntime fell back to the CPU.
        """
        run = self.open(self._graph, self.source | self._values(delta))
        manifest = self.bundle.manifest
        logits, features = (
            np.empty((self.buckets[-1], width), np.float32) for width in (manifest.n_classes, manifest.n_features)
        )
        session = Session(version, run, logits, features)
        # The CPU's first full batch takes a tenth longer if it was not warmed, but warming it costs as much as
        # building the session, beside the one that serves.
        for size in self.buckets if self.on_gpu else [1]:
            try:
                self.run_with(session, np.zeros((size, *manifest.image_shape), np.uint8))
            except Exception as error:  # such as no memory left
                raise BundleError(f"{self.bundle.path} cannot compute {size} images: {error}") from error
        return session

    def open(self, graph: bytes, weights: Mapping[str, ort.OrtValue]) -> ort.InferenceSession:
        """A session of a graph, as this predictor's threads and device are, with these for its weights.

        Raises:
            BundleError: the graph cannot be loaded.
            DeviceError: onnxruntime fell back to the CPU.
        """
        options = ort.SessionOptions()
        options.intra_op_num_threads = self.threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        # Spinning burns a core for nothing at the rates of a camera.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.add_external_initializers(list(weights), list(weights.values()))
        try:
            run = ort.InferenceSession(graph, options, providers=self._providers())
        except Exception as error:  # onnxruntime raises many types; all mean the same here
            raise BundleError(f"the graph of {self.bundle.path} cannot be loaded: {error}") from error
        if self.on_gpu and run.get_providers()[0] != "CUDAExecutionProvider":
            raise DeviceError(
                "onnxruntime fell back to the CPU: its CUDA or cuDNN libraries are missing "
                "(pip install 'onnxruntime-gpu[cuda,cudnn]'), or set device: cpu"
            )
        return run

    def _values(self, weights: Mapping[str, Array]) -> dict[str, ort.OrtValue]:
        """What stands in for the graph's weights, in the precision served; it holds on to the arrays."""
        dtype = np.float16 if self.precision == "fp16" else None
        values = {}
        for name, array in weights.items():
            if np.issubdtype(array.dtype, np.floating):
                with np.errstate(over="ignore"):
                    given = np.ascontiguousarray(array, dtype)
                if dtype is not None and not np.isfinite(given).all():
                    raise DeltaError(f"{name!r} holds values beyond half precision: set precision: fp32")
                values[name] = ort.OrtValue.ortvalue_from_numpy(given)
        return values

    def _providers(self) -> list[Any]:
        if not self.on_gpu:
            return ["CPUExecutionProvider"]
        if hasattr(ort, "preload_dlls"):
            ort.preload_dlls()
        cuda: dict[str, Any] = {
            "device_id": int(self.device.partition(":")[2]),
            # An exhaustive search costs up to a second per shape and gains nothing measurable.
            "cudnn_conv_algo_search": "HEURISTIC",
            "arena_extend_strategy": "kSameAsRequested",  # powers of two would double what two versions take
        }
        if self.gpu_memory_bytes is not None:
            cuda["gpu_mem_limit"] = self.gpu_memory_bytes
        return [("CUDAExecutionProvider", cuda), "CPUExecutionProvider"]

    def _check_probe(self, session: Session, probe: Mapping[str, Array], folder: Path) -> None:
        logits = self.run_with(session, probe["x"]).logits
        expected = probe["logits"]
        if not np.isfinite(logits).all():
            raise DeltaError(f"version in {folder} gives NaN or infinity on the probe images")
        difference = float(np.abs(logits - expected).max())
        tolerance = TF32_TOLERANCE if self.on_gpu else PROBE_TOLERANCE
        if self.precision == "fp16":
            tolerance = FP16_TOLERANCE
        limit = tolerance * max(1.0, float(np.abs(expected).max()))
        if difference > limit:
            raise DeltaError(
                f"version in {folder} differs from the adapter's logits by {difference:.2g} (limit {limit:.2g})"
            )
