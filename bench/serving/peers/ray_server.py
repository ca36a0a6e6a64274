"""The model behind Ray Serve."""

import time

import ray
from ray import serve
from session import MAX_BATCH, MAX_WAIT_S, PORT, Model
from starlette.requests import Request
from starlette.responses import Response


@serve.deployment(num_replicas=1, max_ongoing_requests=256, ray_actor_options={"num_cpus": 1})
class Classify:
    """Bytes in, bytes out."""

    def __init__(self) -> None:
        self.model = Model()

    @serve.batch(max_batch_size=MAX_BATCH, batch_wait_timeout_s=MAX_WAIT_S)
    async def run(self, bodies: list[bytes]) -> list[bytes]:
        """A batch."""
        return self.model.run_requests(bodies)

    async def __call__(self, request: Request) -> Response:
        """One request."""
        return Response(await self.run(await request.body()), media_type="application/octet-stream")


if __name__ == "__main__":
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    serve.start(http_options={"host": "127.0.0.1", "port": PORT})
    serve.run(Classify.bind())
    while True:
        time.sleep(3600)
