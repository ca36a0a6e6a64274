"""Choose where to start and what to tune, from the fit labels alone.

1. Starts (source, normalisation re-estimated in several ways, serving, remembered versions) are scored as they
   are: no label has been fitted yet, so their accuracy on the fit labels is honest. Among those within one
   standard error of the best it is the one whose predictions on the unlabelled window carry most information:
   many images order what few labels cannot.
2. Blocks are ranked: the diagnosis' first, then by relative gradient norm.
3. Block × learning rate compete by successive halving (Jamieson and Talwalkar, AISTATS 2016): all of them in a
   short fit judged by one fold of the labels. If the first in rank is best, that is it; else the best rate of the
   best few blocks is judged by every fold, and among those within one standard error of the best the first in rank
   wins (the one-standard-error rule of Breiman et al., CART, 1984): few labels order blocks badly, and the
   diagnosis has seen many more samples.
4. The winner is tuned on all fit labels, with the unlabelled window beside them. Unless the start has learned
   before (its parameters, not only its statistics, differ from the source's) and tuning has not beaten it by a
   standard error: few labels rather spoil what many have made.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from time import monotonic
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tta.adapter.criteria import relative_gradient_norm
from tta.adapter.methods import Anatomy, Rates, block_plans, every_block, method_plans
from tta.adapter.patient import Patient, State
from tta.adapter.starts import information_of
from tta.adapter.surgery import WINDOW_SHARE, Plan, adapt
from tta.adapter.views import Labels, Views, views_for
from tta.config import METHODS, SELECTIONS
from tta.errors import AdaptationError

Progress = Callable[[str, int, int], None]
SHORT, LONG = 0.25, 0.5  # of the epochs: fits of the first rung; of the second, and with the window
WINDOW_PASSES = 3  # over the unlabelled images, at least
TRUSTED_LABELS = 128  # whose loss weighs half


@dataclass(frozen=True)
class Settings:
    """The part of the configuration that the race needs; see `configs/default.yaml`."""

    selection: str
    n_blocks: int
    folds: int
    epochs: int
    batch_size: int
    learning_rates: tuple[float, ...]
    head_learning_rates: tuple[float, ...]
    augment: tuple[str, ...]
    unlabelled: float
    budget_s: float
    memory_bytes: int
    seed: int

    def fit(self) -> Plan:
        """What every plan has in common."""
        return Plan("", (), 0.0, epochs=self.epochs, batch_size=self.batch_size, seed=self.seed)

    def is_over(self, began: float) -> bool:
        """Whether the budget is spent, counted from these monotonic seconds."""
        return monotonic() - began > self.budget_s

    def check_time(self, began: float) -> None:
        """Raise where the budget is spent.

        Raises:
            AdaptationError: it is.
        """
        if self.is_over(began):
            raise AdaptationError(f"adapt.budget_s = {self.budget_s:g} s is too short for one candidate")

    def rates(self) -> Rates:
        """To try."""
        return Rates(tuple(self.learning_rates), tuple(self.head_learning_rates))


@dataclass(frozen=True)
class Result:
    """The candidate.

    Attributes:
        state: its weights.
        block: what was tuned: a block or a method; "" if the start is the candidate as it is.
        start: where it began.
        report: every score.
    """

    state: State
    block: str
    start: str
    report: dict[str, Any] = field(default_factory=dict)


class Race:
    """One choice and the fit that follows it.

    Args:
        patient: the network.
        starts: name to weights; "source" is among them.
        anatomy: its blocks.
        labels: to fit.
        window: (M, C, H, W) unlabelled images in [0, 1], or None.
        suited: block the diagnosis names; "" if it names none.
        settings: see there.
        progress: told (what, done, of).
        began: monotonic seconds from which the budget counts; None: now.
    """

    def __init__(
        self,
        patient: Patient,
        starts: Mapping[str, State],
        anatomy: Anatomy,
        labels: Labels,
        window: Tensor | None,
        suited: str,
        settings: Settings,
        progress: Progress,
        began: float | None = None,
    ) -> None:
        self.patient = patient
        self.starts = starts
        self.anatomy = anatomy
        self.labels = labels
        self.window = window
        self.suited = suited
        self.settings = settings
        self.progress = progress
        self.start = ""
        self.information: dict[str, float] = {}  # nats that a start's predictions on the window carry
        self._named = torch.nonzero(labels.named)[:, 0]
        self._began = monotonic() if began is None else began
        self._views: dict[str, Views] = {}
        self._longest = 0.0  # seconds of a fit of all epochs on one fold, of the slowest plan so far

    def run(self) -> Result:
        """Find the best candidate.

        Raises:
            AdaptationError: one class only, an unknown block, or no time for a single candidate.
        """
        classes = torch.unique(self.labels.y[self._named])
        if len(classes) < 2:
            raise AdaptationError(f"all {len(self._named)} labels are of one class: nothing can be told apart")
        scores = self._choose_start()
        order, rgn = self._order()
        plans = self._entrants(order)
        rungs = self._rungs(plans)
        winner = rungs[-1][0] if rungs else plans[0]
        self.progress("fit", len(plans), len(plans) + 1)
        self.patient.load(self.starts[self.start])
        last = self._with_window(winner, scores[self.start])
        best = max((entry["accuracy"] for entry in (rungs[-1][1] if rungs else ())), default=1.0)
        enough = self.settings.selection == "race" and self._is_enough(scores[self.start], best)
        if not enough:
            everything = torch.arange(len(self.labels), device=self.patient.device)
            source = self.starts["source"]
            adapt(self.patient.model, self._views_of(winner), everything, last, self._in_time, source)
        report = {
            "starts": {name: round(score, 4) for name, score in scores.items()},
            "information": {name: round(nats, 4) for name, nats in self.information.items()},
            "rgn": {name: round(value, 6) for name, value in rgn.items()},
            "race": [entry for _, entries in rungs for entry in entries],
            "learning_rate": winner.learning_rate,
            "n_fit": len(self.labels),
            "epochs": last.epochs,
            "label_weight": round(last.label_weight, 4),
            "unlabelled_weight": round(last.unlabelled, 4),
            "seconds": round(monotonic() - self._began, 3),
        }
        self.progress("fit", len(plans) + 1, len(plans) + 1)
        return Result(self.patient.state(), "" if enough else winner.name, self.start, report)

    def _is_enough(self, accuracy: float, tuned: float) -> bool:
        """Whether the start has learned before, and tuning it is not clearly better on held-out labels."""
        start, source = self.starts[self.start], self.starts["source"]
        learned = any(not torch.equal(start[n], source[n]) for n, _ in self.patient.model.named_parameters())
        return learned and tuned <= accuracy + _standard_error(accuracy, len(self._named))

    def _choose_start(self) -> dict[str, float]:
        """Set `start` and `information`; the accuracy of each start on the fit labels."""
        scores = {}
        for name, state in self.starts.items():
            self.patient.load(state)
            scores[name] = self.patient.accuracy(self.labels.images[self._named], self.labels.y[self._named])
        if self.window is not None:
            self.information = information_of(self.patient, self.starts, self.window)
        best = max(scores.values())
        within = best - _standard_error(best, len(self._named))
        alike = [name for name, score in scores.items() if score >= within]
        self.start = max(alike, key=lambda name: (self.information.get(name, 0.0), scores[name]))
        return scores

    def _with_window(self, plan: Plan, accuracy: float) -> Plan:
        """The plan with the unlabelled window beside the labels.

        Few labels are soon learned by heart, so they weigh less, and it is the window that says how long to go on.
        Its images are trusted as far as the start is right: their predictions are what the network learns from.
        """
        if self.window is None or not self.settings.unlabelled:
            return plan
        n = len(self.labels)
        steps_an_epoch = math.ceil(n / plan.batch_size)
        steps = WINDOW_PASSES * len(self.window) / (WINDOW_SHARE * plan.batch_size)
        return replace(
            plan,
            unlabelled=self.settings.unlabelled * accuracy,
            label_weight=n / (n + TRUSTED_LABELS),
            epochs=max(round(plan.epochs * LONG), math.ceil(steps / steps_an_epoch)),
        )

    def _order(self) -> tuple[list[str], dict[str, float]]:
        """Blocks, the likeliest first, and their RGN at the start."""
        self.patient.load(self.starts[self.start])
        x = self.patient.normalise(self.labels.images[self._named])
        rgn = relative_gradient_norm(self.patient.model, x, self.labels.y[self._named], self.anatomy.tensors)
        ranked = sorted(rgn, key=lambda name: (name != self.suited, -rgn[name]))
        return ranked, rgn

    def _entrants(self, order: Sequence[str]) -> list[Plan]:
        s, anatomy = self.settings, self.anatomy
        if s.selection in METHODS:
            return method_plans(anatomy, s.selection, s.rates(), s.fit())
        if s.selection == "diagnosis" and self.suited in anatomy.tensors:
            return block_plans(anatomy, self.suited, s.rates(), s.fit())
        if s.selection in ("race", "cross-validate", "diagnosis"):
            return every_block(anatomy, order, s.rates(), s.fit())
        if s.selection not in anatomy.tensors:
            known = ", ".join((*SELECTIONS, *anatomy.tensors))
            raise AdaptationError(f"adapt.selection = {s.selection!r}: write one of {known}")
        return block_plans(anatomy, s.selection, s.rates(), s.fit())

    def _rungs(self, plans: list[Plan]) -> list[tuple[Plan, list[dict[str, Any]]]]:
        """Winner and scores of each rung; empty where there is nothing to choose."""
        named = self._named.cpu().numpy()
        y = self.labels.y.cpu().numpy()[named]
        folds = [named[fold] for fold in stratified_folds(y, self.settings.folds, self.settings.seed)]
        if len(plans) == 1:
            return []
        if self.settings.selection != "race":
            return [self._rung(plans, folds, 1.0)[:2]]
        first = self._rung(plans, folds[:1], SHORT)
        finalists = self._finalists(first[2])
        if max(first[2], key=lambda plan: first[2][plan]) is finalists[0]:
            return [(finalists[0], first[1])]  # the short fits agree with the rank
        return [first[:2], self._rung(finalists, folds, LONG)[:2]]

    def _finalists(self, scores: Mapping[Plan, float]) -> list[Plan]:
        """The best rate of each of the best blocks, in the order of rank; the first in rank is always one."""
        best: dict[str, Plan] = {}
        for plan, score in scores.items():
            if plan.name not in best or score > scores[best[plan.name]]:
                best[plan.name] = plan
        first, *others = best.values()
        others.sort(key=lambda plan: -scores[plan])
        chosen = {first, *others[: self.settings.n_blocks - 1]}
        return [plan for plan in best.values() if plan in chosen]

    def _rung(
        self, plans: Sequence[Plan], folds: Sequence[Any], share: float
    ) -> tuple[Plan, list[dict[str, Any]], dict[Plan, float]]:
        """Compare plans with a share of the epochs on folds held out; the winner, all scores, and by plan."""
        scores: dict[Plan, float] = {}
        held = sum(map(len, folds))
        for i, plan in enumerate(plans):
            self.progress("race" if share < 1 else "cross-validation", i, len(plans) + 1)
            if scores and self._late(share, len(folds)):
                break
            began = monotonic()
            scores[plan] = self._cross_validate(replace(plan, epochs=max(1, round(plan.epochs * share))), folds)
            self._longest = max(self._longest, (monotonic() - began) / share / len(folds))
        best = max(scores.values())
        within = best - _standard_error(best, held)
        winner = next(p for p, accuracy in scores.items() if accuracy >= within)
        rung = {"epochs": max(1, round(self.settings.epochs * share)), "folds": len(folds)}
        entries = [
            {"block": p.name, "learning_rate": p.learning_rate, "accuracy": round(a, 4), **rung}
            for p, a in scores.items()
        ]
        return winner, entries, scores

    def _in_time(self, done: float) -> None:
        self.settings.check_time(self._began)

    def _late(self, share: float, n_folds: int) -> bool:
        """Whether one more comparison would leave no time for the final fit (with the window: twice a fit)."""
        elapsed = monotonic() - self._began
        return elapsed + self._longest * (share * n_folds + 4) > self.settings.budget_s

    def _cross_validate(self, plan: Plan, folds: Sequence[Any]) -> float:
        """Mean accuracy on held-out labels; 0 for a plan that diverges."""
        views = self._views_of(plan)
        labels, right, n = self.labels, 0.0, 0
        for held in folds:
            mask = np.ones(len(labels), bool)
            mask[held] = False
            fit = torch.from_numpy(np.flatnonzero(mask)).to(self.patient.device)
            rest = torch.from_numpy(held).to(self.patient.device)
            self.patient.load(self.starts[self.start])
            n += len(rest)
            try:
                adapt(self.patient.model, views, fit, plan, self._in_time, self.starts["source"])
            except AdaptationError:
                if plan.learning_rate <= 0 or self.settings.is_over(self._began):
                    raise
                continue
            right += self.patient.accuracy(labels.images[rest], labels.y[rest]) * len(rest)
        return right / max(1, n)

    def _views_of(self, plan: Plan) -> Views:
        """Stored once for all plans of a block, since all have the same start."""
        if plan.name not in self._views:
            self.patient.load(self.starts[self.start])
            cut = self.anatomy.cut_before(plan.name) if plan.name in self.anatomy.tensors else None
            s = self.settings
            memory = s.memory_bytes // (len(self.anatomy.tensors) - 1)  # the first block stores nothing
            self._views[plan.name] = views_for(
                self.patient, self.labels, self.window, s.augment, cut, memory, s.seed
            )
        return self._views[plan.name]


def _standard_error(accuracy: float, n: int) -> float:
    return float((max(accuracy * (1 - accuracy), 1e-4) / n) ** 0.5)


def stratified_folds(y: Any, k: int, seed: int) -> list[Any]:
    """Split indices into k folds with about the same classes in each."""
    rng = np.random.default_rng(seed)
    shuffled = rng.permutation(len(y))
    order = shuffled[np.argsort(y[shuffled], kind="stable")]
    return [order[i::k] for i in range(min(k, len(y)))]
