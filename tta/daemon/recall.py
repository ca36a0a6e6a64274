"""Which known regime do the labels since a shift speak for?

Features tell most regimes apart. Labels tell those that have no features of their own (the meaning of the classes
changed, or changed back), and with `library.recall: confirm` all of them.
"""

from collections.abc import Callable

from tta.config import Config
from tta.daemon import gate
from tta.daemon.case import Case
from tta.daemon.labels import LabelBuffer
from tta.daemon.library import HOME, Library, Regime
from tta.daemon.links import Outputs, ShadowLink
from tta.daemon.operation import arrays_of
from tta.daemon.store import Store
from tta.daemon.watch import Watch

FIRST_LABELS = 8  # for a first attempt; then twice as many
CANDIDATES = 4  # regimes tried, the last used first
NEAREST = 2  # of those like the present traffic


class RecallByLabels:
    """Asks the shadow for the answers of what known regimes are served by. Owned by the daemon's main thread."""

    def __init__(
        self,
        config: Config,
        store: Store,
        labels: LabelBuffer,
        library: Library,
        watch: Watch,
        shadow: ShadowLink,
    ) -> None:
        self._config = config
        self._store = store
        self._labels = labels
        self._library = library
        self._watch = watch
        self._shadow = shadow
        self._next = FIRST_LABELS
        self._asking = False

    def begin(self) -> None:
        """Another shift."""
        self._next = FIRST_LABELS

    def is_due(self, case: Case, n_labels: int) -> bool:
        """Whether labels may tell the regime of this shift, and there are enough for the next attempt."""
        may = case.cause == "labels" or self._config.library.recall == "confirm"
        return may and not self._asking and n_labels >= self._next

    def ask(
        self, case: Case, n_labels: int, alpha: float, then: Callable[[Regime | None, gate.Verdict], None]
    ) -> None:
        """Try the regimes that it may be.

        Args:
            case: the present shift.
            n_labels: labels there are of it.
            alpha: chance of recognising one whose version is no better than the serving one.
            then: told which regime it is, or None, and the verdict on the best of those tried; not called if there
                is none to try, or the shadow cannot answer.
        """
        self._next = 2 * n_labels
        candidates = self._candidates(case)
        limit = self._config.adapt.max_labels
        rows = [r for fit in (True, False) for r in self._labels.select(case.onset, fit, limit)]
        if not candidates or not rows:
            return
        x, y = arrays_of(rows)
        versions = [(v, self._store.folder(v)) for v in (case.serving, *(r.version for r in candidates))]
        limited = self._labels.labellers().limited
        self._asking, onset = True, case.onset

        def judge(outputs: Outputs | None) -> None:
            self._asking = False
            if outputs is None or case.onset != onset:  # of a shift that is over
                return
            called = [logits.argmax(axis=1) for logits, _ in outputs]
            serving, *rights = [(each == y).tolist() for each in called]
            best = max(range(len(rights)), key=lambda i: sum(rights[i]))
            regime, right = candidates[best], rights[best]
            allowed = self._config.gate.max_class_drop
            guard = gate.ClassGuard(y.tolist(), called[1 + best].tolist(), called[0].tolist(), allowed)
            verdict = gate.judge(right, serving, right, None, alpha / len(candidates), guard)
            clients = [r.client for r in rows]
            verdict = gate.without_each(verdict, right, serving, right, clients, limited, guard)
            still = regime.number in self._library.regimes
            known = still and verdict.outcome == "accepted" and gate.does_as_well(right, regime.accuracy)
            then(regime if known else None, verdict)

        self._shadow.ask(versions, x, judge)

    def _candidates(self, case: Case) -> list[Regime]:
        alike = set[int]()
        if case.cause == "labels":
            alike |= {n for n, r in self._library.regimes.items() if r.fingerprint is None or n == HOME}
        if case.cause != "labels" or self._config.library.recall == "confirm":
            alike |= {r.number for r in self._watch.nearest_regimes(NEAREST)}
        others = [r for n, r in self._library.regimes.items() if n in alike and r.version != case.serving]
        return sorted(others, key=lambda r: -r.last_used)[:CANDIDATES]
