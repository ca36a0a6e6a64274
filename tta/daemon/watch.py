"""Turn features and labels into findings: alarms, recognised regimes, rising errors. No I/O.

The charts and fingerprints always see the source model's features, whatever version serves.
"""

import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from tta.bundle import Bundle
from tta.config import MonitorConfig
from tta.daemon.calibrations import reference_of
from tta.daemon.library import HOME, Library, Regime
from tta.monitor.accuracy import ConfidenceModel, ErrorDetector
from tta.monitor.calibration import Calibration
from tta.monitor.charts import Alarm, Array
from tta.monitor.diagnosis import Diagnosis, diagnose
from tta.monitor.history import History, Samples
from tta.monitor.monitor import HISTORY, DriftMonitor
from tta.monitor.reference import confidence
from tta.monitor.regimes import LONG, LOOKS, WINDOW, Fingerprint, fingerprint, recognise
from tta.monitor.sources import ASTRAY, Sources
from tta.monitor.stickiness import REPEATS, SEGMENT, Stickiness, class_run, measure

CHECK_EVERY = 4  # samples between two looks at which regime this is
MIN_PRINTED = 256  # samples that make a fingerprint to be kept
MIN_SHAPE = 64  # samples that make one to see whether the traffic is still the same
UNSURE = 48  # samples after the estimated onset that may be of before
MOVED = 16  # samples that are compared with it
OUTLIERS = 2  # of those, left out: where a shift has heavy tails, one sample is far from all others for four looks
MOVED_LOOKS = 2  # in a row that must find them elsewhere
FAR = 1.25  # times its threshold that `LONG` samples are away if not of a regime: none of 7,000 windows of its own
MIN_CLASS_RUN = 24  # samples in which runs of a class are looked for before they are learned from
CHANGES, CHANGES_WITHIN = 3, 256  # changes of regime in so many samples make a mixture
SILENT_SAMPLES = 4096  # of others, after which a key has gone
HUGE = 1e30  # features beyond this are no features


@dataclass(frozen=True)
class Finding:
    """An alarm.

    Attributes:
        sequence: place of its sample in the stream.
        onset: place at which the charts were last quiet.
        elsewhere: it was raised by traffic that the present regime, being one of other keys, says nothing of.
    """

    alarm: Alarm
    sequence: int
    onset: int
    elsewhere: bool


@dataclass(frozen=True)
class Loss:
    """Accuracy the source model is thought to have lost, judged by its own confidence.

    Attributes:
        accuracy: predicted, in [0, 1].
        points: of accuracy less than on the reference, in [-1, 1].
        error: standard error of `points`.
    """

    accuracy: float
    points: float
    error: float


class Watch:
    """The monitor of one daemon. Owned by its main thread."""

    def __init__(self, bundle: Bundle, calibration: Calibration, config: MonitorConfig, library: Library) -> None:
        arrays = bundle.reference
        self.reference = reference_of(bundle)
        self.layout = self.reference.layout
        self.config = config
        self.library = library
        self.sources = Sources()
        self.monitor = DriftMonitor(
            self.reference,
            calibration,
            adaptive=config.stickiness is None,
            capacity=max(2 * config.window, HISTORY),
        )
        self.confidence_model = ConfidenceModel(self.reference)
        self.n_watched = 0
        self.n_refused = 0
        self.n_thinned = 0
        self._newest = -1  # place of the newest sample
        self.excluded: set[int] = set()  # regimes that the present traffic is not, whatever it looks like
        for regime in library.regimes.values():
            for key in regime.keys:
                self.sources.number(key)
        self._cut = float(arrays["cut"][0])
        self._entered: deque[int] = deque(maxlen=CHANGES)  # places at which the last regimes began
        self.regime = library.regimes[HOME]
        self._loadings = {name: arrays[f"loadings.{name}"] for name in self.layout.names}
        self.enter(library.regimes[HOME], 0)

    def enter(self, regime: Regime, sequence: int) -> None:
        """Watch traffic as being in `regime` from `sequence` on."""
        if regime.number != self.regime.number:
            self._entered.append(sequence)
        self.regime = regime
        self.expect(regime)
        null = 1 - regime.accuracy + self.config.error_tolerance
        # Two tests share the bound.
        self.errors = ErrorDetector(null, 2 * self.config.label_arl)
        self.residuals = ErrorDetector(null, 2 * self.config.label_arl)
        self._error_sequences: deque[int] = deque(maxlen=512)
        self._judged_from = sequence  # a label that comes late is of the traffic before
        self.look_from(sequence)

    def expect(self, regime: Regime) -> None:
        """Let the charts compare with a regime: its own keys with its fingerprint, all others with home."""
        self._expected = regime
        at_home = regime.number == HOME or regime.fingerprint is None
        mine = self.sources.numbers(regime.keys) if regime.keys else None
        self.monitor.enter(None if at_home else regime.fingerprint, mine)
        self._watch_others()

    def _watch_others(self) -> None:
        """Where the present regime is one of some keys, the others have charts of their own, against home."""
        self._others: DriftMonitor | None = None
        if self._expected.keys:
            self._others = DriftMonitor(self.reference, self.monitor.calibration, adaptive=False)
            self._others.enter(None, self.sources.numbers(self._expected.keys), others=True)

    def look_from(self, sequence: int) -> None:
        """Recognise regimes only from samples at or after `sequence`."""
        self._since = sequence
        self._unchecked = 0
        self._shape: Fingerprint | None = None  # of the first samples of the shift
        self._moved_at, self._moving, self._left_at = 0, 0, 0
        self.restrict(self._expected.keys)

    def restrict(self, keys: tuple[str, ...]) -> None:
        """Judge the present shift by the samples of these keys; by all for none."""
        self.keys = keys
        self._own: History | None = None
        if keys:
            # However rare they are among all: a history of their own.
            self._own = History(self.layout.n_features, len(self.reference.prior), self.monitor.history.capacity)
            self._own.append(self.sources.of(self.monitor.history.since(self._since), keys))

    def forget_silent_keys(self) -> bool:
        """Stop waiting for keys that have sent nothing for long; True if there were any."""
        if self._own is None or not self.keys:
            return False
        seen = self._own.newest(1).sequences
        if self._newest - (int(seen[0]) if len(seen) else self._since) < SILENT_SAMPLES:
            return False
        self.restrict(())
        return True

    @property
    def arl(self) -> float:
        """Samples between two false alarms."""
        return self.monitor.calibration.arl

    def features(self, sequences: Sequence[int], features: Array, logits: Array, sources: Array) -> Finding | None:
        """Take source features of observed samples in order.

        Samples that are not finite are refused and counted, and what is too much from one key is left out.

        Args:
            sequences: place of each in the stream.
            features: (N, D) whitened, of the source.
            logits: (N, K) of the source.
            sources: (N,) key numbers, see `Sources.number`.

        Returns:
            The first alarm among them.

        Raises:
            InputError: features of another length.
        """
        places = np.asarray(sequences, np.int64)
        if not math.isfinite(features.sum() + logits.sum()):
            finite = (np.abs(features) < HUGE).all(axis=1) & (np.abs(logits) < HUGE).all(axis=1)
            self.n_refused += int((~finite).sum())
            features, logits, places, sources = features[finite], logits[finite], places[finite], sources[finite]
        if len(places) and places[0] <= self._newest:  # late, by way of the shadow: their place has been judged
            late = places <= self._newest
            features, logits, places, sources = features[~late], logits[~late], places[~late], sources[~late]
        taken = self.sources.admit(sources)
        if taken is not None and not taken.all():
            self.n_thinned += int((~taken).sum())
            features, logits, places, sources = features[taken], logits[taken], places[taken], sources[taken]
        if not len(features):
            return None
        predictions = logits.argmax(axis=1)
        w = self.reference.residuals(features, predictions)
        self._unchecked += len(w)
        self.n_watched += len(w)
        self._newest = int(places[-1])
        samples = Samples(w, predictions, logits, places, sources)
        alarm = self.monitor.update(samples)
        if self._own is not None:
            self._own.append(self.sources.of(samples, self.keys))
        if alarm is not None:
            return self._finding(alarm, int(places[alarm.index]), self.monitor, False)
        if self._others is None:
            return None
        alarm = self._others.update(samples)
        if alarm is None or self.monitor.wanted is not None:  # near-copies may explain it: see `recalibrated`
            return None
        return self._finding(alarm, int(places[alarm.index]), self._others, True)

    def _finding(self, alarm: Alarm, sequence: int, monitor: DriftMonitor, elsewhere: bool) -> Finding:
        """An alarm with its place; the lag is counted in the samples that its charts judged."""
        judged = monitor.judged(monitor.history.newest(monitor.history.capacity)).sequences
        at = int(np.searchsorted(judged, sequence))
        onset = int(judged[max(0, at - alarm.lag)]) if len(judged) else sequence
        return Finding(alarm, sequence, onset, elsewhere)

    def recalibrated(self, calibration: Calibration) -> Finding | None:
        """Go on with other thresholds.

        Returns:
            The alarm that remembered samples raise with them, if any.
        """
        alarm = self.monitor.recalibrated(calibration)
        self._watch_others()
        if alarm is None:
            return None
        sequence = int(self.monitor.history.newest(1 - alarm.index).sequences[0])
        return self._finding(alarm, sequence, self.monitor, False)

    def recognised(self) -> Regime | None:
        """The regime of the newest samples, if they are clearly of one; looked for every few samples."""
        if self._unchecked < CHECK_EVERY:
            return None
        self._unchecked = 0
        every = self.monitor.history.since(self._since)
        self._take_shape(self._since_look(self.monitor.history.capacity))
        home = self.library.regimes[HOME].fingerprint
        inflation = self._inflation(every)
        astray = self.sources.shifted(every[-4 * WINDOW :], home, inflation) if home is not None else ()
        regimes, candidates = [], []
        for regime in self.library.regimes.values():
            keys = regime.keys or self.keys
            window = self._since_look(LONG) if keys == self.keys else self.sources.of(every, keys)[-LONG:]
            # Home on average is not home if one camera has shifted: whom the regime does not name is at home.
            named = set(astray) <= set(keys)
            if regime.fingerprint is not None and named and regime.number not in self.excluded:
                regimes.append(regime)
                candidates.append((regime.fingerprint, window.w))
        present = [i for i, r in enumerate(regimes) if r.number == self.regime.number]
        # Traffic in which regimes change within a few samples is a mixture, not one of them.
        mixed = len(self._entered) == CHANGES and self._newest - self._entered[0] < CHANGES_WITHIN
        least = WINDOW if mixed else LOOKS[0]
        shift = None if self._shape is None else (self._shape, self._since_look(LONG).w)
        found = recognise(candidates, inflation, present[0] if present else None, least, shift)
        return None if found is None else regimes[found]

    def _inflation(self, every: Samples) -> float:
        """What chance is to be multiplied by: as the thresholds have it, if these samples bear it out."""
        if self.monitor.inflation <= 1:
            return 1.0
        newest = every[-SEGMENT:]
        repeat, _ = measure(newest.w, newest.predictions, 0)  # asked too often for more than a first impression
        return min(self.monitor.inflation, Stickiness(min(repeat, REPEATS[-1])).inflation)

    def nearest_regimes(self, n: int) -> list[Regime]:
        """The cured regimes that the samples since the last `look_from` are most like, the nearest first."""
        window = self._since_look(WINDOW)
        if not len(window):
            return []
        prints = {r.number: r.fingerprint for r in self.library.regimes.values() if r.version}
        far = {k: f.distance(window.w) / f.threshold for k, f in prints.items() if f is not None}
        return [self.library.regimes[k] for k in sorted(far, key=lambda k: far[k])[:n]]

    def find_keys(self) -> tuple[str, ...]:
        """Which keys the present shift concerns; empty for all. Kept until the next `look_from`."""
        expected = self._expected.fingerprint or self.library.regimes[HOME].fingerprint
        if expected is not None and not self.keys:
            since = self.monitor.history.since(self._since)
            found = self.sources.shifted(since, expected, self.monitor.inflation)
            if found:
                self.restrict(found)
        return self.keys

    def _since_look(self, n: int) -> Samples:
        """The newest samples of the shifted keys since the last `look_from`, at most n."""
        history = self.monitor.history if self._own is None else self._own
        return history.since(self._since)[-n:]

    def n_since(self) -> int:
        """How many samples of the shifted keys are remembered since the last `look_from`."""
        return len(self._since_look(self.monitor.history.capacity))

    def knows_shift(self) -> bool:
        """Whether enough samples have been seen since the last `look_from` for a fingerprint."""
        return self.n_since() >= self._printed + self._unsure

    def fingerprint(self, until: int | None = None) -> Fingerprint | None:
        """Of the samples since the last `look_from`; None until there are enough.

        Args:
            until: place in the stream of the first sample that no longer belongs.
        """
        found = self._since_look(self.monitor.history.capacity)
        if until is not None:
            found = found[slice(0, int(np.searchsorted(found.sequences, until)))]
        # A few samples of the traffic before would widen the print in just the direction that tells the two apart.
        found = found[min(self._unsure, max(0, len(found) - self._printed)) :][-self.config.window :]
        return fingerprint(found.w, found.predictions) if len(found) >= self._printed else None

    @property
    def _printed(self) -> int:
        """Samples that make a fingerprint."""
        return min(self.config.window, MIN_PRINTED)

    @property
    def _unsure(self) -> int:
        """Samples after the estimated onset that are left out of it."""
        return min(UNSURE, self._printed // 4)

    def moved_on(self) -> int | None:
        """Has the traffic left the shift that began at the last `look_from` for another?

        Returns:
            Place in the stream from which the newest samples no longer look like the first ones; None if they do.
        """
        if self._newest - self._moved_at < CHECK_EVERY:
            return None
        self._moved_at = self._newest
        since = self._since_look(self.monitor.history.capacity)
        if len(since) < MIN_SHAPE + MOVED:
            return None
        self._take_shape(since)
        assert self._shape is not None
        newest = since[-MOVED:]
        inflation = self._inflation(since)
        typical = self._shape.without_outliers(newest.w, OUTLIERS)
        moving = self._shape.distance(typical, inflation) > ASTRAY * self._shape.threshold
        self._moving = self._moving + 1 if moving else 0
        if self._moving >= MOVED_LOOKS:
            return int(newest.sequences[0])
        after = since[self._shape.n_samples :]
        return (
            None if self._distance_of_many(self._shape, after, inflation) <= 1 else _departure(self._shape, after)
        )

    def _take_shape(self, since: Samples) -> None:
        """What the first samples of the shift look like, once there are enough; anew of twice as many."""
        older = since[:-MOVED][: self.config.window]
        grown = self._shape is None or (len(older) >= 2 * self._shape.n_samples and not self._moving)
        if grown and len(older) >= MIN_SHAPE:
            self._shape = fingerprint(older.w, older.predictions)

    def left(self) -> Finding | None:
        """Has the traffic left the present regime for one so near that no chart has seen it?

        Charts of a regime have wide thresholds, for its scale is known from a few hundred samples; the mean of
        many samples says surely.
        """
        known = self.regime.fingerprint
        if self.regime.number == HOME or known is None or self._newest - self._left_at < CHECK_EVERY:
            return None
        self._left_at = self._newest
        since = self._since_look(2 * LONG)
        statistic = self._distance_of_many(known, since, self._inflation(since))
        if statistic <= 1:
            return None
        onset = _departure(known, since)
        deviation = (since[-LONG:].w.mean(axis=0) - known.mean) / np.sqrt(known.variance)
        block = self.layout.names[int(self.layout.squares(deviation).argmax())]
        lag = len(since) - int(np.searchsorted(since.sequences, onset))
        return Finding(Alarm(0, lag, block, statistic, "fingerprint"), self._newest, onset, False)

    @staticmethod
    def _distance_of_many(known: Fingerprint, samples: Samples, inflation: float) -> float:
        """Of the newest `LONG` samples, in units of what is surely too far; 0 if there are fewer."""
        if len(samples) < LONG:
            return 0.0
        return known.distance(samples[-LONG:].w, inflation) / (FAR * known.threshold)

    def diagnose(self, errors_up: bool) -> Diagnosis:
        """What kind of shift the samples since the last `look_from` show."""
        return diagnose(
            self._since_look(WINDOW).w,
            self.layout,
            self._cut,
            errors_up,
            self.monitor.classes.drift_detected,
            self._loadings,
            self.monitor.inflation,
        )

    def class_run(self) -> float:
        """Mean length of runs of one predicted class in the samples since the last `look_from`."""
        return class_run(self._since_look(self.config.window).predictions, MIN_CLASS_RUN)

    def predicted_loss(self) -> Loss:
        """How much accuracy the source is thought to have lost on the samples since the last `look_from`."""
        found = self._since_look(self.config.window)
        n = max(1, len(found))
        accuracy = self.confidence_model.predicted_accuracy(confidence(found.logits)) if len(found) else 0.0
        error = math.sqrt(max(accuracy * (1 - accuracy), 1 / (4 * n)) / n * self.monitor.inflation)
        return Loss(accuracy, self.confidence_model.accuracy - accuracy, error)

    def label(self, sequence: int, error: bool, confidence: float | None) -> bool:
        """Take one labelled outcome of the serving version; one of before the last `enter` says nothing of now.

        Args:
            sequence: place of the sample in the stream.
            error: was the prediction wrong?
            confidence: of the source model that made it; None for another version.

        Returns:
            Whether a test on labels alarms.
        """
        if sequence < self._judged_from:
            return False
        self._error_sequences.append(sequence)
        self.errors.update(error)
        # What errors the confidence admits was learned at home: elsewhere it may be surer than right.
        if confidence is not None and self.regime.number == HOME:
            self.residuals.update(
                error, self.confidence_model.error_rate(confidence) + self.config.error_tolerance
            )
        return self.errors.drift_detected or self.residuals.drift_detected

    @property
    def label_statistic(self) -> float:
        """The larger of the two label tests over its threshold."""
        return max(self.errors.statistic, self.residuals.statistic)

    def error_onset(self) -> int:
        """Place in the stream where labelled errors began to rise."""
        detector = self.errors if self.errors.drift_detected else self.residuals
        back = min(max(1, detector.labels_since_onset), len(self._error_sequences))
        return min(list(self._error_sequences)[-back:])

    def state(self) -> dict[str, Array]:
        """What `load_state` needs to go on after a restart."""
        found = {f"monitor.{k}": v for k, v in self.monitor.state().items()}
        for name, detector in (("errors", self.errors), ("residuals", self.residuals)):
            found.update({f"{name}.{k}": v for k, v in detector.state().items()})
        thresholds = self.monitor.calibration
        found["of"] = np.array([self.regime.number, thresholds.arl, *vars(thresholds.stickiness).values()], float)
        return found

    def load_state(self, state: Mapping[str, Array]) -> bool:
        """Go on from `state()`; False if it is of another regime or other thresholds, and nothing is changed."""
        own = self.state()
        if {k: v.shape for k, v in own.items()} != {k: v.shape for k, v in state.items()}:
            return False  # of another release
        if not np.array_equal(state["of"], own["of"]):
            return False

        def part(name: str) -> dict[str, Array]:
            return {k.removeprefix(name + "."): v for k, v in state.items() if k.startswith(name + ".")}

        self.monitor.load_state(part("monitor"))
        self.errors.load_state(part("errors"))
        self.residuals.load_state(part("residuals"))
        return True


def _departure(known: Fingerprint, samples: Samples) -> int:
    """Place in the stream from which samples are most clearly no longer of a regime.

    That which makes the likelihood ratio of another mean from there on largest (Siegmund and Venkatraman, 1995).
    """
    total = np.cumsum((samples.w - known.mean)[::-1] @ known.whitening.T, axis=0)
    evidence = np.square(total).sum(axis=1) / np.arange(1, len(total) + 1)
    return int(samples.sequences[len(samples) - 1 - int(evidence.argmax())])


def calibrated_for(state: Mapping[str, Array]) -> Stickiness | None:
    """The stickiness that thresholds were for when `Watch.state` was saved."""
    if "of" not in state:
        return None
    *_, repeat, class_run = state["of"].tolist()
    return Stickiness(repeat, int(class_run))
