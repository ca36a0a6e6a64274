"""What happens when more is asked than can be computed?

    python -m bench.overload [--model resnet20] [--rounds 5]

A server process on one core, the load on the other; first what the server can do (closed loop), then an open loop of
0.5 to 3 times as much, each request with a deadline of 100 ms, and once more without. Answered a second, latency of what
was answered, how soon the rest was refused, by which code, and the server's memory. Writes `results/overload.{json,md,png}`.
"""

import argparse
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np

from bench.serving.models import SHAPES
from bench.serving.servers import serving
from bench.stamp import RESULTS, publish, stamp
from tta.scenario.load import Load, drive

SERVER_CORE, LOAD_CORE = 0, 1
TIMES = (0.5, 0.9, 1.5, 2.0, 3.0)  # the capacity
DEADLINES = (0.1, None)
WINDOW_S, WARMUP_S = 4.0, 1.0

Json = dict[str, Any]


def measure(model: str, rounds: int) -> Json:
    """All windows, in turn."""
    x = [np.random.default_rng(0).integers(0, 256, (1, *SHAPES[model]), np.uint8)]
    with serving("tta", model, 1, SERVER_CORE) as server:
        full = Load(outstanding=64, duration_s=WINDOW_S, warmup_s=WARMUP_S)
        capacity = drive(server.connect(x, full), [1], full).report()["requests_per_s"]
        found: list[Json] = []
        for number in range(rounds):
            for deadline_s in DEADLINES:
                for times in TIMES:
                    load = Load(
                        rate=times * capacity, duration_s=WINDOW_S, warmup_s=WARMUP_S, deadline_s=deadline_s
                    )
                    report = drive(server.connect(x, load), [1], load).report()
                    del report["versions"]
                    found.append(
                        {"times": times, "deadline_s": deadline_s, "rss_mb": server.rss_bytes() / 1e6, **report}
                    )
            print(f"round {number + 1} of {rounds}", file=sys.stderr, flush=True)
    return {"capacity": capacity, "windows": found}


def rows(result: Json) -> list[Json]:
    """Medians over the rounds, of each deadline and load."""
    lines = []
    for deadline_s in DEADLINES:
        for times in TIMES:
            own = [w for w in result["windows"] if (w["times"], w["deadline_s"]) == (times, deadline_s)]

            def median(field: str, q: str, own: list[Json] = own) -> float | None:
                values = [w[field][q] for w in own if w[field]]
                return 1e3 * float(np.median(values)) if values else None

            lines.append(
                {
                    "times": times,
                    "deadline_s": deadline_s,
                    "answered": float(np.median([w["requests_per_s"] for w in own])) / result["capacity"],
                    "p50": median("latency_s", "p50"),
                    "p99": median("latency_s", "p99"),
                    "max": max(1e3 * w["latency_s"]["max"] for w in own if w["latency_s"]),
                    "refused": sum(sum(w["refused"].values()) for w in own) / sum(w["requests"] for w in own),
                    "codes": sorted({code for w in own for code in w["refused"]}),
                    "refused_p50": median("refused_s", "p50"),
                    "refused_p99": median("refused_s", "p99"),
                    "unanswered": sum(w["unanswered"] for w in own),
                    "rss_mb": max(w["rss_mb"] for w in own),
                    "late_p99": median("generator_late_s", "p99"),
                }
            )
    return lines


def table(result: Json) -> list[str]:
    """As Markdown."""

    def ms(value: float | None) -> str:
        return "–" if value is None else f"{value:.1f}"

    lines = [
        "# More than it can",
        "",
        f"{result['date']}, commit {result['commit']}, `{result['command']}`; {result['model']}, one image a request; one "
        f"core for the server, which can do {result['capacity']:.0f} requests a second, one for the load; medians of "
        f"{result['rounds']} rounds of {WINDOW_S:g} s.",
        "",
        "| asked, of what it can | deadline | answered, of what it can | p50, ms | p99 | most | refused | "
        "refused after, p50, ms | p99 | unanswered | memory, MB | the load's own delay, p99, ms |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for r in rows(result):
        deadline = "none" if r["deadline_s"] is None else f"{1e3 * r['deadline_s']:.0f} ms"
        codes = f" ({', '.join(r['codes'])})" if r["codes"] else ""
        lines.append(
            f"| {r['times']:.1f} | {deadline} | {r['answered']:.2f} | {ms(r['p50'])} | {ms(r['p99'])} | {ms(r['max'])} | "
            f"{100 * r['refused']:.0f} %{codes} | {ms(r['refused_p50'])} | {ms(r['refused_p99'])} | {r['unanswered']} | "
            f"{r['rss_mb']:.0f} | {ms(r['late_p99'])} |"
        )
    return lines


def draw(result: Json, path: Path) -> None:
    """Answered share and p99 against what is asked."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    for deadline_s, color in zip(DEADLINES, ("#1f6f4a", "#b5651d"), strict=True):
        own = [r for r in rows(result) if r["deadline_s"] == deadline_s]
        name = "no deadline" if deadline_s is None else f"deadline {1e3 * deadline_s:.0f} ms"
        at = [r["times"] for r in own]
        left.plot(at, [r["answered"] for r in own], "o-", color=color, label=name)
        right.plot(at, [r["p99"] for r in own], "o-", color=color, label=f"answered, {name}")
        refused = [(r["times"], r["refused_p99"]) for r in own if r["refused_p99"] is not None]
        right.plot(*zip(*refused, strict=True), "x:", color=color, label=f"refused, {name}")
    left.plot(TIMES, np.minimum(TIMES, 1.0), color="0.7", label="at best")
    left.set(xlabel="asked, of what it can", ylabel="answered, of what it can", ylim=(0, None))
    right.set(xlabel="asked, of what it can", ylabel="p99, ms", yscale="log")
    for axes in (left, right):
        axes.legend(fontsize=8)
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)


def main() -> int:
    """Measure and write."""
    parser = argparse.ArgumentParser(prog="python -m bench.overload", description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=sorted(SHAPES), default="resnet20", help="served")
    parser.add_argument("--rounds", type=int, default=5, help="of windows")
    parser.add_argument("--json", action="store_true", help="print the results as JSON")
    arguments = parser.parse_args()
    os.sched_setaffinity(0, {LOAD_CORE})
    result: Json = {
        **stamp(" ".join(("python -m bench.overload", *sys.argv[1:]))),
        **{"model": arguments.model, "rounds": arguments.rounds},
        **measure(arguments.model, arguments.rounds),
    }
    draw(result, RESULTS / "overload.png")
    publish("overload", result, table(result), arguments.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
