"""MEMO: one image at a time, no label."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from tta.adapter.memo import Memo, marginal_entropy
from tta.adapter.patient import Patient
from tta.adapter.surgery import delta_of
from tta.errors import AdaptationError
from tta.packaging.blocks import classifier_name, partition
from tta.packaging.digits import IMAGE_SHAPE, corrupt, digits


@pytest.fixture
def patient(digits_model: nn.Module) -> Patient:
    """The digits model on the table."""
    model = copy.deepcopy(digits_model)
    return Patient(model, classifier_name(model), (0.0,) * 3, (1.0,) * 3, "cpu")


@pytest.fixture
def first_block(digits_model: nn.Module) -> tuple[str, ...]:
    """Tensors of its first block."""
    return partition(digits_model, IMAGE_SHAPE)[0].tensors


def test_the_loss_is_the_entropy_of_the_mean() -> None:
    """Two sure views that disagree have an entropy of ln 2, two that agree of 0."""
    sure = torch.tensor([[50.0, 0.0, 0.0], [0.0, 50.0, 0.0]])

    assert float(marginal_entropy(sure)) == pytest.approx(np.log(2), abs=1e-4)
    assert float(marginal_entropy(sure[:1].repeat(2, 1))) == pytest.approx(0.0, abs=1e-4)


def test_a_step_lowers_the_loss_of_its_image(patient: Patient, first_block: tuple[str, ...]) -> None:
    """After adapting to a noisy image its prediction is surer, and only the block has moved."""
    x, _ = digits("stream", 8, seed=31)
    images = patient.images(corrupt(x, "noise", 1))
    before = patient.state()
    plain = torch.stack([marginal_entropy(patient.logits(i[None])) for i in images])
    memo = Memo(patient, first_block, 1e-2, episodic=True, augment=("crop",), n_views=16, steps=3)

    adapted = torch.stack([marginal_entropy(memo.predict(i)[None]) for i in images])

    assert float(adapted.mean()) < float(plain.mean())
    assert set(delta_of(patient.state(), before)) <= set(first_block)


def test_episodes_do_not_know_of_each_other(patient: Patient, first_block: tuple[str, ...]) -> None:
    """Episodic, an image's answer does not depend on the images before it; online it does."""
    x, _ = digits("stream", 2, seed=32)
    first, second = patient.images(corrupt(x, "noise", 2))
    start = patient.state()

    def answer(episodic: bool, images: list[torch.Tensor]) -> torch.Tensor:
        patient.load(start)
        # The seed of the n-th image moves with n: without augmentation the views are all alike.
        memo = Memo(patient, first_block, 1e-2, episodic, augment=(), n_views=4)
        return [memo.predict(i) for i in images][-1]

    assert torch.equal(answer(True, [second]), answer(True, [first, second]))
    assert not torch.equal(answer(False, [second]), answer(False, [first, second]))


def test_what_cannot_work_is_refused(patient: Patient, first_block: tuple[str, ...]) -> None:
    """No parameters to tune and a learning rate of zero each say so."""
    with pytest.raises(AdaptationError, match="no parameters"):
        Memo(patient, (), 1e-3, episodic=True)
    with pytest.raises(AdaptationError, match="learning rate 0"):
        Memo(patient, first_block, 0.0, episodic=True)
