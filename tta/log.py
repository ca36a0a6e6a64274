"""Logs: one JSON line an event on standard error, the same for every process."""

import contextlib
import logging
import sys
from typing import TextIO, cast

import structlog


class _Stream:
    """Standard error, whoever reads it: a server outlives its daemon, and must outlive its log too."""

    def write(self, text: str) -> int:
        """As a file's; a line that nobody can read is dropped."""
        try:
            return sys.stderr.write(text)
        except OSError:
            return 0

    def flush(self) -> None:
        """As a file's."""
        with contextlib.suppress(OSError):
            sys.stderr.flush()


def setup(process: str) -> structlog.typing.FilteringBoundLogger:
    """Configure logging for this process; called once, by its entry point.

    Args:
        process: name that each line carries ("daemon", "server", "server1", "shadow", "adapter").

    Returns:
        The process's logger: `log.info("event", field=value)`.
    """
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.ExceptionRenderer(  # no locals: they may hold keys, images and labels
                structlog.tracebacks.ExceptionDictTransformer(show_locals=False)
            ),
            structlog.processors.JSONRenderer(default=str),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
        logger_factory=structlog.PrintLoggerFactory(cast(TextIO, _Stream())),
    )
    logger: structlog.typing.FilteringBoundLogger = structlog.get_logger(process=process)
    return logger
