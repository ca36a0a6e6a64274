"""JPEG and PNG files that clients send: decoded beside the hot path, in a thread that works only where some come.

They wait in a queue like the one before the model: bounded, fair between clients, deadline-aware. What is decoded
goes to the frontend, which queues it for the model.
"""

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt
import structlog

from tta.bundle import Manifest
from tta.errors import CancelledError, DeadlineError, InputError, UnavailableError
from tta.process import take_turns
from tta.server.batcher import Batcher, Pending
from tta.server.options import ServerOptions

WAIT_S = 0.5  # between two looks whether to stop
REQUEST_PIXELS = 150_000_000  # of all files of a request: some seconds of one thread

Array = npt.NDArray[Any]


class Decoder:
    """Turns the files of requests into images.

    Args:
        options: of the server; `decode_threads` files are decoded at a time.
        manifest: how.
        done: called in the decoder's thread with each request and why it failed, if it did.
        log: for what should not happen.
    """

    def __init__(
        self,
        options: ServerOptions,
        manifest: Manifest,
        done: Callable[[Pending, BaseException | None], None],
        log: structlog.typing.FilteringBoundLogger,
    ) -> None:
        self._shape, self._resize = manifest.image_shape, manifest.resize
        self._threads = options.decode_threads
        self._done = done
        self._log = log
        self._thread: threading.Thread | None = None
        self._stopped = False
        self.queue = Batcher(options.decode_threads, 0.0, options.queue_images, options.queue_s)

    def start(self) -> None:
        """Begin, unless it has begun: the first files are there."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="decoder", daemon=True)
            self._thread.start()

    def stop(self) -> None:
        """End after the file that is being decoded."""
        self._stopped = True
        self.queue.close()

    def _run(self) -> None:
        take_turns()
        pool = ThreadPoolExecutor(self._threads, "decode", take_turns)
        while not self._stopped:
            batch, dropped = self.queue.take(WAIT_S)
            for request in dropped:
                self._done(request, _unwanted(request, time.monotonic()))
            if batch:
                try:
                    errors = self._decode(batch, pool)
                except Exception as error:  # no memory, no more threads: these fail, the next may not
                    self._log.exception("decoder_failed", error=str(error))
                    errors = [error] * len(batch)
                for request, why in zip(batch, errors, strict=True):
                    self._done(request, why)
        pool.shutdown(wait=False, cancel_futures=True)

    def _decode(self, batch: Sequence[Pending], pool: ThreadPoolExecutor) -> list[BaseException | None]:
        """Put images in the place of files; for each request why that failed, if it did."""
        start = time.monotonic()
        errors = [self._too_large(request) for request in batch]
        images = [
            np.empty((len(r.files) if e is None else 0, *self._shape), np.uint8)
            for r, e in zip(batch, errors, strict=True)
        ]
        jobs = [(row, number) for row, request in enumerate(batch) for number in range(len(request.files))]
        for first in range(0, len(jobs), self._threads):
            now = time.monotonic()
            wanted = []
            for row, number in jobs[first : first + self._threads]:
                errors[row] = errors[row] or self._ended() or _unwanted(batch[row], now)
                if errors[row] is None:
                    wanted.append((row, number))
            found = pool.map(self._picture, [batch[row].files[number] for row, number in wanted])
            for (row, number), image in zip(wanted, found, strict=True):
                if isinstance(image, BaseException):
                    errors[row] = InputError(f"picture {number + 1} of {len(images[row])}: {image}")
                else:
                    images[row][number] = image
        for request, x, error in zip(batch, images, errors, strict=True):
            if error is None:
                request.x, request.files = x, ()
        together = min(len(jobs), self._threads)
        self.queue.observe(together, (time.monotonic() - start) * together / len(jobs))
        return errors

    def _too_large(self, request: Pending) -> BaseException | None:
        """A few bytes can claim any size; many of them would hold up everybody's."""
        from tta.images import picture_pixels

        total = sum(picture_pixels(file) for file in request.files)
        if total <= REQUEST_PIXELS:
            return None
        return InputError(f"files of {total:,} pixels in one request: at most {REQUEST_PIXELS:,} are decoded")

    def _ended(self) -> BaseException | None:
        return UnavailableError("the server went down", 1.0) if self._stopped else None

    def _picture(self, data: memoryview) -> Array | BaseException:
        from tta.images import decode_picture  # Pillow only where pictures come

        try:
            return decode_picture(data, self._shape, self._resize)
        except (InputError, MemoryError) as error:
            return error


def _unwanted(request: Pending, now: float) -> BaseException | None:
    """Why nobody waits for a request any more, if so."""
    if request.cancelled:
        return CancelledError("cancelled before it started")
    if request.expires < now:
        return DeadlineError("the deadline passed while the files waited to be decoded")
    return None
