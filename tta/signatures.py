r"""Who vouches for a bundle or a version: Ed25519 signatures (RFC 8032) of its manifest, which names all hashes.

    manifest.sig            beside manifest.json: signatures in base64, one a line, of "tta bundle SHA256\n" or
                            "tta version SHA256\n" with the manifest's sha256 in hexadecimal

One of the lines must be by a key that is trusted. A bundle may be signed by several people; a version has the
daemon's signature, of the manifest before too while that is being replaced. Keys are PEM files as OpenSSL writes
them; the public half is also written as 44 characters of base64. Of cryptography nothing is imported before it is
needed.
"""

import base64
import binascii
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import msgspec

from tta.errors import ConfigError, InputError

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

SIGNATURES = "manifest.sig"
OWN = "this daemon"  # the name of its own key
MAX_SIGNATURES = 64  # looked at, of one manifest
Kind = Literal["bundle", "version"]


class Trust(msgspec.Struct, frozen=True):
    """What a process of the daemon takes for genuine.

    Attributes:
        bundle: sha256 of the only bundle; "": any.
        versions: names and public keys of those who may sign versions; None: no signature is asked for.
    """

    bundle: str = ""
    versions: dict[str, str] | None = None

    def tell(self) -> str:
        """As one argument of a command line."""
        return msgspec.json.encode(self).decode()

    @classmethod
    def told(cls, text: str) -> "Trust":
        """What `tell` gave."""
        return msgspec.json.decode(text, type=cls)


class SigningKey:
    """The secret half of a key.

    Args:
        path: PEM file, PKCS #8, not encrypted.

    Raises:
        ConfigError: it cannot be read, or holds no Ed25519 secret.
    """

    def __init__(self, path: Path) -> None:
        self._secret = _read(path)
        self.public = base64.b64encode(self._secret.public_key().public_bytes_raw()).decode()

    def sign(self, kind: Kind, sha256: str) -> str:
        """The line that vouches for a manifest of that hash."""
        return base64.b64encode(self._secret.sign(_message(kind, sha256))).decode()


def signers_of_versions(signers: Mapping[str, str] | None, key: SigningKey | None) -> dict[str, str] | None:
    """Whose versions a daemon serves: its own and those of `security.signers`; None, if it signs none: any."""
    return None if key is None else {**(signers or {}), OWN: key.public}


def _read(path: Path) -> "Ed25519PrivateKey":
    from cryptography.exceptions import InternalError, UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    try:
        secret = load_pem_private_key(path.read_bytes(), None)
    except (OSError, ValueError, TypeError, UnsupportedAlgorithm, InternalError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no plain PEM file of a secret key"
        raise ConfigError(
            f"signing key {path} cannot be read: {reason}; tta keygen --signing makes one"
        ) from error
    if not isinstance(secret, Ed25519PrivateKey):
        raise ConfigError(f"signing key {path} is not of Ed25519: tta keygen --signing makes one")
    return secret


def _message(kind: Kind, sha256: str) -> bytes:
    """What is signed: the kind too, so that a version's signature is never taken for a bundle's."""
    return f"tta {kind} {sha256}\n".encode()


def check_signer(key: str) -> None:
    """Whether a text is a public key.

    Raises:
        InputError: it is none.
    """
    try:
        right = len(key) == 44 and len(base64.b64decode(key, validate=True)) == 32
    except (binascii.Error, ValueError):
        right = False
    if not right:
        raise InputError("no key: 44 characters of base64 are wanted, as tta keygen --signing prints")


def read_signatures(folder: Path) -> bytes:
    """What is in a folder's `manifest.sig`; empty if its manifest is not signed."""
    path = folder / SIGNATURES
    return path.read_bytes() if path.exists() else b""


def signer_of(kind: Kind, sha256: str, lines: bytes, signers: Mapping[str, str]) -> str | None:
    """Who of those who may has signed; None: nobody.

    Args:
        kind: of what the manifest is.
        sha256: of the manifest.
        lines: the signatures' file.
        signers: names and public keys of those who may.
    """
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    message = _message(kind, sha256)
    for name, key in signers.items():
        public = Ed25519PublicKey.from_public_bytes(base64.b64decode(key))
        for line in lines.split()[:MAX_SIGNATURES]:
            try:
                public.verify(base64.b64decode(line, validate=True), message)
            except (InvalidSignature, binascii.Error, ValueError):
                continue
            return name
    return None


def with_signature(lines: bytes, line: str) -> bytes:
    """The signatures' file with one more, the newest first; one that is there already stays once."""
    others = [each for each in lines.decode("ascii", "replace").split() if each != line]
    return "".join(f"{each}\n" for each in [line, *others][:MAX_SIGNATURES]).encode()


def write_signing_key(folder: Path, name: str) -> tuple[Path, Path]:
    """Make a key: NAME.pub.pem, and NAME.pem that only its owner can read.

    Raises:
        ConfigError: a file of that name exists, or the folder cannot be written.
    """
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

    secret = Ed25519PrivateKey.generate()
    public_path, secret_path = folder / f"{name}.pub.pem", folder / f"{name}.pem"
    public = secret.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    private = secret.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    for path in (public_path, secret_path):
        if path.exists():
            raise ConfigError(f"{path} exists: a key is not written over; choose another name or remove it")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for path, data, mode in ((secret_path, private, 0o600), (public_path, public, 0o644)):
            with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
                file.write(data)
    except OSError as error:
        raise ConfigError(f"no key can be written into {folder}: {error.strerror}") from error
    return public_path, secret_path
