"""Relief: what can be done for a shift before a label comes."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

from tests.adapter.test_surgery import SETTINGS, anatomy_of
from tta.adapter.patient import Patient
from tta.adapter.relief import MIN_TUNED, relieve
from tta.adapter.starts import LABEL_FREE, starts_of
from tta.errors import AdaptationError
from tta.packaging.blocks import classifier_name
from tta.packaging.digits import corrupt, digits
from tta.packaging.source import build_model


def patient_of(model: nn.Module) -> Patient:
    """A copy of a model on the table."""
    own = copy.deepcopy(model)
    return Patient(own, classifier_name(own), (0.0,) * 3, (1.0,) * 3, "cpu")


def test_unlabelled_images_alone_cure_noise(digits_model: nn.Module) -> None:
    """From 1,000 noisy images without labels the first block is tuned; beyond it only normalisation changes."""
    patient = patient_of(digits_model)
    anatomy, source = anatomy_of(digits_model), patient.state()
    window = patient.images(corrupt(digits("stream", MIN_TUNED, seed=5)[0], "noise", 4))
    x, y = digits("stream", 600, seed=6)
    images, classes = patient.images(corrupt(x, "noise", 4)), torch.from_numpy(y)
    before = patient.accuracy(images, classes)
    starts = starts_of(patient, source, anatomy, window, {}, {}, lambda *_: None)

    found = relieve(patient, starts, anatomy, window, None, "block1", SETTINGS, lambda *_: None)

    patient.load(found.state)
    assert patient.accuracy(images, classes) > before + 0.1
    assert found.block == "block1"
    assert found.start in LABEL_FREE
    assert found.information["candidate"] > found.information["source"]
    statistics = {n for n in source if n.endswith(("running_mean", "running_var", "num_batches_tracked"))}
    changed = {n for n, t in found.state.items() if not torch.equal(t, source[n])} - statistics
    assert changed
    assert changed <= set(anatomy.tensors["block1"])


def test_few_images_re_estimate_normalisation_only(digits_model: nn.Module) -> None:
    """With fewer than 1,000 images no parameter is tuned, whatever block suits."""
    patient = patient_of(digits_model)
    anatomy, source = anatomy_of(digits_model), patient.state()
    window = patient.images(corrupt(digits("stream", MIN_TUNED - 1, seed=5)[0], "noise", 4))
    starts = starts_of(patient, source, anatomy, window, {}, {}, lambda *_: None)

    found = relieve(patient, starts, anatomy, window, None, "block1", SETTINGS, lambda *_: None)

    assert found.block == ""
    parameters = {n for n, _ in patient.model.named_parameters()}
    assert all(torch.equal(found.state[n], source[n]) for n in parameters)


def test_the_same_images_give_the_same_relief(digits_model: nn.Module) -> None:
    """Two runs with one seed give bit-identical weights."""
    states = []
    for _ in range(2):
        patient = patient_of(digits_model)
        anatomy, source = anatomy_of(digits_model), patient.state()
        window = patient.images(corrupt(digits("stream", MIN_TUNED, seed=5)[0], "noise", 4))
        starts = starts_of(patient, source, anatomy, window, {}, {}, lambda *_: None)
        short = replace(SETTINGS, augment=())
        states.append(relieve(patient, starts, anatomy, window, None, "block1", short, lambda *_: None).state)

    assert all(torch.equal(t, states[1][n]) for n, t in states[0].items())


def test_a_network_without_batch_norm_waits_for_labels() -> None:
    """A ViT has nothing to re-estimate, and the error says that labels are needed."""
    model = build_model(
        "timm:vit_tiny_patch16_224", {"img_size": 32, "patch_size": 8, "num_classes": 10, "depth": 4}
    )
    patient = Patient(model, classifier_name(model), (0.5,) * 3, (0.5,) * 3, "cpu")
    window = torch.rand(64, 3, 32, 32)
    anatomy = anatomy_of(model)
    starts = starts_of(patient, patient.state(), anatomy, window, {}, {}, lambda *_: None)

    with pytest.raises(AdaptationError, match="labels are needed"):
        relieve(patient, starts, anatomy, window, None, "block1", SETTINGS, lambda *_: None)
