"""Requests that a client sends again because the answer was late: computed once, answered as often as asked.

A client that wants this names itself (`client` in the header, random) and repeats the same `id`. Owned by the
frontend.
"""

from collections import OrderedDict

from tta.server.batcher import Pending

MAX_ANSWERS = 4096
MAX_BYTES = 32 << 20  # of remembered answers; the oldest are forgotten first

_Name = tuple[str, int | str]


class Repeats:
    """What has become of the requests of clients that have named themselves."""

    def __init__(self) -> None:
        self._queued: dict[_Name, Pending] = {}
        self._answers: OrderedDict[_Name, list[bytes]] = OrderedDict()
        self._bytes = 0

    def answer(self, client: str, request_id: int | str) -> list[bytes] | None:
        """The frames with which this request was answered, if it was."""
        return self._answers.get((client, request_id))

    def queued(self, client: str, request_id: int | str) -> Pending | None:
        """This request, if it is admitted and not answered yet."""
        return self._queued.get((client, request_id))

    def admitted(self, request: Pending) -> None:
        """Know a request while it waits."""
        if request.client:
            self._queued[request.client, request.request_id] = request

    def answered(self, request: Pending, frames: list[bytes]) -> None:
        """Remember what a request was answered."""
        if not request.client:
            return
        self.refused(request)
        name = (request.client, request.request_id)
        self._bytes += sum(map(len, frames)) - sum(map(len, self._answers.pop(name, [])))
        self._answers[name] = frames
        while len(self._answers) > MAX_ANSWERS or self._bytes > MAX_BYTES:
            self._bytes -= sum(map(len, self._answers.popitem(last=False)[1]))

    def refused(self, request: Pending) -> None:
        """Forget a request that was not computed: sent again, it is tried anew."""
        name = (request.client, request.request_id)
        if self._queued.get(name) is request:  # else it was cancelled and sent again
            del self._queued[name]
