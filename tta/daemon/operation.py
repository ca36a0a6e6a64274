"""One operation: from labels to a verdict. Writes the adapter's request, stores its candidate, asks the gate.

Knows nothing of the cycle: whoever starts an operation is told how it ended, once, unless it was cancelled.
"""

import json
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import save_file

from tta.config import AdaptConfig, Config
from tta.daemon import gate
from tta.daemon.labels import LabelBuffer, Labelled
from tta.daemon.ledger import Ledger, stack_inputs
from tta.daemon.links import AdapterLink, Outputs, ShadowLink, VersionFolder
from tta.daemon.metrics import Metrics
from tta.daemon.store import Store
from tta.errors import NotFoundError
from tta.process import release_memory
from tta.versions import SOURCE, hash_of

Array = npt.NDArray[Any]
Task = Literal["adapt", "relieve", "rehearse"]  # what the adapter does, and the phase in the metrics
MIN_WINDOW = 32  # unlabelled images under which normalisation is not re-estimated
CARRIED = ("serving", "source")
NORMALISATION = "normalisation"  # what was operated on where no block was
SCALES = "scales"  # and where it was the scales and shifts of all normalisations


@dataclass(frozen=True)
class Conclusion:
    """How an operation ended.

    Attributes:
        version: stored and accepted; 0 if none was.
        accuracy: of it on the gate's labels.
        evidence: every number of the verdict, or "error".
        gate_labels_needed: more that would probably decide.
    """

    version: int
    accuracy: float
    evidence: dict[str, Any] = field(default_factory=dict)
    gate_labels_needed: int = 0


class Operation:
    """The operating theatre: one operation at a time. Owned by the daemon's main thread."""

    def __init__(
        self,
        config: Config,
        store: Store,
        labels: LabelBuffer,
        ledger: Ledger,
        metrics: Metrics,
        shadow: ShadowLink,
        adapter: AdapterLink,
        anchor: Mapping[str, Array],
        work: Path,
    ) -> None:
        self.config = config
        self.store = store
        self.labels = labels
        self.ledger = ledger
        self.metrics = metrics
        self.shadow = shadow
        self.adapter = adapter
        self.anchor = anchor
        self._work = work
        self.under_way: Task | None = None  # at the adapter
        self._hashes: dict[str, str] = {}  # of the files of its newest result
        self.rehearsed: Path | None = None  # scales and shifts from which an operation may start
        self._job = 0  # of the operation under way; an answer to an older one is dropped
        shutil.rmtree(work, ignore_errors=True)  # requests of a daemon that was killed

    def start(
        self,
        onset: int,
        serving: int,
        near: Mapping[str, int],
        suited: str,
        relief: str,
        alpha: float,
        concluded: Callable[[Conclusion], None],
    ) -> None:
        """Operate.

        Args:
            onset: place in the stream from which labels and images count.
            serving: version to beat.
            near: name to version of regimes that are like the present one: where to start as well.
            suited: block the diagnosis names, or "".
            relief: block to tune in the candidate made without labels, or "".
            alpha: the gate may spend.
            concluded: told how it ended.
        """
        self._make_way()
        labelled = self.labels.select(onset, fit=True, limit=self.config.adapt.max_labels)
        if not labelled:
            concluded(Conclusion(0, 0.0, {"error": "no labels to fit"}))
            return
        arrays = self._to_fit(labelled, onset)
        window = stack_inputs(self.ledger.since(onset, self.config.adapt.window))
        if window is not None and len(window) >= MIN_WINDOW:
            arrays["x_window"] = window

        def finished(folder: Path, header: dict[str, Any]) -> None:
            self._candidate(folder, header, onset, serving, alpha, concluded)

        self._submit("adapt", arrays, {"serving": serving, **near}, suited, relief, {}, finished)

    def _to_fit(self, labelled: list[Labelled], onset: int) -> dict[str, Array]:
        """Images and classes, and those of which only "right" or "wrong" is known since the onset."""
        feedback = self.labels.feedback(onset, limit=self.config.adapt.max_labels)
        x, y = arrays_of([*labelled, *(replace(r, label=r.predicted) for r in feedback)])
        wrong = np.array([False] * len(labelled) + [r.label is None for r in feedback], bool)
        named = np.arange(len(y)) < len(labelled)
        return {"x_fit": x, "y_fit": y, "wrong_fit": wrong, "named_fit": named} if len(y) else {}

    def relieve(
        self,
        onset: int,
        window: Array,
        serving: int,
        suited: str,
        done: Callable[[int, dict[str, float]], None],
    ) -> None:
        """Make a candidate without a named class; it is stored.

        Args:
            onset: place in the stream from which feedback counts.
            window: (N, H, W, C) uint8 images since the onset, at least `MIN_WINDOW`.
            serving: version in service.
            suited: block to tune if there are enough images, or "".
            done: gets its number, 0 if there can be none, and the nats that the predictions of "serving", "source"
                and "candidate" carry.
        """
        self._make_way()
        arrays = {"x_window": window, **self._to_fit([], onset)}

        def finished(folder: Path, header: dict[str, Any]) -> None:
            if header["op"] == "failed":
                self._count("", "failed")
                done(0, {})
            else:
                carried = header["information"]
                others = {n: carried.get(n, carried["source"]) for n in CARRIED}
                report = {"information": carried, "n_window": len(window)}
                version = self._keep(folder / "candidate", header["block"], header["start"], report)
                done(version, {"candidate": carried["candidate"], **others})

        self._submit("relieve", arrays, {"serving": serving}, suited, suited, {}, finished)

    def rehearse(
        self,
        images: Mapping[int, Path],
        labelled: Mapping[int, tuple[Array, Array]],
        done: Callable[[dict[int, int], bytes], None],
    ) -> None:
        """Make a candidate for each regime of what all of them have left behind; they are stored.

        Args:
            images: regime number to the file with its unlabelled images.
            labelled: regime number to images and classes to fit, where there are any.
            done: gets regime number to candidate, empty if there can be none, and the file of what was learned.
        """
        arrays = {f"{k}_{n}": a for n, pair in labelled.items() for k, a in zip("xy", pair, strict=True) if len(a)}

        def finished(folder: Path, header: dict[str, Any]) -> None:
            if header["op"] == "failed":
                self._count(SCALES, "failed")
                done({}, b"")
            else:
                report = {"regimes": sorted(images), "seconds": header["seconds"]}
                versions = {n: self._keep(folder / f"candidate-{n}", SCALES, "rehearsed", report) for n in images}
                done(versions, self._read(folder, "rehearsed"))

        memories = {str(n): str(path) for n, path in images.items()}
        self._submit("rehearse", arrays, {}, "", "", memories, finished)

    def _submit(
        self,
        task: Task,
        arrays: Mapping[str, Array],
        starts: Mapping[str, int],
        suited: str,
        relief: str,
        memories: Mapping[str, str],
        finished: Callable[[Path, dict[str, Any]], None],
    ) -> None:
        """Give the adapter work; `finished` gets its folder and answer, unless it has been given up by then."""
        self._job += 1
        self.under_way = task
        job, began = self._job, time.monotonic()
        folder = self._work / f"request-{job}"
        folders = {name: self.store.folder(v) for name, v in starts.items()}
        request = {
            "task": task,
            "suited": suited,
            "relief": relief,
            "starts": {name: str(path) for name, path in folders.items() if path is not None},
            "rehearsed": str(self.rehearsed or ""),
            "memories": memories,
            "settings": race_settings(self.config.adapt),
        }

        def answered(header: dict[str, Any]) -> None:
            if job == self._job:
                self.under_way = None
                self._hashes = header.get("sha256", {})
                self.metrics.phase_s.labels(task).observe(time.monotonic() - began)
                try:
                    finished(folder, header)
                except OSError as error:  # a candidate that cannot be kept is none
                    finished(folder, {"op": "failed", "error": f"the disk takes no candidate: {error}"})
            shutil.rmtree(folder, ignore_errors=True)
            release_memory()

        try:
            folder.mkdir(parents=True)
            save_file({k: np.ascontiguousarray(v) for k, v in arrays.items()}, folder / "arrays.safetensors")
            (folder / "request.json").write_text(json.dumps(request))
        except (OSError, SafetensorError) as error:
            answered({"op": "failed", "error": f"the disk takes no request: {error}"})
            return
        self.adapter.submit(folder, answered)

    def _make_way(self) -> None:
        """A shift cannot wait for a rehearsal."""
        if self.under_way == "rehearse":
            self.cancel()

    def cancel(self) -> None:
        """Give up the operation under way."""
        self.under_way = None
        self._job += 1
        self.adapter.cancel()
        shutil.rmtree(self._work, ignore_errors=True)  # nobody answers that request any more

    def _candidate(
        self,
        folder: Path,
        header: dict[str, Any],
        onset: int,
        serving: int,
        alpha: float,
        concluded: Callable[[Conclusion], None],
    ) -> None:
        """The adapter has finished: keep its candidate and put it before the gate."""
        if header["op"] == "failed":
            self._count("", "failed")
            concluded(Conclusion(0, 0.0, {"error": header["error"]}))
            return
        block = header["block"]
        version = self._keep(folder / "candidate", block, header["start"], header["report"])
        relief = header.get("label_free")
        free = self._keep(folder / "label-free", relief["block"], relief["start"], {}) if relief else None
        blocks = (block, relief["block"] if relief else "")
        candidates = [v for v in (version, free) if v is not None]
        rows = self.labels.select(onset, fit=False, limit=self.config.adapt.max_labels)
        if not rows:
            self._discard(candidates)
            concluded(Conclusion(0, 0.0, {"error": "no gate labels"}, 16))
            return
        x, y = arrays_of(rows)
        fit_rows = self.labels.select(onset, fit=True, limit=self.config.adapt.max_labels)
        fit_rows = self.labels.not_attributed(fit_rows)  # a rehearsal may have learned from the others
        x_fit, y_fit = arrays_of(fit_rows)
        clients = [r.client for r in rows], [r.client for r in fit_rows]
        limited = self.labels.labellers().limited  # at the verdict somebody may have been taken off the list
        job, began = self._job, time.monotonic()
        answers: list[Outputs | None] = []
        also_fit = free is not None and len(fit_rows) > 0

        def judged(outputs: Outputs | None) -> None:
            answers.append(outputs)
            if len(answers) < 1 + also_fit:
                return
            self.metrics.phase_s.labels("gate").observe(time.monotonic() - began)
            good = [a for a in answers if a is not None]
            if job != self._job:
                self._discard(candidates)
            elif len(good) < len(answers):
                self._discard(candidates)
                self._count(block, "failed")
                concluded(Conclusion(0, 0.0, {"error": "the shadow could not run the candidate"}))
            else:
                on_fit = [y_fit[:0]] * 3
                if also_fit:
                    on_fit = [logits.argmax(axis=1) for logits, _ in good[-1]]
                concluded(self._judge(good[0], y, on_fit, y_fit, clients, limited, version, free, blocks, alpha))

        def folders(versions: list[int]) -> list[VersionFolder]:
            return [(v, self.store.folder(v)) for v in versions]

        versions = [version, serving, SOURCE, *([free] if free is not None else [])]
        self.shadow.ask(folders(versions), np.concatenate([x, self.anchor["x"]]), judged)
        if free is not None and also_fit:
            self.shadow.ask(folders([free, serving, SOURCE]), x_fit, judged)

    def _judge(
        self,
        outputs: Outputs,
        y: Array,
        on_fit: list[Array],
        y_fit: Array,
        clients: tuple[list[str], list[str]],
        limited: frozenset[str],
        version: int,
        free: int | None,
        blocks: tuple[str, str],
        alpha: float,
    ) -> Conclusion:
        """Ask the gate; the candidate made without labels wins if it passes and is right more often.

        Args:
            outputs: of candidate, serving, source and label-free candidate on gate and anchor images.
            y: (N,) the gate's labels.
            on_fit: (M,) each, or (0,) if they were not asked: what label-free candidate, serving and source call
                the images of the fit labels. None of them has learned from those, so they judge as well.
            y_fit: (M,) the fit labels.
            clients: who gave the gate's labels and the fit labels.
            limited: those that do not decide alone.
            version: candidate.
            free: label-free candidate, if there is one.
            blocks: tuned in candidate and label-free candidate, "" for none.
            alpha: to spend.
        """
        block = blocks[0]
        n = len(y)
        called = [logits.argmax(axis=1) for logits, _ in outputs]
        candidate, serving, source, *others = [(c[:n] == y).tolist() for c in called]
        label_free = others[0] if others else None
        on_anchor = [float((c[n:] == self.anchor["y"]).mean()) for c in called]
        max_drop = self.config.gate.max_class_drop
        guard = gate.ClassGuard(y.tolist(), called[0][:n].tolist(), called[1][:n].tolist(), max_drop)
        alpha /= 1 if free is None else 2  # two candidates share it
        gave, gave_fit = clients
        verdict, kept = gate.judge(candidate, serving, source, label_free, alpha, guard), on_anchor[0]
        verdict = gate.without_each(verdict, candidate, serving, source, gave, limited, guard)
        if label_free is not None and free is not None:
            y_all = np.concatenate([y, y_fit])
            trio = [np.concatenate([called[i][:n], rest]) for i, rest in zip((3, 1, 2), on_fit, strict=True)]
            all_free, all_serving, all_source = [(c == y_all).tolist() for c in trio]
            guard = gate.ClassGuard(y_all.tolist(), trio[0].tolist(), trio[1].tolist(), max_drop)
            plain = gate.judge(all_free, all_serving, all_source, None, alpha, guard)
            everybody = [*gave, *gave_fit]
            plain = gate.without_each(plain, all_free, all_serving, all_source, everybody, limited, guard)
            better = verdict.outcome != "accepted" or sum(label_free) > sum(candidate)
            if better and plain.outcome == "accepted":
                self._count(block, verdict.outcome)
                self._discard([version], verdict)
                verdict, version, block, kept = plain, free, blocks[1], on_anchor[3]
            else:
                self._discard([free], plain)
        anchor = {"candidate": kept, "serving": on_anchor[1], "source": on_anchor[2]}
        verdict = replace(verdict, anchor={name: round(share, 4) for name, share in anchor.items()})
        self._count(block, verdict.outcome)
        self.metrics.show_verdict(verdict)
        evidence = {"candidate": version, "block": block, **verdict.fields()}
        if verdict.outcome != "accepted":
            self._discard([version], verdict)
            return Conclusion(0, 0.0, evidence, verdict.labels_needed)
        try:
            self.store.amend(version, verdict=verdict.fields())
        except OSError as error:  # not on disk it would be gone after a restart
            self._discard([version])
            return Conclusion(0, 0.0, {"error": f"the verdict cannot be written: {error}"})
        return Conclusion(version, verdict.accuracy_candidate, evidence)

    def _keep(self, folder: Path, block: str, start: str, report: dict[str, Any]) -> int:
        delta, probe = (self._read(folder, name) for name in ("delta", "probe"))
        return self.store.write(delta, probe, block, start, time.time(), report, {})

    def _read(self, folder: Path, name: str) -> bytes:
        """A file of the adapter's result, as the adapter says it wrote it: it is about to be signed, perhaps."""
        data = (folder / f"{name}.safetensors").read_bytes()
        if hash_of(data) != self._hashes.get(f"{folder.name}/{name}"):
            raise OSError(f"{folder / name}.safetensors is not what the adapter has written")
        return data

    def _discard(self, versions: list[int], verdict: gate.Verdict | None = None) -> None:
        for version in versions:
            try:
                self.store.discard(version, None if verdict is None else verdict.fields())
            except NotFoundError:
                continue

    def _count(self, block: str, outcome: str) -> None:
        self.metrics.adaptations.labels(block or NORMALISATION, outcome).inc()


def arrays_of(rows: list[Labelled]) -> tuple[Array, Array]:
    """Images (N, H, W, C) uint8 and classes (N,) int64 of labels that have both; N may be 0."""
    usable = [(r.x, r.label) for r in rows if r.x is not None and r.label is not None]
    if not usable:
        return np.zeros((0, 1, 1, 1), np.uint8), np.zeros(0, np.int64)
    return np.stack([x for x, _ in usable]), np.array([label for _, label in usable], np.int64)


def race_settings(c: AdaptConfig) -> dict[str, Any]:
    """What the race needs; see `tta.adapter.race.Settings`."""
    return {
        "selection": c.selection,
        "n_blocks": c.blocks,
        "folds": c.folds,
        "epochs": c.epochs,
        "batch_size": c.batch_size,
        "learning_rates": c.learning_rates,
        "head_learning_rates": c.head_learning_rates,
        "augment": c.augment,
        "unlabelled": c.unlabelled,
        "budget_s": c.budget_s,
        "memory_bytes": c.memory_bytes,
        "seed": c.seed,
    }
