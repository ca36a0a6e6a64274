"""JPEG and PNG files that clients send: decoded beside the hot path, in a thread that works only where some come.

They wait in a queue like the one before the model: bounded, fair between clients, deadline-aware. What is decoded
goes to the frontend, which queues it for the model.
"""

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt

from tta.bundle import Manifest
from tta.errors import CancelledError, DeadlineError, InputError, TTAError
from tta.server.batcher import Batcher, Pending
from tta.server.options import ServerOptions

Array = npt.NDArray[Any]

WAIT_S = 0.5  # between two looks whether to stop


class Decoder:
    """Turns the files of requests into images.

    Args:
        options: of the server; `decode_threads` files are decoded at a time.
        manifest: how.
        done: called in the decoder's thread with each request and why it failed, if it did.
    """

    def __init__(
        self, options: ServerOptions, manifest: Manifest, done: Callable[[Pending, BaseException | None], None]
    ) -> None:
        self._shape, self._resize = manifest.image_shape, manifest.resize
        self._threads = options.decode_threads
        self._done = done
        self._thread: threading.Thread | None = None
        self._stopped = False
        self.queue = Batcher(options.decode_threads, 0.0, options.queue_images, options.queue_s)

    def start(self) -> None:
        """Begin, unless it has begun: the first files are there."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="decoder", daemon=True)
            self._thread.start()

    def stop(self) -> None:
        """End after the request that is being decoded."""
        self._stopped = True
        self.queue.close()

    def _run(self) -> None:
        with ThreadPoolExecutor(self._threads, "decode") as pool:
            while not self._stopped:
                batch, dropped = self.queue.take(WAIT_S)
                for request in dropped:
                    late = DeadlineError("the deadline passed while the files waited to be decoded")
                    self._done(
                        request, CancelledError("cancelled before it started") if request.cancelled else late
                    )
                start = time.monotonic()
                decoding = [(request, [pool.submit(self._picture, f) for f in request.files]) for request in batch]
                for request, images in decoding:
                    self._done(request, self._gather(request, images))
                if batch:
                    self.queue.observe(sum(len(request.x) for request in batch), time.monotonic() - start)

    def _gather(self, request: Pending, images: "list[Future[Array]]") -> BaseException | None:
        """Put images in the place of a request's files; the error, if one of them is none."""
        x = np.empty((len(images), *self._shape), np.uint8)
        for number, image in enumerate(images):
            try:
                x[number] = image.result()
            except (TTAError, MemoryError) as error:
                return InputError(f"picture {number + 1} of {len(x)}: {error}")
        request.x, request.files = x, ()
        return None

    def _picture(self, data: memoryview) -> Array:
        from tta.images import decode_picture  # Pillow only where pictures come

        return decode_picture(data, self._shape, self._resize)
