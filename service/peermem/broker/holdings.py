"""The grants that one leg holds: what is under way under each, and when each is given back.

Rules of this file:

* The newest is used. One that was replaced is given back when nothing is under way under it any more.
* One under which a slice was lost is kept until it is fenced: what was written under it may land late.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

from peermem.broker.links import HeldGrant
from peermem.core.types import RemoteKey


class Holdings:
    """A leg's grants, the newest last, and what is under way under them."""

    def __init__(self) -> None:
        self._grants: list[HeldGrant] = []
        self._count = 0
        self._empty = asyncio.Event()
        self._empty.set()

    def add(self, held: HeldGrant) -> None:
        """Use this grant from now on."""
        self._grants.append(held)
        self._give_back_old()

    def find(self, key: RemoteKey) -> HeldGrant:
        """Return the grant of a key under which something is under way."""
        return next(held for held in self._grants if held.key is key)

    def took_off(self) -> None:
        """A slice is under way under the newest."""
        self._grants[-1].under_way += 1
        self._count += 1
        self._empty.clear()

    def landed(self, held: HeldGrant, *, late: bool = False) -> None:
        """A slice came back, however it ended; `late` when bytes of it may still be written."""
        held.under_way -= 1
        held.is_late |= late
        self._give_back_old()
        self._count -= 1
        if not self._count:
            self._empty.set()

    @contextmanager
    def use(self) -> Iterator[HeldGrant]:
        """Use the newest for a call to the far end."""
        held = self._grants[-1]
        self.took_off()
        try:
            yield held
        finally:
            self.landed(held)

    async def empty(self) -> None:
        """Wait until nothing is under way."""
        await self._empty.wait()

    async def fence(self) -> None:
        """Return when no byte can be written any more under any of them, and all are gone; nothing is under way."""
        await asyncio.gather(*(held.link.fence(held) for held in self._grants))
        self._grants = []

    def give_back(self) -> None:
        """Give all back; nothing is under way, and nothing is written late."""
        grants, self._grants = self._grants, []
        for held in grants:
            held.link.release(held)

    def _give_back_old(self) -> None:
        for held in self._grants[:-1]:
            if not held.under_way and not held.is_late:
                self._grants.remove(held)
                held.link.release(held)
