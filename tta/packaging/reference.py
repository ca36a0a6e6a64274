"""What the monitor must know of the reference data: whitening, residuals, thresholds, the cut between kinds.

Arrays of `reference.safetensors`: those of `Reference` and `Calibration` in `tta.monitor`, and

    cut               (2,)   depth under which a shift is input level, and the share it was right on
    loadings.BLOCK    (F, r) what a whitened feature is in raw statistics, in standard deviations
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from tta.monitor.calibration import calibrate
from tta.monitor.charts import Layout
from tta.monitor.diagnosis import fit_cut
from tta.monitor.reference import Reference, class_means, fit
from tta.packaging.export import Taps

RANK = 16
BATCH = 128
N_REPLAYED = 160  # reference images that each corruption is replayed on
N_DIRECTIONS = 6  # sub-populations a block
POPULATION = 0.4  # of the reference

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Whitening:
    """Per block: features = raw @ matrix + offset, of unit variance within a class; see `Whitening.apply`.

    Attributes:
        projections: matrix (F, r) and offset (r,) of each block.
        loadings: (F, r) of each block: standardised raw statistics = loadings @ features, as far as they reach.
    """

    projections: list[tuple[Array, Array]]
    loadings: list[Array]

    @property
    def widths(self) -> tuple[int, ...]:
        """Number of features r of each block."""
        return tuple(matrix.shape[1] for matrix, _ in self.projections)

    def apply(self, raw: Sequence[Array]) -> Array:
        """(N, D) float32 features of raw statistics, per block (N, F)."""
        parts = [r @ matrix + offset for r, (matrix, offset) in zip(raw, self.projections, strict=True)]
        return np.concatenate(parts, axis=1).astype(np.float32)


def raw_features(taps: Taps, x: Array, advance: Callable[[int], None]) -> tuple[Array, list[Array]]:
    """Run the source over images.

    Args:
        taps: the model with its taps.
        x: (N, H, W, C) uint8.
        advance: told how many images were done, for a progress bar.

    Returns:
        Logits (N, K) and, for each block, raw statistics (N, F_b), all float32.
    """
    logits, raw = [], []
    with torch.inference_mode():
        for start in range(0, len(x), BATCH):
            batch = x[start : start + BATCH]
            out, statistics = taps(torch.from_numpy(batch))
            logits.append(out.numpy())
            raw.append([s.numpy() for s in statistics])
            advance(len(batch))
    return np.concatenate(logits), [np.concatenate(block) for block in zip(*raw, strict=True)]


def fit_whitening(raw: list[Array], predictions: Array, n_classes: int) -> Whitening:
    """Fit each block's projection.

    Args:
        raw: per block, (N, F_b).
        predictions: (N,) predicted classes.
        n_classes: K; the last block is the logits, whose rank is at most K - 1.
    """
    projections, loadings = [], []
    for i, statistics in enumerate(raw):
        values = statistics.astype(np.float64)
        mean, scale = values.mean(axis=0), values.std(axis=0)
        alive = scale > 1e-6 * max(1e-6, float(scale.max()))
        scale = np.where(alive, scale, np.inf)  # a constant channel carries nothing: its column becomes zero
        standard = (values - mean) / scale
        residual = standard - class_means(standard, predictions, n_classes)[predictions]
        variance, axes = np.linalg.eigh(np.cov(residual, rowvar=False).reshape(len(scale), len(scale)))
        order = np.argsort(variance)[::-1]
        most = min(RANK, n_classes - 1 if i == len(raw) - 1 else RANK, len(values) - 1)
        keep = [j for j in order[:most] if variance[j] > 1e-6 * variance[order[0]]]
        matrix = axes[:, keep] / np.sqrt(variance[keep]) / scale[:, None]
        projections.append((matrix, -(mean @ matrix)))
        loadings.append(axes[:, keep] * np.sqrt(variance[keep]))
    return Whitening(projections, loadings)


def reference_arrays(
    taps: Taps,
    whitening: Whitening,
    layout: Layout,
    x: Array,
    y: Array,
    logits: Array,
    raw: Sequence[Array],
    arl: float,
    seed: int,
) -> Mapping[str, Array]:
    """Everything for `reference.safetensors`.

    Args:
        taps: the model with its taps, to replay corruptions through.
        whitening: fitted on `raw`.
        layout: the blocks.
        x: (N, H, W, C) uint8 reference images in random order.
        y: (N,) true classes.
        logits: (N, K).
        raw: per block, (N, F_b).
        arl: wanted samples between two false alarms.
        seed: of the bootstrap.

    Raises:
        InputError: too few images.
    """
    reference = fit(whitening.apply(raw), logits, y, layout, seed)
    calibration = calibrate(reference, arl, seed=seed)
    replayed = []
    for corrupted in corruptions(x[:N_REPLAYED], seed):
        new_logits, new_raw = raw_features(taps, corrupted, lambda n: None)
        replayed.append(reference.residuals(whitening.apply(new_raw), new_logits.argmax(axis=1)))
    cut = fit_cut(replayed, populations(reference, seed), layout, seed=seed)
    arrays = {**reference.arrays(), **calibration.arrays(), "cut": np.array(cut)}
    for name, loading in zip(layout.names, whitening.loadings, strict=True):
        arrays[f"loadings.{name}"] = loading.astype(np.float32)
    return arrays


def corruptions(x: Array, seed: int) -> list[Array]:
    """Noise, blur, less contrast, more light, coarser pixels: each of (N, H, W, C) uint8 images, middling."""
    images = torch.from_numpy(np.ascontiguousarray(x)).permute(0, 3, 1, 2).to(torch.float32) / 255
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(seed))
    sigma = max(images.shape[2:]) / 32  # pixels
    reach = max(1, round(2 * sigma))
    line = torch.exp(-(torch.arange(-reach, reach + 1) ** 2) / (2 * sigma**2))
    kernel = torch.outer(line, line) / line.sum() ** 2
    channels = images.shape[1]
    padded = F.pad(images, (reach,) * 4, mode="replicate")
    blurred = F.conv2d(padded, kernel.expand(channels, 1, *kernel.shape), groups=channels)
    mean = images.mean(dim=(2, 3), keepdim=True)
    size = [max(1, round(0.7 * n)) for n in images.shape[2:]]
    coarse = F.interpolate(F.interpolate(images, size=size, mode="area"), size=images.shape[2:])
    made = (images + 0.08 * noise, blurred, mean + 0.4 * (images - mean), images + 0.2, coarse)
    return [(m.clamp(0, 1) * 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy() for m in made]


def populations(reference: Reference, seed: int) -> list[Array]:
    """Sub-populations of the held-out samples: those far along random directions of the deeper blocks."""
    rng = np.random.default_rng(seed)
    found = []
    columns = reference.layout.columns
    for block in columns[len(columns) // 2 :]:
        for _ in range(N_DIRECTIONS):
            along = reference.w[:, block] @ rng.normal(size=block.stop - block.start)
            found.append(reference.w[along > np.quantile(along, 1 - POPULATION)])
    return found
