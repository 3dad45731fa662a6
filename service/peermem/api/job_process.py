"""What the kernel says of the process that connected to a unix socket.

Rules of this file:

* Only what the kernel noted when the process connected (unix(7)); nothing that the process itself can say.
* A process is held by a descriptor of it (pidfd), because its number may be given to another one when it has ended. On
  a kernel without SO_PEERPIDFD (before Linux 6.5) its end and its control group are not known, rather than guessed.
* More supplementary groups than fit are none: a subject has fewer rights then, never more.
"""

from __future__ import annotations

import array
import errno
import os
import select
import socket
import struct
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from peermem.core.identity import Subject
from peermem.core.origin import NOWHERE, Origin, parse_origin

_SO_PEERGROUPS = 59
_SO_PEERPIDFD = 77
_CREDENTIALS = struct.Struct("iII")
_MOST_GROUPS = 256
"""What Python's getsockopt has room for."""
MAX_GROUPS = 64
"""Of one subject: the process's own group, then its supplementary ones by number."""


@dataclass(frozen=True, slots=True)
class JobProcess:
    """A process at the other end of a unix socket; close it."""

    subject: Subject
    """Its user and groups."""
    pid: int
    """0 where it has no number in the daemon's namespace."""
    pidfd: int
    """Readable when it has ended; -1 where the kernel gives none."""
    origin: Origin
    """Nothing where that is not certain."""

    def close(self) -> None:
        """Close the descriptor."""
        if self.pidfd >= 0:
            os.close(self.pidfd)


def read_job_process(connection: socket.socket) -> JobProcess:
    """Return who is at the other end. Raises OSError, also where it has ended and the kernel has forgotten it."""
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    pid, uid, gid = _CREDENTIALS.unpack(credentials)
    groups = dict.fromkeys((gid, *_supplementary(connection)))
    subject = Subject(f"uid:{uid}", tuple(f"gid:{each}" for each in groups)[:MAX_GROUPS])
    pidfd = _pidfd(connection)
    return JobProcess(subject, pid, pidfd, _origin(pid, pidfd))


def _pidfd(connection: socket.socket) -> int:
    try:
        return connection.getsockopt(socket.SOL_SOCKET, _SO_PEERPIDFD)
    except OSError as error:
        if error.errno == errno.ENOPROTOOPT:  # this kernel has none
            return -1
        raise


def _origin(pid: int, pidfd: int) -> Origin:
    """Return where a process comes from; nothing where its number may be another one's by now."""
    text = ""
    if pid and pidfd >= 0:
        with suppress(OSError):  # it has ended, or /proc shows only this user's own
            text = Path(f"/proc/{pid}/cgroup").read_text("utf-8", "replace")
    return parse_origin(text) if not has_ended(pidfd) else NOWHERE


def has_ended(pidfd: int) -> bool:
    """Whether a process has ended."""
    if pidfd < 0:
        return False
    poll = select.poll()  # select(2) takes no descriptor beyond 1023
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(0))


def _supplementary(connection: socket.socket) -> array.array[int]:
    groups = array.array("I")
    try:
        groups.frombytes(connection.getsockopt(socket.SOL_SOCKET, _SO_PEERGROUPS, _MOST_GROUPS * groups.itemsize))
    except OSError as error:
        if error.errno != errno.ERANGE:
            raise
    return groups
