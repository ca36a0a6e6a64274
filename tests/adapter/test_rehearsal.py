"""Rehearsal: what regimes learn from one another."""

import numpy as np
import pytest
import torch
from torch import nn

from tests.adapter.test_relief import patient_of
from tests.adapter.test_surgery import SETTINGS, anatomy_of
from tta.adapter.patient import Patient, State
from tta.adapter.race import Race
from tta.adapter.rehearsal import Memory, rehearse, scales_and_shifts
from tta.adapter.starts import REHEARSED, starts_of
from tta.adapter.views import Labels
from tta.errors import AdaptationError
from tta.packaging.digits import corrupt, digits


def memory(corruption: str, seed: int, n_labels: int = 96) -> Memory:
    """What a regime has left: 256 images, and some with labels."""
    x, y = digits("stream", 256 + n_labels, seed=seed)
    shifted = corrupt(x, corruption, seed)
    return Memory(shifted[n_labels:], shifted[:n_labels], y[:n_labels])


def accuracy(patient: Patient, weights: State, corruption: str) -> float:
    """On other images of a regime, with statistics of its own."""
    x, y = digits("stream", 900, seed=61)
    shifted = patient.images(corrupt(x, corruption, 62))
    patient.load(weights)
    patient.estimate_normalisation(shifted[600:])
    return patient.accuracy(shifted[:600], torch.from_numpy(y[:600]))


def test_two_regimes_learn_from_one_another(digits_model: nn.Module) -> None:
    """Rehearsed scales and shifts with a regime's own statistics beat these alone; nothing else changes."""
    patient = patient_of(digits_model)
    source = patient.state()
    memories = {name: memory(name, seed) for seed, name in enumerate(("noise", "blur"), 51)}
    before = np.mean([accuracy(patient, source, name) for name in memories])
    patient.load(source)

    learned = rehearse(patient, memories, ("crop",), 32, 600.0, 0, lambda *_: None)

    assert set(learned) == set(scales_and_shifts(patient.model))
    same = {n: t for n, t in patient.state().items() if n not in learned}
    assert all(torch.equal(t, source[n]) for n, t in same.items())
    assert np.mean([accuracy(patient, {**source, **learned}, name) for name in memories]) > before


def test_a_rehearsal_is_reproducible(digits_model: nn.Module) -> None:
    """The same memories and seed give bit-identical weights."""
    memories = {name: memory(name, 53, n_labels=0) for name in ("noise", "blur")}
    found = [rehearse(patient_of(digits_model), memories, (), 32, 600.0, 3, lambda *_: None) for _ in range(2)]

    assert all(torch.equal(t, found[1][n]) for n, t in found[0].items())


def test_nothing_to_rehearse_is_said() -> None:
    """Without regimes, or without normalisation in the network, there is an error."""
    plain = Patient(nn.Sequential(nn.Flatten(), nn.Linear(12, 2)), "1", (0.0,) * 3, (1.0,) * 3, "cpu")
    images = np.zeros((4, 2, 2, 3), np.uint8)
    with pytest.raises(AdaptationError, match="nothing to rehearse"):
        rehearse(
            plain, {"1": Memory(images, images[:0], np.zeros(0, np.int64))}, (), 32, 600.0, 0, lambda *_: None
        )


def test_few_labels_do_not_spoil_what_many_have_made(digits_model: nn.Module) -> None:
    """Where the rehearsed start is right on all 16 labels, the race hands it over as it is."""
    patient = patient_of(digits_model)
    anatomy, source = anatomy_of(digits_model), patient.state()
    learned = rehearse(
        patient, {n: memory(n, 55) for n in ("noise", "blur")}, ("crop",), 32, 600.0, 0, lambda *_: None
    )
    window = patient.images(corrupt(digits("stream", 256, seed=56)[0], "blur", 5))
    starts = starts_of(patient, source, anatomy, window, learned, {}, lambda *_: None)
    patient.load(starts[REHEARSED])
    x, y = digits("stream", 300, seed=57)
    images = patient.images(corrupt(x, "blur", 6))
    right = torch.nonzero(patient.logits(images).argmax(1) == torch.from_numpy(y))[:16, 0]
    labels = Labels.known(images[right], torch.from_numpy(y)[right])
    own = {name: starts[name] for name in ("source", REHEARSED)}

    found = Race(patient, own, anatomy, labels, window, "block1", SETTINGS, lambda *_: None).run()

    assert found.start == REHEARSED
    assert found.block == ""
    assert all(torch.equal(t, starts[REHEARSED][n]) for n, t in found.state.items())


def test_a_rehearsal_ends_in_time(digits_model: nn.Module) -> None:
    """Without time no step is taken, and what comes of it are the scales and shifts it began with."""
    patient = patient_of(digits_model)
    source = patient.state()

    learned = rehearse(patient, {"noise": memory("noise", 58)}, (), 32, 0.0, 0, lambda *_: None)

    assert all(torch.equal(t, source[n]) for n, t in learned.items())
