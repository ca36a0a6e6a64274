"""Where a client's requests go, and when again: no sockets, and a clock that the test turns."""

import numpy as np

from tta import protocol
from tta.errors import Code, DeadlineError, OverloadedError, UnavailableError
from tta.outstanding import FIRST_WINDOW, PROBE_ID, PROBE_S, Outstanding

FRAMES = [b"header", b"images"]


def ok(request_id: int | str, credit: int = FIRST_WINDOW) -> list[bytes]:
    """An answer."""
    header = {"v": 1, "id": request_id, "code": 0, "credit": credit, "shape": [1, 2]}
    return protocol.encode(header, np.zeros((1, 2), np.float32))


def refused(request_id: int, error: Exception) -> list[bytes]:
    """A refusal."""
    return protocol.encode(protocol.error_reply(request_id, error))


def ready(value: bool = True) -> list[bytes]:
    """The answer to the question whether an endpoint is usable."""
    return protocol.encode({"v": 1, "id": PROBE_ID, "code": 0, "ready": value})


def places(sends: list) -> list[int]:
    """Endpoints of requests that are sent, questions left out."""
    return [endpoint for endpoint, frames in sends if frames is FRAMES]


def one(window: int | None = None, retry_s: float | None = 2.5) -> Outstanding:
    """A client of one endpoint."""
    return Outstanding(1, window, retry_s, "no answer")


def test_the_window_is_what_the_server_grants() -> None:
    """Requests beyond the window wait in order, and the credit of a reply moves it."""
    requests = one()
    for i in range(70):
        requests.add(i, FRAMES, 1, 100.0, 100.0)
    assert len(requests.advance(0.0)) == FIRST_WINDOW
    assert requests.is_waiting(64)
    requests.receive(0, ok(0, credit=66), 0.0)
    assert len(requests.advance(0.0)) == 3  # 63 unanswered, 66 granted
    requests.receive(0, ok(1, credit=10), 0.0)
    for i in range(2, 57):
        requests.receive(0, ok(i, credit=10), 0.0)
    assert requests.advance(0.0) == []
    requests.receive(0, ok(57, credit=10), 0.0)
    assert len(requests.advance(0.0)) == 1
    assert list(requests.finished) == list(range(58))


def test_a_request_larger_than_the_window_goes_alone() -> None:
    """What can never fit goes when nothing else is unanswered, and is not stuck."""
    requests = one(window=4)
    requests.add(1, FRAMES, 3, 100.0, 100.0)
    requests.add(2, FRAMES, 9, 100.0, 100.0)
    assert len(requests.advance(0.0)) == 1
    requests.receive(0, ok(1), 0.0)
    assert len(requests.advance(0.0)) == 1


def test_a_refused_request_goes_again_when_told() -> None:
    """Overload sends it again after `retry_after_s`, not before; with no time left, the refusal is the answer."""
    requests = one()
    requests.add(1, FRAMES, 1, 10.0, 10.0)
    requests.advance(0.0)
    requests.receive(0, refused(1, OverloadedError("full", 2.0)), 1.0)
    assert requests.advance(2.9) == []
    assert 3.0 <= requests.wake_at() <= 3.5
    assert len(requests.advance(3.5)) == 1
    requests.receive(0, refused(1, OverloadedError("still full", 9.0)), 4.0)

    assert isinstance(requests.finished[1], OverloadedError)
    assert "still full" in str(requests.finished[1])


def test_without_retry_a_refusal_is_the_answer() -> None:
    """A client that does not retry is told at once and sends nothing twice."""
    requests = one(retry_s=None)
    requests.add(1, FRAMES, 1, 10.0, 10.0)
    requests.add(2, FRAMES, 1, 10.0, 10.0)
    requests.advance(0.0)
    requests.receive(0, refused(1, OverloadedError("full", 2.0)), 1.0)

    assert isinstance(requests.finished[1], OverloadedError)
    assert requests.advance(9.0) == []


def test_silence_sends_a_request_again_and_ends_it() -> None:
    """It goes again every `retry_s`, a late answer counts once, and in the end it is given up."""
    requests = one()
    requests.add(1, FRAMES, 1, 10.0, 10.0)
    requests.add(2, FRAMES, 1, 10.0, 10.0)
    sent = sum(len(requests.advance(t / 10)) for t in range(100))
    requests.receive(0, ok(1), 9.95)
    requests.receive(0, ok(1), 9.96)
    requests.advance(10.0)

    assert sent == 8  # four times each
    assert not isinstance(requests.finished[1], Exception)
    assert isinstance(requests.finished[2], DeadlineError)
    assert requests.wake_at() == float("inf")


def test_a_deadline_ends_the_trying_not_the_waiting() -> None:
    """After its deadline a request is not sent again, but an answer on its way still counts."""
    requests = one()
    requests.add(1, FRAMES, 1, 10.0, 1.0)
    assert len(requests.advance(0.0)) == 1
    assert requests.advance(9.0) == []
    requests.receive(0, ok(1), 9.5)

    assert not isinstance(requests.finished[1], Exception)


def test_a_lost_connection_sends_again_at_once() -> None:
    """What was unanswered on it goes again, with the same frames."""
    requests = one()
    requests.add(1, FRAMES, 1, 10.0, 10.0)
    requests.advance(0.0)
    requests.lost(0, 1.0)

    assert requests.advance(1.1) == [(0, FRAMES)]


def test_endpoints_share_the_load_and_a_silent_one_is_left_out() -> None:
    """Only endpoints that have answered get requests; one that falls silent gets none until it answers again."""
    requests = Outstanding(3, None, 2.5, "no answer")
    for i in range(6):
        requests.add(i, FRAMES, 1, 100.0, 100.0)
    assert places(requests.advance(0.0)) == []
    requests.receive(0, ready(), 0.1)
    requests.receive(1, ready(), 0.1)
    assert sorted(places(requests.advance(0.1))) == [0, 0, 0, 1, 1, 1]
    on_0 = [i for i in range(6) if requests.cancel(i) == 0]
    for i in set(range(6)) - set(on_0):
        requests.receive(1, ok(i), 0.2)
    assert places(requests.advance(2.7)) == [1, 1, 1]  # what endpoint 0 did not answer
    assert [e for e, _ in requests.advance(2.7 + PROBE_S)] == [0, 2]  # both are asked again
    requests.receive(0, ready(), 4.0)
    requests.add(6, FRAMES, 1, 100.0, 100.0)

    assert places(requests.advance(4.0)) == [0]


def test_a_draining_server_is_left_for_another_at_once() -> None:
    """UNAVAILABLE moves the request to another endpoint without waiting."""
    requests = Outstanding(2, None, 2.5, "no answer")
    requests.advance(0.0)
    requests.receive(0, ready(), 0.0)
    requests.receive(1, ready(), 0.0)
    requests.add(1, FRAMES, 1, 10.0, 10.0)
    (first,) = places(requests.advance(0.0))
    requests.receive(first, refused(1, UnavailableError("draining", 1.0)), 0.5)

    assert places(requests.advance(0.5)) == [1 - first]


def test_cancel_tells_where_the_request_is() -> None:
    """One that was sent is cancelled at its server, one that waits here is finished here."""
    requests = one(window=1)
    requests.add(1, FRAMES, 1, 10.0, 10.0)
    requests.add(2, FRAMES, 1, 10.0, 10.0)
    requests.advance(0.0)

    assert requests.cancel(1) == 0
    assert requests.cancel(2) is None
    assert requests.finished[2].code == Code.CANCELLED
    requests.receive(0, protocol.encode({"v": 1, "id": 1, "code": 0, "cancelled": True}), 0.1)
    assert 1 not in requests.finished
