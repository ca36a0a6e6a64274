"""Does the whole loop work on CIFAR-10? The real daemon on a ResNet-20, through noise and contrast and back.

    TTA_DATA=... python -m bench.cifar_loop [--json]

clean → Gaussian noise (severity 5) → clean → contrast (severity 5) → clean → noise again → clean. 256 labels to fit
and 128 for the gate on each new shift, none on the return. 2,000 test images are the reference, 3,000 others the
stream; accuracy is on those of the 3,000 that were never labelled. Writes `results/cifar_loop.{json,md,png}`.
"""

import argparse
import json
import shutil
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np

from bench import cifar
from bench.cost import Costs
from bench.cost import table as cost_table
from bench.stamp import stamp
from tta.commands.demo import _View, print_report
from tta.scenario import DaemonProcess, Phase, Scenario, draw_timeline, measure

RESULTS = Path(__file__).parent / "results"
N_REFERENCE = 2000
LABELS = 384
SETTINGS = {
    "adapt.labels": LABELS - 8,  # a few labels belong to images from before the onset
    "adapt.window": 1500,
    "labels.fit_fraction": 256 / 384,
    "gate.probation_s": 5.0,
    "gate.probation_labels": 1000,
}


def phases() -> list[Phase]:
    """The stream; the same 3,000 images in each phase, each time in another order.

    In one order, three odd images in a row would be the same false alarm in every clean phase.
    """
    rng = np.random.default_rng(0)
    x, y, _ = cifar.images("test")
    x, y = x[N_REFERENCE:], y[N_REFERENCE:]
    noise, again, contrast = cifar.gaussian_noise(x, 1), cifar.gaussian_noise(x, 2), cifar.contrast(x)

    def shifted(name: str, images: cifar.Array, labels: int) -> Phase:
        fraction, order = 0.5 if labels else 0.0, rng.permutation(len(x))
        return Phase(
            name, "input", images[order], y[order], fraction, labels, cured=True, after=len(x), limit_s=300
        )

    def clean(name: str, cured: bool = True) -> Phase:
        order = rng.permutation(len(x))
        return Phase(name, "none", x[order], y[order], 0.0, 0, cured=cured, after=1500, limit_s=120)

    return [
        clean("clean", cured=False),
        shifted("noise", noise, LABELS),
        clean("clean 2"),
        shifted("contrast", contrast, LABELS),
        clean("clean 3"),
        shifted("noise again", again, 0),
        clean("clean 4"),
    ]


def main() -> int:
    """Run it; 1 if a promise was broken."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    parser.add_argument("--rate", type=float, default=60.0, help="images a second")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the results")
    arguments = parser.parse_args()
    x, y, classes = cifar.images("test")
    path, _ = cifar.resnet20_bundle(x[:N_REFERENCE], y[:N_REFERENCE], classes)
    folder = cifar.CACHE / "cifar_loop"
    shutil.rmtree(folder, ignore_errors=True)
    daemon = DaemonProcess(path, folder, SETTINGS)
    daemon.start()
    view = _View(quiet=arguments.json)
    costs = Costs(daemon)

    def look(scenario: Scenario) -> None:
        costs.look(scenario)
        view.show(scenario)

    scenario = Scenario(daemon, phases(), arguments.rate, view=look)
    try:
        with view:
            scenario.run()
        cost = costs.report(scenario)
    finally:
        daemon.stop()
    report = measure(scenario, path)
    result = {
        **stamp("python -m bench.cifar_loop"),
        **asdict(report),
        "cost": cost,
    }
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "cifar_loop.json").write_text(json.dumps(result, indent=1) + "\n")
    (arguments.out / "cifar_loop.md").write_text(table(result))
    run = f"{result['date']}, commit {result['commit']}, `{result['command']}`."
    (arguments.out / "cost.md").write_text(
        "\n".join(["# Cost of an operation", "", run, *cost_table(cost)]) + "\n"
    )
    draw_timeline(
        scenario,
        arguments.out / "cifar_loop.png",
        "CIFAR-10, ResNet-20: the daemon through noise and contrast",
    )
    if arguments.json:
        print(json.dumps(result, indent=1))
    else:
        print_report(report)
    return 1 if report.failures else 0


def table(result: dict) -> str:
    """The result as Markdown."""
    lines = [
        "# The loop on CIFAR-10",
        "",
        f"{result['date']}, commit {result['commit']}, `{result['command']}`. ResNet-20 on the CPU, accuracy in % on images never labelled.",
        "",
        "| phase | noticed after | source | before | after | images | block | version | labels | seconds to recover |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for p in result["phases"]:
        cells = [
            p["name"],
            p["alarm_after_samples"],
            *(
                None if p[k] is None else round(100 * p[k], 1)
                for k in ("accuracy_source", "accuracy_before", "accuracy_after")
            ),
            p["images_after"] or None,
            p["block"] or None,
            f"{p['version']}{' (library)' if p['from_library'] and p['version'] else ''}",
            p["labels"],
            p["seconds_to_recover"],
        ]
        lines.append("| " + " | ".join("–" if c is None else str(c) for c in cells) + " |")
    lines += [
        "",
        f"{result['requests']} requests, {result['lost']} lost, {result['mixed_version_replies']} replies of mixed version, "
        f"{result['alarms_clean']} alarms in clean phases ({result['alarms_clean_expected']} expected), "
        f"{result['promotions_clean']} promotions there, {result['labels_used']} labels, {result['seconds']:.0f} s.",
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
