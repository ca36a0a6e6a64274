"""`tta demo`: the whole loop on real handwritten digits, with a live view, no files needed."""

import shutil
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tta.commands.output import Json, console, print_json, print_table, progress_console
from tta.errors import ConfigError

if TYPE_CHECKING:
    from tta.scenario import Phase, Report, Scenario

RATE = 150.0  # images a second
LABEL_FRACTION = 0.25
MAX_LABELS = 200  # a shift
TRAIN_EPOCHS = 6
SWAPPED = ((1, 7), (3, 8))  # pairs of digits whose meaning is exchanged
SHOWN = ("alarm", "enough_labels", "accepted", "not_accepted", "swapped", "quiet", "harmless", "disagreed")
SETTINGS: dict[str, Any] = {
    "adapt.labels": 160,
    "adapt.retry_labels": 24,
    "adapt.augment": ["crop"],
    "adapt.epochs": 16,
    "adapt.window": 1000,
    "monitor.window": 256,
    "gate.probation_s": 2.0,
}


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("demo")(demo)


def demo(
    folder: Annotated[Path, typer.Option(help="Where model, state, log and picture go.")] = Path("tta-demo"),
    seed: Annotated[int, typer.Option(help="Of the streams.")] = 0,
    as_json: Json = False,
) -> None:
    """Train a small model, serve it, and drive it through noise, a change of meaning, and noise again."""
    from tta.scenario import DaemonProcess, Scenario, draw_timeline, measure

    began = time.monotonic()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--folder {folder} cannot be made: {error}") from error
    bundle = folder / "digits.tta"
    _prepare_model(bundle, quiet=as_json)
    phases = _phases(seed)
    shutil.rmtree(folder / "run", ignore_errors=True)
    daemon = DaemonProcess(bundle, folder / "run", SETTINGS)
    daemon.start()
    try:
        view = _View(quiet=as_json)
        scenario = Scenario(daemon, phases, RATE, label_delay_s=1.0, seed=seed, view=view.show)
        with view:
            scenario.run()
    finally:
        daemon.stop()
    report = measure(scenario, bundle)
    report.seconds = round(time.monotonic() - began, 1)
    picture = folder / "timeline.png"
    draw_timeline(scenario, picture, "tta demo: handwritten digits, one small ResNet, two cores")
    if as_json:
        print_json({**asdict(report), "picture": str(picture)})
    else:
        print_report(report)
        print(f"picture {picture}   log {daemon.log_path}   state {folder / 'run' / 'state'}")
    raise typer.Exit(1 if report.failures else 0)


def _prepare_model(bundle: Path, quiet: bool) -> None:
    """Train and package the model unless a bundle that verifies is there."""
    from rich.progress import Progress

    from tta.bundle import load_bundle
    from tta.errors import BundleError

    try:
        load_bundle(bundle)
        return
    except BundleError:
        bundle.unlink(missing_ok=True)
    from tta.packaging import Recipe, package
    from tta.packaging.digits import IMAGE_SHAPE, KWARGS, SOURCE, digits, train, write_pictures

    write_pictures(bundle.parent / "pictures", 20)
    with Progress(console=progress_console, disable=quiet) as bar:
        training = bar.add_task("train a small ResNet on digits", total=None)
        model = train(TRAIN_EPOCHS, 0, lambda step, steps: bar.update(training, completed=step, total=steps))
        packaging = bar.add_task("package it", total=4)
        x, y = digits("reference", 4000, seed=1)
        recipe = Recipe("digits", SOURCE, IMAGE_SHAPE, KWARGS)
        package(
            model,
            recipe,
            x,
            y,
            [str(i) for i in range(10)],
            bundle,
            lambda stage, done, total: bar.update(packaging, advance=float(done == total)),
        )


def _phases(seed: int) -> "list[Phase]":
    import numpy as np

    from tta.packaging.digits import corrupt, digits
    from tta.scenario import Phase

    def stream(n: int, number: int) -> Any:
        return digits("stream", n, seed=10_000 * (seed + 1) + number)

    def swap(y: Any) -> Any:
        meaning = np.arange(10)
        for a, b in SWAPPED:
            meaning[a], meaning[b] = b, a
        return meaning[y]

    x, y = zip(*(stream(n, i) for i, n in enumerate((1000, 4500, 2500, 4500, 2500, 2500))), strict=True)
    noise = [corrupt(x[i], "noise", seed + i) for i in (1, 4)]
    few = 0.05
    return [
        Phase("clean", "none", x[0], y[0], few, 40, cured=False, after=900),
        Phase("noise", "input", noise[0], y[1], LABEL_FRACTION, MAX_LABELS, cured=True, after=900),
        Phase("clean again", "none", x[2], y[2], few, 40, cured=True, after=600, limit_s=30),
        Phase("1↔7, 3↔8", "output", x[3], swap(y[3]), LABEL_FRACTION, MAX_LABELS, cured=True, after=900),
        Phase("noise again", "input", noise[1], y[4], 0.0, 0, cured=True, after=700, limit_s=30),
        Phase("home", "none", x[5], y[5], 0.0, 0, cured=True, after=500, limit_s=30),
    ]


def print_report(report: "Report") -> None:
    """The table at the end."""

    def percent(value: float | None) -> str:
        return "–" if value is None else f"{100 * value:.1f}"

    rows = [
        [
            p.name,
            "–" if p.alarm_after_samples is None else p.alarm_after_samples,
            percent(p.accuracy_source),
            percent(p.accuracy_before),
            percent(p.accuracy_after),
            p.version,
            p.block or ("–" if p.version == 0 else "norm"),
            p.labels,
            "–" if p.seconds_to_recover is None else f"{p.seconds_to_recover:.1f}",
            "library" if p.from_library and p.version else "home" if p.from_library else "",
        ]
        for p in report.phases
    ]
    columns = ["phase", "noticed", "source", "before", "after", "v", "block", "labels", "s", "from"]
    print_table(columns, rows, "accuracy in %, noticed after so many images, v: version, s: seconds to recover")
    print(
        f"{report.requests} requests, {report.lost} lost, {report.mixed_version_replies} of mixed version; "
        f"{report.alarms_clean} false alarms in clean phases ({report.alarms_clean_expected:.2f} expected), "
        f"{report.promotions_clean} promotions there; {report.labels_used} labels; {report.seconds:.0f} s"
    )
    for failure in report.failures:
        print(f"FAILED {failure}")


class _View:
    """The live view: status, phase, accuracy and events; plain lines where there is no terminal."""

    def __init__(self, quiet: bool) -> None:
        from rich.live import Live

        self._quiet = quiet
        self._live = (
            Live(console=console, refresh_per_second=4, transient=True)
            if console.is_terminal and not quiet
            else None
        )
        self._printed = 0

    def __enter__(self) -> "_View":
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live:
            self._live.stop()

    def show(self, scenario: "Scenario") -> None:
        """Show one look at the daemon."""
        from rich.text import Text

        from tta.commands.status import describe, status_lines

        if self._quiet:
            return
        for event in scenario.events[self._printed :]:
            if event["event"] in SHOWN:
                console.print(describe(event), markup=False, highlight=False, soft_wrap=True)
        self._printed = len(scenario.events)
        if self._live:
            accuracy = scenario.recent_accuracy()
            phase = scenario.phases[scenario.phase]
            head = f"phase {scenario.phase + 1} of {len(scenario.phases)}: {phase.name}"
            head += f"   {len(scenario.sent)} images" + (
                f"   accuracy {100 * accuracy:.0f} %" if accuracy is not None else ""
            )
            self._live.update(Text("\n".join([head, *status_lines(scenario.status, events=0)])))
