"""The model behind Triton, through PyTriton (its Python backend)."""

import os

import numpy as np
from pytriton.decorators import batch
from pytriton.model_config import DynamicBatcher, ModelConfig, Tensor
from pytriton.triton import Triton, TritonConfig
from session import MAX_BATCH, MAX_WAIT_S, PORT, SHAPE, Model

IMAGES = int(os.environ["SERVING_IMAGES"])  # a request: Triton's batches are of images

if __name__ == "__main__":
    model = Model()

    @batch
    def infer(x: np.ndarray) -> dict[str, np.ndarray]:
        """A batch of images."""
        return {"logits": model.run(x)}

    config = TritonConfig(http_port=PORT, http_address="127.0.0.1", allow_grpc=False, allow_metrics=False)
    with Triton(config=config) as triton:
        triton.bind(
            model_name="model",
            infer_func=infer,
            inputs=[Tensor(name="x", dtype=np.uint8, shape=SHAPE)],
            outputs=[Tensor(name="logits", dtype=np.float32, shape=(-1,))],
            config=ModelConfig(
                max_batch_size=MAX_BATCH * IMAGES,
                batcher=DynamicBatcher(max_queue_delay_microseconds=round(1e6 * MAX_WAIT_S)),
            ),
        )
        triton.serve()
