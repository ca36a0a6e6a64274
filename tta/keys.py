"""Key pairs, the roles a key may have, and what a client shows over tcp.

Key files are those of `zmq.auth`: NAME.key to give away, NAME.key_secret for its owner. Keys are Curve25519,
written as 40 characters of Z85.
"""

import os
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import zmq
import zmq.auth
from zmq.utils import z85

from tta.errors import ConfigError, InputError

Role = Literal["predict", "label", "admin"]
ROLES: tuple[Role, ...] = ("predict", "label", "admin")


@dataclass(frozen=True)
class KeyPair:
    """Both halves of a key, 40 characters of Z85 each."""

    public: bytes
    secret: bytes = field(repr=False)


def read_public_key(path: Path) -> bytes:
    """The public key of a certificate, public or secret.

    Raises:
        ConfigError: there is none.
    """
    return _read(path)[0]


def read_key_pair(path: Path) -> KeyPair:
    """Both halves, of a secret certificate.

    Raises:
        ConfigError: there is none, or it has the public half only.
    """
    public, secret = _read(path)
    if secret is None:
        raise ConfigError(f"{path} holds the public half of a key only: name the file that ends in .key_secret")
    if zmq.curve_public(secret) != public:
        raise ConfigError(f"{path} holds halves of different keys: tta keygen makes a pair")
    return KeyPair(public, secret)


def _read(path: Path) -> tuple[bytes, bytes | None]:
    try:
        public, secret = zmq.auth.load_certificate(path)
        for half in (public, public if secret is None else secret):
            check_key(half.decode("ascii"))
    except (OSError, ValueError, IndexError, InputError) as error:  # pyzmq takes its files for well-formed
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise ConfigError(f"key file {path} cannot be read: {reason}; tta keygen makes one") from error
    return public, secret


def check_key(text: str) -> None:
    """Whether a text is a key.

    Raises:
        InputError: it is none.
    """
    try:
        right = len(text) == 40 and len(z85.decode(text)) == 32
    except (ValueError, KeyError, struct.error):
        right = False
    if not right:
        raise InputError("no key: 40 characters of Z85 are wanted")


def write_key_pair(folder: Path, name: str) -> tuple[Path, Path]:
    """Make a key pair: NAME.key, and NAME.key_secret that only its owner can read.

    Raises:
        ConfigError: a file of that name exists, or the folder cannot be written.
    """
    public, secret = folder / f"{name}.key", folder / f"{name}.key_secret"
    for path in (public, secret):
        if path.exists():
            raise ConfigError(f"{path} exists: a key is not written over; choose another name or remove it")
    before = os.umask(0o077)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        zmq.auth.create_certificates(folder, name)
    except OSError as error:
        raise ConfigError(f"no key can be written into {folder}: {error.strerror}") from error
    finally:
        os.umask(before)
    public.chmod(0o644)
    return public, secret


@dataclass(frozen=True)
class Credentials:
    """What a client needs over tcp: its own key pair, and the public key by which it knows the daemon.

    Attributes:
        key: its own.
        server_key: the daemon's, 40 characters of Z85.
        other_server_keys: that the daemon may have instead: its next one, while it is being renewed.
    """

    key: KeyPair
    server_key: bytes
    other_server_keys: tuple[bytes, ...] = ()

    @classmethod
    def read(cls, key: Path | str, server_key: Path | str, *others: Path | str) -> "Credentials":
        """From files.

        Args:
            key: the client's NAME.key_secret.
            server_key: the daemon's public certificate, or the 40 characters themselves.
            others: that the daemon may have instead; each is tried in turn.

        Raises:
            ConfigError: one is not there or is no key.
        """
        return cls(read_key_pair(Path(key)), _server_key(server_key), tuple(map(_server_key, others)))

    @property
    def n_server_keys(self) -> int:
        """How many the daemon may have."""
        return 1 + len(self.other_server_keys)

    def show_on(self, socket: Any, turn: int = 0) -> None:
        """Let a socket, not connected yet, use them; `turn` says which of the daemon's keys."""
        socket.curve_serverkey = (self.server_key, *self.other_server_keys)[turn % self.n_server_keys]
        socket.curve_publickey = self.key.public
        socket.curve_secretkey = self.key.secret


def _server_key(given: Path | str) -> bytes:
    try:
        if Path(given).is_file():
            raise InputError("it is a file")
        check_key(str(given))
        return str(given).encode("ascii")
    except (InputError, UnicodeEncodeError, OSError):
        return read_public_key(Path(given))
