"""What a worker process does to itself."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.slices import needs_slices, slice_ns
from tests.waiting import until
from tta.daemon.processes import is_alive
from tta.process import LONG_SLICE_NS

WORKER = """
import os, sys
from tta.process import become_worker
become_worker(7, int(sys.argv[1]))
print(os.getpid(), flush=True)
sys.stdin.read()
"""


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="Linux only")
def test_a_worker_is_nice_as_a_session_of_its_own() -> None:
    """Its niceness, its session's where the kernel groups by session, and its policy let others go first."""
    argv = [sys.executable, "-c", WORKER, str(os.getpid())]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as worker:
        assert worker.stdout is not None
        pid = int(worker.stdout.readline())
        nice = os.getpriority(os.PRIO_PROCESS, pid)
        policy = os.sched_getscheduler(pid)
        group = Path(f"/proc/{pid}/autogroup")
        session = os.getsid(pid)
        grouped = group.read_text().split() if group.exists() else []
        worker.kill()

    assert nice == min(19, os.nice(0) + 7)
    assert policy == os.SCHED_BATCH
    if grouped:
        assert session == pid
        assert grouped[1:] == ["nice", "7"]


@needs_slices
def test_a_worker_lets_whoever_wakes_go_first() -> None:
    """It asks the kernel for slices longer than anybody's, by which those that wake are let in before it."""
    argv = [sys.executable, "-c", WORKER, str(os.getpid())]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as worker:
        assert worker.stdout is not None
        its = slice_ns(int(worker.stdout.readline()))
        worker.kill()

    assert its == LONG_SLICE_NS > slice_ns(0)


def test_a_worker_dies_with_its_parent() -> None:
    """Kill -9 of the process that started it ends the worker, in a session of its own or not."""
    parent = f"""
import os, subprocess, sys
worker = subprocess.Popen([sys.executable, "-c", {WORKER!r}, str(os.getpid())], stdin=subprocess.PIPE)
worker.wait()
"""
    with subprocess.Popen([sys.executable, "-c", parent], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        worker = int(process.stdout.readline())
        process.send_signal(signal.SIGKILL)
        rest = process.stdout.read()  # ends when the last process that holds the pipe has ended

    assert rest == ""
    until(lambda: not is_alive(worker), "the end of the worker", 10)
