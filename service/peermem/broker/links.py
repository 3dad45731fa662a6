"""One link to another node, as initiator: the transfers that share it, and the grants that they hold over it.

Rules of this file:

* It carries what has its turn among all that goes to its node over its fabric (`traffic`).
* On a fabric that separates subjects it is one subject's, at both ends; else it is for all.
* A grant is for whoever asked for it, and is kept for nobody else.
* A link that goes down completes all it had. One whose rail broke goes on with its other rails.
* A fence is up when the far end has ended the grant, when nobody listens there after it closed the link, or when the
  grant's time is over: silence proves nothing.
"""

from __future__ import annotations

import asyncio
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import structlog

from peermem.broker.slots import SLOT, Slots
from peermem.broker.traffic import Clock, Traffic, Worker
from peermem.core.errors import NodeUnreachable, PeermemError
from peermem.core.failpoints import chosen, reach
from peermem.core.grant import Wanted
from peermem.core.retries import Backoff
from peermem.core.types import LinkAttributes, Ranges, RemoteKey
from peermem.fabric.base import Completion, Fabric, Link, LinkClosed, LinkEnd, Status, WorkRequest
from peermem.memory import Memory
from peermem.remote.base import Ear, GrantSource

log = structlog.get_logger(__name__)


@dataclass(slots=True, eq=False)
class HeldGrant:
    """A grant that this node holds on a range of a remote region."""

    link: OutboundLink = field(repr=False)
    """Over which it is held."""
    grant_id: int
    key: RemoteKey = field(repr=False)
    acquired_at: float
    """By the monotonic clock, before the request was sent: its time is over at `ttl` from here, or later."""
    over_at: float
    """By the same clock: by now its time is over at the far end, whose count began before its answer came."""
    ttl: float
    region_uid: int
    """Tells the region from others of the same name."""
    slots: Slots | None
    """Of the staging buffer that the key opens, where it does."""
    alignment: int
    """Bytes at whose multiples packets have to begin in the region, from the region's first byte."""
    flush: bool
    """Whether what is written under it is visible to the device only after `OutboundLink.flush`."""
    released: bool = False
    """Whether this node had it ended."""
    under_way: int = 0
    """Slices and calls under it that did not come back yet."""
    is_late: bool = False
    """Whether bytes that were written under it may land behind its last slice, unless it is fenced."""

    def fresh(self, now: float) -> bool:
        """Whether it has half its time left: good for new work."""
        return now < self.acquired_at + self.ttl / 2

    def safe(self, now: float) -> bool:
        """Whether it has a quarter of its time left: good for one more slice."""
        return now < self.acquired_at + self.ttl * 3 / 4


class OutboundLink:
    """One link of this node to another (or to itself, for the local fabric)."""

    def __init__(
        self, node: str, fabric: Fabric, source: GrantSource, traffic: Traffic, clock: Clock, subject: str = ""
    ) -> None:
        """`source` is the daemon at the far end, the short name of whose node is `node`; `traffic` is all that goes
        there over `fabric`; `subject` is whose link it is, where the fabric separates them."""
        self.node = node
        self.subject = subject
        self.fabric = fabric
        self.source = source
        self.down_cause: tuple[LinkEnd, str] | None = None
        self.rail_cause = ""
        """Why the last rail that broke did so."""
        self.used_at = clock()
        self.on_down: Callable[[], None] = lambda: None
        self.on_rail_down: Callable[[], None] = lambda: None
        self._clock = clock
        self._link: Link | None = None
        self._ear: Ear | None = None
        self._link_id = b""
        self._epoch = ""
        self._is_confirmed = False
        """Whether the directory has told of the run of the far end's daemon that this link was opened to."""
        self._held: set[HeldGrant] = set()
        self._acquiring = 0
        """Grants that are on their way, and memory that is made ready for them."""
        self._traffic = traffic
        self._carried = 0
        """Slices that are outstanding."""

    async def open(self, rails: int) -> None:
        """Connect. Raises NodeUnreachable and what the far end's OpenLink raises."""
        await reach("link.open")
        self._link = await self.fabric.connect(self._exchange, self, rails, self.subject)
        self._ear = self.source.use_rails(self._link_id, self._link.carry)
        self.used_at = self._clock()

    async def _exchange(self, offer: LinkAttributes) -> LinkAttributes:
        opened = await self.source.open_link(replace(offer, subject=self.subject))
        self._link_id, self._epoch = opened.attributes.link_id, opened.epoch
        return opened.attributes

    def has_ended(self, epoch: str) -> bool:
        """Whether the far end's daemon is another run than when the link was opened. `epoch` is what the directory says
        now, which may be late: it counts only once it has told of the run that this link is to."""
        self._is_confirmed |= epoch == self._epoch
        return self._is_confirmed and epoch not in ("", self._epoch)

    @property
    def idle(self) -> bool:
        """Whether nobody holds or waits for anything."""
        return not (self._carried or self._acquiring or self._held)

    @property
    def is_down(self) -> bool:
        """See Carrier."""
        return self.down_cause is not None

    @property
    def packet(self) -> int:
        """See Link."""
        return self._link.packet if self._link is not None else 0

    @property
    def rails_down(self) -> int:
        """See Link."""
        return self._link.rails_down if self._link is not None else 0

    @property
    def grant_count(self) -> int:
        """Grants that are held, or being fenced."""
        return len(self._held)

    async def prepare(self, memory: Memory, offset: int, length: int) -> None:
        """See Link."""
        if self._link is None:
            return
        self._acquiring += 1
        try:
            await self._link.prepare(memory, offset, length)
        finally:
            self._acquiring -= 1
            self.used_at = self._clock()

    async def grant(self, wanted: Wanted) -> HeldGrant:
        """Return a new grant, which is the caller's until `release` or `fence`. Raises as acquire_grant."""
        await reach("grant.acquire")
        before = self._clock()
        self._acquiring += 1
        try:
            granted = await self.source.acquire_grant(self._link_id, self._epoch, wanted)
        finally:
            self._acquiring -= 1
            self.used_at = self._clock()
        held = HeldGrant(
            self,
            granted.grant_id,
            granted.key,
            before,
            self.used_at + granted.ttl + _CLOCK_SLACK,
            granted.ttl,
            granted.region_uid,
            Slots(granted.key.length // SLOT) if granted.staged else None,
            granted.alignment,
            granted.flush,
        )
        self._held.add(held)
        return held

    def release(self, held: HeldGrant) -> None:
        """Have a grant ended soon, under which nothing is under way; a second time is no error."""
        if held in self._held and not chosen("grant.forget"):
            self._let_go(held)
            self.source.give_back(self._link_id, held.grant_id)

    def _let_go(self, held: HeldGrant) -> None:
        held.released = True
        self._held.discard(held)
        self.used_at = self._clock()

    async def fence(self, held: HeldGrant) -> None:
        """Return when no byte can move any more under a grant."""
        held.released = True
        try:
            if not chosen("fence.skip"):
                await self._fence(held)
        finally:
            self._let_go(held)

    async def _fence(self, held: HeldGrant) -> None:
        backoff = Backoff(_FENCE_PAUSE, _FENCE_TIMEOUT)
        while (left := held.over_at - self._clock()) > 0:
            if await self._is_fenced(held):
                return
            await asyncio.sleep(min(left, backoff.pause(random.random())))

    async def _is_fenced(self, held: HeldGrant) -> bool:
        closed = self.down_cause is not None and self.down_cause[0] is LinkEnd.REMOTE_CLOSED
        try:
            async with asyncio.timeout(_FENCE_TIMEOUT):
                await reach("link.fence")
                await self.source.release_grants(self._link_id, [held.grant_id])
                return True
        except NodeUnreachable as error:
            return closed and error.metadata.get("listens") == "no"
        except (TimeoutError, PeermemError):
            return False
        except Exception:
            log.exception("fence_defect", node=self.node)
            return False

    async def checksum(self, held: HeldGrant, ranges: Ranges, initial: int) -> int:
        """Return the CRC32C of the remote ranges, on top of `initial`. Raises as GrantSource.checksum."""
        return await self.source.checksum(self._link_id, held.grant_id, ranges.remote, ranges.lengths, initial)

    async def copy_staged(self, held: HeldGrant, pieces: Sequence[tuple[int, int, int]], *, into_region: bool) -> None:
        """Have the far end copy between a region and its staging buffer. Raises as GrantSource.copy_staged."""
        await self.source.copy_staged(self._link_id, held.grant_id, pieces, into_region=into_region)

    async def flush(self, held: HeldGrant) -> None:
        """Have the far end make what was written under a grant visible to its device. Raises as GrantSource.flush."""
        await self.source.flush(self._link_id, held.grant_id)

    def want(self, worker: Worker) -> None:
        """Give `worker` turns until it has no request."""
        self._traffic.want(worker, self)

    def carry(self, request: WorkRequest) -> None:
        """See Carrier."""
        self._carried += 1
        try:
            if self._link is None or self.is_down or chosen("slice.post"):
                raise LinkClosed
            self._link.post(request)
        except LinkClosed:
            asyncio.get_running_loop().call_soon(self.completed, [Completion(request.wr_id, Status.WR_FLUSH_ERR)])

    def completed(self, completions: list[Completion]) -> None:
        """See LinkEvents. What was flushed is passed on when the link has said why (`down`)."""
        flushed = [completion for completion in completions if completion.status is Status.WR_FLUSH_ERR]
        if flushed:
            asyncio.get_running_loop().call_soon(self._pass_on, flushed)
            completions = [completion for completion in completions if completion.status is not Status.WR_FLUSH_ERR]
        self._pass_on(completions)

    def _pass_on(self, completions: list[Completion]) -> None:
        self.used_at = self._clock()
        self._carried -= len(completions)
        self._traffic.ended(completions)

    def heard(self, message: bytes) -> None:
        """See LinkEvents."""
        if self._ear is not None:
            self._ear.heard(message)

    def rail_down(self, cause: str, pause: float) -> None:
        """See LinkEvents."""
        self._rails_broke()
        self.rail_cause = cause
        seconds = round(pause, 3) if pause < math.inf else None
        log.warning("rail_set_aside", node=self.node, fabric=self.fabric.kind.value, cause=cause, seconds=seconds)
        self.on_rail_down()

    def rail_up(self) -> None:
        """See LinkEvents."""
        log.info("rail_back", node=self.node, fabric=self.fabric.kind.value)

    def down(self, end: LinkEnd, cause: str) -> None:
        """See LinkEvents."""
        self.down_cause = (end, cause)
        self._rails_broke()
        self.on_down()
        self._traffic.went_down(self)

    def _rails_broke(self) -> None:
        if self._ear is not None:
            self._ear.broke()

    async def close(self) -> None:
        """Close both ends. The far end being gone is no error."""
        if self._link is not None:
            await self._link.close()
        if self._link_id:
            try:
                async with asyncio.timeout(_FENCE_TIMEOUT):
                    await reach("link.close")
                    await self.source.close_link(self._link_id)
            except (TimeoutError, PeermemError):
                pass  # the far end ends the link itself when its connections close


_FENCE_TIMEOUT = 2.0
_FENCE_PAUSE = 0.05
"""Seconds between the first two attempts to raise a fence."""
_CLOCK_SLACK = 1.0
"""Seconds that two monotonic clocks may part by within a grant's time."""
