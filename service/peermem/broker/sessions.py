"""Sessions of local jobs, one per connection to the attach socket: who they are and what only they hold.

Rules of this file:

* A session's token is a secret between the daemon and the job that opened it.
* A file descriptor that a job handed in belongs to its session until CreateRegion takes it; what is left
  is closed with the session.
* Only memory files and dma-bufs are taken in. Closing any other file may wait for whoever is behind it (a file
  system in user space, a socket that lingers); closing these only frees memory.
* No descriptor of a job is closed on the event loop.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import secrets
import threading
from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import dataclass, field

from peermem.core.errors import LimitReached, NotAdoptable, SessionNotFound
from peermem.core.identity import Subject
from peermem.core.origin import NOWHERE, Origin
from peermem.memory import dma_buf_exporter

MAX_HANDED_IN = 64
"""Descriptors of one session that may wait to be adopted."""
MAX_HANDED_IN_ALL = 1024
"""The same of all sessions together, so that jobs can't use up the daemon's descriptors."""


@dataclass(slots=True, eq=False)
class Session:
    """One job's connection."""

    subject: Subject
    """Its user, and the groups of its process."""
    pid: int
    """0 where the job's process has no number in the daemon's namespace."""
    origin: Origin = NOWHERE
    """The Slurm job or pod that its process is of."""
    token: str = field(repr=False, default_factory=lambda: secrets.token_urlsafe(32))
    closed: bool = False


class SessionTable:
    """All open sessions. Used on the event loop only."""

    def __init__(self, max_sessions: int) -> None:
        self.max_sessions = max_sessions
        self._sessions: dict[str, Session] = {}
        self._handed_in: dict[str, tuple[Session, int]] = {}
        self._on_close: list[Callable[[Session], None]] = []

    def __len__(self) -> int:
        return len(self._sessions)

    def on_close(self, callback: Callable[[Session], None]) -> None:
        """Have `callback` called after each session's end."""
        self._on_close.append(callback)

    def open(self, subject: Subject, pid: int, origin: Origin = NOWHERE) -> Session:
        """Open a session. Raises LimitReached."""
        if len(self._sessions) >= self.max_sessions:
            raise LimitReached(
                f"This node has {self.max_sessions} sessions open, its limit. End a job, or raise attach.max_sessions.",
                limit=self.max_sessions,
            )
        session = Session(subject, pid, origin)
        self._sessions[session.token] = session
        return session

    def find(self, token: str) -> Session:
        """Return an open session. Raises SessionNotFound."""
        session = self._sessions.get(token)
        if session is None:
            raise SessionNotFound("The session has ended, or never was one of this daemon. Connect again.")
        return session

    def hand_in(self, session: Session, fd: int) -> str:
        """Keep a descriptor and return the token to adopt it by; when it raises, `fd` stays the caller's.

        Raises NotAdoptable, LimitReached.
        """
        if not _is_memory_file(fd) and not dma_buf_exporter(fd):
            raise NotAdoptable(
                "The file descriptor is no memory file and no dma-buf. Make a memory file with memfd_create and "
                "MFD_ALLOW_SEALING, or have a device's driver export its memory."
            )
        waiting = sum(owner is session for owner, _ in self._handed_in.values())
        if waiting >= MAX_HANDED_IN:
            raise LimitReached(
                f"{waiting} file descriptors of this session wait to be adopted, the limit. Create regions of them "
                "before handing in more.",
                limit=MAX_HANDED_IN,
            )
        if len(self._handed_in) >= MAX_HANDED_IN_ALL:
            raise LimitReached(
                f"{MAX_HANDED_IN_ALL} file descriptors of all jobs wait to be adopted, the limit. Try again when "
                "other jobs have created their regions.",
                limit=MAX_HANDED_IN_ALL,
            )
        token = secrets.token_urlsafe(16)
        self._handed_in[token] = (session, fd)
        return token

    def handed_in(self, session: Session, token: str) -> int:
        """Return a descriptor, which stays this table's. Raises SessionNotFound."""
        owner, fd = self._handed_in.get(token, (None, -1))
        if owner is not session:
            raise SessionNotFound(
                "No file descriptor of this session waits under that token. Hand it in over this session, and adopt "
                "it once."
            )
        return fd

    def take(self, session: Session, token: str) -> int:
        """Return a descriptor, which belongs to the caller from now on. Raises SessionNotFound."""
        fd = self.handed_in(session, token)
        del self._handed_in[token]
        return fd

    def close(self, session: Session) -> None:
        """End a session and close what it left. Closing twice is no error."""
        if session.closed:
            return
        session.closed = True
        del self._sessions[session.token]
        left = [token for token, (owner, _) in self._handed_in.items() if owner is session]
        close_apart([self._handed_in.pop(token)[1] for token in left])
        for callback in self._on_close:
            callback(session)


def close_apart(fds: Collection[int]) -> asyncio.Future[None]:
    """Close descriptors that came from a job in a thread of their own; the future is done when they are.

    Closing may hang for as long as the job likes. The thread is a daemon thread so that the process can
    end all the same, and not one of a pool, which hostile descriptors would use up.
    """
    loop = asyncio.get_running_loop()
    done: asyncio.Future[None] = loop.create_future()

    def close() -> None:
        for fd in fds:
            with suppress(OSError):  # a late write that failed is the job's loss; the descriptor is gone
                os.close(fd)
        with suppress(RuntimeError):  # the loop has ended; nobody waits
            loop.call_soon_threadsafe(_finish, done)

    if fds:
        threading.Thread(target=close, name="peermem-close", daemon=True).start()
    else:
        done.set_result(None)
    return done


def _finish(done: asyncio.Future[None]) -> None:
    if not done.done():
        done.set_result(None)


def _is_memory_file(fd: int) -> bool:
    try:
        fcntl.fcntl(fd, fcntl.F_GET_SEALS)
    except OSError:
        return False
    return True
