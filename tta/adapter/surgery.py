"""Fine-tune chosen tensors of a network with few labels and, beside them, unlabelled images. No I/O; seeded.

One procedure serves surgery on a block and everything it is compared with; a `Plan` says what may change and how
fast. Normalisation statistics stay as they are throughout, as they will when serving.

Source: Lee et al., Surgical Fine-Tuning, ICLR 2023, for the rules. Information maximisation on the unlabelled
images (sure of each, different over all) is that of SHOT (Liang et al., ICML 2020, equations 3 to 5).
"""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tta.adapter.criteria import relative_gradient_norm, signal_to_noise
from tta.adapter.patient import State
from tta.adapter.views import Views
from tta.errors import AdaptationError

Tick = Callable[[float], None]
Rule = Literal["fixed", "first-to-last", "last-to-first", "auto-rgn", "auto-snr"]
RGN_BATCHES, RGN_BATCH = 5, 64  # labels RGN is taken on each epoch, as in the authors' code
SNR_EXAMPLES = 32  # one backward pass each
WINDOW_SHARE = 2  # unlabelled images a step, for each label
SNR_THRESHOLD = 0.5  # of the largest tensor's SNR, under which a tensor is frozen


@dataclass(frozen=True)
class Plan:
    """What may change, and how.

    Attributes:
        name: a block, or a method such as "all"; for people.
        parts: state_dict names of the tensors that may change, block by block in the order of depth.
        learning_rate: of Adam at the start; it falls to 0 along a cosine.
        head_learning_rate: of the last part, if it is to have its own.
        rule: "fixed": everything at the learning rate; "first-to-last", "last-to-first": one more part in each
            equal share of the epochs; "auto-rgn": each epoch a tensor's rate is scaled by its RGN over the
            largest; "auto-snr": each epoch only tensors with at least `SNR_THRESHOLD` of the largest SNR.
        l1: weight of the L1 distance to the source.
        unlabelled: weight of information maximisation on the unlabelled images.
        label_weight: of the labels' loss.
        epochs: passes over the labels.
        batch_size: labels a step; unlabelled images are `WINDOW_SHARE` times as many.
    """

    name: str
    parts: tuple[tuple[str, ...], ...]
    learning_rate: float
    head_learning_rate: float | None = None
    rule: Rule = "fixed"
    l1: float = 0.0
    unlabelled: float = 0.0
    label_weight: float = 1.0
    epochs: int = 20
    batch_size: int = 32
    seed: int = 0


def adapt(
    model: nn.Module,
    views: Views,
    rows: Tensor,
    plan: Plan,
    tick: Tick = lambda done: None,
    source: Mapping[str, Tensor] | None = None,
) -> None:
    """Tune in place; every tensor that the plan does not name stays bit-identical.

    Args:
        model: whose parameters change, with the weights to start from.
        views: of the labels and unlabelled images, for the part of the model that the plan's tensors lie in.
        rows: (n,) int64, which of the labels to fit.
        plan: see there.
        tick: told before every step which share is done, in [0, 1); may raise to stop.
        source: weights that `plan.l1` pulls towards; None: where it starts.

    Raises:
        AdaptationError: no labels, nothing to tune, a learning rate that is not above 0, no gradient to set rates
            by, or a loss that is not finite.
    """
    if not len(rows) and not (plan.unlabelled and views.n_window):
        raise AdaptationError("no labels to fit")
    if plan.learning_rate <= 0:
        raise AdaptationError(f"learning rate {plan.learning_rate:g} changes nothing: give one above 0")
    named = set().union(*plan.parts)
    tuned = {n: p for n, p in model.named_parameters() if n in named}
    if not tuned:
        raise AdaptationError(f"block {plan.name!r} has no parameters")
    n_steps = math.ceil(len(rows) / plan.batch_size) if len(rows) else window_steps(views, plan)
    with unfrozen(model, tuned), torch.random.fork_rng(devices=[]):
        torch.manual_seed(plan.seed)
        towards = {n: (source or {}).get(n, p).detach().clone() for n, p in tuned.items()} if plan.l1 else {}
        optimizer: torch.optim.Adam | None = None
        for epoch in range(plan.epochs):
            if optimizer is None or plan.rule in ("auto-rgn", "auto-snr"):
                groups = _groups(tuned, views, rows, plan)
                if not groups:
                    raise AdaptationError(f"{plan.name}: no gradient tells what to tune")
                optimizer = torch.optim.Adam(groups)
            if plan.rule in ("first-to-last", "last-to-first"):
                _unfreeze(tuned, plan, epoch)
            order = torch.randperm(len(rows))
            batches = torch.split(order, plan.batch_size) if len(rows) else [rows[:0]] * n_steps
            for i, batch in enumerate(batches):
                done = (epoch * n_steps + i) / (plan.epochs * n_steps)
                tick(done)
                loss = _loss(views, rows[batch.to(rows.device)], plan)
                for n, p in towards.items():
                    loss = loss + plan.l1 * (tuned[n] - p).abs().sum()
                if not torch.isfinite(loss):
                    raise AdaptationError("the loss is not finite: the learning rate is too high")
                for group in optimizer.param_groups:
                    group["lr"] = group["rate"] * (1 + math.cos(math.pi * done)) / 2
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()


def window_steps(views: Views, plan: Plan) -> int:
    """Steps of an epoch without labels: over the unlabelled images once."""
    return max(1, views.n_window // (WINDOW_SHARE * plan.batch_size))


def _loss(views: Views, rows: Tensor, plan: Plan) -> Tensor:
    inputs = [views.labelled(rows)] if len(rows) else []
    if plan.unlabelled and views.n_window:
        inputs.append(views.unlabelled(WINDOW_SHARE * plan.batch_size))
    logits = views.part(torch.cat(inputs))
    total = torch.zeros((), device=logits.device)
    if len(rows):
        of_labels = label_loss(logits[: len(rows)], views.labels.y[rows], views.labels.wrong[rows])
        total = total + plan.label_weight * of_labels
    if len(logits) > len(rows):
        total = total - plan.unlabelled * information(logits[len(rows) :])
    return total


def label_loss(logits: Tensor, y: Tensor, wrong: Tensor) -> Tensor:
    """Mean cross-entropy of the class; of "not this class" where only that is known: -log(1 - p_y)."""
    log_p = F.log_softmax(logits, dim=1).gather(1, y[:, None])[:, 0]
    against = -torch.log1p(-log_p.exp().clamp(max=1 - 1e-6))
    return torch.where(wrong, against, -log_p).mean()


def information(logits: Tensor) -> Tensor:
    """Mutual information between image and predicted class, in nats: entropy of the mean less mean entropy."""
    log_p = F.log_softmax(logits, dim=1)
    mean = log_p.exp().mean(dim=0)
    return -(mean * mean.clamp_min(1e-8).log()).sum() + (log_p.exp() * log_p).sum(dim=1).mean()


@contextmanager
def unfrozen(model: nn.Module, tuned: Mapping[str, nn.Parameter]) -> Iterator[None]:
    """Only these parameters get gradients."""
    flags = [p.requires_grad for p in model.parameters()]
    model.requires_grad_(False)
    for p in tuned.values():
        p.requires_grad_(True)
    try:
        yield
    finally:
        for p, flag in zip(model.parameters(), flags, strict=True):
            p.requires_grad_(flag)
            p.grad = None


def _groups(tuned: Mapping[str, nn.Parameter], views: Views, rows: Tensor, plan: Plan) -> list[dict[str, Any]]:
    """Adam's groups, each with the `rate` that the schedule starts from."""
    last = set(plan.parts[-1])
    own = plan.learning_rate if plan.head_learning_rate is None else plan.head_learning_rate
    rates = {n: own if n in last else plan.learning_rate for n in tuned}
    if plan.rule in ("auto-rgn", "auto-snr"):
        rates = {n: rates[n] * factor for n, factor in _factors(tuned, views, rows, plan).items()}
    return [{"params": [tuned[n]], "rate": rate, "lr": rate} for n, rate in rates.items() if rate > 0]


def _factors(tuned: Mapping[str, nn.Parameter], views: Views, rows: Tensor, plan: Plan) -> dict[str, float]:
    """Each tensor's share of the learning rate in this epoch, in [0, 1].

    Weights of two and more dimensions have a criterion of their own; a bias goes with its weight. Normalisation is
    left out, as in the authors' code, by what a tensor is and not by its name.
    """
    weights = [n for n, p in tuned.items() if p.ndim >= 2]
    rows = rows[views.labels.named[rows]]
    n = min(len(rows), RGN_BATCHES * RGN_BATCH if plan.rule == "auto-rgn" else SNR_EXAMPLES)
    chosen = rows[torch.randperm(len(rows))[:n].to(rows.device)]
    x, y = views.labelled(chosen), views.labels.y[chosen]
    groups = {name: (name,) for name in weights}
    if plan.rule == "auto-rgn":
        scores = relative_gradient_norm(views.part, x, y, groups, RGN_BATCH)
    else:
        scores = signal_to_noise(views.part, x, y, groups)
    largest = max(scores.values(), default=0.0) or 1.0
    share = {n: s / largest for n, s in scores.items()}
    if plan.rule == "auto-snr":
        share = {n: float(s >= SNR_THRESHOLD) for n, s in share.items()}
    biases = {n: f"{n.removesuffix('.bias')}.weight" for n in tuned if n.endswith(".bias")}
    return {**share, **{n: share[weight] for n, weight in biases.items() if weight in share}}


def _unfreeze(tuned: Mapping[str, nn.Parameter], plan: Plan, epoch: int) -> None:
    """Gradual unfreezing: let one more part move in each equal share of the epochs."""
    n_open = min(len(plan.parts), 1 + epoch * len(plan.parts) // plan.epochs)
    order = plan.parts if plan.rule == "first-to-last" else plan.parts[::-1]
    moving = set().union(*order[:n_open])
    for n, p in tuned.items():
        p.requires_grad_(n in moving)
        if n not in moving:
            p.grad = None


def delta_of(state: State, source: Mapping[str, Tensor]) -> dict[str, npt.NDArray[Any]]:
    """What differs from the source, under state_dict names; integer counters left out."""
    return {
        n: t.detach().cpu().numpy()
        for n, t in state.items()
        if t.is_floating_point() and not torch.equal(t.cpu(), source[n].cpu())
    }
