"""Partition a model into named blocks, the units of surgery.

The stages of a network are its containers of composite modules, found by structure: `layer1..4` of a ResNet,
the stages of a ConvNeXt, quarters of a ViT's or a MobileNet's blocks. What stands before the first stage
(stem, patch embedding) joins it, as in the paper's "first block"; what stands between or after joins the stage
before; the classifier alone is the head.
"""

import itertools
from dataclasses import dataclass

import torch
from torch import nn

from tta.errors import BundleError

MAX_STAGES = 4


@dataclass(frozen=True)
class BlockPlan:
    """A block of a torch model.

    Attributes:
        name: "block1".. or "head".
        tensors: state_dict names of floating-point parameters and buffers.
        tap: name of the module whose output stands for the block; "" for the head.
        channels_last: the tap gives (N, H, W, C) rather than (N, C, H, W).
    """

    name: str
    tensors: tuple[str, ...]
    tap: str
    channels_last: bool = False


def partition(model: nn.Module, image_shape: tuple[int, int, int]) -> list[BlockPlan]:
    """Name the blocks of a model; every floating-point tensor is in exactly one.

    Args:
        model: in eval mode; run once on a blank image to see in which order modules complete.
        image_shape: (H, W, C).

    Raises:
        BundleError: no classifier, or fewer than two blocks can be told apart.
    """
    head = classifier_name(model)
    starts = _grouped(_stage_names(model, head))
    groups: list[list[str]] = [[] for _ in starts]
    head_tensors = []
    current = 0
    for name, tensor in model.state_dict().items():
        if not tensor.is_floating_point():
            continue  # num_batches_tracked
        if _inside(name, head):
            head_tensors.append(name)
            continue
        found = [i for i, members in enumerate(starts) if any(_inside(name, m) for m in members)]
        current = found[0] if found else current
        groups[current].append(name)
    groups = [g for g in groups if g]
    if not head_tensors or not groups:
        raise BundleError("the model has no separate classifier and body: nothing to operate on")
    taps = _taps(model, groups, image_shape)
    channels_last = getattr(model, "output_fmt", "NCHW") == "NHWC"
    plans = [
        BlockPlan(f"block{i + 1}", tuple(g), tap, channels_last)
        for i, (g, tap) in enumerate(zip(groups, taps, strict=True))
    ]
    return [*plans, BlockPlan("head", tuple(head_tensors), "")]


def classifier_name(model: nn.Module) -> str:
    """Module name of the final classifier.

    Raises:
        BundleError: there is no linear layer.
    """
    names: dict[int, str] = {id(m): n for n, m in model.named_modules()}
    if hasattr(model, "get_classifier"):
        classifier = getattr(model, "get_classifier")()  # noqa: B009  (not every module has it)
        if isinstance(classifier, nn.Module) and id(classifier) in names and list(classifier.parameters()):
            return names[id(classifier)]
    linear: list[str] = [n for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    if not linear:
        raise BundleError("the model has no linear classifier")
    return linear[-1]


def _stage_names(model: nn.Module, head: str) -> list[str]:
    """Names of the modules at which a new stage begins."""
    prefix, units = "", _parametrised(model, "")
    while True:
        units = [u for u in units if u[0] != head]
        if len(units) != 1 or not _parametrised(units[0][1], ""):
            break
        prefix = units[0][0]
        units = _parametrised(units[0][1], prefix)
    containers = [(n, m) for n, m in units if _is_container(m)]
    if len(containers) >= 2:
        return [n for n, _ in containers]
    if len(containers) == 1:
        name, module = containers[0]
        children = _parametrised(module, name)
        composite = [(n, m) for n, m in children if _parametrised(m, "")]
        return [n for n, _ in (composite or children)]
    return [n for n, _ in units]


def _parametrised(module: nn.Module, prefix: str) -> list[tuple[str, nn.Module]]:
    dot = f"{prefix}." if prefix else ""
    return [(dot + n, m) for n, m in module.named_children() if any(True for _ in m.parameters())]


def _is_container(module: nn.Module) -> bool:
    """A list of blocks, as opposed to a conv-norm pair or a block itself."""
    if not isinstance(module, nn.Sequential | nn.ModuleList):
        return False
    return any(_parametrised(m, "") for _, m in _parametrised(module, ""))


def _grouped(starts: list[str]) -> list[list[str]]:
    """At most `MAX_STAGES` contiguous groups of about equal length."""
    n = min(MAX_STAGES, len(starts))
    bounds = [round(i * len(starts) / n) for i in range(n + 1)] if n else []
    return [starts[a:b] for a, b in itertools.pairwise(bounds)]


def _inside(name: str, module: str) -> bool:
    return name == module or name.startswith(module + ".")


def _taps(model: nn.Module, groups: list[list[str]], image_shape: tuple[int, int, int]) -> list[str]:
    """For each block, the module that completes last and still has spatial extent."""
    owner = {name: i for i, group in enumerate(groups) for name in group}
    best: list[tuple[int, str]] = [(-1, "")] * len(groups)
    clock = 0

    def visit(name: str, owned: set[int], output: object) -> None:
        nonlocal clock
        clock += 1
        if not isinstance(output, torch.Tensor) or output.ndim < 2 or len(owned) != 1:
            return
        spatial = output.ndim == 3 or (output.ndim == 4 and output.shape[2] * output.shape[3] > 1)
        (block,) = owned
        # A tap without spatial extent has no variance: any spatial one is better.
        if (best[block][0] >= 1_000_000) <= spatial:
            best[block] = (clock + 1_000_000 * spatial, name)

    handles = []
    for name, module in model.named_modules():
        owned = {owner[t] for t in owner if _inside(t, name)} if name else set()
        if owned:
            handles.append(
                module.register_forward_hook(lambda _m, _i, out, name=name, owned=owned: visit(name, owned, out))
            )
    height, width, channels = image_shape
    try:
        with torch.inference_mode():
            model(torch.zeros(1, channels, height, width))
    except Exception as error:  # the model's own code, which says what it cannot take
        raise BundleError(f"the model does not run on {height}x{width}x{channels} images: {error}") from error
    finally:
        for handle in handles:
            handle.remove()
    if any(not name for _, name in best):
        missing = [f"block{i + 1}" for i, (_, name) in enumerate(best) if not name]
        raise BundleError(f"no module's output stands for {', '.join(missing)}: use a model built of modules")
    return [name for _, name in best]
