"""Shifts of CIFAR-10 for the adaptation benchmarks, each with the source model that it befalls.

The 5,000 test images are split once: 2,000 are scored, from the other 3,000 come the unlabelled window and the labels.
Training images are used to train source models only.

    any corruption      input level: severity 5, see `bench.corruptions`; the ResNet-20 of `TTA_DATA`
    population          feature level: vehicles against animals, learned on airplane, automobile, bird, cat and deer,
                        met on ship, truck, dog, frog and horse; a ResNet-20 trained here
    flip                output level: y → 9 - y; the ResNet-20 of `TTA_DATA`
    spurious            output level: a frame whose colour tells the class in 95 % of the images a model was fine-tuned
                        on here, and in half of those it meets; scored by the worst of the groups of class and whether
                        the frame tells it
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from bench.cifar import CACHE, MEAN, SHAPE, STD, data_folder, images
from bench.corruptions import CORRUPTIONS, corrupt
from bench.resnet20 import resnet20
from tta.adapter.methods import Anatomy
from tta.adapter.patient import Patient, State
from tta.packaging.blocks import classifier_name, partition
from tta.packaging.source import load_checkpoint

N_SCORED = 2000
N_WINDOW = 1500
SEVERITY = 5
ANIMALS = (2, 3, 4, 5, 6, 7)
MET = (8, 9, 5, 6, 7)  # sub-populations of the target; the source model has seen the five others
EPOCHS = 8
TELLING, TELLING_MET = 0.95, 0.5  # frames of the class's own colour
FRAME = 2  # pixels
FRAMED_IMAGES, FRAMED_EPOCHS, FRAMED_RATE = 20_000, 2, 0.02
# One a class, as far apart as ten can be.
COLOURS = np.array(
    [
        *((230, 25, 75), (60, 180, 75), (255, 225, 25), (0, 130, 200), (245, 130, 48)),
        *((145, 30, 180), (70, 240, 240), (240, 50, 230), (128, 128, 0), (0, 0, 0)),
    ],
    np.uint8,
)

Array = Any


@dataclass(frozen=True)
class Shift:
    """A shifted stream and the model it befalls.

    Attributes:
        name: of it.
        kind: "input", "feature" or "output".
        suited: block that the diagnosis names for such a shift.
        patient: the network.
        anatomy: its blocks.
        source: its weights.
        x_pool: (M, 32, 32, 3) uint8, of which the window is the first `N_WINDOW` and labels are drawn.
        y_pool: (M,) what they show.
        x_scored: (2000, 32, 32, 3) uint8.
        y_scored: (2000,).
        groups: (2000,) of the scored images; the score is the worst group's accuracy. None: of all.
    """

    name: str
    kind: str
    suited: str
    patient: Patient
    anatomy: Anatomy
    source: State
    x_pool: Array
    y_pool: Array
    x_scored: Array
    y_scored: Array
    groups: Array | None = None

    def score(self, state: State) -> float:
        """Accuracy of some weights on the scored images in %, of the worst group if there are groups."""
        self.patient.load(state)
        right = self.patient.logits(self.patient.images(self.x_scored)).argmax(1).numpy() == self.y_scored
        groups = np.zeros(len(right)) if self.groups is None else self.groups
        return round(100 * min(float(right[groups == g].mean()) for g in np.unique(groups)), 2)


def load_shift(name: str) -> Shift:
    """One of the corruptions, "population", "flip" or "spurious"."""
    x, y, _ = images("test")
    if name == "population":
        path = CACHE / "population.safetensors"
        if not path.exists():
            train_population(lambda text: print(text, file=sys.stderr, flush=True))
        model: nn.Module = resnet20(2)
        model.load_state_dict(load_file(path))
        met = np.isin(y, MET)
        return _shift(name, "feature", "block2", model, x[met], np.isin(y[met], ANIMALS).astype(np.int64), 1000)
    if name == "spurious":
        path = CACHE / "spurious.safetensors"
        if not path.exists():
            train_spurious(lambda text: print(text, file=sys.stderr, flush=True))
        model = resnet20()
        model.load_state_dict(load_file(path))
        framed, tells = with_frames(x, y, TELLING_MET, np.random.default_rng(1))
        shift = _shift(name, "output", "head", model, framed, y, N_SCORED)
        return replace(shift, groups=(2 * y + tells)[:N_SCORED])
    model = resnet20()
    load_checkpoint(model, data_folder() / "resnet20-cifar10.safetensors")
    if name == "flip":
        return _shift(name, "output", "head", model, x, 9 - y, N_SCORED)
    if name not in CORRUPTIONS:
        sys.exit(f"{name!r} is no shift: write population, flip, spurious, or one of {', '.join(CORRUPTIONS)}")
    path = CACHE / f"{name}{SEVERITY}.npy"
    if not path.exists():
        np.save(path, corrupt(name, x, SEVERITY))
    return _shift(name, "input", "block1", model, np.load(path), y, N_SCORED)


def _shift(name: str, kind: str, suited: str, model: nn.Module, x: Array, y: Array, n_scored: int) -> Shift:
    parts = partition(model.eval(), SHAPE)
    patient = Patient(model, classifier_name(model), MEAN, STD, "cpu")
    anatomy = Anatomy({b.name: b.tensors for b in parts}, {b.name: b.tap for b in parts}, patient.head)
    source = patient.state()
    return Shift(
        name, kind, suited, patient, anatomy, source, x[n_scored:], y[n_scored:], x[:n_scored], y[:n_scored]
    )


def with_frames(x: Array, y: Array, telling: float, rng: np.random.Generator) -> tuple[Array, Array]:
    """Images with a coloured frame.

    Args:
        x: (N, 32, 32, 3) uint8.
        y: (N,) classes.
        telling: share of the frames in the colour of the image's class; the others have another class's.
        rng: draws which.

    Returns:
        (N, 32, 32, 3) uint8; (N,) bool, which frames tell the class.
    """
    tells = rng.random(len(y)) < telling
    colour = COLOURS[np.where(tells, y, (y + rng.integers(1, len(COLOURS), len(y))) % len(COLOURS))]
    framed = np.broadcast_to(colour[:, None, None], x.shape).copy()
    framed[:, FRAME:-FRAME, FRAME:-FRAME] = x[:, FRAME:-FRAME, FRAME:-FRAME]
    return framed, tells


def train_spurious(tell: Callable[[str], None]) -> None:
    """Fine-tune the ResNet-20 of `TTA_DATA` on framed training images, so that it comes to lean on the frames."""
    x, y, _ = images("train")
    x, y = x[:FRAMED_IMAGES], y[:FRAMED_IMAGES]
    x, _ = with_frames(x, y, TELLING, np.random.default_rng(0))
    torch.manual_seed(0)
    net = resnet20()
    load_checkpoint(net, data_folder() / "resnet20-cifar10.safetensors")
    patient, batch = Patient(net, "linear", MEAN, STD, "cpu"), 128
    model = patient.model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=FRAMED_RATE, momentum=0.9, weight_decay=5e-4)
    for epoch in range(FRAMED_EPOCHS):
        losses = []
        for index in torch.randperm(len(y)).split(batch):
            logits = model(patient.normalise(patient.images(x[index])))
            loss = nn.functional.cross_entropy(logits, torch.from_numpy(y[index]))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
        tell(f"spurious source model: epoch {epoch + 1} of {FRAMED_EPOCHS}, loss {np.mean(losses):.3f}")
    save_file({n: t.contiguous() for n, t in model.eval().state_dict().items()}, CACHE / "spurious.safetensors")


def train_population(tell: Callable[[str], None]) -> None:
    """Train the source model of "population" from random weights: SGD, one cycle, flips and crops."""
    from tta.adapter.views import augmentation

    x, y, _ = images("train")
    seen = ~np.isin(y, MET)
    x, y = x[seen], np.isin(y[seen], ANIMALS).astype(np.int64)
    torch.manual_seed(0)
    patient = Patient(resnet20(2), "linear", MEAN, STD, "cpu")
    model, batch = patient.model.train(), 128
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4, nesterov=True)
    steps = len(y) // batch
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.2, total_steps=EPOCHS * steps)
    augment = augmentation(("flip", "crop"), *SHAPE[:2])
    for epoch in range(EPOCHS):
        total = 0.0
        for index in torch.randperm(len(y))[: steps * batch].split(batch):
            views = patient.normalise(augment(patient.images(x[index])))
            loss = nn.functional.cross_entropy(model(views), torch.from_numpy(y[index]))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += float(loss.detach())
        tell(f"population source model: epoch {epoch + 1} of {EPOCHS}, loss {total / steps:.3f}")
    save_file({n: t.contiguous() for n, t in model.eval().state_dict().items()}, CACHE / "population.safetensors")
