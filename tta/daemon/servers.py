"""The servers: started or adopted, watched, and told together which version to serve.

One for each of `server.endpoint`, on a GPU each where there are GPUs. They answer to the daemon as one: a swap is
done when all have done it, and refused if one refuses; whoever serves another version than the daemon believes is
told again (`Treatment.reconcile`).
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import zmq

from tta.config import Config
from tta.daemon.links import ServerLink
from tta.daemon.processes import Logger, Process, is_alive
from tta.devices import device_of, n_gpus
from tta.errors import ConfigError
from tta.server.options import ServerOptions

POLL_S = 0.05
START_S = 120.0  # seconds a server may take to load its model
ADOPT_S = 2.0  # seconds a server left by another daemon has to answer
LIVE_S = 10.0  # seconds of silence after which a server does not count as ready

Reply = dict[str, Any]


def server_name(number: int) -> str:
    """In logs, metrics and the run folder."""
    return f"server{number}" if number else "server"


class Servers:
    """All servers of a daemon.

    Args:
        context: of the daemon's sockets.
        config: the daemon's.
        run_folder: where sockets and hand-over files lie.
        bundle_sha256: of the bundle that they serve.
        version_folder: where the version to start with lies; None: the source.
    """

    def __init__(
        self,
        context: "zmq.Context[zmq.Socket[bytes]]",
        config: Config,
        run_folder: Path,
        bundle_sha256: str,
        version_folder: Callable[[], Path | None],
        log: Logger,
    ) -> None:
        self._config = config
        self._run_folder = run_folder
        self._bundle_sha256 = bundle_sha256
        self._version_folder = version_folder
        self._log = log
        self.links: list[ServerLink] = []
        self.sockets: list[zmq.Socket[bytes]] = []  # to be polled; see `handle`
        for number, _ in enumerate(config.server.endpoints):
            socket = context.socket(zmq.DEALER)
            socket.setsockopt(zmq.LINGER, 0)
            socket.connect(self._ipc(server_name(number)))
            process = Process(server_name(number), self._argv(number), log, detached=True)
            self.sockets.append(socket)
            self.links.append(ServerLink(process, socket))

    def _ipc(self, name: str) -> str:
        return f"ipc://{self._run_folder / name}.ipc"

    # -- as one ---------------------------------------------------------------------------------------------

    @property
    def ready(self) -> bool:
        """Whether one of them answers predictions."""
        now = time.monotonic()
        return any(link.process.ready and now - link.last_seen < LIVE_S for link in self.links)

    @property
    def swapping(self) -> bool:
        """Whether a swap is under way."""
        return any(link.swapping for link in self.links)

    @property
    def devices(self) -> list[str]:
        """What they run on, as they say."""
        return [link.hello.get("device", "") for link in self.links]

    def swap(self, version: int, folder: Path | None, then: Callable[[Reply], None]) -> None:
        """Serve a version; `then` gets prepare_s and flip_s of the slowest, or the first error. One at a time.

        A server that is down is not waited for: it starts with what the daemon then believes to be served.
        """
        replies: list[Reply] = []
        asked = [link for link in self.links if link.process.ready] or self.links

        def collect(reply: Reply) -> None:
            replies.append(reply)
            if len(replies) < len(asked):
                return
            refused = [r for r in replies if "error" in r]
            done = [r for r in replies if "error" not in r and "gone" not in r]
            if refused or not done:
                then(refused[0] if refused else {"op": "swap", "error": "no server is left to serve it"})
                return
            slowest = {k: max(r.get(k, 0.0) for r in done) for k in ("prepare_s", "flip_s")}
            then({**done[0], **slowest})

        for link in list(asked):
            link.swap(version, folder, collect)

    def release(self) -> None:
        """Let them drop the version before the present one."""
        for link in self.links:
            link.release()

    # -- messages and supervision -----------------------------------------------------------------------------

    def say_hello(self) -> None:
        """Ask whether they are there; a swap does not wait for one that has gone while others are here."""
        now = time.monotonic()
        for link in self.links:
            link.say_hello()
            if link.swapping and not link.process.ready and self.ready and now - link.last_seen > LIVE_S:
                link.give_up()

    def handle(self, socket: "zmq.Socket[bytes]", reply: Reply, now: float) -> None:
        """Take a server's message."""
        self.links[self.sockets.index(socket)].handle(reply, now)

    def differing(self, version: int) -> int | None:
        """A version that one of them serves instead; None if there is none."""
        for link in self.links:
            if link.hello and link.process.ready and link.hello["version"] != version:
                return int(link.hello["version"])
        return None

    # -- start ------------------------------------------------------------------------------------------------

    def options(self, number: int) -> ServerOptions:
        """What a server is to be started with."""
        config, folder = self._config, self._version_folder()
        settings = {**config.server.model_dump(), "endpoint": config.server.endpoints[number]}
        return ServerOptions(
            bundle=str(config.bundle.resolve()),
            version_folder=str(folder.resolve()) if folder else None,
            admin=self._ipc(server_name(number)),
            observe=self._ipc("observe"),
            number=number,
            device=device_of(config.device, number),
            precision=config.precision,
            **settings,
        )

    def _argv(self, number: int) -> Callable[[], list[str]]:
        def argv() -> list[str]:
            path = self._run_folder / f"{server_name(number)}.json"
            path.write_bytes(msgspec.json.encode(self.options(number)))
            path.with_suffix(".error").unlink(missing_ok=True)
            return ["-m", "tta.server", str(path)]

        return argv

    def start_or_adopt(self, wanted: Callable[[], bool]) -> None:
        """Take over servers that outlived another daemon if they are those we would start; else start them.

        Args:
            wanted: false once the daemon is to stop.

        Raises:
            ConfigError: one did not start; the message says why. Where others are adopted they go on, and it is
                tried again.
        """
        spare = n_gpus() - len(self.links)
        if spare > 0 and self._config.device != "cpu":
            self._log.warning("gpus_idle", n=spare, do="name an endpoint for each GPU in server.endpoint")
        left = [link for i, link in enumerate(self.links) if Path(self._ipc(server_name(i))[6:]).exists()]
        self._await_hello(left, ADOPT_S, wanted)
        adopted = False
        for number, link in enumerate(self.links):
            if link.hello and self._is_ours(link.hello, number):
                link.process.adopt(link.hello["pid"])
                adopted = True
                continue
            if link.hello:
                self._replace(link)
            link.process.start()
        self._await_hello(self.links, START_S, wanted)
        for number, link in enumerate(self.links):
            if not link.process.ready:
                reason = self._run_folder / f"{server_name(number)}.error"
                why = reason.read_text() if reason.exists() else f"exit status {link.process.exit_status}"
                if adopted:
                    self._log.error("server_failed", name=link.process.name, error=why)
                    continue
                for each in self.links:
                    each.process.stop(1.0)
                raise ConfigError(f"the server did not start: {why}")

    def _is_ours(self, hello: Reply, number: int) -> bool:
        """Whether a running server is the one we would start; one of another release never is."""
        try:
            theirs = msgspec.convert(hello["options"], ServerOptions)
        except (msgspec.ValidationError, KeyError):
            return False
        same = theirs.same_service(self.options(number))
        return bool(hello["bundle_sha256"] == self._bundle_sha256 and same)

    def _replace(self, link: ServerLink) -> None:
        """Let a server that is not ours finish and go."""
        self._log.info("server_replaced", pid=link.hello["pid"])
        link.drain()
        end = time.monotonic() + self._config.server.drain_s + 2
        while time.monotonic() < end and is_alive(link.hello["pid"]):
            time.sleep(POLL_S)
        link.hello = {}

    def _await_hello(self, links: list[ServerLink], timeout_s: float, wanted: Callable[[], bool]) -> None:
        end = time.monotonic() + timeout_s
        asked = 0.0
        silent = list(links)
        while silent and time.monotonic() < end and wanted():
            if time.monotonic() - asked > 0.5:
                asked = time.monotonic()
                for link in silent:
                    link.say_hello()
            for socket in self.sockets:
                while socket.poll(int(1000 * POLL_S / len(self.sockets))):
                    self.handle(socket, msgspec.msgpack.decode(socket.recv()), time.monotonic())
            silent = [k for k in silent if not k.hello and (k.process.pid is None or k.process.alive)]
