"""What do three well-behaved clients notice of a fourth?

    python -m bench.sharing [--model resnet20] [--rounds 11]

A server process on one core; three clients on the other, each with a tenth of what the server can do (open loop, one
image a request). Beside them, in turning order: nobody; one like them; one that sends ten times as much; one that never
reads its answers; one that connects, sends and vanishes, over and over; two hundred connections that together send a
tenth. Of the three: p50, p99, and the ratio of p99 to when they were alone. Writes `results/sharing.{json,md,png}`.
"""

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import zmq

from bench.serving.models import SHAPES
from bench.serving.servers import serving
from bench.stamp import RESULTS, publish, stamp
from bench.swap import ratio
from tta import protocol
from tta.client import Client
from tta.process import give_way
from tta.scenario.load import Load, Wire, drive

SERVER_CORE, LOAD_CORE = 0, 1
SHARE = 0.1  # of the server's capacity, for each client
N_CLIENTS = 3
N_CONNECTIONS = 200
WINDOW_S, WARMUP_S = 3.0, 1.0
A_VISIT = 8  # requests of one that vanishes
N_UNREAD = 30_000  # answers of some 300 bytes: more than a queue of 1,000 and the kernel's buffers hold
FOURTH = {
    "alone": "nobody",
    "like": "one like them",
    "tenfold": "one that sends 10 times as much",
    "deaf": "one that never reads its answers",
    "vanishing": "one that connects, sends and vanishes",
    "crowd": f"{N_CONNECTIONS} connections",
}

Json = dict[str, Any]


def disturb(kind: str, endpoint: str, model: str, rate: float) -> None:
    """Be the fourth client until killed, without taking the load's core from those who measure."""
    give_way()
    x = np.random.default_rng(1).integers(0, 256, (1, *SHAPES[model]), np.uint8)
    if kind in ("deaf", "vanishing"):
        _send_only(kind, endpoint, x, rate)
    print("ready", flush=True)
    endpoints = [endpoint] * (N_CONNECTIONS if kind == "crowd" else 1)
    load = Load(rate=rate * (10 if kind == "tenfold" else 1), duration_s=1e6, warmup_s=0.0)
    drive(Wire(endpoints, [x], load), [1], load)


def _send_only(kind: str, endpoint: str, x: Any, rate: float) -> None:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    payload, number, socket = x.tobytes(), 0, _dealer(context, endpoint)
    if kind == "deaf":  # until neither its own buffers nor the server's take another answer
        for i in range(N_UNREAD):
            socket.send_multipart(protocol.encode(protocol.Metadata(id=i)))
        with Client(endpoint) as other:  # the server reads in turn: it has answered the others before
            other.predict(x)
    print("ready", flush=True)
    start = time.monotonic()
    while True:
        if kind == "vanishing" and number % A_VISIT == 0:
            socket.close(linger=0)
            socket = _dealer(context, endpoint)
        request = protocol.Predict(id=number, dtype="uint8", shape=list(x.shape), observe=False)
        socket.send_multipart([*protocol.encode(request), payload])
        number += 1
        time.sleep(max(0.0, start + number / rate - time.monotonic()))


def _dealer(context: "zmq.Context[zmq.Socket[bytes]]", endpoint: str) -> "zmq.Socket[bytes]":
    """A client's socket that takes in one answer at most."""
    socket = context.socket(zmq.DEALER)
    socket.setsockopt(zmq.RCVHWM, 1)
    socket.connect(endpoint)
    return socket


@contextmanager
def beside(kind: str, endpoint: str, model: str, rate: float) -> Iterator[None]:
    """A fourth client in a process of its own, on the load's core."""
    if kind == "alone":
        yield
        return
    argv = [sys.executable, "-m", "bench.sharing", "--disturb", kind, endpoint, "--rate", str(rate)]
    with subprocess.Popen([*argv, "--model", model], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        try:
            yield
            if process.poll() is not None:
                raise RuntimeError(f"the client {kind!r} ended: nothing was measured")
        finally:
            process.kill()


def measure(model: str, rounds: int) -> Json:
    """All windows."""
    x = [np.random.default_rng(0).integers(0, 256, (1, *SHAPES[model]), np.uint8)]
    with serving("tta", model, 1, SERVER_CORE) as server:
        full = Load(outstanding=64, duration_s=WINDOW_S, warmup_s=WARMUP_S)
        capacity = drive(server.connect(x, full), [1], full).report()["requests_per_s"]
        load = Load(rate=N_CLIENTS * SHARE * capacity, duration_s=WINDOW_S, warmup_s=WARMUP_S)
        found: list[Json] = []
        kinds = list(FOURTH)
        for number in range(rounds):
            turn = number % len(kinds)
            seen: Json = {}
            for kind in kinds[turn:] + kinds[:turn]:
                with beside(kind, server.endpoint, model, SHARE * capacity):
                    report = drive(Wire([server.endpoint] * N_CLIENTS, x, load), [1], load).report()
                seen[kind] = {
                    **{q: report["latency_s"][q] for q in ("p50", "p99", "max")},
                    "refused": sum(report["refused"].values()),
                    "unanswered": report["unanswered"],
                    "answered": report["answered"],
                }
            found.append(seen)
            told = ", ".join(f"{kind} {1e3 * seen[kind]['p99']:.1f}" for kind in kinds)
            print(f"round {number + 1} of {rounds}: p99 in ms {told}", file=sys.stderr, flush=True)
    return {"capacity": round(capacity, 1), "rate": round(load.rate or 0.0, 1), "rounds": found}


def table(result: Json) -> list[str]:
    """What there is to say, as Markdown."""
    rounds = result["rounds"]
    lines = [
        "# Sharing a server",
        "",
        f"{result['date']}, commit {result['commit']}, `{result['command']}`; {result['model']}, one image a request;",
        f"one core for the server, one for the load. {N_CLIENTS} clients with {100 * SHARE:.0f} % each of the"
        f" {result['capacity']:.0f} requests a",
        f"second that the server can do; medians of {len(rounds)} interleaved rounds of {WINDOW_S:g} s windows.",
        "",
        "| beside them | p50, ms | p99, ms | p99 against alone (95 % of bootstraps) | refused | unanswered |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for kind, title in FOURTH.items():
        p50, p99 = (1e3 * float(np.median([r[kind][q] for r in rounds])) for q in ("p50", "p99"))
        compared = "{:.2f}× ({:.2f} to {:.2f})".format(*ratio(rounds, kind, "alone")) if kind != "alone" else "–"
        refused, unanswered = (sum(r[kind][k] for r in rounds) for k in ("refused", "unanswered"))
        lines.append(f"| {title} | {p50:.2f} | {p99:.2f} | {compared} | {refused} | {unanswered} |")
    return lines


def draw(result: Json, path: Path) -> None:
    """p99 of each window of each round."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 3.4), layout="constrained")
    for i, kind in enumerate(FOURTH):
        p99 = [1e3 * r[kind]["p99"] for r in result["rounds"]]
        axes.plot(p99, np.full(len(p99), i), "o", color="#1f6f4a", alpha=0.5)
        axes.plot(np.median(p99), i, "|", color="black", markersize=18)
    axes.set(yticks=range(len(FOURTH)), yticklabels=FOURTH.values(), xlim=(0, None))
    axes.set_xlabel("p99 of three clients, ms: each round, and the median")
    axes.invert_yaxis()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> int:
    """Measure and write."""
    parser = argparse.ArgumentParser(prog="python -m bench.sharing", description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=sorted(SHAPES), default="resnet20", help="served")
    parser.add_argument("--rounds", type=int, default=11, help="of windows")
    parser.add_argument("--json", action="store_true", help="print the results as JSON")
    parser.add_argument("--disturb", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--rate", type=float, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    os.sched_setaffinity(0, {LOAD_CORE})
    if arguments.disturb:
        disturb(*arguments.disturb, arguments.model, arguments.rate)
    result: Json = {
        **stamp(" ".join(("python -m bench.sharing", *sys.argv[1:]))),
        "model": arguments.model,
        **measure(arguments.model, arguments.rounds),
    }
    draw(result, RESULTS / "sharing.png")
    publish("sharing", result, table(result), arguments.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
