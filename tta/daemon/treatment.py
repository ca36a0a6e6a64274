"""From a shift to a cured regime: labels, adapter, gate, swap, probation, recall, rollback.

Holds what `cycle.py` decides on and carries out what it says. Every transition is logged with its evidence,
counted and saved.
"""

import json
import shutil
import time
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors.numpy import save_file

from tta.config import Config
from tta.daemon import gate
from tta.daemon.cycle import Cycle, Event, State
from tta.daemon.labels import LabelBuffer, Labelled
from tta.daemon.ledger import Ledger, stack_inputs
from tta.daemon.library import HOME, Library, Regime
from tta.daemon.links import AdapterLink, Outputs, ServerLink, ShadowLink, VersionFolder
from tta.daemon.metrics import Metrics
from tta.daemon.processes import Logger
from tta.daemon.store import Store
from tta.daemon.watch import Watch
from tta.errors import DeltaError, NotFoundError, PreconditionError
from tta.monitor.accuracy import PairedTest, binomial_tail
from tta.monitor.charts import Alarm
from tta.monitor.diagnosis import Diagnosis
from tta.versions import SOURCE

Array = npt.NDArray[Any]
HARM_P_VALUE = 0.05  # errors must be up by more than chance before weights are touched
RECALL_EVERY = 8  # new labels between two attempts to recognise an output-level regime by them
RECALL_MARGIN = 0.1  # a regime's cure must come this near its accuracy to be recognised by labels
ACCURACY_WINDOW = 100  # labels in the accuracy gauges
MIN_ADAPT_LABELS = 16
SUSPICION_SAMPLES = 128  # to find out where the traffic of a cured regime went before it is an alarm


@dataclass
class Case:
    """Everything about the present regime and shift that must survive a restart.

    Attributes:
        serving: version in service.
        previous: version before it, for rollback.
        regime: number of the regime the traffic is taken to be in.
        previous_regime: the one before.
        onset: sequence number at which the present shift began.
        cause: what raised the alarm: "charts", "labels", "operator", or "" without a shift.
        wanted: labels since the onset before the next adaptation.
        forced: the operator wants an adaptation whatever the errors say.
        kind: of the present shift, once diagnosed.
        proposal: accepted version that waits for approval; 0 for none.
        accuracy: of the newest version on the gate's labels.
        since: sequence number at which the serving version came into service.
    """

    serving: int = SOURCE
    previous: int = SOURCE
    regime: int = HOME
    previous_regime: int = HOME
    onset: int = 0
    cause: str = ""
    wanted: int = 0
    forced: bool = False
    kind: str = ""
    proposal: int = 0
    accuracy: float = 0.0
    since: int = 0
    paused: bool = False

    @classmethod
    def load(cls, saved: dict[str, Any]) -> "Case":
        """From `state.json`; unknown fields are left out."""
        names = {f.name for f in fields(cls)}
        return cls(**{k: v for k, v in saved.items() if k in names})


class Treatment:
    """The decisions of one daemon. Owned by its main thread."""

    def __init__(
        self,
        config: Config,
        store: Store,
        labels: LabelBuffer,
        ledger: Ledger,
        library: Library,
        watch: Watch,
        metrics: Metrics,
        shadow: ShadowLink,
        server: ServerLink,
        adapter: AdapterLink,
        work: Path,
        log: Logger,
    ) -> None:
        self.config = config
        self.store = store
        self.labels = labels
        self.ledger = ledger
        self.library = library
        self.watch = watch
        self.metrics = metrics
        self.shadow = shadow
        self.server = server
        self.adapter = adapter
        self.cycle = Cycle()
        self.case = Case()
        self.sequence = 0  # of the next observed sample
        self.diagnosis: Diagnosis | None = None
        self.events: deque[dict[str, Any]] = deque(maxlen=200)
        self._work = work
        self._log = log
        self._paired = PairedTest(config.gate.rollback_alpha)
        self._probation_from: float | None = None
        self._target: Regime | None = None  # recalled regime; None for a new one
        self._right: dict[str, deque[bool]] = {m: deque(maxlen=ACCURACY_WINDOW) for m in ("serving", "source")}
        self._recall_tried_at = 0
        self._recalling = False
        self._suspicion: tuple[Alarm, int] | None = None
        self._job = 0
        self._began = 0.0

    # -- state on disk --------------------------------------------------------------------------------

    def restore(self) -> None:
        """Go on from `state.json`; at the first start, from home with the source."""
        saved = self.store.load_state()
        self.case = Case.load(saved.get("case", {}))
        self.sequence = max(int(saved.get("sequence", 0)), self.labels.last_sequence() + 1)
        state = State(saved.get("state", State.STABLE))
        if state is State.ADAPTING:  # the adapter died with the daemon: start that step again
            state = State.DRIFTED
        self.cycle = Cycle(state)
        verified = self.store.newest(self.case.serving)
        if verified != self.case.serving:
            self._log.error("version_lost", version=self.case.serving, serving=verified)
            self.case = Case(since=self.sequence)
            self.cycle = Cycle()
        if self.case.regime not in self.library.regimes:
            self.case.regime = HOME
        if state is State.PROBATION:
            self._target = self.library.regimes[self.case.regime] if not self._is_new_regime() else None
            self._probation_from = time.monotonic()
        self.watch.enter(self.regime, self.sequence)
        if state in (State.DRIFTED, State.ADAPTING):
            self.watch.look_from(self.case.onset)
        self._log.info("restored", state=self.cycle.state, **asdict(self.case))
        self.save()

    def save(self) -> None:
        """Write `state.json`."""
        self.store.save_state({"state": self.cycle.state, "sequence": self.sequence, "case": asdict(self.case)})

    @property
    def regime(self) -> Regime:
        """The regime the traffic is taken to be in."""
        return self.library.regimes.get(self.case.regime, self.library.regimes[HOME])

    @property
    def acting(self) -> bool:
        """Whether decisions may change what is served."""
        return not self.case.paused and self.config.mode != "off"

    def _is_new_regime(self) -> bool:
        return self.case.cause != ""

    def _folder(self, version: int) -> VersionFolder:
        return version, self.store.folder(version)

    # -- events -------------------------------------------------------------------------------------------

    def happen(self, event: Event, **evidence: Any) -> bool:
        """Feed the cycle an event and carry out what it says; False if it means nothing now."""
        before = self.cycle.state
        actions = self.cycle.step(event)
        if actions is None:
            return False
        self.record(event, before=before, after=self.cycle.state, **evidence)
        self.metrics.transitions.labels(event.value).inc()
        for action in actions:
            getattr(self, f"_{action.value}")()
        self.metrics.show_state(self.cycle.state)
        self.save()
        return True

    def record(self, name: str, **evidence: Any) -> None:
        """Log something worth knowing and keep it for `status`."""
        entry = {"event": str(name), "sequence": self.sequence, "version": self.case.serving, **evidence}
        self.events.append({**entry, "time_s": time.time()})
        self._log.info("transition", **{("what" if k == "event" else k): v for k, v in entry.items()})

    # -- findings ---------------------------------------------------------------------------------------

    def alarm(self, alarm: Alarm, sequence: int) -> None:
        """A chart crossed its threshold at `sequence`."""
        if self.cycle.state is State.DRIFTED and self.case.cause == "labels":
            self.case.cause = "charts"  # it is not only the output
            self.watch.look_from(sequence)
        if self.cycle.state is not State.STABLE or self._suspicion is not None:
            return
        self._suspicion = (alarm, sequence)
        if self.regime.number == HOME:
            self._raise_suspicion()
        else:
            # A cured shift most often ends by going home, which is no alarm: look where the traffic went first.
            self.watch.look_from(sequence)

    def _raise_suspicion(self) -> None:
        """It is an alarm."""
        assert self._suspicion is not None
        alarm, sequence = self._suspicion
        self._open_case("charts", sequence - alarm.lag)
        self.happen(
            Event.ALARM,
            cause="charts",
            block=alarm.block,
            statistic=round(alarm.statistic, 3),
            sample=sequence,
            onset=sequence - alarm.lag,
        )

    def _open_case(self, cause: str, onset: int) -> None:
        self.case.cause, self.case.onset, self.case.kind = cause, onset, ""
        self.case.wanted, self.case.forced, self.case.proposal = self.config.adapt.labels, False, 0
        self.diagnosis = None
        self._recall_tried_at = 0
        self._suspicion = None
        self.watch.look_from(onset)
        self.metrics.alarms.labels(cause).inc()

    def look(self) -> None:
        """Ask the fingerprints which regime this is, and act on a change."""
        if not self.acting:
            self._look_while_idle()
            return
        same_features = self._feature_regime()
        if self.cycle.state is State.STABLE and same_features == HOME and self._suspicion is None:
            return  # the charts watch; a fingerprint is for telling regimes apart afterwards
        found = self.watch.recognised()
        if self.server.swapping and self.cycle.state is State.PROBATION:
            return
        if found is not None and found.number == same_features:
            if self._suspicion is not None:
                self._suspicion = None
                self.watch.charts.reset()
            elif self.case.cause == "charts":
                self.happen(Event.QUIET, regime=found.number)
        elif found is not None and (self.config.library.recall != "off" or found.number == HOME):
            self._target = found
            sample = self._suspicion[1] if self._suspicion else self.case.onset
            self.happen(Event.KNOWN, regime=found.number, recalled_version=found.version, sample=sample)
        elif self._suspicion is not None and self.sequence - self._suspicion[1] > SUSPICION_SAMPLES:
            self._raise_suspicion()

    def _look_while_idle(self) -> None:
        """Without acting, an alarm still ends when the traffic is as before."""
        if self._suspicion is not None:
            self._raise_suspicion()
        if self.cycle.state is State.DRIFTED:
            found = self.watch.recognised()
            if found is not None and found.number == self._feature_regime() and self.case.cause == "charts":
                self.happen(Event.QUIET, regime=found.number)

    def _feature_regime(self) -> int | None:
        """Number of the regime whose features the traffic should have now; None for one not yet known."""
        if self.cycle.state is State.PROBATION and self._target is None:
            return HOME if self.case.kind == "output" else None
        regime = self._target if self.cycle.state is State.PROBATION and self._target else self.regime
        return regime.number if regime.fingerprint is not None else HOME

    def labelled(self, rows: list[Labelled]) -> None:
        """Take labels that are on disk: error test, accuracy gauges, probation."""
        own = [
            r
            for r in rows
            if r.predicted >= 0 and r.version == self.case.serving and r.sequence >= self.case.since
        ]
        for row in own:
            wrong = row.label is None or row.label != row.predicted
            self._right["serving"].append(not wrong)
            if self.case.serving == SOURCE:
                self._right["source"].append(not wrong)
            alarmed = self.watch.label(row.sequence, wrong)
            if alarmed and self.cycle.state is State.STABLE:
                onset = self.watch.error_onset()
                self._open_case("labels", onset)
                self.happen(
                    Event.ALARM, cause="labels", statistic=round(self.watch.errors.statistic, 3), onset=onset
                )
        with_image = [r for r in own if r.x is not None and r.label is not None]
        if with_image and self.case.serving != SOURCE:
            self._compare(with_image)
        for model, right in self._right.items():
            if right:
                self.metrics.accuracy.labels(model).set(sum(right) / len(right))

    def _compare(self, rows: list[Labelled]) -> None:
        """Run source and previous version on live labels."""
        x, y = _arrays(rows)
        serving, probing = self.case.serving, self.cycle.state is State.PROBATION
        versions = [self._folder(SOURCE), self._folder(self.case.previous if probing else SOURCE)]

        def then(outputs: Outputs | None) -> None:
            if outputs is None or self.case.serving != serving:
                return
            source, previous = (logits.argmax(axis=1) == y for logits, _ in outputs)
            self._right["source"].extend(bool(r) for r in source)
            if not probing or self.cycle.state is not State.PROBATION:
                return
            for row, was_right in zip(rows, previous, strict=True):
                self._paired.update(row.label == row.predicted, bool(was_right))
            if self._paired.disagrees and self.acting:
                self.happen(
                    Event.DISAGREED,
                    labels=self._paired.n_labels,
                    new_only=self._paired.new_only,
                    previous_only=self._paired.previous_only,
                )

        self.shadow.ask(versions, x, then)

    # -- time -------------------------------------------------------------------------------------------

    def tick(self) -> None:
        """Whatever depends on counts and time rather than on a message."""
        if not self.acting:
            return
        if self.cycle.state is State.DRIFTED and not self.case.proposal:
            have = self.labels.count(self.case.onset)
            if (
                self.case.cause == "labels"
                and not self._recalling
                and have - self._recall_tried_at >= RECALL_EVERY
            ):
                self._recall_tried_at = have
                self._recall_by_labels()
            if have >= self.case.wanted:
                self._decide_whether_to_adapt(have)
        elif self.cycle.state is State.PROBATION and self._probation_from is not None and not self.server.swapping:
            elapsed = time.monotonic() - self._probation_from
            enough = self._paired.n_labels >= self.config.gate.probation_labels
            known = self._target is not None or self.case.kind == "output" or self.watch.fingerprint() is not None
            if known and (enough or elapsed >= self.config.gate.probation_s):
                self.happen(Event.CONFIRMED, labels=self._paired.n_labels, seconds=round(elapsed, 3))

    def _decide_whether_to_adapt(self, have: int) -> None:
        n, wrong = self.labels.outcomes(self.case.onset, self.case.serving)
        null = min(0.99, max(0.005, 1 - self.regime.accuracy + self.config.monitor.error_tolerance))
        p_val = binomial_tail(wrong, n, null)
        errors_up = p_val <= HARM_P_VALUE
        self.diagnosis = self.watch.diagnose(errors_up and self.case.cause != "charts")
        self.case.kind = self.diagnosis.kind
        evidence = {"labels": have, "errors": wrong, "p_val": round(p_val, 6), **asdict(self.diagnosis)}
        if not errors_up and not self.case.forced:
            if self.case.cause == "labels" or self.watch.fingerprint() is None:
                self.happen(Event.QUIET, **evidence)
            else:
                self.happen(Event.HARMLESS, **evidence)
            return
        self.happen(Event.ENOUGH_LABELS, **evidence)

    def _recall_by_labels(self) -> None:
        """An output-level regime, or home, has no features of its own: recognise it by labels."""
        candidates = [
            r
            for r in self.library.regimes.values()
            if (r.fingerprint is None or r.number == HOME) and r.version != self.case.serving
        ]
        rows = self.labels.select(self.case.onset, fit=True) + self.labels.select(self.case.onset, fit=False)
        if not candidates or not rows:
            return
        x, y = _arrays(rows)
        versions = [self._folder(self.case.serving), *(self._folder(r.version) for r in candidates)]
        self._recalling = True

        def then(outputs: Outputs | None) -> None:
            self._recalling = False
            if outputs is None or self.cycle.state is not State.DRIFTED or not self.acting:
                return
            serving, *others = [(logits.argmax(axis=1) == y).tolist() for logits, _ in outputs]
            best = max(range(len(others)), key=lambda i: sum(others[i]))
            regime, right = candidates[best], others[best]
            verdict = gate.judge(right, serving, right, None, self.config.gate.alpha)
            if verdict.outcome == "accepted" and verdict.accuracy_candidate >= regime.accuracy - RECALL_MARGIN:
                self._target = regime
                self.happen(Event.KNOWN, regime=regime.number, recalled_version=regime.version, **verdict.fields())

        self.shadow.ask(versions, x, then)

    # -- actions, named as in cycle.Action -----------------------------------------------------------

    def _start_adapter(self) -> None:
        if self.acting:
            self.adapter.start()

    def _adapt(self) -> None:
        self._began = time.monotonic()
        self._job += 1
        folder = self._work / f"request-{self._job}"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        x, y = _arrays(self.labels.select(self.case.onset, fit=True))
        arrays = {"x_fit": x, "y_fit": y}
        window = stack_inputs(self.ledger.since(self.case.onset, self.config.adapt.window))
        if window is not None and len(window) >= 64:
            arrays["x_window"] = window
        save_file({k: np.ascontiguousarray(v) for k, v in arrays.items()}, folder / "arrays.safetensors")
        c = self.config.adapt
        _, serving = self._folder(self.case.serving)
        request = {
            "suited": self.diagnosis.block if self.diagnosis else "",
            "starts": {"serving": str(serving)} if serving else {},
            "settings": {
                "selection": c.selection,
                "n_blocks": c.blocks,
                "folds": c.folds,
                "epochs": c.epochs,
                "batch_size": c.batch_size,
                "learning_rates": c.learning_rates,
                "head_learning_rates": c.head_learning_rates,
                "augment": c.augment,
                "budget_s": c.budget_s,
                "seed": c.seed,
            },
        }
        (folder / "request.json").write_text(json.dumps(request))
        self.adapter.submit(folder, lambda header: self._candidate(folder, header))

    def _cancel(self) -> None:
        self.adapter.cancel()

    def _candidate(self, folder: Path, header: dict[str, Any]) -> None:
        """The adapter has finished: store its candidate and put it before the gate."""
        if self.cycle.state is not State.ADAPTING:
            shutil.rmtree(folder, ignore_errors=True)
            return
        self.metrics.phase_s.labels("adapt").observe(time.monotonic() - self._began)
        if header["op"] == "failed":
            shutil.rmtree(folder, ignore_errors=True)
            self._not_accepted({"error": header["error"]}, "", 0)
            return
        version = self._store(folder / "candidate", header["block"], header["start"], header["report"])
        label_free = self._store(folder / "label-free", "", "batch-norm", {}) if header.get("label_free") else None
        shutil.rmtree(folder, ignore_errors=True)
        rows = self.labels.select(self.case.onset, fit=False)
        if not rows:
            self._discard(version, label_free)
            self._not_accepted({"error": "no gate labels"}, header["block"], 16)
            return
        x, y = _arrays(rows)
        versions = [self._folder(v) for v in (version, self.case.serving, SOURCE)]
        if label_free is not None:
            versions.append(self._folder(label_free))
        self._began = time.monotonic()
        self.shadow.ask(versions, x, lambda outputs: self._judge(outputs, y, version, label_free, header["block"]))

    def _store(self, folder: Path, block: str, start: str, report: dict[str, Any]) -> int:
        return self.store.write(
            (folder / "delta.safetensors").read_bytes(),
            (folder / "probe.safetensors").read_bytes(),
            block,
            start,
            time.time(),
            report,
            {},
        )

    def _discard(self, *versions: int | None) -> None:
        for version in versions:
            if version is not None:
                self.store.discard(version)

    def _judge(self, outputs: Outputs | None, y: Array, version: int, label_free: int | None, block: str) -> None:
        self.metrics.phase_s.labels("gate").observe(time.monotonic() - self._began)
        if self.cycle.state is not State.ADAPTING:
            self._discard(version, label_free)
            return
        if outputs is None:
            self._discard(version, label_free)
            self._not_accepted({"error": "the shadow could not run the candidate"}, block, 0)
            return
        right = [(logits.argmax(axis=1) == y).tolist() for logits, _ in outputs]
        candidate, serving, source = right[:3]
        free = right[3] if label_free is not None else None
        verdict = gate.judge(candidate, serving, source, free, self.config.gate.alpha)
        if label_free is not None and free is not None and verdict.outcome != "accepted":
            plain = gate.judge(free, serving, source, None, self.config.gate.alpha)
            if plain.outcome == "accepted":  # the labels did not help: what was made without them does
                verdict, version, label_free, block = plain, label_free, version, ""
        self._discard(label_free)
        if verdict.outcome != "accepted":
            self._discard(version)
            self._not_accepted(verdict.fields(), block, verdict.labels_needed)
            return
        self.store.amend(version, verdict=verdict.fields())
        self.metrics.adaptations.labels(block or "normalisation", "accepted").inc()
        self.case.proposal, self.case.accuracy = version, verdict.accuracy_candidate
        evidence = {"candidate": version, "block": block, **verdict.fields()}
        if self.config.mode == "propose":
            self.happen(Event.PROPOSED, **evidence)
        else:
            self._target = None
            self.happen(Event.ACCEPTED, **evidence)

    def _not_accepted(self, evidence: dict[str, Any], block: str, needed: int) -> None:
        outcome = evidence.get("outcome", "failed")
        self.metrics.adaptations.labels(block or "normalisation", outcome).inc()
        have = self.labels.count(self.case.onset)
        # Only a part of new labels goes to the gate.
        self.case.wanted = have + max(
            self.config.adapt.retry_labels, round(needed / (1 - self.config.labels.fit_fraction))
        )
        self.case.forced = False
        self.happen(Event.NOT_ACCEPTED, wanted=self.case.wanted, **evidence)

    def approve(self) -> int:
        """Promote the proposal.

        Raises:
            PreconditionError: there is none.
        """
        version = self.case.proposal
        if not version or self.cycle.state is not State.DRIFTED:
            raise PreconditionError("no candidate waits for approval")
        self._target = None
        self.happen(Event.ACCEPTED, candidate=version, approved=True)
        return version

    def _swap(self) -> None:
        self._change(self.case.proposal, self.case.regime, "promotion")

    def _recall(self) -> None:
        assert self._target is not None
        if self._target.number == HOME:
            self.record("home_recognised", regime=HOME)
        self._change(self._target.version, self._target.number, "recall")
        self.case.cause, self._suspicion = "", None

    def _change(self, version: int, regime: int, reason: str) -> None:
        """Start serving another version, then its probation."""
        self.case.proposal = 0
        self._probation_from = None
        if version == self.case.serving:
            self._served(version, regime, reason)
            return

        def then(reply: dict[str, Any]) -> None:
            if "error" in reply:
                self.metrics.swaps.labels(reason, "refused").inc()
                self.library.forget_version(version)
                self.happen(Event.SWAP_FAILED, refused=version, error=reply["error"])
                return
            self.metrics.swaps.labels(reason, "ok").inc()
            for phase in ("prepare", "flip"):
                self.metrics.swap_s.labels(phase).observe(reply.get(f"{phase}_s", 0.0))
            self._served(version, regime, reason)

        try:
            folder = self.store.folder(version)
        except NotFoundError as error:
            then({"error": str(error)})
            return
        self.server.swap(version, folder, then)

    def _served(self, version: int, regime: int, reason: str) -> None:
        """`version` answers from now on."""
        case = self.case
        if version != case.serving:
            case.previous, case.previous_regime = case.serving, case.regime
        case.serving, case.regime, case.since = version, regime, self.sequence
        self._paired = PairedTest(self.config.gate.rollback_alpha)
        self._probation_from = time.monotonic()
        for right in self._right.values():
            right.clear()
        self.metrics.version.set(version)
        self.metrics.regime.set(regime)
        self.record("swapped", reason=reason, serving=version, regime=regime)
        if self.cycle.state is not State.PROBATION or self._target is not None:
            self.watch.enter(self.regime, self.sequence)
        self.save()

    def _roll_back(self) -> None:
        self.library.forget_version(self.case.serving)
        self.case.cause = self.case.cause or "labels"
        self._change(self.case.previous, self.case.previous_regime, "rollback")

    def _await_labels(self) -> None:
        have = self.labels.count(self.case.onset)
        if self.case.wanted <= have:
            self.case.wanted = have + self.config.adapt.retry_labels

    def _remember(self) -> None:
        """The served version has proved itself: keep regime and cure."""
        if self._target is not None:
            self.library.update(self._target.number, last_used=self.sequence)
            self.case.regime = self._target.number
        else:
            found = None if self.case.kind == "output" else self.watch.fingerprint()
            regime = self.library.add(self.case.serving, self.case.kind, self.case.accuracy, found, self.sequence)
            self.case.regime = regime.number
        self._probation_from = None
        self.metrics.regime.set(self.case.regime)

    def _accept_regime(self) -> None:
        """A shift that costs no accuracy: the version stays, the regime is new."""
        n, wrong = self.labels.outcomes(self.case.onset, self.case.serving)
        regime = self.library.add(
            self.case.serving, self.case.kind, 1 - wrong / max(1, n), self.watch.fingerprint(), self.sequence
        )
        self.case.regime = regime.number
        self.metrics.regime.set(regime.number)

    def _watch(self) -> None:
        self.case.cause, self.case.kind, self.case.proposal = "", "", 0
        self._target = self._suspicion = None
        self.watch.enter(self.regime, self.sequence)

    def accuracy(self) -> dict[str, float]:
        """Of serving and source on the last labels of this version's service."""
        return {m: round(sum(right) / len(right), 4) for m, right in self._right.items() if right}

    # -- the operator's hand ---------------------------------------------------------------------------

    def serve(self, version: int, reason: str, then: Callable[[dict[str, Any]], None]) -> None:
        """Serve a version by hand (rollback, reset); the cycle starts anew from stable.

        Raises:
            NotFoundError: there is no such version.
            PreconditionError: it was never accepted.
        """
        folder = self.store.folder(version)
        if version != SOURCE and self.store.manifest(version).verdict.get("outcome") != "accepted":
            raise PreconditionError(f"version {version} was not accepted by the gate")
        regimes = [r.number for r in self.library.regimes.values() if r.version == version]

        def done(reply: dict[str, Any]) -> None:
            if "error" in reply:
                self.metrics.swaps.labels(reason, "refused").inc()
                then(reply)
                return
            self.metrics.swaps.labels(reason, "ok").inc()
            self.happen(Event.OPERATOR, reason=reason)
            self._served(version, regimes[0] if regimes else HOME, reason)
            self._watch()
            self.save()
            then(reply)

        self.server.swap(version, folder, done)

    def resume_cycle_after_pause(self) -> None:
        """A pause cancels an adaptation under way; it starts again after `resume`."""
        if self.cycle.state is State.ADAPTING:
            self.happen(Event.NOT_ACCEPTED, error="paused by the operator")
            self.case.wanted = self.config.adapt.labels

    def adapt_now(self) -> int:
        """Adapt with the labels there are.

        Returns:
            How many labels that is.

        Raises:
            PreconditionError: too few labels, or an adaptation is under way.
        """
        if self.cycle.state not in (State.STABLE, State.DRIFTED):
            raise PreconditionError(f"the cycle is in {self.cycle.state}: wait until it is stable or drifted")
        onset = self.case.onset if self.cycle.state is State.DRIFTED else self.case.since
        have = self.labels.count(onset)
        if have < MIN_ADAPT_LABELS:
            raise PreconditionError(
                f"{have} labels with images since sequence {onset}: at least {MIN_ADAPT_LABELS} are needed"
            )
        if self.cycle.state is State.STABLE:
            self._open_case("operator", onset)
            self.happen(Event.ALARM, cause="operator", onset=onset)
        self.case.wanted, self.case.forced = have, True
        self.save()
        return have


def _arrays(rows: list[Labelled]) -> tuple[Array, Array]:
    """Images (N, H, W, C) uint8 and classes (N,) int64 of labels that have both."""
    x = [r.x for r in rows if r.x is not None and r.label is not None]
    y = [r.label for r in rows if r.x is not None and r.label is not None]
    if not x:
        raise DeltaError("no labelled images")
    return np.stack(x), np.array(y, np.int64)
