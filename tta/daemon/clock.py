"""Wall time that never goes back, whatever is done to the clock: prediction ids are made of it."""

import time


def wall_us() -> int:
    """Microseconds since the epoch, as the system has it."""
    return time.time_ns() // 1000


class Clock:
    """Microseconds since the epoch, at least as many as ever before.

    Where the wall clock is set back, or starts at 1970 with every boot, it goes on by the monotonic clock from the
    latest time it knows.
    """

    def __init__(self) -> None:
        self._base_us, self._at_ns = 0, time.monotonic_ns()

    def advance(self, time_us: int) -> None:
        """It is at least so late: what a process before us has said."""
        if time_us > self.now_us():
            self._base_us, self._at_ns = time_us, time.monotonic_ns()

    def now_us(self) -> int:
        """The time."""
        now_ns = time.monotonic_ns()
        passed, wall = self._base_us + (now_ns - self._at_ns) // 1000, wall_us()
        self._base_us, self._at_ns = max(passed, wall), now_ns
        return self._base_us
