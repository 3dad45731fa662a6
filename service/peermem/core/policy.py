"""Who may do what with a region or transfer: asked at the node that owns it, for the client's identity.

Today's rule: whoever reaches the daemon may read and write; only the owner, or root of this host,
may delete, renew or cancel. What `anonymous` owns, of whatever node, everybody may manage.
"""

from __future__ import annotations

from enum import Enum
from typing import Protocol

from peermem.core.errors import AccessDenied
from peermem.core.identity import ANONYMOUS, ROOT, Subject
from peermem.core.names import ChildName


class Action(Enum):
    """What a subject wants to do."""

    READ = "read"
    WRITE = "write"
    MANAGE = "manage"


class Policy(Protocol):
    """Decides."""

    def check(self, subject: Subject, action: Action, name: ChildName, owner: str) -> None:
        """Return when `subject` may do `action` with `name`, which `owner` made. Raises AccessDenied."""


class OwnerPolicy:
    """Today's rule, see the module."""

    def check(self, subject: Subject, action: Action, name: ChildName, owner: str) -> None:
        """See Policy."""
        unowned = owner.partition("@")[0] == str(ANONYMOUS)
        if action is Action.MANAGE and not unowned and str(subject) not in (owner, str(ROOT)):
            raise AccessDenied(
                f"{name} belongs to {owner}; {subject} may not manage it. Ask as {owner} or as root of its host.",
                name=name,
                owner=owner,
                subject=subject,
            )
