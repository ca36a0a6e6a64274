"""The model behind LitServe."""

from typing import Annotated, Any

import litserve as ls
from fastapi import Body, Response
from session import MAX_BATCH, MAX_WAIT_S, PORT, Model


class Classify(ls.LitAPI):
    """Bytes in, bytes out."""

    def setup(self, device: str) -> None:
        """In the worker."""
        self.model = Model()

    def decode_request(self, request: Annotated[bytes, Body(media_type="application/octet-stream")]) -> bytes:
        """As it came."""
        return request

    def batch(self, inputs: list[bytes]) -> list[bytes]:
        """The model joins them."""
        return inputs

    def unbatch(self, output: list[bytes]) -> list[bytes]:
        """It has split them."""
        return output

    def predict(self, x: Any) -> Any:
        """A batch; a lone request where batches are of one."""
        return self.model.run_requests(x) if isinstance(x, list) else self.model.run_requests([x])[0]

    def encode_response(self, output: bytes) -> Response:
        """As it is."""
        return Response(output, media_type="application/octet-stream")


if __name__ == "__main__":
    api = Classify(max_batch_size=MAX_BATCH, batch_timeout=MAX_WAIT_S)
    server = ls.LitServer(api, accelerator="cpu", workers_per_device=1, timeout=60, fast_queue=True)
    server.run(host="127.0.0.1", port=PORT, num_api_servers=1, log_level="warning", generate_client_file=False)
