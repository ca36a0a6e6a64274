"""Every error tta raises on purpose, each with the code it has on the wire.

    TTAError                        code
    |- ConfigError                  -  (exit 2)          operator: a setting, a flag, a port
    |- BundleError                  -  (exit 2)          operator: a deployed model that does not verify
    |- DeviceError                  -  (exit 2)          operator: a device that is not there
    |- DamagedError                 -  (log, set aside)  operator: a file of the state folder
    |- ProtocolError                INVALID_ARGUMENT     client: malformed frames, version, operation
    |- InputError                   INVALID_ARGUMENT     client: shape, dtype, label range
    |- NotFoundError                NOT_FOUND            client: a version or a prediction nobody knows
    |- PreconditionError            FAILED_PRECONDITION  client: nothing to roll back to, nothing to approve
    |- OverloadedError              RESOURCE_EXHAUSTED   client: retry after `retry_after_s`
    |- DeadlineError                DEADLINE_EXCEEDED    client: the answer would have come too late
    |- CancelledError               CANCELLED            client: it asked for this
    |- UnavailableError             UNAVAILABLE          client: draining, or a process is restarting
    |- UnauthenticatedError         UNAUTHENTICATED      client: its key, or the daemon's, is not the right one
    |- DeniedError                  PERMISSION_DENIED    client: its key may not do this
    |- DeltaError                   INTERNAL             operator: a version that must not be served
    `- AdaptationError              -  (event, metric)   nobody: serving goes on with the present version

A rejected candidate is a verdict, not an error. Anything else that escapes is INTERNAL: its traceback
goes to the log and never to a client.
"""

from enum import IntEnum


class Code(IntEnum):
    """Outcome of a request on the wire; numbers and meaning are gRPC's."""

    OK = 0
    CANCELLED = 1
    INVALID_ARGUMENT = 3
    DEADLINE_EXCEEDED = 4
    NOT_FOUND = 5
    PERMISSION_DENIED = 7
    RESOURCE_EXHAUSTED = 8
    FAILED_PRECONDITION = 9
    INTERNAL = 13
    UNAVAILABLE = 14
    UNAUTHENTICATED = 16


class TTAError(Exception):
    """Root of all errors raised on purpose."""

    code = Code.INTERNAL

    def __init__(self, message: str, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class ConfigError(TTAError):
    """A setting, flag or address is wrong; the message names it and its file."""

    code = Code.INVALID_ARGUMENT


class BundleError(TTAError):
    """A bundle is missing, truncated, or does not match its checksums."""


class DeviceError(TTAError):
    """The device asked for is not there."""


class DamagedError(TTAError):
    """A file of the state folder is not what was written there."""


class ProtocolError(TTAError):
    """Frames that are not this protocol: count, version, operation or header."""

    code = Code.INVALID_ARGUMENT


class InputError(TTAError):
    """A well-formed request with content the model cannot take."""

    code = Code.INVALID_ARGUMENT


class NotFoundError(TTAError):
    """A version, block or prediction that does not exist."""

    code = Code.NOT_FOUND


class PreconditionError(TTAError):
    """The operation makes no sense in the present state."""

    code = Code.FAILED_PRECONDITION


class OverloadedError(TTAError):
    """The queue is full; try again after `retry_after_s`."""

    code = Code.RESOURCE_EXHAUSTED


class DeadlineError(TTAError):
    """The deadline passed before an answer was there."""

    code = Code.DEADLINE_EXCEEDED


class CancelledError(TTAError):
    """The client cancelled the request."""

    code = Code.CANCELLED


class UnavailableError(TTAError):
    """Nobody can answer now: draining, starting, or unreachable."""

    code = Code.UNAVAILABLE


class UnauthenticatedError(TTAError):
    """The connection was refused: one side asks for a key that the other does not have."""

    code = Code.UNAUTHENTICATED


class DeniedError(TTAError):
    """The client's key is known, but may not do this."""

    code = Code.PERMISSION_DENIED


class DeltaError(TTAError):
    """A version's delta does not verify and must not be served."""


class AdaptationError(TTAError):
    """An adaptation could not be carried out; the serving version is untouched."""


_BY_CODE: dict[int, type[TTAError]] = {
    Code.CANCELLED: CancelledError,
    Code.INVALID_ARGUMENT: InputError,
    Code.DEADLINE_EXCEEDED: DeadlineError,
    Code.NOT_FOUND: NotFoundError,
    Code.RESOURCE_EXHAUSTED: OverloadedError,
    Code.FAILED_PRECONDITION: PreconditionError,
    Code.UNAVAILABLE: UnavailableError,
    Code.UNAUTHENTICATED: UnauthenticatedError,
    Code.PERMISSION_DENIED: DeniedError,
}


def from_wire(code: int, message: str, retry_after_s: float | None = None) -> TTAError:
    """Turn a reply's code and text back into the error the other side raised."""
    return _BY_CODE.get(code, TTAError)(message, retry_after_s)
