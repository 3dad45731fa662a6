"""This process's own use of a region's bytes: for tools that read and write, and for checksums.

Rules of this file:

* A use keeps its region from ending while it touches memory, not while its caller reads slowly: asked
  to end, it is over at once between two pieces, and the next piece is refused.
* Small pieces are copied on the loop, large ones in a thread, so that the loop turns.
* Memory with a copier (path STAGED) is reached through it alone, by way of host memory.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterator, Sequence
from functools import partial
from itertools import accumulate
from typing import Self, TypeVar

from peermem import memory
from peermem.broker.regions import Region
from peermem.core.errors import OutOfRange, PeermemError, RegionRevoked
from peermem.core.identity import Subject
from peermem.core.policy import Action
from peermem.memory import HostMemory
from peermem.offload import in_thread

T = TypeVar("T")

_INLINE = 64 << 10
"""Bytes that are copied on the loop: tens of microseconds."""
_PIECE = 8 << 20
"""Bytes between two looks at whether the region is to end."""
_STAGED_PIECE = 1 << 20
"""The same, where a copier works: tens of milliseconds out of uncached memory."""
_RANGE_COST = 8192
"""What a range costs at least, in bytes: microseconds of Python."""


class Use:
    """A bounded use of a region; a context manager."""

    def __init__(self, region: Region) -> None:
        """Raises RegionDeleted or RegionRevoked when the region is not usable."""
        region.check_usable()
        self.region = region
        self.allowed: tuple[Subject, Action] | None = None
        """Who was allowed what for it, where somebody had to be; a new policy may say otherwise."""
        self._error: PeermemError | None = None
        self._touching = False
        self._over = asyncio.Event()
        self._buffer: HostMemory | None = None

    def __enter__(self) -> Self:
        self.region.users.add(self)
        return self

    def __exit__(self, *_: object) -> None:
        self._end()

    def _end(self) -> None:
        self.region.users.discard(self)
        self._over.set()
        if self._buffer is not None:
            self._buffer.close()
            self._buffer = None

    def check_inside(self, offset: int, length: int) -> None:
        """Raise OutOfRange unless the range is inside the region."""
        if offset + length > self.region.memory.length:
            raise OutOfRange(
                f"Bytes {offset} to {offset + length} are outside {self.region.name}, "
                f"which has {self.region.memory.length} bytes.",
                region=self.region.name,
                length=self.region.memory.length,
            )

    def fail(self, error: PeermemError) -> None:
        """See RegionUser."""
        self._error = error
        if not self._touching:
            self._end()

    async def settled(self) -> None:
        """See RegionUser."""
        await self._over.wait()

    async def read(self, offset: int, length: int) -> bytes:
        """Return bytes of the region. Raises RegionDeleted, RegionRevoked."""
        copier, source = self.region.memory.copier, self.region.memory
        if copier is None:
            return bytes(await self._touch(length, lambda: memory.read(source, offset, length)))
        buffer = self._host_memory(length)
        await self._guard(copier.load(buffer, [(offset, 0, length)]))
        return bytes(memory.read(buffer, 0, length))

    async def write(self, offset: int, data: bytes) -> None:
        """Write bytes into the region. Raises RegionDeleted, RegionRevoked."""
        copier, target = self.region.memory.copier, self.region.memory
        if copier is None:
            await self._touch(len(data), lambda: memory.write(target, offset, data))
        else:
            buffer = self._host_memory(len(data))
            memory.write(buffer, 0, data)
            await self._guard(copier.store(buffer, [(offset, 0, len(data))]))

    async def crc32c(self, offsets: Sequence[int], lengths: Sequence[int], value: int = 0) -> int:
        """Return the CRC32C of ranges in order, on top of `value`. Raises RegionDeleted, RegionRevoked."""
        copier = self.region.memory.copier
        source: memory.Memory = self.region.memory
        for batch, size in _batches(offsets, lengths, _PIECE if copier is None else _STAGED_PIECE):
            if copier is not None:
                source = self._host_memory(size)
                starts = accumulate((length for _, length in batch), initial=0)
                pieces = [(offset, start, length) for (offset, length), start in zip(batch, starts, strict=False)]
                await self._guard(copier.load(source, pieces))
                batch = [(start, length) for _, start, length in pieces]
            value = await self._touch(size, partial(memory.crc32c, source, batch, value))
        return value

    async def copy_staged(
        self, buffer: HostMemory, pieces: Sequence[tuple[int, int, int]], *, into_region: bool
    ) -> None:
        """Copy between a staging buffer and the region; `pieces` are (offset in the region, offset in the buffer,
        length). Raises RegionDeleted, RegionRevoked."""
        copier = self.region.copier
        await self._guard((copier.store if into_region else copier.load)(buffer, pieces))

    async def flush(self) -> None:
        """Make what NICs wrote visible to the region's device. Raises GpuFailed, RegionDeleted, RegionRevoked."""
        await self._guard(self.region.memory.flush())

    def _host_memory(self, length: int) -> HostMemory:
        """Return memory of at least `length` bytes that is this use's own."""
        if self._error is not None:
            raise self._error
        if self._buffer is None or self._buffer.length < length:
            if self._buffer is not None:
                self._buffer.close()
            self._buffer = HostMemory(length)
        return self._buffer

    async def _touch(self, length: int, action: Callable[[], T]) -> T:
        async def act() -> T:
            return action() if length <= _INLINE else await in_thread(action)

        return await self._guard(act())

    async def _guard(self, action: Coroutine[None, None, T]) -> T:
        if self._error is not None:
            action.close()
            raise self._error
        self._touching = True
        try:
            return await action
        except OSError as error:
            raise RegionRevoked(
                f"{self.region.name}: its memory can't be accessed any more ({error.strerror}).",
                region=self.region.name,
            ) from error
        finally:
            self._touching = False
            if self._error is not None:
                self._end()


async def checksum(region: Region, offsets: Sequence[int], lengths: Sequence[int], initial: int) -> int:
    """Return the CRC32C of ranges of a region in order, on top of `initial`. Raises RegionDeleted, RegionRevoked."""
    with Use(region) as use:
        return await use.crc32c(offsets, lengths, initial)


def _batches(offsets: Sequence[int], lengths: Sequence[int], most: int) -> Iterator[tuple[list[tuple[int, int]], int]]:
    """Cut ranges into batches of `most` bytes and so many ranges at most; yield each with what it costs, in bytes."""
    batch: list[tuple[int, int]] = []
    cost = 0
    for offset, length in zip(offsets, lengths, strict=True):
        for start in range(offset, offset + length, most):
            size = min(most, offset + length - start)
            if batch and cost + size > most:
                yield batch, cost
                batch, cost = [], 0
            batch.append((start, size))
            cost += max(size, _RANGE_COST)
    if batch:
        yield batch, cost
