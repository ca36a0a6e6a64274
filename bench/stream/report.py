"""The stream's results as tables and a picture."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bench.corruptions import CORRUPTIONS
from bench.stream.data import LABELS, N_FIRST, N_START, N_VISIT, N_VISITS, VISIT_VARIES

PARTS = ("first", "visits", "correlated", "mixed", "clean")
FEEDBACK = "tta, right or wrong"  # of a labelled image only whether the answer was right
SHOWN = {
    "source": "source",
    "bn": "BN-1",
    "tent": "Tent",
    "eata": "EATA",
    "eta": "ETA (RDumb before its first reset)",
    "cotta": "CoTTA",
    "roid": "ROID",
    "bitta": "BiTTA-style, correct/wrong",
    "bn/told": "BN-1, told of changes",
    "eata/told": "EATA, told of changes",
    "eta/told": "ETA, told of changes",
    "bn/16": "BN-1, batches of 16",
    "eata/16": "EATA, batches of 16",
    "roid/16": "ROID, batches of 16",
    "full": "full fine-tuning, same labels",
    "replay": "full fine-tuning, same labels replayed",
    "replay/told": "the same labels replayed, told of changes",
    "tta, proven only": "tta, nothing served that labels have not proven",
    "tta, no rehearsal": "tta, each regime learning alone",
    FEEDBACK: "tta, told of no class but only right or wrong",
    "tta": "**tta**",
}
WITH_LABELS = ("bitta", "full", "replay", "replay/told")  # of the peers
FEW_VISITS = 2  # of peers that take 40 passes an image
FEW = ("cotta", "bitta", FEEDBACK)
EVENTS = ("alarm", "relieved", "accepted", "not_accepted", "settled", "moved_on", "known", "disagreed")

Json = dict[str, Any]


def condensed(found: Json) -> Json:
    """A run without its thousands of segments: errors in % by part, visit and corruption."""
    if "segments" not in found:  # from results that were kept
        return found
    segments = found["segments"]

    def error(key: str, **where: Any) -> float | None:
        own = [s for s in segments if all(s[k] == v for k, v in where.items())]
        n = sum(s["images"] for s in own)
        return round(100 * sum(s[key] for s in own) / n, 2) if n and key in own[0] else None

    what = ("key", "commit", "method", "seed", "visits", "delay", "wrong", "cpu_s")
    kept = {k: found[k] for k in what if k in found}
    last = max(s["visit"] for s in segments)
    kept["parts"] = {part: error("errors", part=part) for part in PARTS}
    kept["by_visit"] = [error("errors", visit=v) for v in range(1, last + 1)]
    for part in ("first", "visits"):
        kept[f"{part}_by_corruption"] = {c: error("errors", part=part, corruption=c) for c in CORRUPTIONS}
        if "errors_source" in segments[0]:
            kept[f"{part}_source_by_corruption"] = {
                c: error("errors_source", part=part, corruption=c) for c in CORRUPTIONS
            }
    if "events" in found:
        kept["labels"] = sum(s["labels"] for s in segments)
        kept["events"] = dict(Counter(e["what"] for e in found["events"] if e["what"] in EVENTS))
        kept["adaptations"] = len(found["adapt_cpu_s"])
        kept["adapt_cpu_s"] = round(sum(found["adapt_cpu_s"]), 1)
        kept["blocks"] = dict(Counter(e.get("block", "") for e in found["events"] if e["what"] == "accepted"))
        kept["recall_after"] = recall_delays(segments)
    return kept


def recall_delays(segments: Sequence[Json]) -> float | None:
    """Mean images of a visit that are not answered by the version that answers most of it."""
    late = [s["images"] - max(s["versions"].values()) for s in segments if s["part"] == "visits"]
    return round(float(np.mean(late)), 1) if late else None


def pick(result: Json, method: str, **where: Any) -> list[Json]:
    """Runs of a method on the whole stream, with labels at once and right unless told otherwise."""
    where = {"visits": FEW_VISITS if method in FEW else N_VISITS, "delay": 0, "wrong": 0.0, **where}
    return [c for c in result["cells"] if c["method"] == method and all(c[k] == v for k, v in where.items())]


def named(method: str, runs: Sequence[Json]) -> str:
    """As shown, with a mark if runs are of earlier code."""
    return SHOWN[method] + (" †" if any(c.get("earlier") for c in runs) else "")


def footnote(result: Json) -> list[str]:
    """What the mark means."""
    commits = sorted({c["commit"] for c in result["cells"] if c.get("earlier")})
    earlier = [(c["method"], c["seed"]) for c in result["cells"] if c.get("earlier") and c["visits"] == N_VISITS]
    seeds = sorted(seed for method, seed in earlier if method == "tta")
    which = f"; of **tta** seeds {', '.join(map(str, seeds))}" if seeds else ""
    return ["", f"† with runs of earlier code, commit {', '.join(commits)}{which}."] if commits else []


def mean(values: Sequence[float | None]) -> float | None:
    """Of those there are."""
    known = [v for v in values if v is not None]
    return float(np.mean(known)) if known else None


def overall(cell: Json) -> float:
    """Mean error over first pass and visits, by images."""
    n = (N_FIRST, N_VISIT * (cell["visits"] - 1))
    return float((cell["parts"]["first"] * n[0] + (cell["parts"]["visits"] or 0) * n[1]) / sum(n))


def number(value: float | None) -> str:
    """As shown."""
    return "–" if value is None else f"{value:.1f}"


def row(runs: Sequence[Json]) -> list[str]:
    """Errors of a method."""
    whole = [c for c in runs if c["visits"] == N_VISITS]
    values = [mean([overall(c) for c in whole]), mean([c["parts"]["first"] for c in runs])]
    values += [mean([c["by_visit"][1] for c in runs]), mean([c["by_visit"][-1] for c in whole])]
    values += [mean([c["parts"][part] for c in runs]) for part in PARTS[2:]]
    return [number(v) for v in values]


def tables(result: Json) -> list[str]:
    """Everything as Markdown."""
    lines = [
        "# A stream that never stops changing",
        "",
        f"{result['date']}, commit {result['commit']}, `{result['command']}`; {len(result['missing'])} runs missing.",
        "Errors in %.",
        f"ResNet-20, CIFAR-10 test images; {N_START} clean images, then 15 corruptions at severity 5 in the standard order:",
        f"a first pass of {N_FIRST} images of each, of which {LABELS} get a label, then 19 visits of {N_VISIT - VISIT_VARIES} to",
        f"{N_VISIT + VISIT_VARIES} without labels, then classes in runs, all corruptions mixed, and clean images. No image",
        "whose label is known is ever shown again. Nobody is told when the corruption changes, but for those said to be:",
        "their batches are cut there, as in the papers. tta answers every image by itself with fixed weights; its settings",
        "differ from the defaults in adapt.label_free: immediate and adapt.labels: 96, and in that nothing",
        "here waits for seconds. All others but the source wait for batches of 200 (or 16) and normalise by them. The stream",
        "waits for whoever adapts. Mean over the seeds there are. CoTTA and BiTTA-style were stopped after 2 visits for",
        "their cost, and tta with what BiTTA-style is told as well.",
        "",
        "| method | labels | seeds | first and visits | first pass | visit 2 | visit 20 | class runs | mixed | clean |",
        "| --- | --- | --- |" + " --- |" * 7,
    ]
    for method in SHOWN:
        runs = pick(result, method)
        labelled = method in WITH_LABELS or method.startswith("tta")
        labels = f"15 × {LABELS}" if labelled else "none"
        cells = row(runs) if runs else ["missing"] * 7
        lines.append(f"| {named(method, runs)} | {labels} | {len(runs)} | " + " | ".join(cells) + " |")
    lines += [
        *footnote(result),
        "",
        *verdicts(result),
        *by_corruption(result),
        *what_it_did(result),
        *label_troubles(result),
    ]
    return lines


def best_peer(result: Json, told: bool) -> tuple[str, float] | None:
    """The peer with the least error over first pass and visits, of those told of changes or of the others."""
    peers = [m for m in SHOWN if not m.startswith("tta") and m not in FEW and m.endswith("/told") == told]
    found = {m: mean([overall(c) for c in pick(result, m)]) for m in peers}
    known = {m: v for m, v in found.items() if v is not None}
    return min(known.items(), key=lambda item: item[1]) if known else None


def gap(result: Json, peer: str) -> tuple[float, int]:
    """Error less a peer's, over first pass and visits, on the seeds that both have; and how many those are."""
    own, other = ({c["seed"]: overall(c) for c in pick(result, m)} for m in ("tta", peer))
    both = own.keys() & other.keys()
    return float(np.mean([own[seed] - other[seed] for seed in both])), len(both)


def verdicts(result: Json) -> list[str]:
    """What the bars ask."""
    runs, best = pick(result, "tta"), [best_peer(result, told) for told in (False, True)]
    if not runs or best[0] is None:
        return []
    gaps = [(b[0], *gap(result, b[0])) for b in best if b is not None]
    worst = [
        max((c["visits_by_corruption"][k] - c["visits_source_by_corruption"][k], k) for k in CORRUPTIONS)
        for c in runs
    ]
    home = pick(result, "source")
    clean = mean([c["parts"]["clean"] for c in runs]), mean([c["parts"]["clean"] for c in home])
    lines = [
        *(
            f"Against the best peer {how} ({SHOWN[peer]}): {points:+.1f} points of error, mean of first pass and visits, "
            f"on the seeds that both have: {n}."
            for how, (peer, points, n) in zip(("that is not told of changes", "that is"), gaps, strict=False)
        ),
        f"Visit 20 against the first pass: {number(mean([c['by_visit'][-1] - c['by_visit'][0] for c in runs]))} points.",
        "Worst corruption over visits, against the source on the same images: "
        + ", ".join(f"{gap:+.1f} ({name})" for gap, name in worst)
        + ".",
    ]
    if clean[1] is not None:
        lines.append(f"Back on clean images: {number(clean[0])} % against the source's {number(clean[1])} %.")
    return [*lines, ""]


def by_corruption(result: Json) -> list[str]:
    """Errors of each corruption over all visits."""
    methods = [m for m in SHOWN if pick(result, m)]
    lines = [
        "**Visits 2 to 20, by corruption**",
        "",
        "| corruption | " + " | ".join(named(m, pick(result, m)) for m in methods) + " |",
    ]
    lines.append("| --- |" + " --- |" * len(methods))
    for name in CORRUPTIONS:
        values = [number(mean([c["visits_by_corruption"][name] for c in pick(result, m)])) for m in methods]
        lines.append(f"| {name} | " + " | ".join(values) + " |")
    return [*lines, ""]


def what_it_did(result: Json) -> list[str]:
    """Decisions of the daemon, a run."""
    lines = [
        "**What the daemon did**, mean of a run",
        "",
        "| | labels | images of a visit not by its main version | operations | CPU seconds of them | "
        + " | ".join(EVENTS)
        + " | tuned |",
        "| --- |" + " --- |" * (len(EVENTS) + 5),
    ]
    for method in (m for m in SHOWN if m.startswith("tta")):
        runs = pick(result, method)
        if not runs:
            continue
        values = [mean([c[k] for c in runs]) for k in ("labels", "recall_after", "adaptations", "adapt_cpu_s")]
        values += [mean([c["events"].get(e, 0) for c in runs]) for e in EVENTS]
        blocks: Counter[str] = sum((Counter(c["blocks"]) for c in runs), Counter())
        tuned = ", ".join(f"{b or 'normalisation'} {n}" for b, n in blocks.most_common())
        lines.append(f"| {named(method, runs)} | " + " | ".join(map(number, values)) + f" | {tuned} |")
    return [*lines, ""]


def label_troubles(result: Json) -> list[str]:
    """First pass with late and wrong labels."""
    short = [c for c in result["cells"] if c["method"] == "tta" and c["visits"] != N_VISITS]
    if not short:
        return []
    short += pick(result, "tta", seed=0)
    lines = ["**Late and wrong labels**, tta, first pass and one visit", ""]
    lines += ["| labels | first pass | visit 2 | clean | accepted | not accepted |", "| --- |" + " --- |" * 5]
    for c in sorted(short, key=lambda c: (c["wrong"], c["delay"])):
        what = (
            f"{c['delay']} images late"
            if c["delay"]
            else f"{100 * c['wrong']:.0f} % wrong"
            if c["wrong"]
            else "at once"
        )
        values = [c["parts"]["first"], c["by_visit"][1], c["parts"]["clean"]]
        counts = [str(c["events"].get(e, 0)) for e in ("accepted", "not_accepted")]
        mark = " †" if c.get("earlier") else ""
        lines.append(f"| {what}{mark} | " + " | ".join([*map(number, values), *counts]) + " |")
    return [*lines, ""]


def summary(result: Json) -> list[str]:
    """The table of the README."""
    lines = [
        f"{result['date']}, commit {result['commit']}, `{result['command']}`; errors in %, mean of the seeds there are:",
        "",
        "| | first pass | visit 20 | class runs | mixed | clean |",
        "| --- |" + " --- |" * 5,
    ]
    for method in SHOWN:
        runs = pick(result, method)
        if runs and method != "tta, no rehearsal":
            values = row(runs)
            lines.append(f"| {named(method, runs)} | " + " | ".join([values[1], values[3], *values[4:]]) + " |")
    return [*lines, *footnote(result)]


def draw(result: Json, path: Path) -> None:
    """Error by visit; needs matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(11, 5), layout="constrained")
    colours = plt.get_cmap("tab20")(np.linspace(0, 1, len(SHOWN)))
    for (method, shown), colour in zip(SHOWN.items(), colours, strict=True):
        runs = pick(result, method)
        if not runs or method in FEW:
            continue
        values = np.mean([c["by_visit"] for c in runs], axis=0)
        line = "--" if method.endswith("/told") else ":" if method.endswith("/16") else "-"
        style = {"color": "#1f6f4a" if method.startswith("tta") else colour, "linestyle": line, "linewidth": 1.2}
        if method == "tta":
            style["linewidth"] = 2.6
        elif method.startswith("tta"):
            style["linestyle"] = "-." if method == "tta, proven only" else "--"
        axis.plot(range(1, len(values) + 1), values, label=shown.strip("*"), **style)
    axis.set_xlabel("visit (the first: 1,000 images a corruption, 128 labels; then 200 without)")
    axis.set_ylabel("error, %")
    axis.set_xticks(range(1, N_VISITS + 1))
    axis.grid(alpha=0.25)
    lines, names = axis.get_legend_handles_labels()
    order = np.argsort([-np.mean(line.get_ydata()) for line in lines])  # as the lines lie
    figure.legend([lines[i] for i in order], [names[i] for i in order], loc="outside right upper", fontsize=8)
    axis.set_title("15 corruptions, severity 5, ResNet-20 on CIFAR-10")
    figure.savefig(path, dpi=110)
    plt.close(figure)
