"""The models that are served: one that computes next to nothing, a ResNet-20, networks of timm at 224 pixels.

Each is a bundle for tta, and for the others the same tapped graph with the weights inside.
"""

from pathlib import Path

import numpy as np
import onnx
from onnx import numpy_helper
from torch import nn

from bench import cifar
from tta.bundle import Bundle, load_bundle
from tta.errors import BundleError

FOLDER = cifar.CACHE / "serving"
N_REFERENCE = 256
HALF = ("resnet50",)  # that have a graph of half precision too
SHAPES = {
    "identity": (32, 32, 3),
    **{f"identity@{side}": (side, side, 3) for side in (64, 128, 224)},
    "resnet20": (32, 32, 3),
    "resnet18": (224, 224, 3),
    "resnet50": (224, 224, 3),
    "mobilenetv3_small_100": (224, 224, 3),
}


class Identity(nn.Module):
    """As little as a classifier can compute: the mean colour, and one layer on it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(3, 8, 1))
        self.fc = nn.Linear(8, 10)

    def forward(self, x):
        """(N, 3, H, W) to (N, 10)."""
        return self.fc(self.stem(x).flatten(1))


def model_files(name: str) -> tuple[Path, Path]:
    """Bundle and self-contained graph of a model, made once."""
    path = FOLDER / f"{name}.tta"
    try:
        bundle = load_bundle(path)
    except BundleError:
        FOLDER.mkdir(parents=True, exist_ok=True)
        bundle = _package(name, path)
    graph = FOLDER / f"{name}.onnx"
    if not graph.exists():
        graph.write_bytes(with_weights(bundle))
    return path, graph


def _package(name: str, path: Path) -> Bundle:
    import timm

    from bench.resnet20 import resnet20
    from tta.packaging import Recipe, package

    # Speed does not depend on what is in the weights.
    own = {
        "identity": (Identity, "bench.serving.models:Identity"),
        "resnet20": (resnet20, "bench.resnet20:resnet20"),
    }
    kind = name.partition("@")[0]
    model, source = own.get(kind, (lambda: timm.create_model(kind, num_classes=10), f"timm:{kind}"))
    kwargs = {} if kind in own else {"num_classes": 10}
    rng = np.random.default_rng(0)
    x = rng.integers(0, 256, (N_REFERENCE, *SHAPES[name]), np.uint8)
    y = np.arange(N_REFERENCE) % 10
    recipe = Recipe(name, source, SHAPES[name], kwargs, fp16=name in HALF)
    return package(model().eval(), recipe, x, y, [str(i) for i in range(10)], path)


def with_weights(bundle: Bundle) -> bytes:
    """The bundle's graph with its weights where other servers expect them."""
    model = onnx.load_from_string(bundle.graph)
    for tensor in model.graph.initializer:
        if tensor.name in bundle.weights and tensor.data_location == onnx.TensorProto.EXTERNAL:
            tensor.CopyFrom(
                numpy_helper.from_array(np.ascontiguousarray(bundle.weights[tensor.name]), tensor.name)
            )
    return model.SerializeToString()
