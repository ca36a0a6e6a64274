"""`tta bench`: load a running server and say what it does."""

from pathlib import Path
from typing import Annotated, Any

import typer

from tta.client import endpoints_of
from tta.commands.output import (
    ENDPOINT,
    Endpoint,
    Json,
    Timeout,
    connect,
    console,
    credentials,
    print_json,
    print_table,
    progress_console,
)

N_BATCHES = 64  # different ones, sent in turn
LATE = 0.1  # of the median latency: a generator later than that measures itself


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("bench")(bench)


def bench(
    images: Annotated[Path | None, typer.Option("--images", help="Pictures to send; default: noise.")] = None,
    rate: Annotated[
        float | None, typer.Option("--rate", min=0.001, help="Requests a second, evenly spaced (open loop).")
    ] = None,
    outstanding: Annotated[
        int, typer.Option("--outstanding", min=1, help="Requests unanswered at a time (closed loop, the default).")
    ] = 8,
    batch: Annotated[int, typer.Option("--batch", min=1, help="Images a request.")] = 1,
    duration_s: Annotated[float, typer.Option("--duration-s", min=0.1, help="Seconds to measure.")] = 10.0,
    warmup_s: Annotated[float, typer.Option("--warmup-s", min=0.0, help="Seconds before that.")] = 1.0,
    deadline_s: Annotated[float | None, typer.Option("--deadline-s", help="Deadline of each request.")] = None,
    observe: Annotated[
        bool, typer.Option("--observe", help="Let the monitor take it for traffic (it may raise an alarm).")
    ] = False,
    endpoint: Endpoint = ENDPOINT,
    timeout_s: Timeout = 10.0,
    as_json: Json = False,
) -> None:
    """Load a running server: throughput, latencies, refusals, by version. The monitor does not see it."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    from tta.scenario.load import Load, Measured, Wire, drive

    with connect(endpoint=endpoint, timeout_s=timeout_s) as client:
        about = client.metadata()
    batches = _batches(images, about, batch)
    load = Load(rate, outstanding, duration_s, warmup_s, timeout_s, deadline_s, observe)
    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    with Progress(*columns, console=progress_console, disable=as_json, transient=True) as bar:
        task = bar.add_task("warming up", total=1.0)

        def tell(done: float, measured: Measured) -> None:
            speed = f"{measured.images / measured.seconds:8.0f} images/s" if measured.seconds else "warming up"
            bar.update(task, completed=done, description=speed)

        wire = Wire(endpoints_of(endpoint), batches, load, credentials())
        report = drive(wire, [len(b) for b in batches], load, tell).report()
    report = {"endpoint": endpoint, "model": about["name"], **_asked(load, batch), **report}
    if as_json:
        print_json(report)
    else:
        _print(report)
    if not report["answered"]:
        raise typer.Exit(1)


def _asked(load: Any, batch: int) -> dict[str, Any]:
    loop = {"rate": load.rate} if load.rate is not None else {"outstanding": load.outstanding}
    return {**loop, "batch": batch}


def _batches(path: Path | None, about: dict[str, Any], n: int) -> list[Any]:
    """Batches of n images of the model's size: pictures, over and over, or noise."""
    import numpy as np

    from tta.images import find_images, read_image

    shape = about["inputs"][0]["shape"][1:]
    if path is None:
        count = min(N_BATCHES, max(1, 4096 // n))
        return list(np.random.default_rng(0).integers(0, 256, (count, n, *shape), np.uint8))
    files = find_images(path)[: N_BATCHES * n]
    x = np.stack([read_image(file, shape, about["resize"]) for file in files])
    return [x[np.arange(i, i + n) % len(x)] for i in range(0, max(n, len(x)), n)]


def _print(report: dict[str, Any]) -> None:
    loop = f"{report['rate']:g} requests/s" if "rate" in report else f"{report['outstanding']} outstanding"
    images = "1 image" if report["batch"] == 1 else f"{report['batch']} images"
    console.print(f"{report['model']}, {loop}, {images} a request, {report['seconds']:.1f} s:")
    console.print(
        f"[bold]{report['images_per_s']:,.0f} images/s[/bold], {report['requests_per_s']:,.0f} requests/s"
    )
    versions = [(f"version {v}", found["answered"], found["latency_s"]) for v, found in report["versions"].items()]
    rows = [("all answers", report["answered"], report["latency_s"]), *(versions if len(versions) > 1 else [])]
    rows += [("  queued in the server", "", report["queue_s"]), ("  its batch computed", "", report["compute_s"])]
    print_table(
        ["milliseconds", "n", "p50", "p95", "p99", "max"],
        [[name, n, *(f"{1000 * v:.2f}" for v in values.values())] for name, n, values in rows],
    )
    refused = ", ".join(f"{n} {code}" for code, n in report["refused"].items()) or "none"
    if report["refused_s"]:
        refused += f" (half of them within {1e3 * report['refused_s']['p50']:.1f} ms)"
    answered_by = ", ".join(report["versions"]) or "none"
    console.print(f"refused: {refused}; without any answer: {report['unanswered']}; versions: {answered_by}")
    late, median = report["generator_late_s"].get("p50", 0.0), report["latency_s"].get("p50", 0.0)
    if median and late > LATE * median:
        console.print(
            f"[yellow]The load generator itself was {1000 * late:.2f} ms late in the median: "
            "it has too little CPU for this rate, and part of the latency is its own.[/yellow]"
        )
