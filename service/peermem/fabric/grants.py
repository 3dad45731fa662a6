"""The rights of accepted links on this node's memory: what every access is checked against.

Rules of this file:

* A grant belongs to one accepted link. It ends by revocation, by time, or with its link, and never
  comes back; whoever holds the object sees that through `Grant.usable`.
* An access is allowed as a whole or not at all, and a refusal does not say why: an unknown key and
  another link's key look alike.
* Nothing here waits or touches memory. The fabric asks again before each piece that it moves.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from operator import add

from peermem.core.errors import LinkNotFound
from peermem.core.types import RemoteKey, Rights
from peermem.memory import Memory

Clock = Callable[[], float]


@dataclass(slots=True, eq=False)
class Grant:
    """An accepted link's right to a range of `memory`."""

    link_id: bytes = field(repr=False)
    key: RemoteKey
    memory: Memory
    offset: int
    """Where the range starts in `memory`."""
    rights: Rights
    expires_at: float
    """By `clock`."""
    clock: Clock = field(repr=False)
    ended: bool = False

    def usable(self) -> bool:
        """Whether bytes may still move under it."""
        return not self.ended and self.clock() < self.expires_at

    def covers(self, right: Rights, offsets: Sequence[int], lengths: Sequence[int]) -> bool:
        """Whether it gives `right` on every range; offsets are from the start of what the key opens."""
        return right in self.rights and inside(offsets, lengths, self.key.length)


class GrantTable:
    """All grants of one fabric, by link and by key."""

    def __init__(self, clock: Clock = time.monotonic) -> None:
        self._clock = clock
        self._links: dict[bytes, set[int]] = {}
        self._grants: dict[int, Grant] = {}

    def __len__(self) -> int:
        return len(self._grants)

    def open_link(self, link_id: bytes) -> None:
        """Let grants be made for an accepted link."""
        self._links[link_id] = set()

    def close_link(self, link_id: bytes) -> list[Grant]:
        """End a link's grants and return them. Unknown ids are no error."""
        grants = [self._grants.pop(rkey) for rkey in self._links.pop(link_id, ())]
        for grant in grants:
            grant.ended = True
        return grants

    def grant(self, link_id: bytes, memory: Memory, offset: int, length: int, rights: Rights, ttl: float) -> RemoteKey:
        """Make a grant. Raises LinkNotFound; ValueError for a range outside `memory`."""
        keys = self._links.get(link_id)
        if keys is None:
            raise LinkNotFound("The link of the grant is not open here (any more). Open a new one.")
        if length < 1 or not inside((offset,), (length,), memory.length):
            raise ValueError(f"bytes {offset} to {offset + length} are no range of a memory of {memory.length} bytes")
        rkey = secrets.randbits(64)
        while rkey in self._grants:
            rkey = secrets.randbits(64)
        key = RemoteKey(rkey, length)
        self._grants[rkey] = Grant(link_id, key, memory, offset, rights, self._clock() + ttl, self._clock)
        keys.add(rkey)
        return key

    def revoke(self, key: RemoteKey) -> Grant | None:
        """End a grant and return it; None where there is none."""
        grant = self._grants.pop(key.rkey, None)
        if grant is not None:
            grant.ended = True
            self._links[grant.link_id].discard(key.rkey)
        return grant

    def find(
        self, link_id: bytes, rkey: int, right: Rights, offsets: Sequence[int], lengths: Sequence[int]
    ) -> Grant | None:
        """Return the grant that allows this access, or None."""
        grant = self._grants.get(rkey)
        if grant is None or grant.link_id != link_id or not grant.usable():
            return None
        return grant if grant.covers(right, offsets, lengths) else None


def inside(offsets: Sequence[int], lengths: Sequence[int], limit: int) -> bool:
    """Whether every range is within 0 and `limit`, and none is empty."""
    return min(offsets) >= 0 and min(lengths) >= 1 and max(map(add, offsets, lengths)) <= limit
