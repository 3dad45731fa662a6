"""What the kernel says of the process that connected to a unix socket.

Rules of this file:

* Only what the kernel noted when the process connected (unix(7)); nothing that the process itself can say.
* More supplementary groups than fit are none: a subject has fewer rights then, never more.
"""

from __future__ import annotations

import array
import errno
import socket
import struct
from dataclasses import dataclass

from peermem.core.identity import Subject

_SO_PEERGROUPS = 59
_CREDENTIALS = struct.Struct("iII")
_MOST_GROUPS = 256
"""What Python's getsockopt has room for."""
MAX_GROUPS = 64
"""Of one subject: the process's own group, then its supplementary ones by number."""


@dataclass(frozen=True, slots=True)
class JobProcess:
    """A process at the other end of a unix socket."""

    subject: Subject
    """Its user and groups."""
    pid: int
    """0 where it has no number in the daemon's namespace."""


def read_job_process(connection: socket.socket) -> JobProcess:
    """Return who is at the other end. Raises OSError."""
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    pid, uid, gid = _CREDENTIALS.unpack(credentials)
    groups = dict.fromkeys((gid, *_supplementary(connection)))
    return JobProcess(Subject(f"uid:{uid}", tuple(f"gid:{each}" for each in groups)[:MAX_GROUPS]), pid)


def _supplementary(connection: socket.socket) -> array.array[int]:
    groups = array.array("I")
    try:
        groups.frombytes(connection.getsockopt(socket.SOL_SOCKET, _SO_PEERGROUPS, _MOST_GROUPS * groups.itemsize))
    except OSError as error:
        if error.errno != errno.ERANGE:
            raise
    return groups
