"""A picture of a scenario: accuracy, drift and version over the stream. Needs matplotlib."""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tta.scenario.run import Scenario

Array = npt.NDArray[Any]


def draw_timeline(scenario: Scenario, path: Path, title: str) -> None:
    """A picture of accuracy, drift statistic and versions over the stream; needs matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(
        3, 1, figsize=(11, 7), sharex=True, height_ratios=[3, 2, 1.2], layout="constrained"
    )
    kinds = {"none": "#ffffff", "input": "#fde8d7", "output": "#e3e6fb"}
    ends = [first for first, _ in scenario.starts[1:]] + [len(scenario.sent)]
    for (first, _), end, phase in zip(scenario.starts, ends, scenario.phases, strict=True):
        for axis in axes:
            axis.axvspan(first, end, color=kinds[phase.shift_kind], zorder=0)
        axes[0].text((first + end) / 2, 1.04, phase.name, ha="center", va="bottom", fontsize=9)
    right = np.array(
        [scenario.is_right(s) if s.logits is not None and scenario.is_scored(s) else np.nan for s in scenario.sent]
    )
    if scenario.source_logits is not None:
        classes = scenario.source_logits.argmax(axis=1)
        source = np.array(
            [
                float(classes[scenario.flat_index(s)] == scenario.phases[s.phase].y[s.index])
                if scenario.is_scored(s)
                else np.nan
                for s in scenario.sent
            ]
        )
        axes[0].plot(_rolling(source, 100), color="#9a9a9a", linewidth=1.2, label="source model, same images")
    axes[0].plot(_rolling(right, 100), color="#1f6f4a", linewidth=1.6, label="served, last 100 unlabelled")
    axes[0].set_ylim(0, 1.02)
    axes[0].set_ylabel("accuracy")
    axes[0].legend(loc="lower left", fontsize=8, frameon=False)
    samples = [m.sent for m in scenario.moments]
    names = list(scenario.moments[0].drift)
    colours = plt.get_cmap("viridis")(np.linspace(0, 0.9, len(names)))
    for name, colour in zip(names, colours, strict=True):
        values = [max(m.drift[name], 1e-2) for m in scenario.moments]
        axes[1].plot(samples, values, color=colour, linewidth=1, label=name)
    axes[1].axhline(1, color="#b3261e", linewidth=1, linestyle="--")
    axes[1].set_yscale("log")
    axes[1].set_ylim(top=20 * max(1.0, *(v for m in scenario.moments for v in m.drift.values())))
    axes[1].set_ylabel("drift / threshold")
    axes[1].legend(loc="upper left", ncols=len(names), fontsize=8, frameon=False)
    versions = [s.version if s.version >= 0 else np.nan for s in scenario.sent]
    axes[2].plot(versions, color="#333333", linewidth=1.6, drawstyle="steps-post")
    axes[2].set_yticks(sorted({int(v) for v in versions if v == v}))
    axes[2].set_ylabel("version")
    axes[2].set_xlabel("images")
    marks = {
        "alarm": ("#b3261e", "alarm"),
        "swapped": ("#1f6f4a", "swap"),
        "home_recognised": ("#2457a6", "home"),
    }
    used = set()
    for event in scenario.events:
        if event["event"] in marks:
            colour, text = marks[event["event"]]
            axes[2].axvline(
                event["sequence"], color=colour, linewidth=1, alpha=0.7, label=None if text in used else text
            )
            used.add(text)
    axes[2].legend(loc="upper left", ncols=3, fontsize=8, frameon=False)
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.margins(x=0)
    figure.suptitle(title, fontsize=11)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _rolling(values: Array, n: int) -> Array:
    """Mean of the last n values that are not NaN."""
    known = ~np.isnan(values)
    total = np.cumsum(np.where(known, values, 0.0))
    count = np.cumsum(known)
    index = np.searchsorted(count, np.maximum(count - n, 0), side="right") - 1
    base_total = np.where(count > n, total[np.maximum(index, 0)], 0.0)
    base_count = np.where(count > n, count[np.maximum(index, 0)], 0)
    return (total - base_total) / np.maximum(count - base_count, 1)  # type: ignore[no-any-return]
