"""This node's memory as others reach it: accepted links and the grants on its regions.

Rules of this file:

* A grant belongs to one accepted link, one range of one region and one run of this daemon, and ends with each of
  them, by release, or by time; whichever is first. Whatever is done under it counts from its first byte.
* What releases a grant returns only when no access runs under it: that is the fence of a transfer.
* A link of a fabric that separates subjects is one subject's, and no grant over it is another's.
* A region that no NIC reaches, or not where the transfer needs it, is granted by a staging buffer of the grant's own,
  with the same end.
* The policy is asked here, at the node that owns the region, for the client's identity.
* This daemon uses its own regions through the same door (`GrantSource`), so there is one way to a key.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from operator import add

from peermem.broker.accepted import AcceptedLink, AcceptedLinks, Voucher
from peermem.broker.access import Use, checksum
from peermem.broker.guard import Guard
from peermem.broker.leg_trace import grant_span
from peermem.broker.regions import Region
from peermem.broker.slots import StagingBuffer, spoil
from peermem.core.errors import (
    AccessDenied,
    FabricUnavailable,
    GrantRefused,
    LinkNotFound,
    OutOfRange,
    RegionRevoked,
    SegmentsMismatch,
    ShuttingDown,
    StaleEpoch,
)
from peermem.core.failpoints import chosen, hit, reach
from peermem.core.grant import Wanted
from peermem.core.names import ChildName
from peermem.core.policy import Action
from peermem.core.region import State
from peermem.core.segments import check_count
from peermem.core.spans import Span
from peermem.core.types import FabricKind, GrantedKey, LinkAttributes, RemoteKey, Rights
from peermem.fabric.base import Fabric
from peermem.remote.base import OpenedLink

MAX_CHECKED = 262_144
"""Ranges of one checksum."""
_ACTIONS = {Rights.READ: Action.READ, Rights.WRITE: Action.WRITE}
_AT_ONCE = 256
"""Grants that are ended in one turn of the loop."""


@dataclass(slots=True)
class _Grant:
    grant_id: int
    region: Region
    wanted: Wanted
    link_id: bytes = field(repr=False)
    key: RemoteKey = field(repr=False)
    fabric: Fabric
    span: Span
    staging: StagingBuffer | None = None
    timer: asyncio.TimerHandle | None = None
    ended: bool = False
    copies: set[asyncio.Future[None]] = field(default_factory=set)
    """Copies between the region and the staging buffer that are under way."""


class Serving:
    """Accepted links and their grants."""

    def __init__(
        self,
        node: str,
        epoch: str,
        fabrics: Mapping[FabricKind, Fabric],
        find: Callable[[ChildName], Region],
        policy: Guard,
        grant_ttl: float,
        taken_back: Callable[[Region], None],
    ) -> None:
        """`taken_back` is told of a region whose memory its exporter has taken back, as a grant showed."""
        self._node = node
        self.epoch = epoch
        self._fabrics = fabrics
        self._find = find
        self._policy = policy
        self._ttl = grant_ttl
        self._taken_back = taken_back
        self._links = AcceptedLinks(fabrics)
        self._grants: dict[int, _Grant] = {}
        self._by_region: dict[Region, set[int]] = {}
        self._making: dict[Region, set[asyncio.Future[None]]] = {}
        """Grants that a fabric is about to make, by region."""
        self._tasks: set[asyncio.Task[None]] = set()
        self._closed = False

    @property
    def grant_count(self) -> int:
        """Grants that are alive."""
        return len(self._grants)

    def link_counts(self) -> dict[FabricKind, int]:
        """Accepted links by fabric."""
        return self._links.counts()

    def links(self) -> list[AcceptedLink]:
        """Accepted links."""
        return self._links.every()

    def open_link(self, node: str, offer: LinkAttributes, vouched: Voucher = lambda: None) -> OpenedLink:
        """Accept a link of `node`, or have the one with the id in `offer` rebuilt; `vouched` as in `vouch`.

        Raises FabricUnavailable, LimitReached, LinkNotFound, ShuttingDown.
        """
        hit("link.accept")
        if self._closed:
            raise ShuttingDown("This daemon is shutting down; it takes no new links.")
        return OpenedLink(self._links.open(node, offer, vouched), self.epoch)

    def node_of(self, link_id: bytes, epoch: str) -> str:
        """Return the node that opened a link. Raises LinkNotFound, StaleEpoch."""
        return self._link(link_id, epoch).node

    def check_node(self, link_id: bytes, node: str) -> None:
        """Return where a link is unknown or of `node`. Raises AccessDenied."""
        link = self._links.find(link_id)
        if link is not None and link.node != node:
            raise AccessDenied(f"The link is of another node than nodes/{node}.", node=node)

    def vouch(self, link_id: bytes, vouched: Voucher) -> None:
        """The node of a link has shown its certificate again. Unknown ids are no error."""
        if (link := self._links.find(link_id)) is not None:
            link.vouched = vouched

    def check_vouched(self, link_id: bytes) -> None:
        """Return where what comes over a link is its node's, or the link is unknown. One whose node's certificate
        counts no more is closed. Raises Unauthenticated, AccessDenied."""
        link = self._links.find(link_id)
        try:
            if link is not None:
                link.vouched()
        except AccessDenied:
            self.link_lost(link_id)
            raise

    async def close_link(self, link_id: bytes) -> None:
        """End an accepted link and its grants. Unknown ids are no error."""
        link = self._links.pop(link_id)
        if link is None:
            return
        await link.fabric.hang_up(link_id)
        for grant in [self._grants[grant_id] for grant_id in link.grants if grant_id in self._grants]:
            await self._settle(grant)

    def link_lost(self, link_id: bytes) -> None:
        """End an accepted link soon: it is gone, as the fabric reports, or may not go on."""
        self._spawn(self.close_link(link_id))

    async def acquire(self, link_id: bytes, epoch: str, wanted: Wanted) -> GrantedKey:
        """Give a link the right to a range of a region. Raises as GrantSource.acquire_grant."""
        link = self._link(link_id, epoch)
        self._check_subject(link, wanted)
        region = self._find(wanted.region)
        self._policy.check_region(wanted.subject, _ACTIONS[wanted.right], region, under=link_id)
        region.check_usable()
        _check_inside(region, wanted)
        link.check_room()
        if link.fabric.kind not in region.fabrics:
            raise FabricUnavailable(f"{region.name} is not reached over {link.fabric.kind.value}: {region.why}")
        made: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._making.setdefault(region, set()).add(made)
        link.making += 1
        try:
            return await self._make(link_id, link, region, wanted)
        except RegionRevoked:
            self._taken_back(region)
            raise
        finally:
            link.making -= 1
            made.set_result(None)
            self._making[region].discard(made)
            if not self._making[region]:
                del self._making[region]

    def _check_subject(self, link: AcceptedLink, wanted: Wanted) -> None:
        """Return where a link may have a grant for a subject. Raises AccessDenied."""
        subject = wanted.subject.named_by(self._node)
        if link.subject not in ("", subject):
            raise AccessDenied(
                f"A grant for {subject} was asked for over a link of {link.subject}. Ask over a link of {subject}.",
                subject=subject,
            )

    async def _make(self, link_id: bytes, link: AcceptedLink, region: Region, wanted: Wanted) -> GrantedKey:
        await reach("grant.make")
        grant = await self._grant(link_id, link.fabric, region, wanted)
        if self._links.find(link_id) is not link or region.state is not State.READY:
            await self._end(grant)
            region.check_usable()
            raise LinkNotFound("The link was closed while a grant was made for it. Open a new one.")
        if (denial := self._policy.denial(wanted.subject, _ACTIONS[wanted.right], region)) is not None:
            await self._end(grant)  # `revoke_denied` could not see it
            raise denial
        grant.timer = asyncio.get_running_loop().call_later(self._ttl, self._expire, grant.grant_id)
        self._grants[grant.grant_id] = grant
        self._by_region.setdefault(region, set()).add(grant.grant_id)
        link.grants.add(grant.grant_id)
        return GrantedKey(
            grant.grant_id,
            grant.key,
            self._ttl,
            region.uid,
            grant.staging is not None,
            region.reach.way.alignment,
            wanted.right is Rights.WRITE and grant.staging is None and region.memory.needs_flush,
        )

    async def _grant(self, link_id: bytes, fabric: Fabric, region: Region, wanted: Wanted) -> _Grant:
        staging = None
        if wanted.staged or region.reach.stages(fabric.kind):
            nics, subject = region.reach.way.nics, wanted.subject.named_by(self._node)
            staging = await StagingBuffer.open([fabric], nics, subject, wanted.length)
        span = grant_span(wanted, fabric.kind)
        try:
            if staging is None:
                key = await fabric.grant(link_id, region.memory, wanted.offset, wanted.length, wanted.right, self._ttl)
            else:
                key = await fabric.grant(link_id, staging.memory, 0, staging.memory.length, wanted.right, self._ttl)
        except BaseException as error:
            span.end(error)
            if staging is not None:
                await staging.close()
            raise
        return _Grant(secrets.randbits(63) | 1, region, wanted, link_id, key, fabric, span, staging)

    async def release(self, link_id: bytes, grant_ids: Sequence[int]) -> None:
        """End grants of a link; afterwards no byte moves under them. Unknown ones are no error."""
        named = (self._grants.get(grant_id) for grant_id in grant_ids)
        ending = [self._end(grant) for grant in named if grant is not None and grant.link_id == link_id]
        if len(ending) == 1:
            await ending[0]
        else:
            await asyncio.gather(*ending)  # they share the fences of their rails

    def release_soon(self, link_id: bytes, grant_id: int) -> None:
        """End a grant of a link, and wait for nothing."""
        self._spawn(self.release(link_id, [grant_id]))

    async def revoke_region(self, region: Region) -> None:
        """End all grants on a region that ends; afterwards no byte of it moves under them."""
        while region in self._making:
            await asyncio.wait(list(self._making[region]))
        await self._end_all([self._grants[grant_id] for grant_id in self._by_region.get(region, ())], lambda _: True)

    async def revoke_denied(self) -> None:
        """End the grants that the policy of now does not allow; afterwards no byte moves under them."""
        await self._end_all(
            list(self._grants.values()),
            lambda each: self._policy.denial(each.wanted.subject, _ACTIONS[each.wanted.right], each.region) is not None,
        )

    async def _end_all(self, grants: Sequence[_Grant], which: Callable[[_Grant], bool]) -> None:
        """End some grants, all at the same time: a far end that is slow to let go of one keeps no other one open."""
        ending: list[asyncio.Task[None]] = []
        for index, grant in enumerate(grants):
            if which(grant):
                ending.append(self._spawn(self._end(grant)))
            if index % _AT_ONCE == _AT_ONCE - 1:
                await asyncio.sleep(0)
        await asyncio.gather(*ending)

    async def copy_staged(
        self, link_id: bytes, grant_id: int, pieces: Sequence[tuple[int, int, int]], *, into_region: bool
    ) -> None:
        """Copy between a grant's staging buffer and its region. Raises as GrantSource.copy_staged."""
        grant = self._granted(link_id, grant_id)
        right = Rights.WRITE if into_region else Rights.READ
        if grant.staging is None or right is not grant.wanted.right:
            raise GrantRefused("The grant opens no staging buffer to copy through in this direction.")
        region, buffer, first = grant.region, grant.staging.memory, grant.wanted.offset
        if not pieces:
            return
        for offset, start, length in pieces:
            if length < 1 or offset + length > grant.wanted.length or start + length > buffer.length:
                raise OutOfRange(
                    f"A piece to copy is outside what the grant opens of {region.name}, or outside its staging buffer.",
                    region=region.name,
                )
        pieces = [(first + offset, start, length) for offset, start, length in pieces]
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        grant.copies.add(done)
        try:
            with Use(region) as use:
                if into_region:
                    spoil(buffer, pieces[0][1])
                await use.copy_staged(buffer, pieces, into_region=into_region)
        finally:
            grant.copies.discard(done)
            done.set_result(None)

    async def flush(self, link_id: bytes, grant_id: int) -> None:
        """Make what was written under a grant visible to its device. Raises as GrantSource.flush."""
        with Use(self._granted(link_id, grant_id).region) as use:
            await use.flush()

    async def checksum(
        self, link_id: bytes, grant_id: int, offsets: Sequence[int], lengths: Sequence[int], initial: int
    ) -> int:
        """Return the CRC32C of ranges under a grant, on top of `initial`. Raises GrantRefused, OutOfRange,
        SegmentsMismatch, InvalidField, RegionDeleted."""
        grant = self._granted(link_id, grant_id)
        first, length = grant.wanted.offset, grant.wanted.length
        if len(offsets) != len(lengths):
            raise SegmentsMismatch(f"{len(offsets)} offsets and {len(lengths)} lengths were given to checksum.")
        check_count(len(offsets), MAX_CHECKED)
        if offsets and max(map(add, offsets, lengths)) > length:
            raise OutOfRange(
                f"A range to checksum is outside the {length} bytes that the grant opens of {grant.region.name}.",
                region=grant.region.name,
            )
        return await checksum(grant.region, [first + offset for offset in offsets], lengths, initial)

    async def close(self) -> None:
        """End all links and grants and accept no more."""
        self._closed = True
        await asyncio.gather(*(self.close_link(link_id) for link_id in self._links.ids()))
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _link(self, link_id: bytes, epoch: str) -> AcceptedLink:
        if epoch != self.epoch:
            raise StaleEpoch("The link belongs to an earlier run of this daemon. Open a new one.")
        link = self._links.find(link_id)
        if link is None:
            raise LinkNotFound("The link is not open here (any more). Open a new one.")
        return link

    def _granted(self, link_id: bytes, grant_id: int) -> _Grant:
        grant = self._grants.get(grant_id)
        if grant is None or grant.link_id != link_id or grant.ended:
            raise GrantRefused("The grant has ended, or is of another link. Acquire a new one.")
        return grant

    async def _end(self, grant: _Grant) -> None:
        grant.ended = True
        await reach("grant.release")
        if not chosen("grant.keep"):
            await grant.fabric.revoke(grant.key)
        await self._settle(grant)

    async def _settle(self, grant: _Grant) -> None:
        """The key opens nothing any more: wait for copies out of and into the staging buffer, and free it."""
        grant.ended = True
        if grant.copies:
            await asyncio.wait(list(grant.copies))
        if grant.staging is not None:
            await grant.staging.close()
        grant.span.end()
        self._drop(grant.grant_id)

    def _expire(self, grant_id: int) -> None:
        if (grant := self._grants.get(grant_id)) is not None:
            self._spawn(self._end(grant))

    def _drop(self, grant_id: int) -> None:
        grant = self._grants.pop(grant_id, None)
        if grant is None:
            return
        if grant.timer is not None:
            grant.timer.cancel()
        held = self._by_region[grant.region]
        held.discard(grant_id)
        if not held:
            del self._by_region[grant.region]
        if (link := self._links.find(grant.link_id)) is not None:
            link.grants.discard(grant_id)

    def _spawn(self, work: Coroutine[None, None, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task


def _check_inside(region: Region, wanted: Wanted) -> None:
    end, length = wanted.offset + wanted.length, region.memory.length
    if end > length:
        raise OutOfRange(
            f"A segment reaches to byte {end} of {region.name}, which has {length} bytes.",
            region=region.name,
            reach=end,
            length=length,
        )
