"""Whether this machine can pretend to be a node of Slurm."""

from __future__ import annotations

import os
import socket
from pathlib import Path

_SO_PEERPIDFD = 77


def cgroup2() -> Path | None:
    """Return where the second version of control groups is mounted and can be written to, None where it is not."""
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, place, kind, options, *_ = line.split(" ")
        if kind == "cgroup2" and "rw" in options.split(",") and os.access(place, os.W_OK):
            return Path(place)
    return None


def knows_processes() -> bool:
    """Whether the kernel hands out a descriptor of the process behind a unix socket."""
    one, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with one, other:
        try:
            os.close(one.getsockopt(socket.SOL_SOCKET, _SO_PEERPIDFD))
        except OSError:
            return False
    return True
