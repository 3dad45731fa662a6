"""Sessions of local jobs, one per connection to the attach socket: who they are and what only they hold.

Rules of this file:

* A session's token is a secret between the daemon and the job that opened it.
* A file descriptor that a job handed in belongs to its session until CreateRegion takes it; what is left
  is closed with the session.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable
from dataclasses import dataclass, field

from peermem.core.errors import LimitReached, SessionNotFound

MAX_DESCRIPTORS = 64
"""Handed-in descriptors that may wait in one session."""


@dataclass(slots=True, eq=False)
class Session:
    """One job's connection."""

    subject: str
    """Such as uid:1000."""
    pid: int
    token: str = field(repr=False, default_factory=lambda: secrets.token_urlsafe(32))
    closed: bool = False
    descriptors: dict[str, int] = field(default_factory=dict, repr=False)


class SessionTable:
    """All open sessions."""

    def __init__(self, max_sessions: int) -> None:
        self._max = max_sessions
        self._sessions: dict[str, Session] = {}
        self._on_close: list[Callable[[Session], None]] = []

    def __len__(self) -> int:
        return len(self._sessions)

    def on_close(self, callback: Callable[[Session], None]) -> None:
        """Have `callback` called after each session's end."""
        self._on_close.append(callback)

    def open(self, subject: str, pid: int) -> Session:
        """Open a session. Raises LimitReached."""
        if len(self._sessions) >= self._max:
            raise LimitReached(f"This node has {self._max} sessions open, its limit.", limit=self._max)
        session = Session(subject, pid)
        self._sessions[session.token] = session
        return session

    def find(self, token: str) -> Session:
        """Return an open session. Raises SessionNotFound."""
        session = self._sessions.get(token)
        if session is None:
            raise SessionNotFound("The session has ended, or never was one of this daemon. Connect again.")
        return session

    def hand_in(self, session: Session, fd: int) -> str:
        """Keep a descriptor, which belongs to the table from now on; return its token. Raises LimitReached."""
        if len(session.descriptors) >= MAX_DESCRIPTORS:
            os.close(fd)
            raise LimitReached(
                f"{MAX_DESCRIPTORS} descriptors of this session wait to be adopted, the limit.", limit=MAX_DESCRIPTORS
            )
        token = secrets.token_urlsafe(16)
        session.descriptors[token] = fd
        return token

    def take(self, session: Session, token: str) -> int:
        """Return a descriptor, which belongs to the caller from now on. Raises SessionNotFound."""
        fd = session.descriptors.pop(token, None)
        if fd is None:
            raise SessionNotFound("No file descriptor of this session has that token, or it was adopted already.")
        return fd

    def close(self, session: Session) -> None:
        """End a session and close what it left. Closing twice is no error."""
        if session.closed:
            return
        session.closed = True
        del self._sessions[session.token]
        for fd in session.descriptors.values():
            os.close(fd)
        session.descriptors.clear()
        for callback in self._on_close:
            callback(session)
