"""What every process does for itself: its priority, its end with its parent, its files, its memory."""

import contextlib
import ctypes
import os
import platform
import resource
import signal
import struct
import time
from pathlib import Path

AUTOGROUP_ATTEMPTS = 20
SHORT_SLICE_NS, LONG_SLICE_NS = 100_000, 100_000_000  # the shortest and the longest that the kernel gives
_PR_SET_PDEATHSIG = 1
_SCHED_SETATTR = {"x86_64": 314, "aarch64": 274}  # sched_getattr is the next
_SCHED_ATTR = struct.Struct("IIQiIQQQ")  # size, policy, flags, nice, priority, runtime, deadline, period


def become_worker(nice: int, parent: int) -> None:
    """Be nice, and be killed when the daemon is: a restarted daemon starts its own workers.

    Args:
        nice: 0 to 19.
        parent: pid of the daemon; in a container it may well be 1.
    """
    os.nice(nice)
    give_way()
    _be_nice_as_a_session(nice)
    die_with(parent)


def give_way() -> None:
    """Let whoever wakes run at once instead of this thread; its share of the time stays what niceness says.

    Beside a server at half load, p99 while the adapter trains was 2.9 times the steady one before, and 1.7 to 2.2
    times since (`bench.swap`); SCHED_IDLE changed nothing.
    """
    if hasattr(os, "SCHED_BATCH"):  # woken, it does not push aside whoever runs
        with contextlib.suppress(OSError):  # under another policy already
            os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
    _ask_for_slices(LONG_SLICE_NS)


def go_first() -> None:
    """Have this thread, and those that it starts, run as soon as they wake: for short work only."""
    _ask_for_slices(SHORT_SLICE_NS)


def take_turns() -> None:
    """Have this thread run as others do, whose parent does `go_first`."""
    _ask_for_slices(0)


def _ask_for_slices(ns: int) -> None:
    """How long this thread runs before others have their turn; 0: as the kernel sees fit.

    Who wakes goes before who asks for longer ones: since Linux 6.12.
    """
    number = _SCHED_SETATTR.get(platform.machine())
    if number is None or platform.system() != "Linux":
        return
    libc, found = ctypes.CDLL(None), ctypes.create_string_buffer(_SCHED_ATTR.size)
    if libc.syscall(number + 1, 0, found, _SCHED_ATTR.size, 0):
        return
    size, policy, flags, nice, priority, _, *rest = _SCHED_ATTR.unpack(found.raw)
    libc.syscall(number, 0, _SCHED_ATTR.pack(size, policy, flags, nice, priority, ns, *rest), 0)


def die_with(parent: int) -> None:
    """Be killed when the process that has started this one ends, whose pid `parent` is."""
    if not _on_death_of_parent(signal.SIGKILL):
        return
    if os.getppid() != parent:  # it died before the call above
        os._exit(1)


def outlive_parent() -> None:
    """Go on when it ends."""
    _on_death_of_parent(0)


def _on_death_of_parent(signum: int) -> bool:
    """Whether the system sends this signal then; 0 for none."""
    try:
        ctypes.CDLL("libc.so.6", use_errno=True).prctl(_PR_SET_PDEATHSIG, signum)
    except (OSError, AttributeError):  # not Linux: the worker notices when its socket stays silent
        return False
    return True


def _be_nice_as_a_session(nice: int) -> None:
    """Where the kernel groups processes by session (autogroup), niceness counts only within a session.

    The server has a session of its own, so a niced process of another gets as much of a core as it does. A session
    of the worker's own, as nice as the worker, does what was meant.
    """
    group = Path("/proc/self/autogroup")
    if not group.exists():
        return
    try:
        os.setsid()
    except PermissionError:  # it leads a group already, as when started by hand
        return
    for _ in range(AUTOGROUP_ATTEMPTS):
        try:
            group.write_text(str(nice))
        except BlockingIOError:  # the kernel takes one such change in a tenth of a second
            time.sleep(0.1)
        except OSError:  # not ours to set
            return
        else:
            return


def is_alive(pid: int) -> bool:
    """Whether a process exists and is not a zombie."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        return state not in ("Z", "X")
    except OSError:
        try:
            os.kill(pid, 0)
        except OSError:
            return False
        return not Path("/proc/self/stat").exists()


def memory_bytes(pid: int) -> int:
    """What a process has in memory, shared pages included; 0 if there is none, or no way to know."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * resource.getpagesize()
    except OSError:
        return 0


def allow_files() -> None:
    """Let this process have as many files and sockets as it may: libzmq ends one that cannot accept any more."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def release_memory() -> None:
    """Give freed memory back to the system; the allocator alone keeps what large work has left in its heaps."""
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    except (OSError, AttributeError):  # not glibc: the allocator does what it does
        return
