"""The drift monitor of one stream: charts, histogram, slow tier, and how sticky the traffic is."""

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from tta.monitor.calibration import Calibration
from tta.monitor.charts import Alarm, Array, ClassHistogram, DriftCharts
from tta.monitor.conformal import ConformalDetector, stride
from tta.monitor.history import History, Samples
from tta.monitor.reference import Reference
from tta.monitor.regimes import Fingerprint
from tta.monitor.stickiness import MIN_SAMPLES, Stickiness, measure, nearest

REGIME_SLACK = 3.0  # a regime's own scale is known from a few hundred samples only
HISTORY = 1024  # samples remembered
FIRST = 16  # samples after a start before anything is an alarm
MEASURE_EVERY = 2048  # samples between two measurements of the stickiness
MEASURED = 512  # samples it is measured on in passing
BEFORE = 64  # samples before an alarm's onset that are measured, apart from those since
HYSTERESIS = 0.1  # of a repeat: thresholds should not change to and fro
NOISE = 0.8  # over √n: by which a repeat measured on n samples may be off


class DriftMonitor:
    """Takes residuals in order and says when they are no longer what is usual. Owned by one thread.

    An alarm that near-copies in the traffic explain is held back: `wanted` then says for which stickiness
    thresholds are needed, and with them (`recalibrated`) the monitor judges the same samples again.

    Args:
        reference: of the model.
        calibration: thresholds.
        regime: watch deviations from this fingerprint; from the reference by default.
        adaptive: measure the stickiness; else the calibration's stands.
        capacity: samples remembered.
    """

    def __init__(
        self,
        reference: Reference,
        calibration: Calibration,
        regime: Fingerprint | None = None,
        adaptive: bool = True,
        capacity: int = HISTORY,
    ) -> None:
        self.reference = reference
        self.adaptive = adaptive
        self.wanted: Stickiness | None = None
        self.history = History(reference.layout.n_features, len(reference.prior), capacity)
        self._unmeasured = 0
        self._sources: Array | None = None
        self._others = False
        self._use(calibration, regime)

    def _use(self, calibration: Calibration, regime: Fingerprint | None) -> None:
        self.calibration, self.regime = calibration, regime
        layout = self.reference.layout
        if regime is None:
            self.charts = DriftCharts(layout, calibration.thresholds)
        else:
            thresholds = calibration.thresholds * REGIME_SLACK
            self.charts = DriftCharts(layout, thresholds, regime.mean, np.sqrt(regime.variance))
        # Histogram and slow tier know the reference only: in another regime they rest.
        self.classes = ClassHistogram(self.reference.prior, calibration.class_thresholds)
        self.conformal = ConformalDetector(
            self.reference, calibration.conformal_arl, stride(calibration.stickiness.repeat)
        )
        self.n_samples = 0
        self._over = False  # whether the last update raised an alarm

    def enter(self, regime: Fingerprint | None, sources: Array | None = None, others: bool = False) -> None:
        """Watch another regime from now on.

        Args:
            regime: what the traffic should look like; the reference by default.
            sources: key numbers the charts judge; all by default. The history remembers every sample.
            others: judge all but these.
        """
        self._sources, self._others = sources, others
        self._use(self.calibration, regime)

    def reset(self) -> None:
        """Start all charts anew."""
        self._use(self.calibration, self.regime)

    @property
    def inflation(self) -> float:
        """Variance of a mean of this traffic, in units of independent samples."""
        return self.calibration.stickiness.inflation

    def update(self, samples: Samples) -> Alarm | None:
        """Take samples in order.

        Returns:
            The first alarm among them, unless their stickiness explains it.
        """
        self.history.append(samples)
        n = len(samples)
        self._unmeasured += n
        alarm = self._judge(samples)
        if not self.adaptive:
            return alarm
        if alarm is not None and len(self.history) < FIRST:
            return None  # too few to tell a shift from one picture shown again and again; the charts stay over
        new, self._over = alarm is not None and not self._over, alarm is not None
        if alarm is not None and new and self.wanted is None:
            self._excuse(alarm.lag + n - alarm.index)
        elif self._unmeasured >= MEASURE_EVERY:
            self._unmeasured = 0
            self._measure_in_passing()
        return None if self.wanted is not None and not self.calibration.stickiness.covers(self.wanted) else alarm

    def _judge(self, samples: Samples) -> Alarm | None:
        self.n_samples += len(samples)
        if self._sources is None:
            return self._chart(samples.w, samples.predictions)
        mine = np.flatnonzero(self._is_judged(samples))
        alarm = self._chart(samples.w[mine], samples.predictions[mine]) if len(mine) else None
        return None if alarm is None else replace(alarm, index=int(mine[alarm.index]))

    def judged(self, samples: Samples) -> Samples:
        """Those samples that the charts judge."""
        return samples if self._sources is None else samples[self._is_judged(samples)]

    def _is_judged(self, samples: Samples) -> Array:
        assert self._sources is not None
        return np.isin(samples.sources, self._sources, invert=self._others)

    def _chart(self, w: Array, predictions: Array) -> Alarm | None:
        alarm = self.charts.update(w)
        if self.regime is None:
            self.classes.update(predictions)
            index = self.conformal.update(w)
            if index is not None and (alarm is None or index < alarm.index):
                name = self.reference.layout.names[self.conformal.block]
                return Alarm(index, self.conformal.span, name, self.conformal.statistic, "conformal")
        return alarm

    def _excuse(self, since: int) -> None:
        """Were the last `since` samples, or those before, stickier than the thresholds are for?

        Each by itself: across a change, far samples differ more than near ones, as copies would make them.
        """
        recent = self.history.newest(since + BEFORE)
        # So few of them, of two pictures say, that a part tells nothing.
        parts = (recent[:-since], recent[-since:]) if len(recent) >= 2 * FIRST else (recent,)
        for part in parts:
            if len(part) >= MIN_SAMPLES:
                self._want(*measure(part.w, part.predictions), len(part))

    def _measure_in_passing(self) -> None:
        """Are the thresholds right for how sticky the last samples were?"""
        recent = self.history.newest(MEASURED)
        if len(recent) < MEASURED:
            return
        repeat, class_run = measure(recent.w, recent.predictions)
        self._want(repeat, class_run, MEASURED)
        less = nearest(repeat + HYSTERESIS, class_run * (1 + HYSTERESIS))
        now = self.calibration.stickiness
        if self.wanted is None and less != now and now.covers(less):
            self.wanted = less

    def _want(self, repeat: float, class_run: float, n: int) -> None:
        """Ask for thresholds for this stickiness, measured on n samples, if the present ones do not cover it."""
        found = nearest(repeat - NOISE / np.sqrt(n), class_run)
        now = self.wanted or self.calibration.stickiness
        if not now.covers(found):
            self.wanted = Stickiness(max(now.repeat, found.repeat), max(now.class_run, found.class_run))

    def recalibrated(self, calibration: Calibration) -> Alarm | None:
        """Go on with these thresholds, as if they had been in use all along.

        Returns:
            The alarm that the remembered samples raise with them, if any, unless they are stickier still; its
            index counts back from the newest sample (0 is the newest, -1 the one before).
        """
        stickier = not self.calibration.stickiness.covers(calibration.stickiness)
        n, state = min(len(self.history), self.n_samples), self.state()
        self.wanted = None
        self._use(calibration, self.regime)
        if not stickier or not n:
            self.load_state(state)
            return None
        alarm = self._judge(self.history.newest(n))
        if alarm is None:
            return None
        if self.adaptive:  # measured on few samples, stickiness may have been thought too small
            self._over = True
            self._excuse(alarm.lag + n - alarm.index)
        return None if self.wanted is not None else replace(alarm, index=alarm.index + 1 - n)

    def state(self) -> dict[str, Array]:
        """What `load_state` needs to go on where this left off; flat, for a file."""
        parts = {"charts": self.charts.state(), "classes": self.classes.state()}
        parts["conformal"] = self.conformal.state()
        found = {f"{part}.{name}": value for part, values in parts.items() for name, value in values.items()}
        return {**found, "n_samples": np.array([self.n_samples])}

    def load_state(self, state: Mapping[str, Array]) -> None:
        """Go on from `state()` of a monitor with the same reference, calibration and regime."""

        def part(name: str) -> dict[str, Array]:
            return {k.partition(".")[2]: v for k, v in state.items() if k.startswith(name + ".")}

        self.charts.load_state(part("charts"))
        self.classes.load_state(part("classes"))
        self.conformal.load_state(part("conformal"))
        self.n_samples = int(state["n_samples"][0])
