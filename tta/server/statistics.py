"""What a server has counted since it started, shipped to the daemon once a second."""

from bisect import bisect_left

from tta.errors import Code
from tta.server.options import BATCH_BUCKETS, DURATION_BUCKETS_S, Counters


class Histogram:
    """Counts by bucket and their sum, for one thread to add to."""

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float) -> None:
        """Count one value."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value


class Statistics:
    """The server's counters, each written by one thread only.

    The frontend counts requests: what it refuses (`rejected`, by code), answers (`requests`, by code) and cannot
    deliver. The inference thread counts images, batches and observations, and ships the totals.
    """

    def __init__(self, epoch: int, number: int = 0) -> None:
        self.epoch = epoch
        self.number = number
        self.requests: dict[str, int] = {}
        self.rejected: dict[str, int] = {}
        self.undeliverable = 0
        self.repeated = 0
        self.images = 0
        self.batches = 0
        self.observations_dropped = 0
        self.request_s = Histogram(DURATION_BUCKETS_S)
        self.queue_s = Histogram(DURATION_BUCKETS_S)
        self.compute_s = Histogram(DURATION_BUCKETS_S)
        self.batch_size = Histogram(BATCH_BUCKETS)

    def snapshot(self, queue_images: int) -> Counters:
        """The totals to ship."""
        return Counters(
            number=self.number,
            epoch=self.epoch,
            requests=dict(self.requests),
            rejected=dict(self.rejected),
            undeliverable=self.undeliverable,
            repeated=self.repeated,
            images=self.images,
            batches=self.batches,
            observations_dropped=self.observations_dropped,
            queue_images=queue_images,
            histograms={
                name: (list(h.counts), h.sum)
                for name, h in (
                    ("request_duration_seconds", self.request_s),
                    ("queue_duration_seconds", self.queue_s),
                    ("compute_duration_seconds", self.compute_s),
                    ("batch_size", self.batch_size),
                )
            },
        )


def count(totals: dict[str, int], code: Code, n: int = 1) -> None:
    """So many more of a code."""
    name = code.name.lower()
    totals[name] = totals.get(name, 0) + n
