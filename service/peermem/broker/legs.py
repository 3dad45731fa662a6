"""One leg of a running transfer: its link, its grant, and its slices on the way.

Rules of this file:

* A grant is renewed while it still has time; a leg whose grant has too little left waits for the new one.
* A grant from before the transfer that the far end refuses is got anew, once: its region may have been
  made anew under the same name. Nothing of a refused slice was written, so it is posted again.
* Only a flushed WRITE needs a fence at the far end: it alone may land after its completion.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from operator import add
from typing import Protocol

from peermem.broker.access import checksum
from peermem.broker.links import HeldGrant, LinkTable, OutboundLink
from peermem.broker.regions import Region
from peermem.core.errors import (
    ChecksumMismatch,
    GrantRefused,
    Internal,
    LinkNotFound,
    NodeUnreachable,
    OutOfRange,
    PeermemError,
    RegionRevoked,
    StaleEpoch,
)
from peermem.core.plan import Direction, Leg
from peermem.core.transfer import TransferMachine
from peermem.core.types import Path, Rights
from peermem.fabric.base import Opcode, Status, WorkRequest


class LegHost(Protocol):
    """The transfer that a leg belongs to."""

    owner: str
    machine: TransferMachine
    clock: Callable[[], float]

    moved: Callable[[Leg, Path, int], None]
    """Told of bytes of a leg that are in place, and how the memory here is reached."""

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
        self.path = region.device.path
        self._host = host
        self._index = index
        self._region = region
        self._right = Rights.READ if pull else Rights.WRITE
        self._opcode = Opcode.READ if pull else Opcode.WRITE
        self._used: list[HeldGrant] = []
        self._reused = False
        """Whether the grant in use is older than the transfer."""
        self._parked = False
        """Whether nothing may be posted before the grant has been renewed."""
        self._renewal: asyncio.Task[None] | None = None

    async def prepare(self, links: LinkTable) -> None:
        """Get the link and the grant.

        Raises what they raise, and OutOfRange for ranges behind the end of the region at the far end.
        """
        started = self._host.clock()
        self.link = await links.get(self.leg.other.node, self.leg.fabric)
        try:
            await self._acquire()
        except (StaleEpoch, LinkNotFound):  # the remote daemon was restarted: once more on a new link
            links.discard(self.link)
            self.link = await links.get(self.leg.other.node, self.leg.fabric)
            await self._acquire()
        self._reused = self.held.acquired_at < started
        self._check_reach()

    def prepare_at_once(self, links: LinkTable) -> bool:
        """Use a link and a grant from before; return whether there are such. Raises OutOfRange."""
        link = links.kept(self.leg.other.node, self.leg.fabric)
        held = link.kept_grant(self.leg.other, self._right, self._host.owner) if link else None
        if link is None or held is None:
            return False
        self.link, self.held, self._reused = link, held, True
        self._used.append(held)
        self._check_reach()
        return True

    def _check_reach(self) -> None:
        reach = max(map(add, self.leg.ranges.remote, self.leg.ranges.lengths))
        if reach > self.held.key.length:
            raise OutOfRange(
                f"A segment reaches to byte {reach} of {self.leg.other}, which has {self.held.key.length} bytes.",
                region=self.leg.other,
                reach=reach,
                length=self.held.key.length,
            )

    async def _acquire(self) -> None:
        self.held = await self.link.grant(self.leg.other, self._right, self._host.owner)
        self._used.append(self.held)

    def next_request(self, wr_id: int) -> WorkRequest | None:
        """See Worker."""
        now = self._host.clock()
        if not self.held.fresh(now):
            self._parked |= not self.held.safe(now)
            self._renew()
        if self._parked:
            return None
        piece = self._host.machine.take(self._index)
        if piece is None:
            self._host.check_drained()
            return None
        return WorkRequest(wr_id, self._opcode, self._region.memory, self.held.key, piece)

    def completed(self, request: WorkRequest, status: Status) -> None:
        """See Worker."""
        machine = self._host.machine
        size = request.ranges.total
        if status is Status.SUCCESS:
            machine.completed(self._index, size)
            self._host.moved(self.leg, self.path, size)
        elif status is Status.REM_ACCESS_ERR and (self._reused or request.key is not self.held.key):
            machine.refused(self._index, request.ranges)
            if request.key is self.held.key:
                self.link.forget_grant(self.leg.other, self._right, self._host.owner, self.held)
            self._parked = True
            self._renew()
        else:
            flushed = status is Status.WR_FLUSH_ERR and self._opcode is Opcode.WRITE
            machine.broken(self._index, self._cause(status), flushed=flushed)
        self._host.check_drained()

    def _renew(self) -> None:
        if self._renewal is None:
            self._renewal = asyncio.get_running_loop().create_task(self._get_anew())
            self._host.hold(self._renewal)

    async def _get_anew(self) -> None:
        try:
            await self._acquire()
            self._reused = False
        except PeermemError as error:
            self._host.fail(error)
        self._renewal = None
        if self._parked:
            self._parked = False
            self.link.want(self)

    async def fence(self) -> None:
        """Return when no byte of this leg can be written any more at the far end."""
        self.link.forget_grant(self.leg.other, self._right, self._host.owner, self.held)
        await asyncio.gather(*(self.link.fence(held) for held in self._used))

    async def verify(self, initial: int) -> int:
        """Return the CRC32C of the leg's bytes on top of `initial`.

        Raises ChecksumMismatch, and what reading at either end raises.
        """
        ranges = self.leg.ranges
        here, there = await asyncio.gather(
            checksum(self._region, list(zip(ranges.local, ranges.lengths, strict=True)), initial),
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

    def _cause(self, status: Status) -> PeermemError:
        local, other = self.leg.local, self.leg.other
        if status is Status.LOC_PROT_ERR:
            return RegionRevoked(f"{local}: its memory can't be accessed any more.", region=local)
        if status is Status.REM_OP_ERR:
            return RegionRevoked(f"{other}: its memory can't be accessed any more.", region=other)
        if status is Status.REM_ACCESS_ERR:
            return GrantRefused(
                f"nodes/{other.node} refused access to {other}, because its grant ended during the transfer: "
                "the region was deleted or revoked there.",
                region=other,
            )
        if status is Status.WR_FLUSH_ERR:
            end, cause = self.link.down_cause or (None, "it was closed")
            return NodeUnreachable(
                f"The {self.leg.fabric.value} link to nodes/{other.node} went down ({cause}). Try again.",
                node=other.node,
                cause=end.value if end else "closed",
            )
        return Internal(f"A work request to {other} ended with {status.value}.", status=status.value)
