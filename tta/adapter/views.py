"""Augmented views of labelled and unlabelled images, as the part of the network that is tuned takes them.

Where the part begins late, what stands before it is frozen: it runs once over a fixed set of views, and training
runs only the rest (`StoredViews`). Otherwise each view is made when it is needed (`Views`).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import kornia.augmentation as ka
import torch
from torch import Tensor, fx, nn

from tta.adapter.patient import EVAL_BATCH, Patient
from tta.errors import AdaptationError

LABELLED_VIEWS = 4  # stored of each labelled image
UNLABELLED_VIEWS = 2


@dataclass(frozen=True)
class Cut:
    """A place in a network: the output of a module, or its input.

    Attributes:
        module: its name.
        before: the cut is at its input.
    """

    module: str
    before: bool = False


@dataclass(frozen=True)
class Labels:
    """What is known of some images.

    Attributes:
        images: (N, C, H, W) float32 in [0, 1].
        y: (N,) int64: the class; where `wrong`, a class that it is not.
        wrong: (N,) bool.
        named: (N,) bool: whether somebody has named the class. Otherwise an answer was called right or wrong: it
            teaches, but compares nothing, for who gave the answer looks better on those called right than it is.
    """

    images: Tensor
    y: Tensor
    wrong: Tensor
    named: Tensor

    @classmethod
    def known(cls, images: Tensor, y: Tensor) -> "Labels":
        """Every class was named."""
        wrong = torch.zeros(len(y), dtype=torch.bool, device=y.device)
        return cls(images, y, wrong, ~wrong)

    def __len__(self) -> int:
        return len(self.y)

    def rows(self, index: Tensor | slice) -> "Labels":
        """Some of them."""
        return Labels(self.images[index], self.y[index], self.wrong[index], self.named[index])


def augmentation(names: Sequence[str], height: int, width: int) -> nn.Sequential:
    """Changes of an image that keep its class.

    Raises:
        AdaptationError: an unknown name.
    """
    layers: list[nn.Module] = []
    for name in names:
        if name == "flip":
            layers.append(ka.RandomHorizontalFlip(p=0.5))
        elif name == "crop":
            pad = max(1, height // 8)
            layers.append(ka.RandomCrop((height, width), padding=pad, padding_mode="reflect"))
        else:
            raise AdaptationError(f"augmentation {name!r} is not known: write flip or crop")
    return nn.Sequential(*layers)


class Views:
    """Views made afresh whenever they are asked for; `part` is the whole model.

    Args:
        patient: the network.
        labels: of some images.
        window: (M, C, H, W) unlabelled images in [0, 1], or None.
        augment: names, see `augmentation`.
    """

    def __init__(self, patient: Patient, labels: Labels, window: Tensor | None, augment: Sequence[str]) -> None:
        self.part: nn.Module = patient.model
        self.labels = labels
        self._patient = patient
        self._window = window
        self._augment: nn.Sequential = augmentation(augment, *labels.images.shape[-2:])
        self._unused = torch.empty(0, dtype=torch.int64)

    @property
    def n_window(self) -> int:
        """How many unlabelled images there are."""
        return 0 if self._window is None else len(self._window)

    def labelled(self, index: Tensor) -> Tensor:
        """(n, ...) what `part` takes, of one view of each of these labelled images."""
        return self._view(self.labels.images[index])

    def unlabelled(self, n: int) -> Tensor:
        """(n or all, ...) the same of the next unlabelled images; each comes once before any comes again."""
        assert self._window is not None
        return self._view(self._window[self._next(n, len(self._window))])

    def _view(self, images: Tensor) -> Tensor:
        return self._patient.normalise(self._augment(images)).contiguous(memory_format=torch.channels_last)

    def _next(self, n: int, of: int) -> Tensor:
        if len(self._unused) < n:
            self._unused = torch.randperm(of)
        index, self._unused = self._unused[:n], self._unused[n:]
        return index.to(self._patient.device)


class StoredViews(Views):
    """A fixed set of views of each image, taken once through the frozen first part of the network.

    Args:
        part: what is left of the network from `cut` on.
        cut: where the frozen part ends.
    """

    def __init__(
        self,
        patient: Patient,
        labels: Labels,
        window: Tensor | None,
        augment: Sequence[str],
        part: nn.Module,
        cut: Cut,
    ) -> None:
        super().__init__(patient, labels, window, augment)
        self.part = part
        self._cut = cut
        self._labelled = self._store(labels.images, LABELLED_VIEWS)
        self._unlabelled: Tensor | None = None  # stored when first asked for

    def labelled(self, index: Tensor) -> Tensor:
        """See `Views.labelled`."""
        return self._labelled[torch.randint(len(self._labelled), (len(index),), device=index.device), index]

    def unlabelled(self, n: int) -> Tensor:
        """See `Views.unlabelled`."""
        assert self._window is not None
        if self._unlabelled is None:
            self._unlabelled = self._store(self._window, UNLABELLED_VIEWS)
        index = self._next(n, self._unlabelled.shape[1])
        return self._unlabelled[torch.randint(len(self._unlabelled), (len(index),), device=index.device), index]

    def _store(self, images: Tensor, n_views: int) -> Tensor:
        """(views, N, ...) at the cut; the first view is the image itself."""
        more = n_views - 1 if len(self._augment) else 0
        plain = self._through(self._patient.normalise(images))
        return torch.stack([plain, *(self._through(self._view(images)) for _ in range(more))])

    @torch.no_grad()
    def _through(self, images: Tensor) -> Tensor:
        seen: list[Tensor] = []
        module = self._patient.model.get_submodule(self._cut.module)
        if self._cut.before:
            handle = module.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0]))
        else:
            handle = module.register_forward_hook(lambda _module, _inputs, output: seen.append(output))
        try:
            for batch in torch.split(images, EVAL_BATCH):
                self._patient.model(batch)
        finally:
            handle.remove()
        return torch.cat(seen)


def views_for(
    patient: Patient,
    labels: Labels,
    window: Tensor | None,
    augment: Sequence[str],
    cut: Cut | None,
    memory_bytes: int,
    seed: int,
) -> Views:
    """Stored views from `cut` on if the network can be cut there and they fit into memory; else fresh ones.

    Args:
        patient: the network, with the weights to start from.
        labels: of some images.
        window: unlabelled images, or None.
        augment: names, see `augmentation`.
        cut: where the part that is tuned begins; None for the whole network.
        memory_bytes: that stored views may take.
        seed: of the stored views.
    """
    part = rest_of(patient.model, cut) if cut is not None else None
    if part is None or cut is None:
        return Views(patient, labels, window, augment)
    one = StoredViews(patient, labels.rows(slice(0, 1)), None, (), part, cut).labelled(torch.zeros(1).long())
    n = len(labels) * LABELLED_VIEWS + (0 if window is None else len(window) * UNLABELLED_VIEWS)
    if n * one.numel() * one.element_size() > memory_bytes:
        return Views(patient, labels, window, augment)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return StoredViews(patient, labels, window, augment, part, cut)


def rest_of(model: nn.Module, cut: Cut) -> fx.GraphModule | None:
    """The network from a cut on, with the same parameters.

    Returns:
        None if the network cannot be traced, or if what comes after needs more than what is at the cut.
    """

    class Tracer(fx.Tracer):
        def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
            return module_qualified_name == cut.module or super().is_leaf_module(m, module_qualified_name)

    try:
        graph = Tracer().trace(model)
    except Exception:  # the model's own code, which may do what cannot be traced
        return None
    calls = [n for n in graph.nodes if n.op == "call_module" and n.target == cut.module]
    if len(calls) != 1 or not isinstance(calls[0].args[0], fx.Node):
        return None
    inputs = [n for n in graph.nodes if n.op == "placeholder"]
    with graph.inserting_before(inputs[0]):
        entry = graph.placeholder("entry")
    (calls[0].args[0] if cut.before else calls[0]).replace_all_uses_with(entry)
    for node in reversed(list(graph.nodes)):
        if not node.users and node.op not in ("output", "placeholder"):
            graph.erase_node(node)
    if any(n.users for n in inputs):
        return None
    for n in inputs:
        graph.erase_node(n)
    return fx.GraphModule(model, graph).eval()
