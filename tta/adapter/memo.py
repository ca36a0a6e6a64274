"""MEMO: adapt to each image by itself, without any label, before predicting it.

The loss of an image is the entropy of the mean prediction over augmented views of it: sure of one class, whatever
the view. Surgical fine-tuning tunes one block by it. Online, weights carry over from image to image; episodic,
each image begins where the first did.

Source: Zhang, Levine and Finn, MEMO, NeurIPS 2022; Lee et al., Surgical Fine-Tuning, ICLR 2023, section 4. Theirs
are AugMix views; ours are flips and crops, which keep the corruption.
"""

from collections.abc import Collection, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from tta.adapter.patient import Patient
from tta.adapter.views import augmentation
from tta.errors import AdaptationError

N_VIEWS = 32  # as the authors take for CIFAR


class Memo:
    """Predicts images one by one, in order.

    Args:
        patient: the network, with the weights to start from.
        tensors: names of the parameters that may change; nothing else does.
        learning_rate: of SGD, above 0.
        episodic: start every image from the first weights.
        augment: names, see `augmentation`.
        n_views: of each image.
        steps: before each prediction.
        seed: of the views.

    Raises:
        AdaptationError: no parameters among `tensors`, or a learning rate of 0.
    """

    def __init__(
        self,
        patient: Patient,
        tensors: Collection[str],
        learning_rate: float,
        episodic: bool,
        augment: Sequence[str] = ("flip", "crop"),
        n_views: int = N_VIEWS,
        steps: int = 1,
        seed: int = 0,
    ) -> None:
        self._patient = patient
        self._tuned = {n: p for n, p in patient.model.named_parameters() if n in set(tensors)}
        if not self._tuned:
            raise AdaptationError("no parameters to tune")
        if learning_rate <= 0:
            raise AdaptationError(f"learning rate {learning_rate:g} changes nothing: give one above 0")
        self._start = {n: p.detach().clone() for n, p in self._tuned.items()} if episodic else {}
        self._learning_rate = learning_rate
        self._augment = augment
        self._n_views = n_views
        self._steps = steps
        self._seed = seed
        self._n_seen = 0

    def predict(self, image: Tensor) -> Tensor:
        """(K,) logits of an image (C, H, W) in [0, 1], after adapting to it."""
        with torch.no_grad():
            for n, p in self._start.items():
                self._tuned[n].copy_(p)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self._seed + self._n_seen)
            self._n_seen += 1
            for _ in range(self._steps):
                self._step(image)
        return self._patient.logits(image[None])[0]

    def _step(self, image: Tensor) -> None:
        change = augmentation(self._augment, *image.shape[-2:])
        views = self._patient.normalise(change(image.expand(self._n_views, *image.shape)))
        loss = marginal_entropy(self._patient.model(views))
        gradients = torch.autograd.grad(loss, list(self._tuned.values()), allow_unused=True)
        with torch.no_grad():
            for p, g in zip(self._tuned.values(), gradients, strict=True):
                if g is not None:
                    p.sub_(self._learning_rate * g)


def marginal_entropy(logits: Tensor) -> Tensor:
    """Entropy in nats of the mean prediction over views (B, K)."""
    log_mean = torch.logsumexp(F.log_softmax(logits, dim=1), dim=0) - torch.log(torch.tensor(float(len(logits))))
    return -(log_mean.exp() * log_mean).sum()
