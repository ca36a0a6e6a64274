"""Between shifts: regimes learn from one another, and each that is proven to gain gets what came of it.

A rehearsal (`tta.adapter.rehearsal`) makes one set of scales and shifts from the images and labels of all regimes,
and of these a candidate for each of them. All candidates together are put before the gate, on labels that nothing
was ever fitted to; then each regime whose own labels do not speak against it is served by its candidate when it
returns. Where `adapt.label_free: immediate` lets versions serve that labels have not proven, it is enough that the
candidates are not behind by a standard error: labels that have once chosen a version speak too well of it for ever
(measured: 15 % errors on them where it made 23 %). If the candidates are behind over all regimes, those may still
gain whose present version no gate has chosen. What was learned is also a start for the next operation.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

from safetensors.numpy import load

from tta.config import Config, GateConfig
from tta.daemon import gate
from tta.daemon.files import read_arrays, read_json, write_arrays, write_json
from tta.daemon.labels import LabelBuffer
from tta.daemon.library import HOME, Library, Regime
from tta.daemon.links import Outputs, ShadowLink
from tta.daemon.operation import SCALES, Operation, arrays_of
from tta.daemon.store import Store
from tta.errors import DamagedError, NotFoundError
from tta.versions import SOURCE

MIN_REGIMES = 2
MIN_IMAGES = 64  # of a regime, to take part
MIN_GATE_LABELS = 8  # of a regime, for its version to be replaced
GROWTH = 1.5  # times the images seen at the last rehearsal, and it is time for the next


@dataclass(frozen=True)
class Hearing:
    """What a regime's candidate, its present version and the source call the images of its gate labels."""

    classes: list[int]  # that they are of
    candidate: list[int]
    serving: list[int]
    source: list[int]
    clients: list[str]  # who gave the labels
    chosen: bool  # whether these labels have chosen the present version

    def right(self) -> tuple[list[bool], list[bool], list[bool]]:
        """Whether candidate, present version and source are right on each."""

        def of(called: list[int]) -> list[bool]:
            return [c == true for c, true in zip(called, self.classes, strict=True)]

        return of(self.candidate), of(self.serving), of(self.source)

    def guard(self, max_drop: float) -> gate.ClassGuard:
        """Of single classes."""
        return gate.ClassGuard(self.classes, self.candidate, self.serving, max_drop)


class Rehearsals:
    """When to rehearse, and what becomes of it. Owned by the daemon's main thread.

    Args:
        record: told (what, evidence) for the log.
    """

    def __init__(
        self,
        config: Config,
        store: Store,
        labels: LabelBuffer,
        library: Library,
        shadow: ShadowLink,
        operation: Operation,
        record: Callable[..., None],
    ) -> None:
        self.config = config
        self.store = store
        self.labels = labels
        self.library = library
        self.shadow = shadow
        self.operation = operation
        self._record = record
        self._judging = False
        self._weights = store.root / "rehearsed.safetensors"
        self._notes = store.root / "rehearsed.json"
        self._n_images = 0  # that had been seen at the last rehearsal
        try:
            notes = read_json(self._notes)
            self._n_images = int(notes.get("n_images", 0))
            usable = bool(notes.get("usable") and read_arrays(self._weights))
        except DamagedError:
            usable = False  # none yet, or damaged: the next one will write both files
        self.operation.rehearsed = self._weights if usable else None

    def _taking_part(self) -> list[Regime]:
        """Regimes of all traffic, known by their features.

        An output-level shift has labels that contradict the others', and of one camera's shift the images kept are
        not only hers.
        """
        known = [r for r in self.library.regimes.values() if r.number != HOME and r.fingerprint is not None]
        return [r for r in known if r.n_images >= MIN_IMAGES and not r.keys]

    def due(self) -> bool:
        """Whether enough has been seen since the last rehearsal, and none is under way."""
        if self.config.adapt.rehearsal == "off" or self.operation.under_way == "rehearse" or self._judging:
            return False
        regimes = self._taking_part()
        seen = sum(r.n_images for r in regimes)
        return len(regimes) >= MIN_REGIMES and seen >= GROWTH * self._n_images

    def begin(self) -> None:
        """Rehearse."""
        regimes, limit = self._taking_part(), self.config.adapt.max_labels
        seen = sum(r.n_images for r in regimes)
        fit = {r.number: arrays_of(self.labels.of_regime(r.number, fit=True, limit=limit)) for r in regimes}
        sound = [r.number for r in regimes if self.library.images(r.number) is not None]
        images = {number: self.library.images_path(number) for number in sound}
        self._record("rehearsal", regimes=sorted(images), labels=sum(len(y) for _, y in fit.values()))

        def done(versions: dict[int, int], learned: bytes) -> None:
            self._n_images = seen
            if not versions:
                self._note(usable=self.operation.rehearsed is not None)
                return
            write_arrays(self._weights, load(learned))
            self._judging = True
            self._hear(versions, list(versions), {})

        self.operation.rehearse(images, fit, done)

    def _note(self, usable: bool) -> None:
        self.operation.rehearsed = self._weights if usable else None
        write_json(self._notes, {"n_images": self._n_images, "usable": usable})

    def _hear(self, versions: dict[int, int], waiting: list[int], heard: dict[int, Hearing]) -> None:
        """Run candidate, present version and source of one regime after the other on its gate labels."""
        while waiting:
            number = waiting.pop()
            regime = self.library.regimes.get(number)
            rows = self.labels.of_regime(number, fit=False, limit=self.config.adapt.max_labels)
            (x, y), gave = arrays_of(rows), [r.client for r in rows]
            if regime is None or len(y) < MIN_GATE_LABELS:
                continue
            try:
                trio = [(v, self.store.folder(v)) for v in (versions[number], regime.version, SOURCE)]
                chosen = self._is_chosen(regime.version)
            except NotFoundError:  # somebody has cleared the store: what is left is judged
                continue

            def then(
                outputs: Outputs | None, number: int = number, y: Any = y, gave: Any = gave, chosen: bool = chosen
            ) -> None:
                if outputs is not None:
                    called = [logits.argmax(axis=1).tolist() for logits, _ in outputs]
                    heard[number] = Hearing(y.tolist(), called[0], called[1], called[2], gave, chosen)
                self._hear(versions, waiting, heard)

            self.shadow.ask(trio, x, then)
            return
        self._judge(versions, heard)

    def _is_chosen(self, version: int) -> bool:
        return version != SOURCE and "n_labels" in self.store.manifest(version).verdict

    def _judge(self, versions: dict[int, int], every: dict[int, Hearing]) -> None:
        self._judging = False
        heard, limited = every, self.labels.labellers().limited
        proof = self.config.adapt.label_free == "off"
        verdict, serves = verdict_of(every.values(), limited, self.config.gate, proof)
        if not serves:
            fresh = {number: hearing for number, hearing in every.items() if not hearing.chosen}
            second, serves = verdict_of(fresh.values(), limited, self.config.gate, proof)
            heard, verdict = (fresh, second) if serves else (every, verdict)
        self.operation.metrics.adaptations.labels(SCALES, verdict.outcome).inc()
        self._note(usable=serves or verdict.outcome != "rejected")
        replaced: dict[str, int] = {}
        for number, version in versions.items():
            own = heard.get(number) if serves and number in self.library.regimes else None
            if own is None or not gains(own, limited, self.config.gate.max_class_drop):
                self.store.discard(version, None if serves else verdict.fields())
                continue
            self.store.amend(version, verdict={**verdict.fields(), "of_regimes": len(heard)})
            candidate, *_ = own.right()
            accuracy = sum(candidate) / len(candidate)
            self.library.update(number, version=version, accuracy=accuracy)
            replaced[str(number)] = version
        self._record("rehearsed", regimes_served=replaced, regimes_judged=sorted(heard), **verdict.fields())


def verdict_of(
    heard: Iterable[Hearing], limited: Iterable[str], config: GateConfig, proof: bool
) -> tuple[gate.Verdict, bool]:
    """On the candidates of several regimes together, and whether it lets them serve.

    Args:
        heard: of each regime.
        limited: clients whose labels must not decide alone.
        config: two verdicts at most share its bound.
        proof: whether candidates have to be proven better; without, it is enough that they are not behind, and
            that no class falls by more than the guard allows.
    """
    every = list(heard)

    def all_of(name: str) -> list[Any]:
        return [each for hearing in every for each in getattr(hearing, name)]

    called = all_of("candidate"), all_of("serving"), all_of("source")
    together = Hearing(all_of("classes"), *called, all_of("clients"), chosen=False)
    candidate, serving, source = together.right()
    clients, guard = together.clients, together.guard(config.max_class_drop)
    verdict = gate.judge(candidate, serving, source, None, config.alpha / 2, guard)
    verdict = gate.without_each(verdict, candidate, serving, source, clients, limited, guard)
    alone = gate.carried_by(candidate, (serving, source), clients, limited)
    unproven = not gate.behind(candidate, serving) and sum(candidate) >= sum(source) and len(candidate) > 0
    unproven = unproven and verdict.worst_class_drop <= config.max_class_drop
    if not proof and unproven and alone is None and verdict.outcome != "accepted":
        return replace(verdict, outcome="accepted", reason="not behind the serving version"), True
    return verdict, verdict.outcome == "accepted"


def gains(own: Hearing, limited: Iterable[str], max_class_drop: float) -> bool:
    """Whether a regime's own labels, also those of all but one client, do not speak against its candidate."""
    candidate, serving, source = own.right()
    if not own.guard(max_class_drop).holds():
        return False
    if gate.carried_by(candidate, (serving, source), own.clients, limited) is not None:
        return False
    return not gate.behind(candidate, serving) and sum(candidate) >= sum(source)
