"""Tables and pictures of what `python -m bench.drift` measured."""

import json
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import chi2

from bench.corruptions import APPROXIMATE, CORRUPTIONS
from bench.drift.parts import CENSOR, OTHER_SHIFTS, REGIMES

Json = dict[str, Any]
KEYS = {  # of the report, by part
    "cost": ("cost",),
    "calibration": ("calibration_s",),
    "recall": ("recall",),
    "whole": ("whole",),
    "slow": ("slow",),
    "diagnosis": ("diagnosis", "cuts"),
    "arl": ("arl", "calibrations"),
    "delays": ("own_threshold", "delays", "delays_by_shift"),
    "peers": ("peers",),
}
KINDS = ("input", "feature", "prior", "output")
OURS = "tta MEWMA | ours"
SEVERE = tuple(f"{name} {s}" for name in CORRUPTIONS for s in (3, 4, 5))


def interval(exposure: float, alarms: int) -> tuple[float, float, float]:
    """Run length and its 95 % interval (exact, Poisson)."""
    high = 2 * exposure / chi2.ppf(0.025, 2 * alarms) if alarms else float("inf")
    return exposure / max(alarms, 1), 2 * exposure / chi2.ppf(0.975, 2 * alarms + 2), float(high)


def summary(delays: list[int]) -> Json:
    """Mean, median, 90th percentile and share without an alarm."""
    d = np.array(delays, float)
    return {
        "mean": float(d.mean()),
        "median": float(np.median(d)),
        "p90": float(np.quantile(d, 0.9)),
        "missed": float((d >= CENSOR).mean()),
        "n": len(d),
    }


def pooled(by_draw: list[Json], shifts: tuple[str, ...]) -> dict[str, Json]:
    """By detector: the mean over shifts of each shift's mean delay, and quantiles over everything."""
    found: dict[str, Json] = {}
    for name in by_draw[0][shifts[0]]:
        means = [np.mean([d for draw in by_draw for d in draw[shift][name]]) for shift in shifts]
        every = [d for draw in by_draw for shift in shifts for d in draw[shift][name]]
        found[name] = {**summary(every), "mean": float(np.mean(means))}
    return found


def peers_pooled(results: list[Json]) -> Json:
    """Of one library: delays at the same severities, its realised run length, its cost."""
    delays = {s: [d for r in results for d, _ in r["delays"][s]] for s in SEVERE}
    missed = [not alarmed for r in results for s in SEVERE for _, alarmed in r["delays"][s]]
    exposure = sum(n for r in results for n, _ in r["null"])
    alarms = sum(alarmed for r in results for _, alarmed in r["null"])
    every = [d for ds in delays.values() for d in ds]
    return {
        **summary(every),
        "mean": float(np.mean([np.mean(ds) for ds in delays.values() if ds])),
        "missed": float(np.mean(missed)),
        "realised": interval(exposure, alarms),
        "us_per_sample": float(np.median([r["us_per_sample"] for r in results])),
        "configure_s": float(np.median([r["configure_s"] for r in results])),
    }


MEASURED: dict[str, Callable[[Json], Json]] = {  # part, and what the report keeps of it
    "cost": lambda found: {"cost": found["cost"]},
    "calibration": lambda found: {"calibration_s": found["calibration"]},
    "recall": lambda found: {"recall": found["recall"]},
    "whole": lambda found: {
        "whole": {
            "held": float(np.mean([d["held"] for d in found["whole"]])),
            "delays": summary([n for d in found["whole"] for n in d["delays"]]),
        }
    },
    "slow": lambda found: {
        "slow": {
            "realised": interval(
                sum(d["exposure"] for d in found["slow"]), sum(d["alarms"] for d in found["slow"])
            ),
            "delays": summary([n for d in found["slow"] for n in d["delays"]]),
        }
    },
    "diagnosis": lambda found: {
        "diagnosis": _confusion(found["diagnosis"]),
        "cuts": [(d["cut"], d["cut_right"]) for d in found["diagnosis"]],
    },
    "arl": lambda found: {
        "arl": {arl: _run_lengths(draws) for arl, draws in found["arl"].items()},
        "calibrations": {arl: [d["calibration"] for d in draws] for arl, draws in found["arl"].items()},
    },
    "delays": lambda found: {
        "own_threshold": {
            arl: [d[OURS]["realised_at_1"] for d in draws] for arl, draws in found["common"].items()
        },
        "delays": {arl: pooled(draws, SEVERE) for arl, draws in found["delays"].items()},
        "delays_by_shift": {
            arl: {
                shift: {
                    name: summary([d for draw in draws for d in draw[shift][name]]) for name in draws[0][shift]
                }
                for shift in draws[0]
            }
            for arl, draws in found["delays"].items()
        },
    },
    "peers": lambda found: {"peers": {name: peers_pooled(results) for name, results in found["peers"].items()}},
}


def write(found: Json, folder: Path, now: dict[str, str]) -> None:
    """Write drift.json, drift.md and drift.png.

    Args:
        found: parts that were measured now; all others stay as drift.json has them, with their commit.
        folder: of the results.
        now: the stamp of what was measured now.
    """
    path = folder / "drift.json"
    before: Json = json.loads(path.read_text()) if path.exists() and not set(MEASURED) <= set(found) else {}
    data: Json = {
        **now,
        "python": platform.python_version(),
        "commits": {part: now["commit"] if part in found else before["commits"][part] for part in MEASURED},
    }
    for part, keep in MEASURED.items():
        kept = keep(found) if part in found else {k: v for k, v in before.items() if k in KEYS[part]}
        data.update(kept)
    folder.mkdir(exist_ok=True)
    lines = json.dumps(dict.fromkeys(data, "\x00"), indent=0)
    for value in data.values():  # one line a measurement
        lines = lines.replace('"\\u0000"', json.dumps(_rounded(value)), 1)
    path.write_text(lines + "\n")
    (folder / "drift.md").write_text("\n".join(_tables(data)) + "\n")
    (folder / "drift_summary.md").write_text("\n".join(_summary(data)) + "\n")
    _picture(data, folder / "drift.png")
    print("\n".join(_tables(data)))


def _earlier(data: Json) -> str:
    """Which parts an earlier commit measured; "" if none."""
    earlier: dict[str, list[str]] = {}
    for part, commit in data["commits"].items():
        if commit != data["commit"]:
            earlier.setdefault(commit, []).append(part)
    return "; ".join(f"{', '.join(parts)} at commit {commit}" for commit, parts in earlier.items())


def _rounded(value: Any) -> Any:
    """The same with four significant digits."""
    if isinstance(value, dict):
        return {k: _rounded(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(v) for v in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


def _summary(data: Json) -> list[str]:
    """The table of the README."""
    arl = max(data["delays"], key=int)
    detectors = data["delays"][arl]
    last = {n: d["mean"] for n, d in detectors.items() if n.endswith("| last") or n == "EWMA | entropy"}
    same = {n: d["mean"] for n, d in detectors.items() if n.endswith("| ours") and not n.startswith("tta")}
    ours = detectors[OURS]
    rows = [
        (
            f"mean delay, 15 corruptions, severities 3–5, at one false alarm in {int(arl):,}",
            f"{_number(ours['mean'])} samples (median {_number(ours['median'])}, 90 % {_number(ours['p90'])})",
        ),
        (
            "the best peer on the last block's features or entropy, as their documents advise",
            f"{_number(min(last.values()))} ({_plain(min(last, key=lambda n: last[n]))}), "
            f"{min(last.values()) / ours['mean']:.1f}× ours",
        ),
        (
            "the best peer on our features",
            f"{_number(min(same.values()))} ({_plain(min(same, key=lambda n: same[n]))}), "
            f"{min(same.values()) / ours['mean']:.1f}× ours",
        ),
    ]
    for name, peer in sorted(data["peers"].items()):
        if name.endswith("| ours"):
            continue
        fast = data["delays"]["1000"][OURS]["mean"]
        rows.append(
            (
                f"{_plain(name)}, the library itself at 1,000",
                f"{_number(peer['mean'])}, {peer['mean'] / fast:.1f}× ours; {_number(peer['us_per_sample'])} µs a sample",
            )
        )
    for label, text in (
        ("iid", "independent samples"),
        ("half", "half of one class"),
        ("sticky 5", "pictures five times in a row, unannounced"),
        ("runs 100", "classes in runs of 100, unannounced"),
        ("runs 100 announced", "the same, announced"),
    ):
        mean, low, high = data["arl"][arl][label]["pooled"]
        rows.append(
            (
                f"samples between false alarms, {int(arl):,} wanted: {text}",
                f"{_number(mean)} ({_number(low)}–{_number(high)})",
            )
        )
    confusion = data["diagnosis"]["48"]
    each = ", ".join(f"{k} {100 * v:.0f} %" for k, v in zip(KINDS, confusion["diagonal"], strict=True))
    rows.append(("right kind of shift, 48 samples after the alarm", each))
    for size in ("8", "48"):
        shares = [np.mean([d[size][k] for d in data["recall"]]) for k in ("right", "wrong")]
        name = f"regime recognised among {len(REGIMES) + 1}, from {size} samples (another named)"
        rows.append((name, f"{100 * shares[0]:.1f} % ({100 * shares[1]:.2f} %)"))
    cost = data["cost"]
    rows.append(
        (
            "CPU of the monitor",
            f"{cost['us a sample, batch 1']:.0f} µs a sample one by one, {cost['us a sample, batch 64']:.1f} in batches of 64; "
            f"{data['calibration_s']['arl 20000']:.1f} s to calibrate",
        )
    )
    kept = _earlier(data)
    head = f"{data['date']}, commit {data['commit']}, `{data['command']}`{f' ({kept})' if kept else ''}:"
    return [head, "", "| | measured |", "| --- | --- |", *(f"| {a} | {b} |" for a, b in rows)]


def _run_lengths(draws: list[Json]) -> Json:
    result: Json = {}
    for label in draws[0]:
        if label == "calibration":
            continue
        exposure, alarms = sum(d[label]["exposure"] for d in draws), sum(d[label]["alarms"] for d in draws)
        each = [d[label]["exposure"] / max(1, d[label]["alarms"]) for d in draws]
        result[label] = {"pooled": interval(exposure, alarms), "draws": each}
    return result


def _confusion(draws: list[Json]) -> Json:
    result: Json = {}
    for window in draws[0]["confusion"]:
        table = {k: {v: sum(d["confusion"][window][k].get(v, 0) for d in draws) for v in KINDS} for k in KINDS}
        total = [sum(row.values()) for row in table.values()]
        right = [table[k][k] / max(1, n) for k, n in zip(KINDS, total, strict=True)]
        result[window] = {"counts": table, "diagonal": right, "mean": float(np.mean(right))}
    result["silent"] = {k: sum(d["silent"].get(k, 0) for d in draws) for k in KINDS}
    return result


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _plain(name: str) -> str:
    """A detector's name in a table's cell."""
    return name.replace(" | ", ", on ")


def _tables(data: Json) -> list[str]:
    lines = [
        f"{data['date']}, commit {data['commit']}, `{data['command']}`. ResNet-20, CIFAR-10 test images: 2,000 reference,",
        "3,000 others for every stream; corruptions CIFAR-10-C-style, "
        f"{len(CORRUPTIONS) - len(APPROXIMATE)} of 15 by the original formulas, ours in part: {', '.join(APPROXIMATE)}.",
    ]
    kept = _earlier(data)
    lines += [f"Kept from before: {kept}."] if kept else []
    for arl, nulls in data["arl"].items():
        n = len(data["calibrations"][arl])
        lines += [
            "",
            f"**Samples between false alarms, target {int(arl):,}** (whole monitor; {n} reference draws × 40 streams)",
            "",
            "| null stream | realised (95 % interval) | of the target | by draw |",
            "| --- | --- | --- | --- |",
        ]
        for label, row in nulls.items():
            mean, low, high = row["pooled"]
            draws = ", ".join(_number(v) for v in row["draws"])
            lines.append(
                f"| {label} | {_number(mean)} ({_number(low)}–{_number(high)}) | {mean / int(arl):.2f}× | {draws} |"
            )
    for arl, detectors in data["delays"].items():
        best = detectors[OURS]["mean"]
        lines += [
            "",
            f"**Delay in samples, severities 3–5 of 15 corruptions, all at a realised run length of {int(arl):,}**",
            "",
            "| detector, features | mean | median | 90 % | missed | of ours |",
            "| --- | --- | --- | --- | --- | --- |",
        ]
        for name, d in sorted(detectors.items(), key=lambda item: item[1]["mean"]):
            lines.append(_delay_row(name, d, best))
        lines.append("| *always fires* | 1 | 1 | 1 | 0 % | run length 1 |")
        lines.append(f"| *never fires* | {CENSOR} | {CENSOR} | {CENSOR} | 100 % | run length ∞ |")
    if data["peers"]:
        ours = data["delays"]["1000"][OURS]["mean"]
        lines += [
            "",
            "**The libraries themselves, set to 1,000** (alibi-detect by its own `ert`, frouros and ADWIN by us on null",
            "streams; window 20; a delay over 600 counts as 600; frouros on 500 reference samples)",
            "",
            "| library, features | realised run length | mean | median | 90 % | missed | of ours | µs a sample | set up, s |",
            "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
        ]
        for name, d in sorted(data["peers"].items(), key=lambda item: item[1]["mean"]):
            mean, low, high = d["realised"]
            lines.append(
                f"| {_plain(name)} | {_number(mean)} ({_number(low)}–{_number(high)}) | {_number(d['mean'])} | "
                f"{_number(d['median'])} | {_number(d['p90'])} | {100 * d['missed']:.0f} % | {d['mean'] / ours:.1f}× | "
                f"{_number(d['us_per_sample'])} | {_number(d['configure_s'])} |"
            )
    whole = data["whole"]
    lines += [
        "",
        f"**The whole monitor**, own thresholds for 10,000 and its stickiness measured: mean delay "
        f"{_number(whole['delays']['mean'])}, median {_number(whole['delays']['median'])}, 90 % "
        f"{_number(whole['delays']['p90'])}, {100 * whole['delays']['missed']:.0f} % missed; in "
        f"{100 * whole['held']:.1f} % of the streams thresholds for sticky traffic were asked for (wrongly; the daemon "
        "then takes a few seconds more).",
    ]
    slow = data["slow"]
    mean, low, high = slow["realised"]
    lines += [
        "",
        f"**The slow tier alone**, bound 10,000: realised {_number(mean)} ({_number(low)}–{_number(high)}), mean delay "
        f"{_number(slow['delays']['mean'])}, median {_number(slow['delays']['median'])}, "
        f"{100 * slow['delays']['missed']:.0f} % not found in {CENSOR:,} samples.",
    ]
    lines += _shift_tables(data)
    lines += _diagnosis_tables(data)
    cost = ", ".join(
        f"{k.removeprefix('us a sample, ')} {v:.1f}" for k, v in data["cost"].items() if k.startswith("us")
    )
    seconds = ", ".join(f"{k} {v:.1f}" for k, v in data["calibration_s"].items())
    kept = data["cost"]["bytes kept per million samples"]
    lines += [
        "",
        f"**Cost.** CPU µs a sample: {cost}. Calibration, CPU s: {seconds}. {kept:,} bytes more after a million samples.",
    ]
    return lines


def _delay_row(name: str, d: Json, best: float) -> str:
    return (
        f"| {_plain(name)} | {_number(d['mean'])} | {_number(d['median'])} | {_number(d['p90'])} | "
        f"{100 * d['missed']:.0f} % | {d['mean'] / best:.1f}× |"
    )


def _shift_tables(data: Json) -> list[str]:
    arl = max(data["delays_by_shift"], key=int)
    by_shift = data["delays_by_shift"][arl]
    lines = [
        "",
        f"**Mean delay of ours by severity, run length {int(arl):,}**",
        "",
        "| corruption | 1 | 2 | 3 | 4 | 5 |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name in CORRUPTIONS:
        lines.append(
            f"| {name} | " + " | ".join(_number(by_shift[f"{name} {s}"][OURS]["mean"]) for s in range(1, 6)) + " |"
        )
    rivals = ("MMD W=20 | last", "MMD W=20 | ours", "QT-EWMA K=32 | last", "EWMA | entropy")
    lines += [
        "",
        f"**Other shifts, mean delay (missed), run length {int(arl):,}** (the feature charts are meant to be silent on a prior)",
        "",
        "| shift | ours | " + " | ".join(map(_plain, rivals)) + " |",
        "| --- | --- |" + " --- |" * len(rivals),
    ]
    for shift in OTHER_SHIFTS:
        cells = [by_shift[shift][name] for name in (OURS, *rivals)]
        lines.append(
            f"| {shift} | " + " | ".join(f"{_number(c['mean'])} ({100 * c['missed']:.0f} %)" for c in cells) + " |"
        )
    lines.append("| label swaps | nothing (features are as before) | – | – | – | – |")
    return lines


def _diagnosis_tables(data: Json) -> list[str]:
    lines = [
        "",
        f"**Diagnosis** (corruptions not like those the cut was fitted on; {len(data['cuts'])} reference draws together)",
        "",
    ]
    for window, result in data["diagnosis"].items():
        if window == "silent":
            continue
        lines += [
            f"| {window} samples after the alarm | " + " | ".join(KINDS) + " | right |",
            "| --- |" + " --- |" * (len(KINDS) + 1),
        ]
        for kind, right in zip(KINDS, result["diagonal"], strict=True):
            lines.append(
                f"| {kind} | "
                + " | ".join(str(result["counts"][kind][v]) for v in KINDS)
                + f" | {100 * right:.0f} % |"
            )
        lines.append("")
    silent = ", ".join(f"{k} {n}" for k, n in data["diagnosis"]["silent"].items() if n) or "none"
    lines.append(f"Without an alarm in 1,500 samples, or with one before the change: {silent}.")
    lines += [
        "",
        f"**Regimes recognised** among {len(REGIMES) + 1} (home included), in %; the rest wait for more samples:",
        "",
        "| samples | recognised | another named | its own not known: another named |",
        "| --- | --- | --- | --- |",
    ]
    for size in data["recall"][0]:
        shares = [np.mean([d[size][k] for d in data["recall"]]) for k in ("right", "wrong", "unknown_taken")]
        lines.append(f"| {size} | " + " | ".join(f"{100 * v:.2f}" for v in shares) + " |")
    return lines


def _picture(data: Json, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(17, 5.2), constrained_layout=True)
    arl = max(data["delays"], key=int)
    detectors = sorted(data["delays"][arl].items(), key=lambda item: -item[1]["mean"])
    names = [_plain(n) for n, _ in detectors]
    colours = [
        "tab:orange" if n.startswith("tta") else "tab:blue" if n.endswith("ours") else "tab:grey" for n in names
    ]
    left.barh(names, [d["mean"] for _, d in detectors], color=colours)
    left.set_xscale("log")
    left.set_xlabel("mean delay, samples (log)")
    left.set_title(f"15 corruptions, severities 3–5, run length {int(arl):,}")
    for target, nulls in data["arl"].items():
        labels = list(nulls)
        values = [nulls[n]["pooled"][0] / int(target) for n in labels]
        middle.plot(values, range(len(labels)), "o", label=f"target {int(target):,}")
    middle.set_yticks(range(len(labels)), labels)
    middle.axvline(1, color="black", lw=1)
    middle.axvline(0.25, color="black", lw=1, ls=":")
    middle.set_xscale("log")
    middle.set_xticks((0.25, 0.5, 1, 2, 4, 8), ("¼", "½", "1", "2", "4", "8"))
    middle.set_xticks((), minor=True)
    middle.set_xlabel("realised run length, of the target (log)")
    middle.set_title("False alarms on null streams (right is fewer)")
    middle.legend()
    table = data["diagnosis"]["48"]["counts"]
    counts = np.array([[table[k][v] for v in KINDS] for k in KINDS], float)
    shares = counts / np.maximum(1, counts.sum(axis=1, keepdims=True))
    right.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    for i in range(4):
        for j in range(4):
            right.text(
                j,
                i,
                f"{100 * shares[i, j]:.0f} %",
                ha="center",
                va="center",
                color="black" if shares[i, j] < 0.6 else "white",
            )
    right.set_xticks(range(4), KINDS)
    right.set_yticks(range(4), KINDS)
    right.set_xlabel("diagnosed")
    right.set_ylabel("true")
    right.set_title("48 samples after the alarm")
    figure.savefig(path, dpi=90)
    plt.close(figure)
