"""`python -m bench.drift [--peers PYTHON]... [--quick]`: every measurement of the monitor, resumable.

Each part is cached under `bench/.cache/drift` by a hash of the code and the settings it depends on: an interrupted
run goes on where it stopped, and a change of the monitor measures the monitor again. Writes
`bench/results/drift.{json,md,png}`. `--peers` names a python with alibi-detect, frouros or river (see `peers.py`).
"""

import argparse
import hashlib
import inspect
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import numpy as np

from bench.cifar import CACHE
from bench.drift import parts, report
from bench.drift.data import Draw, prepare
from bench.stamp import code_hash, stamp
from tta.packaging.reference import Whitening, fit_whitening

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "bench" / "results"
PEERS = ("alibi MMD", "alibi LSDD", "frouros MMD", "river ADWIN")
PEER_SETS = ("last", "all", "ours")
PEER_SHIFTS = tuple(s for s in parts.SHIFTS if s[-1] in "345")
PEER_DRAWS, PEER_NULLS, PEER_LENGTH, PEER_STREAMS = 2, 30, 3000, 3
PEER_WARM_UP, PEER_CENSOR = 50, 600


INPUTS = ("tta/packaging/reference.py", "bench/corruptions.py", "bench/drift/data.py", "bench/drift/parts.py")
MONITOR = code_hash("tta/monitor", *INPUTS)
# What the vectorised detectors rest on; the rest of the monitor does not touch them.
CHARTS = code_hash(
    *(f"tta/monitor/{name}.py" for name in ("reference", "charts", "calibration", "stickiness")),
    "bench/drift/detectors.py",
    "bench/drift/data.py",
    "bench/corruptions.py",
) + "".join(
    inspect.getsource(f)
    for f in (
        fit_whitening,
        Whitening,
        parts.delays,
        parts.common_thresholds,
        parts.null_statistics,
        parts._statistics,
    )
)


def cached(name: str, settings: object, code: str, compute: Callable[[], Any]) -> Any:
    """A part's result: from the cache, or computed and kept."""
    key = hashlib.sha256(json.dumps([settings, code], sort_keys=True).encode()).hexdigest()[:20]
    path = CACHE / "drift" / f"{name.replace(' ', '-')}-{key}.json"
    if path.exists():
        return json.loads(path.read_text())
    start = time.monotonic()
    result = compute()
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    temporary.write_text(json.dumps(result))
    temporary.rename(path)
    print(f"{time.strftime('%H:%M:%S')} {name} {settings} in {time.monotonic() - start:.1f} s", flush=True)
    return json.loads(path.read_text())


def run_peer(python: str, detector: str, draw: Draw, seed: int, which: str) -> Any:
    """One library on one feature set and draw; None if this python does not have it."""
    clean, rng = draw.pool(), np.random.default_rng([seed, 9])
    one_dimension = detector == "river ADWIN"

    def table(pool: Any) -> Any:
        return pool.confidences if one_dimension else pool.sets[which].astype(np.float32)

    arrays: dict[str, Any] = {
        "reference": draw.reference_confidences
        if one_dimension
        else draw.reference_sets[which].astype(np.float32),
        "table": table(clean),
        "null": rng.integers(len(clean.predictions), size=(PEER_NULLS, PEER_LENGTH)),
        "change": PEER_WARM_UP,
        "censor": PEER_CENSOR,
        "names": np.array(PEER_SHIFTS),
    }
    n_clean, shifted = len(clean.predictions), []
    for shift in PEER_SHIFTS:
        rows = rng.integers(n_clean, size=(PEER_STREAMS, PEER_WARM_UP + PEER_CENSOR))
        rows[:, PEER_WARM_UP:] += n_clean
        shifted.append(rows)
        arrays[f"table_{shift}"] = np.concatenate([table(clean), table(draw.shift(shift))])
    arrays["shifted"] = np.array(shifted)
    folder = CACHE / "drift" / f"peer-{os.getpid()}"
    folder.mkdir(exist_ok=True)
    np.savez(folder / "streams.npz", **arrays)
    script = ROOT / "bench" / "drift" / "peers.py"
    command = [python, str(script), detector, str(folder / "streams.npz"), str(folder / "out.json")]
    subprocess.run(command, check=True)
    found = json.loads((folder / "out.json").read_text())
    for file in folder.iterdir():
        file.unlink()
    folder.rmdir()
    return found


def has(python: str, detector: str) -> bool:
    """Whether a python has the library."""
    module = {"alibi": "alibi_detect", "frouros": "frouros", "river": "river"}[detector.split()[0]]
    code = f"import importlib.util, sys; sys.exit(importlib.util.find_spec('{module}') is None)"
    return subprocess.run([python, "-c", code]).returncode == 0


def peer_results(pythons: list[str], draws: dict[int, Draw]) -> dict[str, Any]:
    """Of every library that one of the pythons has, or that is cached."""
    found: dict[str, Any] = {}
    code = code_hash("bench/drift/peers.py", "bench/corruptions.py")
    features = code_hash("tta/monitor/reference.py", "tta/packaging/reference.py")
    for detector in PEERS:
        mine = [p for p in pythons if has(p, detector)]
        for which in ("entropy",) if detector == "river ADWIN" else PEER_SETS:
            if detector == "frouros MMD" and which == "all":
                continue  # 234 dimensions at its cost would take longer than everything else together
            for seed in range(PEER_DRAWS):
                sizes = [PEER_NULLS, PEER_LENGTH, PEER_STREAMS, PEER_WARM_UP, PEER_CENSOR]
                settings = [detector, which, seed, sizes, features if which == "ours" else ""]
                if mine:
                    result = cached(
                        "peer",
                        settings,
                        code,
                        lambda d=detector, s=seed, w=which, p=mine[0]: run_peer(p, d, draws[s], s, w),
                    )
                    found.setdefault(f"{detector} | {which}", []).append(result)
    return found


def measure_delays(draws: dict[int, Draw], arl: int, n_draws: int) -> tuple[list[Any], list[Any]]:
    """Common thresholds and delays of every detector, by draw; fewer draws at the longer run lengths."""
    common, delays = [], []
    for seed in range(min(n_draws, 3 if arl <= 1000 else 2)):
        draw = draws[seed]
        thresholds = cached(
            "common", [arl, seed], CHARTS, lambda d=draw, s=seed: parts.common_thresholds(d, arl, s)
        )
        common.append(thresholds)
        delays.append(
            {
                shift: cached(
                    "delays",
                    [arl, seed, shift],
                    CHARTS,
                    lambda d=draw, s=seed, name=shift, t=thresholds: parts.delays(d, arl, s, name, t),
                )
                for shift in (*parts.SHIFTS, *parts.OTHER_SHIFTS)
            }
        )
        draw._pools.clear()
    return common, delays


def main() -> int:
    """Run everything that is not cached, then write the report."""
    parser = argparse.ArgumentParser(prog="python -m bench.drift", description=__doc__.splitlines()[0])
    parser.add_argument("--peers", action="append", default=[], help="python of an environment with peers")
    parser.add_argument("--draws", type=int, default=5, help="reference draws for run lengths and diagnosis")
    parser.add_argument(
        "--arl", type=int, action="append", help="run lengths to measure; default 1,000 and 10,000"
    )
    parser.add_argument(
        "--part",
        action="append",
        choices=report.MEASURED,
        help="measure only this, and keep the others' results; default all",
    )
    parser.add_argument(
        "--quick", action="store_true", help="one draw, ARL 1,000, no peers: a look at what changed"
    )
    arguments = parser.parse_args()
    n_draws = 1 if arguments.quick else arguments.draws
    prepare(lambda what: print(what, flush=True))
    draws = {seed: Draw(seed) for seed in range(max(n_draws, PEER_DRAWS if not arguments.quick else 1))}
    parts_ = arguments.part or [p for p in report.MEASURED if p != "peers" or not arguments.quick]
    code = MONITOR
    found: dict[str, Any] = {}
    lengths = (1000,) if arguments.quick else arguments.arl or (1000, 10_000)
    if "delays" in parts_:
        measured = {str(arl): measure_delays(draws, arl, n_draws) for arl in lengths}
        found["common"] = {arl: common for arl, (common, _) in measured.items()}
        found["delays"] = {arl: delays for arl, (_, delays) in measured.items()}
    if "cost" in parts_:
        found["cost"] = cached("cost", 0, code, lambda: parts.cost(draws[0]))
    if "calibration" in parts_:
        found["calibration"] = cached("calibration", 0, code, lambda: parts.calibration_cost(draws[0]))
    by_draw = {
        "diagnosis": parts.diagnosis,
        "whole": parts.whole_monitor,
        "slow": parts.slow_tier,
        "recall": parts.recall,
    }
    for name in (n for n in by_draw if n in parts_):
        found[name] = [
            cached(name, s, code, lambda d=draws[s], s=s, measure=by_draw[name]: measure(d, s))
            for s in range(n_draws)
        ]
    if "arl" in parts_:
        found["arl"] = {
            str(arl): [
                cached("run lengths", [arl, s], code, lambda d=draws[s], a=arl: parts.null_run_lengths(d, a))
                for s in range(n_draws)
            ]
            for arl in lengths
        }
    if "peers" in parts_:
        found["peers"] = peer_results(arguments.peers, draws)
    elif arguments.quick:
        found["peers"] = {}
    command = "python -m bench.drift" + " --peers PYTHON" * len(arguments.peers) + " --quick" * arguments.quick
    command += "".join(f" --part {p}" for p in arguments.part or ())
    report.write(found, RESULTS, stamp(command))
    return 0


if __name__ == "__main__":
    sys.exit(main())
