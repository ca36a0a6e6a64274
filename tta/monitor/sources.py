"""Who sends the traffic: a fair share for every camera or client, and which of them a shift concerns.

Requests may carry a `key`. Without keys all traffic is one source.
"""

import numpy as np

from tta.monitor.charts import Array
from tta.monitor.history import Samples
from tta.monitor.regimes import Fingerprint

EPOCH = 256  # samples over which shares are counted
FAIR = 2.0  # times the mean of the others that one key may send
LEAST = 8  # samples an epoch every key may send
MAX_KEYS = 1000  # told apart; the rest count as without a key
MIN_KEY_SAMPLES = 6  # of a key, to say whether it has shifted
ASTRAY = 2.0  # times a regime's threshold that a key must be away: it is asked again and again


class Sources:
    """Numbers keys and thins the chatty ones."""

    def __init__(self) -> None:
        self.names: list[str] = [""]  # by number; 0 is no key
        self._numbers: dict[str, int] = {"": 0}
        self._counts: dict[int, int] = {}
        self._caps: dict[int, float] = {}
        self._seen = 0

    def number(self, key: str) -> int:
        """The number of a key."""
        found = self._numbers.get(key)
        if found is None:
            if len(self.names) > MAX_KEYS:
                return 0
            found = self._numbers[key] = len(self.names)
            self.names.append(key)
        return found

    def admit(self, sources: Array) -> Array | None:
        """Which samples the charts take.

        Args:
            sources: (N,) key numbers in order.

        Returns:
            (N,) bool; None for all of them.
        """
        if len(self.names) == 1:
            return None
        taken = np.ones(len(sources), bool)
        for i, source in enumerate(sources.tolist()):
            if source:
                count = self._counts[source] = self._counts.get(source, 0) + 1
                taken[i] = count <= self._caps.get(source, EPOCH)
            self._seen += 1
            if self._seen >= EPOCH:
                self._next_epoch()
        return taken

    def _next_epoch(self) -> None:
        total, n = sum(self._counts.values()), len(self._counts)
        self._caps = (
            {k: max(LEAST, FAIR * (total - count) / (n - 1)) for k, count in self._counts.items()} if n > 1 else {}
        )
        self._counts, self._seen = {}, 0

    def shifted(self, samples: Samples, regime: Fingerprint, inflation: float = 1.0) -> tuple[str, ...]:
        """The keys whose samples are not in the regime, if that tells them from the others.

        Args:
            samples: since the onset.
            regime: that they should be in.
            inflation: of the variance of a mean by stickiness.

        Returns:
            Keys in alphabetical order; empty if all or none have shifted, or there is one source only.
        """
        away, judged = [], 0
        for source in np.unique(samples.sources).tolist():
            own = samples.w[samples.sources == source]
            if not source or len(own) < MIN_KEY_SAMPLES:
                continue
            judged += 1
            if regime.distance(own, inflation) > ASTRAY * regime.threshold:
                away.append(self.names[source])
        return tuple(sorted(away)) if len(away) < judged else ()

    def of(self, samples: Samples, keys: tuple[str, ...]) -> Samples:
        """Those samples that came with one of the keys; all of them for no keys."""
        if not keys:
            return samples
        return samples[np.isin(samples.sources, self.numbers(keys))]

    def numbers(self, keys: tuple[str, ...]) -> Array:
        """(n,) the numbers of keys; -1, which no sample has, for one that is not known."""
        return np.array([self._numbers.get(key, -1) for key in keys], np.int64)
