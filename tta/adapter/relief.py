"""A candidate that needs no named class, to serve until labels decide. No I/O; seeded.

Normalisation is re-estimated in several ways and the one whose predictions carry most information is taken. If
there are enough images, or answers that were called right or wrong, and no other regime has taught anything yet,
the block that suits the shift is tuned from there by information maximisation and that feedback. Measured on
CIFAR-10, ResNet-20: see `bench/results/stream.md`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tta.adapter.methods import Anatomy
from tta.adapter.patient import Patient, State
from tta.adapter.race import Settings
from tta.adapter.starts import LABEL_FREE, LOOKED_AT, REHEARSED, information_of
from tta.adapter.surgery import adapt
from tta.adapter.views import Labels, Views
from tta.errors import AdaptationError

# Unlabelled images to tune a block from. Fewer are learned by heart: at 256 to 700 noise, blurs, brightness lost
# one to two points by it, at 1,000 and more they gained two to four.
MIN_TUNED = 1000
MIN_FEEDBACK = 64  # answers called right or wrong, from which one is tuned whatever the number of images
PASSES = 4  # over them


@dataclass(frozen=True)
class Relief:
    """What could be made without labels.

    Attributes:
        state: its weights.
        block: tuned; "" for none.
        start: the way normalisation was re-estimated.
        information: nats that the predictions of every start, and of the "candidate", carry on the newest quarter
            of the window, from which no block was tuned but by feedback.
    """

    state: State
    block: str
    start: str
    information: dict[str, float]


def relieve(
    patient: Patient,
    starts: Mapping[str, State],
    anatomy: Anatomy,
    window: Tensor,
    feedback: Labels | None,
    block: str,
    settings: Settings,
    progress: Callable[[str, int, int], None],
) -> Relief:
    """Make the candidate.

    Args:
        patient: the network.
        starts: name to weights, see `starts_of`.
        anatomy: of the network.
        window: (M, C, H, W) unlabelled images of the shift in [0, 1], the newest last; at least 4.
        feedback: images whose answers were called right or wrong, or None.
        block: to tune; "" for none.
        settings: of the fit.
        progress: told (what, done, of).

    Raises:
        AdaptationError: every start needs labels (no batch normalisation, nothing rehearsed), or no such block.
    """
    free = [name for name in LABEL_FREE if name in starts]
    if not free:
        raise AdaptationError("without batch normalisation there is nothing to re-estimate: labels are needed")
    # The newest images judge: nothing was tuned on them, not even the relief that may be serving.
    n_held = min(LOOKED_AT, len(window) // 4)
    window, held = window[:-n_held], window[-n_held:]
    information = information_of(patient, starts, held)
    start = max(free, key=lambda name: information[name])
    if feedback is None or len(feedback) < MIN_FEEDBACK:
        feedback = Labels.known(window[:0], torch.zeros(0, dtype=torch.int64, device=window.device))
    enough = len(window) + n_held >= MIN_TUNED or len(feedback)
    tuned = block if enough and start != REHEARSED else ""
    patient.load(starts[start])
    if tuned:
        if tuned not in anatomy.tensors:
            raise AdaptationError(f"block {tuned!r} is not in the model: it has {', '.join(anatomy.tensors)}")
        rate = min(settings.rates().head if tuned == anatomy.head else settings.rates().body)
        plan = replace(
            settings.fit(),
            name=tuned,
            parts=(anatomy.tensors[tuned],),
            learning_rate=rate,
            unlabelled=1.0,
            epochs=settings.epochs if len(feedback) else PASSES,
        )
        views = Views(patient, feedback, window, settings.augment)
        rows = torch.arange(len(feedback), device=window.device)
        adapt(patient.model, views, rows, plan, lambda done: progress("relief", round(100 * done), 100))
    state = patient.state()
    information["candidate"] = information_of(patient, {"candidate": state}, held)["candidate"]
    return Relief(state, tuned, start, information)
