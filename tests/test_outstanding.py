"""Where a client's requests go, and when again: no sockets, and a clock that the test turns."""

import numpy as np

from tta import protocol
from tta.errors import Code, DeadlineError, OverloadedError, UnavailableError
from tta.outstanding import FIRST_WINDOW, PROBE_ID, PROBE_S, Outstanding, Send

IMAGES = b"images"


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


def places(sends: list[Send]) -> list[int]:
    """Endpoints of requests that are sent, questions and cancels left out."""
    return [send.endpoint for send in sends if send.request_id is not None]


def one(window: int | None = None, retry_s: float | None = 2.5) -> Outstanding:
    """A client of one endpoint."""
    return Outstanding(1, "me", window, retry_s, lambda: DeadlineError("no answer"))


def add(
    requests: Outstanding, number: int, n: int = 1, expires: float = 100.0, deadline: float = float("inf")
) -> None:
    """Take a request for n images."""
    request = protocol.Predict(id=number, dtype="uint8", shape=[n, 2, 2, 3], client="me")
    requests.add(request, [IMAGES], n, expires, deadline)


def test_the_window_is_what_the_server_grants() -> None:
    """Requests beyond the window wait in order, and the credit of a reply moves it."""
    requests = one()
    for i in range(70):
        add(requests, i, 1, 100.0)
    assert len(requests.advance(0.0)) == FIRST_WINDOW
    assert requests.waiting_images == 6
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
    add(requests, 1, 3, 100.0)
    add(requests, 2, 9, 100.0)
    assert len(requests.advance(0.0)) == 1
    requests.receive(0, ok(1), 0.0)
    assert len(requests.advance(0.0)) == 1


def test_a_refused_request_goes_again_when_told() -> None:
    """Overload sends it again after `retry_after_s`, not before; with no time left, the refusal is the answer."""
    requests = one()
    add(requests, 1, 1, 10.0)
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
    add(requests, 1, 1, 10.0)
    add(requests, 2, 1, 10.0)
    requests.advance(0.0)
    requests.receive(0, refused(1, OverloadedError("full", 2.0)), 1.0)

    assert isinstance(requests.finished[1], OverloadedError)
    assert requests.advance(9.0) == []


def test_silence_sends_a_request_again_and_ends_it() -> None:
    """It goes again every `retry_s`, a late answer counts once, and in the end it is given up."""
    requests = one()
    add(requests, 1, 1, 10.0)
    add(requests, 2, 1, 10.0)
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
    add(requests, 1, 1, 10.0, 1.0)
    assert len(requests.advance(0.0)) == 1
    assert requests.advance(9.0) == []
    requests.receive(0, ok(1), 9.5)

    assert not isinstance(requests.finished[1], Exception)


def test_a_lost_connection_sends_again_at_once() -> None:
    """What was unanswered on it goes again, with the same frames."""
    requests = one()
    add(requests, 1, 1, 10.0)
    requests.advance(0.0)
    requests.lost(0, 1.0)

    (again,) = requests.advance(1.1)
    assert (again.endpoint, again.request_id, again.frames[1:]) == (0, 1, [IMAGES])


def test_without_retry_a_lost_connection_is_the_answer() -> None:
    """A client that does not retry is told at once that no answer will come."""
    requests = one(retry_s=None)
    add(requests, 1)
    requests.advance(0.0)
    requests.lost(0, 1.0)

    assert isinstance(requests.finished[1], UnavailableError)
    assert requests.advance(50.0) == []


def test_endpoints_share_the_load_and_a_silent_one_is_left_out() -> None:
    """Only endpoints that have answered get requests; one that falls silent gets none until it answers again."""
    requests = Outstanding(3, "me", None, 2.5, lambda: DeadlineError("no answer"))
    for i in range(6):
        add(requests, i, 1, 100.0)
    assert places(requests.advance(0.0)) == []
    requests.receive(0, ready(), 0.1)
    requests.receive(1, ready(), 0.1)
    assert sorted(places(requests.advance(0.1))) == [0, 0, 0, 1, 1, 1]
    for i in (1, 3, 5):  # in turn: the others went to endpoint 0
        requests.receive(1, ok(i), 0.2)
    again = requests.advance(2.7)
    assert places(again) == [1, 1, 1]  # what endpoint 0 did not answer
    assert [s.endpoint for s in again if b"cancel" in s.frames[0]] == [0, 0, 0]  # which is told to forget it
    assert [s.endpoint for s in requests.advance(2.7 + PROBE_S)] == [0, 2]  # both are asked again
    requests.receive(0, ready(), 4.0)
    add(requests, 6, 1, 100.0)

    assert places(requests.advance(4.0)) == [0]


def test_a_draining_server_is_left_for_another_at_once() -> None:
    """UNAVAILABLE moves the request to another endpoint without waiting."""
    requests = Outstanding(2, "me", None, 2.5, lambda: DeadlineError("no answer"))
    requests.advance(0.0)
    requests.receive(0, ready(), 0.0)
    requests.receive(1, ready(), 0.0)
    add(requests, 1, 1, 10.0)
    (first,) = places(requests.advance(0.0))
    requests.receive(first, refused(1, UnavailableError("draining", 1.0)), 0.5)

    assert places(requests.advance(0.5)) == [1 - first]


def test_cancel_tells_where_the_request_is() -> None:
    """One that was sent is cancelled at its server, one that waits here is finished here."""
    requests = one(window=1)
    add(requests, 1, 1, 10.0)
    add(requests, 2, 1, 10.0)
    requests.advance(0.0)

    cancel = requests.cancel(1)
    assert cancel is not None
    assert cancel.endpoint == 0
    assert requests.cancel(2) is None
    assert requests.finished[2].code == Code.CANCELLED
    requests.receive(0, protocol.encode({"v": 1, "id": 1, "code": 0, "cancelled": True}), 0.1)
    assert 1 not in requests.finished
    assert places(requests.advance(9.0)) == []  # and it is not sent again


def test_a_slow_endpoint_is_not_silent() -> None:
    """While it answers others, a request waits; once it has said nothing for `retry_s`, the request goes again."""
    requests = one()
    add(requests, 0)
    add(requests, 1)
    requests.advance(0.0)
    requests.receive(0, ok(0), 2.0)
    assert requests.advance(2.6) == []
    assert places(requests.advance(4.5)) == [0]


def test_an_answer_that_others_have_overtaken_is_asked_for_again() -> None:
    """Answers come in order: one without, while later requests are answered, goes again when it is due."""
    requests = one(retry_s=2.5)
    add(requests, 1)
    requests.advance(0.0)
    add(requests, 2)
    requests.advance(0.1)
    requests.receive(0, ok(2), 0.2)
    assert requests.advance(2.4) == []
    add(requests, 3)
    requests.advance(2.4)
    requests.receive(0, ok(3), 2.45)

    assert [send.request_id for send in requests.advance(2.6)] == [1]
    requests.receive(0, ok(1), 2.7)
    assert sorted(requests.finished) == [1, 2, 3]


def test_what_a_silent_endpoint_has_goes_to_another_though_it_was_overtaken() -> None:
    """An endpoint that has answered something later and then says nothing more is left like any other."""
    requests = Outstanding(2, "me", 64, 2.5, lambda: DeadlineError("no answer"))
    for endpoint in (0, 1):
        requests.receive(endpoint, ready(), 0.0)
    add(requests, 1)
    first = places(requests.advance(0.0))[0]
    add(requests, 2)
    add(requests, 3)
    sends = {send.request_id: send.endpoint for send in requests.advance(0.1)}
    for number, endpoint in sends.items():
        assert number is not None
        requests.receive(endpoint, ok(number), 0.2 if endpoint == first else 2.9)

    moved = [s for s in requests.advance(3.0) if s.request_id == 1]
    assert [s.endpoint for s in moved] == [1 - first]


def test_only_the_endpoint_that_has_a_request_may_refuse_it() -> None:
    """A late refusal of one it has left changes nothing; a late answer of it is an answer."""
    requests = Outstanding(2, "me", None, 2.5, lambda: DeadlineError("no answer"))
    requests.advance(0.0)
    requests.receive(0, ready(), 0.0)
    add(requests, 1)
    assert places(requests.advance(0.0)) == [0]
    requests.receive(1, ready(), 2.4)
    assert places(requests.advance(2.5)) == [1]
    requests.receive(0, refused(1, DeadlineError("too late")), 2.6)
    assert 1 not in requests.finished
    requests.receive(0, ok(1), 2.7)
    assert not isinstance(requests.finished[1], Exception)


def test_what_cannot_be_sent_is_tried_again_in_order() -> None:
    """Without a connection requests keep their order, are tried ever more seldom, and given up in the end."""
    requests = one()
    for i in range(3):
        add(requests, i, expires=10.0)
    tries, now = 0, 0.0
    while now < 5.0:
        sends = requests.advance(now)
        assert [s.request_id for s in sends] in ([0, 1, 2], [])
        tries += bool(sends)
        for send in sends:
            requests.unsent(send, now)
        now = max(now + 0.001, requests.wake_at())
    assert 20 < tries < 40
    requests.advance(10.0)
    assert all(isinstance(requests.finished[i], DeadlineError) for i in range(3))


def test_a_deadline_counts_from_when_the_request_was_made() -> None:
    """The server is told what is left of it when it is sent; with nothing left it is not sent."""
    requests = one(window=1)
    add(requests, 0)
    add(requests, 1, deadline=5.0)
    add(requests, 2, deadline=3.0)
    requests.advance(0.0)
    requests.receive(0, ok(0), 4.0)
    (send,) = requests.advance(4.0)
    assert protocol.decode_data(send.frames).deadline_s == 1.0
    requests.receive(0, ok(1), 4.5)
    assert requests.advance(4.5) == []
    assert isinstance(requests.finished[2], DeadlineError)
