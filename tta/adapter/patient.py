"""The network on the table: its module, its preprocessing, its normalisation statistics, ways to look at it."""

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

EVAL_BATCH = 128
NORM_BATCH = 250

State = dict[str, Tensor]


class Patient:
    """A model in eval mode, and what belongs to it.

    Args:
        model: takes (N, C, H, W) float32, normalised; gives (N, K) logits.
        head: module name of its classifier.
        mean: per channel, of values in [0, 1].
        std: per channel.
        device: "cpu" or "cuda".
    """

    def __init__(
        self, model: nn.Module, head: str, mean: Sequence[float], std: Sequence[float], device: str
    ) -> None:
        self.device = torch.device(device)
        # Channels last is what convolutions are fastest in: measured 1.1 to 1.5 times on a CPU.
        self.model: nn.Module = model.to(self.device).to(memory_format=torch.channels_last).eval()
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
        return any(is_batch_norm(m) for m in self.model.modules())

    @torch.no_grad()
    def estimate_normalisation(
        self, window: Tensor, tensors: Collection[str] | None = None, share: float = 1.0
    ) -> None:
        """Replace running statistics by those of unlabelled images; fixed afterwards.

        Args:
            window: (N, C, H, W) in [0, 1].
            tensors: state_dict names; only norms whose buffers are among them change. All by default.
            share: of the new statistics, in (0, 1]; the rest stays as it was.
        """
        norms: list[tuple[str, Any]] = [
            (name, m)
            for name, m in self.model.named_modules()
            if is_batch_norm(m) and (tensors is None or f"{name}.running_mean" in tensors)
        ]
        before = {name: (m.running_mean.clone(), m.running_var.clone()) for name, m in norms}
        momenta = [m.momentum for _, m in norms]
        for _, m in norms:
            m.reset_running_stats()
            m.momentum = None  # cumulative average: every image counts the same
            m.train()
        try:
            order = torch.randperm(len(window), generator=torch.Generator().manual_seed(0))
            for chunk in order.tensor_split(max(1, round(len(window) / NORM_BATCH))):
                self.model(self.normalise(window[chunk.to(self.device)]))
        finally:
            for (_, m), momentum in zip(norms, momenta, strict=True):
                m.momentum = momentum
                m.eval()
        for name, m in norms if share < 1 else ():
            mean, variance = before[name]
            m.running_mean.lerp_(mean, 1 - share)
            m.running_var.lerp_(variance, 1 - share)


def is_batch_norm(module: nn.Module) -> Any:
    """Whether a module normalises by running statistics."""
    return isinstance(module, nn.modules.batchnorm._BatchNorm) and module.track_running_stats
