"""`python -m bench.unlabelled [--budget-minutes M] [--processes P]`: what else the unlabelled window could be used for.

    TTA_DATA=... python -m bench.unlabelled

The first block under four corruptions, as in `bench.adaptation` (same labels, starts, rates, epochs), with its
unlabelled window used in one way or another beside the labels:

    labels alone          not at all
    information           information maximisation, what the race does (SHOT, Liang et al., ICML 2020)
    pseudo-labels         cross-entropy to its own classes where it is at least 95 % sure (Lee, ICML workshop 2013)
    FixMatch              the same classes, asked of a strongly changed view (Sohn et al., NeurIPS 2020)
    consistency           squared difference of the predictions on two views (Laine and Aila, ICLR 2017)
    information, averaged tuned as by information, its weights then averaged with the start's (WiSE-FT, Wortsman et
                          al., CVPR 2022, alpha 0.5)

Cells are cached under `bench/.cache/unlabelled`. Writes `bench/results/unlabelled.{json,md}`.
"""

import argparse
import itertools
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import kornia.augmentation as ka
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench import adaptation
from bench.adaptation import CACHE, cells_hash, draw_labels, number, prepared, settings_of
from bench.cells import keep, run_missing
from bench.stamp import code_hash, publish, stamp
from tta.adapter import surgery
from tta.adapter.race import Race
from tta.adapter.surgery import WINDOW_SHARE, Plan, label_loss
from tta.adapter.views import Views

SHIFTS = ("gaussian_noise", "contrast", "defocus_blur", "jpeg_compression")
LABELS = (64, 256)
SEEDS = 3
BLOCK = "block1"
SURE = 0.95  # of a class, as in FixMatch on CIFAR-10
USES = ("labels alone", "information", "pseudo-labels", "FixMatch", "consistency")
AVERAGED = "information, averaged"

Json = dict[str, Any]
Loss = Callable[[Views, Tensor, Plan], Tensor]


def strong() -> nn.Module:
    """Changes that FixMatch asks to be looked through: colours, shape, a missing piece."""
    return nn.Sequential(
        ka.RandomHorizontalFlip(p=0.5),
        ka.RandomAffine(
            degrees=20.0, translate=(0.15, 0.15), scale=(0.85, 1.15), p=0.8, padding_mode="reflection"
        ),
        ka.ColorJitter(0.4, 0.4, 0.4, 0.1, p=0.8),
        ka.RandomErasing(scale=(0.05, 0.2), p=0.8),
    )


def with_own_classes(views: Views, rows: Tensor, plan: Plan, change: nn.Module | None) -> Tensor:
    """The labels' loss and that of the classes the network is sure of, on the same view or on a changed one."""
    images = some(views, plan)
    weak = views._view(images)
    other = weak if change is None else views._patient.normalise(change(images))
    n, m = len(rows), len(images)
    logits = views.part(torch.cat([views.labelled(rows), weak, *([] if change is None else [other])]))
    share, own = logits[n : n + m].detach().softmax(1).max(1)
    each = F.cross_entropy(logits[-m:], own, reduction="none")
    return labelled(views, rows, plan, logits) + plan.unlabelled * (each * (share >= SURE)).mean()


def with_consistency(views: Views, rows: Tensor, plan: Plan) -> Tensor:
    """The labels' loss and the squared difference of the predictions on two views of each unlabelled image."""
    images = some(views, plan)
    n, m = len(rows), len(images)
    logits = views.part(torch.cat([views.labelled(rows), views._view(images), views._view(images)]))
    one, two = logits[n : n + m].softmax(1), logits[n + m :].softmax(1)
    return labelled(views, rows, plan, logits) + plan.unlabelled * (one - two).square().sum(1).mean()


def some(views: Views, plan: Plan) -> Tensor:
    """The next unlabelled images, as many as for information maximisation."""
    assert views._window is not None
    return views._window[views._next(WINDOW_SHARE * plan.batch_size, len(views._window))]


def labelled(views: Views, rows: Tensor, plan: Plan, logits: Tensor) -> Tensor:
    """The labels' part of the loss."""
    of_labels = label_loss(logits[: len(rows)], views.labels.y[rows], views.labels.wrong[rows])
    return plan.label_weight * of_labels


def loss_of(use: str) -> Loss:
    """The loss of a step; plans without a window have the daemon's own."""
    ours: Loss = surgery._loss
    change = strong() if use == "FixMatch" else None

    def loss(views: Views, rows: Tensor, plan: Plan) -> Tensor:
        if not plan.unlabelled or use in ("labels alone", "information"):
            return ours(views, rows, plan)
        if use == "consistency":
            return with_consistency(views, rows, plan)
        return with_own_classes(views, rows, plan, change)

    return loss


def run_cell(name: str, n_labels: int, use: str, seed: int) -> Json:
    """Accuracy on the scored images in %; with information also of the weights averaged with the start's."""
    torch.set_num_threads(1)
    shift, starts, window = prepared(name)
    patient = shift.patient
    labels, _ = draw_labels(shift, n_labels, seed)
    settings = settings_of(BLOCK, use != "labels alone", seed)
    ours, surgery._loss = surgery._loss, loss_of(use)
    try:
        race = Race(patient, starts, shift.anatomy, labels, window, shift.suited, settings, lambda *_: None)
        result = race.run()
    finally:
        surgery._loss = ours
    found: Json = {"accuracy": shift.score(result.state), "start": result.start}
    if use == "information":
        start = starts[result.start]
        half = {
            n: (t + start[n].to(t.device)) / 2 if t.is_floating_point() else t for n, t in result.state.items()
        }
        found["averaged"] = shift.score(half)
    return found


def path_of(cell: tuple[str, int, str, int]) -> Path:
    """Where a cell's result is kept."""
    name, n, use, seed = cell
    code = f"{cells_hash()[:8]}{code_hash('bench/unlabelled.py')[:8]}"
    return CACHE / "unlabelled" / code / f"{name}-{n}-{use.replace(' ', '-')}-{seed}.json"


def compute(cell: tuple[str, int, str, int], path: Path) -> None:
    """Run a cell in this process and keep it; labels alone are a cell of `bench.adaptation`, perhaps of this code."""
    name, n, use, seed = cell
    same = adaptation.path_of((name, n, BLOCK, seed), cells_hash())
    keep(path, json.loads(same.read_text()) if use == "labels alone" and same.exists() else run_cell(*cell))


def table(result: Json) -> list[str]:
    """Everything as Markdown."""
    lines = [
        "# Other uses of the unlabelled window",
        "",
        f"{result['date']}, commit {result['commit']}, `{result['command']}`; {result['missing']} of {result['of']} cells",
        f"missing. Accuracy in % on 2,000 other images, mean of {SEEDS} draws of the labels; the first block of a ResNet-20,",
        "CIFAR-10, severity 5, beside 1,500 unlabelled images. What each is: `bench/unlabelled.py`.",
    ]
    for n in LABELS:
        lines += ["", f"**{n} labels**", "", "| use | " + " | ".join(SHIFTS) + " | mean | over labels alone |"]
        lines.append("| --- |" + " --- |" * (len(SHIFTS) + 2))
        alone = mean_of(result, n, "labels alone")
        for use in (*USES, AVERAGED):
            values = [accuracy(result, s, n, use) for s in SHIFTS]
            mean = mean_of(result, n, use)
            gain = "missing" if mean is None or alone is None else f"{mean - alone:+.1f}"
            lines.append(f"| {use} | " + " | ".join(map(number, (*values, mean))) + f" | {gain} |")
    return lines


def accuracy(result: Json, shift: str, n: int, use: str) -> float | None:
    """Mean over the draws; None if one is missing."""
    own, which = ("information", "averaged") if use == AVERAGED else (use, "accuracy")
    found = [c[which] for c in result["cells"] if (c["shift"], c["labels"], c["use"]) == (shift, n, own)]
    return float(np.mean(found)) if len(found) == SEEDS else None


def mean_of(result: Json, n: int, use: str) -> float | None:
    """Mean over the shifts; None if one is missing."""
    values = [accuracy(result, s, n, use) for s in SHIFTS]
    return float(np.mean([v for v in values if v is not None])) if None not in values else None


def main() -> int:
    """Run what is missing and write the table."""
    parser = argparse.ArgumentParser(prog="python -m bench.unlabelled", description=__doc__.splitlines()[0])
    parser.add_argument("--budget-minutes", type=float, default=600.0, help="start no cell after so long")
    parser.add_argument("--processes", type=int, default=2, help="cells at a time, one thread each")
    parser.add_argument("--json", action="store_true", help="print the results as JSON")
    arguments = parser.parse_args()
    every = itertools.product(range(SEEDS), LABELS, SHIFTS, USES)
    cells = [(shift, n, use, seed) for seed, n, shift, use in every]
    run_missing({path_of(c): c for c in cells}, compute, arguments.budget_minutes, arguments.processes)
    found = [
        {"shift": s, "labels": n, "use": u, "seed": seed, **json.loads(path_of((s, n, u, seed)).read_text())}
        for s, n, u, seed in cells
        if path_of((s, n, u, seed)).exists()
    ]
    result = {
        **stamp("python -m bench.unlabelled"),
        "missing": len(cells) - len(found),
        "of": len(cells),
        "cells": found,
    }
    publish("unlabelled", result, table(result), arguments.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
