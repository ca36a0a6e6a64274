"""Who is computed next, who is refused: the queue between clients and model."""

import time

import numpy as np
import pytest

from tta.errors import DeadlineError, OverloadedError
from tta.server.batcher import ACTIVE_S, TRIES, Batcher, ComputeTime, Pending


def request(client: bytes, number: int, n: int = 1, expires: float = float("inf")) -> Pending:
    """A request of n small images."""
    return Pending(client, number, np.zeros((n, 2, 2, 3), np.uint8), time.monotonic(), expires)


def names(batch: list[Pending]) -> list[tuple[bytes, int]]:
    """Client and id of each request of a batch."""
    return [(r.identity, r.request_id) for r in batch]


def test_one_clients_requests_stay_in_order() -> None:
    """Requests of different sizes of one client are taken as they came."""
    batcher = Batcher(8, 0.0, 1000, 60.0)
    for i, n in enumerate([3, 1, 5, 2, 8, 1]):
        batcher.put(request(b"a", i, n))
    taken: list[tuple[bytes, int]] = []
    while batcher.images:
        batch, _ = batcher.take(0.0)
        assert sum(len(r.x) for r in batch) <= 8
        taken += names(batch)

    assert taken == [(b"a", i) for i in range(6)]


def test_a_flood_of_one_client_waits_for_itself() -> None:
    """Beside a client with a hundred requests queued, each of two others is in the next batch, image for image."""
    batcher = Batcher(9, 0.0, 1000, 60.0)
    for i in range(100):
        batcher.put(request(b"flood", i))
    batcher.take(0.0)
    for i in range(6):
        batcher.put(request(b"a", i))
        batcher.put(request(b"b", i))

    first, second = names(batcher.take(0.0)[0]), names(batcher.take(0.0)[0])

    for batch in (first, second):
        assert sorted({c: sum(1 for d, _ in batch if d == c) for c, _ in batch}.values()) == [3, 3, 3]


def test_large_requests_are_no_larger_share() -> None:
    """A client of 8 images a request gets as many images computed as one of single images."""
    batcher = Batcher(8, 0.0, 10_000, 60.0)
    for i in range(40):
        batcher.put(request(b"large", i, 8))
    for i in range(320):
        batcher.put(request(b"small", i, 1))
    images = {b"large": 0, b"small": 0}
    for _ in range(20):
        for r in batcher.take(0.0)[0]:
            images[r.identity] += len(r.x)

    assert abs(images[b"large"] - images[b"small"]) <= 8


def test_a_full_queue_refuses_who_fills_it() -> None:
    """Who has most queued is refused, and loses its newest requests to others, whose first has room beyond."""
    batcher = Batcher(4, 0.0, 10, 60.0)
    for i in range(10):
        batcher.put(request(b"flood", i))
    with pytest.raises(OverloadedError, match="10 images; room for 10") as refused:
        batcher.put(request(b"flood", 10))
    assert batcher.put(request(b"new", 0, 2)) == []
    evicted = batcher.put(request(b"new", 1, 1))
    with pytest.raises(OverloadedError):
        batcher.put(request(b"new", 2, 7))  # more than the other would keep
    batch, _ = batcher.take(0.0)

    assert refused.value.retry_after_s is not None
    assert names(evicted) == [(b"flood", 9), (b"flood", 8), (b"flood", 7)]
    assert (b"new", 0) in names(batch)
    assert batcher.images == 10 - sum(len(r.x) for r in batch)
    left: list[Pending] = []
    while batcher.images:
        left += batcher.take(0.0)[0]
    assert not {9, 8, 7} & {r.request_id for r in left}


def test_eviction_takes_back_what_it_cost() -> None:
    """A client whose requests were evicted is not further behind than one that never sent them."""
    batcher = Batcher(1, 0.0, 10, 60.0)
    for i in range(10):
        batcher.put(request(b"a", i))
    batcher.put(request(b"b", 0))
    for i in range(1, 5):
        batcher.put(request(b"b", i))
    order = []
    while batcher.images:
        order += [r.identity for r in batcher.take(0.0)[0]]

    assert order[:10] == [b"a", b"b"] * 5


def test_a_large_request_and_small_ones_do_not_push_each_other_out() -> None:
    """As large as the queue, it is taken beside one small image, and a small one beside it."""
    batcher = Batcher(4, 0.0, 10, 60.0)
    batcher.put(request(b"small", 0))
    assert batcher.put(request(b"large", 0, 10)) == []
    assert batcher.put(request(b"other", 0)) == []
    with pytest.raises(OverloadedError):
        batcher.put(request(b"large", 1, 10))

    assert batcher.images == 12


def test_a_client_that_is_never_queued_twice_does_not_starve_others() -> None:
    """One that sends a full batch while its last one is computed leaves half of the images to the other."""
    batcher = Batcher(8, 0.0, 1000, 60.0)
    for i in range(200):
        batcher.put(request(b"single", i))
    images = {b"batches": 0, b"single": 0}
    for i in range(20):
        batcher.put(request(b"batches", i, 8))
        for r in batcher.take(0.0)[0]:
            images[r.identity] += len(r.x)

    assert abs(images[b"batches"] - images[b"single"]) <= 16


def test_the_queue_is_bounded_in_time() -> None:
    """Where an image takes 0.1 s, half a second's queue holds a handful, whatever its capacity in images."""
    batcher = Batcher(4, 0.0, 1000, 0.5)
    batcher.observe(4, 0.4)
    batcher.observe(1, 0.1)
    for i in range(5):
        batcher.put(request(b"a", i))
    with pytest.raises(OverloadedError):
        batcher.put(request(b"a", 5))

    assert batcher.credit() == 5


def test_a_deadline_that_cannot_be_met_is_refused_on_arrival() -> None:
    """With two batches queued, a deadline within one is refused; another client is sooner, and meets it."""
    batcher = Batcher(4, 0.0, 1000, 60.0)
    batcher.observe(4, 1.0)
    batcher.observe(1, 0.5)
    for i in range(8):
        batcher.put(request(b"a", i))
    with pytest.raises(DeadlineError, match="later than its deadline") as refused:
        batcher.put(request(b"a", 8, expires=time.monotonic() + 1.5))
    batcher.put(request(b"b", 0, expires=time.monotonic() + 1.5))
    batcher.put(request(b"a", 9, expires=time.monotonic() + 60))

    assert refused.value.retry_after_s == pytest.approx(2.0, abs=0.1)
    assert batcher.images == 10


def test_what_nobody_wants_is_not_computed() -> None:
    """Cancelled and expired requests come apart from the batch and take no place in it."""
    batcher = Batcher(2, 0.0, 100, 60.0)
    for i in range(4):
        batcher.put(request(b"a", i))
    late = request(b"b", 0, expires=time.monotonic() + 60)
    batcher.put(late)
    late.expires = time.monotonic()
    assert batcher.cancel(b"a", 1)
    assert not batcher.cancel(b"a", 77)
    assert not batcher.cancel(b"c", 1)
    batch, dropped = batcher.take(0.0)

    assert names(batch) == [(b"a", 0), (b"a", 2)]
    assert sorted(names(dropped)) == [(b"a", 1), (b"b", 0)]
    assert batcher.images == 1


def test_compute_time_is_learned_by_size() -> None:
    """Each size has its own time; one never seen is bounded by its neighbours; what is seen moves the average."""
    known = ComputeTime(8)
    assert known.of(20) == 0.0
    known.observe(8, 0.8, 0.0)
    assert known.of(3) == 0.8
    known.observe(1, 0.3, 0.0)
    known.observe(2, 0.4, 0.0)

    assert known.of(1) == 0.3
    assert known.of(3) == 0.8
    assert known.of(17) == pytest.approx(1.9)
    for _ in range(100):
        known.observe(1, 0.5, 0.0)
    assert known.of(1) == pytest.approx(0.5, abs=0.001)


@pytest.mark.parametrize(
    ("seconds", "size"),
    [
        ({1: 1.0, 2: 1.5, 4: 2.2, 8: 3.0}, 8),  # a GPU: the larger, the faster
        ({1: 1.0, 2: 1.8, 4: 3.7, 8: 7.4}, 2),  # a CPU: from two images on it makes no difference
        ({1: 1.0, 2: 2.1, 4: 4.2, 8: 9.0}, 1),  # a batch that no longer fits the cache
    ],
)
def test_a_batch_is_no_larger_than_makes_it_faster(seconds: dict[int, float], size: int) -> None:
    """The size is the one at which most images are computed in a second."""
    known = ComputeTime(8)
    for n, each in seconds.items():
        for _ in range(TRIES):
            known.observe(n, each, 0.0, each)

    assert known.batch_size(100, 1.0) == size


def test_a_size_long_not_measured_is_tried_again() -> None:
    """A slow hour of one size does not rule it out for ever, but it waits until as many images are queued."""
    known = ComputeTime(8)

    def observe(n: int, seconds: float, now: float) -> None:
        known.observe(n, seconds, now, seconds)

    for _ in range(TRIES):
        for n, each in {1: 1.0, 2: 2.1, 4: 4.2, 8: 9.0}.items():
            observe(n, each, 0.0)
        for n, each in {1: 1.0, 2: 2.1, 4: 4.2}.items():
            observe(n, each, 61.0)

    assert known.batch_size(7, 62.0) == 1
    for _ in range(TRIES):
        assert known.batch_size(8, 62.0) == 8
        observe(8, 4.0, 62.0)
    assert known.batch_size(8, 63.0) == 8  # it has become the fastest
    observe(8, 9.0, 63.0)
    assert known.batch_size(8, 64.0) == 8  # one slow batch among others was disturbed


@pytest.mark.parametrize(
    ("seconds", "size"),
    [
        ({1: 1.0, 2: 1.1, 4: 1.3, 8: 1.7, 16: 2.5}, 8),  # a GPU: eight are hardly longer than one
        ({1: 1.0, 2: 1.7, 4: 3.1, 8: 6.0, 16: 12.0}, 2),  # a CPU
        ({1: 1.0, 2: 2.1, 4: 4.2, 8: 9.0, 16: 20.0}, 1),  # where single images are the fastest
    ],
)
def test_a_short_batch_takes_at_most_twice_as_long_as_an_image(seconds: dict[int, float], size: int) -> None:
    """However much faster larger ones are, and however many images are queued."""
    known = ComputeTime(16)
    for n, each in seconds.items():
        for _ in range(TRIES):
            known.observe(n, each, 0.0, each)

    assert known.batch_size(100, 1.0, short=True) == size


def test_large_sizes_are_not_tried_at_the_cost_of_others() -> None:
    """Where batches are to be short, only the next size is tried, not all that were not measured lately."""
    known = ComputeTime(32)
    known.observe(32, 24.0, 0.0, 24.0)
    for n, each in {1: 1.0, 2: 1.7, 4: 3.0}.items():
        for _ in range(TRIES):
            known.observe(n, each, 0.0, each)

    assert known.batch_size(100, 1.0) == 8  # not tried yet
    assert known.batch_size(100, 1.0, short=True) == 2
    assert known.batch_size(100, 61.0, short=True) == 1
    for n, each in {1: 1.0, 2: 1.7}.items():
        for _ in range(TRIES):
            known.observe(n, each, 61.0, each)
    assert known.batch_size(100, 62.0, short=True) == 4
    for _ in range(TRIES):
        known.observe(4, 3.0, 62.0, 3.0)
    assert known.batch_size(100, 63.0, short=True) == 2


def test_a_batch_after_a_pause_is_not_compared() -> None:
    """Single images that follow pauses, and take longer for it, do not make larger batches look faster."""
    batcher = Batcher(8, 0.0, 100, 1e6)
    for n in (1, 2, 4, 8):
        for _ in range(TRIES):
            batcher.observe(n, 1.0 * n if n == 1 else 1.1 * n)
    for i in range(20):
        batcher.put(request(b"a", i))
        batcher.take(0.0)
        batcher.take(0.0)  # nothing to do
        batcher.observe(1, 2.0)

    assert batcher.compute_time.batch_size(100, time.monotonic()) == 1
    assert batcher.compute_time.of(1) > 1.5


def test_a_queue_is_cut_where_batches_get_no_faster() -> None:
    """Where one image is faster than four, a queue of four clients is computed one by one, in their order."""
    batcher = Batcher(4, 10.0, 100, 60.0)
    for n, each in ((1, 0.1), (2, 0.21), (4, 0.42)):
        for _ in range(TRIES):
            batcher.observe(n, each)
    for i in range(4):
        batcher.put(request(b"abcd"[i : i + 1], i))

    taken = [names(batcher.take(0.0)[0]) for _ in range(4)]

    assert taken == [[(b"a", 0)], [(b"b", 1)], [(b"c", 2)], [(b"d", 3)]]


@pytest.mark.parametrize(("seconds", "taken"), [((1.0, 1.8, 3.0, 5.0, 8.0), 2), ((1.0, 1.1, 1.2, 1.2, 1.3), 16)])
def test_a_batch_is_filled_up_only_where_it_hardly_makes_it_longer(seconds: tuple[float, ...], taken: int) -> None:
    """Two single images are computed without a flood where that would take longer, else with much of it."""
    batcher = Batcher(16, 0.0, 1000, 1e6)
    for i, each in enumerate(seconds):
        for _ in range(TRIES):
            batcher.observe(1 << i, each)
    for i in range(100):
        batcher.put(request(b"flood", i))
    batcher.take(0.0)
    batcher.put(request(b"a", 0))
    batcher.put(request(b"b", 0))

    batch = names(batcher.take(0.0)[0])

    assert {(b"a", 0), (b"b", 0)} <= set(batch)
    assert len(batch) == taken


@pytest.mark.parametrize(("queued", "together"), [(3, True), (100, False)])
def test_only_who_can_fill_a_batch_alone_is_left_out_of_anothers(queued: int, together: bool) -> None:
    """A client with a few requests is computed beside a single image of another's, one with a hundred after it."""
    batcher = Batcher(16, 0.0, 1000, 1e6)
    for i, each in enumerate((1.0, 1.8, 3.0, 5.0, 8.0)):
        for _ in range(TRIES):
            batcher.observe(1 << i, each)
    batcher.put(request(b"single", 0))
    for i in range(queued):
        batcher.put(request(b"more", i))

    assert {r.identity for r in batcher.take(0.0)[0]} == ({b"single", b"more"} if together else {b"single"})


@pytest.mark.parametrize(("ago", "images"), [(0.0, 2), (2 * ACTIVE_S, 16)])
def test_a_flood_is_computed_in_small_batches_while_another_client_may_come(ago: float, images: int) -> None:
    """Where large batches are hardly faster, a flood's are small if somebody else has sent a moment ago."""
    batcher = Batcher(16, 0.0, 1000, 1e6)
    for n, each in ((1, 1.0), (2, 1.7), (4, 3.2), (8, 6.2), (16, 12.0)):
        for _ in range(TRIES):
            batcher.observe(n, each)
    other = request(b"a", 0)
    other.received -= ago
    batcher.put(other)
    batcher.take(0.0)
    for i in range(100):
        batcher.put(request(b"flood", i))

    assert len(batcher.take(0.0)[0]) == images


@pytest.mark.parametrize("images", [1, 2, 3, 4, 8])
def test_requests_of_several_images_fill_batches_too(images: int) -> None:
    """On a device where large batches pay, they are formed of requests of any size, for minutes."""
    known = ComputeTime(32)
    for n in (1, 32):
        known.observe(n, 0.1 + 0.002 * n, 0.0, 0.1 + 0.002 * n)
    sizes, now = [], 0.0
    while now < 300.0:
        full = known.batch_size(128, now)
        taken = max(images, full // images * images)
        seconds = 0.1 + 0.002 * taken
        known.tried(full, now)
        now += seconds
        known.observe(taken, seconds, now, seconds)
        sizes.append(taken)

    assert np.mean(sizes) > 24
