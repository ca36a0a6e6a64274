"""How well does each method adapt to one shift at a time, from few labels?

    TTA_DATA=... python -m bench.adaptation [--budget-minutes 60] [--seeds 3] [--processes 2]

Cells of shift × labels × method × seed, cached under `bench/.cache/adaptation` by a hash of the adapter's code and the
cell: an interrupted run goes on where it stopped, also from the committed results, and what is missing is shown as
missing. All methods have the same labels, starts, augmentation, epochs and held-out choice of the learning rate (two
folds of the fit labels); full fine-tuning is also tried at each rate, and the better on the scored images taken, which
no choice can beat. Those marked "+ window" tune on the unlabelled window beside the labels, as the daemon does; the
paper's do not. Writes `results/adaptation.{json,md,png}`.
"""

import argparse
import hashlib
import itertools
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.cells import keep, run_missing
from bench.cifar import CACHE
from bench.corruptions import APPROXIMATE, CORRUPTIONS
from bench.shifts import N_WINDOW, SEVERITY, Shift, load_shift
from bench.stamp import code_hash, stamp
from tta.adapter.race import Race, Settings
from tta.adapter.starts import starts_of
from tta.adapter.views import Labels
from tta.config import AdaptConfig, GateConfig
from tta.daemon import gate
from tta.daemon.operation import race_settings

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results"
CORE = ("gaussian_noise", "contrast", "defocus_blur", "jpeg_compression", "population", "flip", "spurious")
ONCE = ("spurious",)  # one draw of the labels
LABELS = (16, 64, 256, 1000)
BLOCKS = ("block1", "block2", "block3", "head")
PAPER = ("all", "all-rates", "l1", "first-to-last", "last-to-first", "auto-rgn", "auto-snr")
# A method with the unlabelled window, and the same without; the race has it by default.
WINDOW = (("block1 + window", "block1"), ("all + window", "all"), ("race", "race, labels alone"))
ABLATIONS = ("block1 + window", "all + window", "race, labels alone")
BOUND = "all, rate by the scored images"  # no rule that chooses between its rates can do better
METHODS = ("source", "batch-norm", *BLOCKS, *PAPER, "race", *ABLATIONS)
GATE_SHARE = 2 / 3  # gate labels for each fit label, as the daemon splits them

Json = dict[str, Any]


def settings_of(selection: str, window: bool, seed: int) -> Settings:
    """The daemon's defaults, but for what is tuned."""
    given = race_settings(AdaptConfig())
    changes = {"selection": selection, "budget_s": 1e9, "seed": seed, **({} if window else {"unlabelled": 0.0})}
    return Settings(**{**given, **changes})


@lru_cache(maxsize=2)
def prepared(name: str) -> tuple[Shift, dict[str, Any], Any]:
    """The shift, its starts, and its window."""
    shift = load_shift(name)
    window = shift.patient.images(shift.x_pool[:N_WINDOW])
    starts = starts_of(shift.patient, shift.source, shift.anatomy, window, {}, {}, lambda *_: None)
    return shift, starts, window


def draw_labels(shift: Shift, n_labels: int, seed: int) -> tuple[Labels, Any]:
    """Labels to fit, and the places in the pool of those that judge."""
    order = np.random.default_rng([seed, 1]).permutation(len(shift.y_pool))
    fit, judge = order[:n_labels], order[n_labels : n_labels + round(GATE_SHARE * n_labels)]
    images = shift.patient.images(shift.x_pool[fit])
    return Labels.known(images, torch.from_numpy(shift.y_pool[fit])), judge


def run_cell(name: str, n_labels: int, method: str, seed: int) -> Json:
    """Accuracy on the scored images in %, what was chosen, seconds, and what the gate says."""
    torch.set_num_threads(1)
    shift, starts, window = prepared(name)
    patient = shift.patient
    if method in ("source", "batch-norm"):
        return {"accuracy": shift.score(starts[method])}
    labels, judge = draw_labels(shift, n_labels, seed)
    if method == BOUND:
        settings, by_rate = settings_of("all", False, seed), {}
        for rate in settings.learning_rates:
            own = replace(settings, learning_rates=(rate,))
            fit = Race(patient, starts, shift.anatomy, labels, window, shift.suited, own, lambda *_: None).run()
            by_rate[str(fit.report["learning_rate"])] = shift.score(fit.state)
        return {"accuracy": max(by_rate.values()), "by_rate": by_rate}
    selection = method.removesuffix(" + window").removesuffix(", labels alone")
    settings = settings_of(selection, method in [both for both, _ in WINDOW], seed)
    began = time.process_time()
    race = Race(patient, starts, shift.anatomy, labels, window, shift.suited, settings, lambda *_: None)
    result = race.run()
    seconds = time.process_time() - began
    found: Json = {
        "accuracy": shift.score(result.state),
        "block": result.block,
        "start": result.start,
        "learning_rate": result.report["learning_rate"],
        "seconds": round(seconds, 2),
        "cross_validated": max((r["accuracy"] for r in result.report["race"]), default=None),
    }
    if method == "race":
        x_gate, y_gate = patient.images(shift.x_pool[judge]), torch.from_numpy(shift.y_pool[judge])

        def right(state: Any) -> list[bool]:
            patient.load(state)
            return (patient.logits(x_gate).argmax(1) == y_gate).tolist()

        source = right(starts["source"])
        free = right(starts["batch-norm"])
        verdict = gate.judge(right(result.state), source, source, free, GateConfig().alpha / 4)
        found["gate"] = {"outcome": verdict.outcome, "p_val": verdict.p_val, "reason": verdict.reason}
    return found


def wanted(n_seeds: int) -> list[tuple[str, int, str, int]]:
    """Every cell, the most telling first; `ONCE` has one draw of the labels."""
    first = ("source", "batch-norm", "race", "all", "block1", "head", "all-rates", "block2", "block3")
    rest = [m for m in PAPER if m not in first]
    others = [c for c in CORRUPTIONS if c not in CORE]
    drawn = [c for c in CORE if c not in ONCE]

    def core(
        methods: Sequence[str], seeds: Sequence[int], shifts: Sequence[str]
    ) -> list[tuple[str, int, str, int]]:
        every = itertools.product(seeds, methods, (64, 256), shifts)
        return [(shift, n, method, seed) for seed, method, n, shift in every]

    return [
        *core(first, [0], CORE),
        *((shift, 256, m, 0) for m in ("source", "batch-norm", "race", "all", "block1") for shift in others),
        *((shift, 16, m, 0) for m in ("race", "all", "block1") for shift in CORE),
        *core(rest, [0], CORE),
        *core(first, range(1, n_seeds), drawn),
        *core(rest, range(1, n_seeds), drawn),
        *core(ABLATIONS, [0], CORE),
        *core(ABLATIONS, range(1, n_seeds), drawn),
        *core([BOUND], range(n_seeds), [s for s in CORE if s in CORRUPTIONS]),
        *((shift, 1000, m, 0) for m in ("race", "all", "block1") for shift in CORE),
    ]


def cells_hash() -> str:
    """Of everything a cell depends on."""
    settings = repr((settings_of("race", True, 0), GateConfig().alpha))
    names = ("criteria", "methods", "patient", "race", "starts", "surgery", "views")
    does = code_hash(*(f"tta/adapter/{name}.py" for name in names), "bench/shifts.py")
    return hashlib.sha256((settings + does).encode()).hexdigest()[:16]


def path_of(cell: tuple[str, int, str, int], code: str) -> Path:
    """Where a cell's result is kept; source and normalisation depend on neither labels nor seed."""
    name, n, method, seed = cell
    if method in ("source", "batch-norm"):
        n, seed = 0, 0
    return CACHE / "adaptation" / code / f"{name}-{n}-{method.replace(' ', '')}-{seed}.json"


def unpack(code: str) -> None:
    """Put the cells of the committed results into the cache, if they are of the same code."""
    path = RESULTS / "adaptation.json"
    stored = json.loads(path.read_text()) if path.exists() else {}
    if stored.get("code") != code:
        return
    (CACHE / "adaptation" / code).mkdir(parents=True, exist_ok=True)
    for name, by_n in stored["cells"].items():
        for n, by_method in by_n.items():
            for method, by_seed in by_method.items():
                for seed, found in by_seed.items():
                    own = path_of((name, int(n), method, int(seed)), code)
                    if not own.exists():
                        own.write_text(json.dumps(found))


def compute(cell: tuple[str, int, str, int], path: Path) -> None:
    """Run a cell in this process and keep it."""
    keep(path, run_cell(*cell))


def run(cells: list[tuple[str, int, str, int]], code: str, minutes: float, processes: int) -> None:
    """Compute what is missing until the time is up."""
    missing = {path_of(c, code): c for c in cells if not path_of(c, code).exists()}
    for name in {cell[0] for cell in missing.values()}:
        load_shift(name)  # here once, since some train a model first
    run_missing(missing, compute, minutes, processes)


def main() -> int:
    """Run what is missing and write the report."""
    parser = argparse.ArgumentParser(prog="python -m bench.adaptation", description=__doc__.splitlines()[0])
    parser.add_argument("--budget-minutes", type=float, default=600.0, help="start no cell after so long")
    parser.add_argument("--seeds", type=int, default=3, help="draws of the labels")
    parser.add_argument("--processes", type=int, default=2, help="cells at a time, one thread each")
    parser.add_argument("--json", action="store_true", help="print the results as JSON")
    arguments = parser.parse_args()
    code, cells = cells_hash(), wanted(arguments.seeds)
    unpack(code)
    run(cells, code, arguments.budget_minutes, arguments.processes)
    found: Json = {}
    for cell in cells:
        path = path_of(cell, code)
        if path.exists():
            found.setdefault(cell[0], {}).setdefault(str(cell[1]), {}).setdefault(cell[2], {})[str(cell[3])] = (
                json.loads(path.read_text())
            )
    result = {
        **stamp("python -m bench.adaptation"),
        "code": code,
        "missing": sum(not path.exists() for path in {path_of(c, code) for c in cells}),
        "of": len({path_of(c, code) for c in cells}),
        "cells": found,
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "adaptation.json").write_text(json.dumps(result, indent=1) + "\n")
    (RESULTS / "adaptation_summary.md").write_text("\n".join(summary(result)) + "\n")
    text = "\n".join(tables(result)) + "\n"
    (RESULTS / "adaptation.md").write_text(text)
    draw(result, RESULTS / "adaptation.png")
    print(json.dumps(result, indent=1) if arguments.json else text)
    return 0


def mean(cells: Json, shift: str, n: int, method: str) -> float | None:
    """Accuracy of a method over the seeds there are; None for none."""
    if method == "cross-validate":
        values = [cross_validated(cells, shift, n, seed) for seed in seeds(cells, shift, n, "block1")]
        known = [v for v in values if v is not None]
        return float(np.mean(known)) if known else None
    found = cells.get(shift, {}).get(str(n), {}).get(method, {})
    return float(np.mean([c["accuracy"] for c in found.values()])) if found else None


def seeds(cells: Json, shift: str, n: int, method: str) -> list[str]:
    """Seeds of a method's cells."""
    return list(cells.get(shift, {}).get(str(n), {}).get(method, {}))


def cross_validated(cells: Json, shift: str, n: int, seed: str) -> float | None:
    """The paper's Cross-Val: accuracy of the block that did best on held-out labels at one of its rates.

    It was tuned at the first rate within one standard error of that.
    """
    here = cells[shift][str(n)]
    blocks = [here.get(b, {}).get(seed) for b in BLOCKS]
    if any(b is None for b in blocks):
        return None
    best: Json = max(blocks, key=lambda b: b["cross_validated"])
    return float(best["accuracy"])


def tables(result: Json) -> list[str]:
    """Everything as Markdown."""
    cells = result["cells"]
    shown = (*METHODS[:6], "cross-validate", *METHODS[6:])
    lines = [
        "# One shift at a time",
        "",
        f"{result['date']}, commit {result['commit']}, `{result['command']}`; {result['missing']} of {result['of']} cells missing. Accuracy",
        "in % on 2,000 images apart from labels and window; means over the seeds there are. ResNet-20, CIFAR-10 test",
        f"images, severity {SEVERITY}; corruptions CIFAR-10-C-style, ours in part: {', '.join(APPROXIMATE)}; the",
        "spurious set, here alone, is scored by the worst group of class and whether the frame tells it. All methods but",
        'source and batch-norm have the same labels, starts, augmentation, epochs and held-out choice of rate; "race" and',
        '"+ window" also tune on 1,500 unlabelled images. "race" is what the daemon does.',
    ]
    for n in LABELS:
        columns = [s for s in CORE if seeds(cells, s, n, "race")]
        if not columns:
            continue
        n_seeds = max(len(seeds(cells, s, n, "race")) for s in columns)
        lines += ["", f"**{n} labels** ({n_seeds} seeds)", ""]
        lines += ["| method | " + " | ".join(columns) + " | mean |", "| --- |" + " --- |" * (len(columns) + 1)]
        for method in shown:
            values = [mean(cells, s, n, method) for s in columns]
            if all(v is None for v in values):
                continue
            known = [v for v in values if v is not None]
            row = [*map(number, values), number(float(np.mean(known)) if len(known) == len(columns) else None)]
            name = f"**{method}**" if method == "race" else method
            lines.append(f"| {name} | " + " | ".join(row) + " |")
        lines += ["", "Race against the others, in points: " + "; ".join(margins(cells, n)) + "."]
        gains = window_gains(cells, n)
        if gains:
            lines += ["", "The window's worth on the same draws, in points: " + "; ".join(gains) + "."]
    lines += corruption_table(cells)
    lines += decision_lines(cells)
    lines += cost_table(cells)
    return lines


def summary(result: Json) -> list[str]:
    """The table of the README."""
    cells = result["cells"]
    methods = ("source", "batch-norm", "all", "auto-rgn", "cross-validate", "race")
    methods = tuple(m for m in methods if any(mean(cells, s, 256, m) is not None for s in CORE))
    lines = [
        f"{result['date']}, commit {result['commit']}, `{result['command']}`; accuracy in % on 2,000 other images:",
        "",
        "| shift, severity 5 | labels | " + " | ".join(methods) + " |",
        "| --- | --- |" + " --- |" * len(methods),
    ]
    for shift in CORE:
        for n in (64, 256):
            values = [mean(cells, shift, 256 if m in ("source", "batch-norm") else n, m) for m in methods]
            if values[-1] is not None:
                lines.append(f"| {shift} | {n} | " + " | ".join(map(number, values)) + " |")
    for n in (64, 256):
        if margins(cells, n):
            lines += ["", f"The race at {n} labels, in points against " + "; ".join(margins(cells, n)) + "."]
    return lines


def number(value: float | None) -> str:
    """A table's cell."""
    return "missing" if value is None else f"{value:.1f}"


def window_gains(cells: Json, n: int) -> list[str]:
    """What the unlabelled window adds to a method, on the draws of the labels that have both."""
    found = []
    corruptions = [s for s in CORE if s in CORRUPTIONS]
    for method, alone in WINDOW:
        gains = {s: _gain(cells, s, n, method, alone) for s in CORE}
        of = [gains[s] for s in corruptions]
        titles = {
            "corruptions": of,
            **{s: [gains[s]] for s in CORE if s not in corruptions},
            f"all {len(CORE)}": list(gains.values()),
        }
        parts = [f"{title} {np.mean(g):+.1f}" for title, g in titles.items() if not np.isnan(g).any()]
        if parts:
            found.append(f"{method.removesuffix(' + window')} on " + ", ".join(parts))
    return found


def _gain(cells: Json, shift: str, n: int, method: str, other: str) -> float:
    """Mean difference on the draws that both have; NaN for none."""
    own, others = (cells.get(shift, {}).get(str(n), {}).get(m, {}) for m in (method, other))
    both = [own[seed]["accuracy"] - others[seed]["accuracy"] for seed in own if seed in others]
    return float(np.mean(both)) if both else float("nan")


def margins(cells: Json, n: int) -> list[str]:
    """Mean differences of the race to what it has to beat."""
    found = []
    corruptions = [s for s in CORE if s in CORRUPTIONS]
    for title, others, shifts in (
        ("full fine-tuning on corruptions", "all", corruptions),
        ("the same at whichever of its rates is better on the scored images", BOUND, corruptions),
        ("full fine-tuning on the flip", "all", ["flip"]),
        ("the same with the head's own rate", "all-rates", ["flip"]),
        ("exhaustive cross-validation", "cross-validate", list(CORE)),
    ):
        pairs = [(mean(cells, s, n, "race"), mean(cells, s, n, others)) for s in shifts]
        known = [(a, b) for a, b in pairs if a is not None and b is not None]
        if known:
            found.append(f"{title} {np.mean([a - b for a, b in known]):+.1f}")
    return found


def corruption_table(cells: Json) -> list[str]:
    """All corruptions at 256 labels, one seed."""
    methods = ("source", "batch-norm", "all", "block1", "race")
    lines = ["", "**All corruptions, 256 labels, one seed**", ""]
    lines += ["| corruption | " + " | ".join(methods) + " | tuned |", "| --- |" + " --- |" * (len(methods) + 1)]
    sums: dict[str, list[float]] = {m: [] for m in methods}
    for shift in CORRUPTIONS:
        here = cells.get(shift, {}).get("256", {})
        values = [here.get(m, {}).get("0", {}).get("accuracy") for m in methods]
        for m, v in zip(methods, values, strict=True):
            if v is not None:
                sums[m].append(v)
        tuned = here.get("race", {}).get("0", {}).get("block", "")
        lines.append(f"| {shift} | " + " | ".join(map(number, values)) + f" | {tuned} |")
    complete = {m: float(np.mean(v)) if len(v) == len(CORRUPTIONS) else None for m, v in sums.items()}
    lines.append("| mean | " + " | ".join(number(v) for v in complete.values()) + " | |")
    return lines


def decision_lines(cells: Json) -> list[str]:
    """What the gate said of the race's candidates, and which blocks won."""
    accepted = harmful = total = 0
    worst = 0.0
    blocks: dict[str, dict[str, int]] = {}
    for shift, by_n in cells.items():
        source = mean(cells, shift, 256, "source")
        for cell in [c for methods in by_n.values() for c in methods.get("race", {}).values()]:
            total += 1
            chosen = blocks.setdefault(shift, {})
            chosen[cell["block"]] = chosen.get(cell["block"], 0) + 1
            if source is not None and cell["gate"]["outcome"] == "accepted":
                accepted += 1
                harmful += cell["accuracy"] < source
                worst = min(worst, cell["accuracy"] - source)
    lines = ["", "**Gate.** " + f"{accepted} of {total} candidates accepted, {harmful} of them below the source"]
    lines[-1] += f" (worst {worst:+.1f} points)." if harmful else "."
    lines += ["", "| shift | blocks chosen |", "| --- | --- |"]
    for shift, counts in blocks.items():
        each = ", ".join(f"{b} {n}" for b, n in sorted(counts.items(), key=lambda item: -item[1]))
        lines.append(f"| {shift} | {each} |")
    return lines


def cost_table(cells: Json) -> list[str]:
    """CPU seconds of each method at 256 labels, and of one full fine-tuning run alone."""
    lines = ["", "**Cost at 256 labels**, CPU seconds on one thread, choice of the rate included", ""]
    lines += ["| method | seconds | of one full fine-tuning run |", "| --- | --- | --- |"]
    spent = {}
    for method in METHODS[2:]:
        every = [c["seconds"] for s in CORE for c in cells.get(s, {}).get("256", {}).get(method, {}).values()]
        if every:
            spent[method] = float(np.mean(every))
    if "all" in spent:
        one = spent["all"] / 3  # two rates by two folds of half the labels each, and the final fit
        lines += [f"| {m} | {s:.1f} | {s / one:.1f}× |" for m, s in spent.items()]
    return lines


def draw(result: Json, path: Path) -> None:
    """Bars of the main methods at 64 and 256 labels."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    cells = result["cells"]
    methods = ("source", "batch-norm", "all", "auto-rgn", "cross-validate", "race")
    colours = ("#c9c9c9", "#9a9a9a", "#d9a441", "#b3673a", "#6d8fb3", "#1f6f4a")
    figure, axes = plt.subplots(2, 1, figsize=(10, 6.5), sharex=True, layout="constrained")
    for axis, n in zip(axes, (64, 256), strict=True):
        for i, (method, colour) in enumerate(zip(methods, colours, strict=True)):
            values = [mean(cells, s, n, method) for s in CORE]
            heights = [v if v is not None else 0 for v in values]
            bars = axis.bar(np.arange(len(CORE)) + (i - 2.5) * 0.14, heights, 0.13, color=colour, label=method)
            if method == "race":
                axis.bar_label(bars, fmt="%.0f", fontsize=8)
        axis.set_ylabel(f"accuracy in %, {n} labels")
        axis.set_ylim(0, 100)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].legend(ncols=6, fontsize=8, frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    axes[1].set_xticks(range(len(CORE)), CORE)
    figure.suptitle("One shift at a time, ResNet-20 on CIFAR-10", fontsize=11)
    figure.savefig(path, dpi=100)
    plt.close(figure)


if __name__ == "__main__":
    sys.exit(main())
