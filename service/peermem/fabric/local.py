"""The local fabric: both memories are on this node, and the kernel copies between them.

Rules of this file:

* A request is checked against its grant like one from the network, before each piece that it copies.
* A small request is copied on the loop, in a turn of its own; a large one in a thread, piece by piece.
* What ends a grant or a link waits for the pieces that are being copied under it, and for no more.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from peermem import memory as memories
from peermem.core.errors import FabricUnavailable, NodeUnreachable
from peermem.core.types import FabricKind, LinkAttributes, RemoteKey, Rights
from peermem.fabric.base import (
    Completion,
    Exchange,
    FabricLimits,
    LinkClosed,
    LinkEnd,
    LinkEvents,
    Opcode,
    Status,
    WorkRequest,
)
from peermem.fabric.grants import Clock, Grant, GrantTable, inside
from peermem.fabric.plain import NicLess
from peermem.memory import Memory

_INLINE_BYTES = 256 << 10
_INLINE_RANGES = 64
"""What is copied on the loop, at most: some tens of microseconds."""
_TURN_BYTES = 1 << 20
"""Bytes copied on the loop before it turns."""
_REQUEST_BYTES = 16 << 10
"""What the handling of one request counts towards a turn."""
_PIECE = 1 << 20
"""Bytes between two looks at whether to go on: a fraction of a millisecond."""
_LIMITS = FabricLimits(slice_bytes=4 << 20, slice_ranges=1024, window_bytes=32 << 20)
_RIGHTS = {Opcode.READ: Rights.READ, Opcode.WRITE: Rights.WRITE}


class LocalFabric(NicLess):
    """A `Fabric` from this node to itself: `connect` wants an exchange that reaches its own `accept`."""

    def __init__(
        self,
        workers: int = 2,
        *,
        connect_timeout: float = 10.0,
        clock: Clock = time.monotonic,
        on_link_lost: Callable[[bytes], None] = lambda _: None,
    ) -> None:
        """`workers` threads copy. What was accepted has to be connected within `connect_timeout` seconds. `clock` is
        what grants expire by. `on_link_lost` gets the ids of accepted links that end from their initiating end."""
        self._grants = GrantTable(clock)
        self._connect_timeout = connect_timeout
        self._on_link_lost = on_link_lost
        self._copier = _Copier(workers)
        self._reserved: dict[bytes, asyncio.TimerHandle] = {}
        self._links: dict[bytes, LocalLink] = {}
        self._serving = False

    @property
    def kind(self) -> FabricKind:
        """See Fabric."""
        return FabricKind.LOCAL

    @property
    def limits(self) -> FabricLimits:
        """See Fabric."""
        return _LIMITS

    @property
    def accepted_count(self) -> int:
        """Links that were accepted."""
        return len(self._links) + len(self._reserved)

    @property
    def grant_count(self) -> int:
        """Grants that have not been revoked and whose link is open."""
        return len(self._grants)

    async def start(self) -> None:
        """See Fabric."""
        self._serving = True

    async def close(self) -> None:
        """See Fabric."""
        self._serving = False
        for link_id in list(self._reserved):
            self._forget(link_id)
        for link_id, link in list(self._links.items()):
            self._forget(link_id)
            await link.close()
        await self._copier.close()

    async def connect(self, exchange: Exchange, events: LinkEvents, rails: int = 1, subject: str = "") -> LocalLink:
        """See Fabric."""
        answer = await exchange(LinkAttributes(FabricKind.LOCAL, 1))
        reservation = self._reserved.pop(answer.link_id, None)
        if reservation is None:
            raise NodeUnreachable(
                "The local fabric was answered by another daemon, or it is closed; it only reaches regions of its own "
                "node. Use tcp to reach others."
            )
        reservation.cancel()
        link = LocalLink(answer.link_id, events, self._grants, self._copier, self._closed_from_here)
        self._links[answer.link_id] = link
        return link

    def accept(self, offer: LinkAttributes) -> LinkAttributes:
        """See Fabric."""
        if not self._serving or offer.fabric is not FabricKind.LOCAL:
            raise FabricUnavailable(
                f"The local fabric of this node can't take a link over {offer.fabric.value} now. "
                "Leave the choice of the fabric to the daemon, and try again later if it is shutting down."
            )
        link_id = secrets.token_bytes(16)
        self._grants.open_link(link_id)
        self._reserved[link_id] = asyncio.get_running_loop().call_later(self._connect_timeout, self._time_out, link_id)
        return LinkAttributes(FabricKind.LOCAL, 1, link_id)

    async def hang_up(self, link_id: bytes) -> None:
        """See Fabric."""
        link = self._links.get(link_id)
        self._forget(link_id)
        if link is not None:
            await link.hung_up()
        await self._copier.settled(link_id)

    async def grant(
        self, link_id: bytes, memory: Memory, offset: int, length: int, rights: Rights, ttl: float
    ) -> RemoteKey:
        """See Fabric."""
        return self._grants.grant(link_id, memory, offset, length, rights, ttl)

    async def revoke(self, key: RemoteKey) -> None:
        """See Fabric."""
        self._grants.revoke(key)
        await self._copier.settled(key.rkey)

    def _forget(self, link_id: bytes) -> None:
        self._links.pop(link_id, None)
        reservation = self._reserved.pop(link_id, None)
        if reservation is not None:
            reservation.cancel()
        self._grants.close_link(link_id)

    def _time_out(self, link_id: bytes) -> None:
        self._forget(link_id)
        self._on_link_lost(link_id)

    def _closed_from_here(self, link_id: bytes) -> None:
        if link_id in self._links:
            self._forget(link_id)
            self._on_link_lost(link_id)


class LocalLink:
    """A `Link` to this node itself; both of its ends."""

    def __init__(
        self,
        link_id: bytes,
        events: LinkEvents,
        grants: GrantTable,
        copier: _Copier,
        on_close: Callable[[bytes], None],
    ) -> None:
        self._id = link_id
        self._events = events
        self._grants = grants
        self._copier = copier
        self._on_close = on_close
        self._loop = asyncio.get_running_loop()
        self._waiting: deque[WorkRequest] = deque()
        self._turn_due = False
        self._closed = False

    @property
    def packet(self) -> int:
        """See Link."""
        return 0

    @property
    def rails_down(self) -> int:
        """See Link."""
        return 0

    async def prepare(self, memory: Memory, offset: int, length: int) -> None:
        """See Link. The CPU reaches all memory as it is."""

    def post(self, request: WorkRequest) -> None:
        """See Link."""
        if self._closed:
            raise LinkClosed
        self._waiting.append(request)
        self._have_a_turn()

    def carry(self, message: bytes) -> bool:
        """See Link. It carries none."""
        return False

    async def close(self) -> None:
        """See Link."""
        self._end()
        self._on_close(self._id)
        await self._copier.settled(self._id)

    async def hung_up(self) -> None:
        """The accepted end was closed: end, and tell so."""
        ended_here = not self._closed
        self._end()
        await self._copier.settled(self._id)
        if ended_here:
            self._events.down(LinkEnd.REMOTE_CLOSED, "its accepting end was closed")

    def _end(self) -> None:
        self._closed = True
        flushed = [Completion(request.wr_id, Status.WR_FLUSH_ERR) for request in self._waiting]
        self._waiting.clear()
        if flushed:
            self._events.completed(flushed)

    def _have_a_turn(self) -> None:
        if not self._turn_due:
            self._turn_due = True
            self._loop.call_soon(self._take_turn)

    def _take_turn(self) -> None:
        self._turn_due = False
        budget = _TURN_BYTES
        completions: list[Completion] = []
        while self._waiting and budget > 0:
            request = self._waiting.popleft()
            budget -= _REQUEST_BYTES + min(request.ranges.total, _INLINE_BYTES)
            status = self._begin(request)
            if status is not None:
                completions.append(Completion(request.wr_id, status))
        if self._waiting:
            self._have_a_turn()
        if completions:
            self._events.completed(completions)

    def _begin(self, request: WorkRequest) -> Status | None:
        """Copy, and return how it ended; or None when a thread copies."""
        ranges = request.ranges
        if not inside(ranges.local, ranges.lengths, request.memory.length):
            return Status.LOC_PROT_ERR
        grant = self._grants.find(self._id, request.key.rkey, _RIGHTS[request.opcode], ranges.remote, ranges.lengths)
        if grant is None:
            return Status.REM_ACCESS_ERR
        if ranges.total <= _INLINE_BYTES and len(ranges.lengths) <= _INLINE_RANGES:
            return self._copy(request, grant)
        self._copier.copy(
            partial(self._copy, request, grant), (self._id, request.key.rkey), partial(self._copied, request.wr_id)
        )
        return None

    def _copied(self, wr_id: int, status: Status) -> None:
        self._events.completed([Completion(wr_id, status)])

    def _copy(self, request: WorkRequest, grant: Grant) -> Status:
        """Copy a whole request, in this thread or another, and return how it ended."""
        ranges = request.ranges
        for local, remote, length in zip(ranges.local, ranges.remote, ranges.lengths, strict=True):
            for done in range(0, length, _PIECE):
                if self._closed:
                    return Status.WR_FLUSH_ERR
                if not grant.usable():
                    return Status.REM_ACCESS_ERR
                size = min(_PIECE, length - done)
                try:
                    _copy_piece(request, grant, local + done, remote + done, size)
                except (OSError, ValueError):
                    return _blame(request.memory, local + done, size)
        return Status.SUCCESS


class _Copier:
    """The threads that copy, and what each works for."""

    def __init__(self, workers: int) -> None:
        self._threads = ThreadPoolExecutor(workers, "peermem-copy")
        self._copying: dict[asyncio.Future[Status], tuple[bytes, int]] = {}

    def copy(self, work: Callable[[], Status], users: tuple[bytes, int], done: Callable[[Status], None]) -> None:
        """Run `work` in a thread for a link and a key, then `done` on the loop."""

        def copied(future: asyncio.Future[Status]) -> None:
            del self._copying[future]
            done(future.result())

        future = asyncio.get_running_loop().run_in_executor(self._threads, work)
        self._copying[future] = users
        future.add_done_callback(copied)

    async def settled(self, user: bytes | int) -> None:
        """Return when nothing is being copied for a link or a key; the caller sees to it that nothing new is."""
        copying = [future for future, users in self._copying.items() if user in users]
        if copying:
            await asyncio.wait(copying)

    async def close(self) -> None:
        """End the threads, once they are idle."""
        if self._copying:
            await asyncio.wait(list(self._copying))
        self._threads.shutdown()


def _copy_piece(request: WorkRequest, grant: Grant, local: int, remote: int, size: int) -> None:
    there = grant.offset + remote
    if request.opcode is Opcode.WRITE:
        memories.copy(request.memory, local, grant.memory, there, size)
    else:
        memories.copy(grant.memory, there, request.memory, local, size)


def _blame(local: Memory, offset: int, size: int) -> Status:
    """Return whose memory it was that could not be accessed."""
    try:
        memories.read(local, offset, size)
    except (OSError, ValueError):
        return Status.LOC_PROT_ERR
    return Status.REM_OP_ERR
