"""Logs: one event a line on standard error, as JSON or as text for people.

Rules of this file:

* An event is a short constant name in snake_case; what varies are its fields.
* Everything takes one way out: the daemon's own events, the libraries' loggers, Python's warnings.
* Keys and secrets are kept from logs where they are handled (`repr=False`). Fields that are named
  like one are masked here all the same, and tracebacks never show variables.
* What a caller sent can't forge an event: control characters are escaped (in text, tracebacks are not).
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, MutableMapping
from typing import Any, Literal, TextIO

import structlog
from structlog.typing import EventDict, Processor

MASK = "[hidden]"
_SECRET = re.compile(r"secret|token|password|[lr]key", re.IGNORECASE)
_DEEPEST = 8


def set_up(level: str, format: Literal["auto", "text", "json"], stream: TextIO) -> None:
    """Send all logs of this process to `stream`, from `level` on. auto: text on a terminal, else JSON."""
    number = logging.getLevelNamesMapping()[level.upper()]
    as_text = stream.isatty() if format == "auto" else format == "text"
    shared: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_logger_name,
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        wrapper_class=structlog.make_filtering_bound_logger(number),
        logger_factory=structlog.stdlib.LoggerFactory(),
    )
    handler = logging.StreamHandler(stream)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                mask_secrets,
                *(_text(stream.isatty()) if as_text else _json()),
            ],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(number)
    logging.captureWarnings(True)


def mask_secrets(_logger: object, _method: str, event: EventDict) -> EventDict:
    """Replace the values of fields that are named like keys and secrets, also inside other fields."""
    masked: EventDict = _masked(event, _DEEPEST)
    return masked


def _masked(value: Any, depth: int) -> Any:
    if depth == 0:
        return MASK
    if isinstance(value, Mapping):
        return {
            key: MASK if isinstance(key, str) and _SECRET.search(key) else _masked(item, depth - 1)
            for key, item in value.items()
        }
    if isinstance(value, (list, tuple)):
        return [_masked(item, depth - 1) for item in value]
    return value


def _json() -> list[Processor]:
    return [structlog.processors.format_exc_info, structlog.processors.JSONRenderer()]


def _text(colors: bool) -> list[Processor]:
    renderer = structlog.dev.ConsoleRenderer(
        colors=colors,
        repr_native_str=True,
        exception_formatter=structlog.dev.plain_traceback,  # rich's shows variables
    )
    return [_escape_event, renderer]


def _escape_event(_logger: object, _method: str, event: MutableMapping[str, Any]) -> EventDict:
    """Escape control characters in the messages of libraries, which may hold what a caller sent."""
    text = str(event["event"])
    event["event"] = text if text.isprintable() else repr(text)
    return event
