"""Does clean traffic stay at home beside a regime that looks much like it? `python -m bench.neighbours`.

Fingerprints of shifted digits are taken from 256 samples of the source's features. For each shift: how many looks at
windows of clean traffic leave home for it, and how many samples of the shift are needed to find it. Once
as the daemon does it, and once by distances alone, without asking for the other's direction.
"""

import argparse
import sys
from typing import Any

import numpy as np

from bench.digits import digits_bundle
from bench.soak import shifts
from bench.stamp import publish, stamp
from tta.bundle import load_bundle
from tta.daemon.calibrations import reference_of
from tta.monitor import regimes
from tta.monitor.regimes import LONG, LOOKS, Fingerprint, fingerprint, recognise
from tta.packaging.digits import digits
from tta.server.predictor import Predictor

N_PRINT, N_FOUND = 256, 500
Array = Any


def first_look(home: Fingerprint, other: Fingerprint, window: Array) -> int:
    """The smallest number of newest samples that leaves home for the other; 0 if none does."""
    for n in LOOKS:
        if recognise([(home, window[-n:]), (other, window[-n:])], present=0) == 1:
            return n
    return 0


def run(looks: int) -> dict[str, Any]:
    """Shift to the share of looks that leave home falsely, and to the median number of samples that find it."""
    bundle = load_bundle(digits_bundle())
    predictor = Predictor(bundle, "cpu", 1)
    session, reference = predictor.prepare(), reference_of(bundle)
    rng = np.random.default_rng(0)
    residuals = {}
    for name, (x, _) in shifts(*digits("stream", 1200, seed=31)).items():
        outputs = [predictor.run_with(session, x[i : i + 32]) for i in range(0, len(x), 32)]
        predicted = np.concatenate([o.logits for o in outputs]).argmax(axis=1)
        residuals[name] = (
            reference.residuals(np.concatenate([o.features for o in outputs]), predicted),
            predicted,
        )
    home = fingerprint(bundle.reference["w"], bundle.reference["predictions"])
    found = {}
    for name, (w, predicted) in residuals.items():
        if name in ("clean", "other labels"):
            continue
        rows = rng.integers(0, len(w), N_PRINT)
        other = fingerprint(w[rows], predicted[rows])
        clean, shifted = (
            [first_look(home, other, each[rng.integers(0, len(each), LONG)]) for _ in range(n)]
            for each, n in ((residuals["clean"][0], looks), (w, N_FOUND))
        )
        found[name] = {
            "left": sum(map(bool, clean)) / looks,
            "samples": float(np.median([n for n in shifted if n] or [np.nan])),
            "most": max(shifted),
        }
        print(f"{name}: {found[name]}", file=sys.stderr, flush=True)
    return found


def main() -> int:
    """Measure with and without the direction, and write."""
    parser = argparse.ArgumentParser(prog="python -m bench.neighbours", description=__doc__.splitlines()[0])
    parser.add_argument("--looks", type=int, default=2000, help="at clean traffic, for each shift")
    looks = parser.parse_args().looks
    with_it = run(looks)
    by_direction = regimes.Fingerprint.leans
    try:
        regimes.Fingerprint.leans = lambda self, window, other, inflation=1.0: True  # type: ignore[method-assign]
        without = run(looks)
    finally:
        regimes.Fingerprint.leans = by_direction  # type: ignore[method-assign]
    result = {**stamp("python -m bench.neighbours"), "looks": looks, "present": with_it, "by distance": without}
    lines = [
        "# Neighbours of home",
        "",
        f"{result['date']}, commit {result['commit']}, `{result['command']}`; {looks} windows of clean digits and "
        f"{N_FOUND} of each shift, every one looked at by {', '.join(map(str, LOOKS))} samples.",
        "",
        "| shift | clean windows that leave home for it, % | by distances alone | samples that find it, median, most | by distances alone |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name, f in with_it.items():
        d = without[name]
        lines.append(
            f"| {name} | {100 * f['left']:.2f} | {100 * d['left']:.2f} | {f['samples']:.0f}, {f['most']} "
            f"| {d['samples']:.0f}, {d['most']} |"
        )
    publish("neighbours", result, lines)
    return 0


if __name__ == "__main__":
    sys.exit(main())
