"""After an alarm: which kind of shift, which block, which channels, and how sure.

Noise, blur and contrast move early blocks most and fade with depth; a new sub-population moves late ones; a new
class mix moves the histogram of predictions and little else; and when labels disagree while features and classes
are as before, the meaning of the output has changed. Depth is the centre of mass of the blocks' excess over what
chance gives. The cut between early and late differs by model: packaging fits it by replaying corruptions and
sub-populations of the reference through the graph (`fit_cut`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from tta.monitor.charts import Array, Layout

DEFAULT_CUT = 0.5  # of the depth, where a reference is too small to fit one
QUIET_EXCESS = 3.0  # T² ratio under which a block counts as quiet
N_BOOTSTRAP = 100
N_CHANNELS = 5

Kind = Literal["input", "feature", "prior", "output"]


@dataclass(frozen=True)
class Diagnosis:
    """What kind of shift, and where.

    Attributes:
        kind: "input", "feature" or "output" level, or "prior": another class mix.
        confidence: share of bootstrapped windows with the same verdict, in [0, 1].
        depth: centre of mass of the excess in [0, 1]; 0 is the first block, 1 the head.
        effect: length of the mean residual of the most moved block, in standard deviations, chance subtracted.
        profile: block name to excess T² (0 is what chance gives).
        block: the block that suits the kind: first, most moved, or head; "" for a class mix.
        channels: statistics that moved most, as "block: mean of channel 3, +2.1 sd".
        n_samples: it rests on.
    """

    kind: Kind
    confidence: float
    depth: float
    effect: float
    profile: dict[str, float] = field(default_factory=dict)
    block: str = ""
    channels: tuple[str, ...] = ()
    n_samples: int = 0


def diagnose(
    window: Array,
    layout: Layout,
    cut: float = DEFAULT_CUT,
    errors_up: bool = False,
    classes_moved: bool = False,
    loadings: Mapping[str, Array] | None = None,
    inflation: float = 1.0,
) -> Diagnosis:
    """Judge a window of shifted samples.

    Args:
        window: (n, D) residuals since the onset.
        layout: the blocks.
        cut: depth under which a shift is input level.
        errors_up: labelled errors rose beyond their bound.
        classes_moved: the class histogram is over its threshold.
        loadings: block to (F, r), see `top_channels`.
        inflation: of the variance of a mean by stickiness.
    """
    n = len(window)
    if not n:
        kind: Kind = "output" if errors_up else "prior" if classes_moved else "feature"
        block = layout.names[-1] if errors_up else ""
        return Diagnosis(kind, 0.0, 1.0, 0.0, dict.fromkeys(layout.names, 0.0), block)
    mean = window.mean(axis=0)
    excess = _excess(mean, layout, n / inflation)
    kind = _kind(excess, cut, errors_up, classes_moved)
    rng = np.random.default_rng(n)
    redraws = rng.multinomial(n, np.full(n, 1 / n), N_BOOTSTRAP) @ window / n
    # A bootstrap mean has the window's own noise twice over.
    again = [_kind(_excess(m, layout, n / inflation / 2), cut, errors_up, classes_moved) for m in redraws]
    profile = {name: round(float(e), 3) for name, e in zip(layout.names, excess, strict=True)}
    moved = int(excess.argmax())
    block = {"input": layout.names[0], "feature": layout.names[moved], "prior": "", "output": layout.names[-1]}[
        kind
    ]
    effect = float(np.sqrt(excess[moved] * layout.widths[moved] / n * inflation))
    return Diagnosis(
        kind,
        confidence=again.count(kind) / N_BOOTSTRAP,
        depth=round(depth(excess), 4),
        effect=round(effect, 4),
        profile=profile,
        block=block,
        channels=top_channels(mean, layout, loadings or {}),
        n_samples=n,
    )


def _excess(mean: Array, layout: Layout, n: float) -> Array:
    """(blocks,) how far a mean of n samples lies out, in units of chance, beyond chance."""
    over: Array = np.maximum(layout.squares(mean).astype(np.float64) * n - 1.0, 0.0)
    return over


def _kind(excess: Array, cut: float, errors_up: bool, classes_moved: bool) -> Kind:
    quiet = excess.max() < QUIET_EXCESS
    if quiet and classes_moved:
        return "prior"
    if quiet and errors_up:
        return "output"
    return "input" if depth(excess) < cut else "feature"


def depth(excess: Array) -> float:
    """Centre of mass of (blocks,) excess in [0, 1]; 0 if there is none."""
    total = float(excess.sum())
    return float((excess * np.arange(len(excess))).sum() / total / max(1, len(excess) - 1)) if total else 0.0


def top_channels(mean: Array, layout: Layout, loadings: Mapping[str, Array]) -> tuple[str, ...]:
    """The raw statistics that moved most.

    Args:
        mean: (D,) mean residual.
        layout: the blocks.
        loadings: block to (F, r): what a whitened residual is in raw statistics, in standard deviations. F is
            twice the number of channels (means, then log-variances), or the number of classes for the head.
    """
    found = []
    for name, columns in zip(layout.names, layout.columns, strict=True):
        if name not in loadings:
            continue
        moved = loadings[name] @ mean[columns]
        half = len(moved) // 2
        for i in np.argsort(-np.abs(moved))[:N_CHANNELS]:
            if name == layout.names[-1]:
                what = f"logit of class {i}"
            else:
                what = f"mean of channel {i}" if i < half else f"log-variance of channel {i - half}"
            found.append((abs(float(moved[i])), f"{name}: {what}, {moved[i]:+.1f} sd"))
    return tuple(text for _, text in sorted(found, reverse=True)[:N_CHANNELS])


def fit_cut(
    corrupted: Sequence[Array], populations: Sequence[Array], layout: Layout, window: int = 48, seed: int = 0
) -> tuple[float, float]:
    """The depth that best tells corruptions from sub-populations.

    Args:
        corrupted: for each corruption, (N, D) residuals of corrupted reference samples.
        populations: for each sub-population, (N, D) residuals of reference samples.
        layout: the blocks.
        window: samples judged together.
        seed: of the windows' draw.

    Returns:
        The cut, and the share of windows on the right side of it (the mean over both kinds).
    """
    rng = np.random.default_rng(seed)

    def depths(groups: Sequence[Array]) -> Array:
        found = []
        for w in groups:
            for _ in range(30):
                excess = _excess(w[rng.integers(len(w), size=window)].mean(axis=0), layout, window)
                if excess.max() >= QUIET_EXCESS:  # what is quiet raises no alarm
                    found.append(depth(excess))
        return np.sort(found)

    early, late = depths(corrupted), depths(populations)
    if not len(early) or not len(late):
        return DEFAULT_CUT, 0.0
    # Halfway between the bulk of either kind; where those overlap, where they cross.
    cut = (np.quantile(early, 0.95) + np.quantile(late, 0.05)) / 2
    right = (np.searchsorted(early, cut) / len(early) + 1 - np.searchsorted(late, cut) / len(late)) / 2
    return float(cut), float(right)
