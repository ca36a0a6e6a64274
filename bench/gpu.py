"""One GPU, one call: what the server adds to the session, two versions in its memory, swaps, and an adapter beside.

    python -m bench.gpu [--model resnet50] [--seconds 3] [--parts speed,memory,banks,adapter] [--device cuda]

"speed": the session alone in a loop and the server with one request outstanding, with 16, and at half of what it can
do, at 1, 8 and 64 images a request, fp32 and fp16. "memory": what one version takes of the card, two, and what after
the first is dropped. "banks": the other way to swap, one block's weights as inputs of the graph in two banks on the
card, against a session of its own: what a run costs and what a swap does. "adapter": p99 at half load alone, beside a
trainer that takes all the time it gets, and beside one that keeps to half of it (`adapt.share`).

Swaps under load are `python -m bench.swap --device cuda`, alarm to promotion `python -m bench.cifar_loop`. With
`--device cpu` it runs anywhere, to see that it does. Writes `results/gpu.{json,md}` after every part.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort
import torch

from bench.serving.models import SHAPES, model_files
from bench.serving.servers import Running, serving
from bench.stamp import publish, stamp
from bench.swap import training
from tta.bundle import Bundle, load_bundle
from tta.scenario.load import Load, drive
from tta.server.predictor import Predictor, Session

IMAGES = (1, 8, 64)
OUTSTANDING = 16
N_RUNS, N_SWAPS = 30, 20
WARMUP_S = 0.5

Json = dict[str, Any]
Array = npt.NDArray[Any]


def images_of(model: str, n: int) -> Array:
    """(n, H, W, 3) uint8, random."""
    return np.random.default_rng(0).integers(0, 256, (n, *SHAPES[model]), np.uint8)


def predictor_of(bundle: Bundle, device: str, precision: str = "fp32") -> Predictor:
    """As the server has it.

    Raises:
        SystemExit: onnxruntime has fallen back to the CPU.
    """
    predictor = Predictor(bundle, device, 1, max(IMAGES), precision)
    if device != "cpu" and not predictor.on_gpu:
        raise SystemExit(f"device {device} gave {predictor.device}")
    return predictor


def median_s(work: Callable[[], object], n: int = N_RUNS) -> float:
    """Median seconds of a call; one before is not counted."""
    work()
    found = []
    for _ in range(n):
        start = time.perf_counter()
        work()
        found.append(time.perf_counter() - start)
    return statistics.median(found)


def loaded(server: Running, x: Array, load: Load) -> Json:
    """What came back of a load of this one request."""
    return drive(server.connect([x], load), [len(x)], load).report()


def measure_speed(arguments: argparse.Namespace, bundle: Bundle) -> list[Json]:
    """Rows of precision and images a request."""
    rows, full = [], images_of(arguments.model, max(IMAGES))
    for precision in ("fp32", "fp16") if bundle.graph_fp16 is not None else ("fp32",):
        predictor = predictor_of(bundle, arguments.device, precision)
        session = predictor.prepare()
        full_s = median_s(lambda s=session, p=predictor: p.run_with(s, full))
        options = {
            "device": arguments.device,
            "precision": precision,
            "max_batch_size": max(IMAGES),
            "queue_images": 2 * OUTSTANDING * max(IMAGES),
            "queue_s": 60.0,
        }
        for n in IMAGES:
            x = images_of(arguments.model, n)
            bare_s = median_s(lambda session=session, x=x, p=predictor: p.run_with(session, x))
            with serving("tta", arguments.model, n, None, **options) as server:
                base = {"duration_s": arguments.seconds, "warmup_s": WARMUP_S}
                one = loaded(server, x, Load(outstanding=1, **base))
                many = loaded(server, x, Load(outstanding=OUTSTANDING, **base))
                half = loaded(server, x, Load(rate=max(0.5, many["requests_per_s"] / 2), **base))
            rows.append(
                {
                    "precision": predictor.precision,
                    "images": n,
                    "bare_s": bare_s,
                    "bare_full_s": full_s,
                    "one": one["latency_s"],
                    "images_per_s": many["images_per_s"],
                    "half": half["latency_s"],
                }
            )
            print(f"speed: {precision}, {n} images a request", file=sys.stderr, flush=True)
    return rows


def used_bytes(device: str) -> int:
    """Of the card's memory, by whoever."""
    if device == "cpu":
        return 0
    free, total = torch.cuda.mem_get_info()
    return total - free


def measure_memory(arguments: argparse.Namespace, bundle: Bundle) -> Json:
    """Bytes on the card beyond those before, as versions come and go; each has computed its largest batch."""
    before = used_bytes(arguments.device)
    predictor, found = predictor_of(bundle, arguments.device), {}

    def swap(number: int, name: str) -> None:
        predictor.previous = None
        predictor.activate(predictor.build(number, {}))  # on a GPU it warms every size
        found[name] = used_bytes(arguments.device) - before

    swap(0, "one")
    swap(1, "two")
    predictor.release()
    found["dropped"] = used_bytes(arguments.device) - before
    for number in range(2, 2 + N_SWAPS):
        swap(number, f"two after {N_SWAPS} swaps")
    return found


def with_inputs(graph: bytes, names: set[str]) -> bytes:
    """The graph with these of its weights as inputs."""
    model = onnx.load_from_string(graph)
    kept = [t for t in model.graph.initializer if t.name not in names]
    for tensor in model.graph.initializer:
        if tensor.name in names:
            model.graph.input.append(
                onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims))
            )
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)
    return model.SerializeToString()


def measure_banks(arguments: argparse.Namespace, bundle: Bundle) -> list[Json]:
    """For each block: seconds of a run with its weights inside and as inputs, and of a swap both ways."""
    predictor = predictor_of(bundle, arguments.device)
    session = predictor.prepare()
    where = "cuda" if predictor.on_gpu else "cpu"
    build_s = median_s(lambda: predictor.prepare(), N_SWAPS)
    rows = []
    for block in bundle.manifest.blocks:
        names = {n for n in block.tensors if np.issubdtype(bundle.weights[n].dtype, np.floating)}
        rest = {n: v for n, v in predictor.source.items() if n not in names}
        banked = predictor.open(with_inputs(bundle.graph, names), rest)
        asked = {i.name for i in banked.get_inputs()} & names

        def bank(asked: set[str] = asked) -> dict[str, ort.OrtValue]:
            return {n: ort.OrtValue.ortvalue_from_numpy(bundle.weights[n], where, 0) for n in asked}

        values = bank()
        row: Json = {"block": block.name, "build_s": build_s, "bank_s": median_s(bank, N_SWAPS)}
        for n in IMAGES:
            x = images_of(arguments.model, n)
            io = banked.io_binding()
            for name, value in values.items():
                io.bind_ortvalue_input(name, value)
            outputs = _outputs(session, n)
            for name, output in outputs.items():
                io.bind_ortvalue_output(name, ort.OrtValue.ortvalue_from_numpy(output))

            def run(io: ort.IOBinding = io, x: Array = x, banked: ort.InferenceSession = banked) -> None:
                io.bind_cpu_input("x", x)
                banked.run_with_iobinding(io)

            inside_s = median_s(lambda x=x: predictor.run_with(session, x))
            row[f"ratio_{n}"] = median_s(run) / inside_s
            expected = predictor.run_with(session, x).logits
            row["difference"] = float(np.abs(outputs["logits"] - expected).max())
        rows.append(row)
        print(f"banks: {block.name}", file=sys.stderr, flush=True)
    return rows


def _outputs(session: Session, n: int) -> dict[str, Array]:
    return {"logits": np.empty_like(session.logits[:n]), "features": np.empty_like(session.features[:n])}


def measure_adapter(arguments: argparse.Namespace, bundle: Bundle) -> list[Json]:
    """Latency at half load, alone and beside a trainer, in turn."""
    x = images_of(arguments.model, 1)
    rows: dict[str, list[Json]] = {}
    with serving("tta", arguments.model, 1, None, device=arguments.device) as server:
        base = {"duration_s": arguments.seconds, "warmup_s": WARMUP_S}
        capacity = loaded(server, x, Load(outstanding=OUTSTANDING, **base))["requests_per_s"]
        load = Load(rate=max(0.5, capacity / 2), **base)
        for _ in range(arguments.rounds):
            rows.setdefault("alone", []).append(loaded(server, x, load)["latency_s"])
            for share in (1.0, 0.5):
                with training(arguments.device, share):
                    rows.setdefault(f"beside, share {share:g}", []).append(loaded(server, x, load)["latency_s"])
    return [
        {"what": what, **{q: statistics.median(v[q] for v in values) for q in ("p50", "p99")}}
        for what, values in rows.items()
    ]


PARTS = {
    "speed": measure_speed,
    "memory": measure_memory,
    "banks": measure_banks,
    "adapter": measure_adapter,
}


def table(result: Json) -> list[str]:
    """What there is to say, as Markdown."""
    lines = [
        "# One GPU",
        "",
        f"{result['date']}, commit {result['commit']}, `{result['command']}`; {result['model']} on {result['card']}.",
    ]
    if speed := result.get("speed"):
        lines += [
            "",
            "| precision | images a request | session alone, ms | p50 of one, ms | images/s with "
            f"{OUTSTANDING} outstanding | of the session at {max(IMAGES)} | p50 / p99 at half load, ms |",
            "| --- |" + " --- |" * 6,
        ]
        for row in speed:
            limit = max(IMAGES) / row["bare_full_s"]
            lines.append(
                f"| {row['precision']} | {row['images']} | {1e3 * row['bare_s']:.2f} | {1e3 * row['one']['p50']:.2f} | "
                f"{row['images_per_s']:,.0f} | {row['images_per_s'] / limit:.2f} | "
                f"{1e3 * row['half']['p50']:.2f} / {1e3 * row['half']['p99']:.2f} |"
            )
    if memory := result.get("memory"):
        told = ", ".join(f"{name} {value / 2**20:,.0f}" for name, value in memory.items())
        lines += ["", f"Memory of the card that versions take, MiB: {told}."]
    if banks := result.get("banks"):
        lines += [
            "",
            "One block's weights as inputs of the graph, against a session of its own: a run's time at "
            f"{', '.join(map(str, IMAGES))} images; ms of a swap by a new bank and by a new session.",
            "",
            "| block | "
            + " | ".join(f"run at {n}" for n in IMAGES)
            + " | bank, ms | session, ms | logits differ by |",
            "| --- |" + " --- |" * (len(IMAGES) + 3),
        ]
        for row in banks:
            ratios = " | ".join(f"{row[f'ratio_{n}']:.2f}×" for n in IMAGES)
            lines.append(
                f"| {row['block']} | {ratios} | {1e3 * row['bank_s']:.2f} | {1e3 * row['build_s']:.1f} | "
                f"{row['difference']:.1g} |"
            )
    if adapter := result.get("adapter"):
        lines += ["", "| at half load | p50, ms | p99, ms |", "| --- | --- | --- |"]
        lines += [f"| {row['what']} | {1e3 * row['p50']:.2f} | {1e3 * row['p99']:.2f} |" for row in adapter]
    return lines


def card_of(device: str) -> str:
    """What the card calls itself."""
    return "the CPU" if device == "cpu" else torch.cuda.get_device_name()


def main() -> int:
    """Measure and write."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=sorted(SHAPES), default="resnet50")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--seconds", type=float, default=3.0, help="of each load")
    parser.add_argument("--rounds", type=int, default=5, help="of the loads beside a trainer")
    parser.add_argument("--parts", default=",".join(PARTS), help="in this order")
    parser.add_argument("--json", action="store_true", help="print the results as JSON")
    arguments = parser.parse_args()
    parts = arguments.parts.split(",")
    if unknown := [p for p in parts if p not in PARTS]:
        parser.error(f"unknown: {', '.join(unknown)}; there are {', '.join(PARTS)}")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no GPU: --device cpu runs the same without one")
    bundle = load_bundle(model_files(arguments.model)[0])
    result: Json = {
        **stamp(" ".join(("python -m bench.gpu", *sys.argv[1:]))),
        "model": arguments.model,
        "card": card_of(arguments.device),
    }
    for part in parts:
        result[part] = PARTS[part](arguments, bundle)
        if arguments.device == "cuda":  # after each: what is there is not lost with the rest
            publish("gpu", result, table(result), arguments.json)
    if arguments.device == "cpu":  # nothing to keep
        print(json.dumps(result, indent=1) if arguments.json else "\n".join(table(result)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
