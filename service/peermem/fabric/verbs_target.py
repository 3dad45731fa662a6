"""The target's side of the verbs fabric: accepted links and the grants that they have on local memory.

Rules of this file:

* A grant ends by revocation, by time, or with its link. The NIC knows no time: a timer revokes what has expired.
* When `revoke` returns nothing moves under the key: its doors are shut, and its rails are fenced.
* Ending a link ends its grants; two who end the same thing both wait for it.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

from peermem.core.errors import FabricUnavailable, LinkNotFound, RegistrationRefused
from peermem.core.types import FabricKind, LinkAttributes, RemoteKey, Rights
from peermem.fabric.grants import Clock, inside
from peermem.fabric.verbs_accepted import AcceptedLink
from peermem.fabric.verbs_grants import Door, Grant
from peermem.fabric.verbs_memory import MemoryTable, Registration
from peermem.fabric.verbs_nic import NicTable
from peermem.fabric.verbs_rail import Rail
from peermem.fabric.verbs_types import Settings, VerbsError
from peermem.fabric.verbs_work import MAX_RAILS, is_sound_end
from peermem.memory import Memory

_RAIL_WAIT = 2.0
"""Seconds that a grant waits for a rail that is being rebuilt."""


class Target:
    """All accepted links of a fabric."""

    def __init__(
        self,
        nics: NicTable,
        memories: MemoryTable,
        settings: Settings,
        clock: Clock,
        on_link_lost: Callable[[bytes], None],
    ) -> None:
        self._nics = nics
        self._memories = memories
        self._settings = settings
        self._clock = clock
        self._on_link_lost = on_link_lost
        self._links: dict[bytes, AcceptedLink] = {}
        self._grants: dict[int, Grant] = {}
        self._ending: dict[bytes | int, asyncio.Task[None]] = {}
        self._timer: asyncio.TimerHandle | None = None

    def __len__(self) -> int:
        return len(self._links)

    @property
    def grant_count(self) -> int:
        """Grants that have not ended."""
        return len(self._grants)

    def accept(self, offer: LinkAttributes) -> LinkAttributes:
        """See Fabric."""
        ends = offer.queue_pairs
        if not 1 <= len(ends) <= MAX_RAILS or not all(map(is_sound_end, ends)):
            raise FabricUnavailable(
                f"A link over verbs was offered with {len(ends)} queue pairs, which must be 1 to {MAX_RAILS} sound "
                "ones. Run the same release of the daemon on both nodes."
            )
        if offer.link_id:
            link = self._find(offer.link_id)
            answer = link.reopen(ends)
        else:
            link = AcceptedLink(secrets.token_bytes(16), offer.subject, self._settings, self._lost)
            try:
                windows = self._settings.windows and not self._memories.needs_domains
                answer = link.open(ends, self._nics.usable(), windows=windows)
            except BaseException:
                link.close()
                raise
            self._links[link.link_id] = link
        return LinkAttributes(FabricKind.VERBS, len(answer), link.link_id, queue_pairs=answer)

    def _find(self, link_id: bytes) -> AcceptedLink:
        link = self._links.get(link_id)
        if link is None:
            raise LinkNotFound("The link is not open here (any more). Open a new one.")
        return link

    # Grants

    async def grant(
        self, link_id: bytes, memory: Memory, offset: int, length: int, rights: Rights, ttl: float
    ) -> RemoteKey:
        """See Fabric."""
        link = self._find(link_id)
        if length < 1 or not inside((offset,), (length,), memory.length):
            raise ValueError(f"bytes {offset} to {offset + length} are no range of a memory of {memory.length} bytes")
        registration = self._memories.find(memory)
        reaching = [rail for rail in link.rails if registration is not None and rail.port.nic in registration.ports]
        if registration is None or not reaching:
            raise FabricUnavailable("The memory is registered with no NIC of the link's rails. Use tcp for it.")
        if not registration.takes_windows and not all(rail.domain.is_apart for rail in reaching):
            raise LinkNotFound(
                "The link was opened before this node had memory of path DMABUF, which only links with protection "
                "domains of their own can be granted. Open a new one."
            )
        for rail in reaching:
            if not rail.domain.is_apart:
                await registration.extend(rail, offset, length)
        expires_at = self._clock() + ttl
        doors = await self._open(link, reaching, registration, offset, length, rights)
        name = secrets.randbits(64)
        by_rail = {door.rail: tuple(door.parts) for door in doors}
        key = RemoteKey(name, length, tuple(by_rail.get(rail, ()) for rail in link.rails))
        grant = Grant(link_id, memory, expires_at, key, doors)
        self._grants[name] = link.grants[name] = grant
        self._watch()
        return key

    async def _open(
        self,
        link: AcceptedLink,
        rails: list[Rail],
        registration: Registration,
        offset: int,
        length: int,
        rights: Rights,
    ) -> list[Door]:
        """Open a range on the rails that are up; when none is, wait for one."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + _RAIL_WAIT
        while True:
            doors = [Door(rail) for rail in rails if rail.up]
            link.opening.update(doors)
            good: list[Door] = []
            try:
                opening = (door.open(registration, offset, length, rights) for door in doors)
                opened = await asyncio.gather(*opening, return_exceptions=True)
                if link.link_id not in self._links:
                    raise LinkNotFound("The link was closed while a grant was made for it. Open a new one.")
                good = _opened(doors, opened)
            finally:
                link.opening.difference_update(doors)
                _close([door for door in doors if door not in good])
            if good:
                return good
            try:
                async with asyncio.timeout_at(deadline):
                    await link.news.wait()
            except TimeoutError:
                raise FabricUnavailable("No rail of the link came up in time for a grant. Try again.") from None

    async def revoke(self, name: int) -> None:
        """See Fabric."""
        grant = self._grants.pop(name, None)
        if grant is None:
            await self._settled(name)
            return
        await self._end(name, self._revoke(name, grant))

    async def _revoke(self, name: int, grant: Grant) -> None:
        link = self._links.get(grant.link_id)
        if link is None:  # it has ended since, and its grants with it
            await self._settled(grant.link_id)
            return
        del link.grants[name]
        for door in grant.doors:
            door.shut()
        await link.fence([door.rail for door in grant.doors])
        _close(grant.doors)

    async def unregistering(self, memory: Memory) -> None:
        """End what grants there still are on a memory, those of links that are hanging up included."""
        for name in [name for name, grant in self._grants.items() if grant.memory is memory]:
            await self.revoke(name)
        hanging_up = [task for what, task in self._ending.items() if isinstance(what, bytes)]
        if hanging_up:
            await asyncio.wait(hanging_up)

    async def expire(self) -> None:
        """Revoke what has expired by the clock."""
        now = self._clock()
        for name in [name for name, grant in self._grants.items() if grant.expires_at <= now]:
            await self.revoke(name)

    def _watch(self) -> None:
        if self._timer is None and self._grants:
            left = min(grant.expires_at for grant in self._grants.values()) - self._clock()
            self._timer = asyncio.get_running_loop().call_later(max(left, 0.01), self._look)

    def _look(self) -> None:
        self._timer = None
        now = self._clock()
        for name in [name for name, grant in self._grants.items() if grant.expires_at <= now]:
            grant = self._grants.pop(name)
            self._begin(name, self._revoke(name, grant))
        self._watch()

    # Ends

    async def hang_up(self, link_id: bytes) -> None:
        """See Fabric."""
        link = self._links.get(link_id)
        if link is None:
            await self._settled(link_id)
        else:
            self._forget(link)
            names = list(link.grants)
            self._ending |= dict.fromkeys(names, task := self._begin(link_id, self._hang_up(link, names)))
            await asyncio.shield(task)

    async def _hang_up(self, link: AcceptedLink, names: Sequence[int]) -> None:
        """`names` are those of its grants, which end with it."""
        try:
            await link.farewell()
            link.close()
        finally:
            for name in names:
                self._ending.pop(name, None)

    def _forget(self, link: AcceptedLink) -> None:
        del self._links[link.link_id]
        for name in link.grants:
            self._grants.pop(name, None)

    def _lost(self, link: AcceptedLink) -> None:
        if link.link_id in self._links:
            self._forget(link)
            link.close()
            self._on_link_lost(link.link_id)

    def lose(self, is_gone: Callable[[Rail], bool]) -> None:
        """A NIC is gone: end the links of which no rail is left."""
        for link in list(self._links.values()):
            for rail in filter(is_gone, link.rails):
                rail.lose()
            if all(rail.is_lost for rail in link.rails):
                self._lost(link)

    async def close(self) -> None:
        """End all links."""
        await asyncio.gather(*(self.hang_up(link_id) for link_id in list(self._links)))
        if self._ending:
            await asyncio.wait(list(self._ending.values()))
        if self._timer is not None:
            self._timer.cancel()

    async def _end(self, what: bytes | int, work: Coroutine[Any, Any, None]) -> None:
        await asyncio.shield(self._begin(what, work))

    def _begin(self, what: bytes | int, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work)
        self._ending[what] = task
        task.add_done_callback(lambda _: self._ending.pop(what, None))
        return task

    async def _settled(self, what: bytes | int) -> None:
        task = self._ending.get(what)
        if task is not None:
            await asyncio.wait([task])


def _opened(doors: Sequence[Door], opened: Sequence[bool | BaseException]) -> list[Door]:
    """Return the doors that are open. Raises RegistrationRefused, where the NIC refused one."""
    for outcome in opened:
        if isinstance(outcome, (VerbsError, TimeoutError)):
            raise RegistrationRefused(f"The NIC refused to open the memory to a link: {outcome}.") from outcome
        if isinstance(outcome, BaseException):
            raise outcome
    return [door for door, is_open in zip(doors, opened, strict=True) if is_open]


def _close(doors: Sequence[Door]) -> None:
    for door in doors:
        door.close()
