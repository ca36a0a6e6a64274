"""Surgical fine-tuning: change one block of the network with few labels. No I/O; seeded; deterministic on a CPU.

Source: Lee et al., Surgical Fine-Tuning, ICLR 2023. Differs in where it starts: normalisation statistics may have
been re-estimated from the unlabelled shifted window first, which alone cures most of an input-level shift.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import kornia.augmentation as ka
import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tta.errors import AdaptationError

HEAD_VIEWS = 8  # augmented views a head is tuned on; the frozen body runs once over each
EVAL_BATCH = 128
NORM_BATCH = 250

State = dict[str, Tensor]


@dataclass(frozen=True)
class Plan:
    """How a block is tuned.

    Attributes:
        block: its name.
        tensors: state_dict names in the block.
        learning_rate: of Adam at the start; it falls to 0 along a cosine.
        epochs: passes over the labels.
        augment: which of "flip" and "crop" keep the class.
    """

    block: str
    tensors: tuple[str, ...]
    learning_rate: float
    epochs: int
    batch_size: int
    augment: tuple[str, ...]
    seed: int


class Patient:
    """The network on the table: its module, its preprocessing, and ways to look at it."""

    def __init__(
        self, model: nn.Module, head: str, mean: Sequence[float], std: Sequence[float], device: str
    ) -> None:
        self.device = torch.device(device)
        self.model = model.to(self.device).eval()
        self.head = head
        self._mean = torch.tensor(mean, device=self.device).view(1, -1, 1, 1)
        self._std = torch.tensor(std, device=self.device).view(1, -1, 1, 1)

    def images(self, x: npt.NDArray[Any]) -> Tensor:
        """(N, H, W, C) uint8 to (N, C, H, W) float32 in [0, 1] on the device."""
        return torch.from_numpy(np.array(x)).to(self.device).permute(0, 3, 1, 2).float() / 255

    def normalise(self, images: Tensor) -> Tensor:
        """What the network's first layer takes."""
        return (images - self._mean) / self._std

    def state(self) -> State:
        """A copy of the present weights."""
        return {n: t.detach().clone() for n, t in self.model.state_dict().items()}

    def load(self, state: State) -> None:
        """Set all weights."""
        self.model.load_state_dict(state)

    @torch.no_grad()
    def logits(self, images: Tensor) -> Tensor:
        """(N, K) of images (N, C, H, W) in [0, 1]."""
        return torch.cat([self.model(self.normalise(b)) for b in torch.split(images, EVAL_BATCH)])

    def accuracy(self, images: Tensor, y: Tensor) -> float:
        """Share of labels the present weights get right."""
        return float((self.logits(images).argmax(1) == y).float().mean())

    def has_batch_norm(self) -> bool:
        """Whether there are statistics to re-estimate."""
        return any(_is_batch_norm(m) for m in self.model.modules())

    @torch.no_grad()
    def estimate_normalisation(self, window: Tensor) -> None:
        """Replace running statistics by those of unlabelled images (N, C, H, W); fixed afterwards."""
        norms: list[Any] = [m for m in self.model.modules() if _is_batch_norm(m)]
        momenta = [m.momentum for m in norms]
        for m in norms:
            m.reset_running_stats()
            m.momentum = None  # cumulative average: every image counts the same
            m.train()
        try:
            order = torch.randperm(len(window), generator=torch.Generator().manual_seed(0))
            for chunk in order.tensor_split(max(1, round(len(window) / NORM_BATCH))):
                self.model(self.normalise(window[chunk.to(self.device)]))
        finally:
            for m, momentum in zip(norms, momenta, strict=True):
                m.momentum = momentum
                m.eval()


def _is_batch_norm(module: nn.Module) -> Any:
    return isinstance(module, nn.modules.batchnorm._BatchNorm) and module.track_running_stats


def augmentation(names: Sequence[str], height: int, width: int) -> nn.Module:
    """Changes of an image that keep its class.

    Raises:
        AdaptationError: an unknown name.
    """
    layers: list[nn.Module] = []
    for name in names:
        if name == "flip":
            layers.append(ka.RandomHorizontalFlip(p=0.5))
        elif name == "crop":
            pad = max(1, height // 8)
            layers.append(ka.RandomCrop((height, width), padding=pad, padding_mode="reflect"))
        else:
            raise AdaptationError(f"augmentation {name!r} is not known: write flip or crop")
    return nn.Sequential(*layers)


def adapt(patient: Patient, images: Tensor, y: Tensor, plan: Plan) -> None:
    """Tune one block in place; every other tensor stays bit-identical.

    Batch normalisation uses its fixed statistics throughout, as it will when serving.

    Args:
        patient: with the weights to start from.
        images: (N, C, H, W) in [0, 1].
        y: (N,) int64.
        plan: what to tune and how.

    Raises:
        AdaptationError: no labels, a block without parameters, or a loss that is not finite.
    """
    if len(y) == 0:
        raise AdaptationError("no labels to fit")
    if plan.learning_rate <= 0:
        raise AdaptationError(f"learning rate {plan.learning_rate:g} changes nothing: give one above 0")
    parameters = [p for n, p in patient.model.named_parameters() if n in set(plan.tensors)]
    if not parameters:
        raise AdaptationError(f"block {plan.block!r} has no parameters")
    flags = [p.requires_grad for p in patient.model.parameters()]
    patient.model.requires_grad_(False)
    for p in parameters:
        p.requires_grad_(True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(plan.seed)
        try:
            if _is_inside_head(plan, patient):
                _tune_head(patient, images, y, plan, parameters)
            else:
                _tune_block(patient, images, y, plan, parameters)
        finally:
            for p, flag in zip(patient.model.parameters(), flags, strict=True):
                p.requires_grad_(flag)
                p.grad = None


def _is_inside_head(plan: Plan, patient: Patient) -> bool:
    return all(t.startswith(patient.head + ".") for t in plan.tensors)


def _optimizer(parameters: list[nn.Parameter], plan: Plan, n: int) -> tuple[torch.optim.Optimizer, Any]:
    optimizer = torch.optim.Adam(parameters, lr=plan.learning_rate)
    steps = plan.epochs * max(1, -(-n // plan.batch_size))
    return optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)


def _step(loss: Tensor, optimizer: torch.optim.Optimizer, schedule: Any) -> None:
    if not torch.isfinite(loss):
        raise AdaptationError("the loss is not finite: the learning rate is too high")
    optimizer.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    schedule.step()


def _tune_block(patient: Patient, images: Tensor, y: Tensor, plan: Plan, parameters: list[nn.Parameter]) -> None:
    augment = augmentation(plan.augment, *images.shape[-2:])
    optimizer, schedule = _optimizer(parameters, plan, len(y))
    for _ in range(plan.epochs):
        for index in torch.split(torch.randperm(len(y)), plan.batch_size):
            index = index.to(patient.device)
            views = patient.normalise(augment(images[index]))
            _step(F.cross_entropy(patient.model(views), y[index]), optimizer, schedule)


def _tune_head(patient: Patient, images: Tensor, y: Tensor, plan: Plan, parameters: list[nn.Parameter]) -> None:
    """The body is frozen: run it once over a fixed set of views and tune on what it gives."""
    augment = augmentation(plan.augment, *images.shape[-2:])
    head = patient.model.get_submodule(patient.head)
    seen: list[Tensor] = []
    handle = head.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0].detach()))
    try:
        views = [images, *(augment(images) for _ in range(HEAD_VIEWS - 1))] if plan.augment else [images]
        for view in views:
            patient.logits(view)
    finally:
        handle.remove()
    features = torch.cat(seen)
    targets = y.repeat(len(views))
    optimizer, schedule = _optimizer(parameters, plan, len(y))
    for _ in range(plan.epochs):
        # As many steps an epoch as any block gets, each over another draw of the views.
        for index in torch.split(torch.randperm(len(targets))[: len(y)], plan.batch_size):
            index = index.to(patient.device)
            _step(F.cross_entropy(head(features[index]), targets[index]), optimizer, schedule)


def delta_of(state: Mapping[str, Tensor], source: Mapping[str, Tensor]) -> dict[str, npt.NDArray[Any]]:
    """What differs from the source, under state_dict names; integer counters left out."""
    return {
        n: t.detach().cpu().numpy()
        for n, t in state.items()
        if t.is_floating_point() and not torch.equal(t.cpu(), source[n].cpu())
    }
