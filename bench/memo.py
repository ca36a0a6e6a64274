"""Without any label, one image at a time: does MEMO on the first block gain, online and episodic?

    TTA_DATA=... python -m bench.memo [--images 400] [--shift gaussian_noise --shift contrast]

The ResNet-20 with its own normalisation statistics, and with those of the unlabelled window; MEMO on all blocks, on the
first, and on the head; 32 views (flips and crops), one step, the learning rate of the authors. Accuracy is that of the
predictions made on the way. Writes `results/memo.{json,md}`.
"""

import argparse
import sys
from typing import Any

import torch

from bench.shifts import N_WINDOW, load_shift
from bench.stamp import publish, stamp
from tta.adapter.memo import Memo
from tta.adapter.starts import starts_of

LEARNING_RATES = (5e-3, 5e-4)  # the authors' for CIFAR, and a tenth of it
TUNED = ("all", "block1", "head")


def measure(name: str, n_images: int) -> dict[str, Any]:
    """Accuracy in % by start, mode, what is tuned and learning rate, and over the halves of the stream."""
    shift = load_shift(name)
    patient, images = shift.patient, shift.patient.images(shift.x_scored[:n_images])
    y = torch.from_numpy(shift.y_scored[:n_images])
    window = patient.images(shift.x_pool[:N_WINDOW])
    starts = starts_of(patient, shift.source, shift.anatomy, window, {}, {}, lambda *_: None)
    every = {t for tensors in shift.anatomy.tensors.values() for t in tensors}
    found: dict[str, Any] = {}
    for start in ("source", "batch-norm"):
        patient.load(starts[start])
        found[f"{start}, none"] = {"accuracy": 100 * patient.accuracy(images, y)}
        for tuned in TUNED:
            tensors = every if tuned == "all" else shift.anatomy.tensors[tuned]
            for episodic in (False, True):
                for rate in LEARNING_RATES:
                    patient.load(starts[start])
                    memo = Memo(patient, tensors, rate, episodic)
                    right = torch.stack([memo.predict(i).argmax() for i in images]) == y
                    mode = "episodic" if episodic else "online"
                    half = n_images // 2
                    found[f"{start}, {mode}, {tuned}, {rate:g}"] = {
                        "accuracy": 100 * float(right.float().mean()),
                        "first_half": 100 * float(right[:half].float().mean()),
                        "second_half": 100 * float(right[half:].float().mean()),
                    }
                    print(
                        name,
                        start,
                        mode,
                        tuned,
                        rate,
                        found[f"{start}, {mode}, {tuned}, {rate:g}"],
                        file=sys.stderr,
                    )
    return found


def table(result: dict[str, Any]) -> list[str]:
    """The results as Markdown: the better learning rate of each row."""
    lines = [
        "# Without labels, one image at a time (MEMO)",
        "",
        f"{result['date']}, commit {result['commit']}, `{result['command']}`. ResNet-20, severity 5, the first "
        f"{result['images']} scored images, one seed; accuracy in %, the better of the rates "
        f"{', '.join(f'{r:g}' for r in LEARNING_RATES)}; its second half of the stream in brackets.",
        "",
        "| start, mode | " + " | ".join(f"{s}: {t}" for s in result["shifts"] for t in ("none", *TUNED)) + " |",
        "| --- |" + " --- |" * (len(result["shifts"]) * (1 + len(TUNED))),
    ]
    for start in ("source", "batch-norm"):
        for mode in ("online", "episodic"):
            cells = []
            for found in result["shifts"].values():
                cells.append(f"{found[f'{start}, none']['accuracy']:.1f}")
                for tuned in TUNED:
                    best = max(
                        (found[f"{start}, {mode}, {tuned}, {rate:g}"] for rate in LEARNING_RATES),
                        key=lambda cell: cell["accuracy"],
                    )
                    cells.append(f"{best['accuracy']:.1f} ({best['second_half']:.1f})")
            lines.append(f"| {start}, {mode} | " + " | ".join(cells) + " |")
    return lines


def main() -> int:
    """Measure and write."""
    parser = argparse.ArgumentParser(prog="python -m bench.memo", description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=400, help="of each shift")
    parser.add_argument("--shift", action="append", help="corruption; default gaussian_noise and contrast")
    parser.add_argument("--json", action="store_true", help="print JSON")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    result = {
        **stamp("python -m bench.memo"),
        "images": arguments.images,
        "shifts": {s: measure(s, arguments.images) for s in arguments.shift or ("gaussian_noise", "contrast")},
    }
    publish("memo", result, table(result), arguments.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
