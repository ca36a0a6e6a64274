"""Export a model as it is served: uint8 NHWC in, logits and whitened block features out, weights outside.

The graph keeps every weight as an initializer under its state_dict name, with a dummy external location, so that
a version's weights are handed to onnxruntime when its session is built. Batch normalisation stays a clean node
that onnxruntime folds itself; nothing that reads a named weight is folded here (the exporter's own optimiser
folds normalisation into `conv.weight` and keeps its name, which would make a swap by name silently wrong). Means
over space become GlobalAveragePool, which onnxruntime computes in the blocked layout of its convolutions.
"""

import contextlib
import io
import logging
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import torch
from onnxscript import optimizer
from torch import Tensor, nn

from tta.errors import BundleError
from tta.packaging.blocks import BlockPlan

EXTERNAL = "weights"  # dummy location: without `add_external_initializers` the graph does not load
MAX_BATCH = 4096

Array = npt.NDArray[Any]


class Taps(nn.Module):
    """A model whose forward also gives each block's statistics.

    Features of a block are its channels' mean and log-variance over space (over tokens for a ViT); of the head,
    the centred logits. Of a model in half precision too, inputs are normalised and statistics taken in float32.
    """

    def __init__(
        self, model: nn.Module, blocks: Sequence[BlockPlan], mean: Sequence[float], std: Sequence[float]
    ) -> None:
        super().__init__()
        self.model = model
        self.register_buffer("input_mean", torch.tensor(mean).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("input_std", torch.tensor(std).view(1, -1, 1, 1), persistent=False)
        self.input_mean: Tensor
        self.input_std: Tensor
        self._dtype = next(model.parameters()).dtype
        self._seen: dict[str, Tensor] = {}
        self._blocks = list(blocks)
        modules = dict(model.named_modules())
        for block in self._blocks:
            if block.tap:
                modules[block.tap].register_forward_hook(self._keep(block.name))

    def _keep(self, name: str) -> Any:
        def hook(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
            self._seen[name] = output

        return hook

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Logits (N, K) and, for each block, its raw statistics (N, 2C), of x (N, H, W, C) uint8."""
        scaled = x.permute(0, 3, 1, 2).to(torch.float32) / 255.0
        logits = self.model(((scaled - self.input_mean) / self.input_std).to(self._dtype)).float()
        # In float32: the square of a half above 256 is infinite.
        raw = [_moments(self._seen[b.name].float(), b.channels_last) for b in self._blocks if b.tap]
        return logits, [*raw, logits - logits.mean(dim=1, keepdim=True)]


def _moments(t: Tensor, channels_last: bool) -> Tensor:
    """Per-channel mean and log-variance over space or tokens: (N, 2C), or (N, C) where there is no space."""
    if t.ndim == 2:
        return t
    axes = (1,) if t.ndim == 3 else (1, 2) if channels_last else (2, 3)
    mean = t.mean(dim=axes)
    variance = (t * t).mean(dim=axes) - mean * mean
    return torch.cat([mean, torch.log(variance.clamp_min(0) + 1e-4)], dim=1)


class Served(nn.Module):
    """`Taps` with each block's statistics projected and whitened by constants."""

    def __init__(self, taps: Taps, projections: Sequence[tuple[Array, Array]]) -> None:
        super().__init__()
        self.taps = taps
        for i, (matrix, offset) in enumerate(projections):
            self.register_buffer(f"matrix{i}", torch.from_numpy(matrix.astype(np.float32)), persistent=False)
            self.register_buffer(f"offset{i}", torch.from_numpy(offset.astype(np.float32)), persistent=False)
        self._n = len(projections)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (N, K) and whitened features (N, D) of x (N, H, W, C) uint8."""
        logits, raw = self.taps(x)
        white = [raw[i] @ getattr(self, f"matrix{i}") + getattr(self, f"offset{i}") for i in range(self._n)]
        return logits, torch.cat(white, dim=1)


def export(served: Served, image_shape: tuple[int, int, int]) -> tuple[bytes, set[str]]:
    """Write the graph.

    Args:
        served: in eval mode, on the CPU.
        image_shape: (H, W, C).

    Returns:
        The ONNX file's bytes without weights, and the state_dict names the graph reads.

    Raises:
        BundleError: the exporter cannot handle the model, or changed a weight.
    """
    example = torch.zeros((2, *image_shape), dtype=torch.uint8)
    dynamic = ({0: torch.export.Dim("N", min=1, max=MAX_BATCH)},)
    with _quiet():
        try:
            program = torch.onnx.export(
                served,
                (example,),
                dynamo=True,
                optimize=False,
                dynamic_shapes=dynamic,
                input_names=["x"],
                output_names=["logits", "features"],
                verbose=False,
            )
        except Exception as error:  # the exporter wraps whatever went wrong in its own types
            raise BundleError(f"the model cannot be exported to ONNX: {error}") from error
    assert program is not None
    prefix = "taps.model."
    graph = program.model.graph
    weights = {prefix + n: t for n, t in served.taps.model.state_dict().items() if t.is_floating_point()}
    named = set(weights) & set(graph.initializers)
    _fold(program.model, named)
    proto = program.model_proto
    _pool(proto.graph)
    return _externalise(proto, prefix, {n: weights[n] for n in named & set(graph.initializers)})


@contextlib.contextmanager
def _quiet() -> Any:
    """Keep the exporter's advice to its own developers off the user's terminal."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            logger.setLevel(level)


def _fold(model: Any, named: set[str]) -> None:
    """Inline functions and fold constants, but never a node that reads a named weight."""
    from onnx_ir.passes.common import InlinePass, RemoveUnusedNodesPass

    InlinePass()(model)
    optimizer.fold_constants(
        model,
        should_fold=lambda node: False if any(i is not None and i.name in named for i in node.inputs) else None,
    )
    RemoveUnusedNodesPass()(model)


def _pool(graph: onnx.GraphProto) -> None:
    """Write means over height and width as GlobalAveragePool.

    ReduceMean has no blocked layout: each tap would cost a reordering of the whole activation
    (`bench/results/limits.md` has what taps cost).
    """
    constants = {t.name: onnx.numpy_helper.to_array(t) for t in graph.initializer}
    for node in graph.node:
        if node.op_type == "Constant" and node.attribute[0].name == "value_ints":
            constants[node.output[0]] = np.array(node.attribute[0].ints)
    rank = {v.name: len(v.type.tensor_type.shape.dim) for v in graph.value_info}
    nodes = []
    for node in graph.node:
        axes = constants.get(node.input[1]) if node.op_type == "ReduceMean" and len(node.input) > 1 else None
        if axes is None or rank.get(node.input[0]) != 4 or sorted(np.atleast_1d(axes) % 4) != [2, 3]:
            nodes.append(node)
            continue
        keeps = all(a.i for a in node.attribute if a.name == "keepdims")  # the operator's default is to keep them
        pooled = node.output[0] if keeps else f"{node.output[0]}_pooled"
        nodes.append(onnx.helper.make_node("GlobalAveragePool", [node.input[0]], [pooled]))
        if not keeps:
            nodes.append(onnx.helper.make_node("Flatten", [pooled], [node.output[0]], axis=1))
    del graph.node[:]
    graph.node.extend(nodes)


def _externalise(proto: onnx.ModelProto, prefix: str, weights: dict[str, Tensor]) -> tuple[bytes, set[str]]:
    for node in proto.graph.node:
        for i, name in enumerate(node.input):
            if name in weights:
                node.input[i] = name.removeprefix(prefix)
    kept = set()
    for tensor in proto.graph.initializer:
        if tensor.name not in weights:
            continue
        stored, value = onnx.numpy_helper.to_array(tensor), weights[tensor.name].numpy()
        if not np.array_equal(stored, value):
            raise BundleError(
                f"the exporter changed the weight {tensor.name.removeprefix(prefix)!r}: cannot swap it by name"
            )
        tensor.name = tensor.name.removeprefix(prefix)
        kept.add(tensor.name)
        tensor.ClearField("raw_data")
        tensor.ClearField("float_data")
        tensor.data_location = onnx.TensorProto.EXTERNAL
        del tensor.external_data[:]
        for key, text in (("location", EXTERNAL), ("offset", "0"), ("length", str(value.nbytes))):
            entry = tensor.external_data.add()
            entry.key, entry.value = key, text
    for value_info in list(proto.graph.value_info):
        if value_info.name in weights:
            proto.graph.value_info.remove(value_info)
    return proto.SerializeToString(), kept
