"""What a service manager (systemd) hands over, and what it is told: sd_listen_fds(3) and sd_notify(3).

Rules of this file:

* Without a service manager all of it does nothing.
* Nothing here fails the daemon but a socket that is not the one of its configuration: a manager that does not listen
  is not waited for.
* A status is one short line, whatever is in it: it quotes etcd and files, each line of a message is a statement of its
  own, such as WATCHDOG=trigger, and a manager drops a message above 4096 bytes, signs of life in it included.
* The watchdog's sign of life comes from the event loop, so that a loop that stands still gives none. It says nothing of
  other nodes, NICs or the directory: a restart mends none of these.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from contextlib import suppress
from typing import NamedTuple

_FIRST = 3
"""SD_LISTEN_FDS_START."""
_LOOKS_EACH = 3
"""Signs of life in the time after which the manager ends the daemon."""
_LOOK = 5.0
"""Seconds between two looks at the status, at most."""
_LONGEST = 900
"""Characters of a status; each has 4 bytes at most."""


class Given(NamedTuple):
    """What the environment says of the service manager."""

    notify: str = ""
    """Its datagram socket: a path, or @ and an abstract name; empty where there is no manager."""
    watchdog: float = 0.0
    """Seconds without a sign of life after which it ends the daemon; 0 for none."""
    sockets: int = 0
    """How many listening sockets it has handed over."""


class Supervisor:
    """The service manager, if there is one."""

    def __init__(self, given: Given) -> None:
        self._given = given
        self._told = ""

    def adopt(self, path: str | None) -> socket.socket | None:
        """Return the listening socket for `path` that was handed over, None where none was.

        Raises OSError where something else was handed over.
        """
        if not self._given.sockets:
            return None
        handed = [socket.socket(fileno=_FIRST + number) for number in range(self._given.sockets)]
        first = handed[0]
        if len(handed) == 1 and path and _listens(first, path):
            first.setblocking(False)
            first.set_inheritable(False)
            return first
        found = ", ".join(str(each.getsockname() or "a socket without a name") for each in handed)
        for each in handed:
            each.close()
        raise OSError(
            f"The service manager hands over {found}, and the daemon takes one listening SOCK_SEQPACKET socket at "
            f"{path or 'attach.socket, which is empty'}. Set ListenSequentialPacket= of the socket unit to "
            "attach.socket, and nothing else."
        )

    def ready(self) -> None:
        """Say that the daemon takes work."""
        self._tell("READY=1")

    def stopping(self) -> None:
        """Say that it is on its way to its end."""
        self._tell("STOPPING=1\nSTATUS=Shutting down: transfers get their time to end.")

    async def tend(self, status: Callable[[], str]) -> None:
        """Give signs of life, and tell what `status` says when that changes, until cancelled."""
        if not self._given.notify:
            return
        every = min(self._given.watchdog / _LOOKS_EACH or _LOOK, _LOOK)
        while True:
            said = " ".join(status().split())[:_LONGEST]
            lines = ["WATCHDOG=1"] if self._given.watchdog else []
            if said != self._told:
                lines.append(f"STATUS={said}")
                self._told = said
            if lines:
                self._tell("\n".join(lines))
            await asyncio.sleep(every)

    def _tell(self, text: str) -> None:
        if not self._given.notify:
            return
        address = self._given.notify
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as sender, suppress(OSError):
            sender.sendto(text.encode(), f"\0{address[1:]}" if address.startswith("@") else address)


def _listens(handed: socket.socket, path: str) -> bool:
    return (
        handed.family == socket.AF_UNIX
        and handed.type == socket.SOCK_SEQPACKET
        and handed.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN) == 1
        and handed.getsockname() == path
    )
