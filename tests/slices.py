"""How long the kernel lets a thread run before others have their turn."""

import ctypes
import platform
import re

import pytest

from tta.process import _SCHED_ATTR, _SCHED_SETATTR

_KERNEL = tuple(int(n) for n in re.findall(r"\d+", platform.release())[:2])

needs_slices = pytest.mark.skipif(
    platform.system() != "Linux" or _KERNEL < (6, 12) or platform.machine() not in _SCHED_SETATTR,
    reason="slices can be asked for since Linux 6.12",
)


def slice_ns(thread: int) -> int:
    """What sched_getattr(2) says of a thread; 0: the calling one."""
    found = ctypes.create_string_buffer(_SCHED_ATTR.size)
    call = _SCHED_SETATTR[platform.machine()] + 1
    assert ctypes.CDLL(None).syscall(call, thread, found, _SCHED_ATTR.size, 0) == 0
    return int(_SCHED_ATTR.unpack(found.raw)[5])
