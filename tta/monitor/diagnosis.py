"""After an alarm: which block, and which kind of shift.

Noise, blur and contrast move early blocks most and fade with depth; a new sub-population moves late ones; when
labels disagree while the features are quiet, the meaning of the output has changed. Depth is the centre of
mass of the blocks' excess over what chance gives. Measured on other data, input corruptions lie under a third of
the depth in nine of ten cases.
"""

from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from tta.monitor.charts import Array, Layout

INPUT_DEPTH = 0.34  # centre of mass below which a shift is input level
QUIET_EXCESS = 3.0  # T² ratio under which a block counts as quiet

Kind = Literal["input", "feature", "output"]


@dataclass(frozen=True)
class Diagnosis:
    """What kind of shift, and where.

    Attributes:
        kind: "input", "feature" or "output" level.
        depth: centre of mass of the excess in [0, 1]; 0 is the first block, 1 the head.
        profile: block name to excess T² (0 is what chance gives).
        block: the block that suits the kind: first, most moved, or head.
    """

    kind: Kind
    depth: float
    profile: dict[str, float] = field(default_factory=dict)
    block: str = ""


def diagnose(window: Array, layout: Layout, errors_up: bool) -> Diagnosis:
    """Judge a window of shifted samples.

    Args:
        window: (N, D) class-centred source features since the alarm.
        layout: the blocks.
        errors_up: labelled errors rose beyond their bound.
    """
    if len(window):
        excess = np.maximum(layout.squares(window.mean(axis=0)) * len(window) - 1.0, 0.0)
    else:
        excess = np.zeros(len(layout.names))
    profile = {name: round(float(e), 3) for name, e in zip(layout.names, excess, strict=True)}
    if errors_up and excess.max() < QUIET_EXCESS:
        return Diagnosis("output", 1.0, profile, layout.names[-1])
    total = float(excess.sum())
    depth = float((excess * np.arange(len(excess))).sum() / total / max(1, len(excess) - 1)) if total else 0.0
    if depth < INPUT_DEPTH:
        return Diagnosis("input", depth, profile, layout.names[0])
    return Diagnosis("feature", depth, profile, layout.names[int(excess.argmax())])
