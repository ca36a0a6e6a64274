"""How often do labels recognise a cured regime that returns, and how often one that is not? `python -m bench.recall`.

Simulated labels: a cure is chosen by a gate of few labels, which flatter what they choose; its regime returns, and
after 8, 16, 32 and 64 labels the question is put as `RecallByLabels` puts it. Once by `gate.does_as_well`, once by
asking for the regime's accuracy less the margin. Then a version that serves a regime and is worse on the traffic at
hand. Takes seconds. Writes `results/recall.{json,md}`.
"""

import argparse
import sys
from collections.abc import Callable
from typing import Any

import numpy as np

from bench.stamp import publish, stamp
from tta.config import GateConfig
from tta.daemon import gate

LOOKS = (8, 16, 32, 64)  # labels
GATES = (16, 32, 64, 256)  # labels of the gate
CURE, SERVING = 0.8, (0.5, 0.15)  # right where the cure is, and where it is wrong
WRONG = ((0.5, 0.8), (0.6, 0.8), (0.7, 0.8), (0.6, 0.9))  # accuracy now, and in its regime
DRAWS = 2000

Rule = Callable[[list[bool], float], bool]


def by_margin(right: list[bool], accuracy: float) -> bool:
    """The rule that `gate.does_as_well` replaces."""
    return sum(right) / len(right) >= accuracy - gate.AS_WELL_MARGIN


RULES: dict[str, Rule] = {"does_as_well": gate.does_as_well, "margin": by_margin}


def labels(rng: np.random.Generator, n: int, accuracy: float) -> tuple[list[bool], list[bool]]:
    """Correctness of a version and of the serving one on n labels."""
    right = rng.random(n) < accuracy
    return right.tolist(), (rng.random(n) < np.where(right, *SERVING)).tolist()


def recognised(rng: np.random.Generator, accuracy: float, known: float, rule: Rule) -> bool:
    """Whether a version of this accuracy is taken for the cure of a regime in which it has the known one."""
    own, serving = labels(rng, LOOKS[-1], accuracy)
    for look, n in enumerate(LOOKS):
        alpha = GateConfig().alpha * 0.5 ** (look + 1)
        accepted = gate.judge(own[:n], serving[:n], own[:n], None, alpha).outcome == "accepted"
        if accepted and rule(own[:n], known):
            return True
    return False


def chosen(rng: np.random.Generator, n: int) -> float:
    """Accuracy of a cure on the labels of the gate that accepted it."""
    while True:
        own, serving = labels(rng, n, CURE)
        if gate.judge(own, serving, own, None, GateConfig().alpha / 2).outcome == "accepted":
            return sum(own) / n


def table(result: dict[str, Any]) -> list[str]:
    """As Markdown."""
    lines = [
        "# Recall by labels",
        "",
        f"{result['date']}, commit {result['commit']}, `{result['command']}`. Of 100 returns, {DRAWS:,} simulated, how many are",
        f"recognised within {LOOKS[-1]} labels, by `gate.does_as_well` and by a margin of {gate.AS_WELL_MARGIN:g} alone.",
        "",
        "| version | " + " | ".join(RULES) + " |",
        "| --- |" + " --- |" * len(RULES),
    ]
    for what, found in result["recognised"].items():
        lines.append(f"| {what} | " + " | ".join(f"{100 * found[rule]:.0f}" for rule in RULES) + " |")
    return lines


def main() -> int:
    """Simulate and write."""
    parser = argparse.ArgumentParser(prog="python -m bench.recall", description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print the results as JSON")
    arguments = parser.parse_args()
    rng, found = np.random.default_rng(0), {}
    for n in GATES:
        found[f"a cure right on {CURE:.0%}, accepted by {n} labels"] = {
            name: float(np.mean([recognised(rng, CURE, chosen(rng, n), rule) for _ in range(DRAWS)]))
            for name, rule in RULES.items()
        }
    for now, there in WRONG:
        found[f"none: right on {now:.0%}, in its regime on {there:.0%}"] = {
            name: float(np.mean([recognised(rng, now, there, rule) for _ in range(DRAWS)]))
            for name, rule in RULES.items()
        }
    result = {**stamp("python -m bench.recall"), "recognised": found}
    publish("recall", result, table(result), arguments.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
