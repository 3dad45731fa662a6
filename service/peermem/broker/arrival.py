"""What remains when all bytes of a leg are in place: its device has to see them, and checksums may be compared.

Rules of this file:

* The far end is asked under the leg's grant, and again on another link if that one breaks meanwhile.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Protocol, TypeVar

from peermem.broker.access import checksum
from peermem.broker.holdings import Holdings
from peermem.broker.links import HeldGrant
from peermem.broker.regions import Region
from peermem.broker.renewal import BREAKS, Renewal
from peermem.core.errors import ChecksumMismatch, GrantRefused
from peermem.core.failpoints import reach
from peermem.core.plan import Leg

T = TypeVar("T")


class ArrivedLeg(Protocol):
    """The leg."""

    leg: Leg
    held: HeldGrant
    holdings: Holdings

    async def acquire(self) -> None:
        """Have a fresh grant. Raises as OutboundLink.grant, RegionDeleted, OutOfRange."""


class Arrival:
    """The end of one leg's way."""

    def __init__(self, arrived: ArrivedLeg, region: Region, renewal: Renewal, clock: Callable[[], float]) -> None:
        """`region` is the leg's local one."""
        self._arrived = arrived
        self._region = region
        self._renewal = renewal
        self._clock = clock

    async def flush_far_end(self) -> None:
        """Make what was written visible to the device at the far end. Raises as OutboundLink.flush, NodeUnreachable."""
        await self._ask(lambda held: held.link.flush(held))

    async def verify(self, initial: int) -> int:
        """Return the CRC32C of the leg's bytes on top of `initial`.

        Raises ChecksumMismatch, and what reading at either end raises.
        """
        leg = self._arrived.leg
        here, there = await asyncio.gather(
            checksum(self._region, leg.ranges.local, leg.ranges.lengths, initial),
            self._far_checksum(initial),
        )
        if here != there:
            raise ChecksumMismatch(
                f"The bytes in {leg.local} have CRC32C {here:#010x}, those in {leg.other} {there:#010x}. "
                "They were changed on the way, or the source was written to during the transfer.",
                local=leg.local,
                remote=leg.other,
            )
        return here

    async def _far_checksum(self, initial: int) -> int:
        await reach("transfer.verify")
        ranges = self._arrived.leg.ranges
        return await self._ask(lambda held: held.link.checksum(held, ranges, initial))

    async def _ask(self, ask: Callable[[HeldGrant], Awaitable[T]]) -> T:
        while True:
            try:
                if not self._arrived.held.safe(self._clock()):
                    await self._arrived.acquire()
                with self._arrived.holdings.use() as held:
                    return await ask(held)
            except (*BREAKS, GrantRefused) as error:
                self._renewal.broke(error)
            failure = await self._renewal.start()
            if failure is not None:
                raise failure
