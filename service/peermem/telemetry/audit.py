"""The audit log: each decision of the policy as one structured line, under the logger name `audit`.

Rules of this file:

* A line says who asked for what, which rule decided, and from where; never a key, a token, a secret or a byte of data.
* It goes to a file of its own, or where all logs go, and no log level hides it. A file that was moved is made anew.
* What is decided again and again while a grant is renewed for one transfer is one line.
"""

from __future__ import annotations

import errno
import logging
import math
import os
import time
from collections import OrderedDict
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import asdict
from pathlib import Path
from typing import Literal, NamedTuple

import structlog
from structlog.typing import Processor

from peermem.core.identity import Subject
from peermem.core.origin import NOWHERE, Origin
from peermem.telemetry import logs

log = structlog.get_logger(__name__)

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
    origin: Origin = NOWHERE
    """The Slurm job or pod of that process."""


_NOBODY = Caller("", "")
_caller: ContextVar[Caller] = ContextVar("caller", default=_NOBODY)


def called(remote: str, call: str, request: str = "") -> None:
    """Note for the rest of this task, and for those that it starts, who asks."""
    _caller.set(Caller(remote, call, request[:_LONGEST]))


def asked(request: str) -> None:
    """Note the request_id of what this task does now."""
    _caller.set(_caller.get()._replace(request=request[:_LONGEST]))


def of_process(pid: int, origin: Origin) -> None:
    """Note the process whose session the call carries, and where that comes from."""
    _caller.set(_caller.get()._replace(pid=pid, origin=origin))


class AuditFile:
    """A file that lines are added to, made anew when it was moved away; what structlog calls a logger."""

    def __init__(self, path: Path, failed: Callable[[], None]) -> None:
        """`failed` is called for each line that could not be written. Raises OSError where it can't be now."""
        self._path = path
        self._failed = failed
        self._works = True
        self._is_cut = False
        """Whether the last line in the file has no end."""
        self._fd = self._open()

    def info(self, line: str) -> None:
        """Add a line. What can't be written is counted and told in the log, and keeps nobody from work."""
        try:
            if not self._is_there():
                before, self._fd = self._fd, self._open()
                os.close(before)
                self._is_cut = False
            self._write(f"{line}\n".encode())
        except OSError as error:
            self._failed()
            if self._works:
                log.error("audit_not_written", file=str(self._path), cause=error.strerror)
            self._works = False
        else:
            self._works = True

    def _write(self, data: bytes) -> None:
        """Add data, below the rest of a line that the disk had no room for. Raises OSError."""
        if self._is_cut:
            data = b"\n" + data
        written = os.write(self._fd, data)
        if written < len(data):
            self._is_cut = data[:written][-1:] != b"\n"
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._is_cut = False

    def close(self) -> None:
        """Write to it no more."""
        os.close(self._fd)

    def _open(self) -> int:
        return os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)

    def _is_there(self) -> bool:
        """Whether the file that is open is still the one of this name."""
        try:
            return os.path.samestat(os.stat(self._path), os.fstat(self._fd))
        except FileNotFoundError:
            return False


class Audit:
    """Writes decisions down."""

    def __init__(
        self,
        decisions: Decisions,
        file: AuditFile | None = None,
        again: float = 30.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Without a `file` it is written where all logs are. `again` is how many seconds a grant lasts: what is allowed
        once more within them is the same grant that is renewed."""
        self._again = again
        self._clock = clock
        self.decisions: Decisions = decisions
        always = structlog.make_filtering_bound_logger(logging.INFO)
        if file is None:
            logging.getLogger(LOGGER).setLevel(logging.INFO)  # else the level of all logs holds
            self._log = structlog.wrap_logger(logging.getLogger(LOGGER), wrapper_class=always)
        else:
            self._log = structlog.wrap_logger(file, _PROCESSORS, always).bind(logger=LOGGER)
        self._repeated: OrderedDict[tuple[object, ...], float] = OrderedDict()

    def decided(
        self, subject: Subject, action: str, resource: object, rule: str, *, allowed: bool, under: object = None
    ) -> None:
        """Write one decision down. What is allowed again to the same subject `under` the same link is left out."""
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
            **{key: value for key, value in asdict(caller.origin).items() if value},
        )

    def _is_known(self, key: tuple[object, ...], under: object) -> bool:
        if under is None:
            return False
        now = self._clock()
        known = now <= self._repeated.pop(key, -math.inf) + self._again
        self._repeated[key] = now
        if len(self._repeated) > _REMEMBERED:
            self._repeated.popitem(last=False)
        return known


_PROCESSORS: list[Processor] = [
    structlog.stdlib.add_log_level,
    structlog.processors.TimeStamper(fmt="iso", utc=True),
    logs.mask_secrets,
    structlog.processors.JSONRenderer(),
]
"""The way of a line into a file of its own: shorter than that of all logs, since each transfer passes it."""
