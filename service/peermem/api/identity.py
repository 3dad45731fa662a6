"""Who is calling: the subject that owns what a call makes and that the policy is asked about.

Rules of this file:

* A call on behalf of a session of the attach socket is its user, "uid:1000", because the kernel said so.
* A daemon that acts for a client says so as "SUBJECT[,GROUP...]@NODE". Nothing proves it yet, so such a subject is
  never equal to a local user; see SECURITY.md.
* Everybody else is "anonymous".
"""

from __future__ import annotations

from peermem.api.calls import Context
from peermem.broker.sessions import Session, SessionTable
from peermem.core.errors import InvalidField
from peermem.core.identity import ANONYMOUS, Subject

SESSION_KEY = "peermem-session"
ON_BEHALF_KEY = "peermem-on-behalf-of"


class Identity:
    """Finds the subject of calls."""

    def __init__(self, sessions: SessionTable) -> None:
        self._sessions = sessions

    def session(self, context: Context) -> Session | None:
        """Return the session that the call carries, if any. Raises SessionNotFound."""
        token = _value(context, SESSION_KEY)
        return self._sessions.find(token) if token else None

    def relayed(self, context: Context) -> bool:
        """Whether another daemon hands on what a client asked it for."""
        return bool(_value(context, ON_BEHALF_KEY))

    async def subject(self, context: Context) -> Subject:
        """Return who is calling. Raises SessionNotFound, InvalidField."""
        session = self.session(context)
        if session is not None:
            return session.subject
        claimed = _value(context, ON_BEHALF_KEY)
        return spoken_subject(claimed, ON_BEHALF_KEY) if claimed else ANONYMOUS


def spoken_subject(claimed: str, field: str) -> Subject:
    """Return the subject that another daemon acts for. Raises InvalidField."""
    try:
        return Subject.parse_spoken(claimed)
    except ValueError as error:
        raise InvalidField(f"{field} {error}.", field=field) from None


def _value(context: Context, key: str) -> str:
    for name, value in context.invocation_metadata() or ():
        if name == key:
            return value if isinstance(value, str) else value.decode("ascii", "replace")
    return ""
