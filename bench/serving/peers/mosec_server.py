"""The model behind mosec."""

import sys

from mosec import Server, Worker
from session import MAX_BATCH, MAX_WAIT_S, PORT, Model


class Classify(Worker):
    """One process; bytes in, bytes out."""

    def __init__(self) -> None:
        self.model = Model()

    def deserialize(self, data: bytes) -> bytes:
        """As it came."""
        return data

    def serialize(self, data: bytes) -> bytes:
        """As it is."""
        return data

    def forward(self, data: list[bytes] | bytes) -> list[bytes] | bytes:
        """A batch; a lone request where batches are of one."""
        return self.model.run_requests(data) if isinstance(data, list) else self.model.run_requests([data])[0]


if __name__ == "__main__":
    wait_ms = max(1, round(1000 * MAX_WAIT_S))
    sys.argv += ["--port", str(PORT), "--address", "127.0.0.1", "--timeout", "60000", "--capacity", "1024"]
    server = Server()
    server.append_worker(Classify, num=1, max_batch_size=MAX_BATCH, max_wait_time=wait_ms)
    server.run()
