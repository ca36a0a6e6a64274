"""Who may do what: the list of clients, their roles and quotas, and the doorkeeper who asks for their keys.

Over tcp both sides prove that they hold the secret half of their key pair and encrypt what they send (CurveZMQ,
RFC 26 of ZeroMQ; Curve25519, keys written as 40 characters of Z85). Before a connection exists libzmq asks the
doorkeeper of the process whether its key is on the list (ZAP, RFC 27); roles are asked for at every request, so
that a key taken off the list is of no more use at once. Sockets of ipc need no keys: the permissions of their
folder guard them.
"""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import structlog
import yaml
import zmq
from zmq.utils import z85

from tta.errors import ConfigError, DeniedError, InputError, OverloadedError
from tta.keys import ROLES, Role, check_key, read_key_pair

MIN_WAIT_S = 0.001
BURST = 64  # questions answered before anything else gets a turn
TOLD_S = 1.0  # between two lines about who was turned away
REFRESH_S = 1.0  # seconds between two looks at the list of clients, and at the key
UNBOUND_S, UNBOUND_TOLD_S = 2.0, 30.0  # without an address before that is told, and until it is told again
ZAP = "inproc://zeromq.zap.01"


class AllowedClient(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """One entry of the list.

    Attributes:
        key: public, 40 characters of Z85.
        roles: `admin` may do everything.
        images_s: a second at each server, at most; None: as many as the queue's fairness allows.
        labels_s: a second, at most.
    """

    key: str
    roles: list[Role]
    images_s: float | None = None
    labels_s: float | None = None


class Quota:
    """So many a second, and a second's worth at once. What goes over once is paid for by waiting."""

    def __init__(self, per_s: float, now: float) -> None:
        self.per_s = per_s
        self._left, self._at = per_s, now

    def spend(self, n: int, now: float) -> float:
        """Spend n if something is left; seconds to wait until there is, 0.0 for spent."""
        self._left = min(self.per_s, self._left + (now - self._at) * self.per_s)
        self._at = now
        if self._left <= 0:
            return max(MIN_WAIT_S, -self._left / self.per_s)
        self._left -= n
        return 0.0


def _listed(text: str) -> dict[str, AllowedClient]:
    """The list in a YAML text; an empty one for an empty text.

    Raises:
        ValueError: no YAML (in some ways), or a name that is there twice, of which YAML would take the last.
        msgspec.MsgspecError: no YAML (in others), or no list of clients.
    """
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from error
    names = [key.value for key, _ in root.value] if isinstance(root, yaml.MappingNode) else []
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"{twice[0]!r} is listed twice")
    return msgspec.yaml.decode(text, type=dict[str, AllowedClient] | None) or {}


class WatchedFile:
    """A file that is read again when it changes."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._looked_at = 0.0
        self._stamp = self._stat()

    def _stat(self) -> tuple[int, ...]:
        try:
            s = self.path.stat()
        except OSError:
            return ()
        return (s.st_mtime_ns, s.st_ctime_ns, s.st_size, s.st_ino)

    def changed(self) -> bool:
        """Whether it is another than at the last look; looks once a second."""
        now = time.monotonic()
        if now - self._looked_at < REFRESH_S:
            return False
        self._looked_at = now
        stamp, former = self._stat(), self._stamp
        self._stamp = stamp
        return stamp != former

    def look_again(self) -> None:
        """Take it for changed at the next look: it could not be read."""
        self._stamp = (-1,)


class Clients:
    """The list of clients, read again when its file changes.

    Raises:
        ConfigError: it cannot be read or is no list of clients; the message names file and entry.
    """

    def __init__(self, path: Path) -> None:
        self._file = WatchedFile(path)
        self._quotas: dict[tuple[str, str], Quota] = {}  # by key and what is counted
        self._by_key = self._load()

    def _load(self) -> dict[str, tuple[str, AllowedClient]]:
        try:
            listed = _listed(self._file.path.read_text())
            for name, entry in listed.items():
                check_key(entry.key)
                for what in (entry.images_s, entry.labels_s):
                    if what is not None and not 0 < what < float("inf"):
                        raise InputError(f"{name}: {what} a second: write a number above 0")
        except OSError as error:
            raise ConfigError(f"list of clients {self._file.path} cannot be read: {error.strerror}") from error
        except (ValueError, RecursionError, msgspec.MsgspecError, InputError) as error:
            raise ConfigError(
                f"list of clients {self._file.path}: {error}; "
                f"write NAME: {{key: KEY, roles: [{', '.join(ROLES)}]}}"
            ) from error
        by_key = {entry.key: (name, entry) for name, entry in listed.items()}
        if len(by_key) < len(listed):
            raise ConfigError(f"list of clients {self._file.path}: two names have the same key")
        return by_key

    def refresh(self) -> bool:
        """Read the file again if it has changed, looked at once a second; true if there is a new list.

        Raises:
            ConfigError: what is there now is no list, or no file; the one before stays in force. A file that
                cannot be read is tried again at the next look.
        """
        if not self._file.changed():
            return False
        try:
            self._by_key = self._load()
        except ConfigError as error:
            if isinstance(error.__cause__, OSError):
                self._file.look_again()
            raise
        return True

    def __len__(self) -> int:
        return len(self._by_key)

    def roles(self) -> dict[str, list[Role]]:
        """Everybody on the list, and what they may."""
        return {name: entry.roles for name, entry in self._by_key.values()}

    def name_of(self, key: str) -> str | None:
        """Whose key this is; None for nobody's on the list."""
        found = self._by_key.get(key)
        return None if found is None else found[0]

    def check(self, key: str, role: Role | None) -> str:
        """Whose key this is, if he may.

        Args:
            key: that the connection has proved to hold.
            role: that is needed; None: any.

        Raises:
            DeniedError: the key is not on the list (any more), or has another role.
        """
        found = self._by_key.get(key)
        if found is None:
            raise DeniedError("this key is not on the daemon's list of clients any more")
        name, entry = found
        if role is not None and role not in entry.roles and "admin" not in entry.roles:
            has = ", ".join(entry.roles) or "no role"
            raise DeniedError(f"client {name!r} may not: this needs the role {role}, the list gives it {has}")
        return name

    def spend(self, key: str, images: int = 0, labels: int = 0) -> None:
        """Count against what a client may send.

        Raises:
            OverloadedError: it has sent more; it says when to come again.
        """
        name, entry = self._by_key[key]
        for what, n, limit in (("images", images, entry.images_s), ("labels", labels, entry.labels_s)):
            if not n or limit is None:
                continue
            now = time.monotonic()
            quota = self._quotas.get((key, what))
            if quota is None or quota.per_s != limit:
                quota = self._quotas[key, what] = Quota(limit, now)
            wait_s = quota.spend(n, now)
            if wait_s:
                raise OverloadedError(f"client {name!r} has sent more than {limit:g} {what} a second", wait_s)


class Doorkeeper:
    """Answers libzmq's question whom to let in, for all sockets of one context. Owned by the thread that polls.

    When the file with the daemon's key pair has changed, the sockets are bound again with the new one. libzmq then
    closes their connections: what was admitted is computed, and clients that know the new key ask again.

    Args:
        context: whose sockets are to be guarded; make the doorkeeper before any of them binds.
        path: of the daemon's key pair.
        clients: the list.
        log: hears of who is turned away, and of a list or key that changed.

    Raises:
        ConfigError: the key pair cannot be read.
    """

    def __init__(
        self,
        context: "zmq.Context[zmq.Socket[bytes]]",
        path: Path,
        clients: Clients,
        log: structlog.typing.FilteringBoundLogger,
    ) -> None:
        self.clients = clients
        self._file = WatchedFile(path)
        self._key = read_key_pair(path)
        self._guarded: list[zmq.Socket[bytes]] = []
        self._unbound: dict[zmq.Socket[bytes], str] = {}  # whose key was renewed, and where they are to be bound
        self._renewed_at = self._unbound_told_at = float("-inf")
        self._log = log
        self._complaint = ""  # about the list, told once
        self._told_at, self._untold = float("-inf"), 0  # when it was told who is turned away; how many since
        self.socket = context.socket(zmq.REP)
        self.socket.setsockopt(zmq.LINGER, 0)
        self.socket.bind(ZAP)

    def guard(self, socket: "zmq.Socket[bytes]", endpoint: str) -> bool:
        """Let a socket, not bound yet, ask for keys if its endpoint is of tcp; whether it will."""
        if not endpoint.startswith("tcp:"):
            return False
        socket.curve_server = True
        socket.curve_secretkey = self._key.secret
        socket.zap_domain = b"tta"
        self._guarded.append(socket)
        return True

    @property
    def public_key(self) -> str:
        """Of the key in force, 40 characters of Z85."""
        return self._key.public.decode()

    @property
    def is_open(self) -> bool:
        """Whether every guarded socket listens; not for a moment after the key was renewed, or if that failed."""
        return not self._unbound

    def attend(self) -> int:
        """Answer questions that wait, and look whether list or key has changed; how many were turned away."""
        n_refused = 0
        for _ in range(BURST):
            if not self.socket.poll(0):
                break
            answer, turned_away = _zap(self.socket.recv_multipart(), self.clients)
            self.socket.send_multipart(answer)
            if turned_away is not None:
                n_refused += 1
                self._tell(*turned_away)
        try:
            if self.clients.refresh():
                self._log.info("client_list_read", n=len(self.clients))
                self._complaint = ""
        except ConfigError as error:
            if str(error) != self._complaint:
                self._complaint = str(error)
                self._log.error("client_list_refused", error=self._complaint, in_force="the list before")
        if self._file.changed():
            self._renew()
        if self._unbound:
            self._bind_again()
        return n_refused

    def _renew(self) -> None:
        """Take the key pair that is in the file now; one that cannot be used leaves the one before in force."""
        try:
            key = read_key_pair(self._file.path)
        except ConfigError as error:
            self._log.error("key_refused", error=str(error), in_force="the key before")
            return
        if key == self._key:
            return
        self._key, self._renewed_at = key, time.monotonic()
        for socket in self._guarded:
            if socket not in self._unbound:
                self._unbound[socket] = socket.getsockopt_string(zmq.LAST_ENDPOINT)
                socket.unbind(self._unbound[socket])
            socket.curve_secretkey = key.secret  # of the listener to come

    def _bind_again(self) -> None:
        """Bind what was unbound, when libzmq's own thread has closed the listener before."""
        for socket, endpoint in list(self._unbound.items()):
            try:
                socket.bind(endpoint)
            except zmq.ZMQError as error:
                now = time.monotonic()
                if now - self._renewed_at > UNBOUND_S and now - self._unbound_told_at > UNBOUND_TOLD_S:
                    self._unbound_told_at = now
                    self._log.error("not_bound_again", endpoint=endpoint, error=str(error))
                continue
            del self._unbound[socket]
            self._log.info("key_renewed", endpoint=endpoint, public_key=self.public_key)

    def _tell(self, key: str, address: str) -> None:
        """Log who was turned away; of many in a second the first, with the number of those since the last line."""
        self._untold += 1
        now = time.monotonic()
        if now - self._told_at >= TOLD_S:
            self._log.warning("client_refused", key=key, address=address, n=self._untold)
            self._told_at, self._untold = now, 0


def _zap(question: Sequence[bytes], clients: Clients) -> tuple[list[bytes], tuple[str, str] | None]:
    """The answer to one question of ZAP 1.0, and who is turned away by it.

    A question is: version, request id, domain, address, identity, mechanism, credentials (for CURVE the key's 32
    bytes). The answer: version, request id, status, text, user id, metadata. The user id is the key itself.
    """
    key, address = "", question[3].decode("ascii", "replace") if len(question) > 3 else ""
    if len(question) == 7 and question[5] == b"CURVE" and len(question[6]) == 32:
        key = z85.encode(question[6]).decode("ascii")
    known = bool(key) and clients.name_of(key) is not None
    status, text = (b"200", b"OK") if known else (b"400", b"not on the list of clients")
    answer = [b"1.0", question[1] if len(question) > 1 else b"", status, text, key.encode() if known else b"", b""]
    return answer, None if known else (key, address)


def key_of(frame: Any) -> str:
    """The key that the sender of a frame has proved to hold; "" on a socket that asks for none."""
    try:
        return str(frame.get("User-Id"))
    except zmq.ZMQError:
        return ""
