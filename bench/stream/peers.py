"""What others do with the same stream: published methods of test-time adaptation, written here from their papers.

Each sees the stream in batches of 200 images, predicts a batch and adapts to it; those that use labels get the same
ones as tta, when they come. All of them but "source" normalise by the statistics of the batch at hand, as their papers
do: an answer then depends on its neighbours in the batch, and a request has to wait for 199 others. A batch knows of no
change and may hold images from before and after it; in runs marked "told" batches are cut at every change, as they are
in the papers.

    source   the model as it is
    bn       BN-1: statistics of the batch (Nado et al. 2020; Schneider et al., NeurIPS 2020)
    tent     entropy, norm weights only (Wang et al., ICLR 2021)
    eata     the same of reliable and new images, weighted, with a Fisher anchor (Niu et al., ICML 2022)
    eta      the same without the anchor: RDumb (Press et al., NeurIPS 2023), whose reset, every 1,000 steps, never comes
             in the 395 batches of this stream
    cotta    teacher with an average over augmentations, stochastic restoration (Wang et al., CVPR 2022)
    roid     weighted soft likelihood ratio, consistency, weight ensembling, prior correction (Marsden et al., WACV 2024)
    bitta    correct/wrong feedback and agreement of dropout samples by REINFORCE (Lee et al., ICML 2025)
    full     full fine-tuning on the labels of the corruption, from the weights of the one before
    replay   the same on all labels so far
"""

import copy
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.cifar import MEAN, STD, data_folder
from bench.resnet20 import resnet20
from bench.stream.data import LABELS, Segment
from tta.packaging.source import load_checkpoint

BATCH = 200
STILL = ("source", "bn")  # learn nothing
N_CLASSES = 10
Array = Any
Json = dict[str, Any]


def source_model() -> nn.Module:
    """The ResNet-20 of `TTA_DATA` with normalisation in front."""
    model = resnet20()
    load_checkpoint(model, data_folder() / "resnet20-cifar10.safetensors")
    return nn.Sequential(Normalise(), model).to(memory_format=torch.channels_last)


class Normalise(nn.Module):
    """Images in [0, 1] to what the network takes."""

    def forward(self, x: Tensor) -> Tensor:
        mean, std = (torch.tensor(v).view(1, -1, 1, 1) for v in (MEAN, STD))
        return (x - mean) / std


def by_batch(model: nn.Module) -> nn.Module:
    """Normalise by the batch from now on."""
    model.eval()
    for m in norms(model):
        m.train()
        m.track_running_stats = False
        m.running_mean = m.running_var = None
    return model


def norms(model: nn.Module) -> list[nn.BatchNorm2d]:
    """Its batch normalisations."""
    return [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]


def entropy(logits: Tensor) -> Tensor:
    """(N,) nats."""
    return -(logits.softmax(1) * logits.log_softmax(1)).sum(1)


class Peer:
    """A method: predicts a batch, then learns from it."""

    tuned = "norms"

    def __init__(self, reference: Tensor) -> None:
        self.model = by_batch(source_model())
        self.reference = reference
        self.start()

    def start(self) -> None:
        """What the method needs beside the model."""
        for p in self.model.parameters():
            p.requires_grad_(self.tuned == "all")
        if self.tuned == "norms":
            for m in norms(self.model):
                m.requires_grad_(True)
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = self.make_optimizer()

    def make_optimizer(self) -> torch.optim.Optimizer:
        """Adam at 1e-3, as most of the papers take for CIFAR."""
        return torch.optim.Adam(self.parameters, lr=1e-3)

    def slow_down(self, share: float) -> None:
        """Take this share of every step, as smaller batches want (Goyal et al. 2017)."""
        for group in self.optimizer.param_groups:
            group["lr"] *= share

    def step(self, loss: Tensor) -> None:
        """Learn."""
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()

    def predict(self, x: Tensor) -> Tensor:
        """(N, K) of a batch; and learn from it."""
        raise NotImplementedError

    def label(self, x: Tensor, y: Tensor, predicted: Tensor) -> None:
        """Take labels that have come for images of the last batch; most have no use for them."""


class Source(Peer):
    """The model as it is."""

    def __init__(self, reference: Tensor) -> None:
        self.model = source_model().eval()

    @torch.no_grad()
    def predict(self, x: Tensor) -> Tensor:
        return self.model(x)


class BatchNorm(Peer):
    """BN-1."""

    @torch.no_grad()
    def predict(self, x: Tensor) -> Tensor:
        return self.model(x)


class Tent(Peer):
    """Entropy minimisation."""

    def predict(self, x: Tensor) -> Tensor:
        logits = self.model(x)
        self.step(entropy(logits).mean())
        return logits.detach()


class Eata(Peer):
    """Reliable, non-redundant entropy minimisation; Fisher anchor."""

    margin, redundant, anchor = 0.4 * math.log(N_CLASSES), 0.4, 1.0

    def make_optimizer(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters, lr=0.005, momentum=0.9)

    def start(self) -> None:
        super().start()
        self.mean: Tensor | None = None
        self.origin = [p.detach().clone() for p in self.parameters]
        self.fisher = [torch.zeros_like(p) for p in self.parameters]
        if self.anchor:
            batches = self.reference.split(64)
            for x in batches:
                logits = self.model(x)
                self.optimizer.zero_grad()
                F.cross_entropy(logits, logits.detach().argmax(1)).backward()
                for f, p in zip(self.fisher, self.parameters, strict=True):
                    f += p.grad.square() / len(batches)
            self.optimizer.zero_grad()

    def predict(self, x: Tensor) -> Tensor:
        logits = self.model(x)
        h = entropy(logits)
        kept = h < self.margin
        p = logits.softmax(1).detach()
        if self.mean is not None:
            kept &= F.cosine_similarity(self.mean[None], p, dim=1).abs() < self.redundant
        if kept.any():
            own = p[kept].mean(0)
            self.mean = own if self.mean is None else 0.9 * self.mean + 0.1 * own
            weight = torch.exp(self.margin - h[kept].detach())
            loss = (weight * h[kept]).mean()
            if self.anchor:
                pairs = zip(self.fisher, self.parameters, self.origin, strict=True)
                loss = loss + self.anchor * sum((f * (p - o).square()).sum() for f, p, o in pairs)
            self.step(loss)
        return logits.detach()


class Eta(Eata):
    """EATA without its anchor."""

    anchor = 0.0


class Cotta(Peer):
    """Averaged teacher, stochastic restoration."""

    tuned = "all"
    decay, restored, sure, views = 0.999, 0.01, 0.92, 32

    def start(self) -> None:
        super().start()
        self.teacher = copy.deepcopy(self.model).requires_grad_(False)
        self.anchor = copy.deepcopy(self.teacher)
        self.origin = {n: p.detach().clone() for n, p in self.model.named_parameters()}

    def predict(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            confidence = self.anchor(x).softmax(1).amax(1).mean()
            target = self.teacher(x)
            if confidence < self.sure:
                target = torch.stack([self.teacher(jittered(x)) for _ in range(self.views)]).mean(0)
        logits = self.model(x)
        self.step(-(target.softmax(1) * logits.log_softmax(1)).sum(1).mean())
        with torch.no_grad():
            for t, p in zip(self.teacher.parameters(), self.model.parameters(), strict=True):
                t.mul_(self.decay).add_(p, alpha=1 - self.decay)
            for n, p in self.model.named_parameters():
                back = torch.rand_like(p) < self.restored
                p.copy_(torch.where(back, self.origin[n], p))
        return target


class Roid(Peer):
    """Weighted soft likelihood ratio, consistency, ensembling with the source, prior correction."""

    source_share, momentum, temperature, clip = 0.01, 0.9, 1 / 3, 0.99

    def slow_down(self, share: float) -> None:
        super().slow_down(share)
        self.source_share = 1 - (1 - self.source_share) ** share
        self.momentum **= share

    def start(self) -> None:
        super().start()
        self.origin = [p.detach().clone() for p in self.parameters]
        self.mean = torch.full((N_CLASSES,), 1 / N_CLASSES)

    def predict(self, x: Tensor) -> Tensor:
        logits = self.model(x)
        p = logits.softmax(1)
        with torch.no_grad():
            diverse = _scaled(1 - F.cosine_similarity(self.mean[None], p, dim=1))
            certain = _scaled(-entropy(logits))
            kept = diverse >= diverse.mean()
            weight = torch.exp(diverse * certain / self.temperature)
            weight[~kept] = 0
            self.mean = self.momentum * self.mean + (1 - self.momentum) * p.mean(0)
        q = p.clamp(max=self.clip)
        ratio = -(q * (torch.log(q + 1e-5) - torch.log1p(-q + 1e-5))).sum(1)
        loss = (ratio * weight)[kept].sum() / len(x)
        if kept.any():
            again = self.model(jittered(x[kept]))
            loss = loss + (_symmetric(again, logits[kept]) * weight[kept]).sum() / len(x)
        self.step(loss)
        with torch.no_grad():
            for p_now, o in zip(self.parameters, self.origin, strict=True):
                p_now.mul_(1 - self.source_share).add_(o, alpha=self.source_share)
            prior = p.mean(0)
            smooth = max(1 / len(x), 1 / N_CLASSES) / float(prior.max())
            corrected = p.detach() * (prior + smooth) / (1 + smooth * N_CLASSES)
        return torch.log(corrected + 1e-12)


class Bitta(Peer):
    """Correct/wrong feedback and agreement by REINFORCE."""

    tuned = "all"
    rate, samples, epochs, dropped = 0.3, 4, 3, 0.3

    def make_optimizer(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters, lr=1e-3, momentum=0.9)

    def start(self) -> None:
        super().start()
        self.feedback: tuple[Tensor, Tensor, Tensor] | None = None
        stages = [m for n, m in self.model.named_modules() if n in ("1.layer1", "1.layer2", "1.layer3")]
        self.dropping = False
        for stage in stages:
            stage.register_forward_hook(lambda _m, _i, out: F.dropout(out, self.dropped) if self.dropping else out)

    def _samples(self, x: Tensor) -> Tensor:
        self.dropping = True
        try:
            return torch.stack([self.model(x).softmax(1) for _ in range(self.samples)]).mean(0)
        finally:
            self.dropping = False

    def predict(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            logits = self.model(x)
        self._learn(x)
        return logits

    def label(self, x: Tensor, y: Tensor, predicted: Tensor) -> None:
        """Only whether the prediction was right is used."""
        self.feedback = (x, predicted, (predicted == y).float() * 2 - 1)

    def _learn(self, x: Tensor) -> None:
        for _ in range(self.epochs):
            with torch.no_grad():
                plain = self.model(x).argmax(1)
            p = self._samples(x)
            agreed = (p.argmax(1) == plain).float()
            loss = -(agreed * torch.log(p.gather(1, plain[:, None])[:, 0] + 1e-8)).mean()
            if self.feedback is not None:
                own, predicted, reward = self.feedback
                p_own = self._samples(own).gather(1, predicted[:, None])[:, 0]
                loss = loss - (reward * torch.log(p_own + 1e-8)).mean()
            self.step(loss)
        self.feedback = None


class Full(Peer):
    """Full fine-tuning on the labels of each corruption, once all of them are there."""

    tuned = "all"
    epochs, batch, replay = 20, 64, False

    def make_optimizer(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters, lr=3e-4)

    def start(self) -> None:
        super().start()
        self.seen: list[tuple[Tensor, Tensor]] = []
        self.x: list[Tensor] = []
        self.y: list[Tensor] = []

    @torch.no_grad()
    def predict(self, x: Tensor) -> Tensor:
        return self.model(x)

    def label(self, x: Tensor, y: Tensor, predicted: Tensor) -> None:
        """Wait for the rest, then fine-tune: with replay a batch of an earlier corruption beside each batch."""
        self.x.append(x)
        self.y.append(y)
        if sum(map(len, self.y)) < LABELS:
            return
        x, y = torch.cat(self.x), torch.cat(self.y)
        self.x, self.y = [], []
        self.optimizer = self.make_optimizer()
        for _ in range(self.epochs):
            for rows in torch.randperm(len(y)).split(self.batch):
                loss = F.cross_entropy(self.model(mirrored(x[rows])), y[rows])
                if self.replay and self.seen:
                    old_x, old_y = self.seen[int(torch.randint(len(self.seen), ()))]
                    old = torch.randperm(len(old_y))[: self.batch]
                    loss = loss + F.cross_entropy(self.model(mirrored(old_x[old])), old_y[old])
                self.step(loss)
        self.seen.append((x, y))


class Replay(Full):
    """Full fine-tuning on all labels so far."""

    replay = True


PEERS: dict[str, Callable[[Tensor], Peer]] = {
    "source": Source,
    "bn": BatchNorm,
    "tent": Tent,
    "eata": Eata,
    "eta": Eta,
    "cotta": Cotta,
    "roid": Roid,
    "bitta": Bitta,
    "full": Full,
    "replay": Replay,
}


def batches(segments: Iterable[Segment], size: int, told: bool) -> Iterator[list[tuple[int, Array, Array, Array]]]:
    """Parts of segments that make a batch: (number of the segment, images, classes, which get labels).

    Args:
        segments: of the stream.
        size: of a batch.
        told: cut batches at every change, into about equal parts.
    """
    batch: list[tuple[int, Array, Array, Array]] = []
    room = size
    for number, segment in enumerate(segments):
        n, begin = len(segment.x), 0
        cuts = [len(part) for part in np.array_split(np.arange(n), max(1, round(n / size)))] if told else []
        while begin < n:
            end = min(n, begin + (cuts.pop(0) if told else room))
            batch.append((number, segment.x[begin:end], segment.y[begin:end], segment.labelled[begin:end]))
            room, begin = room - (end - begin), end
            if told or not room:
                yield batch
                batch, room = [], size
    if batch:
        yield batch


def run(
    segments: Iterable[Segment],
    name: str,
    reference: Array,
    seed: int,
    tell: Callable[[str], None] = lambda text: None,
) -> Json:
    """Give a peer the stream; see `bench.stream.ours.run` for what is returned.

    Args:
        segments: of the stream.
        name: in `PEERS`; "NAME/16" has batches of 16 images, and learning rates as much lower; "NAME/told" has
            batches that are cut at every change.
        reference: images that the model knows, for EATA's anchor.
        seed: of everything random.
        tell: told of progress.
    """
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    method, _, how = name.partition("/")
    size = int(how) if how.isdigit() else BATCH
    peer, segments = PEERS[method](tensor(reference)), list(segments)
    if size < BATCH and method not in STILL:
        peer.slow_down(size / BATCH)
    errors = [0] * len(segments)
    for batch in batches(segments, size, how == "told"):
        numbers, x, y, labelled = (np.concatenate(column) for column in zip(*_spread(batch), strict=True))
        images, truth = tensor(x), torch.from_numpy(y)
        predicted = peer.predict(images).argmax(1)
        for number in numbers[(predicted != truth).numpy()]:
            errors[number] += 1
        rows = torch.from_numpy(np.flatnonzero(labelled))
        if len(rows):
            peer.label(images[rows], truth[rows], predicted[rows])
        if numbers[0] != numbers[-1]:
            done = segments[numbers[0]]
            share = 100 * errors[numbers[0]] / len(done.x)
            tell(f"{done.part} {done.visit} {done.corruption}: {share:.1f} %")
    found = [
        {"part": s.part, "visit": s.visit, "corruption": s.corruption, "images": len(s.x), "errors": wrong}
        for s, wrong in zip(segments, errors, strict=True)
    ]
    return {"segments": found}


def _spread(batch: list[tuple[int, Array, Array, Array]]) -> Iterator[tuple[Array, Array, Array, Array]]:
    for number, x, y, labelled in batch:
        yield np.full(len(y), number), x, y, labelled


def tensor(x: Any) -> Tensor:
    """(N, H, W, C) uint8 to (N, C, H, W) float32 in [0, 1]."""
    return torch.from_numpy(np.array(x)).permute(0, 3, 1, 2).float() / 255


def mirrored(x: Tensor) -> Tensor:
    """Half of the images mirrored, all shifted by up to two pixels."""
    x = torch.where(torch.rand(len(x), 1, 1, 1) < 0.5, x.flip(3), x)
    dy, dx = torch.randint(-2, 3, (2,)).tolist()
    return torch.roll(F.pad(x, (2, 2, 2, 2)), (dy, dx), (2, 3))[:, :, 2:-2, 2:-2]


def jittered(x: Tensor) -> Tensor:
    """Mirrored, and brightness, contrast, noise a little changed: milder than CoTTA's and ROID's augmentations."""
    x = mirrored(x)
    n = len(x)
    mean = x.mean((1, 2, 3), keepdim=True)
    contrast, light = (1 + 0.2 * (2 * torch.rand(n, 1, 1, 1) - 1) for _ in range(2))
    return (((x - mean) * contrast + mean) * light + 0.005 * torch.randn_like(x)).clamp(0, 1)


def _scaled(w: Tensor) -> Tensor:
    return (w - w.min()) / (w.max() - w.min()).clamp(min=1e-9)


def _symmetric(a: Tensor, b: Tensor) -> Tensor:
    """Symmetric cross-entropy, the second in the role of the target too."""
    left = -(b.softmax(1).detach() * a.log_softmax(1)).sum(1)
    right = -(a.softmax(1) * b.log_softmax(1).detach()).sum(1)
    return 0.5 * (left + right)
