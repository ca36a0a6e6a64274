"""The verdict on a candidate, from its answers on labels it was not fitted on. No I/O.

`accepted` if the paired exact test against the serving version passes, the candidate's point estimate is not
below the source's nor, by more than a standard error, below the best label-free candidate's, and no class
demonstrably falls by more than is allowed (`ClassGuard`); `rejected` if it is not even better by the point
estimate; otherwise `undecided`, with how many labels it probably needs. Where several clients may label, the same
is asked by the labels of all but each (`without_each`).
"""

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from tta.monitor.accuracy import binomial_tail, more_errors_p_value, paired_p_value

MAX_LABELS = 4096
OTHERS_ALPHA = 0.1  # chance that a candidate which is no better looks better without one client's labels
# A version does as well as in its regime unless so few right answers are so unlikely of one that is by the margin
# less accurate: both accuracies are known from few labels. Of 100 cures right on 80 % that a gate of 16 labels
# chose, 8 are not recognised by 64 labels (19 by the margin alone), but of those right on 60 % 36 are (14): see
# `bench.recall`.
AS_WELL_MARGIN, AS_WELL_P_VALUE = 0.1, 0.2
Rate = tuple[int, int]  # answers that were called right or wrong, and wrong
CLASS_ALPHA = 0.05  # a class's fall must be more than chance to count, at this level


@dataclass(frozen=True)
class Verdict:
    """Outcome of the gate, with every number it rests on.

    Attributes:
        n_labels: gate labels used.
        p_val: exact one-sided p that the candidate is no better than the serving version.
        labels_needed: for `undecided`: more gate labels that would probably decide.
        worst_class: that falls most against the serving version, beyond chance; None if none does.
        worst_class_drop: by how much, in [0, 1], as `ClassGuard` counts it: less false calls.
        recall_class: whose plain accuracy falls most, beyond chance; None if none does. No veto.
        recall_drop: by how much, in [0, 1].
        anchor: accuracy on the clean anchor images by version: "candidate", "serving" and "source". Never a
            veto: a cure of a strong shift may be bad on clean images, and home is recognised and recalled.
    """

    outcome: Literal["accepted", "rejected", "undecided"]
    reason: str
    n_labels: int
    p_val: float
    alpha: float
    accuracy_candidate: float
    accuracy_serving: float
    accuracy_source: float
    accuracy_label_free: float | None
    labels_needed: int = 0
    worst_class: int | None = None
    worst_class_drop: float = 0.0
    recall_class: int | None = None
    recall_drop: float = 0.0
    anchor: dict[str, float] = field(default_factory=dict)

    def fields(self) -> dict[str, Any]:
        """As plain numbers for manifests, logs and the wire."""
        return {k: round(v, 6) if isinstance(v, float) else v for k, v in asdict(self).items()}


@dataclass(frozen=True)
class ClassGuard:
    """What a single class may lose for the sake of the others.

    A class's accuracy is counted less the share of other classes' images that are called it (informedness: Youden,
    Index for rating diagnostic tests, Cancer 1950). A network that under a shift calls everything a 9 is right on
    every 9, and when it is cured no 9 is lost that was recognised.

    Attributes:
        classes: true class of each label.
        candidate: class that the candidate calls it.
        serving: class that the version in service calls it.
        max_drop: what a class may lose, in [0, 1].
    """

    classes: Sequence[int]
    candidate: Sequence[int]
    serving: Sequence[int]
    max_drop: float

    def of(self, rows: Sequence[int]) -> "ClassGuard":
        """The same on some of the labels, by their places."""
        classes, candidate, serving = ([e[i] for i in rows] for e in (self.classes, self.candidate, self.serving))
        return ClassGuard(classes, candidate, serving, self.max_drop)

    def falls(self) -> list[tuple[int, float, float]]:
        """Classes whose losses outnumber their gains by more than chance.

        Returns:
            For each the class, how much of its accuracy is lost, in (0, 1], and how much of its accuracy less
            false calls, in [-1, 1].
        """
        n, both = Counter(self.classes), list(zip(self.classes, self.candidate, self.serving, strict=True))
        gains = Counter(true for true, new, old in both if new == true != old)
        losses = Counter(true for true, new, old in both if new != true == old)
        false_calls = Counter(old for true, _, old in both if old != true)
        false_calls.subtract(new for true, new, _ in both if new != true)
        found = []
        for k in sorted(losses):
            if binomial_tail(losses[k], losses[k] + gains[k], 0.5) <= CLASS_ALPHA:
                lost = (losses[k] - gains[k]) / n[k]
                found.append((k, lost, min(1.0, lost - false_calls[k] / max(1, len(both) - n[k]))))
        return found

    def holds(self) -> bool:
        """Whether no class falls by more than it may."""
        return all(drop <= self.max_drop for _, _, drop in self.falls())


def judge(
    candidate: Sequence[bool],
    serving: Sequence[bool],
    source: Sequence[bool],
    label_free: Sequence[bool] | None,
    alpha: float,
    guard: ClassGuard | None = None,
) -> Verdict:
    """Judge a candidate.

    Args:
        candidate: for each gate label, whether the candidate is right.
        serving: the same for the version in service.
        source: the same for the source model.
        label_free: the same for the best candidate made without labels, if there is one and it is not this one.
        alpha: chance of accepting a candidate that is no better.
        guard: of single classes; none by default.
    """
    n = len(candidate)
    if n == 0:
        return Verdict("undecided", "no gate labels yet", 0, 1.0, alpha, 0.0, 0.0, 0.0, None, 16)
    p_val = paired_p_value(candidate, serving)
    accuracies = [sum(c) / n if c is not None else None for c in (candidate, serving, source, label_free)]
    own, now, home, free = accuracies
    assert own is not None
    assert now is not None
    assert home is not None
    outcome: Literal["accepted", "rejected", "undecided"] = "rejected"
    reason, needed = "", 0
    falls = guard.falls() if guard else []
    worst, _, drop = max(falls, key=lambda fall: fall[2], default=(None, 0.0, 0.0))
    of, lost, _ = max(falls, key=lambda fall: fall[1], default=(None, 0.0, 0.0))
    if drop <= 0:
        worst, drop = None, 0.0
    if own <= now:
        reason = "no better than the serving version"
    elif own < home:
        reason = "below the source model"
    elif label_free is not None and behind(candidate, label_free):
        reason = "below the candidate made without labels"
    elif guard and drop > guard.max_drop:
        reason = f"class {worst} falls by {100 * drop:.0f} points, false calls counted"
    elif p_val <= alpha:
        outcome, reason = "accepted", "better than the serving version"
    else:
        outcome, reason = "undecided", "better, but it may be chance"
        needed = _labels_needed(candidate, serving, alpha)
    return Verdict(outcome, reason, n, p_val, alpha, own, now, home, free, needed, worst, drop, of, lost)


def without_each(
    verdict: Verdict,
    candidate: Sequence[bool],
    serving: Sequence[bool],
    source: Sequence[bool],
    clients: Sequence[str],
    limited: Iterable[str],
    guard: ClassGuard | None = None,
) -> Verdict:
    """The verdict, unless it rests on the labels of one client.

    What is accepted has to be better by everybody else's labels too, though less surely so (`OTHERS_ALPHA`): who
    may label may not decide alone what is served.

    Args:
        verdict: on all labels.
        candidate: see `judge`.
        serving: see `judge`.
        source: see `judge`.
        clients: who gave each label.
        limited: clients that have to be left out in turn.
        guard: see `judge`.
    """
    for client, rest in _left_out(clients, limited):
        if verdict.outcome != "accepted":
            break
        own, now, home = ([each[i] for i in rest] for each in (candidate, serving, source))
        others = judge(own, now, home, None, OTHERS_ALPHA, guard.of(rest) if guard else None)
        if others.outcome != "accepted":
            needed = round(others.labels_needed * (len(clients) / len(rest) if rest else 1))
            reason = f"by the labels of all but client {client!r}: {others.reason}"
            verdict = replace(verdict, outcome=others.outcome, reason=reason, labels_needed=needed)
    return verdict


def compare_rates(new: Rate, old: Rate, without: Iterable[Sequence[Rate]]) -> tuple[float, float]:
    """Is one version called wrong more often than another, or less, each on its own images?

    Args:
        new: of the one, how many answers were called right or wrong, and how many wrong.
        old: the same of the other.
        without: the same of both by everybody but one client, for each that has to be left out: nobody condemns a
            version, or confirms it, alone.

    Returns:
        p-values of "more often" and of "less often"; 1.0 where the rest do not say so too (`OTHERS_ALPHA`).
    """
    p_worse, p_better = _more_wrong(new, old), _more_wrong(old, new)
    for rest, rest_old in without:
        if _more_wrong(rest, rest_old) > OTHERS_ALPHA:
            p_worse = 1.0
        if _more_wrong(rest_old, rest) > OTHERS_ALPHA:
            p_better = 1.0
    return p_worse, p_better


def _more_wrong(one: Rate, other: Rate) -> float:
    return more_errors_p_value(one[1], one[0], other[1], other[0])


def carried_by(
    candidate: Sequence[bool], others: Sequence[Sequence[bool]], clients: Sequence[str], limited: Iterable[str]
) -> str | None:
    """The client without whose labels a candidate is below another version by more than a standard error.

    Args:
        candidate: for each label, whether the candidate is right.
        others: the same for the versions it must not be below.
        clients: who gave each label.
        limited: clients that have to be left out in turn.

    Returns:
        The first of them; None if there is none.
    """
    for client, rest in _left_out(clients, limited):
        if any(behind([candidate[i] for i in rest], [other[i] for i in rest]) for other in others):
            return client
    return None


def does_as_well(right: Sequence[bool], accuracy: float) -> bool:
    """Whether a version does on these labels what it did in its regime, as far as so few can tell.

    Args:
        right: for each label, whether the version is right.
        accuracy: of the version in its regime, in [0, 1].
    """
    error_rate = min(0.99, 1 - accuracy + AS_WELL_MARGIN)
    return binomial_tail(list(right).count(False), len(right), error_rate) > AS_WELL_P_VALUE


def _left_out(clients: Sequence[str], limited: Iterable[str]) -> Iterator[tuple[str, list[int]]]:
    """Each client that has to be left out, and which labels are the others'."""
    for client in sorted(set(clients).intersection(limited)):
        yield client, [i for i, name in enumerate(clients) if name != client]


def behind(candidate: Sequence[bool], other: Sequence[bool]) -> bool:
    """Whether a candidate is below another by more than a standard error of their difference."""
    wins, losses = _wins_and_losses(candidate, other)
    return losses - wins > math.sqrt(wins + losses)


def _wins_and_losses(candidate: Sequence[bool], other: Sequence[bool]) -> tuple[int, int]:
    """On how many labels only the candidate is right, and on how many only the other."""
    pairs = list(zip(candidate, other, strict=True))
    return sum(c and not o for c, o in pairs), sum(o and not c for c, o in pairs)


def _labels_needed(candidate: Sequence[bool], serving: Sequence[bool], alpha: float) -> int:
    """More labels until the test passes if wins and losses go on in the present proportion."""
    n = len(candidate)
    wins, losses = _wins_and_losses(candidate, serving)
    total = n
    while total < MAX_LABELS:
        total += max(8, total // 8)
        more_wins, more_losses = round(wins * total / n), round(losses * total / n)
        if binomial_tail(more_wins, more_wins + more_losses, 0.5) <= alpha:
            break
    return total - n
