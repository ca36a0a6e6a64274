"""`tta replay`: what would the daemon have done with a recorded stream?"""

import shutil
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tta.commands.output import Json, print_json, print_table, progress_console
from tta.commands.serve import parse_overrides

MARK = ".tta-replay"  # in a folder that this command may empty
# Of a configuration that is in production: nobody is told what happens here, and there is no other client.
ALONE = {"daemon.webhook": None, "security.key": None, "security.clients": None}

if TYPE_CHECKING:
    from tta.scenario.replay import Replay


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("replay")(replay)


def replay(
    bundle: Annotated[Path, typer.Argument(help="Bundle to serve.")],
    streams: Annotated[
        list[Path],
        typer.Argument(help="Recordings in order: .npz with x and y, .csv with PICTURE,CLASS, or folders."),
    ],
    out: Annotated[Path, typer.Option(help="Folder for report, picture, log and state; emptied.")] = Path(
        "tta-replay"
    ),
    rate: Annotated[float, typer.Option(min=0.1, help="Images a second.")] = 100.0,
    label_share: Annotated[float, typer.Option(min=0, max=1, help="Of the images that get a label.")] = 0.1,
    label_delay_s: Annotated[float, typer.Option(min=0, help="Seconds until it comes.")] = 1.0,
    max_labels: Annotated[int, typer.Option(min=0, help="For each recording.")] = 1_000_000,
    hold: Annotated[
        bool, typer.Option("--hold", help="Stop the stream while a candidate is made and judged.")
    ] = False,
    config: Annotated[Path | None, typer.Option("--config", help="YAML file with settings.")] = None,
    settings: Annotated[list[str] | None, typer.Option("--set", help="Any setting: adapt.labels=96.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of who gets a label.")] = 0,
    as_json: Json = False,
) -> None:
    """Play recordings to a daemon of their own: when it alarms, what it tunes, what accuracy it reaches."""
    from rich.progress import Progress

    from tta.bundle import load_bundle
    from tta.config import load_config
    from tta.scenario import DaemonProcess, Phase, Scenario, draw_timeline
    from tta.scenario.replay import measure_replay, read_stream, write_report

    overrides = parse_overrides(settings or [])
    load_config(config, {**overrides, "bundle": bundle})  # a mistake is told before anything is read
    manifest = load_bundle(bundle).manifest
    with Progress(console=progress_console, disable=as_json, transient=True) as bar:
        phases = []
        for path in streams:
            x, y = read_stream(path, manifest, partial(bar.track, description=f"read {path.name}"))
            name = path.stem or str(path)
            phases.append(Phase(name, "none", x, y, label_share, max_labels, False, len(x), limit_s=float("inf")))
    _empty(out, [bundle, *streams, *([config] if config else [])])
    arguments = [*(["--config", str(config)] if config else []), *(f"--set={pair}" for pair in settings or [])]
    daemon = DaemonProcess(bundle, out, ALONE, arguments=arguments)
    daemon.start()
    try:
        with Progress(console=progress_console, disable=as_json, transient=True) as bar:
            task = bar.add_task("replay", total=sum(len(p.x) for p in phases))

            def view(scenario: Scenario) -> None:
                now = scenario.status
                said = f"{now['state']}, version {now['version']}"
                bar.update(task, completed=len(scenario.sent), description=f"replay: {said}")

            scenario = Scenario(daemon, phases, rate, label_delay_s, seed, view, hold)
            scenario.run()
    finally:
        daemon.stop()
    found = measure_replay(scenario, bundle)
    picture, report = out / "timeline.png", out / "report.html"
    title = f"{manifest.name}: {', '.join(p.name for p in phases)}"
    draw_timeline(scenario, picture, title)
    lines = _lines(found)
    write_report(found, report, picture, f"tta replay of {title}", lines)
    if as_json:
        print_json({**asdict(found), "report": str(report)})
        return
    _print(found, lines)
    print(f"report {report}   picture {picture}   log {daemon.log_path}")


def _empty(out: Path, inputs: list[Path]) -> None:
    """Make the folder anew, if it is one that this command has made and nothing that is needed lies in it."""
    from tta.errors import InputError

    if out.exists() and not (out.is_dir() and (not any(out.iterdir()) or (out / MARK).exists())):
        raise InputError(f"{out} is not empty and holds no earlier replay: name another --out")
    needed = [path for path in (Path.cwd(), *inputs) if path.resolve().is_relative_to(out.resolve())]
    if needed:
        raise InputError(f"{out} is emptied, and {needed[0]} lies in it: name another --out")
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    (out / MARK).write_text("made by tta replay, which may empty this folder\n")


def _lines(found: "Replay") -> list[str]:
    from tta.commands.status import describe

    return [describe(event) for event in found.events]


def _print(found: "Replay", lines: list[str]) -> None:
    from tta.scenario.replay import part_rows, percent, stretch_rows

    columns: list[Any] = ["recording", "images", "alarms", "source", "served", "labels"]
    print_table(columns, part_rows(found), "accuracy on images that were not given as labels")
    columns = ["from image", "images", "version", "block", "why", "source", "served"]
    print_table(columns, stretch_rows(found), "what served, on the same images")
    print(*lines, sep="\n")
    print(
        f"\n{found.images:,} images at {found.rate:g}/s: {found.alarms} alarms "
        f"({found.alarms_expected:g} expected if nothing had shifted), {found.adapted} candidates, "
        f"{found.promoted} promoted, {found.labels} labels; accuracy {percent(found.accuracy_source)} with the "
        f"source, {percent(found.accuracy_served)} as served"
    )
