"""Surgery: one block changes and nothing else; the criteria are what the paper says."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tta.adapter.criteria import relative_gradient_norm, signal_to_noise
from tta.adapter.race import Settings, race, stratified_folds
from tta.adapter.surgery import Patient, Plan, adapt, augmentation, delta_of
from tta.errors import AdaptationError
from tta.packaging.blocks import classifier_name, partition
from tta.packaging.digits import IMAGE_SHAPE, corrupt, digits
from tta.packaging.source import build_model

SETTINGS = Settings("race", 2, 2, 8, 32, (1e-3, 3e-3), (1e-2, 1e-1), ("crop",), 120.0, 0)


@pytest.fixture
def patient(digits_model: nn.Module, device: str) -> Patient:
    """The digits model on the table."""
    model = copy.deepcopy(digits_model)
    return Patient(model, classifier_name(model), (0.0,) * 3, (1.0,) * 3, device)


@pytest.fixture
def blocks(digits_model: nn.Module) -> dict[str, tuple[str, ...]]:
    """Its blocks."""
    return {b.name: b.tensors for b in partition(digits_model, IMAGE_SHAPE)}


def plan(blocks: dict, block: str, lr: float = 3e-3, epochs: int = 2) -> Plan:
    """A short operation."""
    return Plan(block, blocks[block], lr, epochs, 16, ("crop",), 0)


@pytest.mark.parametrize("block", ["block1", "block3", "head"])
def test_only_the_block_changes(patient: Patient, blocks: dict, block: str) -> None:
    """After surgery on a block every other tensor is bit-identical and the block's parameters are not."""
    x, y = digits("stream", 48, seed=1)
    before = patient.state()

    adapt(patient, patient.images(x), torch.from_numpy(y).to(patient.device), plan(blocks, block))

    delta = delta_of(patient.state(), before)
    assert delta
    assert set(delta) <= set(blocks[block])
    assert all(p.requires_grad for p in patient.model.parameters())


def test_surgery_is_deterministic(digits_model: nn.Module, blocks: dict) -> None:
    """The same request gives bit-identical weights on the CPU."""
    x, y = digits("stream", 48, seed=2)
    results = []
    for _ in range(2):
        model = copy.deepcopy(digits_model)
        p = Patient(model, classifier_name(model), (0.0,) * 3, (1.0,) * 3, "cpu")
        adapt(p, p.images(x), torch.from_numpy(y), plan(blocks, "block1"))
        results.append(p.state())

    assert all(torch.equal(results[0][n], results[1][n]) for n in results[0])


def test_normalisation_is_that_of_the_window(patient: Patient) -> None:
    """Re-estimated statistics of the first norm equal the mean and variance of its input over the window."""
    x, _ = digits("stream", 200, seed=3)
    images = patient.images(corrupt(x, "noise", 0))
    norm_name, norm = next((n, m) for n, m in patient.model.named_modules() if isinstance(m, nn.BatchNorm2d))
    seen = []
    handle = norm.register_forward_pre_hook(lambda m, i: seen.append(i[0].detach()))

    patient.estimate_normalisation(images)

    handle.remove()
    values = torch.cat(seen).transpose(0, 1).flatten(1)
    assert torch.allclose(norm.running_mean, values.mean(1), atol=1e-4), norm_name
    assert torch.allclose(norm.running_var, values.var(1), rtol=1e-3, atol=1e-4)
    assert not norm.training


def test_rgn_is_the_ratio_of_norms(patient: Patient, blocks: dict) -> None:
    """RGN of a block is the norm of its gradient over the norm of its weights, by plain torch."""
    x, y = digits("stream", 40, seed=4)
    images, labels = patient.normalise(patient.images(x)), torch.from_numpy(y).to(patient.device)

    scores = relative_gradient_norm(patient.model, images, labels, blocks, batch_size=40)

    model = copy.deepcopy(patient.model)
    F.cross_entropy(model(images), labels).backward()
    for name, members in blocks.items():
        parameters = [p for n, p in model.named_parameters() if n in members]
        gradient = torch.cat([p.grad.flatten() for p in parameters]).norm()
        weights = torch.cat([p.detach().flatten() for p in parameters]).norm()
        assert scores[name] == pytest.approx(float(gradient / weights), rel=1e-3)


def test_snr_is_over_examples(patient: Patient, blocks: dict) -> None:
    """SNR of the head is the mean of squared mean over variance of single examples' gradients."""
    x, y = digits("stream", 12, seed=5)
    images, labels = patient.normalise(patient.images(x)), torch.from_numpy(y).to(patient.device)

    score = signal_to_noise(patient.model, images, labels, {"head": blocks["head"]})["head"]

    model, singles = copy.deepcopy(patient.model), []
    for i in range(12):
        model.zero_grad()
        F.cross_entropy(model(images[i : i + 1]), labels[i : i + 1]).backward()
        singles.append(torch.cat([p.grad.flatten() for n, p in model.named_parameters() if n in blocks["head"]]))
    g = torch.stack(singles).double()
    assert score == pytest.approx(float((g.mean(0) ** 2 / (g.var(0) + 1e-12)).mean()), rel=1e-2)


def test_the_race_cures_noise_and_a_change_of_meaning(patient: Patient, blocks: dict) -> None:
    """With 128 labels the race lifts noise by at least 20 points, and swapped classes through the head by 20."""
    x, y = digits("stream", 900, seed=6)
    noisy = corrupt(x, "noise", 1)
    source = patient.state()
    patient.estimate_normalisation(patient.images(noisy[300:]))
    starts = {"source": source, "batch-norm": patient.state()}
    meaning = np.array([0, 7, 2, 8, 4, 5, 6, 1, 3, 9])

    def accuracy(images: np.ndarray, labels: np.ndarray) -> float:
        return patient.accuracy(patient.images(images), torch.from_numpy(labels).to(patient.device))

    patient.load(source)
    before = accuracy(noisy[400:], y[400:]), accuracy(x[400:], meaning[y[400:]])
    fit = torch.from_numpy(y[:128]).to(patient.device)
    cured = race(patient, starts, blocks, patient.images(noisy[:128]), fit, "block1", SETTINGS, lambda *_: None)
    patient.load(cured.state)
    after_noise = accuracy(noisy[400:], y[400:])
    swapped = torch.from_numpy(meaning[y[:128]]).to(patient.device)
    relabelled = race(
        patient,
        {"source": source},
        blocks,
        patient.images(x[:128]),
        swapped,
        "head",
        SETTINGS,
        lambda *_: None,
    )
    patient.load(relabelled.state)
    after_swap = accuracy(x[400:], meaning[y[400:]])

    assert cured.start == "batch-norm"
    assert after_noise >= before[0] + 0.20
    assert relabelled.block == "head"
    assert after_swap >= before[1] + 0.20


def test_folds_are_stratified_and_cover_everything() -> None:
    """Every label is held out once, and each fold has about the classes of the whole."""
    y = np.repeat([0, 1, 2], [30, 12, 6])

    folds = stratified_folds(y, 3, seed=0)

    assert sorted(np.concatenate(folds)) == list(range(48))
    assert all(list(np.bincount(y[f])) == [10, 4, 2] for f in folds)


def test_a_small_vit_is_operated_on() -> None:
    """A model without batch normalisation adapts: its first block learns and nothing else changes."""
    torch.manual_seed(0)
    kwargs = {"num_classes": 10, "img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 4, "num_heads": 3}
    model = build_model("timm:vit_tiny_patch16_224", kwargs)
    parts = {b.name: b.tensors for b in partition(model, IMAGE_SHAPE)}
    p = Patient(model, classifier_name(model), (0.5,) * 3, (0.5,) * 3, "cpu")
    x, y = digits("stream", 64, seed=7)
    before, labels = p.state(), torch.from_numpy(y)
    loss = float(F.cross_entropy(p.logits(p.images(x)), labels))

    adapt(p, p.images(x), labels, Plan("block1", parts["block1"], 1e-3, 5, 16, (), 0))

    assert not p.has_batch_norm()
    assert set(delta_of(p.state(), before)) <= set(parts["block1"])
    assert float(F.cross_entropy(p.logits(p.images(x)), labels)) < loss


@pytest.mark.parametrize(
    ("spoil", "text"),
    [
        (lambda s: s.__class__(**{**s.__dict__, "selection": "block9"}), "block9"),
        (
            lambda s: s.__class__(
                **{
                    **s.__dict__,
                    "learning_rates": (0.0,),
                    "head_learning_rates": (0.0,),
                    "selection": "block1",
                }
            ),
            "learning rate 0",
        ),
        (lambda s: s.__class__(**{**s.__dict__, "budget_s": 1e-9}), "budget_s"),
    ],
)
def test_settings_that_cannot_work_are_refused(patient: Patient, blocks: dict, spoil, text: str) -> None:
    """An unknown block, a learning rate of zero and too short a budget each say so."""
    x, y = digits("stream", 32, seed=8)
    labels = torch.from_numpy(y).to(patient.device)

    with pytest.raises(AdaptationError, match=text):
        race(
            patient,
            {"source": patient.state()},
            blocks,
            patient.images(x),
            labels,
            "",
            spoil(SETTINGS),
            lambda *_: None,
        )


def test_labels_of_one_class_are_refused(patient: Patient, blocks: dict) -> None:
    """A buffer with one class only is an error that says so."""
    x, _ = digits("stream", 20, seed=9)
    labels = torch.zeros(20, dtype=torch.int64, device=patient.device)

    with pytest.raises(AdaptationError, match="one class"):
        race(
            patient,
            {"source": patient.state()},
            blocks,
            patient.images(x),
            labels,
            "",
            SETTINGS,
            lambda *_: None,
        )


def test_an_unknown_augmentation_is_refused() -> None:
    """An augmentation nobody knows names those that are known."""
    with pytest.raises(AdaptationError, match="flip or crop"):
        augmentation(["rotate"], 32, 32)
