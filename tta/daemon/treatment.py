"""From a shift to a cured regime: labels, adapter, gate, swap, probation, recall, rollback.

Holds what `cycle.py` decides on and carries out what it says. Every transition is logged with its evidence,
counted and saved.
"""

import time
from collections import deque
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import numpy.typing as npt

from tta.config import Config
from tta.daemon import gate
from tta.daemon.case import NEW, Case
from tta.daemon.clock import Clock
from tta.daemon.cycle import Cycle, Event, State
from tta.daemon.labels import LabelBuffer, Labelled
from tta.daemon.ledger import Ledger, stack_inputs
from tta.daemon.library import HOME, Library, Regime
from tta.daemon.links import AdapterLink, ShadowLink
from tta.daemon.metrics import Metrics
from tta.daemon.operation import MIN_WINDOW, Conclusion, Operation
from tta.daemon.probation import Comparison, Probation
from tta.daemon.processes import Logger
from tta.daemon.recall import RecallByLabels
from tta.daemon.rehearsals import Rehearsals
from tta.daemon.servers import Servers
from tta.daemon.store import Store
from tta.daemon.watch import Finding, Watch
from tta.errors import NotFoundError
from tta.monitor.accuracy import binomial_tail
from tta.monitor.diagnosis import Diagnosis
from tta.monitor.regimes import LOOKS, WINDOW, Fingerprint
from tta.versions import SOURCE

Array = npt.NDArray[Any]
HARM_P_VALUE = 0.05  # errors must be up by more than chance before weights are touched
MIN_OUTCOMES = 16  # labelled predictions under which nothing can be said of the errors
WARM_STARTS = 2  # cured regimes most like the present one, from which an operation may also start
NEVER = 1 << 40  # images
MOVES, MOVES_WITHIN = 3, 1024  # times that unknown traffic may move on, within so many samples
RELIEF = "relief"  # why a version made without labels serves
MORE = 2  # times as many, and it is made again
MORE_FEEDBACK = 64  # answers called right or wrong, and it is made of them too; then of `MORE` times as many
MAX_CLASS_RUN = 3.0  # classes that come in longer runs would spoil the estimate
JUDGED_SAMPLES = 256  # after which a shift is taken for harmless unless it looks harmful
UNSAVED_US = 10_000_000  # that may have passed since the state was saved last
SUSPICION_SAMPLES = 48  # to find out where the traffic of a cured regime went before it is an alarm


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
        servers: Servers,
        adapter: AdapterLink,
        operation: Operation,
        log: Logger,
    ) -> None:
        self.config = config
        self.store = store
        self.labels = labels
        self.ledger = ledger
        self.library = library
        self.watch = watch
        self.metrics = metrics
        self.servers = servers
        self.adapter = adapter
        self.operation = operation
        self.rehearsals = Rehearsals(config, store, labels, library, shadow, operation, self.record)
        self.recall = RecallByLabels(config, store, labels, library, watch, shadow)
        self.probation = Probation(config, store, labels, shadow, metrics, self._comparison, self.happen)
        self.cycle = Cycle()
        self.case = Case()
        self.sequence = 0  # of the next observed sample
        self.clock = Clock()
        self.rate = 0.0  # observed images a second, over the last minute or so
        self.diagnosis: Diagnosis | None = None
        self.events: deque[dict[str, Any]] = deque(maxlen=200)
        self.told: Callable[[dict[str, Any]], None] = lambda event: None  # of each event, as it happens
        self._log = log
        self._suspicion: Finding | None = None
        self._labelled_at = 0  # place of the stream at which the last labels came
        self._moves: deque[int] = deque(maxlen=MOVES)  # places at which unknown traffic moved on
        self._suspected_at = 0  # samples watched when it arose
        self._unsaved = ""  # why the disk does not have the present state
        self._unfinished = False  # a swap that a killed daemon had asked for

    # -- state on disk --------------------------------------------------------------------------------

    def restore(self) -> None:
        """Go on from `state.json`; at the first start, from home with the source.

        Where it was damaged the newest version that verifies serves, in the regime it was made for. If the traffic
        is of another, the features tell soon.
        """
        saved = self.store.load_state()
        lost = saved is None
        saved = saved or {}
        self.clock.advance(int(saved.get("time_us", 0)) + UNSAVED_US)
        self.case = Case.load(saved.get("case", {}))
        self.sequence = max(int(saved.get("sequence", 0)), self.labels.last_sequence() + 1)
        if lost:
            newest = self.store.newest()
            regimes = [r.number for r in self.library.regimes.values() if r.version == newest]
            self.case = Case(serving=newest, regime=regimes[0] if regimes else HOME, since=self.sequence)
        self._labelled_at = self.sequence
        state = State(saved.get("state", State.STABLE))
        if state is State.ADAPTING:  # the adapter died with the daemon: start that step again
            state = State.DRIFTED
        self.cycle = Cycle(state)
        problem = self.store.problem(self.case.serving)
        if problem:
            self._log.error("version_lost", version=self.case.serving, serving=SOURCE, error=problem)
            self.case = Case(since=self.sequence, paused=self.case.paused)
            self.cycle = Cycle()
        for regime in list(self.library.regimes.values()):
            problem = self.store.problem(regime.version)
            if problem:
                number, version = regime.number, regime.version
                self._log.error("regime_forgotten", regime=number, lost_version=version, error=problem)
                self.library.forget(regime.number)
        if self.case.regime not in self.library.regimes:
            self.case.regime = HOME
        if state is State.PROBATION:
            self.probation.go_on()
        self._unfinished = self.case.swap_to is not None
        self.watch.enter(self.regime, self.sequence)
        if state in (State.DRIFTED, State.ADAPTING):
            self.watch.look_from(self.case.onset)
            self.watch.restrict(self.case.keys)
        elif state is State.PROBATION and self.target is None:
            self.watch.look_from(self.case.since)
            self.watch.restrict(self.case.keys)
        saved_watch = self.store.load_watch()
        if state is State.STABLE and saved_watch and not self.watch.load_state(saved_watch):
            self._log.info("charts_start_anew", reason="other regime or thresholds")
        self._log.info("restored", state=self.cycle.state, **asdict(self.case))
        self.save()

    def retire(self) -> None:
        """Delete versions that nothing goes back to any more, but for the newest."""
        if self.swapping or self.operation.under_way:
            return
        case = self.case
        in_use = {case.serving, case.previous, case.proposal, case.proven or SOURCE, case.swap_to or SOURCE}
        in_use |= {regime.version for regime in self.library.regimes.values()}
        kept = self.config.library
        gone = self.store.retire(in_use, max(kept.versions, 2 * kept.capacity))  # a rehearsal makes one a regime
        if gone:
            self._log.info("versions_retired", versions=gone)

    def save_watch(self) -> None:
        """Write where the charts and label tests stand; without it they start anew after a restart."""
        try:
            self.store.save_watch(self.watch.state())
        except OSError as error:
            self._log.warning("charts_not_saved", error=str(error))

    def save(self) -> None:
        """Write `state.json`, and the library if that is still to be written.

        A disk that takes nothing is no reason to stop: it is tried again with the next save.
        """
        state = {
            "state": self.cycle.state,
            "sequence": self.sequence,
            "time_us": self.clock.now_us(),
            "case": asdict(self.case),
        }
        if self.library.unsaved:
            self.library.save()
        try:
            self.store.save_state(state)
            problem = self.library.unsaved
        except OSError as error:
            problem = str(error)
        if problem != self._unsaved:
            self._unsaved = problem
            if problem:
                self._log.error("state_not_saved", error=problem, consequence="a restart would not know of it")
            else:
                self._log.info("state_saved_again")

    @property
    def regime(self) -> Regime:
        """The regime the traffic is taken to be in."""
        return self.library.regimes.get(self.case.regime, self.library.regimes[HOME])

    @property
    def target(self) -> Regime | None:
        """The recalled regime on probation; None for a new one."""
        return self.library.regimes.get(self.case.target)

    @property
    def acting(self) -> bool:
        """Whether decisions may change what is served."""
        return not self.case.paused and self.config.mode != "off"

    # -- events -------------------------------------------------------------------------------------------

    def happen(self, event: Event, **evidence: Any) -> bool:
        """Feed the cycle an event and carry out what it says; False if it means nothing now."""
        before = self.cycle.state
        actions = self.cycle.step(event)
        if actions is None:
            return False
        if event is Event.ALARM:
            self.case.found_s = time.time()
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
        self.told(self.events[-1])
        self._log.info("transition", **{("what" if k == "event" else k): v for k, v in entry.items()})

    # -- findings ---------------------------------------------------------------------------------------

    def alarm(self, found: Finding) -> None:
        """A chart crossed its threshold."""
        sequence = found.sequence
        if self.cycle.state is State.DRIFTED and self.case.cause in ("labels", "operator"):
            self.case.cause = "charts"  # it is not only the output
            self.watch.look_from(sequence)
        if self.cycle.state is not State.STABLE or self._suspicion is not None or self.swapping:
            return
        self._suspicion, self._suspected_at = found, self.watch.n_watched
        if found.elsewhere:  # what was one camera's shift is no longer one camera's only
            self.watch.expect(self.library.regimes[HOME])
        if found.elsewhere or self.regime.number == HOME:
            self._raise_suspicion()
        else:
            # A cured shift most often ends by going home, which is no alarm: look where the traffic went first.
            self.watch.look_from(sequence)

    def _raise_suspicion(self) -> None:
        """It is an alarm."""
        assert self._suspicion is not None
        found, alarm = self._suspicion, self._suspicion.alarm
        self._open_case("charts", found.onset)
        self.metrics.alarms.labels("charts").inc()
        self.happen(
            Event.ALARM,
            cause="charts",
            chart=alarm.chart,
            block=alarm.block,
            statistic=round(alarm.statistic, 3),
            sample=found.sequence,
            onset=found.onset,
        )

    def _attribute(self, number: int, until: int) -> None:
        """The traffic not yet told to be of any regime was of this one, up to before `until`."""
        begin = self.case.attributed
        if number != HOME and until > begin:
            self.labels.attribute(number, begin, until)
            newest = self.ledger.since(begin, self.library.n_images + self.sequence - until)
            images = stack_inputs([e for e in newest if e.sequence < until])
            if images is not None:
                self.library.keep_images(number, images, self.clock.now_us() / 1e6)
        self.case.attributed = max(begin, until)

    def _add_regime(
        self,
        kind: str,
        accuracy: float,
        found: Fingerprint | None,
        until: int,
        keys: tuple[str, ...] = (),
        another: bool = False,
    ) -> None:
        """Remember the present regime, which the serving version is for, with its traffic up to before `until`."""
        known = set(self.library.regimes)
        regime = self.library.add(self.case.serving, kind, accuracy, found, self.sequence, keys, another)
        if regime.number not in known:
            self.labels.forget_regime(regime.number)  # of another that had the number
        self.case.regime = regime.number
        self._attribute(regime.number, until)
        self.metrics.regime.set(regime.number)

    def _open_case(self, cause: str, onset: int) -> None:
        if self.cycle.state is State.STABLE:
            self._attribute(self.case.regime, onset)
        self.case.attributed = max(self.case.attributed, onset)
        self.case.cause, self.case.onset, self.case.kind = cause, onset, ""
        self.case.wanted, self.case.forced, self.case.proposal = self.config.adapt.labels, False, 0
        self.case.looks, self.case.actionable, self.case.keys, self.case.accepted = 0, None, (), False
        self.case.proven, self.case.relief, self.case.feedback = None, 0, 0
        self.diagnosis = None
        self.recall.begin()
        self._suspicion = None
        self.watch.look_from(onset)

    def weigh(self) -> None:
        """Is the shift that the charts found a reason to act? Known once enough samples have been seen.

        Mild shifts are seen in tens of samples and cost nothing. The loss of accuracy is judged by the model's own
        confidence, which is noisy and too sure of itself: what is clear is decided at once, the rest when a
        fingerprint could be taken. Labels overrule it at any time.
        """
        case = self.case
        if self.cycle.state is not State.DRIFTED or case.actionable or self.swapping:
            return
        if self.watch.forget_silent_keys():
            case.keys = ()
        if self.watch.label_statistic > 1:
            self._act_on_it(cause="labels")
            return
        if case.actionable is not None:
            return
        if case.cause != "charts" or case.serving != SOURCE:
            self._act_on_it(cause=case.cause)  # labels or the operator say so, or a cured shift has moved on
            return
        if self.watch.n_since() >= WINDOW:
            case.keys = self.watch.find_keys()
        n = self.watch.n_since()  # of those keys
        if n < WINDOW:
            return
        self.diagnosis, loss = self.watch.diagnose(errors_up=False), self.watch.predicted_loss()
        case.kind = self.diagnosis.kind
        accepted = self.config.monitor.accepted_loss
        surely, final = loss.points - 2 * loss.error > accepted, n >= JUDGED_SAMPLES
        evidence = {"predicted_loss": round(loss.points, 4), "keys": list(case.keys), **asdict(self.diagnosis)}
        if case.kind == "prior" or self.diagnosis.effect < self.config.monitor.min_effect:
            if final:
                self._let_be(evidence)
        elif surely or (final and loss.points > accepted):
            self._act_on_it(**evidence)
        elif final:
            self._let_be(evidence)

    def _act_on_it(self, **evidence: Any) -> None:
        self.case.actionable = True
        self.happen(Event.ACTIONABLE, **evidence)

    def _let_be(self, evidence: dict[str, Any]) -> None:
        self.case.actionable = False
        self.metrics.notices.labels(self.case.kind).inc()
        self.happen(Event.NOTICE, **evidence)

    def look(self) -> None:
        """Ask the fingerprints which regime this is, and act on a change."""
        if not self.acting:
            self._look_while_idle()
            return
        same_features = self._feature_regime()
        if self.cycle.state is State.STABLE and same_features == HOME and self._suspicion is None:
            return  # the charts watch; a fingerprint is for telling regimes apart afterwards
        found = self.watch.recognised()
        if self.swapping:
            return
        if found is not None and found.number == same_features and self._is_served(found):
            if self._suspicion is not None:
                self._suspicion = None
                self.watch.monitor.reset()
            elif self.case.cause == "charts" or (self.case.cause == "operator" and not self.case.forced):
                self.happen(Event.QUIET, regime=found.number)
        elif found is not None and found.number != HOME and self.config.library.recall == "confirm":
            self._wait_for_labels()
        elif found is not None and (self.config.library.recall != "off" or found.number == HOME):
            if self._suspicion is not None:
                sample = self._suspicion.sequence
            elif self.cycle.state is State.STABLE:  # recognised before a chart crossed
                sample = self.sequence - LOOKS[0]
            else:
                sample = self.case.onset
            if self.cycle.state is State.STABLE:
                self._open_case("charts", sample)
            self.library.update(found.number, last_used=self.sequence)
            self._remember_uncured(self.sequence - WINDOW)
            self.case.attributed = max(self.case.attributed, self.sequence - WINDOW)
            self.case.target = found.number
            self.happen(Event.KNOWN, regime=found.number, recalled_version=found.version, sample=sample)
        elif self._suspicion is not None and self.watch.n_watched - self._suspected_at > SUSPICION_SAMPLES:
            self._raise_suspicion()
        elif self.cycle.state in (State.DRIFTED, State.ADAPTING) and not self.case.proposal:
            onset = self.watch.moved_on()
            if onset is not None:
                self._move_on(onset)
        elif self.cycle.state is State.STABLE and self._suspicion is None:
            self._notice_departure()

    def _notice_departure(self) -> None:
        """Has the traffic of a regime become that of a neighbour which nobody knows?"""
        left = self.watch.left()
        if left is not None:
            self._suspicion = left
            self.watch.excluded.add(self.regime.number)  # so like it that fewer samples would find it again
            self._raise_suspicion()

    def _move_on(self, onset: int) -> None:
        """The traffic has left the present shift for one that nobody knows: a case of its own.

        Unless it does so all the time: then the mixture is the shift.
        """
        within = onset - self._moves[0] if len(self._moves) == MOVES else MOVES_WITHIN
        if self.case.forced or within < MOVES_WITHIN:
            return
        self._moves.append(onset)
        self._remember_uncured(onset)
        proven = self.case.proven if self._relieved() else None
        if self.happen(Event.MOVED_ON, onset=onset):
            self._open_case("charts", onset)
            self.case.proven = proven
            self.watch.excluded.clear()
            self.save()

    def _remember_uncured(self, until: int) -> None:
        """A shift ends that no labels have decided on.

        What was made for it without them may be of use when it returns. If nothing was, other regimes may teach
        what serves it (`Rehearsals`), where that needs no proof.
        """
        case, relieved = self.case, self._relieved()
        learns = self.config.adapt.label_free == "immediate" and self.config.adapt.rehearsal != "off"
        if relieved or (learns and case.actionable and case.cause == "charts" and not case.keys):
            found = self.watch.fingerprint(until)
            if found is not None:
                self._add_regime(case.kind, self._measured_accuracy(), found, until, another=not relieved)

    def _wait_for_labels(self) -> None:
        """A regime is recognised that labels must confirm (`RecallByLabels`): till then it is a shift."""
        if self._suspicion is not None:
            self._raise_suspicion()
        elif self.cycle.state is State.STABLE:
            onset = self.sequence - WINDOW
            self._open_case("charts", onset)
            self.metrics.alarms.labels("charts").inc()
            self.happen(Event.ALARM, cause="charts", onset=onset)

    def _is_served(self, found: Regime) -> bool:
        """Whether what serves is meant for a recognised regime, or for one whose features look like it."""
        if self.cycle.state is State.PROBATION:
            return True  # it is on trial for the present traffic
        return found.version == self.case.serving or self.regime.version == self.case.serving != found.version

    def _look_while_idle(self) -> None:
        """Without acting, an alarm still ends when the traffic is as before."""
        if self._suspicion is not None:
            self._raise_suspicion()
        elif self.cycle.state is State.STABLE:
            self._notice_departure()
        if self.cycle.state is State.DRIFTED:
            found = self.watch.recognised()
            back = found is not None and found.number == self._feature_regime() and self._is_served(found)
            if found is not None and back and self.case.cause == "charts":
                self.happen(Event.QUIET, regime=found.number)

    def _feature_regime(self) -> int | None:
        """Number of the regime whose features the traffic should have now; None for one not yet known."""
        regime = self.regime
        if self.cycle.state is State.PROBATION:
            if self.target is None:
                return HOME if self.case.kind == "output" else None
            regime = self.target
        return regime.number if regime.fingerprint is not None else HOME

    def labelled(self, rows: list[Labelled]) -> None:
        """Take new labels that are on disk: error test, accuracy gauges, probation.

        Labels we asked for are of uncertain predictions: they say nothing of the error rate.
        """
        case = self.case
        self._labelled_at = self.sequence
        own = [
            r
            for r in rows
            if r.predicted >= 0 and not r.asked and r.version == case.serving and r.sequence >= case.since
        ]
        for row in own:
            wrong = row.label is None or row.label != row.predicted
            alarmed = self.watch.label(row.sequence, wrong, row.confidence if row.version == SOURCE else None)
            if alarmed and self.cycle.state is State.STABLE:
                onset = self.watch.error_onset()
                if self._suspicion is not None:  # the charts saw it first, and see when better
                    onset = self._suspicion.onset
                cause = "labels" if self._suspicion is None else "charts"
                self._open_case(cause, onset)
                self.metrics.alarms.labels("labels").inc()
                self.happen(
                    Event.ALARM, cause="labels", statistic=round(self.watch.label_statistic, 3), onset=onset
                )
        self.probation.take(own)

    def _comparison(self) -> Comparison:
        """What live labels are to compare now."""
        return Comparison(
            self.case.serving,
            self._rival() if self._probing() else None,
            self.case.onset,
            self.acting,
            self._relieved() and self.watch.knows_shift(),
        )

    def _probing(self) -> bool:
        """Whether live labels compare the serving version with the one before."""
        judging = self.cycle.state is State.PROBATION or self._relieved()
        return judging and not self.swapping and self._rival() != self.case.serving

    def _rival(self) -> int:
        """The version that live labels compare the serving one with."""
        proven = self.case.proven
        return proven if proven is not None and self._relieved() else self.case.previous

    # -- time -------------------------------------------------------------------------------------------

    def tick(self) -> None:
        """Whatever depends on counts and time rather than on a message."""
        if self._unfinished and self.servers.ready:
            self._unfinished = False
            if self.case.swap_to is not None:
                self._change(self.case.swap_to, self.case.swap_regime, self.case.swap_reason)
        if self.swapping:
            return
        self.weigh()
        if self.cycle.state is State.DRIFTED and not self.case.proposal:
            have = self.labels.count(self.case.onset)
            if self.acting and self.recall.is_due(self.case, have):
                self.recall.ask(self.case, have, self.next_alpha(), self._recall_by_labels)
            # A restarted daemon has to see the traffic again before it judges it.
            seen = self.watch.n_since() >= WINDOW
            if have >= self.case.wanted and (seen or self.case.forced):
                if self.operation.under_way != "relieve":
                    self._decide_whether_to_adapt(have)
            elif self._is_settled():
                self.happen(Event.SETTLED, labels=have, kind=self.case.kind)
            elif self._may_be_relieved():
                self._seek_relief()
            elif self.case.actionable is False and self.watch.knows_shift() and not self.case.paused:
                if self._p_value_of_harm()[2] <= HARM_P_VALUE:
                    self._act_on_it(cause="labels")
                else:
                    self.happen(Event.HARMLESS, labels=have, kind=self.case.kind)
        elif self.cycle.state is State.PROBATION and self.acting:
            survived = self.probation.survived()
            known = self.target is not None or self.case.kind == "output" or self.watch.knows_shift()
            if survived is not None and known:
                self.happen(Event.CONFIRMED, **survived)
        elif self._is_idle() and self.rehearsals.due():
            self.rehearsals.begin()

    def _is_idle(self) -> bool:
        """Whether nothing is the matter, and what is recalled may be changed."""
        calm = self.cycle.state is State.STABLE and self._suspicion is None and not self.adapter.busy
        return calm and self.acting and self.config.mode == "auto"

    def _decide_whether_to_adapt(self, have: int) -> None:
        n, wrong, p_val = self._p_value_of_harm()
        # Without outcomes of this version nothing is known of its errors: the gate will say.
        errors_up = p_val <= HARM_P_VALUE or n < MIN_OUTCOMES
        self.case.keys = self.watch.find_keys()
        self.diagnosis = self.watch.diagnose(errors_up and self.case.cause != "charts")
        self.case.kind = self.diagnosis.kind
        evidence = {"labels": have, "errors": wrong, "p_val": round(p_val, 6), **asdict(self.diagnosis)}
        if not errors_up and not self.case.forced and self.case.proven is None:
            if self.case.cause != "charts" or not self.watch.knows_shift():
                self.happen(Event.QUIET, **evidence)
            elif self.acting:
                self.happen(Event.HARMLESS, **evidence)
        elif self.acting:
            self.happen(Event.ENOUGH_LABELS, **evidence)

    def _p_value_of_harm(self) -> tuple[int, int, float]:
        """Labelled outcomes since the onset, errors among them, and how likely so many are if all is in order."""
        n, wrong = self.labels.outcomes(self.case.onset, self.case.serving)
        usual = self.regime.accuracy
        if self.case.cause == "charts":  # of traffic unlike the present regime's, more can be asked
            usual = max(usual, self.library.regimes[HOME].accuracy)
        null = min(0.99, max(0.005, 1 - usual + self.config.monitor.error_tolerance))
        return n, wrong, binomial_tail(wrong, n, null)

    def _recall_by_labels(self, regime: Regime | None, verdict: gate.Verdict) -> None:
        """Labels have told which regime it is, or that it is none of those it may be."""
        if self.cycle.state is not State.DRIFTED or not self.acting or self.swapping:
            return
        self.case.looks += 1
        if regime is not None:
            self.case.target = regime.number
            self.happen(Event.KNOWN, regime=regime.number, recalled_version=regime.version, **verdict.fields())

    # -- actions, named as in cycle.Action -----------------------------------------------------------

    def _start_adapter(self) -> None:
        if self.acting:
            self.adapter.start()

    def _adapt(self) -> None:
        suited = self.diagnosis.block if self.diagnosis else ""
        near = {
            f"regime-{r.number}": r.version
            for r in self.watch.nearest_regimes(WARM_STARTS)
            if r.version != self.case.serving
        }
        proven = self.case.serving
        if self.case.proven is not None:
            near["relief"], proven = proven, self.case.proven
        relief = suited if self.config.adapt.label_free != "off" and self.case.kind == "input" else ""
        self.operation.start(self.case.onset, proven, near, suited, relief, self.next_alpha(), self._concluded)

    # -- relief without labels --------------------------------------------------------------------------------

    def _may_be_relieved(self) -> bool:
        """Whether a version may be made without labels now, for the first time or of more images."""
        case = self.case
        return bool(
            self.config.adapt.label_free == "immediate"
            and self.config.mode == "auto"
            and self.acting
            and case.actionable
            and case.cause == "charts"
            and not self.watch.keys
            and self.operation.under_way != "relieve"
            and (
                self.watch.n_since() >= max(MIN_WINDOW, MORE * case.relief)
                or self.labels.n_feedback(case.onset) >= max(MORE_FEEDBACK, MORE * case.feedback)
            )
        )

    def _seek_relief(self) -> None:
        case, onset = self.case, self.case.onset
        window = stack_inputs(self.ledger.since(onset, self.config.adapt.window))
        n_feedback = self.labels.n_feedback(onset)
        more = n_feedback >= max(MORE_FEEDBACK, MORE * case.feedback)
        if window is None or len(window) < (MIN_WINDOW if more else max(MIN_WINDOW, MORE * case.relief)):
            return
        case.relief, case.feedback = len(window), n_feedback
        if self.watch.class_run() > MAX_CLASS_RUN:
            return
        found = self.watch.diagnose(errors_up=False)
        suited = found.block if found.kind == "input" else ""  # others want labels

        def done(version: int, carried: dict[str, float]) -> None:
            open_ = self.cycle.state is State.DRIFTED and case.onset == onset and case.relief != NEVER
            still = open_ and self.acting and not self.swapping
            others = max(carried.get("serving", 0.0), carried.get("source", 0.0))
            if not version:
                return
            if not still or carried["candidate"] <= others:
                self.store.discard(version)
                return
            self.store.amend(
                version, verdict={"outcome": "accepted", "reason": "more information", "information": carried}
            )
            self.case.proposal = version
            self.happen(Event.RELIEVED, candidate=version, images=len(window), information=carried)

        self.operation.relieve(onset, window, case.serving, suited, done)

    def _relieve(self) -> None:
        if self.case.proven is None:
            self.case.proven = self.case.serving
        self._change(self.case.proposal, self.case.regime, RELIEF)

    def _is_settled(self) -> bool:
        """Whether the shift has lasted, relief serves it, and no labels come any more."""
        case = self.case
        quiet = self.sequence - max(self._labelled_at, case.onset) >= self.config.monitor.window
        return self.acting and self._relieved() and not case.forced and quiet and self.watch.knows_shift()

    def _relieved(self) -> bool:
        """Whether what serves was made without labels and nothing has judged it yet."""
        case, deciding = self.case, self.cycle.state in (State.DRIFTED, State.ADAPTING)
        return deciding and case.proven is not None and case.serving not in (SOURCE, case.proven)

    def next_alpha(self) -> float:
        """What the next look at this shift's labels may spend: alpha/2, alpha/4, ... of `gate.alpha`."""
        return float(self.config.gate.alpha * 0.5 ** (self.case.looks + 1))

    def _cancel(self) -> None:
        self.operation.cancel()

    def _concluded(self, conclusion: Conclusion) -> None:
        """The operation under way has ended with a verdict or an error."""
        if self.cycle.state is not State.ADAPTING:
            return
        self.case.forced = False
        if "outcome" in conclusion.evidence:  # only a verdict has used the labels
            self.case.looks += 1
        if conclusion.version:
            self.case.proposal, self.case.accuracy = conclusion.version, conclusion.accuracy
            self.case.gate_labels = conclusion.evidence["n_labels"]
            self.case.target = NEW
            event = Event.PROPOSED if self.config.mode == "propose" else Event.ACCEPTED
            self.happen(event, **conclusion.evidence)
            return
        # Only a part of new labels goes to the gate.
        needed = round(conclusion.gate_labels_needed / (1 - self.config.labels.fit_fraction))
        have = self.labels.count(self.case.onset)
        self.case.wanted = have + max(self.config.adapt.retry_labels, needed)
        if self.case.wanted > self.labels.capacity:  # they would push each other out: start counting anew
            self.case.onset, self.case.wanted = self.sequence, self.config.adapt.labels
        self.happen(Event.NOT_ACCEPTED, wanted=self.case.wanted, **conclusion.evidence)

    def _swap(self) -> None:
        self._change(self.case.proposal, self.case.regime, "promotion")

    def _recall(self) -> None:
        target = self.target
        assert target is not None
        self._suspicion = None
        if target.number == HOME:
            self.record("home_recognised", regime=HOME)
        self._change(target.version, target.number, "recall")

    def _change(self, version: int, regime: int, reason: str) -> None:
        """Start serving another version, then its probation."""
        self.case.proposal = 0
        # On disk before the server is asked: a daemon killed in between finishes the swap.
        self.case.swap_to, self.case.swap_regime, self.case.swap_reason = version, regime, reason
        self.save()
        self.probation.end()
        if version == self.case.serving:
            self._served(version, regime, reason)
            return

        def then(reply: dict[str, Any]) -> None:
            if "error" in reply:
                self.case.swap_to = None
                if self.case.proven == self.case.serving:  # it was relief that was refused
                    self.case.proven = None
                self.metrics.swaps.labels(reason, "refused").inc()
                self.library.forget(self.case.target)
                self.record("swap_refused", refused=version, reason=reason, error=reply["error"])
                if reason == "rollback" and version != SOURCE:
                    self._change(SOURCE, HOME, "rollback")
                else:
                    self.happen(Event.SWAP_FAILED, refused=version)
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
        self.servers.swap(version, folder, then)

    def _served(self, version: int, regime: int, reason: str) -> None:
        """`version` answers from now on."""
        case = self.case
        case.swap_to = None
        if version == case.serving:
            case.previous, case.previous_regime = version, case.regime  # nothing to compare with
        else:
            # What was rolled back is not what one rolls back to.
            case.previous = SOURCE if reason == "rollback" else case.serving
            case.previous_regime = HOME if reason == "rollback" else case.regime
        case.serving, case.regime, case.since = version, regime, self.sequence
        if reason != RELIEF:
            case.proven = None
        self.probation.begin()
        self.metrics.version.set(version)
        self.metrics.regime.set(regime)
        self.record("swapped", reason=reason, serving=version, regime=regime)
        if reason != RELIEF and (self.cycle.state is not State.PROBATION or self.target is not None):
            self.watch.enter(self.regime, self.sequence)
        self.save()

    def _roll_back(self) -> None:
        case, proven = self.case, self.case.proven if self._relieved() else None
        if case.target == case.previous_regime:  # a rehearsed version of the regime that was served anyway
            self.library.update(case.target, version=case.previous)
        elif case.target not in (NEW, HOME):
            # It may still be right for the regime it was made for: this traffic only looked like that one.
            self.watch.excluded.add(case.target)
        case.kind, case.target = "", NEW
        if proven is not None:
            case.relief = NEVER  # labels have spoken against it
            self._change(proven, case.regime, "rollback")
        else:
            self._change(case.previous, case.previous_regime, "rollback")

    def _await_labels(self) -> None:
        have = self.labels.count(self.case.onset)
        if self.case.wanted <= have:
            self.case.wanted = have + self.config.adapt.retry_labels

    def _remember(self) -> None:
        """The served version has proved itself: keep regime and cure."""
        if self.target is not None:
            self.library.update(self.target.number, last_used=self.sequence)
            self.case.regime = self.target.number
        else:
            found = None if self.case.kind == "output" else self.watch.fingerprint()
            self._add_regime(self.case.kind, self._accuracy_of_cure(), found, self.sequence, self.case.keys)
        self.probation.end()
        self.servers.release()
        self.metrics.regime.set(self.case.regime)

    def _accuracy_of_cure(self) -> float:
        """On the gate's labels and on those of its own answers: the gate's alone flatter what they chose."""
        n_gate, accuracy = self.case.gate_labels, self.case.accuracy
        if not n_gate:  # proven under an earlier release
            return accuracy
        n, wrong = self.labels.outcomes(self.case.since, self.case.serving)
        # What gets worse meanwhile must not raise the bar for what would be noticed.
        tolerated = accuracy - self.config.monitor.error_tolerance
        return max(tolerated, (n_gate * accuracy + n - wrong) / (n_gate + n))

    def _measured_accuracy(self) -> float:
        """Of the serving version since the onset; of its regime, less what is accepted, without labels."""
        n, wrong = self.labels.outcomes(self.case.onset, self.case.serving)
        return 1 - wrong / n if n >= MIN_OUTCOMES else self.regime.accuracy - self.config.monitor.accepted_loss

    def _accept_regime(self) -> None:
        """A shift that costs no accuracy, or one the operator accepts: the version stays, the regime is new."""
        accuracy = self._measured_accuracy()
        # What was let pass must not raise the bar for what would be noticed.
        if not self.case.accepted and self.case.proven is None:
            accuracy = max(accuracy, self.regime.accuracy - self.config.monitor.error_tolerance)
        found = None if self.case.cause == "labels" else self.watch.fingerprint()
        self._add_regime(self.case.kind, accuracy, found, self.sequence, self.case.keys, another=True)

    def _watch(self) -> None:
        self.case.cause, self.case.kind, self.case.proposal = "", "", 0
        self.case.target, self._suspicion = NEW, None
        self.case.actionable, self.case.keys = None, ()
        self.watch.excluded.clear()
        self.watch.enter(self.regime, self.sequence)

    def reconcile(self, version: int) -> None:
        """A server says what it serves; if that is not what we believe, make it so, or believe it."""
        if version == self.case.serving or self.servers.swapping or self.case.swap_to is not None:
            return
        self.record("server_version_differs", server=version)

        def then(reply: dict[str, Any]) -> None:
            if "error" in reply:  # our version cannot be served (any more): take the server's word
                self.happen(Event.OPERATOR, reason="refused")
                regimes = [r.number for r in self.library.regimes.values() if r.version == version]
                self._served(version, regimes[0] if regimes else HOME, "refused")
                self._watch()

        try:
            folder = self.store.folder(self.case.serving)
        except NotFoundError as error:
            then({"error": str(error)})
            return
        self.servers.bring_to(self.case.serving, folder, then)

    def begin_anew(self, version: int, reason: str) -> None:
        """The operator has put a version into service: stable from here, in the regime it was made for."""
        regimes = [r.number for r in self.library.regimes.values() if r.version == version]
        left = [r.number for r in self.library.regimes.values() if r.version == self.case.serving]
        self.happen(Event.OPERATOR, reason=reason)
        self.case.attributed = self.sequence
        self._served(version, regimes[0] if regimes else HOME, reason)
        for number in left:  # what the operator leaves is not recalled behind his back
            self.library.forget(number)
        self._watch()
        self.save()

    def open_by_hand(self, onset: int) -> None:
        """The operator says that there is a shift."""
        self._open_case("operator", onset)
        self.metrics.alarms.labels("operator").inc()
        self.happen(Event.ALARM, cause="operator", onset=onset)

    def give_up_adapting(self, why: str) -> None:
        """End an adaptation or rehearsal under way; labels wanted stay as they are."""
        if self.operation.under_way == "rehearse":
            self.operation.cancel()
        if self.cycle.state is State.ADAPTING:
            self.operation.cancel()
            wanted = self.case.wanted
            self.happen(Event.NOT_ACCEPTED, error=why)
            self.case.wanted = wanted

    @property
    def swapping(self) -> bool:
        """Whether a swap is under way, asked for by the cycle, the operator or `reconcile`."""
        return self.servers.swapping or self.case.swap_to is not None
