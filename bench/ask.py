"""Does `tta ask` need fewer labels than asking at random?

    TTA_DATA=... python -m bench.ask [--seeds 2]

From 1,000 predictions of the source model on a shifted stream, n are labelled: chosen at random, the most uncertain, of
each predicted class in turn the most uncertain, or as `tta ask` does, of each predicted class in turn at random. The
block that suits the shift is tuned from re-estimated normalisation on them and on the unlabelled window, and with the
labels alone. Accuracy is on 2,000 other images. Writes `results/ask.{json,md}`.
"""

import argparse
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from bench.shifts import Shift, load_shift
from bench.stamp import publish, stamp
from tta.adapter.methods import block_plans
from tta.adapter.race import Race, Settings
from tta.adapter.starts import starts_of
from tta.adapter.views import Labels
from tta.config import AdaptConfig
from tta.daemon.asking import rank
from tta.daemon.operation import race_settings

SHIFTS = ("gaussian_noise", "contrast", "flip")
N_LABELS = (16, 64)
N_RECENT = 1000
Array = Any
Chooser = Callable[[Array, np.random.Generator], Array]


def at_random(logits: Array, rng: np.random.Generator) -> Array:
    """Any order."""
    return rng.permutation(len(logits))


def uncertain(logits: Array, rng: np.random.Generator) -> Array:
    """The largest entropy first."""
    p = torch.from_numpy(logits).softmax(1)
    return np.argsort((p * p.clamp_min(1e-12).log()).sum(1).numpy(), kind="stable")


def uncertain_in_turn(logits: Array, rng: np.random.Generator) -> Array:
    """The most uncertain of each predicted class in turn."""
    order = uncertain(logits, rng)
    place, seen = np.zeros(len(order), int), np.zeros(logits.shape[1], int)
    for i in order:
        k = logits[i].argmax()
        place[i], seen[k] = seen[k], seen[k] + 1
    return order[np.argsort(place[order], kind="stable")]


def ask(logits: Array, rng: np.random.Generator) -> Array:
    """As the daemon asks, of predictions in any order."""
    order = rng.permutation(len(logits))
    return order[[q.row for q in rank(logits[order])]]


CHOOSERS: dict[str, Chooser] = {
    "random": at_random,
    "uncertain": uncertain,
    "uncertain in turn": uncertain_in_turn,
    "ask": ask,
}


def measure(shift: Shift, n_seeds: int) -> list[dict[str, Any]]:
    """Accuracy in % by chooser, number of labels, seed, and whether the window is used."""
    patient, block = shift.patient, shift.suited
    images = patient.images(shift.x_pool[:N_RECENT])
    patient.load(shift.source)
    logits = patient.logits(images).numpy()
    starts = starts_of(patient, shift.source, shift.anatomy, images, {}, {}, lambda *_: None)
    x, y = patient.images(shift.x_scored), torch.from_numpy(shift.y_scored)
    given = {**race_settings(AdaptConfig()), "selection": block, "budget_s": 1e9}
    found = []
    for seed in range(n_seeds):
        for name, chooser in CHOOSERS.items():
            order = chooser(logits, np.random.default_rng([seed, 3]))
            for n in N_LABELS:
                rows = order[:n]
                labels = Labels.known(images[rows], torch.from_numpy(shift.y_pool[rows]))
                for weight in (0.0, 1.0):
                    settings = Settings(**{**given, "unlabelled": weight, "seed": seed})
                    plan = block_plans(shift.anatomy, block, settings.rates(), settings.fit())[-1]
                    own = replace(settings, learning_rates=(plan.learning_rate,), head_learning_rates=(0.1,))
                    result = Race(
                        patient, starts, shift.anatomy, labels, images, block, own, lambda *_: None
                    ).run()
                    patient.load(result.state)
                    accuracy = round(100 * patient.accuracy(x, y), 2)
                    found.append(
                        {"choice": name, "labels": n, "seed": seed, "window": bool(weight), "accuracy": accuracy}
                    )
                    print(shift.name, found[-1], file=sys.stderr, flush=True)
    return found


def table(result: dict[str, Any]) -> list[str]:
    """As Markdown."""
    lines = [
        "# Which predictions to label",
        "",
        f"{result['date']}, commit {result['commit']}, `{result['command']}`. Accuracy in % after tuning the block that suits the",
        f"shift, mean of {result['seeds']} seeds; ResNet-20, CIFAR-10, 1,000 predictions to choose from.",
    ]
    for window in (False, True):
        lines += ["", "**Labels and window**" if window else "**Labels alone**", ""]
        lines += ["| shift | labels | " + " | ".join(CHOOSERS) + " |", "| --- | --- |" + " --- |" * len(CHOOSERS)]
        for shift, cells in result["cells"].items():
            for n in N_LABELS:
                means = [
                    np.mean(
                        [c["accuracy"] for c in cells if (c["choice"], c["labels"], c["window"]) == (k, n, window)]
                    )
                    for k in CHOOSERS
                ]
                lines.append(f"| {shift} | {n} | " + " | ".join(f"{m:.1f}" for m in means) + " |")
    return lines


def main() -> int:
    """Measure and write."""
    parser = argparse.ArgumentParser(prog="python -m bench.ask", description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=2, help="draws")
    parser.add_argument("--json", action="store_true", help="print the results as JSON")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    cells = {name: measure(load_shift(name), arguments.seeds) for name in SHIFTS}
    result = {**stamp("python -m bench.ask"), "seeds": arguments.seeds, "cells": cells}
    publish("ask", result, table(result), arguments.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
