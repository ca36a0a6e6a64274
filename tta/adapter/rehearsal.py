"""One set of normalisation scales and shifts for all regimes, tuned on what each of them has left behind. Seeded.

Regimes differ most in the statistics of their activations, and each keeps its own; what the network makes of
normalised activations they can learn from one another. Every step takes images of one regime and normalises by
these, so that the tuned scales and shifts fit any regime's own statistics, also those of one not yet seen.

The loss of unlabelled images is that of EATA (Niu et al., ICML 2022, equations 2 to 5): entropy of those predicted
with confidence that are unlike the average prediction; beside it stands the labels' cross-entropy. Measured on
CIFAR-10, ResNet-20: see `bench/results/stream.md`.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from time import monotonic
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tta.adapter.patient import Patient, State, is_batch_norm
from tta.adapter.surgery import unfrozen
from tta.adapter.views import augmentation
from tta.errors import AdaptationError

Array = npt.NDArray[Any]
STEPS_A_REGIME = 10
MAX_STEPS = 150  # more makes the entropy ever smaller and the errors more
UNLABELLED_SHARE = 3  # unlabelled images a step, for each label
LEARNING_RATE, MOMENTUM = 0.005, 0.9
CONFIDENT = 0.4  # of the largest entropy: above it a prediction teaches nothing
REDUNDANT = 0.4  # cosine to the average prediction from which on an image adds nothing
AVERAGED = 0.9  # of the average prediction that a step keeps


@dataclass(frozen=True)
class Memory:
    """What a regime has left behind.

    Attributes:
        images: (M, H, W, C) uint8 without labels, M >= 2.
        x: (N, H, W, C) uint8 with labels; N may be 0.
        y: (N,) int64.
    """

    images: Array
    x: Array
    y: Array


def scales_and_shifts(model: nn.Module) -> dict[str, nn.Parameter]:
    """Name to parameter, of every normalisation."""
    kinds = (nn.modules.batchnorm._BatchNorm, nn.LayerNorm, nn.GroupNorm)
    return {
        f"{name}.{own}": p
        for name, module in model.named_modules()
        if isinstance(module, kinds)
        for own, p in module.named_parameters(recurse=False)
    }


def rehearse(
    patient: Patient,
    memories: Mapping[str, Memory],
    augment: tuple[str, ...],
    batch_size: int,
    budget_s: float,
    seed: int,
    progress: Callable[[str, int, int], None],
) -> State:
    """Tune scales and shifts in place, beginning with the weights the patient has; statistics stay as they were.

    Args:
        patient: the network.
        memories: of each regime, by name; at least one.
        augment: changes of labelled images that keep their class.
        batch_size: labels a step; unlabelled images are `UNLABELLED_SHARE` times as many.
        budget_s: seconds after which no further step is taken.
        seed: of the order.
        progress: told (what, done, of).

    Returns:
        The tuned scales and shifts alone.

    Raises:
        AdaptationError: nothing to rehearse, no normalisation in the network, or a loss that is not finite.
    """
    tuned = scales_and_shifts(patient.model)
    if not tuned or not memories:
        raise AdaptationError("nothing to rehearse: no regime with images, or no normalisation in the network")
    model, before = patient.model, patient.state()
    rng = np.random.default_rng(seed)
    n_steps = min(MAX_STEPS, STEPS_A_REGIME * len(memories))
    end = monotonic() + budget_s
    order: list[str] = []
    average: Tensor | None = None
    norms = [m for m in model.modules() if is_batch_norm(m)]
    for m in norms:
        m.train()  # by the statistics of the step's images
    optimizer = torch.optim.SGD(tuned.values(), lr=LEARNING_RATE, momentum=MOMENTUM)
    try:
        with unfrozen(model, tuned), torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            views = augmentation(augment, *next(iter(memories.values())).images.shape[1:3])
            for step in range(n_steps):
                if monotonic() > end:
                    break
                progress("rehearsal", step, n_steps)
                order = order or list(rng.permutation(list(memories)))
                memory = memories[order.pop()]
                unlabelled = patient.images(_some(memory.images, UNLABELLED_SHARE * batch_size, rng))
                rows = rng.permutation(len(memory.y))[:batch_size]
                inputs = [unlabelled, views(patient.images(memory.x[rows]))] if len(rows) else [unlabelled]
                logits = model(patient.normalise(torch.cat(inputs)))
                loss, average = _reliable_entropy(logits[: len(unlabelled)], average)
                if len(rows):
                    y = torch.from_numpy(memory.y[rows]).to(logits.device)
                    loss = loss + F.cross_entropy(logits[len(unlabelled) :], y)
                if not torch.isfinite(loss):
                    raise AdaptationError("the loss of the rehearsal is not finite")
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
    finally:
        for m in norms:
            m.eval()
    found = {name: p.detach().clone() for name, p in tuned.items()}
    patient.load({**before, **found})
    return found


def _some(x: Array, n: int, rng: np.random.Generator) -> Array:
    return x[rng.permutation(len(x))[:n]]


def _reliable_entropy(logits: Tensor, average: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Weighted entropy of images worth learning from, and the average prediction so far."""
    log_p = logits.log_softmax(1)
    entropy = -(log_p.exp() * log_p).sum(1)
    margin = CONFIDENT * math.log(logits.shape[1])
    p = log_p.exp().detach()
    kept = entropy.detach() < margin
    if average is not None:
        kept &= F.cosine_similarity(average[None], p, dim=1) < REDUNDANT
    if not kept.any():
        return 0 * entropy.sum(), average
    own = p[kept].mean(0)
    average = own if average is None else AVERAGED * average + (1 - AVERAGED) * own
    return (torch.exp(margin - entropy[kept].detach()) * entropy[kept]).mean(), average
