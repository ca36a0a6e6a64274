"""Where an operation may begin: the source, its normalisation re-estimated, and versions that served before."""

from collections.abc import Callable, Mapping

from torch import Tensor

from tta.adapter.methods import Anatomy
from tta.adapter.patient import Patient, State
from tta.adapter.surgery import information

NORMALISATIONS = ("batch-norm", "early-batch-norm", "blended-batch-norm")
REHEARSED = "rehearsed"
LABEL_FREE = (*NORMALISATIONS, REHEARSED)
LOOKED_AT = 256  # unlabelled images that starts are compared on
BLENDED = 0.7  # share of the window's statistics, the rest the source's


def starts_of(
    patient: Patient,
    source: State,
    anatomy: Anatomy,
    window: Tensor | None,
    learned: State,
    remembered: Mapping[str, State],
    progress: Callable[[str, int, int], None],
) -> dict[str, State]:
    """Every start, by name.

    Of a model with batch normalisation: "batch-norm" has all statistics from the window, "early-batch-norm" those
    of the first half of the blocks (late ones follow the class mix of the window), "blended-batch-norm" all of
    them, blended with the source's. "rehearsed" has scales and shifts learned from other regimes, and all
    statistics from the window.

    Args:
        patient: the network.
        source: its weights.
        anatomy: its blocks.
        window: (M, C, H, W) unlabelled images of the shift in [0, 1], or None.
        learned: scales and shifts, see `tta.adapter.rehearsal`; may be empty.
        remembered: weights by name, such as "serving" or "regime-3".
        progress: told (what, done, of).
    """
    starts = {"source": source}
    if window is not None and patient.has_batch_norm():
        blocks = list(anatomy.tensors)
        early = {t for name in blocks[: len(blocks) // 2] for t in anatomy.tensors[name]}
        ways = ((None, 1.0), (early, 1.0), (None, BLENDED))
        for i, (name, (tensors, share)) in enumerate(zip(NORMALISATIONS, ways, strict=True)):
            progress("normalisation", i, len(ways))
            patient.load(source)
            patient.estimate_normalisation(window, tensors, share)
            starts[name] = patient.state()
    if learned and (window is not None or not patient.has_batch_norm()):
        patient.load({**source, **learned})
        if window is not None and patient.has_batch_norm():
            patient.estimate_normalisation(window)
        starts[REHEARSED] = patient.state()
    return {**starts, **remembered}


def information_of(patient: Patient, starts: Mapping[str, State], window: Tensor) -> dict[str, float]:
    """Nats that the predictions of each start carry on the window: sure of each image, different over all."""
    found = {}
    for name, state in starts.items():
        patient.load(state)
        found[name] = float(information(patient.logits(window[:LOOKED_AT])))
    return found
