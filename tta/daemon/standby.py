"""Servers that are warm before they are needed: those before them serve until then.

They have options of their own beside those of the server that they are to succeed, and die with the daemon until
they are told to.
"""

import time
from collections.abc import Mapping
from pathlib import Path

import msgspec
import zmq

from tta.daemon.processes import Logger, Process
from tta.errors import ConfigError
from tta.server.options import ServerOptions

START_S = 120.0  # seconds a server may take to load its model
ASK_S = 0.25  # between two questions whether they are warm


class Standby:
    """One server for each number, warming up.

    Args:
        run_folder: where sockets and hand-over files lie.
        options: of the server of each number; where it waits is added here.
        log: where to.
    """

    def __init__(self, run_folder: Path, options: Mapping[int, ServerOptions], log: Logger) -> None:
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._run_folder = run_folder
        self._log = log
        self._warm: set[int] = set()
        self._began, self._asked = time.monotonic(), 0.0
        self._processes: dict[int, Process] = {}
        self._sockets: dict[int, zmq.Socket[bytes]] = {}
        try:
            for number, each in options.items():
                self._start(number, each)
        except BaseException:
            self.close()
            raise

    def _start(self, number: int, options: ServerOptions) -> None:
        address = self._run_folder / f"standby{number}.ipc"
        file = self._file(number)
        file.with_suffix(".error").unlink(missing_ok=True)
        file.write_bytes(msgspec.json.encode(msgspec.structs.replace(options, standby=f"ipc://{address}")))
        argv = ["-m", "tta.server", str(file), options.trust.tell()]
        process = Process(f"standby{number}", lambda: argv, self._log, detached=True, keep=False)
        process.start()
        socket = self._context.socket(zmq.DEALER)
        socket.setsockopt(zmq.LINGER, 1000)
        socket.connect(f"ipc://{address}")
        self._processes[number], self._sockets[number] = process, socket

    def _file(self, number: int) -> Path:
        """Its options; beside them the reason if it does not start."""
        return self._run_folder / f"standby{number}.json"

    @property
    def numbers(self) -> list[int]:
        """Of its servers."""
        return list(self._processes)

    def look(self) -> bool:
        """Whether all are warm by now.

        Raises:
            ConfigError: one has ended, or takes too long; the message says why.
        """
        now = time.monotonic()
        ask = now - self._asked > ASK_S
        self._asked = now if ask else self._asked
        for number, process in self._processes.items():
            if not process.alive:
                why = self.reason(number) or f"exit status {process.exit_status}"
                raise ConfigError(f"the server did not start: {why}")
            socket = self._sockets[number]
            if ask and number not in self._warm:
                socket.send(msgspec.msgpack.encode({"op": "hello"}))
            while socket.poll(0):
                if msgspec.msgpack.decode(socket.recv())["pid"] == process.pid:
                    self._warm.add(number)
        if len(self._warm) < len(self._processes) and now - self._began > START_S:
            raise ConfigError(f"the server did not start: no sign of it in {START_S:.0f} s")
        return len(self._warm) == len(self._processes)

    def reason(self, number: int) -> str:
        """Why a server did not start, as far as it has said."""
        file = self._file(number).with_suffix(".error")
        return file.read_text() if file.exists() else ""

    def succeed(self, number: int, pid: int) -> int:
        """Have a warm server take the place of the one before, and outlive us from then on; its process id.

        Args:
            number: of the server.
            pid: of the one before; 0 where there is none.
        """
        process = self._processes.pop(number)
        self._sockets[number].send(msgspec.msgpack.encode({"op": "succeed", "pid": pid}))
        assert process.pid is not None
        return process.pid

    def close(self) -> None:
        """Stop those that were not told to succeed, and forget the others."""
        for process in self._processes.values():
            process.stop(1.0)
        self._processes.clear()
        self._context.destroy()
