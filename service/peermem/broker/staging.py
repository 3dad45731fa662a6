"""Staging: host memory through which the CPU copies what no NIC can place.

Rules of this file:

* A slice takes a slot at each end that is staged, from before its first copy until after its last, so as many
  slices are under way as there are slots: one is copied while another is on the wire.
* Bytes of a staged slice count as in place when the last copy has been made, not when the wire is done.
* Whatever ends a slice gives its slots back; a transfer that fails starts no copy any more.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import Protocol

from peermem.broker.links import HeldGrant, OutboundLink
from peermem.broker.regions import Region
from peermem.broker.slots import SLOT, StagingBuffer, spoil
from peermem.core.errors import GrantRefused, PeermemError
from peermem.core.failpoints import reach
from peermem.core.plan import Direction
from peermem.core.transfer import TransferMachine
from peermem.core.types import Ranges
from peermem.fabric.base import Opcode, Status, WorkRequest
from peermem.memory import HostMemory


class StagedLeg(Protocol):
    """The leg whose slices are staged."""

    link: OutboundLink
    held: HeldGrant

    @property
    def is_broken(self) -> bool:
        """Whether its link broke, and what is ready has to wait."""

    def take(self) -> Ranges | None:
        """Return the next slice, or None when there is none (any more)."""

    def ended(self, ranges: Ranges, held: HeldGrant, status: Status) -> None:
        """A slice, given by its ranges in the regions and the grant that it was posted under, ended."""

    def broke(self, ranges: Ranges, held: HeldGrant, error: PeermemError) -> None:
        """A slice failed for this reason."""

    def put_back(self, ranges: Ranges, held: HeldGrant) -> None:
        """A slice that was not posted is to be taken again."""

    def want(self) -> None:
        """Have turns on the link."""


@dataclass(slots=True, eq=False)
class _Slice:
    ranges: Ranges
    """In the regions."""
    posted: Ranges
    """As the fabric moves them: in the buffers where an end is staged."""
    held: HeldGrant
    local_slot: int | None
    remote_slot: int | None


class Stager:
    """The slices of one leg on their way through staging buffers."""

    def __init__(
        self,
        leg: StagedLeg,
        region: Region,
        buffer: StagingBuffer | None,
        direction: Direction,
        machine: TransferMachine,
        hold: Callable[[asyncio.Task[None]], None],
    ) -> None:
        """`region` is the leg's local one, `buffer` its staging buffer where that end is staged; `hold` keeps a task
        alive."""
        self._leg = leg
        self._region = region
        self._local = buffer
        self._pull = direction is Direction.PULL
        self._machine = machine
        self._hold = hold
        self._ready: deque[_Slice] = deque()
        self._posted: dict[int, _Slice] = {}

    def next_request(self, wr_id: int) -> WorkRequest | None:
        """Return a slice that is ready for the wire, and begin to copy for more."""
        self._prepare_more()
        if not self._ready:
            return None
        piece = self._ready.popleft()
        self._posted[wr_id] = piece
        memory = self._local.memory if self._local is not None else self._region.memory
        return WorkRequest(wr_id, Opcode.READ if self._pull else Opcode.WRITE, memory, piece.held.key, piece.posted)

    def drop(self) -> None:
        """The transfer failed: forget what was ready for the wire."""
        error = self._machine.error
        while self._ready and error is not None:
            self._break(self._ready.popleft(), error)

    def put_back(self) -> None:
        """The link broke: what was ready for the wire is taken again later."""
        while self._ready:
            piece = self._ready.popleft()
            self._give_back(piece.held, piece.local_slot, piece.remote_slot)
            self._leg.put_back(piece.ranges, piece.held)

    def completed(self, request: WorkRequest, status: Status) -> None:
        """A slice came back from the wire."""
        piece = self._posted.pop(request.wr_id)
        slot = piece.local_slot if self._pull else piece.remote_slot  # at the destination
        if status is Status.SUCCESS and slot is not None:
            self._start(piece, self._copy_in, partial(self._end, piece, Status.SUCCESS))
        else:
            self._end(piece, status)

    def _prepare_more(self) -> None:
        while (piece := self._begin()) is not None:
            slot = piece.remote_slot if self._pull else piece.local_slot  # at the source
            if slot is None:
                self._ready.append(piece)
            else:
                self._start(piece, self._copy_out, partial(self._is_ready, piece))

    def _begin(self) -> _Slice | None:
        """Return the next slice with its slots, or None when there is no slice or no slot now."""
        held, buffer = self._leg.held, self._local
        taken: list[int | None] = []
        for slots in (buffer.slots if buffer is not None else None, held.slots):
            slot = slots.take() if slots is not None else None
            if slots is not None and slot is None:
                slots.when_free(self._leg.want)
                self._give_back(held, *taken)
                return None
            taken.append(slot)
        ranges = self._leg.take()
        if ranges is None:
            self._give_back(held, *taken)
            return None
        local, remote = (_packed(slot, ranges) for slot in taken)
        posted = Ranges(local or ranges.local, remote or ranges.remote, ranges.lengths, ranges.total)
        return _Slice(ranges, posted, held, *taken)

    def _give_back(self, held: HeldGrant, local: int | None = None, remote: int | None = None) -> None:
        if local is not None and self._local is not None:
            self._local.slots.give(local)
        if remote is not None and held.slots is not None:
            held.slots.give(remote)

    def _start(self, piece: _Slice, copy: Callable[[_Slice], Awaitable[None]], then: Callable[[], None]) -> None:
        self._hold(asyncio.get_running_loop().create_task(self._run(piece, copy, then)))

    async def _run(self, piece: _Slice, copy: Callable[[_Slice], Awaitable[None]], then: Callable[[], None]) -> None:
        try:
            if self._machine.error is not None:
                raise self._machine.error
            await reach("staging.copy")
            await copy(piece)
        except GrantRefused as error:
            if error is self._machine.error:
                self._break(piece, error)
            else:
                self._end(piece, Status.REM_ACCESS_ERR)
        except PeermemError as error:
            self._break(piece, error)
        else:
            then()

    def _is_ready(self, piece: _Slice) -> None:
        if self._machine.error is not None:
            self._break(piece, self._machine.error)
        else:
            self._ready.append(piece)
            if self._leg.is_broken:
                self.put_back()
            else:
                self._leg.want()

    async def _copy_out(self, piece: _Slice) -> None:
        """Copy a slice out of its source region into the buffer there."""
        if self._pull:
            await self._leg.link.copy_staged(piece.held, _pieces(piece, remote=True), into_region=False)
        else:
            pieces = _pieces(piece, remote=False)
            await self._region.copier.load(self._buffer(), pieces)
            spoil(self._buffer(), pieces[0][1])

    async def _copy_in(self, piece: _Slice) -> None:
        """Copy a slice out of the buffer at its destination into the region there."""
        if self._pull:
            pieces = _pieces(piece, remote=False)
            spoil(self._buffer(), pieces[0][1])
            await self._region.copier.store(self._buffer(), pieces)
        else:
            await self._leg.link.copy_staged(piece.held, _pieces(piece, remote=True), into_region=True)

    def _buffer(self) -> HostMemory:
        assert self._local is not None  # only slices with a slot here are copied here
        return self._local.memory

    def _end(self, piece: _Slice, status: Status) -> None:
        self._give_back(piece.held, piece.local_slot, piece.remote_slot)
        self._leg.ended(piece.ranges, piece.held, status)

    def _break(self, piece: _Slice, error: PeermemError) -> None:
        self._give_back(piece.held, piece.local_slot, piece.remote_slot)
        self._leg.broke(piece.ranges, piece.held, error)


def _packed(slot: int | None, ranges: Ranges) -> list[int] | None:
    """Return where a slice's ranges are in its slot, one behind the other; None for an end that isn't staged."""
    if slot is None:
        return None
    return list(accumulate(ranges.lengths[:-1], initial=slot * SLOT))


def _pieces(piece: _Slice, *, remote: bool) -> list[tuple[int, int, int]]:
    region = piece.ranges.remote if remote else piece.ranges.local
    buffer = piece.posted.remote if remote else piece.posted.local
    return list(zip(region, buffer, piece.ranges.lengths, strict=True))
