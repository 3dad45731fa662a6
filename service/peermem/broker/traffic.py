"""What goes to one node over one fabric: whose slice is next, whichever link it goes over.

Rules of this file:

* All links to a node over a fabric take turns, one slice each, so that a large transfer does not hold up a small one,
  and tenants share them by bytes (`turns`), however many links each has. On all of them together at most the fabric's
  window is outstanding.
* What is to go over a link that is down comes back at once: it waits for nobody's time.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

from peermem.broker.tenants import Share
from peermem.broker.turns import Line, Turns
from peermem.core.quota import Tenant
from peermem.fabric.base import Completion, FabricLimits, Status, WorkRequest

Clock = Callable[[], float]


class Worker(Protocol):
    """One transfer's part on a link."""

    @property
    def share(self) -> Share:
        """For whom."""

    def next_request(self, wr_id: int) -> WorkRequest | None:
        """Return the next slice to post, or None when there is none now."""

    def completed(self, request: WorkRequest, status: Status) -> None:
        """A slice of this worker ended."""


class Carrier(Protocol):
    """A link."""

    @property
    def is_down(self) -> bool:
        """Whether whatever it carries comes back."""

    def carry(self, request: WorkRequest) -> None:
        """Post a slice; its end is told by `Traffic.ended`, later."""


class _Passenger(NamedTuple):
    """A worker with the link that it wants a turn on."""

    worker: Worker
    link: Carrier

    @property
    def tenant(self) -> Tenant:
        """See Sharing."""
        return self.worker.share.tenant

    def wait(self) -> float:
        """See Sharing."""
        return 0.0 if self.link.is_down else self.worker.share.wait()


class Traffic:
    """The slices that go to one node over one fabric."""

    def __init__(self, limits: FabricLimits, clock: Clock) -> None:
        size, window = limits.slice_bytes, limits.window_bytes
        self._turns = Turns[_Passenger](size, window, min(window, _SHARED_SLICES * size), clock)
        self._outstanding: dict[int, tuple[Worker, WorkRequest, Line[_Passenger]]] = {}
        self._next_id = 0
        self._resuming: asyncio.TimerHandle | None = None
        """Set while a tenant's bytes wait for time to pass."""

    @property
    def is_waiting(self) -> bool:
        """Whether a tenant's bytes wait for time to pass."""
        return self._resuming is not None

    def want(self, worker: Worker, link: Carrier) -> None:
        """Give `worker` turns on a link until it has no request."""
        self._turns.add(_Passenger(worker, link))
        self._fill()

    def went_down(self, link: Carrier) -> None:
        """A link is down: who waits for a turn on it is next, and finds out."""
        self._turns.advance(lambda passenger: passenger.link is link)
        self._fill()

    def look_again(self) -> None:
        """Who has to wait, and for how long, may have changed."""
        if self._resuming is not None:
            self._resuming.cancel()
            self._resume()

    def ended(self, completions: Sequence[Completion]) -> None:
        """Take in how slices ended that links carried."""
        for completion in completions:
            worker, request, line = self._outstanding.pop(completion.wr_id)
            self._turns.ended(line, _cost(request))
            worker.completed(request, completion.status)
        self._fill()

    def _fill(self) -> None:
        while (turn := self._turns.take()) is not None:
            line, passenger = turn
            worker = passenger.worker
            self._next_id += 1
            request = worker.next_request(self._next_id)
            if request is None:
                continue
            self._turns.add(passenger)
            self._outstanding[request.wr_id] = (worker, request, line)
            self._turns.posted(line, _cost(request))
            worker.share.spend(request.ranges.total)
            passenger.link.carry(request)
        if self._turns and (pause := self._turns.pause()):
            self._resume_after(pause)

    def _resume_after(self, pause: float) -> None:
        loop = asyncio.get_running_loop()
        at = loop.time() + pause
        if self._resuming is not None:
            if self._resuming.when() <= at:
                return
            self._resuming.cancel()  # whoever came since has less to wait for
        self._resuming = loop.call_at(at, self._resume)

    def _resume(self) -> None:
        self._resuming = None
        self._fill()


_SHARED_SLICES = 2
"""Slices that one tenant may have outstanding while there are others, too: one on the wire, and the next."""
_RANGE_COST = 4096
"""What a range counts towards the window at least: tiny ranges cost time, not bytes."""


def _cost(request: WorkRequest) -> int:
    return max(request.ranges.total, _RANGE_COST * len(request.ranges.lengths))
