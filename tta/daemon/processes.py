"""Start, watch, restart and stop the other processes.

The server runs in its own session and outlives the daemon: a restarted daemon adopts it. Shadow and adapter
die with the daemon. A process that keeps dying is restarted ever more slowly.
"""

import hashlib
import os
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import structlog

from tta.errors import ConfigError
from tta.process import is_alive

BACKOFF_S = (0.0, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)
STEADY_S = 60.0  # seconds alive after which a process is no longer in a crash loop
IPC_PATH_LIMIT = 84  # a Unix socket's path may have 107 bytes

Logger = structlog.typing.FilteringBoundLogger


def runtime_folder(state: Path) -> Path:
    """Where sockets and hand-over files lie: below the state folder unless its path is too long for a socket.

    Raises:
        ConfigError: somebody else has made it, or may write there.
    """
    folder = state.resolve() / "run"
    if len(str(folder)) > IPC_PATH_LIMIT:
        digest = hashlib.sha256(str(folder).encode()).hexdigest()[:16]
        folder = Path(tempfile.gettempdir()) / f"tta-{os.getuid()}-{digest}"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o022:
        raise ConfigError(f"{folder} is not a folder of this user's that nobody else may write: remove it")
    return folder


class Process:
    """One supervised process.

    Args:
        name: in logs, status and metrics.
        argv: makes the arguments for `python`, anew at each start.
        detached: give it a session of its own, so that it outlives us.
        keep: restart it when it ends.
    """

    def __init__(
        self,
        name: str,
        argv: Callable[[], Sequence[str]],
        log: Logger,
        detached: bool = False,
        keep: bool = True,
    ) -> None:
        self.name = name
        self.detached = detached
        self.keep = keep
        self.restarts = 0
        self.ready = False
        self.pid: int | None = None
        self._argv = argv
        self._log = log
        self._child: subprocess.Popen[bytes] | None = None
        self._started = 0.0
        self._failures = 0
        self._retry_at = 0.0

    def start(self) -> None:
        """Start it now."""
        self._child = subprocess.Popen(
            [sys.executable, *self._argv()],
            stdin=subprocess.DEVNULL,
            start_new_session=self.detached,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"},
        )
        self.pid = self._child.pid
        self._started = time.monotonic()
        self.ready = False
        self._log.info("process_started", name=self.name, pid=self.pid)

    def adopt(self, pid: int, ready: bool = True) -> None:
        """Take over a process that another daemon, or something else of this one's, has started."""
        self._child, self.pid, self.ready = None, pid, ready
        self._started = time.monotonic()
        self._log.info("process_adopted", name=self.name, pid=pid)

    @property
    def alive(self) -> bool:
        """Whether it runs."""
        if self._child is not None:
            return self._child.poll() is None
        return self.pid is not None and is_alive(self.pid)

    @property
    def exit_status(self) -> int | None:
        """How it ended, if we started it and it did."""
        return None if self._child is None else self._child.poll()

    def supervise(self) -> bool:
        """Restart it if it ended and should run; True if it was found dead just now."""
        if self.pid is None or self.alive:
            if self.alive and self._failures and time.monotonic() - self._started > STEADY_S:
                self._failures = 0
            if self.pid is None and self.keep and self._retry_at and time.monotonic() >= self._retry_at:
                self.restarts += 1
                self.start()
            return False
        status = self.exit_status
        self._log.error("process_died", name=self.name, pid=self.pid, exit_status=status)
        self.pid, self.ready = None, False
        delay = BACKOFF_S[min(self._failures, len(BACKOFF_S) - 1)]
        self._failures += 1
        self._retry_at = time.monotonic() + delay
        return True

    @property
    def age_s(self) -> float:
        """Seconds since it was started or adopted; 0 while there is none."""
        return time.monotonic() - self._started if self.pid is not None else 0.0

    def terminate(self) -> None:
        """SIGTERM, without waiting; `stop` has to follow."""
        if self.pid is not None:
            _signal(self.pid, signal.SIGTERM)

    def stop(self, timeout_s: float, signum: int = signal.SIGTERM) -> None:
        """End it, waiting up to `timeout_s` before killing it."""
        if self.pid is None:
            return
        pid, self.pid = self.pid, None
        self._retry_at, self.ready = 0.0, False
        _signal(pid, signum)
        end = time.monotonic() + timeout_s
        while time.monotonic() < end and self._runs(pid):
            time.sleep(0.02)
        if self._runs(pid):
            self._log.warning("process_killed", name=self.name, pid=pid)
            _signal(pid, signal.SIGKILL)
            if self._child is not None:
                self._child.wait(5)

    def kill(self) -> None:
        """Kill -9; `supervise` finds it dead and starts another."""
        if self.pid is not None:
            _signal(self.pid, signal.SIGKILL)

    def _runs(self, pid: int) -> bool:
        return self._child.poll() is None if self._child is not None else is_alive(pid)


def _signal(pid: int, signum: int) -> None:
    try:
        os.kill(pid, signum)
    except ProcessLookupError:
        return
