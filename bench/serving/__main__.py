"""How much of the engine's speed is left to the client, beside the servers people use?

    python -m bench.serving [--models identity,resnet20,resnet18] [--servers tta,mosec,...] [--rounds 3] [--seconds 4]

One core for the server (all its processes), one for the load. Every server has the same graph, the same onnxruntime
settings and batches of at most 32 images; peers run in environments of their own, made on the first run
(`bench/.cache/peers`, some 2 GB). "bare" is the same graph in a loop on the server's core, without any server: the
limit. Rounds are interleaved and the median is shown, since machines are shared. Closed loop at 1, 8 and 64 requests
outstanding; open loop at 50 and 80 % of what the same server did with 64. Writes `results/serving.{json,md,png}`.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from bench.serving.models import SHAPES, model_files
from bench.serving.report import tables, write
from bench.serving.servers import MAX_BATCH_IMAGES, PEERS, serving
from bench.stamp import stamp
from tta.scenario.load import Load, drive

RESULTS = Path(__file__).parents[1] / "results"
SERVER_CORE, LOAD_CORE = 0, 1
OUTSTANDING = (1, 8, 64)
SHARES = (0.5, 0.8)
N_BATCHES = 16
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


def cells(models: list[str], servers: list[str]) -> Iterator[tuple[str, int, str]]:
    """Model, images a request, server."""
    for model in models:
        for n_images in (1, 16):
            for server in servers:
                yield model, n_images, server


def main() -> int:
    """Measure and write."""
    parser = argparse.ArgumentParser(prog="python -m bench.serving", description=__doc__.splitlines()[0])
    parser.add_argument("--models", default="identity,resnet20,resnet18", help=f"of {', '.join(SHAPES)}")
    parser.add_argument("--servers", default=",".join(("tta", *PEERS)), help="tta and its peers")
    parser.add_argument("--rounds", type=int, default=3, help="times that every server is started")
    parser.add_argument("--seconds", type=float, default=4.0, help="of each load")
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
    result: Json = {
        **stamp(" ".join(("python -m bench.serving", *sys.argv[1:]))),
        "max_batch_images": MAX_BATCH_IMAGES,
        "rounds": 0,
        "seconds": arguments.seconds,
        "bare": {model: [] for model in models},
        "cells": {},
    }
    broken: dict[str, str] = {}
    for number in range(arguments.rounds):
        for model in models:
            result["bare"][model].append(measure_bare(model, arguments.seconds))
        for model, n_images, server in cells(models, servers):
            if server in broken:
                continue
            clock = time.strftime("%H:%M:%S")
            print(f"{clock} round {number + 1}: {model}, {n_images} images, {server}", file=sys.stderr, flush=True)
            try:
                found = measure(server, model, n_images, arguments.seconds)
            except (RuntimeError, subprocess.CalledProcessError) as error:
                broken[server] = str(error)[-300:]
                print(f"{server} left out: {error}", file=sys.stderr, flush=True)
                continue
            by_server = result["cells"].setdefault(model, {}).setdefault(str(n_images), {})
            by_server.setdefault(server, []).append(found)
        result |= {"rounds": number + 1, "broken": broken}
        write(result, RESULTS)  # after every round: it takes a quarter of an hour
    print(json.dumps(result, indent=1) if arguments.json else "\n".join(tables(result)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
