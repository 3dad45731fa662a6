"""One transfer that this node runs: prepare, move, fence or verify, end.

Rules of this file:

* What a transfer may do next is decided by `core.transfer`; here it is carried out.
* Local regions of a transfer can't end while it uses their memory; asked to, they make it fail first.
* It ends once: when everything that it posted has come back, the far end is fenced where it must be, the
  destinations' devices see their bytes, and the checksums agree where that was asked for. Its grants end with it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Protocol

import structlog

from peermem.broker.legs import LegRun
from peermem.broker.link_table import LinkTable
from peermem.broker.regions import Region
from peermem.broker.tenants import Share
from peermem.core import spans
from peermem.core.errors import Internal, PeermemError, Timeout
from peermem.core.failpoints import reach
from peermem.core.identity import Subject
from peermem.core.names import ChildName
from peermem.core.plan import Leg
from peermem.core.policy import Action
from peermem.core.spans import Span
from peermem.core.transfer import TransferFacts, TransferMachine, TransferRequest

log = structlog.get_logger(__name__)


class Transfer(Protocol):
    """A transfer in the broker's table, run here or relayed."""

    owner: str
    subject: Subject
    ended: asyncio.Event
    """Set when it has ended and its fence is up."""

    @property
    def facts(self) -> TransferFacts:
        """The transfer as it stands."""

    @property
    def uses(self) -> Sequence[tuple[Action, Region]]:
        """What it does itself with regions of this node; what it has grants for is not among it."""

    def fail(self, error: PeermemError) -> None:
        """End it for this reason; `ended` follows."""


def begin_transfer(name: ChildName, request: TransferRequest) -> Span:
    """Begin what a trace holds of a transfer on this node."""
    source, destination = map(str, request.ends or ("", ""))
    return spans.begin(
        "transfer",
        request.traceparent,
        transfer=str(name),
        source=source,
        destination=destination,
        length=request.total,
        segments=request.segment_count,
    )


class TransferRun:
    """A transfer that this node runs; a `legs.LegHost`, a `regions.RegionUser` and a `Transfer`."""

    def __init__(
        self,
        name: ChildName,
        request: TransferRequest,
        legs: Sequence[Leg],
        regions: dict[ChildName, Region],
        share: Share,
        moved: Callable[[LegRun, int], None],
    ) -> None:
        """`regions` are all local ones, `share` is that of whoever asked for it; `moved` is told of bytes in place.

        Raises RegionDeleted or RegionRevoked when a region is not usable.
        """
        self.name = name
        self.share = share
        self.subject = share.subject
        self.owner = str(share.subject)
        self.clock = time.monotonic
        self.moved = moved
        self.ended = asyncio.Event()
        self._request = request
        self._created_at = time.time()
        self._began = self.clock()
        self._duration: float | None = None
        self._last: TransferFacts | None = None
        self._crc32c: int | None = None
        self._drained = asyncio.Event()
        self._waiting: asyncio.Task[Any] | None = None
        """This transfer's own task, while it may be broken off."""
        self._helpers: set[asyncio.Task[None]] = set()
        self._regions = regions
        self.machine = TransferMachine(len(legs), request.total)
        for region in regions.values():
            region.check_usable()
        self.span = begin_transfer(name, request)
        self._legs = [LegRun(self, index, leg, regions[leg.local]) for index, leg in enumerate(legs)]
        for region in regions.values():
            region.users.add(self)

    @property
    def facts(self) -> TransferFacts:
        """See Transfer."""
        if self._last is not None:
            return self._last
        first = self._legs[0]
        return TransferFacts(
            name=self.name,
            state=self.machine.state,
            bytes_total=self.machine.total,
            bytes_done=self.machine.done,
            segment_count=self._request.segment_count,
            fabric=first.fabric,
            direction=first.leg.direction,
            owner=self.owner,
            error=self.machine.error,
            created_at=self._created_at,
            duration=self._duration,
            crc32c=self._crc32c,
            path=first.path,
            fabric_why=first.why,
            ends=self._request.ends,
            trace_id=self.span.trace_id,
        )

    @property
    def uses(self) -> Sequence[tuple[Action, Region]]:
        """See Transfer."""
        return [leg.use for leg in self._legs]

    async def drive(self, links: LinkTable) -> None:
        """Carry the transfer to its end; never raises."""
        timer = None
        if self._request.timeout is not None:
            timer = asyncio.get_running_loop().call_later(self._request.timeout, self._time_out)
        try:
            await self._work(links)
        except PeermemError as error:
            self.machine.fail(error)
        except BaseException:
            log.exception("transfer_defect", transfer=str(self.name))
            self.machine.fail(Internal(f"{self.name} met a defect of the daemon; its log has the details."))
        finally:
            try:
                await self._drained_and_fenced()
            finally:
                if timer is not None:
                    timer.cancel()
                self._end()

    def fail(self, error: PeermemError) -> None:
        """See Transfer."""
        self.machine.fail(error)
        if self._waiting is not None:
            self._waiting.cancel()
            self._waiting = None
        for leg in self._legs:  # whose tenant's bytes may have to wait for long
            leg.give_up()
        self.check_drained()

    def check_drained(self) -> None:
        """See LegHost."""
        if self.machine.drained:
            self._drained.set()

    def hold(self, task: asyncio.Task[None]) -> None:
        """See LegHost."""
        self._helpers.add(task)
        task.add_done_callback(self._helpers.discard)

    async def settled(self) -> None:
        """See RegionUser."""
        await self.ended.wait()

    async def _work(self, links: LinkTable) -> None:
        await reach("transfer.begin")
        if self.machine.error is None:
            await self._prepare(links)
        await reach("transfer.prepared")
        if self.machine.error is None:
            self.machine.start([leg.slices() for leg in self._legs])
        if self.machine.error is None:
            for leg in self._legs:
                leg.link.want(leg)
            await self._drained.wait()
        await reach("transfer.moved")
        hidden = [leg for leg in self._legs if leg.needs_flush] if self.machine.error is None else []
        if hidden:
            await self._unless_failed(asyncio.gather(*(leg.flush() for leg in hidden)))
        if self._request.checksum and self.machine.error is None:
            await self._unless_failed(self._verify())

    async def _prepare(self, links: LinkTable) -> None:
        if len(self._legs) == 1:  # most have one: no task for it
            await self._unless_failed(self._legs[0].prepare(links))
            return
        preparing = [asyncio.get_running_loop().create_task(leg.prepare(links)) for leg in self._legs]
        try:
            await self._unless_failed(asyncio.gather(*preparing))
        finally:  # one leg that fails leaves the others nothing to do
            for leg in preparing:
                leg.cancel()

    async def _verify(self) -> None:
        value = 0
        for leg in self._legs:
            value = await leg.verify(value)
        self._crc32c = value

    async def _unless_failed(self, work: Awaitable[Any]) -> None:
        """Wait for `work`, but break it off when the transfer fails meanwhile."""
        task = self._waiting = asyncio.current_task()
        try:
            await work
        except asyncio.CancelledError:
            if self._waiting is not None or task is None or task.uncancel():
                raise
        finally:
            self._waiting = None

    async def _drained_and_fenced(self) -> None:
        self.check_drained()
        await self._drained.wait()
        for leg in self._legs:
            leg.stop()
        await asyncio.gather(*(self._legs[index].fence() for index in self.machine.unfenced))

    def _end(self) -> None:
        self.machine.finish()
        self._duration = self.clock() - self._began
        for region in self._regions.values():
            region.users.discard(self)
        self._last = self.facts
        legs, self._legs = self._legs, []
        self._regions, self._request = {}, TransferRequest(())  # who remembers it needs its facts only
        self.ended.set()
        self.span.note(state=self.machine.state.value, done=self.machine.done)
        self.span.end(self.machine.error)
        asyncio.get_running_loop().call_soon(_release, legs)  # once who waits for the end has been told

    def _time_out(self) -> None:
        limit = self._request.timeout or 0.0
        self.fail(
            Timeout(
                f"{self.name} did not end within its timeout of {limit:g} s; "
                f"{self.machine.done} of {self.machine.total} bytes are in place.",
                timeout=limit,
            )
        )


def _release(legs: Sequence[LegRun]) -> None:
    for leg in legs:
        leg.release()
