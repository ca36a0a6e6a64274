"""Leave part of the time to others: niceness means nothing on a GPU, where kernels of two processes take turns."""

import time
from collections.abc import Callable


class Pace:
    """Pauses after each step, so that at most `share` of the time is worked.

    Args:
        share: 0 to 1; 1 never pauses.
        finish: waits until what was asked of the device is done.
        clock: monotonic seconds.
        sleep: for so many seconds.
    """

    def __init__(
        self,
        share: float,
        finish: Callable[[], object] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], object] = time.sleep,
    ) -> None:
        self.share = share
        self._finish = finish
        self._clock = clock
        self._sleep = sleep
        self._since = clock()

    def begin(self) -> None:
        """Work begins: what was before was waiting for it."""
        self._since = self._clock()

    def step(self, *_: object) -> None:
        """After a step of the optimiser; whatever it is called with is of no interest."""
        if self.share >= 1:
            return
        self._finish()
        self._sleep((self._clock() - self._since) * (1 / self.share - 1))
        self._since = self._clock()
