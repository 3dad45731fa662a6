"""One leg of a running transfer: its link, its grant, and its slices on the way.

Rules of this file:

* A leg's grant opens no more than the bytes that the leg touches, and ends with the transfer.
* A grant is renewed while it still has time; a leg whose grant has too little left waits for the new one.
* When the far end refuses a slice the grant is got anew, and what that raises is why. The slice is posted
  again, which does no harm twice; where it is refused again with nothing in place since, it fails, for what another
  attempt to get a grant raises, or for the refusal.
* When a link or rail breaks, the slices that came back are posted again as `renewal.py` says.
* All bytes of a leg land in one region: one that was made anew under the same name is another region.
* Only a flushed WRITE needs a fence at the far end: it alone may land after its completion.
* A leg stays on the fabric by which it was prepared.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from typing import Protocol

import structlog

from peermem.broker.arrival import Arrival
from peermem.broker.causes import cause_of
from peermem.broker.holdings import Holdings
from peermem.broker.leg_trace import LegTrace
from peermem.broker.link_table import LinkTable
from peermem.broker.links import HeldGrant, OutboundLink
from peermem.broker.regions import Region
from peermem.broker.renewal import BREAKS, Renewal, persistently
from peermem.broker.slots import SLOT, StagingBuffer
from peermem.broker.staging import Stager
from peermem.broker.tenants import Share
from peermem.broker.ways import candidates, instead, staged_ends
from peermem.core.errors import (
    FabricUnavailable,
    LimitReached,
    LinkNotFound,
    NodeUnreachable,
    PeermemError,
    RegionDeleted,
    RegionRevoked,
    StaleEpoch,
)
from peermem.core.failpoints import hit
from peermem.core.grant import Wanted
from peermem.core.plan import Direction, Leg, slices
from peermem.core.policy import Action
from peermem.core.spans import Span
from peermem.core.transfer import TransferMachine
from peermem.core.types import FabricKind, Path, Ranges, Rights
from peermem.fabric.base import Opcode, Status, WorkRequest
from peermem.telemetry.faults import Broken

log = structlog.get_logger(__name__)

_WAYS = {True: (Opcode.READ, Rights.READ), False: (Opcode.WRITE, Rights.WRITE)}
"""What a leg does at the far end, by whether it pulls."""


class LegHost(Protocol):
    """The transfer that a leg belongs to."""

    share: Share
    machine: TransferMachine
    span: Span
    clock: Callable[[], float]
    moved: Callable[[LegRun, int], None]
    """Told of bytes of a leg that are in place."""

    def fail(self, error: PeermemError) -> None:
        """End the transfer for this reason."""

    def check_drained(self) -> None:
        """Something came back: look whether nothing is in flight any more."""

    def hold(self, task: asyncio.Task[None]) -> None:
        """Keep a helper's task alive."""


class LegRun:
    """One leg of a running transfer; a `links.Worker`, a `staging.StagedLeg` and a `renewal.SuppliedLeg`."""

    link: OutboundLink
    held: HeldGrant
    _links: LinkTable

    def __init__(self, host: LegHost, index: int, leg: Leg, region: Region) -> None:
        """`index` is the leg's number in the machine of `host`, `region` its local region."""
        self.leg = leg
        self.fabric = leg.fabrics[0]
        """What it runs over; final once it is prepared."""
        self.why = ""
        """Why this one, in words."""
        self._host = host
        self.share = host.share
        self._index = index
        self._region = region
        self._opcode, right = _WAYS[leg.direction is Direction.PULL]
        self._wanted = Wanted(leg.other, right, host.share.subject, leg.start, leg.length)
        self.holdings = Holdings()
        self._landed_in: int | None = None
        """The region, by its uid, in which bytes of this leg are in place."""
        self._refused = False
        """Whether the last answer of the far end was a refusal."""
        self._refusal: PeermemError | None = None  # why it fails when it gets another grant
        self._renewal = Renewal(self, leg.other, host.machine)
        self._stager: Stager | None = None
        """Where an end is staged."""
        self._buffer: StagingBuffer | None = None
        """Where this end is."""
        self._cut = False
        """Whether the slices have been cut."""
        self._trace = LegTrace(host.span, leg)

    @property
    def use(self) -> tuple[Action, Region]:
        """What it does with the region here."""
        return Action.READ if self._opcode is Opcode.WRITE else Action.WRITE, self._region

    @property
    def path(self) -> Path:
        """How its bytes are reached: STAGED where either end is."""
        return Path.STAGED if self._stager is not None else self._region.path

    async def prepare(self, links: LinkTable) -> None:
        """Get the link and the grant. Raises what they raise."""
        self._links = links
        self._renewal.retry_for = links.retry_for
        (*others, last), self.why = candidates(self.leg, self._region, links.detours, self.share.subject, self.why)
        for kind in others:
            try:
                await self._prepare_over(kind, links)
            except (FabricUnavailable, LimitReached, NodeUnreachable) as error:
                links.detours.failed(self.leg.other, kind, self.share.subject, error)
                self.why = instead(kind, error)
                log.info("fabric_passed_over", fabric=kind.value, region=str(self.leg.other), cause=error.message)
            else:
                links.detours.worked(self.leg.other, kind, self.share.subject)
                return
        await persistently(lambda: self._prepare_over(last, links), links.retry_for)

    async def _prepare_over(self, kind: FabricKind, links: LinkTable) -> None:
        self.fabric = kind
        self.link = await links.get(self.leg.other.node, kind, self.share.subject)
        self._wanted = self._wanted._replace(staged=False)
        try:
            await self.acquire()
        except (StaleEpoch, LinkNotFound):  # the remote daemon was restarted: once more on a new link
            links.discard(self.link)
            self.link = await links.get(self.leg.other.node, kind, self.share.subject)
            await self.acquire()

    @property
    def is_broken(self) -> bool:
        """See StagedLeg."""
        return self._renewal.is_broken

    def slices(self) -> Iterator[Ranges]:
        """Return the slices of the leg, cut for its fabric; call once, when it is prepared."""
        limits = self.link.fabric.limits
        self._cut = True
        size = min(limits.slice_bytes, SLOT) if self._stager else limits.slice_bytes
        needs_none = self._stager is not None or not self.link.packet
        alignment = 1 if needs_none else max(self._region.reach.way.alignment, self.held.alignment)
        return slices(self.leg.ranges, size, limits.slice_ranges, alignment)

    async def acquire(self) -> None:
        """See SuppliedLeg."""
        link = self.link
        if not self._region.reach.stages(self.fabric):
            await self._be_reached(link)  # before the grant's time runs: it may take seconds
        held = await self._trace.grant(link, self._wanted)
        try:
            is_staged_here, is_staged_there = staged_ends(self.leg, self._region, link, held)
            if is_staged_there and held.slots is None:
                link.release(held)
                self._wanted = self._wanted._replace(staged=True)
                held = await self._trace.grant(link, self._wanted)
            buffer = await self._region.reach.staging.open() if is_staged_here else None
            if buffer is not None:
                await link.prepare(buffer.memory, 0, buffer.memory.length)
            self._adopt(held, buffer)
        except BaseException:
            link.release(held)
            raise

    async def _be_reached(self, link: OutboundLink) -> None:
        """Have this end's memory usable on a link."""
        try:
            await link.prepare(self._region.memory, self.leg.local_start, self.leg.local_length)
        except RegionRevoked:
            self._region.is_out_of_reach = True
            raise

    def _adopt(self, held: HeldGrant, buffer: StagingBuffer | None) -> None:
        if self._landed_in not in (None, held.region_uid):
            raise self._deleted()
        is_staged = held.slots is not None or buffer is not None
        if self._cut and is_staged is not bool(self._stager):  # made anew under its name, on another device
            raise self._deleted()
        if is_staged and self._stager is None:
            self._stager = Stager(self, self._region, buffer, self.leg.direction, self._host.machine, self._host.hold)
            self._buffer = buffer
            if self._wanted.staged or (buffer is not None and not self._region.reach.stages(self.fabric)):
                self.why += " It is staged, because a NIC would misplace bytes that begin within a page."
        self.held = held
        self.holdings.add(held)

    def next_request(self, wr_id: int) -> WorkRequest | None:
        """See Worker."""
        if self._host.machine.error is not None:
            self.give_up()
            self._host.check_drained()
            return None
        now = self._host.clock()
        if not self.held.fresh(now):
            self._renewal.is_due |= not self.held.safe(now)
            self._renew()
        if self._renewal.is_due:
            return None
        if self._stager is not None:
            return self._trace.posted(self._stager.next_request(wr_id))
        if (piece := self.take()) is None:
            return None
        return self._trace.posted(WorkRequest(wr_id, self._opcode, self._region.memory, self.held.key, piece))

    def give_up(self) -> None:
        """The transfer failed: what is ready for the wire is not posted any more."""
        if self._stager is not None:
            self._stager.drop()

    def take(self) -> Ranges | None:
        """See StagedLeg."""
        piece = self._host.machine.take(self._index)
        if piece is None:
            self._host.check_drained()
        else:
            self.holdings.took_off()
        return piece

    def want(self) -> None:
        """See StagedLeg."""
        self.link.want(self)

    def completed(self, request: WorkRequest, status: Status) -> None:
        """See Worker."""
        self._trace.completed(request, status)
        if self._stager is not None:
            self._stager.completed(request, status)
        else:
            self.ended(request.ranges, self.holdings.find(request.key), status)

    def put_back(self, ranges: Ranges, held: HeldGrant) -> None:
        """See StagedLeg."""
        self._host.machine.refused(self._index, ranges)
        self._came_back(held)

    def broke(self, ranges: Ranges, held: HeldGrant, error: PeermemError) -> None:
        """See StagedLeg."""
        # a call without an answer may still be carried out at the far end
        late = isinstance(error, BREAKS) and self._opcode is Opcode.WRITE
        if isinstance(error, BREAKS) and self._host.machine.error is None:
            self._lose(ranges, error)
        else:
            self._host.machine.broken(self._index, error, flushed=late)
        self._came_back(held, late=late)

    def ended(self, ranges: Ranges, held: HeldGrant, status: Status) -> None:
        """Take in how a slice ended; see StagedLeg."""
        machine = self._host.machine
        flushed = status is Status.WR_FLUSH_ERR
        late = flushed and self._opcode is Opcode.WRITE
        if status is Status.SUCCESS:
            hit("slice.landed")
            machine.completed(ranges.total)
            self._host.moved(self, ranges.total)
            self._landed(held)
        elif status is Status.REM_ACCESS_ERR:
            if self._refused_again(held):
                self._refusal = cause_of(status, self.leg, self.fabric, self.link)
            machine.refused(self._index, ranges)
            self._renewal.is_due = True
            self._renew()
            self._refused = True
        elif flushed and machine.error is None:
            self._lose(ranges, cause_of(status, self.leg, self.fabric, self.link))
        else:
            if status is Status.LOC_PROT_ERR and self._region.path is Path.DMABUF:
                self._region.is_out_of_reach = True
            error = cause_of(status, self.leg, self.fabric, self.link)
            machine.broken(self._index, error, flushed=late)
        self._came_back(held, late=late)

    def _lose(self, ranges: Ranges, cause: PeermemError) -> None:
        """Have a slice posted again when the break is mended."""
        machine = self._host.machine
        (machine.lost if self._opcode is Opcode.WRITE else machine.refused)(self._index, ranges)
        self._links.faults.broke(self.fabric, Broken.SLICE)
        self._renewal.broke(cause)
        self._renew()

    def _came_back(self, held: HeldGrant, *, late: bool = False) -> None:
        self.holdings.landed(held, late=late)
        self._host.check_drained()

    def _refused_again(self, held: HeldGrant) -> bool:
        """Whether the grant is one that was got because of a refusal, and no bytes have landed since."""
        return self._refused and not self._renewal.running and held is self.held and not held.released

    def _landed(self, held: HeldGrant) -> None:
        self._refused, self._refusal = False, None
        self._renewal.moved()
        self._landed_in = held.region_uid
        if self._landed_in != self.held.region_uid:
            self._host.fail(self._deleted())

    def _deleted(self) -> RegionDeleted:
        return RegionDeleted(
            f"{self.leg.other} was deleted while the transfer used it, or the policy of its node hides it by now.",
            region=self.leg.other,
        )

    def _renew(self) -> None:
        if not self._renewal.running:
            getting = self._renewal.start()
            self._host.hold(asyncio.get_running_loop().create_task(self._renewed(getting)))

    async def _renewed(self, getting: asyncio.Task[PeermemError | None]) -> None:
        error = await getting
        if error is not None:
            self._host.fail(error)

    async def settle(self) -> None:
        """See SuppliedLeg."""
        if self._stager is not None:
            self._stager.put_back()
        await self.holdings.empty()
        if self._opcode is Opcode.WRITE:
            await self.holdings.fence()
        else:
            self.holdings.give_back()
        self._host.machine.fenced(self._index)

    async def reconnect(self) -> None:
        """See SuppliedLeg."""
        self.link = await self._links.get(self.leg.other.node, self.fabric, self.share.subject)

    def disconnect(self) -> None:
        """See SuppliedLeg."""
        self._links.discard(self.link)

    def vanished(self) -> PeermemError:
        """See SuppliedLeg."""
        return self._deleted()

    def go_on(self) -> None:
        """See SuppliedLeg."""
        if self._refusal is not None:
            self._host.fail(self._refusal)
        else:
            self.link.want(self)

    def stop(self) -> None:
        """Look for no grant any more: the transfer has ended but for its fence."""
        self._renewal.stop()

    async def fence(self) -> None:
        """Return when no byte of this leg can be written any more at the far end."""
        await self.holdings.fence()

    def release(self) -> None:
        """Give the grants back: the transfer has ended."""
        self.holdings.give_back()
        self._trace.end(self.fabric, self.path, self._host.machine.error)

    @property
    def needs_flush(self) -> bool:
        """Whether the destination's device sees the leg's bytes only after `flush`."""
        if self.leg.direction is Direction.PULL:
            return self._buffer is None and self._region.memory.needs_flush
        return self.held.flush

    async def flush(self) -> None:
        """Make the leg's bytes, which are in place, visible to the destination's device. Raises what that raises."""
        if self.leg.direction is Direction.PULL:
            await self._region.memory.flush()
        else:
            await self._arrival().flush_far_end()

    async def verify(self, initial: int) -> int:
        """See Arrival.verify."""
        return await self._arrival().verify(initial)

    def _arrival(self) -> Arrival:
        return Arrival(self, self._region, self._renewal, self._host.clock)
