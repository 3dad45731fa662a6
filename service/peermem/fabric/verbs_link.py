"""The initiator's end of the verbs fabric: a link that spreads requests over its rails.

Rules of this file:

* A reliable connection fails as a whole, although one request was wrong. The link hides that: the request that failed
  gets its status, and what was flushed behind it is posted again when a rail is up: one-sided work does no harm twice.
* A request uses a rail whose NIC reaches its memory here and whose other end reaches it there; of several that have
  room, the one with the least to do.
* A request is answered when no queue pair uses its memory any more: after its completion, or after a reset.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial

from peermem.core.types import KeyPart
from peermem.fabric.base import Completion, Exchange, LinkClosed, LinkEnd, LinkEvents, Opcode, Status, WorkRequest
from peermem.fabric.verbs_memory import PART, MemoryTable, Parts
from peermem.fabric.verbs_mend import Mender
from peermem.fabric.verbs_rail import Rail
from peermem.fabric.verbs_route import Route, misfit
from peermem.fabric.verbs_types import Piece, Settings, WcStatus, Word, WrOpcode
from peermem.fabric.verbs_work import cut
from peermem.memory import Memory

_FAULTS: dict[int, Status] = {
    WcStatus.LOC_LEN_ERR: Status.LOC_PROT_ERR,
    WcStatus.LOC_PROT_ERR: Status.LOC_PROT_ERR,
    WcStatus.LOC_ACCESS_ERR: Status.LOC_PROT_ERR,
    WcStatus.REM_INV_REQ_ERR: Status.REM_INV_REQ_ERR,
    WcStatus.REM_ACCESS_ERR: Status.REM_ACCESS_ERR,
    WcStatus.REM_OP_ERR: Status.REM_OP_ERR,
}
"""Failures of a request; all others are the rail's."""
_CAUSES: dict[int, str] = {
    WcStatus.RETRY_EXC_ERR: "its other end does not answer",
    WcStatus.RNR_RETRY_EXC_ERR: "one of its ends says more than the other one takes in",
}
_NO_REASON = "its NIC gave it up without a reason"
_SUCCESS = int(WcStatus.SUCCESS)
_POSTED_BYTES = 16 << 20
"""On one rail: enough to keep it busy, and little enough to drain in a moment when the link closes."""
_SUSPICIONS = 3
"""How often a rail that worked may break under a request, without saying why, before it is the request's fault."""
_DRAIN, _FAREWELL = 1.0, 0.5
"""Seconds for what is posted to end, and then for the other end to be told, when the link closes."""


class _Job:
    """A request on its way."""

    __slots__ = ("number", "pending", "pieces", "posted", "request", "status", "suspected")

    def __init__(self, request: WorkRequest, number: int) -> None:
        self.request = request
        self.number = number
        self.pieces: Sequence[Piece] = ()
        self.posted = 0
        """Pieces that were posted."""
        self.pending = 0
        """Posts that have not been answered."""
        self.suspected = 0
        """How often a rail broke under it without saying why; it then waits for one that has been heard."""
        self.status: Status | None = None


class VerbsLink:
    """A `Link` over reliable connections; a `RailOwner`."""

    def __init__(
        self,
        exchange: Exchange,
        events: LinkEvents,
        memories: MemoryTable,
        settings: Settings,
        on_end: Callable[[VerbsLink], None],
    ) -> None:
        self.packet = 0
        """Bytes of payload of the packets into which a request is cut: the least path MTU of its rails. No rail comes
        up again with less: requests may have been planned by it."""
        self._events = events
        self._memories = memories
        self._group = max(1, settings.depth // 2)
        self._on_end = on_end
        self._rails: list[Rail] = []
        self._mender = Mender(self._rails, exchange, events, settings, self._is_busy, self._confirmed, self.go_down)
        self._loop = asyncio.get_running_loop()
        self._waiting: deque[_Job] = deque()
        self._current: dict[Rail, _Job] = {}
        """Jobs that were posted in part."""
        self._outstanding = 0
        self._next_number = 0
        self._refusals: list[_Job] = []
        """Jobs that the remote side refused, or that failed there, and that are not told of yet."""
        self._finished: list[Completion] = []
        self._report_due = False
        self._route: Route | None = None
        self._refused = (0, Opcode.READ, 0)
        """Name of the key that was refused last, for what, and before which request."""
        self._idle = asyncio.Event()
        """Of use while the link closes."""
        self._is_open = self._closed = False
        self._ended: asyncio.Future[None] = self._loop.create_future()

    async def open(self, rails: Sequence[Rail]) -> None:
        """Bring up rails, which are the link's from now on. Raises NodeUnreachable, and what the exchange raises."""
        self._rails += rails
        try:
            await self._mender.open()
        except BaseException:
            self._closed = True
            self._end()
            raise
        self.packet = min(rail.mtu for rail in rails if rail.mtu)
        for rail in rails:
            rail.least_mtu = self.packet
        self._is_open = True

    def uses(self, rails_of: Callable[[Rail], bool]) -> list[Rail]:
        """Return the rails that are so."""
        return list(filter(rails_of, self._rails))

    @property
    def rails_down(self) -> int:
        """See Link."""
        return sum(not rail.up for rail in self._rails)

    async def prepare(self, memory: Memory, offset: int, length: int) -> None:
        """See Link."""
        registration = self._memories.find(memory)
        if registration is not None:
            for rail in self._rails:
                if rail.port.nic in registration.ports:
                    await registration.extend(rail, offset, length)

    def post(self, request: WorkRequest) -> None:
        """See Link."""
        if self._closed:
            raise LinkClosed
        job = _Job(request, self._next_number)
        self._next_number += 1
        self._outstanding += 1
        status = misfit(request)
        if status is not None:
            self._finish(job, status)
        elif self._waiting or not self._begins(job):
            self._waiting.append(job)
        if self._outstanding == 1:
            self._mender.has_moved = True
        if self._finished and not self._report_due:
            self._report_due = True
            self._loop.call_soon(self._report)
        self._mender.watch()

    def carry(self, message: bytes) -> bool:
        """See Link. It carries none."""
        return False

    async def close(self) -> None:
        """See Link."""
        if self._closed:
            await asyncio.shield(self._ended)
            return
        self._closed = True
        self._flush()
        self._report()
        if self._outstanding:
            with suppress(TimeoutError):
                async with asyncio.timeout(_DRAIN):
                    await self._idle.wait()
        await asyncio.gather(*(rail.farewell(_FAREWELL) for rail in self._rails if rail.up))
        self._end()

    def go_down(self, end: LinkEnd, cause: str) -> None:
        """End the link, because it can't go on."""
        if self._is_open and not self._closed:
            self._closed = True
            self._end()
            self._events.down(end, cause)

    def _end(self) -> None:
        if self._ended.done():
            return
        self._mender.stop()
        self._flush()
        for rail in self._rails:
            rail.close()
            rail.domain.release()
        self._report()
        self._ended.set_result(None)
        self._on_end(self)

    # Events of rails

    def heard(self, rail: Rail, word: Word) -> None:
        """See RailOwner."""
        self._mender.has_moved = True
        if word is Word.BYE:
            rail.fail()
            self.go_down(LinkEnd.REMOTE_CLOSED, "the remote side closed the link")

    def broke(self, rail: Rail, status: int) -> None:
        """See RailOwner."""
        job = self._current.pop(rail, None)
        if job is not None:
            self._put_back(job)
        self._fill()
        self._report()
        if self._is_open and not self._closed:
            if status not in _FAULTS:
                self._mender.broke(rail, "its NIC is gone" if rail.is_lost else _CAUSES.get(status, _NO_REASON))
            self._mender.mend()

    def turned(self, rail: Rail) -> None:
        """See RailOwner."""
        if self._waiting or self._current:
            self._fill()
        self._report()

    # Requests

    def _is_busy(self) -> bool:
        return self._outstanding > 0

    def _fill(self) -> None:
        """Post what there is room for."""
        if self._current:
            for rail, job in list(self._current.items()):
                self._post_some(rail, job)
        while self._waiting and self._begins(self._waiting[0]):
            self._waiting.popleft()

    def _begins(self, job: _Job) -> bool:
        """Post a job on a rail, or finish it because there can be none; return whether that was so, or False while it
        has to wait for one."""
        request = job.request
        route = self._route
        if (
            route is None
            or route.key is not request.key
            or route.registration.memory is not request.memory
            or route.registration.is_closed
        ):
            registration = self._memories.find(request.memory)
            if registration is None:
                self._finish(job, Status.LOC_PROT_ERR)
                return True
            route = self._route = Route(registration, request.key, self._rails)
        best: tuple[Rail, Parts, Sequence[KeyPart]] | None = None
        least = _POSTED_BYTES
        for way in route.ways:
            rail = way[0]
            has_room = rail.load < least and rail.free and rail.up and rail not in self._current
            if has_room and (rail.is_heard or not job.suspected):
                best, least = way, rail.load
        if best is not None:
            rail, here, there = best
            if not here.holds_all(request.ranges):
                self._finish(job, Status.LOC_PROT_ERR)
                return True
            job.pieces = cut(request.ranges, route.registration.address, here.lkeys, PART, there)
            job.posted = 0
            self._post_some(rail, job)
        elif not route.ways:
            self._finish(job, Status.REM_ACCESS_ERR if route.reaches_here else Status.LOC_PROT_ERR)
        else:
            return False
        return True

    def _post_some(self, rail: Rail, job: _Job) -> None:
        """Post as much of a job as there is room for; the rest stays the rail's current one."""
        opcode = WrOpcode.RDMA_WRITE if job.request.opcode is Opcode.WRITE else WrOpcode.RDMA_READ
        pieces = job.pieces
        if len(pieces) == 1:  # most are so; it is not in part
            job.posted = 1
            job.pending += 1
            rail.post(opcode, pieces, job.request.ranges.total, partial(self._answered, job))
            return
        while job.posted < len(pieces) and rail.free and rail.up:
            room = min(rail.free, self._group)
            group = pieces if len(pieces) <= room and not job.posted else pieces[job.posted : job.posted + room]
            size = job.request.ranges.total if group is pieces else sum([piece[1] for piece in group])
            job.posted += len(group)
            job.pending += 1
            rail.post(opcode, group, size, partial(self._answered, job))
        if job.posted < len(pieces):
            self._current[rail] = job
        elif self._current:
            self._current.pop(rail, None)

    def _answered(self, job: _Job, status: int) -> None:
        """One post of a job ended. Posts end in order, and after the first failure none succeeds."""
        job.pending -= 1
        if status == _SUCCESS:
            self._mender.has_moved = True
            if job.pending == 0 and job.posted == len(job.pieces):
                self._finished.append(Completion(job.request.wr_id, job.status or Status.SUCCESS))
            return
        if status == WcStatus.GENERAL_ERR:
            job.suspected += 1
            if job.suspected == _SUSPICIONS:
                status = WcStatus.LOC_PROT_ERR
        if status in _FAULTS:
            job.status = _FAULTS[status]
            self._mender.has_moved = True
            if job.status is Status.REM_ACCESS_ERR:
                self._refuse(job)
        if job.pending == 0 and job not in self._current.values():
            self._put_back(job)

    def _refuse(self, refused: _Job) -> None:
        """What a key does not open for one request, it does not open for those that are outstanding with it: to try
        each would break a rail each time."""
        self._refused = refused.request.key.rkey, refused.request.opcode, self._next_number
        waiting, self._waiting = self._waiting, deque()
        for job in waiting:
            self._put_back(job)

    def _is_refused(self, job: _Job) -> bool:
        rkey, opcode, until = self._refused
        return job.request.key.rkey == rkey and job.request.opcode is opcode and job.number < until

    def _put_back(self, job: _Job) -> None:
        """A job's rail is down: it has its status, or goes again, or is flushed."""
        if job.status is None and self._is_refused(job):
            job.status = Status.REM_ACCESS_ERR
        if self._closed or job.status is Status.LOC_PROT_ERR:
            self._finish(job, job.status if job.status is Status.LOC_PROT_ERR else Status.WR_FLUSH_ERR)
            return
        if job.status is not None:
            self._refusals.append(job)
            return
        later = next((i for i, other in enumerate(self._waiting) if other.number > job.number), len(self._waiting))
        self._waiting.insert(later, job)

    def _confirmed(self) -> None:
        """The remote node still has the link: so what was refused was refused. A daemon that is being killed loses its
        memory regions before its queue pairs, and refuses as well."""
        refusals, self._refusals = self._refusals, []
        for job in refusals:
            self._finish(job, job.status or Status.REM_ACCESS_ERR)
        self._report()

    def _flush(self) -> None:
        """Post no more."""
        refusals, self._refusals = self._refusals, []
        for job in refusals:
            self._finish(job, Status.WR_FLUSH_ERR)
        while self._waiting:
            self._finish(self._waiting.popleft(), Status.WR_FLUSH_ERR)
        current, self._current = self._current, {}
        for job in current.values():
            job.status = Status.WR_FLUSH_ERR
            job.pieces = job.pieces[: job.posted]
            if job.pending == 0:
                self._finish(job, job.status)

    def _finish(self, job: _Job, status: Status) -> None:
        self._finished.append(Completion(job.request.wr_id, status))

    def _report(self) -> None:
        """Tell what has ended."""
        self._report_due = False
        if not self._finished:
            return
        finished, self._finished = self._finished, []
        self._outstanding -= len(finished)
        if self._closed and self._outstanding == 0:
            self._idle.set()
        self._events.completed(finished)
