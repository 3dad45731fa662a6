"""The two kinds of bytes on a connection: small blocks of this process, and payload of regions.

Rules of this file:

* Payload goes between the kernel and region memory; slices of a region live only for one system call.
* A payload that may not or can't touch its memory (any more) fails with a status and moves on with bytes
  of no meaning: dropped when incoming, zeros when outgoing. So the connection stays in step, one request's
  trouble is no other's, and a revoked grant takes effect before the next system call.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Protocol

from peermem.fabric.base import Status
from peermem.memory import Memory, flip

_FILLER = 256 << 10
_DROPPED = memoryview(bytearray(_FILLER))
_ZEROS = memoryview(bytes(_FILLER))
_COST_BYTES = 256
"""Bytes of a block that wait to be sent at the cost of one more."""
MAX_BLOCKS = 64
"""Blocks that may go with a payload into one system call."""
_MAX_SLICES = min(os.sysconf("SC_IOV_MAX"), 1024) - MAX_BLOCKS


class Bytes(Protocol):
    """Bytes that are to be sent or received."""

    @property
    def left(self) -> int:
        """How many are not through yet."""

    def buffers(self, limit: int) -> list[memoryview]:
        """Return where the next ones are, at most `limit` bytes; at least one byte while some are left."""

    def advance(self, count: int) -> None:
        """`count` bytes went through."""


class Block:
    """Bytes of this process: a frame's head, ranges or response."""

    def __init__(self, data: bytes | bytearray) -> None:
        self.data = data
        self.cost = 1 + len(data) // _COST_BYTES
        self._done = 0

    @property
    def left(self) -> int:
        """See Bytes."""
        return len(self.data) - self._done

    def buffers(self, limit: int) -> list[memoryview]:
        """See Bytes."""
        return [memoryview(self.data)[self._done : self._done + limit]]

    def advance(self, count: int) -> None:
        """See Bytes."""
        self._done += count

    def reset(self) -> Block:
        """Start anew and return itself."""
        self._done = 0
        return self


class Payload:
    """Bytes of one request in ranges of one memory."""

    def __init__(
        self,
        memory: Memory | None,
        offsets: Sequence[int],
        lengths: Sequence[int],
        total: int,
        *,
        base: int = 0,
        incoming: bool,
        fault: Status,
        usable: Callable[[], bool] | None = None,
        trailer: Callable[[Status], bytes] | None = None,
    ) -> None:
        """The ranges are inside `memory`, from `base` on, and sum up to `total`.

        `fault` is the status when the memory can't be accessed; without a memory it is so from the start.
        `usable` is asked before each access. `trailer` makes what is sent next, from the final status.
        """
        self.left = total
        self.cost = len(lengths)
        self.status = Status.SUCCESS
        self.trailer = trailer
        self._memory = memory
        self._base = base
        self._offsets = offsets
        self._lengths = lengths
        self._filler = _DROPPED if incoming else _ZEROS
        self._fault = fault
        self._usable = usable
        self._index = 0
        self._into = 0
        if memory is None:
            self.fail(fault)

    def buffers(self, limit: int) -> list[memoryview]:
        """See Bytes."""
        if self._memory is not None:
            if self._usable is not None and not self._usable():
                self.fail(Status.REM_ACCESS_ERR)
            else:
                try:
                    return self._slices(self._memory.view(), limit)
                except (OSError, ValueError):
                    self.fail()
        return [self._filler[: min(limit, self.left)]]

    def advance(self, count: int) -> None:
        """See Bytes."""
        self.left -= count
        if self._memory is None:
            return
        into = self._into + count
        index, lengths = self._index, self._lengths
        while index < len(lengths) and into >= lengths[index]:
            into -= lengths[index]
            index += 1
        self._index, self._into = index, into

    def fail(self, status: Status | None = None) -> None:
        """Touch the memory no more; without a status, because it can't be accessed."""
        self._memory = None
        self.status = status or self._fault

    def spoil(self) -> None:
        """Change one of the bytes, for a failpoint, where they are in memory."""
        if self._memory is not None:
            flip(self._memory, self._base + self._offsets[0])

    def _slices(self, view: memoryview, limit: int) -> list[memoryview]:
        slices: list[memoryview] = []
        into = self._into
        for index in range(self._index, min(self._index + _MAX_SLICES, len(self._lengths))):
            start = self._base + self._offsets[index] + into
            size = self._lengths[index] - into
            if size >= limit:
                slices.append(view[start : start + limit])
                break
            slices.append(view[start : start + size])
            limit -= size
            into = 0
        return slices
