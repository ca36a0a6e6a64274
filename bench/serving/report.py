"""Tables and plot of `bench.serving`."""

import json
from pathlib import Path
from typing import Any

import numpy as np

Json = dict[str, Any]
PYTHON_ONLY = ("LitServe", "BentoML", "Ray Serve")
COLUMNS = (
    ("p50 at 1, ms", "closed 1", ("latency_s", "p50"), 1e3),
    ("images/s at 1", "closed 1", ("images_per_s",), 1.0),
    ("at 8", "closed 8", ("images_per_s",), 1.0),
    ("at 64", "closed 64", ("images_per_s",), 1.0),
    ("CPU µs an image at 64", "closed 64", ("cpu_s_per_image",), 1e6),
    ("p99 at 50 % load, ms", "open 0.5", ("latency_s", "p99"), 1e3),
    ("p99 at 80 % load, ms", "open 0.8", ("latency_s", "p99"), 1e3),
)


def value(rounds: list[Json], load: str, keys: tuple[str, ...]) -> float | None:
    """Median over the rounds."""
    found = []
    for cell in rounds:
        inner: Any = cell.get(load, {})
        for key in keys:
            inner = inner.get(key) if isinstance(inner, dict) else None
        if inner is not None:
            found.append(float(inner))
    return float(np.median(found)) if found else None


def bare(of_model: Json, size: int, key: str) -> float:
    """Median over the rounds of the session alone."""
    return float(np.median([r[str(size)][key] for r in of_model["bare"]]))


def number(v: float | None) -> str:
    """Three digits."""
    if v is None:
        return "missing"
    return f"{v:,.0f}" if v >= 100 else f"{v:.3g}"


def tables(result: Json) -> list[str]:
    """Everything as Markdown."""
    lines = [
        "# Serving, beside the servers people use",
        "",
        "One core for the server, one for the load; medians of interleaved rounds. Open-loop loads are shares of the",
        "server's own throughput at 64.",
    ]
    for model, found in result.items():
        lines += ["", f"## {model}", ""]
        lines += [
            f"{found['date']}, commit {found['commit']}, `{found['command']}`; rounds: {found['rounds']}, of"
        ]
        lines += [f"{found['seconds']:g} s a load; batches of at most {found['max_batch_images']} images."]
        size = found["max_batch_images"]
        limit, cpu = bare(found, size, "images_per_s"), bare(found, size, "cpu_s_per_image")
        for n_images, servers in found["cells"].items():
            lines += ["", f"### {model}, {n_images} image{'s' if n_images != '1' else ''} a request", ""]
            lines += ["| server | " + " | ".join(c[0] for c in COLUMNS) + " | of bare at 64 | CPU of bare |"]
            lines += ["| --- |" + " --- |" * (len(COLUMNS) + 2)]
            one = bare(found, 1, "images_per_s")
            blank = " | ".join(["–"] * 2)
            lines.append(
                f"| bare session | {1e3 / one:.3g} | {number(one)} | {number(bare(found, 8, 'images_per_s'))} "
                f"| {number(limit)} | {number(1e6 * cpu)} | {blank} | 1 | 1 |"
            )
            for server, rounds in servers.items():
                row = [value(rounds, load, keys) for _, load, keys, _ in COLUMNS]
                shown = [number(v * c[3] if v is not None else None) for v, c in zip(row, COLUMNS, strict=True)]
                ratios = [number(row[3] / limit if row[3] else None), number(row[4] / cpu if row[4] else None)]
                name = f"**{server}**" if server == "tta" else server
                lines.append(f"| {name} | " + " | ".join([*shown, *ratios]) + " |")
            lines += ["", *against(servers)]
        for server, why in found["broken"].items():
            last = why.strip().splitlines()[-1] if why.strip() else "no output"
            lines += ["", f"{server} was left out once it had failed to start twice: `{last.strip()}`"]
    return lines


def against(servers: dict[str, list[Json]]) -> list[str]:
    """What tta does, as ratios to its peers."""
    if "tta" not in servers or len(servers) < 2:
        return []
    peers = {s: r for s, r in servers.items() if s != "tta"}
    ours = {label: value(servers["tta"], load, keys) or 0.0 for label, load, keys, _ in COLUMNS}

    def best(label: str, names: list[str], least: bool) -> tuple[float, str] | None:
        load, keys = next((c[1], c[2]) for c in COLUMNS if c[0] == label)
        known = [(v, s) for s in names if s in peers and (v := value(peers[s], load, keys)) is not None]
        return (min(known) if least else max(known)) if known else None

    found = []
    for title, label, names, least in (
        ("throughput at 64 against the best Python-only server", "at 64", list(PYTHON_ONLY), False),
        ("against mosec", "at 64", ["mosec"], False),
        ("p50 at 1 against the best peer's", "p50 at 1, ms", list(peers), True),
        ("p99 at 80 % load against the best peer's", "p99 at 80 % load, ms", list(peers), True),
    ):
        other = best(label, names, least)
        if other:
            found.append(f"{title} ({other[1]}) {ours[label] / other[0]:.2f}×")
    return ["tta: " + "; ".join(found) + "."]


def read(folder: Path) -> Json:
    """What was measured so far, by model."""
    path = folder / "serving.json"
    found: Json = json.loads(path.read_text()) if path.exists() else {}
    return found


def write(result: Json, folder: Path) -> None:
    """JSON, tables and plot."""
    folder.mkdir(exist_ok=True)
    (folder / "serving.json").write_text(json.dumps(result, indent=1) + "\n")
    (folder / "serving.md").write_text("\n".join(tables(result)) + "\n")
    draw(result, folder / "serving.png")


def draw(result: Json, path: Path) -> None:
    """Throughput at 64 outstanding, and p99 at 80 % load, of each model with one image a request."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    models = [m for m, found in result.items() if "1" in found["cells"]]
    figure, axes = plt.subplots(2, len(models), figsize=(4 * len(models), 6), squeeze=False, layout="constrained")
    for column, model in enumerate(models):
        servers = result[model]["cells"]["1"]
        names = list(servers)
        colours = ["#1f6f4a" if s == "tta" else "#9a9a9a" for s in names]
        limit = bare(result[model], result[model]["max_batch_images"], "images_per_s")
        for row, (title, load, keys, factor) in enumerate(
            (
                ("images/s, 64 outstanding", "closed 64", ("images_per_s",), 1.0),
                ("p99 at 80 % load, ms", "open 0.8", ("latency_s", "p99"), 1e3),
            )
        ):
            axis = axes[row][column]
            values = [(value(servers[s], load, keys) or 0) * factor for s in names]
            bars = axis.barh(names, values, color=colours)
            axis.bar_label(bars, [number(v) for v in values], fontsize=8, padding=2)
            axis.invert_yaxis()
            axis.set_title(f"{model}: {title}", fontsize=9)
            axis.margins(x=0.15)
            if row == 0:
                axis.axvline(limit, color="#b3673a", linewidth=1, linestyle="--")
            else:
                axis.set_xscale("log")
    figure.suptitle("One core for the server, one image a request; dashed: the session alone", fontsize=10)
    figure.savefig(path, dpi=110)
    plt.close(figure)
