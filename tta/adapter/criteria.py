"""Which block pulls hardest: relative gradient norm and signal-to-noise ratio of labelled gradients.

Source: Lee et al., Surgical Fine-Tuning, ICLR 2023, Auto-RGN and Auto-SNR. Both are taken here over a whole block:
RGN(b) = ‖g_b‖₂ / ‖θ_b‖₂; SNR(b) = mean over elements of (mean_x g)² / Var_x g, over examples and not, as in the
authors' code, over output channels.
"""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

EPS = 1e-12


def relative_gradient_norm(
    model: nn.Module, x: Tensor, y: Tensor, blocks: Mapping[str, Sequence[str]], batch_size: int = 64
) -> dict[str, float]:
    """Rank blocks by how hard the loss pulls on them per unit of weight.

    Leaves the model as found: same mode, no gradients kept.

    Args:
        model: the network.
        x: (N, C, H, W) float32, normalised.
        y: (N,) int64.
        blocks: block name to parameter names; names that are buffers are passed over.
        batch_size: images a gradient is taken of; the norms are averaged.

    Returns:
        Block name to RGN, >= 0.
    """
    totals = dict.fromkeys(blocks, 0.0)
    batches = 0
    for gradients in _gradients(model, x, y, batch_size):
        batches += 1
        for name, members in blocks.items():
            squares = sum(float(gradients[m].square().sum()) for m in members if m in gradients)
            totals[name] += squares**0.5
    parameters = dict(model.named_parameters())
    norms = {
        name: sum(float(parameters[m].detach().square().sum()) for m in members if m in parameters) ** 0.5
        for name, members in blocks.items()
    }
    return {name: totals[name] / max(1, batches) / (norms[name] + EPS) for name in blocks}


def signal_to_noise(
    model: nn.Module, x: Tensor, y: Tensor, blocks: Mapping[str, Sequence[str]]
) -> dict[str, float]:
    """Rank blocks by how much the examples' gradients agree.

    Args:
        model: see `relative_gradient_norm`.
        x: (N, C, H, W), N >= 2; one backward pass an image.
        y: (N,) int64.
        blocks: block name to parameter names.

    Returns:
        Block name to the mean over its elements of squared mean over variance.
    """
    first: dict[str, Tensor] = {}
    second: dict[str, Tensor] = {}
    for gradients in _gradients(model, x, y, 1):
        for name, g in gradients.items():
            first[name] = first.get(name, torch.zeros_like(g)) + g
            second[name] = second.get(name, torch.zeros_like(g)) + g.square()
    n = len(x)
    result = {}
    for name, members in blocks.items():
        ratio, count = 0.0, 0
        for m in members:
            if m in first:
                mean = first[m] / n
                variance = (second[m] / n - mean.square()).clamp_min(0) * n / max(1, n - 1)
                ratio += float((mean.square() / (variance + EPS)).sum())
                count += mean.numel()
        result[name] = ratio / max(1, count)
    return result


def _gradients(model: nn.Module, x: Tensor, y: Tensor, batch_size: int):  # type: ignore[no-untyped-def]
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
