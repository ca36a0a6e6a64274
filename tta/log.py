"""Logs: one JSON line an event on standard error, the same for every process."""

import logging
import sys

import structlog


def setup(process: str) -> structlog.typing.FilteringBoundLogger:
    """Configure logging for this process; called once, by its entry point.

    Args:
        process: name that each line carries ("daemon", "server", "shadow", "adapter").

    Returns:
        The process's logger: `log.info("event", field=value)`.
    """
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.dict_tracebacks,
            structlog.processors.JSONRenderer(default=str),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
    )
    logger: structlog.typing.FilteringBoundLogger = structlog.get_logger(process=process)
    return logger
