"""One leg of a running transfer: its link, its grant, and its slices on the way.

Rules of this file:

* A grant is renewed while it still has time; a leg whose grant has too little left waits for the new one.
* When the far end refuses a slice the grant is got anew, and what that raises is why. The slice is posted
  again, which does no harm twice; it fails when it is refused again with nothing in place since.
* All bytes of a leg land in one region: one that was made anew under the same name is another region.
* Only a flushed WRITE needs a fence at the far end: it alone may land after its completion.
* The fabric is the first of those that the plan allows that reaches both regions; a leg stays on it.
* What a NIC would misplace in a region is staged at that end.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from itertools import chain
from operator import add
from typing import Protocol

import structlog

from peermem.broker.access import checksum
from peermem.broker.causes import cause_of
from peermem.broker.link_table import LinkTable
from peermem.broker.links import HeldGrant, OutboundLink, Wanted
from peermem.broker.regions import Region
from peermem.broker.slots import SLOT, StagingBuffer
from peermem.broker.staging import Stager
from peermem.broker.tenants import Share
from peermem.core.errors import (
    ChecksumMismatch,
    FabricUnavailable,
    Internal,
    LinkNotFound,
    NodeUnreachable,
    OutOfRange,
    PeermemError,
    RegionDeleted,
    RegionNotFound,
    StaleEpoch,
)
from peermem.core.plan import Direction, Leg, slices
from peermem.core.policy import Action
from peermem.core.transfer import TransferMachine
from peermem.core.types import FabricKind, Path, Ranges, RemoteKey, Rights
from peermem.fabric.base import Opcode, Status, WorkRequest

log = structlog.get_logger(__name__)


class LegHost(Protocol):
    """The transfer that a leg belongs to."""

    share: Share
    machine: TransferMachine
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
    """One leg of a running transfer; a `links.Worker`."""

    link: OutboundLink
    held: HeldGrant

    def __init__(self, host: LegHost, index: int, leg: Leg, region: Region) -> None:
        """`index` is the leg's number in the machine of `host`, `region` its local region."""
        pull = leg.direction is Direction.PULL
        self.leg = leg
        self.fabric = leg.fabrics[0]
        """What it runs over; final once it is prepared."""
        self.why = ""
        """Why this one, in words."""
        self._host = host
        self.share = host.share
        self._index = index
        self._region = region
        self._wanted = Wanted(leg.other, Rights.READ if pull else Rights.WRITE, host.share.subject, staged=False)
        self._opcode = Opcode.READ if pull else Opcode.WRITE
        self._used: list[HeldGrant] = []
        self._reach = max(map(add, leg.ranges.remote, leg.ranges.lengths))
        self._kept = False
        """Whether the first grant is older than the transfer, and its region perhaps gone already."""
        self._landed_in: int | None = None
        """The region, by its uid, in which bytes of this leg are in place."""
        self._refused = False
        """Whether the last answer of the far end was a refusal."""
        self._parked = False
        """Whether nothing may be posted before the grant has been renewed."""
        self._renewal: asyncio.Task[None] | None = None
        self._stager: Stager | None = None
        """Where an end is staged."""
        self._buffer: StagingBuffer | None = None
        """Where this end is."""
        self._cut = False
        """Whether the slices have been cut."""

    @property
    def use(self) -> tuple[Action, Region]:
        """What it does with the region here."""
        return Action.READ if self._opcode is Opcode.WRITE else Action.WRITE, self._region

    @property
    def path(self) -> Path:
        """How its bytes are reached: STAGED where either end is."""
        return Path.STAGED if self._stager is not None else self._region.path

    async def prepare(self, links: LinkTable) -> None:
        """Get the link and the grant.

        Raises what they raise, and OutOfRange for ranges behind the end of the region at the far end.
        """
        *others, last = self._candidates(links)
        for kind in others:
            try:
                await self._prepare_over(kind, links)
            except (FabricUnavailable, NodeUnreachable) as error:
                links.detours.failed(self.leg.other, kind, error)
                self.why = _instead(kind, error)
                log.info("fabric_passed_over", fabric=kind.value, region=str(self.leg.other), cause=error.message)
            else:
                links.detours.worked(self.leg.other, kind)
                return
        await self._prepare_over(last, links)

    async def _prepare_over(self, kind: FabricKind, links: LinkTable) -> None:
        self.fabric = kind
        self.link = await links.get(self.leg.other.node, kind)
        self._wanted = self._wanted._replace(staged=False)
        try:
            await self._acquire()
        except (StaleEpoch, LinkNotFound):  # the remote daemon was restarted: once more on a new link
            links.discard(self.link)
            self.link = await links.get(self.leg.other.node, kind)
            await self._acquire()

    def _candidates(self, links: LinkTable) -> list[FabricKind]:
        """Return the fabrics to try, the best first. Raises FabricUnavailable where none reaches the region here."""
        region, allowed = self._region, self.leg.fabrics
        here = [kind for kind in allowed if kind in region.fabrics]
        if not here:
            names = " or ".join(kind.value for kind in allowed)
            raise FabricUnavailable(
                f"{region.name} is not reached over {names}: {region.why or 'this node does not serve it'}",
                region=region.name,
            )
        if len(allowed) == 1:
            self.why = self.why or f"{here[0].value} is the only fabric for this pair, or was asked for."
        elif here[0] is not allowed[0]:
            self.why = f"{region.name}: {region.why}"
        else:
            self.why = f"{here[0].value} reaches both regions."
        for kind in here[:-1]:
            error = links.detours.why(self.leg.other, kind)
            if error is not None:
                self.why = _instead(kind, error)
                here = [other for other in here if other is not kind]
        return here

    def prepare_at_once(self, links: LinkTable) -> bool:
        """Use a link and a grant from before; return whether there are such. Raises OutOfRange, FabricUnavailable."""
        kind = self._candidates(links)[0]
        link = links.kept(self.leg.other.node, kind)
        held = link.kept_grant(self._wanted) if link else None
        if link is None or held is None:
            return False
        if self._reach > held.region_length:  # the region may have been made anew, and larger
            link.forget_grant(held)
            return False
        is_staged_here, is_staged_there = self._staged_ends(link, held)
        buffer = self._region.reach.staging.opened if is_staged_here else None
        if (is_staged_here and buffer is None) or (is_staged_there and held.slots is None):
            return False
        self.fabric, self.link, self._kept = kind, link, True
        self._adopt(held, buffer)
        return True

    def _staged_ends(self, link: OutboundLink, held: HeldGrant) -> tuple[bool, bool]:
        """Return which ends are staged, the local and the remote one: by the region's path, or because a NIC would
        misplace what begins elsewhere than at multiples of its alignment. Both ends have to begin there: where either
        is in parts, ranges are cut at their edges."""
        here, there = self._region.reach.way.alignment, held.alignment
        need, ranges = max(here, there), self.leg.ranges
        fits = (
            need == 1
            or not link.packet
            or not any(start % need for start in chain((link.packet,), ranges.local, ranges.remote))
        )
        return (
            self._region.reach.stages(link.fabric.kind) or (not fits and here > 1),
            held.slots is not None or (not fits and there > 1),
        )

    def slices(self) -> Iterator[Ranges]:
        """Return the slices of the leg, cut for its fabric; call once, when it is prepared."""
        limits = self.link.fabric.limits
        self._cut = True
        size = min(limits.slice_bytes, SLOT) if self._stager else limits.slice_bytes
        needs_none = self._stager is not None or not self.link.packet
        alignment = 1 if needs_none else max(self._region.reach.way.alignment, self.held.alignment)
        return slices(self.leg.ranges, size, limits.slice_ranges, alignment)

    async def _acquire(self) -> None:
        held = await self.link.grant(self._wanted)
        is_staged_here, is_staged_there = self._staged_ends(self.link, held)
        if is_staged_there and held.slots is None:
            self._wanted = self._wanted._replace(staged=True)
            held = await self.link.grant(self._wanted)
        self._adopt(held, await self._region.reach.staging.open() if is_staged_here else None)

    def _adopt(self, held: HeldGrant, buffer: StagingBuffer | None) -> None:
        if self._landed_in not in (None, held.region_uid):
            raise self._deleted()
        if self._reach > held.region_length:
            raise OutOfRange(
                f"A segment reaches to byte {self._reach} of {self.leg.other}, which has {held.region_length} bytes.",
                region=self.leg.other,
                reach=self._reach,
                length=held.region_length,
            )
        is_staged = held.slots is not None or buffer is not None
        if self._cut and is_staged is not bool(self._stager):  # made anew under its name, on another device
            raise self._deleted()
        if is_staged and self._stager is None:
            host = self._host
            self._stager = Stager(self, self._region, buffer, self.leg.direction, host.machine, host.hold)
            self._buffer = buffer
            if self._wanted.staged or (buffer is not None and not self._region.reach.stages(self.fabric)):
                self.why += " It is staged, because a NIC would misplace bytes that begin within a page."
        self.held = held
        now = self._host.clock()
        self._used = [*(used for used in self._used if now < used.over_at), held]

    def next_request(self, wr_id: int) -> WorkRequest | None:
        """See Worker."""
        if self._host.machine.error is not None:
            self.give_up()
            self._host.check_drained()
            return None
        now = self._host.clock()
        if not self.held.fresh(now):
            self._parked |= not self.held.safe(now)
            self._renew()
        if self._parked:
            return None
        if self._stager is not None:
            return self._stager.next_request(wr_id)
        piece = self.take()
        return WorkRequest(wr_id, self._opcode, self._region.memory, self.held.key, piece) if piece else None

    def give_up(self) -> None:
        """The transfer failed: what is ready for the wire is not posted any more."""
        if self._stager is not None:
            self._stager.drop()

    def take(self) -> Ranges | None:
        """See StagedLeg."""
        piece = self._host.machine.take(self._index)
        if piece is None:
            self._host.check_drained()
        return piece

    def want(self) -> None:
        """See StagedLeg."""
        self.link.want(self)

    def completed(self, request: WorkRequest, status: Status) -> None:
        """See Worker."""
        if self._stager is not None:
            self._stager.completed(request, status)
        else:
            self.ended(request.ranges, request.key, status)

    def broke(self, error: PeermemError, *, flushed: bool) -> None:
        """See StagedLeg."""
        self._host.machine.broken(self._index, error, flushed=flushed)
        self._host.check_drained()

    def ended(self, ranges: Ranges, key: RemoteKey, status: Status) -> None:
        """Take in how a slice ended; see StagedLeg."""
        machine = self._host.machine
        if status is Status.SUCCESS:
            machine.completed(ranges.total)
            self._host.moved(self, ranges.total)
            self._landed(key)
        elif status is Status.REM_ACCESS_ERR and not self._refused_again(key):
            machine.refused(self._index, ranges)
            if key is self.held.key:
                self.link.forget_grant(self.held)
            self._parked = True
            self._renew()
            self._refused = True
        else:
            if status is Status.LOC_PROT_ERR and self._region.path is Path.DMABUF:
                self._region.is_out_of_reach = True
            flushed = status is Status.WR_FLUSH_ERR and self._opcode is Opcode.WRITE
            machine.broken(self._index, cause_of(status, self.leg, self.fabric, self.link), flushed=flushed)
        self._host.check_drained()

    def _refused_again(self, key: RemoteKey) -> bool:
        """Whether the key is one that was got because of a refusal, and no bytes have landed since."""
        return self._refused and self._renewal is None and key is self.held.key

    def _landed(self, key: RemoteKey) -> None:
        held = self.held
        if key is not held.key:
            held = next((used for used in self._used if used.key is key), held)
        self._refused = False
        self._landed_in = held.region_uid
        if self._landed_in != self.held.region_uid:
            self._host.fail(self._deleted())

    def _deleted(self) -> RegionDeleted:
        return RegionDeleted(f"{self.leg.other} was deleted while the transfer used it.", region=self.leg.other)

    def _renew(self) -> None:
        if self._renewal is None:
            self._renewal = asyncio.get_running_loop().create_task(self._get_anew())
            self._host.hold(self._renewal)

    async def _get_anew(self) -> None:
        try:
            await self._acquire()
        except RegionNotFound as error:
            was_there = self._landed_in is not None or not self._kept
            self._host.fail(self._deleted() if was_there else error)
        except PeermemError as error:
            self._host.fail(error)
        except Exception:
            log.exception("renewal_defect", region=str(self.leg.other))
            self._host.fail(Internal(f"Renewing the grant on {self.leg.other} met a defect; the log has the details."))
        self._renewal = None
        if self._parked:
            self._parked = False
            self.link.want(self)

    async def fence(self) -> None:
        """Return when no byte of this leg can be written any more at the far end."""
        self.link.forget_grant(self.held)
        await asyncio.gather(*(self.link.fence(held) for held in self._used))

    @property
    def needs_flush(self) -> bool:
        """Whether the destination's device sees the leg's bytes only after `flush`."""
        if self.leg.direction is Direction.PULL:
            return self._buffer is None and self._region.memory.needs_flush
        return self.held.flush

    async def flush(self) -> None:
        """Make the leg's bytes, all of which are in place, visible to the destination's device. Raises what that
        raises."""
        if self.leg.direction is Direction.PULL:
            await self._region.memory.flush()
        else:
            if not self.held.safe(self._host.clock()):
                await self._acquire()
            await self.link.flush(self.held)

    async def verify(self, initial: int) -> int:
        """Return the CRC32C of the leg's bytes on top of `initial`.

        Raises ChecksumMismatch, and what reading at either end raises.
        """
        ranges = self.leg.ranges
        here, there = await asyncio.gather(
            checksum(self._region, ranges.local, ranges.lengths, initial),
            self._remote_checksum(initial),
        )
        if here != there:
            raise ChecksumMismatch(
                f"The bytes in {self.leg.local} have CRC32C {here:#010x}, those in {self.leg.other} {there:#010x}. "
                "They were changed on the way, or the source was written to during the transfer.",
                local=self.leg.local,
                remote=self.leg.other,
            )
        return here

    async def _remote_checksum(self, initial: int) -> int:
        if not self.held.safe(self._host.clock()):
            await self._acquire()
        return await self.link.checksum(self.held, self.leg.ranges, initial)


def _instead(kind: FabricKind, error: PeermemError) -> str:
    """Return why another fabric than `kind` is used."""
    return f"{kind.value} did not reach the region: {error.message}"
