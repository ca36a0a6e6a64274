"""The servers: started or adopted, watched, and told together which version to serve.

One for each of `server.endpoint`, on a GPU each where there are GPUs. They answer to the daemon as one: a swap is
done when all have done it, and refused if one refuses; whoever serves another version than the daemon believes is
told again (`Treatment.reconcile`).
"""

import os
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec
import zmq

from tta.config import MAX_SERVERS, Config
from tta.daemon.links import ServerLink
from tta.daemon.processes import Logger, Process
from tta.daemon.standby import START_S, Standby
from tta.devices import device_of, n_gpus
from tta.errors import ConfigError
from tta.process import is_alive
from tta.server.options import ServerOptions
from tta.signatures import Trust

POLL_S = 0.05
ADOPT_S = 2.0  # seconds a server left by another daemon has to answer
LIVE_S = 10.0  # seconds of silence after which a server does not count as ready

Reply = dict[str, Any]


def server_name(number: int) -> str:
    """In logs, metrics and the run folder."""
    return f"server{number}" if number else "server"


def admin_path(run_folder: Path, number: int) -> Path:
    """Of a server's admin socket."""
    return run_folder / f"{server_name(number)}.ipc"


def server_options(
    config: Config,
    number: int,
    run_folder: Path,
    observe: str,
    trust: Trust,
    version_folder: Path | None,
    public_key: str,
    time_us: int,
) -> ServerOptions:
    """What the server of a number is to be started with; the arguments are those of `Servers`, as they are now."""
    key, clients = config.security.key, config.security.clients
    settings = {**config.server.model_dump(), "endpoint": config.server.endpoints[number]}
    return ServerOptions(
        bundle=str(config.bundle.resolve()),
        version_folder=str(version_folder.resolve()) if version_folder else None,
        admin=f"ipc://{admin_path(run_folder, number)}",
        observe=observe,
        number=number,
        device=device_of(config.device, number, n_gpus()),
        precision=config.precision,
        key=str(key.resolve()) if key else None,
        public_key=public_key,
        clients=str(clients.resolve()) if clients else None,
        trust=trust,
        time_us=time_us,
        parent=os.getpid(),
        **settings,
    )


class Servers:
    """All servers of a daemon.

    Args:
        context: of the daemon's sockets.
        config: the daemon's.
        run_folder: where sockets and hand-over files lie.
        observe: address that they send observations to.
        trust: the bundle that they serve, and whose versions.
        version_folder: where the version to start with lies; None: the source.
        time_us: see `tta.daemon.clock`.
        public_key: of the daemon; "" where nobody is asked for a key.
    """

    def __init__(
        self,
        context: "zmq.Context[zmq.Socket[bytes]]",
        config: Config,
        run_folder: Path,
        observe: str,
        trust: Trust,
        version_folder: Callable[[], Path | None],
        time_us: Callable[[], int],
        public_key: Callable[[], str],
        log: Logger,
    ) -> None:
        self._config = config
        self._run_folder = run_folder
        self._observe = observe
        self._trust = trust
        self._version_folder = version_folder
        self._time_us = time_us
        self._log = log
        self._public_key = public_key
        self._context = context
        self.links = [self._link(number) for number, _ in enumerate(config.server.endpoints)]

    def _link(self, number: int) -> ServerLink:
        socket = self._context.socket(zmq.DEALER)
        socket.setsockopt(zmq.LINGER, 0)
        socket.connect(f"ipc://{self._path(number)}")
        return ServerLink(Process(server_name(number), self._argv(number), self._log, detached=True), socket)

    def _path(self, number: int) -> Path:
        """Of its admin socket."""
        return admin_path(self._run_folder, number)

    # -- as one ---------------------------------------------------------------------------------------------

    @property
    def ready(self) -> bool:
        """Whether one of them answers predictions."""
        now = time.monotonic()
        return any(
            link.process.ready and link.silent_s(now) < LIVE_S and link.hello.get("listening", True)
            for link in self.links
        )

    @property
    def settled(self) -> bool:
        """Whether none of them is just starting."""
        return all(link.process.ready or not link.process.alive for link in self.links)

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
        self._ask([link for link in self.links if link.process.ready] or self.links, version, folder, then)

    def _ask(
        self, asked: list[ServerLink], version: int, folder: Path | None, then: Callable[[Reply], None]
    ) -> None:
        replies: list[Reply] = []

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

        for link in asked:
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

    def silent(self, now: float, limit_s: float) -> Iterator[tuple[Process, float, float]]:
        """Each process, for how many seconds it has been silent, and how many it may: more before it is ready."""
        for link in self.links:
            process = link.process
            if process.ready and link.last_seen:
                yield process, link.silent_s(now), limit_s
            else:
                yield process, process.age_s, max(START_S, limit_s)

    def differing(self, version: int) -> int | None:
        """A version that one of them serves instead; None if there is none."""
        return next((int(k.hello["version"]) for k in self._differing(version)), None)

    def _differing(self, version: int) -> list[ServerLink]:
        return [k for k in self.links if k.process.ready and k.hello and k.hello["version"] != version]

    def bring_to(self, version: int, folder: Path | None, then: Callable[[Reply], None]) -> None:
        """Have those that serve another version serve this one; see `swap`.

        One that refuses while others serve it starts again: its word is not taken for what all should serve.
        """
        differing = self._differing(version)

        def told(reply: Reply) -> None:
            left = self._differing(version)
            if "error" in reply and len(left) < len(self.links):
                for link in left:
                    self._log.error(
                        "server_refused", name=link.process.name, version=version, error=reply["error"]
                    )
                    link.process.kill()
            else:
                then(reply)

        self._ask(differing, version, folder, told)

    # -- start ------------------------------------------------------------------------------------------------

    def _options(self, number: int) -> ServerOptions:
        """What a server is to be started with."""
        return server_options(
            self._config,
            number,
            self._run_folder,
            self._observe,
            self._trust,
            self._version_folder(),
            self._public_key(),
            self._time_us(),
        )

    def _argv(self, number: int) -> Callable[[], list[str]]:
        def argv() -> list[str]:
            path = self._run_folder / f"{server_name(number)}.json"
            path.write_bytes(msgspec.json.encode(self._options(number)))
            path.with_suffix(".error").unlink(missing_ok=True)
            return ["-m", "tta.server", str(path), self._trust.tell()]

        return argv

    def start_or_adopt(
        self,
        wanted: Callable[[], bool],
        standby: Standby | None = None,
        former: Mapping[int, int] | None = None,
    ) -> None:
        """Take over servers that outlived another daemon if they are those we would start; else start them.

        One that serves something else at an endpoint of ours goes on until its successor is warm, and for good if
        that fails. All others of the same state folder finish and go first: they may hold an endpoint.

        Args:
            wanted: false once the daemon is to stop.
            standby: servers of ours that are warm already.
            former: processes of the servers before those, by number.

        Raises:
            ConfigError: one did not start; the message says why. Where others are adopted they go on, and it is
                tried again.
        """
        spare = n_gpus() - len(self.links)
        if spare > 0 and self._config.device != "cpu":
            self._log.warning("gpus_idle", n=spare, do="name an endpoint for each GPU in server.endpoint")
        left = [number for number, _ in enumerate(self.links) if self._path(number).exists()]
        self._await_hello([self.links[number] for number in left], ADOPT_S, wanted)
        ours = [link for number, link in enumerate(self.links) if self._is_ours(link.hello, number)]
        strangers = self._strangers(wanted)
        others = [link for link in self.links if link.hello and link not in ours]
        before = {n: k.hello["pid"] for n, k in enumerate(self.links) if k in others and self._holds(k, n)}
        homeless = [link for number, link in enumerate(self.links) if link in others and number not in before]
        self._retire([*homeless, *strangers], wanted)
        for stranger in strangers:
            stranger.close()
        for link in ours:
            link.process.adopt(link.hello["pid"])
        if standby is None:
            standby = self._stand_by(before, wanted)
        warm = standby.numbers
        for number, link in enumerate(self.links):
            if number in warm:
                link.hello = {}
                last = (former or {}).get(number, 0)  # it may hang, and hold the endpoint all the same
                pid = before.get(number) or (last if last and is_alive(last) else 0)
                link.process.adopt(standby.succeed(number, pid), ready=False)
            elif link not in ours:
                link.process.start()
        self._await_hello(self.links, START_S, wanted)
        standby.close()
        for number, link in enumerate(self.links):
            if link.process.ready:
                continue
            reason = self._run_folder / f"{server_name(number)}.error"
            told = standby.reason(number) if number in warm else reason.read_text() if reason.exists() else ""
            why = told or f"exit status {link.process.exit_status}"
            if not ours:
                for each in self.links:
                    each.process.stop(self._config.server.drain_s)
                raise ConfigError(f"the server did not start: {why}")
            self._log.error("server_failed", name=link.process.name, error=why)

    def _stand_by(self, before: Mapping[int, int], wanted: Callable[[], bool]) -> Standby:
        """Warm successors of the servers of these numbers; where the daemon is to stop, those stop too.

        Raises:
            ConfigError: one does not start; those before serve on.
        """
        standby = Standby(self._run_folder, {number: self._options(number) for number in before}, self._log)
        if not before:
            return standby
        try:
            while not standby.look() and wanted():
                time.sleep(POLL_S)
        except ConfigError as error:
            standby.close()
            pids = ", ".join(map(str, before.values()))
            raise ConfigError(f"{error}; the one before serves on, as process {pids}") from error
        if not wanted():
            standby.close()
            self._retire([self.links[number] for number in before], lambda: True)
            raise ConfigError("stopped before the server was loaded")
        return standby

    def _is_ours(self, hello: Reply, number: int) -> bool:
        """Whether a running server is the one we would start, as far as its options tell."""
        try:
            theirs = msgspec.convert(hello["options"], ServerOptions)
        except (msgspec.ValidationError, KeyError):
            return False
        same = theirs.same_service(self._options(number))
        return bool(hello["bundle_sha256"] == self._trust.bundle and same)

    def _holds(self, link: ServerLink, number: int) -> bool:
        """Whether a running server has the endpoint that ours is to have."""
        options = link.hello.get("options", {})
        return bool(options.get("endpoint") == self._config.server.endpoints[number])

    def _strangers(self, wanted: Callable[[], bool]) -> list[ServerLink]:
        """Servers of endpoints that are no longer configured."""
        numbers = range(len(self.links), MAX_SERVERS)
        found = [self._link(number) for number in numbers if self._path(number).exists()]
        self._await_hello(found, ADOPT_S, wanted)
        for link in found:
            if not link.hello:
                link.close()
        return [link for link in found if link.hello]

    def _retire(self, links: list[ServerLink], wanted: Callable[[], bool]) -> None:
        """Let servers that are not ours finish and go."""
        for link in links:
            self._log.info("server_replaced", pid=link.hello["pid"])
            link.drain()
        end = time.monotonic() + self._config.server.drain_s + 2
        while any(is_alive(k.hello["pid"]) for k in links) and time.monotonic() < end and wanted():
            time.sleep(POLL_S)
        for link in links:
            link.listen(0.0)  # what it has said before it went
            link.hello = {}

    def _await_hello(self, links: list[ServerLink], timeout_s: float, wanted: Callable[[], bool]) -> None:
        """Until all have answered or ended; who has answered is asked on, so that none seems silent meanwhile."""
        end = time.monotonic() + timeout_s
        asked = 0.0
        silent = list(links)
        while silent and time.monotonic() < end and wanted():
            if time.monotonic() - asked > 0.5:
                asked = time.monotonic()
                for link in links:
                    link.say_hello()
            for link in links:
                link.listen(POLL_S / len(links))
            silent = [k for k in silent if not k.hello and (k.process.pid is None or k.process.alive)]

    def stop(self) -> None:
        """Let all finish what they have admitted, at the same time."""
        for link in self.links:
            link.process.terminate()
        end = time.monotonic() + self._config.server.drain_s + 2
        for link in self.links:
            link.process.stop(max(0.0, end - time.monotonic()))
