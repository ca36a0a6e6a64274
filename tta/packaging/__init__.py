"""Make a bundle from a PyTorch model. The only folder besides `adapter/` that imports torch."""

import copy
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors.numpy import save
from torch import nn

import tta
from tta.bundle import FORMAT, FP16, Bundle, Manifest, load_bundle, write_bundle
from tta.errors import BundleError, InputError
from tta.monitor.charts import Layout
from tta.monitor.reference import MIN_REFERENCE
from tta.packaging.blocks import BlockPlan, partition
from tta.packaging.export import Served, Taps, export
from tta.packaging.reference import fit_whitening, raw_features, reference_arrays
from tta.preprocessing import RESIZES, recipe_hash
from tta.preprocessing import recipe as steps_of

N_PARITY = 256
PARITY_TOLERANCE = 1e-3  # of the largest logit
FP16_TOLERANCE = 5e-2
FP16_MOVED = 0.1  # standard deviations that half precision may move a feature on average: the charts watch them
FP16_AGREEMENT = 0.97  # share of images that half precision must not move to another class
N_ANCHOR = 256

Array = npt.NDArray[Any]
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Recipe:
    """What to package besides the weights.

    Attributes:
        source: "timm:NAME" or "module:factory"; the adapter builds the network from it.
        image_shape: (H, W, C) of the uint8 input.
        mean: per channel, of values in [0, 1].
        std: per channel.
        arl: samples between two false alarms.
        fp16: add a graph with weights of half precision, for GPUs.
    """

    name: str
    source: str
    image_shape: tuple[int, int, int]
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    mean: Sequence[float] = (0.0, 0.0, 0.0)
    std: Sequence[float] = (1.0, 1.0, 1.0)
    resize: str = "crop"
    arl: float = 20_000.0
    seed: int = 0
    fp16: bool = False


def package(
    model: nn.Module,
    recipe: Recipe,
    x: Array,
    y: Array,
    classes: Sequence[str],
    out: Path,
    progress: Progress = lambda stage, done, total: None,
) -> Bundle:
    """Make a bundle.

    Args:
        model: the source, with its weights loaded.
        recipe: see `Recipe`.
        x: (N, H, W, C) uint8 reference images, not those the model was trained on if it can be helped.
        y: (N,) their classes.
        classes: K names.
        out: directory or `.tta` file.
        progress: told (stage, done, total) as work goes on.

    Raises:
        InputError: reference images that do not fit or are too few.
        BundleError: the model cannot be partitioned or exported, or the exported graph differs from it.
    """
    _check_reference(recipe, x, y, classes)
    model = model.eval()
    order = np.random.default_rng(recipe.seed).permutation(len(x))
    x, y = x[order], y[order]

    # 1. Blocks, and what the reference looks like in them.
    blocks = partition(model, recipe.image_shape)
    half = copy.deepcopy(model).half() if recipe.fp16 else None  # before it is hooked
    taps = Taps(model, blocks, recipe.mean, recipe.std).eval()
    done = 0

    def advance(n: int) -> None:
        nonlocal done
        done += n
        progress("reference", done, len(x))

    logits, raw = raw_features(taps, x, advance)
    if logits.shape[1] != len(classes):
        raise InputError(
            f"the model has {logits.shape[1]} outputs, the reference {len(classes)} classes: "
            "see num_classes in --kwargs"
        )
    predictions = logits.argmax(axis=1)
    whitening = fit_whitening(raw, predictions, len(classes))

    # 2. The graph, and whether it computes what the model computes.
    progress("export", 0, 1)
    served = Served(taps, whitening.projections).eval()
    graph, tensors = export(served, recipe.image_shape)
    graph_fp16 = None
    if half is not None:
        half_taps = Taps(half, blocks, recipe.mean, recipe.std)
        graph_fp16, _ = export(Served(half_taps, whitening.projections).eval(), recipe.image_shape)
    progress("export", 1, 1)

    # 3. What is usual, and thresholds.
    progress("calibrate", 0, 1)
    layout = Layout(tuple(b.name for b in blocks), whitening.widths)
    arrays = reference_arrays(taps, whitening, layout, x, y, logits, raw, recipe.arl, recipe.seed)
    progress("calibrate", 1, 1)

    weights = {n: t.detach().numpy() for n, t in model.state_dict().items()}
    anchor = _anchor(x, y, len(classes))
    manifest: dict[str, Any] = {
        "name": recipe.name,
        "source": recipe.source,
        "kwargs": dict(recipe.kwargs),
        "image_shape": list(recipe.image_shape),
        "resize": recipe.resize,
        "mean": list(recipe.mean),
        "std": list(recipe.std),
        "preprocessing_sha256": recipe_hash(steps_of(recipe.image_shape, recipe.resize, recipe.mean, recipe.std)),
        "classes": list(classes),
        "blocks": _block_entries(blocks, tensors, whitening.widths),
        "reference_accuracy": float((predictions == y).mean()),
        "n_reference": len(x),
        "arl": recipe.arl,
        "tools": {"tta": tta.__version__, "torch": torch.__version__, "python": platform.python_version()},
    }
    manifest["parity"] = _parity(served, manifest, graph, graph_fp16, weights, x[:N_PARITY], progress)
    files = {
        "model.onnx": graph,
        **({FP16: graph_fp16} if graph_fp16 is not None else {}),
        "weights.safetensors": save({n: np.ascontiguousarray(w) for n, w in weights.items()}),
        "reference.safetensors": save({n: np.ascontiguousarray(a) for n, a in arrays.items()}),
        "anchor.safetensors": save(anchor),
    }
    write_bundle(out, manifest, files)
    return load_bundle(out)


def _check_reference(recipe: Recipe, x: Array, y: Array, classes: Sequence[str]) -> None:
    if recipe.resize not in RESIZES:
        raise InputError(f"resize {recipe.resize!r}: write {' or '.join(RESIZES)}")
    if x.dtype != np.uint8 or x.ndim != 4 or x.shape[1:] != recipe.image_shape:
        raise InputError(f"expected reference images (N, {recipe.image_shape}) uint8, got {x.dtype}{x.shape}")
    if len(x) < MIN_REFERENCE:
        raise InputError(
            f"{len(x)} reference images are too few to calibrate: "
            f"give at least {MIN_REFERENCE} (2,000 or more are better)"
        )
    if len(np.unique(y)) < 2:
        raise InputError("the reference holds one class only: nothing can be told apart")
    if y.max() >= len(classes):
        raise InputError(f"reference label {int(y.max())} is outside the {len(classes)} classes")
    if np.ptp(x) == 0:
        raise InputError(f"every reference pixel is {int(x.flat[0])}: these are blank images")


def _block_entries(blocks: Sequence[BlockPlan], tensors: set[str], widths: Sequence[int]) -> list[dict[str, Any]]:
    """Manifest entries; a tensor the graph does not read cannot be swapped and is in no block."""
    entries = []
    for block, width in zip(blocks, widths, strict=True):
        names = [t for t in block.tensors if t in tensors]
        if not names or width < 1:
            raise BundleError(f"{block.name} has no tensor in the graph or no feature that varies")
        entries.append({"name": block.name, "tensors": names, "tap": block.tap, "n_features": width})
    return entries


def _anchor(x: Array, y: Array, n_classes: int) -> dict[str, Array]:
    """A class-balanced sample of the reference."""
    each = max(1, N_ANCHOR // n_classes)
    chosen = np.concatenate([np.flatnonzero(y == k)[:each] for k in range(n_classes)])
    chosen = np.random.default_rng(0).permutation(chosen)[:N_ANCHOR]
    return {"x": np.ascontiguousarray(x[chosen]), "y": np.ascontiguousarray(y[chosen], np.int64)}


def _parity(
    served: Served,
    manifest: Mapping[str, Any],
    graph: bytes,
    graph_fp16: bytes | None,
    weights: Mapping[str, Array],
    x: Array,
    progress: Progress,
) -> dict[str, float]:
    """Compare torch with onnxruntime, batch of another size than the export's.

    Raises:
        BundleError: they differ by more than `PARITY_TOLERANCE` of the largest logit, or in a class; half
            precision by more than `FP16_TOLERANCE` or `FP16_MOVED`, or in more classes than `FP16_AGREEMENT`.
    """
    import msgspec

    from tta.server.predictor import Predictor

    full = {"format": FORMAT, **manifest, "parity": {}, "sha256": {}}
    unwritten = msgspec.convert(full, Manifest)
    bundle = Bundle(Path("."), unwritten, graph, weights, {}, {}, "", graph_fp16)
    with torch.inference_mode():
        expected = np.concatenate(
            [served(torch.from_numpy(x[i : i + 32]))[0].numpy() for i in range(0, len(x), 32)]
        )
    largest = float(np.abs(expected).max())
    found: dict[str, float] = {"largest_logit": largest, "n_images": float(len(x))}
    features: Array | None = None
    precisions = [("fp32", PARITY_TOLERANCE, 1.0)]
    if graph_fp16 is not None:
        precisions.append(("fp16", FP16_TOLERANCE, FP16_AGREEMENT))
    for precision, tolerance, agreement in precisions:
        predictor = Predictor(bundle, "cpu", torch.get_num_threads(), precision=precision)
        predictor.activate(predictor.prepare())
        parts = []
        for start in range(0, len(x), 32):
            parts.append(predictor.run(x[start : start + 32]))
            progress(f"{precision} parity", min(start + 32, len(x)), len(x))
        got, seen = (np.concatenate([getattr(p, k) for p in parts]) for k in ("logits", "features"))
        features = seen if features is None else features
        worst = float(np.abs(got - expected).max())
        moved = float(np.abs(seen - features).mean())  # in standard deviations: they are whitened
        agree = int((got.argmax(1) == expected.argmax(1)).sum())
        # Not <=: NaN is never in order.
        in_order = worst <= tolerance * max(largest, 1e-3) and moved <= FP16_MOVED
        if not in_order or agree < agreement * len(x):
            raise BundleError(
                f"{precision} parity failed: onnxruntime differs from torch by {worst:.3g} (largest logit "
                f"{largest:.3g}), classes agree on {agree} of {len(x)} images, features by {moved:.3g} deviations"
                + (": package without --fp16" if precision == "fp16" else "")
            )
        prefix = "" if precision == "fp32" else f"{precision}_"
        found |= {f"{prefix}max_difference": worst, f"{prefix}agreement": agree / len(x)}
    return found
