"""What limits the server now, and how does its cost grow?

    python -m bench.limits [--seconds 3]

CPU microseconds of the server process, one core for it and one for the load, 64 requests outstanding, one image each:
by thread, by image size, by number of clients, with and without keys; of each step of a request in this process alone; of the engine by batch
size; and what watching costs: the tapped graph against the same without taps, and with the taps of some blocks only.
Writes `results/limits.{json,md,png}`.
"""

import argparse
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import onnxruntime as ort

from bench.serving.models import SHAPES, model_files
from bench.serving.servers import MAX_BATCH_IMAGES, serving
from bench.stamp import RESULTS, publish, stamp
from tta import protocol
from tta.bundle import Bundle, load_bundle
from tta.scenario.load import Load, Wire, drive
from tta.server.batcher import Batcher, Pending
from tta.server.options import Observation
from tta.server.predictor import Predictor

SERVER_CORE, LOAD_CORE = 0, 1
OUTSTANDING = 64
SIZES = ("identity", "identity@64", "identity@128", "identity@224")
CLIENTS = (1, 4, 16, 64, 256)
BATCHES = (1, 2, 4, 8, 16, 32, 64)
TAPPED = ("resnet20", "resnet18", "mobilenetv3_small_100")
TAP_BATCHES = (1, 8, 32)
TAP_S = 6.0  # seconds for each pair of graphs and batch size

Json = dict[str, Any]


def threads(pid: int) -> dict[str, tuple[str, float]]:
    """CPU seconds of each thread: id to name and seconds."""
    tick: Any = os.sysconf("SC_CLK_TCK")
    found = {}
    for task in Path(f"/proc/{pid}/task").iterdir():
        head, _, rest = (task / "stat").read_text().rpartition(")")
        fields = rest.split()
        role = "frontend" if task.name == str(pid) else head.partition("(")[2]
        found[task.name] = (role, sum(map(int, fields[11:13])) / tick)
    return found


def loaded(model: str, n_clients: int, seconds: float, keys: bool = False) -> Json:
    """Throughput, and CPU microseconds an image of the server's threads."""
    x = [np.random.default_rng(0).integers(0, 256, (1, *SHAPES[model]), np.uint8)]
    load = Load(outstanding=max(OUTSTANDING, n_clients), duration_s=seconds, warmup_s=0.0)
    with serving("tta", model, 1, SERVER_CORE, keys) as server:
        warm_up = Load(outstanding=OUTSTANDING, duration_s=1.0, warmup_s=0.0)
        drive(server.connect(x, warm_up), [1], warm_up)
        before = threads(server.process.pid)
        wire = Wire([server.endpoint] * n_clients, x, load, server.credentials)
        measured = drive(wire, [1], load)
        after = threads(server.process.pid)
    by_role: dict[str, float] = {}
    for task, (role, cpu_s) in after.items():
        name = {"frontend": "frontend", "ZMQbg/IO/0": "libzmq"}.get(role, "inference")
        by_role[name] = by_role.get(name, 0.0) + cpu_s - before.get(task, ("", 0.0))[1]
    n = max(1, measured.images_ever)
    report = measured.report()
    return {
        "images_per_s": report["images_per_s"],
        "p50_s": report["latency_s"]["p50"],
        "cpu_us": {role: round(1e6 * cpu_s / n, 1) for role, cpu_s in sorted(by_role.items())},
    }


def each_us(work: Callable[[], object], n: int = 3000) -> float:
    """Median of nine means: microseconds of a call."""
    means = []
    for _ in range(9):
        start = time.perf_counter()
        for _ in range(n // 9):
            work()
        means.append((time.perf_counter() - start) / (n // 9))
    return round(1e6 * float(np.median(means)), 2)


def steps() -> dict[str, float]:
    """Microseconds of each step of a request of one 32 x 32 image, in a batch of 32 where it is shared."""
    x = np.zeros((1, 32, 32, 3), np.uint8)
    request = protocol.Predict(id=1, dtype="uint8", shape=[1, 32, 32, 3], client="c")
    frames: list[Any] = [*protocol.encode(request), x.tobytes()]
    batcher = Batcher(MAX_BATCH_IMAGES, 0.0, 1024, 60.0)
    logits, features = np.zeros((32, 10), np.float32), np.zeros((32, 60), np.float32)
    gathered = np.zeros((32, 32, 32, 3), np.uint8)
    header = {"v": 1, "id": 1, "code": 0, "version": 0, "prediction_id": 1, "credit": 9, "shape": [1, 10]}

    def queue() -> None:
        for i in range(32):
            batcher.put(Pending(b"c", i, x, time.monotonic(), float("inf")))
        batcher.take(0.0)

    def observe() -> None:
        seen = Observation(epoch=1, first_id=1, version=0, n=32, inputs=True)
        (msgspec.msgpack.encode(seen), logits.tobytes(), features.tobytes(), gathered.tobytes())

    return {
        "decode the header": each_us(lambda: protocol.decode_data(frames)),
        "view the image": each_us(lambda: protocol.decode_images(frames, "uint8", [1, 32, 32, 3], (32, 32, 3))),
        "queue and take": round(each_us(queue, 900) / 32, 2),
        "gather the batch": round(each_us(lambda: np.concatenate([x] * 32, out=gathered)) / 32, 2),
        "observation": round(each_us(observe) / 32, 2),
        "encode the reply": each_us(lambda: protocol.encode(header, logits[:1])),
    }


def batches(model: str, seconds: float) -> dict[str, float]:
    """CPU microseconds an image of the engine alone, by batch size."""
    predictor = Predictor(load_bundle(model_files(model)[0]), "cpu", 1, max(BATCHES))
    session = predictor.prepare()
    found = {}
    for n in BATCHES:
        x = np.random.default_rng(0).integers(0, 256, (n, *SHAPES[model]), np.uint8)
        predictor.run_with(session, x)
        spent, end = [], time.monotonic() + seconds
        while time.monotonic() < end:
            start = time.thread_time()
            predictor.run_with(session, x)
            spent.append((time.thread_time() - start) / n)
        found[str(n)] = round(1e6 * float(np.median(spent)), 1)
    return found


def with_taps(bundle: Bundle, n_blocks: int) -> ort.InferenceSession:
    """The graph with the taps of the last `n_blocks` blocks only; 0: logits alone."""
    import onnx_ir as ir
    from onnx_ir.passes.common import RemoveUnusedNodesPass

    model = onnx.load_from_string(bundle.graph)
    if n_blocks == 0:
        kept = [o for o in model.graph.output if o.name == "logits"]
        del model.graph.output[:]
        model.graph.output.extend(kept)
    else:
        (concat,) = [n for n in model.graph.node if "features" in n.output]
        del concat.input[:-n_blocks]
        (features,) = [o for o in model.graph.output if o.name == "features"]
        features.type.tensor_type.shape.dim[1].dim_value = sum(
            b.n_features for b in bundle.manifest.blocks[-n_blocks:]
        )
    unused = ir.serde.deserialize_model(model)
    RemoveUnusedNodesPass()(unused)
    graph = ir.serde.serialize_model(unused).SerializeToString()
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    names = [n for n, w in bundle.weights.items() if np.issubdtype(w.dtype, np.floating)]
    values = [ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(bundle.weights[n])) for n in names]
    options.add_external_initializers(names, values)
    return ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])


def taps(model: str, sizes: Sequence[int]) -> dict[str, list[float]]:
    """CPU of the graph with the taps of 1, 2 ... blocks (the last ones) over that without, by batch size."""
    bundle = load_bundle(model_files(model)[0])
    n_blocks = len(bundle.manifest.blocks)
    sessions = [with_taps(bundle, k) for k in range(n_blocks + 1)]
    found = {}
    for n in sizes:
        x = np.random.default_rng(0).integers(0, 256, (n, *SHAPES[model]), np.uint8)
        spent: list[list[float]] = [[] for _ in sessions]
        end = time.monotonic() + TAP_S
        while time.monotonic() < end or len(spent[0]) < 5:
            for session, seconds in zip(sessions, spent, strict=True):
                start = time.thread_time()
                session.run(None, {"x": x})
                seconds.append(time.thread_time() - start)
        plain = np.array(spent[0])
        found[str(n)] = [round(float(np.median(np.array(s) / plain)), 3) for s in spent[1:]]
    return found


def table(result: Json) -> list[str]:
    """What there is to say, as Markdown."""
    lines = [
        "# What limits the server",
        "",
        f"{result['date']}, commit {result['commit']}, `{result['command']}`; one core for the server, one for the load;",
        f"{OUTSTANDING} requests outstanding, one image each, batches of at most {MAX_BATCH_IMAGES}. CPU in microseconds an",
        "image.",
        "",
        "| model | images/s | frontend thread | libzmq's thread | inference thread |",
        "| --- | --- | --- | --- | --- |",
    ]
    for title, found in [*result["sizes"].items(), *((f"{m}, with keys", f) for m, f in result["keys"].items())]:
        cpu = found["cpu_us"]
        spent = " | ".join(f"{cpu.get(role, 0.0):.0f}" for role in ("frontend", "libzmq", "inference"))
        lines.append(f"| {title} | {found['images_per_s']:,.0f} | {spent} |")
    lines += ["", "**By number of clients** (identity, 32 pixels)", "", "| clients | images/s | CPU | p50, ms |"]
    lines += ["| --- | --- | --- | --- |"]
    for n, found in result["clients"].items():
        total, p50 = sum(found["cpu_us"].values()), 1e3 * found["p50_s"]
        lines.append(f"| {n} | {found['images_per_s']:,.0f} | {total:.0f} | {p50:.2f} |")
    lines += ["", "**Steps of a request**, each alone in a loop, microseconds an image", "", "| step | |"]
    lines += ["| --- | --- |", *(f"| {name} | {us:.1f} |" for name, us in result["steps"].items())]
    lines += ["", "**The engine by batch size** (ResNet-20), microseconds an image", ""]
    lines += ["| " + " | ".join(result["batches"]) + " |", "| --- |" + " --- |" * (len(result["batches"]) - 1)]
    lines += ["| " + " | ".join(f"{us:,.0f}" for us in result["batches"].values()) + " |"]
    lines += ["", "**Watching**: CPU of the graph with taps over that without, median of pairs", ""]
    lines += ["| model | batch | all blocks | the last ones only: 1, 2 ... |", "| --- | --- | --- | --- |"]
    for model, by_batch in result["taps"].items():
        for n, ratios in by_batch.items():
            some = ", ".join(f"{r:.3f}" for r in ratios[:-1])
            lines.append(f"| {model} | {n} | {ratios[-1]:.3f} | {some} |")
    return lines


def draw(result: Json, path: Path) -> None:
    """CPU by thread and image size, by clients; the engine by batch size; taps."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 4, figsize=(17, 3.4), layout="constrained")
    sides = [SHAPES[m][0] for m in SIZES]
    bottom = np.zeros(len(sides))
    for role, colour in (("frontend", "#1f6f4a"), ("libzmq", "#d9a441"), ("inference", "#9a9a9a")):
        us = np.array([result["sizes"][m]["cpu_us"].get(role, 0.0) for m in SIZES])
        axes[0].bar([str(s) for s in sides], us, bottom=bottom, color=colour, label=role)
        bottom += us
    axes[0].set(xlabel="pixels a side (identity)", ylabel="CPU µs an image")
    axes[0].legend(frameon=False)
    clients = result["clients"]
    axes[1].plot(
        list(map(int, clients)), [sum(c["cpu_us"].values()) for c in clients.values()], "o-", color="#1f6f4a"
    )
    axes[1].set(xlabel="clients", xscale="log", ylim=(0, None), ylabel="CPU µs an image")
    axes[2].plot(list(map(int, result["batches"])), list(result["batches"].values()), "o-", color="#9a9a9a")
    axes[2].set(xlabel="batch (ResNet-20, engine alone)", xscale="log", ylim=(0, None), ylabel="CPU µs an image")
    for model, by_batch in result["taps"].items():
        for n, ratios in by_batch.items():
            axes[3].plot(
                range(len(ratios) + 1), [0, *(100 * (r - 1) for r in ratios)], "o-", label=f"{model}, {n}"
            )
    axes[3].axhline(5, color="black", linewidth=0.8, linestyle=":")
    axes[3].set(xlabel="blocks watched, from the last", ylabel="more CPU than without taps, %")
    axes[3].legend(frameon=False, fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> int:
    """Measure and write."""
    parser = argparse.ArgumentParser(prog="python -m bench.limits", description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=3.0, help="of each load")
    parser.add_argument("--json", action="store_true", help="print the results as JSON")
    arguments = parser.parse_args()
    for model in (*SIZES, *TAPPED):
        model_files(model)
    os.sched_setaffinity(0, {LOAD_CORE})

    def tell(what: str) -> None:
        print(f"{time.strftime('%H:%M:%S')} {what}", file=sys.stderr, flush=True)

    result: Json = {**stamp(" ".join(("python -m bench.limits", *sys.argv[1:])))}
    tell("image sizes")
    result["sizes"] = {m: loaded(m, 1, arguments.seconds) for m in (*SIZES, "resnet20")}
    tell("keys")
    result["keys"] = {
        m: loaded(m, 1, arguments.seconds, keys=True) for m in ("identity", "identity@224", "resnet20")
    }
    tell("clients")
    result["clients"] = {str(n): loaded("identity", n, arguments.seconds) for n in CLIENTS}
    tell("steps")
    result["steps"] = steps()
    tell("batches")
    result["batches"] = batches("resnet20", arguments.seconds)
    result["taps"] = {}
    for model in TAPPED:
        tell(f"taps of {model}")
        result["taps"][model] = taps(model, TAP_BATCHES)
    draw(result, RESULTS / "limits.png")
    publish("limits", result, table(result), arguments.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
