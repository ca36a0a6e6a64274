"""Surgery: one block changes and nothing else; the criteria are what the paper says."""

import copy
import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tta.adapter.criteria import relative_gradient_norm, signal_to_noise
from tta.adapter.methods import Anatomy
from tta.adapter.patient import Patient, State
from tta.adapter.race import Race, Result, Settings, stratified_folds
from tta.adapter.surgery import Plan, Rule, adapt, delta_of, information
from tta.adapter.views import Labels, Views, augmentation, views_for
from tta.config import METHODS
from tta.errors import AdaptationError
from tta.packaging.blocks import classifier_name, partition
from tta.packaging.digits import IMAGE_SHAPE, corrupt, digits
from tta.packaging.source import build_model

SETTINGS = Settings(
    selection="race",
    n_blocks=2,
    folds=2,
    epochs=8,
    batch_size=32,
    learning_rates=(1e-3, 3e-3),
    head_learning_rates=(1e-2, 1e-1),
    augment=("crop",),
    unlabelled=1.0,
    budget_s=120.0,
    memory_bytes=1 << 28,
    seed=0,
)


@pytest.fixture
def patient(digits_model: nn.Module, device: str) -> Patient:
    """The digits model on the table."""
    model = copy.deepcopy(digits_model)
    return Patient(model, classifier_name(model), (0.0,) * 3, (1.0,) * 3, device)


def anatomy_of(model: nn.Module) -> Anatomy:
    """Its blocks."""
    parts = partition(model, IMAGE_SHAPE)
    return Anatomy({b.name: b.tensors for b in parts}, {b.name: b.tap for b in parts}, classifier_name(model))


@pytest.fixture
def anatomy(digits_model: nn.Module) -> Anatomy:
    """Blocks of the digits model."""
    return anatomy_of(digits_model)


def known(patient: Patient, x: np.ndarray, y: np.ndarray) -> Labels:
    """Images and their classes, on the device."""
    return Labels.known(patient.images(x), torch.from_numpy(y).to(patient.device))


def tune(patient: Patient, labels: Labels, plan: Plan, window: np.ndarray | None = None) -> None:
    """Fit all labels."""
    images = None if window is None else patient.images(window)
    rows = torch.arange(len(labels), device=patient.device)
    adapt(patient.model, Views(patient, labels, images, ("crop",)), rows, plan)


def plan(anatomy: Anatomy, block: str, lr: float = 3e-3, epochs: int = 2) -> Plan:
    """A short operation."""
    return Plan(block, (anatomy.tensors[block],), lr, epochs=epochs, batch_size=16)


def race(
    patient: Patient, starts: dict[str, State], labels: Labels, suited: str, settings: Settings = SETTINGS
) -> Result:
    """Without an unlabelled window."""
    anatomy = anatomy_of(patient.model)
    return Race(patient, starts, anatomy, labels, None, suited, settings, lambda *_: None).run()


@pytest.mark.parametrize("block", ["block1", "block3", "head"])
def test_only_the_block_changes(patient: Patient, anatomy: Anatomy, block: str) -> None:
    """After surgery on a block every other tensor is bit-identical and the block's parameters are not."""
    x, y = digits("stream", 48, seed=1)
    before = patient.state()

    tune(patient, known(patient, x, y), plan(anatomy, block))

    delta = delta_of(patient.state(), before)
    assert delta
    assert set(delta) <= set(anatomy.tensors[block])
    assert all(p.requires_grad for p in patient.model.parameters())


def test_surgery_is_deterministic(digits_model: nn.Module, anatomy: Anatomy) -> None:
    """The same request gives bit-identical weights on the CPU."""
    x, y = digits("stream", 48, seed=2)
    results = []
    for _ in range(2):
        model = copy.deepcopy(digits_model)
        p = Patient(model, classifier_name(model), (0.0,) * 3, (1.0,) * 3, "cpu")
        tune(p, known(p, x, y), replace(plan(anatomy, "block1"), unlabelled=1.0), window=x)
        results.append(p.state())

    assert all(torch.equal(results[0][n], results[1][n]) for n in results[0])


def test_a_learning_rate_of_zero_is_refused(patient: Patient, anatomy: Anatomy) -> None:
    """A plan that could change nothing is an error that names the rate, and the weights stay."""
    x, y = digits("stream", 48, seed=1)
    before = patient.state()

    with pytest.raises(AdaptationError, match="learning rate 0 changes nothing"):
        tune(patient, known(patient, x, y), plan(anatomy, "block1", lr=0.0))

    assert not delta_of(patient.state(), before)


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


def test_rgn_is_the_ratio_of_norms(patient: Patient, anatomy: Anatomy) -> None:
    """RGN of a block is the norm of its gradient over the norm of its weights, by plain torch."""
    x, y = digits("stream", 40, seed=4)
    images, labels = patient.normalise(patient.images(x)), torch.from_numpy(y).to(patient.device)

    scores = relative_gradient_norm(patient.model, images, labels, anatomy.tensors, batch_size=40)

    model = copy.deepcopy(patient.model)
    F.cross_entropy(model(images), labels).backward()
    for name, members in anatomy.tensors.items():
        parameters = [p for n, p in model.named_parameters() if n in members]
        gradient = torch.cat([p.grad.flatten() for p in parameters]).norm()
        weights = torch.cat([p.detach().flatten() for p in parameters]).norm()
        assert scores[name] == pytest.approx(float(gradient / weights), rel=1e-3)


def test_snr_is_over_examples(patient: Patient, anatomy: Anatomy) -> None:
    """SNR of the head is the mean of squared mean over variance of single examples' gradients."""
    x, y = digits("stream", 12, seed=5)
    images, labels = patient.normalise(patient.images(x)), torch.from_numpy(y).to(patient.device)

    score = signal_to_noise(patient.model, images, labels, {"head": anatomy.tensors["head"]})["head"]

    model, singles = copy.deepcopy(patient.model), []
    for i in range(12):
        model.zero_grad()
        F.cross_entropy(model(images[i : i + 1]), labels[i : i + 1]).backward()
        singles.append(
            torch.cat([p.grad.flatten() for n, p in model.named_parameters() if n in anatomy.tensors["head"]])
        )
    g = torch.stack(singles).double()
    assert score == pytest.approx(float((g.mean(0) ** 2 / (g.var(0) + 1e-12)).mean()), rel=1e-2)


def test_the_race_cures_noise_and_a_change_of_meaning(patient: Patient) -> None:
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
    cured = race(patient, starts, known(patient, noisy[:128], y[:128]), "block1")
    patient.load(cured.state)
    after_noise = accuracy(noisy[400:], y[400:])
    relabelled = race(patient, {"source": source}, known(patient, x[:128], meaning[y[:128]]), "head")
    patient.load(relabelled.state)
    after_swap = accuracy(x[400:], meaning[y[400:]])

    assert cured.start == "batch-norm"
    assert after_noise >= before[0] + 0.20
    assert relabelled.block == "head"
    assert after_swap >= before[1] + 0.20


@pytest.mark.parametrize("selection", ["cross-validate", *METHODS, "block2"])
def test_every_selection_works(patient: Patient, anatomy: Anatomy, selection: str) -> None:
    """Each method fits 64 labels better than the start did, and changes only what it names."""
    x, y = digits("stream", 64, seed=11)
    labels = known(patient, corrupt(x, "noise", 2), y)
    source = patient.state()
    before = float(F.cross_entropy(patient.logits(labels.images), labels.y))
    settings = replace(SETTINGS, selection=selection, epochs=4, head_learning_rates=(1e-2,))

    found = race(patient, {"source": source}, labels, "", settings)

    patient.load(found.state)
    assert float(F.cross_entropy(patient.logits(labels.images), labels.y)) < before
    named = anatomy.tensors.get(found.block, [t for ts in anatomy.tensors.values() for t in ts])
    assert set(delta_of(found.state, source)) <= set(named)
    assert found.block in (anatomy.tensors if selection == "cross-validate" else (selection,))


def test_auto_rgn_scales_rates_by_the_ratio_of_norms(patient: Patient, anatomy: Anatomy) -> None:
    """One step of Adam moves every element by its rate: weights have then moved in proportion to their RGN."""
    x, y = digits("stream", 32, seed=12)
    labels = known(patient, x, y)
    parts = tuple(anatomy.tensors.values())
    before = patient.state()
    rows = torch.arange(32, device=patient.device)
    views = Views(patient, labels, None, ())
    weights = [n for n, p in patient.model.named_parameters() if p.ndim >= 2]
    groups = {n: (n,) for n in weights}
    rgn = relative_gradient_norm(patient.model, views.labelled(rows), labels.y, groups, 64)

    adapt(patient.model, views, rows, Plan("auto-rgn", parts, 1e-3, rule="auto-rgn", epochs=1, batch_size=32))

    after = patient.state()
    largest = max(rgn.values())
    for n in weights:
        moved = float((after[n] - before[n]).abs().max())
        assert moved == pytest.approx(1e-3 * rgn[n] / largest, rel=0.05)
    norms = {f"{n}.weight" for n, m in patient.model.named_modules() if isinstance(m, nn.BatchNorm2d)}
    assert norms
    assert all(torch.equal(after[n], before[n]) for n in norms)


@pytest.mark.parametrize(("rule", "first"), [("first-to-last", 0), ("last-to-first", -1)])
def test_gradual_unfreezing_begins_at_its_end(patient: Patient, anatomy: Anatomy, rule: Rule, first: int) -> None:
    """With an epoch a block only the first, or the last, block moves in the first epoch; at the end all have."""
    x, y = digits("stream", 32, seed=13)
    labels = known(patient, x, y)
    parts = tuple(anatomy.tensors.values())
    before = patient.state()
    half: dict[str, Tensor] = {}

    def tick(done: float) -> None:
        if not half and done >= 1 / len(parts):
            half.update(patient.state())

    views, rows = Views(patient, labels, None, ()), torch.arange(32, device=patient.device)
    adapt(patient.model, views, rows, Plan(rule, parts, 1e-3, rule=rule, epochs=len(parts), batch_size=16), tick)

    assert set(delta_of(half, before)) <= set(parts[first])
    changed = set(delta_of(patient.state(), before))
    assert all(changed & set(part) for part in parts)


def test_the_distance_from_the_start_is_held_by_l1(patient: Patient, anatomy: Anatomy) -> None:
    """With a heavy L1 weight the network ends nearer to where it started."""
    x, y = digits("stream", 48, seed=14)
    labels, before, ends = known(patient, corrupt(x, "noise", 2), y), patient.state(), []
    for l1 in (0.0, 0.1):
        patient.load(before)
        tune(patient, labels, Plan("l1", tuple(anatomy.tensors.values()), 1e-3, l1=l1, epochs=4, batch_size=16))
        ends.append(
            sum(float((t - before[n]).abs().sum()) for n, t in patient.state().items() if t.is_floating_point())
        )

    assert ends[1] < ends[0] / 2


def test_stored_views_give_what_fresh_ones_give(patient: Patient, anatomy: Anatomy) -> None:
    """At every cut, the rest of the network on stored outputs of the first part gives the whole one's logits."""
    x, y = digits("stream", 24, seed=15)
    labels, rows = known(patient, x, y), torch.arange(24, device=patient.device)
    expected = patient.logits(labels.images)

    for block in list(anatomy.tensors)[1:]:
        views = views_for(patient, labels, None, (), anatomy.cut_before(block), 1 << 28, 0)
        assert type(views) is not Views
        assert torch.allclose(views.part(views.labelled(rows)), expected, atol=1e-4)
    assert type(views_for(patient, labels, None, (), anatomy.cut_before("head"), 10, 0)) is Views


def test_a_window_smaller_than_a_step_is_used_whole(patient: Patient, anatomy: Anatomy) -> None:
    """Of 40 unlabelled images a step that wants 64 takes all 40, stored or fresh."""
    x, y = digits("stream", 40, seed=18)
    labels, window = known(patient, x[:8], y[:8]), patient.images(x)

    for cut in (None, anatomy.cut_before("block2")):
        views = views_for(patient, labels, window, ("crop",), cut, 1 << 28, 0)
        assert len(views.unlabelled(64)) == 40


def test_unlabelled_images_raise_information(patient: Patient, anatomy: Anatomy) -> None:
    """Tuned on unlabelled noisy images alone, the first block makes predictions surer, as varied, and righter."""
    x, y = digits("stream", 400, seed=16)
    noisy = corrupt(x, "noise", 3)
    patient.estimate_normalisation(patient.images(noisy))
    images = patient.images(noisy)
    before = (
        float(information(patient.logits(images))),
        patient.accuracy(images, torch.from_numpy(y).to(images.device)),
    )
    nothing = known(patient, noisy[:0], y[:0])

    tune(patient, nothing, replace(plan(anatomy, "block1", 1e-3, 4), unlabelled=1.0, batch_size=32), window=noisy)

    after = (
        float(information(patient.logits(images))),
        patient.accuracy(images, torch.from_numpy(y).to(images.device)),
    )
    assert after[0] > before[0]
    assert after[1] > before[1]


def test_knowing_what_it_is_not_helps(patient: Patient, anatomy: Anatomy) -> None:
    """Fitted on "not this class" alone, the network gives those classes less probability."""
    x, _ = digits("stream", 48, seed=17)
    images = patient.images(corrupt(x, "noise", 4))
    taken = patient.logits(images).argmax(1)
    wrong = torch.ones(48, dtype=torch.bool, device=images.device)
    labels = Labels(images, taken, wrong, ~wrong)

    def probability() -> float:
        return float(patient.logits(images).softmax(1).gather(1, taken[:, None]).mean())

    before = probability()
    tune(patient, labels, plan(anatomy, "head", 1e-2, 8))

    assert probability() < before - 0.1


def test_answers_called_right_teach_and_compare_nothing(patient: Patient) -> None:
    """Starts and folds are judged on named classes alone, also where most answers were only called right."""
    x, y = digits("stream", 96, seed=18)
    images = patient.images(corrupt(x, "noise", 4))
    answers = patient.logits(images).argmax(1)
    truth = torch.from_numpy(y).to(images.device)
    named = torch.arange(96, device=images.device) < 24
    wrong = ~named & (answers != truth)
    labels = Labels(images, torch.where(named, truth, answers), wrong, named)
    source = patient.state()

    report = race(patient, {"source": source}, labels, "").report

    assert report["starts"]["source"] == pytest.approx(
        float((answers[:24] == truth[:24]).float().mean()), abs=1e-4
    )
    assert report["n_fit"] == 96
    held = len(stratified_folds(y[:24], SETTINGS.folds, SETTINGS.seed)[0])
    for entry in report["race"]:
        shares = entry["accuracy"] * (held if entry["folds"] == 1 else 24)
        assert shares == pytest.approx(round(shares), abs=0.01)


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
    anatomy = anatomy_of(model)
    p = Patient(model, classifier_name(model), (0.5,) * 3, (0.5,) * 3, "cpu")
    x, y = digits("stream", 64, seed=7)
    before, labels = p.state(), known(p, x, y)
    loss = float(F.cross_entropy(p.logits(labels.images), labels.y))

    found = race(p, {"source": before}, labels, "block1", replace(SETTINGS, epochs=5, augment=()))

    p.load(found.state)
    assert not p.has_batch_norm()
    assert set(delta_of(found.state, before)) <= set(anatomy.tensors[found.block])
    assert float(F.cross_entropy(p.logits(labels.images), labels.y)) < loss


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"selection": "block9"}, "block9"),
        ({"selection": "block1", "learning_rates": (0.0,)}, "learning rate 0"),
        ({"budget_s": 1e-9}, "budget_s"),
    ],
)
def test_settings_that_cannot_work_are_refused(patient: Patient, change: dict, text: str) -> None:
    """An unknown block, a learning rate of zero and too short a budget each say so."""
    labels = known(patient, *digits("stream", 32, seed=8))

    with pytest.raises(AdaptationError, match=text):
        race(patient, {"source": patient.state()}, labels, "", replace(SETTINGS, **change))


def test_labels_of_one_class_are_refused(patient: Patient) -> None:
    """A buffer with one class only is an error that says so."""
    x, _ = digits("stream", 20, seed=9)

    with pytest.raises(AdaptationError, match="one class"):
        race(patient, {"source": patient.state()}, known(patient, x, np.zeros(20, np.int64)), "")


def test_a_budget_ends_the_race_early(patient: Patient, monkeypatch: pytest.MonkeyPatch) -> None:
    """With three quarters of the time some comparisons are left out, and a candidate still comes."""
    labels = known(patient, *digits("stream", 64, seed=10))
    clock = itertools.count()
    monkeypatch.setattr("tta.adapter.race.monotonic", lambda: float(next(clock)))
    source, settings = patient.state(), replace(SETTINGS, budget_s=1e9)
    whole = race(patient, {"source": source}, labels, "", settings)

    budget = replace(settings, budget_s=0.75 * whole.report["seconds"])
    hurried = race(patient, {"source": source}, labels, "", budget)

    assert 1 <= len(hurried.report["race"]) < len(whole.report["race"])


def test_an_unknown_augmentation_is_refused() -> None:
    """An augmentation nobody knows names those that are known."""
    with pytest.raises(AdaptationError, match="flip or crop"):
        augmentation(["rotate"], 32, 32)
