"""The model behind BentoML, which takes no raw bytes from outside: base64 in JSON."""

import base64

import bentoml
from session import MAX_BATCH, Model


@bentoml.service(workers=1, traffic={"timeout": 60, "max_concurrency": 1024}, metrics={"enabled": False})
class Classify:
    """One string a request in, one out."""

    def __init__(self) -> None:
        self.model = Model()

    # Its latency is of the whole request, and it refuses what would take longer: this is room, not waiting.
    @bentoml.api(batchable=True, max_batch_size=MAX_BATCH, max_latency_ms=60_000)
    def predict(self, bodies: list[str]) -> list[str]:
        """A batch."""
        logits = self.model.run_requests([base64.b64decode(body) for body in bodies])
        return [base64.b64encode(part).decode() for part in logits]
