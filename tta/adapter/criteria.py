"""How hard labelled gradients pull, and how far they agree: relative gradient norm and signal-to-noise ratio.

Source: Lee et al., Surgical Fine-Tuning, ICLR 2023, Auto-RGN and Auto-SNR. RGN(t) = ‖g_t‖₂ / ‖θ_t‖₂ and
SNR(t) = mean over elements of (mean_x g)² / Var_x g, over examples x and not, as in the authors' code, over output
channels. Of a single tensor they set learning rates (`tta.adapter.surgery`); of a whole block they rank blocks.
"""

from collections.abc import Iterator, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

EPS = 1e-12


def relative_gradient_norm(
    model: nn.Module, x: Tensor, y: Tensor, groups: Mapping[str, Sequence[str]], batch_size: int = 64
) -> dict[str, float]:
    """How hard the loss pulls on each group of tensors, per unit of weight.

    Leaves the model as found: same mode, no gradients kept.

    Args:
        model: the network, or what is left of it.
        x: (N, ...) what it takes.
        y: (N,) int64.
        groups: name to parameter names, of a block or of one tensor; names that are buffers are passed over.
        batch_size: images a gradient is taken of; the norms are averaged, as in the authors' code.

    Returns:
        Name to RGN, >= 0; a group of zeros has a norm of `EPS`.
    """
    totals = dict.fromkeys(groups, 0.0)
    batches = 0
    for gradients in _gradients(model, x, y, batch_size):
        batches += 1
        for name, members in groups.items():
            squares = sum(float(gradients[m].square().sum()) for m in members if m in gradients)
            totals[name] += squares**0.5
    parameters = dict(model.named_parameters())
    norms = {
        name: sum(float(parameters[m].detach().square().sum()) for m in members if m in parameters) ** 0.5
        for name, members in groups.items()
    }
    return {name: totals[name] / max(1, batches) / (norms[name] + EPS) for name in groups}


def signal_to_noise(
    model: nn.Module, x: Tensor, y: Tensor, groups: Mapping[str, Sequence[str]]
) -> dict[str, float]:
    """How far the examples' gradients of each group agree.

    Args:
        model: see `relative_gradient_norm`.
        x: (N, ...), N >= 2; one backward pass an image.
        y: (N,) int64.
        groups: name to parameter names.

    Returns:
        Name to the mean over its elements of squared mean over variance.
    """
    first: dict[str, Tensor] = {}
    second: dict[str, Tensor] = {}
    for gradients in _gradients(model, x, y, 1):
        for name, g in gradients.items():
            first[name] = first.get(name, torch.zeros_like(g)) + g
            second[name] = second.get(name, torch.zeros_like(g)) + g.square()
    n = len(x)
    result = {}
    for name, members in groups.items():
        ratio, count = 0.0, 0
        for m in members:
            if m in first:
                mean = first[m] / n
                variance = (second[m] / n - mean.square()).clamp_min(0) * n / max(1, n - 1)
                ratio += float((mean.square() / (variance + EPS)).sum())
                count += mean.numel()
        result[name] = ratio / max(1, count)
    return result


def _gradients(model: nn.Module, x: Tensor, y: Tensor, batch_size: int) -> Iterator[dict[str, Tensor]]:
    parameters = {n: p for n, p in model.named_parameters() if p.is_floating_point()}
    flags = {n: p.requires_grad for n, p in parameters.items()}
    for p in parameters.values():
        p.requires_grad_(True)
    try:
        for start in range(0, len(x), batch_size):
            loss = F.cross_entropy(model(x[start : start + batch_size]), y[start : start + batch_size])
            values = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
            yield {n: g for n, g in zip(parameters, values, strict=True) if g is not None}
    finally:
        for n, p in parameters.items():
            p.requires_grad_(flags[n])
