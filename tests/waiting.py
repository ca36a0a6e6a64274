"""Wait for what must happen, with a deadline; never for a length of time."""

import select
import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def until(condition: Callable[[], T], what: str, timeout_s: float = 60.0) -> T:
    """The first true value of a condition.

    Raises:
        TimeoutError: it did not become true.
    """
    end = time.monotonic() + timeout_s
    while time.monotonic() < end:
        value = condition()
        if value:
            return value
        select.select([], [], [], 0.05)
    raise TimeoutError(f"{what} did not happen within {timeout_s} s")
