"""Who asks for something: what the policy decides about, what owns regions, and what quotas count.

Rules of this file:

* A subject is what some authority proved: this host's kernel (`uid:1000`), a certificate authority
  (`spiffe://example.org/job/7`), the cluster's API server (`kubernetes:NAMESPACE/ACCOUNT`), or nobody (`anonymous`).
* What another daemon vouches for is never equal to what this one proved itself: `uid:1000@b` is no `uid:1000`.
* Pure: a text is taken apart and put together here, and whether to believe it is decided elsewhere.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

_NAME = r"[A-Za-z0-9:/._-]{1,300}"
_SPOKEN = re.compile(rf"({_NAME}(?:,gid:[0-9]{{1,10}}){{0,64}})@([a-z]([a-z0-9-]{{0,61}}[a-z0-9])?)", re.ASCII)


@dataclass(frozen=True, slots=True)
class Subject:
    """Who asks."""

    name: str
    """Such as uid:1000."""
    groups: tuple[str, ...] = ()
    """Such as gid:100: what else the same authority says of it."""
    node: str = ""
    """The node whose daemon vouches for it; empty for one that this daemon identified itself."""

    def __str__(self) -> str:
        """Return it as an owner is named: without its groups."""
        return f"{self.name}@{self.node}" if self.node else self.name

    @property
    def is_anonymous(self) -> bool:
        """Whether nobody proved who it is."""
        return self.name == ANONYMOUS.name

    def vouched_for(self, node: str) -> Subject:
        """Return it as `node`, which identified it or was told of it, speaks of it to others."""
        return replace(self, node=self.node or node)

    def named_by(self, node: str) -> str:
        """Return what all nodes call it, where `node` identified it or was told of it: without its groups, which may
        change."""
        return str(self.vouched_for(node))

    def spoken(self) -> str:
        """Return it as daemons write it to each other, with its groups. Raises ValueError where no node vouches."""
        if not self.node:
            raise ValueError(f"no node vouches for {self.name}")
        return f"{','.join((self.name, *self.groups))}@{self.node}"

    @staticmethod
    def parse_spoken(text: str) -> Subject:
        """Return the subject of `spoken`. Raises ValueError."""
        found = _SPOKEN.fullmatch(text)
        if found is None:
            raise ValueError(f"{text[:80]!r} must have the form SUBJECT[,GROUP...]@NODE")
        name, *groups = found[1].split(",")
        return Subject(name, tuple(groups), found[2])


ANONYMOUS = Subject("anonymous")
ROOT = Subject("uid:0")
