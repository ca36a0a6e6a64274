"""Recent predictions, waiting for their labels: bounded by bytes and by age."""

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
OVERHEAD_BYTES = 400  # of one entry besides its arrays


@dataclass(frozen=True)
class Entry:
    """One predicted image.

    Attributes:
        sequence: position in the stream of observed images, from 0, over restarts.
        version: that predicted it.
        logits: (K,) float32 of that version.
        features: (D,) float32 of that version; the source's only if `version` is 0.
        x: (H, W, C) uint8, or None if the image was not kept.
        seen: monotonic seconds.
    """

    prediction_id: int
    sequence: int
    version: int
    logits: Array
    features: Array
    x: Array | None
    seen: float

    @property
    def n_bytes(self) -> int:
        """Memory it takes, about."""
        return (
            OVERHEAD_BYTES + self.logits.nbytes + self.features.nbytes + (0 if self.x is None else self.x.nbytes)
        )


class Ledger:
    """prediction_id → Entry, oldest first."""

    def __init__(self, max_bytes: int, max_age_s: float) -> None:
        self.max_bytes = max_bytes
        self.max_age_s = max_age_s
        self.n_bytes = 0
        self._newest: dict[int, int] = {}  # id by epoch: a server process counts up from its epoch
        self._entries: OrderedDict[int, Entry] = OrderedDict()

    def __len__(self) -> int:
        return len(self._entries)

    def add(self, entry: Entry, epoch: int = 0) -> None:
        """Remember a prediction of the server process of this epoch, and forget what is too old or too much."""
        self._newest[epoch] = max(self._newest.get(epoch, 0), entry.prediction_id)
        self._entries[entry.prediction_id] = entry
        self.n_bytes += entry.n_bytes
        while self._entries and (
            self.n_bytes > self.max_bytes or next(iter(self._entries.values())).seen < entry.seen - self.max_age_s
        ):
            self.n_bytes -= self._entries.popitem(last=False)[1].n_bytes

    def forget(self, prediction_ids: Iterable[int]) -> None:
        """Drop predictions before their time."""
        for number in prediction_ids:
            entry = self._entries.pop(number, None)
            self.n_bytes -= 0 if entry is None else entry.n_bytes

    def clear(self) -> None:
        """Drop them all."""
        self.forget(list(self._entries))

    def find(self, prediction_id: int) -> Entry | None:
        """The prediction, if it is still remembered."""
        return self._entries.get(prediction_id)

    def why_missing(self, prediction_id: int) -> str:
        """Say "expired" for a prediction that was, or may have been, forgotten; "unknown" for one never made."""
        return "expired" if prediction_id > 1e15 and not self.is_ahead(prediction_id) else "unknown"

    def is_ahead(self, prediction_id: int) -> bool:
        """Whether no such prediction of its server process was observed yet; also if nothing was at all."""
        epoch = max((e for e in self._newest if e <= prediction_id), default=None)
        return prediction_id > self._newest[epoch] if epoch is not None else not self._newest

    def since(self, sequence: int, limit: int) -> list[Entry]:
        """The newest entries from `sequence` on, at most `limit`, oldest first."""
        found: list[Entry] = []
        for entry in reversed(self._entries.values()):
            if entry.sequence < sequence or len(found) == limit:
                break
            found.append(entry)
        return found[::-1]


def stack_inputs(entries: list[Entry]) -> Array | None:
    """(N, H, W, C) uint8 of the entries whose image was kept, or None if there is none."""
    images = [e.x for e in entries if e.x is not None]
    return np.stack(images) if images else None
