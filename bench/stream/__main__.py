"""`python -m bench.stream [--budget-minutes M] [--processes P] [--only METHOD...]`: tta and its peers on one stream.

    TTA_DATA=... python -m bench.stream

The 15 corruptions at severity 5 in the standard order, visited 20 times; see `data.py` for the stream, `ours.py` for
how the daemon's own decisions are driven, `peers.py` for the others. Labels are late or wrong in runs of their own.
Cells are cached under `bench/.cache/stream` by a hash of the code they depend on: an interrupted run goes on where it
stopped, also from the committed results. What was measured of earlier code stays, marked as such, until it is measured
again; what was never measured is shown as missing. Writes `bench/results/stream.{json,md,png}`.
"""

import argparse
import hashlib
import json
import os
import shutil
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

from bench import cifar
from bench.cells import keep, run_missing
from bench.stamp import RESULTS, code_hash, publish, stamp
from bench.stream import report
from bench.stream.data import N_REFERENCE, N_VISITS, stream

SEEDS = 3
# What differs from the defaults. The first attempt is with the labels a corruption has, and nothing depends on seconds:
# a budget would make a run that is held up (other work on the machine, a debugger) differ from one that is not.
SETTINGS: dict[str, Any] = {
    "adapt.labels": 96,
    "adapt.budget_s": 1e9,
    "gate.probation_s": 1e-3,
    "gate.probation_labels": 1000,
}
OURS: dict[str, dict[str, Any]] = {
    "tta": {"adapt.label_free": "immediate"},
    "tta, proven only": {},
    "tta, no rehearsal": {"adapt.label_free": "immediate", "adapt.rehearsal": "off"},
    report.FEEDBACK: {"adapt.label_free": "immediate"},
}
MANY_SEEDS = ("source", "bn", "eata", "eta")  # the two best peers among them
PEERS = ("source", "bn", "roid", "replay", "tent", "eata", "eta", "full")
TOLD = ("eata/told", "eta/told", "bn/told", "replay/told")
SMALL_BATCHES = ("bn/16", "eata/16", "roid/16")
SLOW_PEERS = ("cotta", "bitta")  # 40 passes an image
SHORT = 2  # visits of the runs with late or wrong labels
CODE = ("bench/stream/data.py", "bench/corruptions.py", "bench/cifar.py")
DECIDING = (
    *("case", "cycle", "daemon", "gate", "labellers", "labels", "ledger", "library", "operation"),
    *("probation", "recall", "rehearsals", "treatment", "watch"),
)
OUR_CODE = (
    *("tta/adapter", "tta/monitor", "tta/bundle.py", "tta/server/predictor.py"),
    *(f"tta/daemon/{name}.py" for name in DECIDING),
    *("bench/stream/ours.py", "bench/resnet20.py"),
)
PEER_CODE = ("bench/stream/peers.py", "bench/resnet20.py")

Json = dict[str, Any]


@dataclass(frozen=True)
class Cell:
    """One run of one method."""

    method: str
    seed: int = 0
    visits: int = N_VISITS
    delay: int = 0
    wrong: float = 0.0

    @property
    def name(self) -> str:
        """For its file."""
        method = "".join(c if c.isalnum() else "_" for c in self.method)
        return f"{method}-s{self.seed}-v{self.visits}-d{self.delay}-w{self.wrong:g}"


def cells() -> list[Cell]:
    """All of them, the most telling first."""
    found = [Cell("tta", seed) for seed in range(SEEDS)]
    found += [Cell(m) for m in (*PEERS, *TOLD, *SMALL_BATCHES)]
    found += [Cell("tta", visits=SHORT, delay=1000), Cell("tta", visits=SHORT, wrong=0.1)]
    found += [Cell("tta, proven only"), Cell("tta", visits=SHORT, wrong=0.2)]
    found += [Cell("tta", visits=SHORT, delay=100), Cell("tta", visits=SHORT, wrong=0.05)]
    found += [Cell(m, seed) for seed in range(1, SEEDS) for m in MANY_SEEDS]
    found += [Cell(m, visits=report.FEW_VISITS) for m in (report.FEEDBACK, *SLOW_PEERS)]
    return [*found, Cell("tta, no rehearsal")]


def path_of(cell: Cell) -> Path:
    """Where its result is kept."""
    ours = cell.method in OURS
    settings = json.dumps({**SETTINGS, **OURS[cell.method]}) if ours else ""
    code = code_hash(*CODE, *(OUR_CODE if ours else PEER_CODE))[:16]
    digest = hashlib.sha256(f"{code} {settings}".encode()).hexdigest()[:16]
    return cifar.CACHE / "stream" / f"{cell.name}-{digest}.json"


def unpack() -> dict[str, Json]:
    """Put the runs of the committed results into the cache, if they are of the same code; the others by name."""
    path = RESULTS / "stream.json"
    if not path.exists():
        return {}
    earlier, result = {}, json.loads(path.read_text())
    for stored in result["cells"]:
        cell = Cell(**{k: stored[k] for k in ("method", "seed", "visits", "delay", "wrong")})
        own, stored = path_of(cell), {"commit": result["commit"], **stored}
        if own.stem != stored["key"]:
            earlier[cell.name] = {**stored, "earlier": True}
        elif not own.exists():
            own.parent.mkdir(parents=True, exist_ok=True)
            own.write_text(json.dumps(stored))
    return earlier


def compute(cell: Cell, path: Path) -> None:
    """Run a cell in this process and keep it."""
    x, y, classes = cifar.images("test")
    segments = stream(cell.seed, cell.visits)
    began, log = time.process_time(), path.with_suffix(".log")
    with log.open("w", buffering=1) as out:

        def tell(text: str) -> None:
            print(text, file=out)

        if cell.method in OURS:
            from bench.stream import ours

            bundle, _ = cifar.resnet20_bundle(x[:N_REFERENCE], y[:N_REFERENCE], classes)
            state = Path(tempfile.mkdtemp(prefix="tta-stream-"))
            settings = {**SETTINGS, **OURS[cell.method]}
            try:
                feedback = cell.method == report.FEEDBACK
                found = ours.run(
                    segments,
                    bundle,
                    state / "state",
                    settings,
                    cell.delay,
                    cell.wrong,
                    cell.seed,
                    feedback,
                    tell,
                )
            finally:
                shutil.rmtree(state, ignore_errors=True)
        else:
            from bench.stream import peers

            found = peers.run(segments, cell.method, x[:N_REFERENCE], cell.seed, tell)
    found["cpu_s"] = round(time.process_time() - began, 1)
    found["commit"] = stamp("")["commit"]
    keep(path, found)


def main() -> int:
    """Run what is missing and write the report."""
    parser = argparse.ArgumentParser(prog="python -m bench.stream", description=__doc__.splitlines()[0])
    parser.add_argument("--budget-minutes", type=float, default=600.0, help="start no run after so long")
    parser.add_argument("--processes", type=int, default=2, help="runs at a time, one thread each")
    wanted = cells()
    methods = sorted({cell.method for cell in wanted})
    parser.add_argument("--only", nargs="*", metavar="METHOD", choices=methods, help="run these methods only")
    parser.add_argument("--json", action="store_true", help="print the results as JSON")
    arguments = parser.parse_args()
    earlier = unpack()
    chosen = {path_of(c): c for c in wanted if not arguments.only or c.method in arguments.only}
    run_missing(chosen, compute, arguments.budget_minutes, arguments.processes)
    found = [
        {**asdict(c), **json.loads(path_of(c).read_text()), "key": path_of(c).stem}
        for c in wanted
        if path_of(c).exists()
    ]
    missing = [c.name for c in wanted if not path_of(c).exists()]
    found += [earlier[name] for name in missing if name in earlier]
    missing = [name for name in missing if name not in earlier]
    result = {**stamp("python -m bench.stream"), "missing": missing, "cells": [report.condensed(f) for f in found]}
    publish("stream", result, report.tables(result), arguments.json)
    (RESULTS / "stream_summary.md").write_text("\n".join(report.summary(result)) + "\n")
    report.draw(result, RESULTS / "stream.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
