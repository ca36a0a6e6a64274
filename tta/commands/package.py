"""`tta package`: make a bundle from a PyTorch model."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from tta.commands.output import Json, print_json, progress_console
from tta.errors import ConfigError

WELL_TOLD = 0.8  # share of replays that a diagnosis should be right on


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("package")(package)


def package(
    source: Annotated[str, typer.Argument(help="timm:NAME, or module:factory that returns an nn.Module.")],
    reference: Annotated[
        Path, typer.Option(help="Labelled images: a folder of class folders, or .npz with x and y.")
    ],
    out: Annotated[Path, typer.Option(help="Bundle to write: a directory, or NAME.tta.")],
    checkpoint: Annotated[
        Path | None,
        typer.Option(help="Weights: .safetensors, or .pth without code. Without it: random weights."),
    ] = None,
    kwargs: Annotated[
        str, typer.Option(help="Arguments of the factory, as JSON: '{\"num_classes\": 10}'.")
    ] = "{}",
    image_size: Annotated[
        str | None, typer.Option(help="HxW of the input; default: timm's, else required.")
    ] = None,
    channels: Annotated[int, typer.Option(min=1, max=4, help="Channels of the input.")] = 3,
    mean: Annotated[
        str | None, typer.Option(help="Per-channel mean of values in [0, 1], comma-separated.")
    ] = None,
    std: Annotated[str | None, typer.Option(help="Per-channel standard deviation, comma-separated.")] = None,
    resize: Annotated[str, typer.Option(help="How clients bring pictures to size: crop or stretch.")] = "crop",
    arl: Annotated[
        float, typer.Option("--arl", "--ert", min=100, help="Samples between two false alarms.")
    ] = 20_000.0,
    fp16: Annotated[
        bool, typer.Option("--fp16", help="Add a graph of half precision, for GPUs (`precision: fp16`).")
    ] = False,
    name: Annotated[str | None, typer.Option(help="Name of the model; default: the bundle's.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of everything random.")] = 0,
    as_json: Json = False,
) -> None:
    """Make a bundle: graph, weights, blocks, reference statistics, thresholds, anchor set."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from tta.images import read_labelled
    from tta.monitor.calibration import Calibration, reference_warning
    from tta.packaging import Recipe
    from tta.packaging import package as make
    from tta.packaging.source import build_model, load_checkpoint

    try:
        arguments = json.loads(kwargs)
    except ValueError as error:
        raise ConfigError(f"--kwargs {kwargs!r} is not JSON: {error}") from error
    if not isinstance(arguments, dict):
        raise ConfigError(f'--kwargs {kwargs!r}: write a JSON object, as in {{"num_classes": 10}}')
    model = build_model(source, arguments)
    if checkpoint is not None:
        load_checkpoint(model, checkpoint)
    shape, means, stds = _preprocessing(model, source, image_size, channels, mean, std)
    columns = (TextColumn("{task.description:>11}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=progress_console, disable=as_json) as bar:
        tasks: dict[str, Any] = {}

        def progress(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bar.add_task(stage, total=total)
            bar.update(tasks[stage], completed=done, total=total)

        x, y, classes = read_labelled(
            reference,
            shape,
            resize,
            lambda files: bar.track(files, description="images"),
        )
        recipe = Recipe(name or out.stem, source, shape, arguments, means, stds, resize, arl, seed, fp16)
        bundle = make(model, recipe, x, y, classes, out, progress)
    m = bundle.manifest
    realised = Calibration.load(bundle.reference).realised
    cut, right = (float(v) for v in bundle.reference["cut"])
    warnings = [w for w in (reference_warning(m.n_reference, m.arl),) if w]
    if right < WELL_TOLD:
        warnings.append(f"input and feature level are told apart in {100 * right:.0f} % of the replays only")
    if m.source.partition(":")[0] != "timm":
        warnings.append(f"the adapter imports {m.source!r}: it must be importable where tta serves (PYTHONPATH)")
    if m.reference_accuracy < 0.6:
        warnings.append(
            f"{100 * m.reference_accuracy:.1f} % on the reference: are --mean, --std, classes, checkpoint right?"
        )
    if checkpoint is None:
        warnings.append("no --checkpoint: the weights are random")
    if as_json:
        print_json(
            {
                "bundle": str(out),
                "sha256": bundle.sha256,
                "blocks": [{"name": b.name, "tensors": len(b.tensors), "tap": b.tap} for b in m.blocks],
                "reference_accuracy": m.reference_accuracy,
                "arl": m.arl,
                "realised_arl": realised,
                "diagnosis": {"cut": cut, "right": right},
                "parity": m.parity,
                "warnings": warnings,
            }
        )
        return
    print(
        f"{out}: {m.name}, {m.n_classes} classes, {len(m.blocks)} blocks ({', '.join(b.name for b in m.blocks)})"
    )
    print(f"  reference  {m.n_reference} images, accuracy {100 * m.reference_accuracy:.1f} %")
    print(f"  parity     max difference {m.parity['max_difference']:.2g} on {m.parity['n_images']:.0f} images")
    if fp16:
        agreement, worst = m.parity["fp16_agreement"], m.parity["fp16_max_difference"]
        print(f"  fp16       max difference {worst:.2g}, same class on {100 * agreement:.1f} % of the images")
    print(f"  thresholds one false alarm in {m.arl:g} samples (estimated {realised:.0f})")
    print(
        f"  diagnosis  input level above {100 * cut:.0f} % of the depth, right on {100 * right:.0f} % of replays"
    )
    for warning in warnings:
        print(f"  warning    {warning}")


def _preprocessing(
    model: Any, source: str, image_size: str | None, channels: int, mean: str | None, std: str | None
) -> tuple[tuple[int, int, int], list[float], list[float]]:
    """Input shape (H, W, C), mean and std: from the flags, else from timm."""
    config: dict[str, Any] = {}
    if source.startswith("timm:"):
        from tta.packaging.source import timm_preprocessing

        config = timm_preprocessing(model)
        channels = config["input_size"][0]
    elif image_size is None:
        raise ConfigError("--image-size HxW is required for a model that is not timm's")
    try:
        height, width = (int(v) for v in image_size.lower().split("x")) if image_size else config["input_size"][1:]
        means = [float(v) for v in mean.split(",")] if mean else list(config.get("mean", [0.0] * channels))
        stds = [float(v) for v in std.split(",")] if std else list(config.get("std", [1.0] * channels))
    except ValueError as error:
        raise ConfigError(
            f"--image-size (HxW), --mean or --std (comma-separated) cannot be read: {error}"
        ) from error
    if min(height, width) < 1:
        raise ConfigError(f"--image-size {image_size}: write HxW, as in 224x224")
    if not len(means) == len(stds) == channels or min(stds) <= 0:
        raise ConfigError(f"--mean and --std need {channels} numbers each, std above 0")
    return (height, width, channels), means, stds
