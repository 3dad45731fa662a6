"""Keeps a leg supplied: a link and a grant, a fresh one in time, and after a break a fence and both of them anew.

Rules of this file:

* A grant that grows old, or that the far end refused, is replaced while the leg's slices are on their way.
* After a break nothing of the leg is posted until all its slices came back and what was written under the old grants
  is fenced; only then a slice is posted again. So what was left on the way can't land behind its repetition.
* Attempts go on, with growing pauses, until something moves again or the patience is over; then the transfer fails and
  says why and how much is known to be in place. A daemon at whose address nobody listens is given up at once: its
  regions went with it.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from typing import Protocol

import structlog

from peermem.broker.links import OutboundLink
from peermem.core.errors import (
    Internal,
    LinkNotFound,
    NodeUnreachable,
    PeermemError,
    RegionNotFound,
    StaleEpoch,
)
from peermem.core.failpoints import reach
from peermem.core.names import ChildName
from peermem.core.retries import Backoff, Patience
from peermem.core.transfer import TransferMachine
from peermem.fabric.base import LinkEnd

log = structlog.get_logger(__name__)

_SHORTEST, _LONGEST = 0.02, 1.0
"""Seconds between two attempts."""
_DEAD_AFTER = 1.0
"""Seconds for which nobody has to listen at the far end before its daemon counts as dead."""

BREAKS = (NodeUnreachable, LinkNotFound, StaleEpoch)
"""What another link may mend."""


class SuppliedLeg(Protocol):
    """The leg."""

    link: OutboundLink

    async def settle(self) -> None:
        """Return when all its slices came back and nothing is written late under its grants so far."""

    async def reconnect(self) -> None:
        """Have a link that is up. Raises as LinkTable.get."""

    def disconnect(self) -> None:
        """Have another link next time: the far end does not know this one."""

    async def acquire(self) -> None:
        """Have a fresh grant. Raises as OutboundLink.grant, RegionDeleted, OutOfRange."""

    def vanished(self) -> PeermemError:
        """Return why the transfer fails when the region is not there any more."""

    def go_on(self) -> None:
        """Post slices again."""


class Renewal:
    """What gets grants for one leg."""

    def __init__(self, leg: SuppliedLeg, region: ChildName, machine: TransferMachine) -> None:
        """`region` is the one at the far end."""
        self.retry_for = 0.0
        """Seconds in which nothing moves until a break is past mending."""
        self.is_due = False
        """Whether nothing may be posted before a fresh grant is there."""
        self.is_broken = False
        """Whether it takes more than a grant."""
        self._leg = leg
        self._region = region
        self._machine = machine
        self._cause: PeermemError | None = None
        self._patience: Patience
        self._backoff: Backoff
        """Both are there while there is a cause."""
        self._refused_at: float | None = None
        self._task: asyncio.Task[PeermemError | None] | None = None

    @property
    def running(self) -> bool:
        """Whether a grant is being got."""
        return self._task is not None

    def moved(self) -> None:
        """Bytes are in place that were not before. What lands while a break is mended was on its way before."""
        if not self.is_broken:
            self._cause = None

    def broke(self, cause: PeermemError) -> None:
        """A slice came back, or a call failed, because the link broke."""
        self.is_broken = self.is_due = True
        if self._cause is None:
            self._cause, self._patience = cause, Patience(self.retry_for)
            self._backoff = Backoff(_SHORTEST, _LONGEST)
        self._patience.broke(asyncio.get_running_loop().time())

    def start(self) -> asyncio.Task[PeermemError | None]:
        """Get a grant; return the task, whose result is why the transfer fails, or None."""
        if self._task is None:
            self._task = asyncio.get_running_loop().create_task(self._run())
        return self._task

    def stop(self) -> None:
        """Try no more: the transfer ended."""
        if self._task is not None:
            self._task.cancel()

    async def _run(self) -> PeermemError | None:
        try:
            failure = await self._get()
        except Exception:
            log.exception("renewal_defect", region=str(self._region))
            failure = Internal(f"Renewing the grant on {self._region} met a defect; the log has the details.")
        if failure is None:  # else the transfer is about to end, and what comes back until then starts nothing
            self._task = None
        return failure

    async def _get(self) -> PeermemError | None:
        last: PeermemError | None = None
        while True:
            try:
                async with asyncio.timeout(self._time_left()):
                    await self._attempt()
                    return None
            except TimeoutError:
                return self._given_up(last)
            except RegionNotFound:
                return self._leg.vanished()
            except BREAKS as error:
                last = error
                if not isinstance(error, NodeUnreachable):
                    self._leg.disconnect()
            except PeermemError as error:
                return error
            self.broke(last)
            if self._is_over(last):
                return self._given_up(last)
            await asyncio.sleep(min(self._backoff.pause(random.random()), self._time_left() or 0.0))

    def _time_left(self) -> float | None:
        """Return the seconds that a break may still take to be mended; None where nothing broke: calls have their own
        bounds."""
        return self._patience.left(asyncio.get_running_loop().time()) if self._cause is not None else None

    async def _attempt(self) -> None:
        if not self.is_broken:
            await self._leg.acquire()
        if self.is_broken:  # since before, or since a grant was asked for
            await reach("slice.mend")
            await self._leg.settle()
            await self._leg.reconnect()
            await self._leg.acquire()
        self.is_broken = self.is_due = False
        self._refused_at = None
        self._leg.go_on()

    def _is_over(self, error: PeermemError) -> bool:
        """Whether another attempt makes no sense."""
        now = asyncio.get_running_loop().time()
        down = self._leg.link.down_cause
        if error.metadata.get("listens") != "no" or down is None or down[0] is not LinkEnd.REMOTE_CLOSED:
            self._refused_at = None
            return self._time_left() == 0
        self._refused_at = self._refused_at or now
        return now - self._refused_at >= _DEAD_AFTER

    def _given_up(self, last: PeermemError | None) -> PeermemError:
        first = self._cause
        assert first is not None  # without one there is no limit of time
        known = f"{self._machine.done} of {self._machine.total} bytes are known to be in place."
        if self.retry_for == 0:
            return NodeUnreachable(f"{first.message} {known} Try again.", **first.metadata)
        why = f" The last attempt: {last.message}" if last is not None and last is not first else ""
        return NodeUnreachable(
            f"{first.message} No way to go on was found in {self.retry_for:g} s at most; {known}{why}",
            **{"node": self._region.node, **first.metadata},
        )


async def persistently(attempt: Callable[[], Awaitable[None]], limit: float) -> None:
    """Make attempts, with growing pauses, until one reaches the far end, for `limit` seconds at most.

    Raises what the last attempt raised: NodeUnreachable when the time is over or nobody listens there, anything else at
    once.
    """
    clock, patience, backoff = asyncio.get_running_loop().time, Patience(limit), Backoff(_SHORTEST, _LONGEST)
    while True:
        try:
            return await attempt()
        except NodeUnreachable as error:
            patience.broke(clock())
            left = patience.left(clock())
            if left == 0 or error.metadata.get("listens") == "no":
                raise
        await asyncio.sleep(min(backoff.pause(random.random()), left))
