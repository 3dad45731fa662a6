"""The audit log: each decision of the policy as one structured line, under the logger name `audit`.

Rules of this file:

* A line says who asked for what, which rule decided, and from where; never a key, a token, a secret or a byte of data.
* It goes to a file of its own, or where all logs go, and no log level hides it. A file that was moved is made anew.
* What is decided again and again while a grant is renewed for one transfer is one line.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from contextvars import ContextVar
from pathlib import Path
from typing import Literal, NamedTuple

import structlog

from peermem.core.identity import Subject
from peermem.telemetry import logs

Decisions = Literal["all", "denied"]
LOGGER = "audit"
_REMEMBERED = 4096
"""Decisions whose repetition is left out."""
_LONGEST = 128
"""Characters of a request_id."""


class Caller(NamedTuple):
    """Where a request came from."""

    remote: str
    """gRPC's name of the other end, such as ipv4:10.0.0.2:50312, or unix:."""
    call: str
    """Such as RegionService/GetRegion."""
    request: str = ""
    """Its request_id."""
    pid: int = 0
    """The process that a session on the attach socket is of."""


_NOBODY = Caller("", "")
_caller: ContextVar[Caller] = ContextVar("caller", default=_NOBODY)


def called(remote: str, call: str, request: str = "") -> None:
    """Note for the rest of this task, and for those that it starts, who asks."""
    _caller.set(Caller(remote, call, request[:_LONGEST]))


def asked(request: str) -> None:
    """Note the request_id of what this task does now."""
    _caller.set(_caller.get()._replace(request=request[:_LONGEST]))


def of_process(pid: int) -> None:
    """Note the process whose session the call carries."""
    _caller.set(_caller.get()._replace(pid=pid))


class Audit:
    """Writes decisions down."""

    def __init__(self, decisions: Decisions) -> None:
        self.decisions: Decisions = decisions
        logging.getLogger(LOGGER).setLevel(logging.INFO)  # else the level of all logs holds
        self._log = structlog.wrap_logger(
            logging.getLogger(LOGGER), wrapper_class=structlog.make_filtering_bound_logger(logging.INFO)
        )
        self._repeated: OrderedDict[tuple[object, ...], None] = OrderedDict()

    def decided(
        self, subject: Subject, action: str, resource: object, rule: str, *, allowed: bool, under: object = None
    ) -> None:
        """Write one decision down. What was allowed before to the same subject `under` the same thing is left out."""
        if allowed and (self.decisions != "all" or self._is_known((under, subject, action, resource, rule), under)):
            return
        caller = _caller.get()
        self._log.info(
            "decision",
            outcome="allowed" if allowed else "denied",
            subject=str(subject),
            action=action,
            resource=str(resource),
            rule=rule,
            remote=caller.remote,
            pid=caller.pid,
            call=caller.call,
            request=caller.request,
        )

    def _is_known(self, key: tuple[object, ...], under: object) -> bool:
        if under is None:
            return False
        known = key in self._repeated
        self._repeated[key] = None
        self._repeated.move_to_end(key)
        if len(self._repeated) > _REMEMBERED:
            self._repeated.popitem(last=False)
        return known


class AuditFile:
    """The file that the logger writes to, until it is closed."""

    def __init__(self, path: Path) -> None:
        """Raises OSError where it can't be written."""
        self._handler = logs.file_handler(path)
        self._logger = logging.getLogger(LOGGER)
        self._logger.addHandler(self._handler)
        self._logger.propagate = False

    def close(self) -> None:
        """Write to it no more."""
        self._logger.removeHandler(self._handler)
        self._logger.propagate = True
        self._handler.close()
