"""Why one block? The two-layer theory of surgical fine-tuning as an experiment.

    python -m bench.theory

A two-layer linear network y = v·B·x that fits the source exactly is fine-tuned by full-batch gradient descent on few
points of two targets (Lee et al., ICLR 2023, section 5):

    input perturbation     x → A·x, one direction amplified 20 times: the first layer B·A⁻¹ is right for the target,
                           and in general no head is
    label scaling          y → 3·y: the head 3·v is right for the target

With fewer points than dimensions the training loss falls to nothing in more than one way; what differs is the loss on the
rest of the target. Tuning the first layer moves the function within the span of the target points; tuning the head
within the span of B; tuning all does both at once and over-fits in the directions of the layer that was right.
Each number is the mean of 20 draws, tuned until the training loss is below 1e-8 or for 20,000 steps, at the largest stable
step size of a grid. Writes `results/theory.{json,md,png}`.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np

from bench.stamp import RESULTS, publish, stamp

DIMENSION, WIDTH = 20, 4
GAIN, SCALE = 20.0, 3.0
POINTS = (1, 2, 3, 4, 6, 8, 12, 16, 20, 40)
DRAWS = 20
STEPS = 20_000
DONE = 1e-8
FLOOR = 1e-8  # of relative losses: less is nothing
RATES = (0.3, 0.1, 0.03, 0.01, 0.003, 0.001, 0.0003)
TUNED = ("first layer", "head", "all")

Array = Any


def target(kind: str, rng: np.random.Generator) -> tuple[Array, Array, Array, Array]:
    """A source network (B, v), the target's true weights, and the map of its inputs."""
    b = rng.normal(size=(WIDTH, DIMENSION)) / np.sqrt(DIMENSION)
    v = rng.normal(size=WIDTH) / np.sqrt(WIDTH)
    if kind == "label scaling":
        return b, v, SCALE * (v @ b), np.eye(DIMENSION)
    u = rng.normal(size=DIMENSION)
    u /= np.linalg.norm(u)
    a = np.eye(DIMENSION) + (GAIN - 1) * np.outer(u, u)
    return b, v, (v @ b) @ np.linalg.inv(a), a


def tune(b: Array, v: Array, x: Array, y: Array, tuned: str) -> tuple[Array, Array]:
    """Gradient descent on mean squared error / 2; the fastest rate that does not diverge."""
    for rate in RATES:
        b1, v1, loss = b.copy(), v.copy(), np.inf
        for _ in range(STEPS):
            hidden = x @ b1.T
            error = (hidden @ v1 - y) / len(y)
            loss = len(y) * float(error @ error) / 2
            if not np.isfinite(loss) or loss > 1e6 or loss < DONE:
                break
            gradient_b, gradient_v = np.outer(v1, error @ x), error @ hidden
            if tuned != "head":
                b1 -= rate * gradient_b
            if tuned != "first layer":
                v1 -= rate * gradient_v
        if np.isfinite(loss) and loss < 1e6:
            return b1, v1
    raise ArithmeticError("no rate converges")


def experiment(kind: str) -> dict[str, dict[str, float]]:
    """Geometric mean of the target loss over the untuned network's, by what is tuned and number of points."""
    losses: dict[str, dict[str, list[float]]] = {t: {str(n): [] for n in POINTS} for t in TUNED}
    for draw in range(DRAWS):
        rng = np.random.default_rng([draw, len(kind)])
        b, v, truth, a = target(kind, rng)
        for n in POINTS:
            x, x_test = rng.normal(size=(n, DIMENSION)) @ a.T, rng.normal(size=(2000, DIMENSION)) @ a.T
            before = np.square(x_test @ (v @ b) - x_test @ truth).mean()
            for tuned in TUNED:
                b1, v1 = tune(b, v, x, x @ truth, tuned)
                after = np.square(x_test @ (v1 @ b1) - x_test @ truth).mean()
                losses[tuned][str(n)].append(max(float(after / before), FLOOR))
    return {
        t: {n: float(np.exp(np.log(values).mean())) for n, values in by_n.items()} for t, by_n in losses.items()
    }


def table(result: dict[str, Any]) -> list[str]:
    """The results as Markdown."""
    lines = [
        "# Which layer, in theory",
        "",
        f"{result['date']}, commit {result['commit']}, `{result['command']}`. Target loss after tuning over the loss before, "
        f"geometric mean of {DRAWS} draws; two-layer linear network, {DIMENSION} → {WIDTH} → 1.",
    ]
    for kind, found in result["shifts"].items():
        lines += ["", f"**{kind}**", "", "| tuned | " + " | ".join(f"{n} points" for n in POINTS) + " |"]
        lines.append("| --- |" + " --- |" * len(POINTS))
        lines += [f"| {t} | " + " | ".join(f"{found[t][str(n)]:.2g}" for n in POINTS) + " |" for t in TUNED]
    return lines


def draw(result: dict[str, Any], path: Path) -> None:
    """Target loss against number of points."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), sharey=True, layout="constrained")
    for axis, (kind, found) in zip(axes, result["shifts"].items(), strict=True):
        for tuned, colour in zip(TUNED, ("#1f6f4a", "#6d8fb3", "#b3673a"), strict=True):
            axis.plot(POINTS, [found[tuned][str(n)] for n in POINTS], "o-", color=colour, label=tuned)
        axis.set_yscale("log")
        axis.set_xscale("log")
        axis.set_xticks(POINTS, [str(n) for n in POINTS])
        axis.set_xticks((), minor=True)
        axis.set_xlabel("target points")
        axis.set_title(kind, fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("target loss, of the untuned network's")
    axes[0].legend(frameon=False, fontsize=9)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def main() -> int:
    """Run and write."""
    parser = argparse.ArgumentParser(prog="python -m bench.theory", description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print JSON")
    arguments = parser.parse_args()
    result = {
        **stamp("python -m bench.theory"),
        "shifts": {k: experiment(k) for k in ("input perturbation", "label scaling")},
    }
    publish("theory", result, table(result), arguments.json)
    draw(result, RESULTS / "theory.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
