"""The newest samples a monitor has seen, in order."""

from dataclasses import dataclass

import numpy as np

from tta.monitor.charts import Array


@dataclass(eq=False)
class Samples:
    """Some samples in order.

    Attributes:
        w: (n, D) float32 residuals.
        predictions: (n,) predicted classes.
        logits: (n, K) of the source model.
        sequences: (n,) place of each in the stream.
        sources: (n,) number of the key it came with; 0 for none.
    """

    w: Array
    predictions: Array
    logits: Array
    sequences: Array
    sources: Array

    def __len__(self) -> int:
        return len(self.w)

    def __getitem__(self, rows: slice | Array) -> "Samples":
        return Samples(*(column[rows] for column in vars(self).values()))


class History:
    """Remembers the last `capacity` samples in arrays twice as long, so that reading them copies nothing."""

    def __init__(self, n_features: int, n_classes: int, capacity: int) -> None:
        self.capacity = capacity
        self._columns = Samples(
            np.zeros((2 * capacity, n_features), np.float32),
            np.zeros(2 * capacity, np.int64),
            np.zeros((2 * capacity, n_classes), np.float32),
            np.zeros(2 * capacity, np.int64),
            np.zeros(2 * capacity, np.int64),
        )
        self._end = 0

    def __len__(self) -> int:
        return min(self._end, self.capacity)

    def append(self, new: Samples) -> None:
        """Remember samples."""
        new = new[-self.capacity :] if len(new) > self.capacity else new
        n = len(new)
        if self._end + n > 2 * self.capacity:
            kept = slice(self._end - self.capacity + n, self._end)
            for column in vars(self._columns).values():
                column[: self.capacity - n] = column[kept].copy()
            self._end = self.capacity - n
        for column, values in zip(vars(self._columns).values(), vars(new).values(), strict=True):
            column[self._end : self._end + n] = values
        self._end += n

    def newest(self, n: int) -> Samples:
        """At most n samples, the newest last. A view: valid until the next `append`."""
        return self._columns[slice(max(0, self._end - min(n, self.capacity)), self._end)]

    def since(self, sequence: int) -> Samples:
        """Those at or after a place in the stream. A view."""
        every = self.newest(self.capacity)
        return every[slice(int(np.searchsorted(every.sequences, sequence)), None)]
