"""How much of the engine's speed is left to the client, beside the servers people use?

    python -m bench.serving [--models identity,resnet20,resnet18] [--servers tta,mosec,...] [--images 1,16] [--rounds 3]

One core for the server (all its processes), one for the load. Every server has the same graph, the same onnxruntime
settings and batches of at most 32 images; peers run in environments of their own, made on the first run
(`bench/.cache/peers`, some 2 GB). "bare" is the same graph in a loop on the server's core, without any server: the
limit; it is measured anew before tta is. Rounds are interleaved and the median is shown, since machines are shared.
Closed loop at 1, 8 and 64 requests outstanding; open loop at 50 and 80 % of what the same server did with 64. A load
lasts for at least eight full batches. Writes `results/serving.{json,md,png}` after every round; models that were not
measured this time keep their tables.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bench.serving.models import SHAPES, model_files
from bench.serving.report import read, tables, write
from bench.serving.servers import MAX_BATCH_IMAGES, PEERS, serving
from bench.stamp import stamp
from tta.scenario.load import Load, drive

RESULTS = Path(__file__).parents[1] / "results"
SERVER_CORE, LOAD_CORE = 0, 1
OUTSTANDING = (1, 8, 64)
SHARES = (0.5, 0.8)
N_BATCHES = 16
FULL_BATCHES = 8  # that a load lasts for at least
WARMUP_S = 1.0

Json = dict[str, Any]


def measure(name: str, model: str, n_images: int, seconds: float) -> Json:
    """All loads of one server, started for this."""
    rng = np.random.default_rng(0)
    x = [rng.integers(0, 256, (n_images, *SHAPES[model]), np.uint8) for _ in range(N_BATCHES)]
    found: Json = {}
    began = time.monotonic()
    with serving(name, model, n_images, SERVER_CORE) as server:
        found["start_s"] = round(time.monotonic() - began, 2)

        def run(label: str, load: Load) -> float:
            before = server.cpu_s()
            measured = drive(server.connect(x, load), [n_images] * N_BATCHES, load)
            used = server.cpu_s() - before
            report = measured.report()
            found[label] = {
                **{k: report[k] for k in ("images_per_s", "latency_s", "refused", "unanswered")},
                "cpu_s_per_image": round(used / max(1, measured.images_ever), 7),
                "generator_late_s": report["generator_late_s"],
            }
            return float(report["requests_per_s"])

        capacity = 0.0
        for n in OUTSTANDING:
            capacity = run(f"closed {n}", Load(outstanding=n, duration_s=seconds, warmup_s=WARMUP_S))
        for share in SHARES:
            rate = max(0.5, share * capacity)
            run(f"open {share:g}", Load(rate=rate, duration_s=seconds, warmup_s=WARMUP_S))
    return found


def measured(name: str, model: str, n_images: int, seconds: float) -> Json:
    """The same; where the server did not start (TorchServe now and then does not), at the second attempt."""
    try:
        return measure(name, model, n_images, seconds)
    except RuntimeError as error:
        print(f"{name} again: {error}", file=sys.stderr, flush=True)
        return measure(name, model, n_images, seconds)


def measure_bare(model: str, seconds: float) -> Json:
    """Images a second of the session alone, by batch size, in a process on the server's core."""
    bundle, _ = model_files(model)
    argv = [
        "taskset",
        "-c",
        str(SERVER_CORE),
        sys.executable,
        "-m",
        "bench.serving.bare",
        str(bundle),
        str(seconds),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(argv, capture_output=True, text=True, check=True, env=environment)
    found: Json = json.loads(done.stdout)
    return found


def measure_model(
    model: str, servers: Sequence[str], images: Sequence[int], arguments: argparse.Namespace
) -> Iterator[Json]:
    """All servers in turn, round after round; what there is after each round."""
    result: Json = {
        **stamp(" ".join(("python -m bench.serving", *sys.argv[1:]))),
        "max_batch_images": MAX_BATCH_IMAGES,
        "bare": [],
        "cells": {str(n): {} for n in images},
        "broken": {},
    }
    for number in range(arguments.rounds):
        for n_images in images:
            result["bare"].append(measure_bare(model, arguments.seconds))
            full_s = MAX_BATCH_IMAGES / result["bare"][0][str(MAX_BATCH_IMAGES)]["images_per_s"]
            result["seconds"] = round(max(arguments.seconds, FULL_BATCHES * full_s), 1)
            for server in servers:
                if server in result["broken"]:
                    continue
                clock = time.strftime("%H:%M:%S")
                print(
                    f"{clock} round {number + 1}: {model}, {n_images} images, {server}",
                    file=sys.stderr,
                    flush=True,
                )
                try:
                    cell = measured(server, model, n_images, result["seconds"])
                except (RuntimeError, subprocess.CalledProcessError) as error:
                    result["broken"][server] = str(error)[-300:]
                    print(f"{server} left out: {error}", file=sys.stderr, flush=True)
                    continue
                result["cells"][str(n_images)].setdefault(server, []).append(cell)
        yield {**result, "rounds": number + 1}


def main() -> int:
    """Measure and write."""
    parser = argparse.ArgumentParser(prog="python -m bench.serving", description=__doc__.splitlines()[0])
    parser.add_argument("--models", default="identity,resnet20,resnet18", help=f"of {', '.join(SHAPES)}")
    parser.add_argument("--servers", default=",".join(("tta", *PEERS)), help="tta and its peers")
    parser.add_argument("--images", default="1,16", help="a request")
    parser.add_argument("--rounds", type=int, default=3, help="times that every server is started")
    parser.add_argument("--seconds", type=float, default=4.0, help="of each load, at least")
    parser.add_argument("--json", action="store_true", help="print the results as JSON")
    arguments = parser.parse_args()
    models, servers = arguments.models.split(","), arguments.servers.split(",")
    unknown = [m for m in models if m not in SHAPES] + [s for s in servers if s not in ("tta", *PEERS)]
    if unknown:
        parser.error(f"unknown: {', '.join(unknown)}")
    if len(os.sched_getaffinity(0)) < 2:
        parser.error("two cores are needed: one for the server, one for the load")
    for model in models:
        model_files(model)
    os.sched_setaffinity(0, {LOAD_CORE})
    images = [int(n) for n in arguments.images.split(",")]
    result: Json = read(RESULTS)
    for model in models:
        for found in measure_model(model, servers, images, arguments):
            result[model] = found
            write(result, RESULTS)
    print(json.dumps(result, indent=1) if arguments.json else "\n".join(tables(result)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
