"""What every worker process does first: lower its priority and die with its parent."""

import ctypes
import os
import signal

_PR_SET_PDEATHSIG = 1


def become_worker(nice: int, parent: int) -> None:
    """Be nice, and be killed when the daemon is: a restarted daemon starts its own workers.

    Args:
        nice: 0 to 19.
        parent: pid of the daemon; in a container it may well be 1.
    """
    os.nice(nice)
    try:
        ctypes.CDLL("libc.so.6", use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    except (OSError, AttributeError):  # not Linux: the worker notices when its socket stays silent
        return
    if os.getppid() != parent:  # it died before the call above
        os._exit(1)
