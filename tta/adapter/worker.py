"""`python -m tta.adapter.worker BUNDLE WORKERS DEVICE NICE PARENT THREADS SHARE TRUST`: the adapter.

The daemon writes a request folder (`request.json`, `arrays.safetensors`) and names it; the adapter writes the
candidate beside it (`delta`, `probe`) and reports. Cancelling is killing it.
"""

import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
import zmq
from safetensors.numpy import load_file, save
from torch.optim.optimizer import register_optimizer_step_post_hook

from tta import log
from tta.adapter.methods import Anatomy
from tta.adapter.pace import Pace
from tta.adapter.patient import Patient, State
from tta.adapter.race import Race, Result, Settings
from tta.adapter.rehearsal import Memory, rehearse
from tta.adapter.relief import Relief, relieve
from tta.adapter.starts import LABEL_FREE, REHEARSED, starts_of
from tta.adapter.surgery import delta_of
from tta.adapter.views import Labels
from tta.bundle import Bundle, load_bundle
from tta.errors import AdaptationError, DeviceError, TTAError
from tta.packaging.blocks import classifier_name
from tta.packaging.source import build_model
from tta.process import become_worker
from tta.signatures import Trust
from tta.versions import hash_of, load_version

N_PROBE = 16
STEPS_SHARE = 0.7  # of a rehearsal's time; the rest is for the statistics of each regime


def resolve_device(device: str) -> str:
    """Turn "auto" into "cuda" or "cpu".

    Raises:
        DeviceError: "cuda" was asked for and torch sees none.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise DeviceError("device: cuda was asked for, but torch sees no GPU: set device: auto or cpu")
    return "cuda" if device != "cpu" and torch.cuda.is_available() else "cpu"


class Surgeon:
    """Loads the source once and answers adaptation requests."""

    def __init__(self, bundle: Bundle, device: str, signers: Mapping[str, str] | None = None) -> None:
        self.bundle = bundle
        self._signers = signers
        m = bundle.manifest
        model = build_model(m.source, m.kwargs)
        self.source: State = {n: torch.from_numpy(np.array(w)) for n, w in bundle.weights.items()}
        model.load_state_dict(self.source, strict=False)
        self.patient = Patient(model, classifier_name(model), m.mean, m.std, resolve_device(device))
        self.source = self.patient.state()
        self.anatomy = Anatomy(
            {b.name: tuple(b.tensors) for b in m.blocks}, {b.name: b.tap for b in m.blocks}, self.patient.head
        )

    def operate(self, folder: Path, progress: Any) -> dict[str, Any]:
        """Carry out one request; the result lies in `folder` when this returns.

        Returns:
            What was done, and `sha256` of each file of the result, by its path in the folder.

        Raises:
            AdaptationError: no candidate could be made.
        """
        self._written: dict[str, str] = {}
        return {**self._operate(folder, progress), "sha256": self._written}

    def _operate(self, folder: Path, progress: Any) -> dict[str, Any]:
        request = json.loads((folder / "request.json").read_text())
        arrays = load_file(folder / "arrays.safetensors")
        if request["task"] == "rehearse":
            return self._rehearse(folder, request, arrays, progress)
        patient, began = self.patient, time.monotonic()
        window = patient.images(arrays["x_window"]) if "x_window" in arrays else None
        remembered = {}
        for name, version_folder in request["starts"].items():
            _, delta, _ = load_version(Path(version_folder), self._signers)
            changed = {n: torch.from_numpy(np.array(a)) for n, a in delta.items()}
            remembered[name] = {**self.source, **changed}
        rehearsed = load_file(request["rehearsed"]) if request["rehearsed"] else {}
        learned = {n: torch.from_numpy(a).to(patient.device) for n, a in rehearsed.items()}
        starts = starts_of(patient, self.source, self.anatomy, window, learned, remembered, progress)
        settings = msgspec.convert(request["settings"], Settings)
        labels = self._labels(arrays)

        def in_time(stage: str, done: int, of: int) -> None:
            settings.check_time(began)
            progress(stage, done, of)

        def relief(feedback: Labels | None, name: str) -> Relief:
            assert window is not None
            made = relieve(patient, starts, self.anatomy, window, feedback, request["relief"], settings, in_time)
            self._write(folder / name, Result(made.state, made.block, made.start))
            return made

        if request["task"] == "relieve":
            if window is None:
                raise AdaptationError("neither labels nor images to work with")
            made = relief(labels, "candidate")
            return {"block": made.block, "start": made.start, "information": made.information}
        if labels is None:
            raise AdaptationError("no labels to fit")
        suited = request["suited"]
        race = Race(patient, starts, self.anatomy, labels, window, suited, settings, progress, began)
        result = race.run()
        if not delta_of(result.state, self.source):
            raise AdaptationError("nothing was better than the source model itself")
        self._write(folder / "candidate", result)
        reply: dict[str, Any] = {"block": result.block, "start": result.start, "report": result.report}
        if window is not None and any(name in starts for name in LABEL_FREE):
            # What the labels have made stands, whatever becomes of the candidate made without them.
            try:
                made = relief(None, "label-free")
                reply["label_free"] = {"block": made.block, "start": made.start}
            except (AdaptationError, torch.OutOfMemoryError) as error:
                reply["label_free_error"] = str(error)
        return reply

    def _labels(self, arrays: dict[str, Any]) -> Labels | None:
        if "y_fit" not in arrays:
            return None
        names = ("y_fit", "wrong_fit", "named_fit")
        y, wrong, named = (torch.from_numpy(arrays[name]).to(self.patient.device) for name in names)
        return Labels(self.patient.images(arrays["x_fit"]), y, wrong, named)

    def _rehearse(
        self, folder: Path, request: dict[str, Any], arrays: dict[str, Any], progress: Any
    ) -> dict[str, Any]:
        """Tune scales and shifts for all regimes, and give each a candidate with its own statistics."""
        patient, settings = self.patient, msgspec.convert(request["settings"], Settings)
        memories = {}
        for name, path in request["memories"].items():
            images = load_file(path)["x"]
            none = np.zeros((0, *images.shape[1:]), np.uint8)
            x, y = arrays.get(f"x_{name}", none), arrays.get(f"y_{name}", np.zeros(0, np.int64))
            memories[name] = Memory(images, x, y)
        patient.load(self.source)
        began = time.monotonic()
        learned = rehearse(
            patient,
            memories,
            settings.augment,
            settings.batch_size,
            settings.budget_s * STEPS_SHARE,
            settings.seed,
            progress,
        )
        self._save(folder, "rehearsed", {n: t.cpu().numpy() for n, t in learned.items()})
        for name, memory in memories.items():
            patient.load({**self.source, **learned})
            if patient.has_batch_norm():
                patient.estimate_normalisation(patient.images(np.concatenate([memory.images, memory.x])))
            self._write(folder / f"candidate-{name}", Result(patient.state(), "", REHEARSED))
        return {"seconds": round(time.monotonic() - began, 3)}

    def _write(self, folder: Path, result: Result) -> None:
        folder.mkdir()
        delta = delta_of(result.state, self.source)
        in_graph = {t for tensors in self.anatomy.tensors.values() for t in tensors}
        self._save(folder, "delta", {n: a for n, a in delta.items() if n in in_graph})
        anchor = self.bundle.anchor["x"]
        x = np.ascontiguousarray(anchor[:N_PROBE])
        self.patient.load(result.state)
        logits = self.patient.logits(self.patient.images(x)).cpu().numpy()
        self._save(folder, "probe", {"x": x, "logits": logits})

    def _save(self, folder: Path, name: str, arrays: dict[str, Any]) -> None:
        data = save({n: np.ascontiguousarray(a) for n, a in arrays.items()})
        (folder / f"{name}.safetensors").write_bytes(data)
        self._written[f"{folder.name}/{name}"] = hash_of(data)


def main() -> int:
    """Serve the daemon until it goes away or kills us."""
    bundle, workers, device, nice, parent, threads, share, told = sys.argv[1:9]
    trust = Trust.told(told)
    become_worker(int(nice), int(parent))
    torch.set_num_threads(int(threads))
    logger = log.setup("adapter")
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    socket = context.socket(zmq.DEALER)
    socket.setsockopt(zmq.IDENTITY, b"adapter")
    socket.connect(workers)

    def tell(message: dict[str, Any]) -> None:
        socket.send(msgspec.msgpack.encode(message))

    try:
        surgeon = Surgeon(load_bundle(bundle, trust.bundle), device, trust.versions)
    except TTAError as error:
        logger.error("adapter_failed", error=str(error))
        tell({"op": "failed", "id": 0, "error": str(error)})
        context.destroy(linger=1000)
        return 2
    on_gpu = surgeon.patient.device.type == "cuda"
    pace = Pace(float(share), torch.cuda.synchronize if on_gpu else lambda: None)
    register_optimizer_step_post_hook(pace.step)
    tell({"op": "hello", "device": str(surgeon.patient.device)})
    while True:
        command = msgspec.msgpack.decode(socket.recv())
        job = command["id"]
        pace.begin()
        try:
            reply = surgeon.operate(
                Path(command["folder"]),
                lambda stage, done, total, job=job: tell(
                    {"op": "progress", "id": job, "stage": stage, "done": done, "total": total}
                ),
            )
            if failure := reply.pop("label_free_error", ""):
                logger.warning("label_free_failed", error=failure)
            tell({"op": "candidate", "id": job, **reply})
        except TTAError as error:
            logger.warning("adaptation_failed", error=str(error))
            tell({"op": "failed", "id": job, "error": str(error)})
        except (torch.OutOfMemoryError, MemoryError) as error:
            logger.error("adapter_out_of_memory", error=str(error))
            tell({"op": "failed", "id": job, "error": "out of memory"})
        except Exception as error:  # whatever a network's own code raises; who knows what it has left: begin anew
            logger.exception("adaptation_failed", error=f"{type(error).__name__}: {error}")
            tell({"op": "failed", "id": job, "error": f"{type(error).__name__}: {error}"})
            context.destroy(linger=1000)
            return 3


if __name__ == "__main__":
    sys.exit(main())
