"""Choose where to start and which block to tune, from the fit labels alone.

1. Starts (source, normalisation re-estimated, serving, a remembered version) are scored as they are: no label has
   been fitted yet, so their accuracy on the fit labels is honest.
2. Blocks are ranked: the diagnosis' first, then by relative gradient norm; the first few compete.
3. Block × learning rate are compared by stratified k-fold. Among those within one standard error of the best the
   first in rank wins (the one-standard-error rule of Breiman et al., CART, 1984): few labels order blocks badly,
   and the diagnosis has seen many more samples. The winner is tuned on all fit labels.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from time import monotonic
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tta.adapter.criteria import relative_gradient_norm
from tta.adapter.surgery import Patient, Plan, State, adapt
from tta.errors import AdaptationError

Progress = Callable[[str, int, int], None]


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
    budget_s: float
    seed: int


@dataclass(frozen=True)
class Result:
    """The candidate.

    Attributes:
        state: its weights.
        block: tuned; "" if the start alone was best.
        start: where it began.
        report: every score.
    """

    state: State
    block: str
    start: str
    report: dict[str, Any] = field(default_factory=dict)


def race(
    patient: Patient,
    starts: Mapping[str, State],
    blocks: Mapping[str, tuple[str, ...]],
    images: Tensor,
    y: Tensor,
    suited: str,
    settings: Settings,
    progress: Progress,
) -> Result:
    """Find the best candidate.

    Args:
        patient: the network.
        starts: name to weights; "source" is among them.
        blocks: name to tensors, the head last.
        images: (N, C, H, W) in [0, 1], the fit labels' images.
        y: (N,) int64.
        suited: block the diagnosis names; "" if it names none.
        settings: see there.
        progress: told (what, done, of).

    Raises:
        AdaptationError: one class only, an unknown block, or no time for a single candidate.
    """
    began = monotonic()
    if len(torch.unique(y)) < 2:
        raise AdaptationError(f"all {len(y)} labels are of one class: nothing can be told apart")

    # 1. Where to start.
    scores = {}
    for name, state in starts.items():
        patient.load(state)
        scores[name] = patient.accuracy(images, y)
    start = max(scores, key=lambda name: scores[name])

    # 2. Which blocks compete.
    patient.load(starts[start])
    rgn = relative_gradient_norm(patient.model, patient.normalise(images), y, blocks)
    ranked = sorted(blocks, key=lambda name: -rgn[name])
    chosen = _competitors(settings, ranked, suited, blocks)
    head = list(blocks)[-1]
    plans = [
        Plan(b, blocks[b], lr, settings.epochs, settings.batch_size, settings.augment, settings.seed)
        for b in chosen
        for lr in (settings.head_learning_rates if b == head else settings.learning_rates)
    ]

    # 3. Compare them on labels they were not tuned on.
    folds = stratified_folds(y.cpu().numpy(), settings.folds, settings.seed)
    results: dict[Plan, float] = {}
    for i, plan in enumerate(plans):
        progress("race", i, len(plans) + 1)
        elapsed = monotonic() - began
        if results and elapsed + 2 * elapsed / len(results) > settings.budget_s:
            break  # keep time for the final fit
        if len(plans) > 1:
            results[plan] = _cross_validate(patient, starts[start], images, y, plan, folds)
        else:
            results[plan] = scores[start]
    best = max(results.values())
    winner = next(p for p, accuracy in results.items() if accuracy >= best - _standard_error(best, len(y)))
    if monotonic() - began > settings.budget_s:
        raise AdaptationError(f"adapt.budget_s = {settings.budget_s:g} s is too short for one candidate")

    # 4. Fit the winner on all labels, unless the start itself is clearly better. The comparison is unfair to the
    # winner, which had fewer labels, and the gate compares the two again on other labels.
    progress("fit", len(plans), len(plans) + 1)
    patient.load(starts[start])
    block = ""
    if len(plans) == 1 or results[winner] >= scores[start] - 2 * _standard_error(scores[start], len(y)):
        adapt(patient, images, y, winner)
        block = winner.block
    report = {
        "starts": {name: round(score, 4) for name, score in scores.items()},
        "rgn": {name: round(value, 6) for name, value in rgn.items()},
        "race": [
            {"block": p.block, "learning_rate": p.learning_rate, "accuracy": round(a, 4)}
            for p, a in results.items()
        ],
        "n_fit": len(y),
        "seconds": round(monotonic() - began, 3),
    }
    progress("fit", len(plans) + 1, len(plans) + 1)
    return Result(patient.state(), block, start, report)


def _standard_error(accuracy: float, n: int) -> float:
    return float((max(accuracy * (1 - accuracy), 1e-4) / n) ** 0.5)


def _competitors(settings: Settings, ranked: list[str], suited: str, blocks: Mapping[str, Any]) -> list[str]:
    if settings.selection in blocks:
        return [settings.selection]
    if settings.selection == "diagnosis" and suited in blocks:
        return [suited]
    if settings.selection not in ("race", "diagnosis"):
        raise AdaptationError(
            f"adapt.selection = {settings.selection!r}: write race, diagnosis or one of {', '.join(blocks)}"
        )
    first = [suited] if suited in blocks else []
    return (first + [b for b in ranked if b != suited])[: settings.n_blocks]


def stratified_folds(y: Any, k: int, seed: int) -> list[Any]:
    """Split indices into k folds with about the same classes in each."""
    rng = np.random.default_rng(seed)
    shuffled = rng.permutation(len(y))
    order = shuffled[np.argsort(y[shuffled], kind="stable")]
    return [order[i::k] for i in range(min(k, len(y)))]


def _cross_validate(
    patient: Patient, start: State, images: Tensor, y: Tensor, plan: Plan, folds: list[Any]
) -> float:
    """Mean held-out accuracy. As many epochs as the final fit gets: fewer would favour high learning rates."""
    right = 0.0
    for held in folds:
        mask = np.ones(len(y), bool)
        mask[held] = False
        fit = torch.from_numpy(np.flatnonzero(mask)).to(patient.device)
        rest = torch.from_numpy(held).to(patient.device)
        patient.load(start)
        try:
            adapt(patient, images[fit], y[fit], plan)
        except AdaptationError:  # this learning rate diverges: it cannot win
            continue
        right += patient.accuracy(images[rest], y[rest]) * len(held)
    return right / len(y)
