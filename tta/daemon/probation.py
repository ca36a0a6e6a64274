"""What live labels say of the version in service: how often it is right, and whether its rival is better."""

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tta.config import Config
from tta.daemon import gate
from tta.daemon.cycle import Event
from tta.daemon.labellers import PairedTests
from tta.daemon.labels import LabelBuffer, Labelled, image_hash
from tta.daemon.links import Outputs, ShadowLink
from tta.daemon.metrics import Metrics
from tta.daemon.operation import arrays_of
from tta.daemon.store import Store
from tta.versions import SOURCE

ACCURACY_WINDOW = 100  # labels in the accuracy gauges
FIRST_RATES = 16  # outcomes of a version after which feedback first judges it; then of twice as many


@dataclass(frozen=True)
class Comparison:
    """What live labels are to compare now.

    Attributes:
        serving: version in service.
        rival: that it is compared with; None if it is with none.
        onset: place of the stream from which their answers count.
        acting: whether the rival may be taken back.
        provable: whether the serving version was made without labels, so that they may prove it yet.
    """

    serving: int
    rival: int | None
    onset: int
    acting: bool
    provable: bool


class Probation:
    """Judges the version in service from its first label on. Owned by the daemon's main thread.

    Args:
        comparison: what is to be compared, asked anew whenever labels or answers come.
        happen: told `disagreed` or `confirmed` with the evidence.
    """

    def __init__(
        self,
        config: Config,
        store: Store,
        labels: LabelBuffer,
        shadow: ShadowLink,
        metrics: Metrics,
        comparison: Callable[[], Comparison],
        happen: Callable[..., bool],
    ) -> None:
        self._config = config
        self._store = store
        self._labels = labels
        self._shadow = shadow
        self._metrics = metrics
        self._comparison = comparison
        self._happen = happen
        self._paired = self._fresh_tests()
        self._rates_at, self._rate_looks = FIRST_RATES, 0
        self._began: float | None = None  # monotonic seconds
        self._right: dict[str, deque[bool]] = {m: deque(maxlen=ACCURACY_WINDOW) for m in ("serving", "source")}

    def begin(self) -> None:
        """A version has come into service: nothing is known of it."""
        self._paired = self._fresh_tests()
        self._rates_at, self._rate_looks = FIRST_RATES, 0
        for right in self._right.values():
            right.clear()
        self.go_on()

    def go_on(self) -> None:
        """The time runs (again)."""
        self._began = time.monotonic()

    def end(self) -> None:
        """The version in service is proven, or about to be replaced."""
        self._began = None

    def survived(self) -> dict[str, Any] | None:
        """Evidence that the version has lasted long enough, or had labels enough; None before that."""
        if self._began is None:
            return None
        n_labels, seconds = self._paired.all.n_labels, time.monotonic() - self._began
        long_enough = seconds >= self._config.gate.probation_s
        if n_labels < self._config.gate.probation_labels and not long_enough:
            return None
        return {"labels": n_labels, "seconds": round(seconds, 3)}

    def accuracy(self) -> dict[str, float]:
        """Of serving and source on the last labels of this version's service."""
        return {m: round(sum(right) / len(right), 4) for m, right in self._right.items() if right}

    def take(self, rows: Sequence[Labelled]) -> None:
        """Take new labels of answers of the version in service that nobody asked for."""
        pair = self._comparison()
        for row in rows:
            right = row.label is not None and row.label == row.predicted
            self._right["serving"].append(right)
            if pair.serving == SOURCE:
                self._right["source"].append(right)
        if pair.rival is not None and any(row.feedback for row in rows):
            self._compare_rates(pair)
            pair = self._comparison()  # it may be decided
        with_image = [row for row in rows if row.x is not None and row.label is not None and not row.feedback]
        if with_image and (pair.serving != SOURCE or pair.rival is not None):
            self._compare(with_image, pair)
        for model, share in self.accuracy().items():
            self._metrics.accuracy.labels(model).set(share)

    def _compare(self, rows: list[Labelled], pair: Comparison) -> None:
        """Run source and rival on live labels."""
        x, y = arrays_of(rows)
        asked = [SOURCE, *([] if pair.rival is None else [pair.rival])]

        def then(outputs: Outputs | None) -> None:
            now = self._comparison()
            if outputs is None or now.serving != pair.serving:
                return
            right = [logits.argmax(axis=1) == y for logits, _ in outputs]
            if now.serving != SOURCE:
                self._right["source"].extend(bool(r) for r in right[0])
            if pair.rival is None or now.rival is None:
                return
            for row, rival_right in zip(rows, right[1], strict=True):
                assert row.x is not None
                self._paired.update(row.client, image_hash(row.x), row.label == row.predicted, bool(rival_right))
            if self._paired.disagrees and now.acting:
                both = self._paired.all
                self._happen(
                    Event.DISAGREED,
                    labels=both.n_labels,
                    new_only=both.new_only,
                    previous_only=both.previous_only,
                )

        self._shadow.ask([(version, self._store.folder(version)) for version in asked], x, then)

    def _compare_rates(self, pair: Comparison) -> None:
        """How often were serving version and rival called wrong, each on its own samples of the shift?

        Feedback does not say what another version should have answered, so the two cannot be paired. Every answer
        counts, also for an image that came before.
        """
        assert pair.rival is not None
        onset, versions = pair.onset, (pair.serving, pair.rival)
        new, old = (self._labels.outcomes(onset, version) for version in versions)
        if new[0] < self._rates_at or not old[0] or not pair.acting:
            return
        self._rates_at, self._rate_looks = 2 * new[0], self._rate_looks + 1
        spent = 0.5**self._rate_looks  # all looks together spend no more than the whole
        evidence = {"answers": new[0], "wrong": new[1], "previous_answers": old[0], "previous_wrong": old[1]}
        without = [
            tuple(self._labels.outcomes(onset, version, client) for version in versions)
            for client in self._labels.labellers().limited
        ]
        p_worse, p_better = gate.compare_rates(new, old, without)
        if p_worse <= spent * self._config.gate.rollback_alpha:
            self._happen(Event.DISAGREED, p_val=round(p_worse, 6), **evidence)
        elif pair.provable and p_better <= spent * self._config.gate.alpha:
            verdict = {"outcome": "accepted", "reason": "called wrong less often", "p_val": p_better, **evidence}
            self._store.amend(pair.serving, verdict=verdict)
            self._happen(Event.CONFIRMED, p_val=round(p_better, 6), **evidence)

    def _fresh_tests(self) -> PairedTests:
        return PairedTests(self._config.gate.rollback_alpha, self._labels.labellers().limited)
