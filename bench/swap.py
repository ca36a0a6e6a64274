"""Does anybody notice a swap, or the adapter at work beside?

    python -m bench.swap [--model resnet20] [--device cuda] [--swaps 1000] [--rounds 11]

A server process under constant load (half of what it can do, open loop, one image a request) on two cores shared with
the load. Rounds of five windows: one steady, one with a swap every 0.2 s, one with a swap a second, one in which a
process that has nothing to do with the server takes as much CPU as often as the frequent swaps do, and gives way like
them (what is slower then is the machine's doing), one beside a process that fine-tunes as the adapter does; in turning
order, so that a noisy machine meets all alike. Then swaps without a pause until there were enough. Three versions in
turn, so that every swap builds a session. Every reply's logits are compared with those of the version it names. Writes
`results/swap.{json,md,png}`, on a GPU `results/swap_cuda.*`.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import zmq
from safetensors.numpy import save

from bench.serving.models import SHAPES, model_files
from bench.serving.servers import MAX_BATCH_IMAGES, Running, serving
from bench.stamp import stamp
from tta.adapter.worker import N_PROBE
from tta.bundle import Bundle, load_bundle
from tta.config import AdaptConfig
from tta.daemon.store import Store
from tta.process import memory_bytes
from tta.scenario.load import Load, Measured, Reply, Wire, drive
from tta.server.__main__ import BUILDER_NICE
from tta.server.predictor import Predictor

RESULTS = Path(__file__).parent / "results"
N_IMAGES = 64
N_VERSIONS = 3
WINDOW_S, WARMUP_S = 3.0, 0.5
EVERY_S = {"swapping": 0.2, "seldom": 1.0}  # seconds from the end of a swap to the next, by window
LOAD_SHARE = 0.5
SLOW = 3.0  # times the steady median
# Of the largest logit: on CUDA the batch decides how a convolution is done.
TOLERANCE = {"cpu": 1e-4, "cuda": 1e-2}

WINDOWS = ("steady", "swapping", "seldom", "busy", "training")
# Takes so many seconds of CPU, and waits so many, in turn.
BURN = """
import os, sys, time
from tta.process import give_way
os.nice(int(sys.argv[3]))
give_way()
while True:
    end = time.process_time() + float(sys.argv[1])
    while time.process_time() < end:
        pass
    time.sleep(float(sys.argv[2]))
"""

Json = dict[str, Any]
Array = npt.NDArray[Any]


def make_versions(
    bundle: Bundle, folder: Path, x: Array, device: str = "cpu"
) -> tuple[list[Path], dict[int, Array]]:
    """Versions that differ in their first block, and the logits (N, K) of each for the images."""
    store = Store(folder, bundle.sha256)
    predictor = Predictor(bundle, device, 1, MAX_BATCH_IMAGES)
    rng = np.random.default_rng(0)
    folders, expected = [], {}
    for _ in range(N_VERSIONS):
        delta = {
            n: (bundle.weights[n] * (1 + 0.1 * rng.random(bundle.weights[n].shape))).astype(np.float32)
            for n in bundle.manifest.blocks[0].tensors
            if np.issubdtype(bundle.weights[n].dtype, np.floating)
        }
        session = predictor.build(0, delta)
        logits = np.concatenate([predictor.run_with(session, x[i : i + 1]).logits for i in range(len(x))])
        probe = save({"x": x[:N_PROBE], "logits": logits[:N_PROBE]})
        version = store.write(save(delta), probe, bundle.manifest.blocks[0].name, "source", 0.0, {}, {})
        found = store.folder(version)
        assert found is not None
        folders.append(found)
        expected[version] = logits
    session = predictor.prepare()
    expected[0] = np.concatenate([predictor.run_with(session, x[i : i + 1]).logits for i in range(len(x))])
    return folders, expected


class Checked(Wire):
    """A transport that compares every answer with what its version should say."""

    def __init__(self, endpoint: str, x: Array, expected: dict[int, Array], load: Load, tolerance: float) -> None:
        super().__init__([endpoint], [x[i : i + 1] for i in range(len(x))], load)
        self.expected = expected
        self.tolerance = tolerance
        self.wrong = 0
        self.largest = 0.0

    def reply(self, header: Json, tensors: list[bytes]) -> Reply:
        """See `Wire`."""
        if header["code"] == 0:
            row = self.expected[header["version"]][header["id"] % N_IMAGES]
            difference = float(np.abs(np.frombuffer(tensors[0], np.float32) - row).max())
            self.largest = max(self.largest, difference)
            self.wrong += difference > self.tolerance * float(np.abs(row).max())
        return super().reply(header, tensors)


@contextmanager
def training(device: str = "cpu", share: float = 1.0) -> Iterator[None]:
    """A process that fine-tunes a ResNet-20 as the adapter would, with its default niceness and threads.

    Args:
        device: "cpu" or "cuda".
        share: of the time that it works, see `Pace`.
    """
    adapt = AdaptConfig()
    numbers = (adapt.nice, os.getpid(), adapt.threads, device, share)
    argv = [sys.executable, "-m", "bench.serving.trainer", *map(str, numbers)]
    with subprocess.Popen(argv, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        try:
            yield
        finally:
            process.kill()


@contextmanager
def busy(seconds: float) -> Iterator[None]:
    """A process that takes as much CPU, as often, as the frequent swaps, and gives way as the builder does."""
    argv = [sys.executable, "-c", BURN, str(seconds), str(EVERY_S["swapping"]), str(BUILDER_NICE)]
    with subprocess.Popen(argv) as process:
        try:
            yield
        finally:
            process.kill()


class Swapper:
    """Asks the server for one version after the other, as the daemon does."""

    def __init__(self, admin: str, folders: list[Path], server: Running) -> None:
        self.folders = folders
        self.server = server
        self.done: list[Json] = []
        self._stop = threading.Event()
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.connect(admin)

    def one(self) -> None:
        """The next version, and its predecessor's predecessor dropped."""
        number = len(self.done)
        folder = self.folders[number % len(self.folders)]
        command = {"op": "swap", "id": number, "version": int(folder.name), "folder": str(folder.resolve())}
        start = time.monotonic()
        self._socket.send(msgspec.msgpack.encode(command))
        if not self._socket.poll(30_000):
            raise TimeoutError("no answer to a swap in 30 s")
        reply = msgspec.msgpack.decode(self._socket.recv())
        if "error" in reply:
            raise RuntimeError(reply["error"])
        took = {k: reply[k] for k in ("prepare_s", "flip_s")}
        # Of the one process it has: to look for others takes milliseconds, in which the load would wait.
        rss = memory_bytes(self.server.process.pid) if number % 10 == 0 else 0
        self.done.append({**took, "whole_s": time.monotonic() - start, "rss_bytes": rss})

    def during(self, every_s: float, work: Callable[[], Measured]) -> Measured:
        """Swap at this pace while the work is done."""
        self._stop.clear()
        failed: list[BaseException] = []

        def run() -> None:
            try:
                while not self._stop.wait(every_s):
                    self.one()
            except (TimeoutError, RuntimeError) as error:
                failed.append(error)

        thread = threading.Thread(target=run)
        thread.start()
        try:
            return work()
        finally:
            self._stop.set()
            thread.join()
            if failed:
                raise failed[0]

    def close(self) -> None:
        """Close the socket."""
        self._context.destroy(linger=0)


def main() -> int:
    """Measure and write."""
    parser = argparse.ArgumentParser(prog="python -m bench.swap", description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=sorted(SHAPES), default="resnet20", help="served")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="of server and trainer")
    parser.add_argument("--swaps", type=int, default=1000, help="in all")
    parser.add_argument("--rounds", type=int, default=11, help=f"of windows: {', '.join(WINDOWS)}")
    parser.add_argument("--json", action="store_true", help="print the results as JSON")
    arguments = parser.parse_args()
    bundle = load_bundle(model_files(arguments.model)[0])
    x = np.random.default_rng(0).integers(0, 256, (N_IMAGES, *SHAPES[arguments.model]), np.uint8)
    with (
        tempfile.TemporaryDirectory() as folder,
        serving("tta", arguments.model, 1, None, device=arguments.device) as server,
    ):
        folders, expected = make_versions(bundle, Path(folder), x, arguments.device)
        swapper = Swapper(server.admin, folders, server)
        result = measure(arguments, server, swapper, x, expected)
        swapper.close()
    write(result, RESULTS, "swap" if arguments.device == "cpu" else f"swap_{arguments.device}")
    print(json.dumps(result, indent=1) if arguments.json else "\n".join(table(result)))
    return 0 if not (result["wrong"] or result["unanswered"] or result["refused"]) else 1


def measure(
    arguments: argparse.Namespace, server: Running, swapper: Swapper, x: Array, expected: dict[int, Array]
) -> Json:
    """All windows."""
    whole: Json = {"answered": 0, "refused": 0, "unanswered": 0, "wrong": 0, "largest_difference": 0.0}

    def window(load: Load) -> Measured:
        wire = Checked(server.endpoint, x, expected, load, TOLERANCE[arguments.device])
        measured = drive(wire, [1] * N_IMAGES, load)
        report = measured.report()
        whole["answered"] += report["answered"]
        whole["refused"] += sum(report["refused"].values())
        whole["unanswered"] += report["unanswered"]
        whole["wrong"] += wire.wrong
        whole["largest_difference"] = max(whole["largest_difference"], wire.largest)
        return measured

    capacity = window(Load(outstanding=64, duration_s=WINDOW_S, warmup_s=WARMUP_S)).report()["requests_per_s"]
    load = Load(rate=LOAD_SHARE * capacity, duration_s=WINDOW_S, warmup_s=WARMUP_S, timeout_s=30.0)
    beside = {
        "training": lambda: training(arguments.device),
        "busy": lambda: busy(_median_s(swapper)),
        "steady": nullcontext,
    }
    rounds = []
    for _ in range(3):  # so that what a swap takes is known
        swapper.one()
    for number in range(arguments.rounds):
        turn = number % len(WINDOWS)
        order = WINDOWS[turn:] + WINDOWS[:turn]
        found: Json = {}
        for which in order:
            before = len(swapper.done)
            if which in EVERY_S:
                measured = swapper.during(EVERY_S[which], lambda: window(load))
            else:
                with beside[which]():
                    measured = window(load)
            seconds = sorted(s for values in measured.latencies_s.values() for s in values)
            found[which] = {
                "p50": float(np.median(seconds)),
                "p99": float(np.quantile(seconds, 0.99)),
                "max": seconds[-1],
                "slow": 0.0,
                "swaps": len(swapper.done) - before,
                "latencies": seconds,
            }
        for which in order:
            values = np.array(found[which].pop("latencies"))
            found[which]["slow"] = float((values > SLOW * found["steady"]["p50"]).mean())
        rounds.append(found)
        told = ", ".join(f"{1e3 * found[which]['p99']:.1f} ms {which}" for which in WINDOWS)
        print(f"round {number + 1} of {arguments.rounds}: p99 {told}", file=sys.stderr, flush=True)
    rest = []
    while len(swapper.done) < arguments.swaps:
        rest.append(swapper.during(0.0, lambda: window(load)).report()["latency_s"]["p50"])
        print(f"{len(swapper.done)} of {arguments.swaps} swaps", file=sys.stderr, flush=True)
    rss = [s["rss_bytes"] for s in swapper.done if s["rss_bytes"]]
    return {
        **stamp(" ".join(("python -m bench.swap", *sys.argv[1:]))),
        "model": arguments.model,
        "rate": round(LOAD_SHARE * capacity, 1),
        "cores": len(os.sched_getaffinity(0)),
        "swaps": len(swapper.done),
        **whole,
        "p99_ratio": {which: ratio(rounds, which) for which in WINDOWS[1:]},
        "windows": rounds,
        "whole_s": [round(s["whole_s"], 5) for s in swapper.done],
        "prepare_s": [round(s["prepare_s"], 5) for s in swapper.done],
        "flip_s": [round(s["flip_s"], 7) for s in swapper.done],
        "rest_p50": rest,
        "rss_mb": [round(b / 1e6, 1) for b in rss],
    }


def _median_s(swapper: Swapper) -> float:
    """What a swap has taken, without the way there and back."""
    return float(np.median([s["prepare_s"] for s in swapper.done]))


def ratio(rounds: list[Json], which: str, to: str = "steady") -> list[float]:
    """Median ratio of a window's p99 to another's of its round, and where 95 % of bootstraps lie."""
    ratios = np.array([r[which]["p99"] / r[to]["p99"] for r in rounds])
    medians = np.median(np.random.default_rng(0).choice(ratios, (10_000, len(ratios))), axis=1)
    return [float(np.median(ratios)), *(float(v) for v in np.quantile(medians, (0.025, 0.975)))]


def table(result: Json) -> list[str]:
    """What there is to say, as Markdown."""

    def row(title: str, key: str, factor: float) -> str:
        each = [factor * float(np.median([r[which][key] for r in result["windows"]])) for which in WINDOWS]
        return f"| {title} | " + " | ".join(f"{v:.2f}" for v in each) + " |"

    told = {which: "{:.2f}× ({:.2f} to {:.2f})".format(*v) for which, v in result["p99_ratio"].items()}
    prepare, rss = np.array(result["prepare_s"]) * 1e3, result["rss_mb"]
    tenth = max(1, len(rss) // 10)
    first, last = np.median(prepare[:100]), np.median(prepare[-100:])
    lines = [
        "# Swaps",
        "",
        f"{result['date']}, commit {result['commit']}, `{result['command']}`; {result['model']}, one image a request,",
        f"{result['rate']:g} requests a second (half of what the server can do), {result['cores']} cores for server and",
        f"load; medians of {len(result['windows'])} interleaved rounds of {WINDOW_S:g} s windows: steady, swapping (a swap",
        f"every {EVERY_S['swapping']:g} s), seldom (every {EVERY_S['seldom']:g} s), beside a process that takes as much CPU as",
        "often as the frequent swaps and nothing else, and beside one that fine-tunes as the adapter does.",
        "",
        "| | " + " | ".join(WINDOWS) + " |",
        "| --- |" + " --- |" * len(WINDOWS),
        row("p50, ms", "p50", 1e3),
        row("p99, ms", "p99", 1e3),
        row(f"slower than {SLOW:g} times the steady median, %", "slow", 100),
        "",
        f"p99 against steady, median of the rounds (95 % of bootstraps): swapping {told['swapping']}, seldom",
        f"{told['seldom']}, busy {told['busy']}, training {told['training']}.",
        "",
        f"{result['swaps']} swaps under load: {result['answered']:,} requests answered, {result['refused']} refused,",
        f"{result['unanswered']} unanswered, {result['wrong']} whose logits are not those of the version they name",
        f"(largest difference {result['largest_difference']:.2g}). A version is built, verified and warmed in",
        f"{np.median(prepare):.1f} ms (99 %: {np.quantile(prepare, 0.99):.1f}; first hundred {first:.1f}, last hundred",
        f"{last:.1f}) and flipped in {1e6 * np.median(result['flip_s']):.0f} µs. Memory of the server {np.median(rss[:tenth]):.0f} MB",
        f"in the first tenth of the swaps, {np.median(rss[-tenth:]):.0f} MB in the last.",
    ]
    if result["rest_p50"]:
        p50 = np.array(result["rest_p50"]) * 1e3
        lines[-1] += (
            f" With swaps without a pause p50 was {p50[0]:.2f} ms at first and {p50[-1]:.2f} ms in the end."
        )
    return lines


def write(result: Json, folder: Path, name: str) -> None:
    """JSON, table and plot."""
    (folder / f"{name}.json").write_text(json.dumps(result) + "\n")
    (folder / f"{name}.md").write_text("\n".join(table(result)) + "\n")
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    for which, colour in zip(WINDOWS, ("#9a9a9a", "#1f6f4a", "#6fb7d6", "#7a5aa6", "#d9a441"), strict=True):
        left.plot([1e3 * r[which]["p99"] for r in result["windows"]], "o-", color=colour, label=which)
    left.set(xlabel="round", ylabel="p99, ms", ylim=(0, None))
    left.legend(frameon=False)
    right.plot(np.arange(len(result["rss_mb"])) * 10, result["rss_mb"], color="#1f6f4a")
    right.set(xlabel="swaps", ylabel="memory of the server, MB", ylim=(0, None))
    figure.savefig(folder / f"{name}.png", dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    sys.exit(main())
