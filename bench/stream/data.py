"""The stream: 15 corruptions in the standard order, seen once for long and then nineteen times shortly.

    start     300 images as the model knows them
    first     1,000 images of each corruption; of the first 512 every fourth gets a label
    visits    2 to 20: 150 to 250 images of each, no labels
    correlated  200 images of each, their classes in runs (Dirichlet 0.1, as in NOTE)
    mixed     3,000 images, each of another corruption
    clean     1,000 images as the model knows them

Visits and all that follows are of other images than the first pass, so there no image is shown that was ever labelled.
In the first pass itself the corruptions share their 1,000 images: whoever remembers labels of earlier corruptions has
seen some of them.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from bench.cifar import CACHE, images
from bench.corruptions import CORRUPTIONS, corrupt

SEVERITY = 5
N_REFERENCE = 2000  # of the test images the bundle knows; the stream is made of the others
N_START, N_FIRST, N_VISIT, N_VISITS = 300, 1000, 200, 20
VISIT_VARIES = 50  # images, either way
N_MIXED, N_CLEAN = 3000, 1000
LABELS = 128  # of each corruption, in the first pass only
LABELLED_EVERY = 4  # images
CONCENTRATION = 0.1  # of the classes of a run
RUN_SLOTS = 10

Array = Any


@dataclass(frozen=True)
class Segment:
    """A stretch of the stream.

    Attributes:
        part: "start", "first", "visits", "correlated", "mixed" or "clean".
        visit: 1 for the first pass; 0 where there are no visits.
        corruption: "" for start, mixed and clean.
        x: (N, 32, 32, 3) uint8.
        y: (N,) classes.
        labelled: (N,) bool, which of them get a label.
    """

    part: str
    visit: int
    corruption: str
    x: Array
    y: Array
    labelled: Array


@lru_cache(maxsize=len(CORRUPTIONS))
def corrupted(name: str) -> Array:
    """All test images with a corruption at severity 5."""
    path = CACHE / f"{name}{SEVERITY}.npy"
    if not path.exists():
        np.save(path, corrupt(name, images("test")[0], SEVERITY))
    return np.load(path, mmap_mode="r")


def stream(seed: int, n_visits: int = N_VISITS, labels: int = LABELS) -> Iterator[Segment]:
    """Its segments in order.

    Args:
        seed: of which images come when.
        n_visits: of each corruption, the first pass among them.
        labels: of each corruption in the first pass.
    """
    rng = np.random.default_rng([seed, 7])
    x, y, _ = images("test")
    pool = rng.permutation(np.arange(N_REFERENCE, len(x)))
    labelled, later = np.split(pool, [len(CORRUPTIONS) * labels])
    every = np.arange(N_FIRST) % LABELLED_EVERY == 0
    every &= np.cumsum(every) <= labels
    none = np.zeros(max(N_VISIT + VISIT_VARIES, N_MIXED, N_CLEAN), bool)
    rows = rng.choice(later, N_START, replace=False)
    yield Segment("start", 0, "", x[rows], y[rows], none[:N_START])
    for name, own in zip(CORRUPTIONS, labelled.reshape(len(CORRUPTIONS), labels), strict=True):
        rows = np.empty(N_FIRST, np.int64)
        rows[every] = own
        rows[~every] = rng.choice(later, int((~every).sum()), replace=False)
        yield Segment("first", 1, name, corrupted(name)[rows], y[rows], every)
    for visit in range(2, n_visits + 1):
        for name in CORRUPTIONS:
            n = N_VISIT + int(rng.integers(-VISIT_VARIES, VISIT_VARIES + 1))
            rows = rng.choice(later, n, replace=False)
            yield Segment("visits", visit, name, corrupted(name)[rows], y[rows], none[: len(rows)])
    for name in CORRUPTIONS:
        rows = _in_runs(rng.choice(later, N_VISIT, replace=False), y, rng)
        yield Segment("correlated", 0, name, corrupted(name)[rows], y[rows], none[: len(rows)])
    rows = rng.choice(later, N_MIXED)
    which = rng.integers(len(CORRUPTIONS), size=N_MIXED)
    mixed = np.stack([corrupted(list(CORRUPTIONS)[k])[row] for k, row in zip(which, rows, strict=True)])
    yield Segment("mixed", 0, "", mixed, y[rows], none[: len(rows)])
    rows = rng.choice(later, N_CLEAN, replace=False)
    yield Segment("clean", 0, "", x[rows], y[rows], none[: len(rows)])


def _in_runs(rows: Array, y: Array, rng: np.random.Generator) -> Array:
    """Images in an order in which classes come in runs: each class is dealt to slots by a Dirichlet draw."""
    slots: list[list[int]] = [[] for _ in range(RUN_SLOTS)]
    for k in range(10):
        own = rng.permutation(rows[y[rows] == k])
        share = rng.dirichlet([CONCENTRATION] * RUN_SLOTS)
        for slot, part in zip(slots, np.split(own, (np.cumsum(share)[:-1] * len(own)).astype(int)), strict=True):
            slot.extend(part.tolist())
    return np.array([row for slot in slots for row in slot])
