"""What is remembered of requests that may come again."""

import numpy as np

from tta.server import repeats
from tta.server.batcher import Pending
from tta.server.repeats import Repeats


def request(number: int, client: str = "me") -> Pending:
    """A request of one small image."""
    return Pending(b"identity", number, np.zeros((1, 2, 2, 3), np.uint8), 0.0, float("inf"), client=client)


def test_a_cancelled_request_does_not_take_its_successor_along() -> None:
    """Cancelled, sent again and then dropped, a request leaves the one that was sent again in its place."""
    known = Repeats()
    first, second = request(1), request(1)
    known.admitted(first)
    known.admitted(second)
    known.refused(first)
    assert known.queued("me", 1) is second
    known.answered(second, [b"answer"])

    assert known.queued("me", 1) is None
    assert known.answer("me", 1) == [b"answer"]


def test_the_memory_is_bounded_and_counts_each_answer_once() -> None:
    """Answers of the same name replace one another; beyond the bound the oldest are forgotten, and only they."""
    known = Repeats()
    large = [bytes(repeats.MAX_BYTES // 4)]
    for _ in range(20):
        known.answered(request(0), large)
    for i in range(1, 4):
        known.answered(request(i), large)
    assert all(known.answer("me", i) for i in range(4))
    known.answered(request(4), large)
    assert [known.answer("me", i) is not None for i in range(5)] == [False, True, True, True, True]
    for i in range(repeats.MAX_ANSWERS + 1):
        known.answered(request(i, "other"), [b"x"])

    assert known.answer("other", 0) is None
    assert known.answer("other", repeats.MAX_ANSWERS) == [b"x"]


def test_without_a_name_nothing_is_remembered() -> None:
    """A client that gives no name may use an id as often as it likes."""
    known = Repeats()
    known.admitted(request(1, ""))
    known.answered(request(1, ""), [b"answer"])

    assert known.queued("", 1) is None
    assert known.answer("", 1) is None
