"""Bytes between an open file and a region's memory, block by block in threads.

Rules of this file:

* DIRECT: the file's device reads and writes the region's own pages. Whether that works shows only when bytes move:
  where the first blocks don't, the bytes are staged.
* STAGED: direct I/O on host memory, and copies by the region's copier; one block is copied while others are read.
* BUFFERED: through the page cache. Ranges at either end that direct I/O can't address go this way too.
* Straight, the blocks under way are shared by two threads, each of which asks for its half by one system call: the
  kernel cuts it into what the device takes and has all of it under way. One call for each block costs a change of
  threads each, which a quick disk notices. A thread takes what is next by itself, without a turn of the event loop.
  io_uring would spare the threads, but no binding of it for Python is both well kept and free of a compiler, and
  container runtimes forbid it.
"""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Awaitable, Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, wait
from contextlib import closing
from typing import TYPE_CHECKING

from peermem import memory
from peermem.core.storage import Order, Span, Way, cut
from peermem.device.base import Copier, DeviceMemory
from peermem.memory import HostMemory
from peermem.offload import in_thread
from peermem.storage.base import Movement
from peermem.storage.handles import Handles

_NOT_DIRECT = (errno.EFAULT, errno.EREMOTEIO, errno.EINVAL, errno.EOPNOTSUPP)
"""What direct I/O says to memory without pages, behind a bridge that is in the way, or not aligned for the device."""

_THREADS = 2
"""For bytes that go straight: one's blocks are under way while the other asks for more."""

_STRAIGHT = "The device of {path} reads and writes the region's memory itself."
_SMALL = "The range holds no block of {unit} bytes whole, which is the least that direct I/O moves."
_NO_MAPPING = "Only a copier reaches the region's memory, so the bytes pass through host memory."
_UNALIGNED = (
    "The region's bytes are not at a multiple of {unit} from the file's, which direct I/O asks for, so they pass "
    "through host memory."
)
_REFUSED = "The device of {path} can't reach the region's memory ({cause}), so the bytes pass through host memory."


class BlockMovement:
    """A `Movement` of the whole span of a file."""

    way: Way | None = None
    why = ""

    def __init__(
        self,
        handles: Handles,
        target: DeviceMemory,
        copier: Copier,
        offset: int,
        moved: Callable[[int], None],
        *,
        block: int,
        depth: int,
        pool: Executor,
    ) -> None:
        """`offset` in the memory; a block is of `block` bytes, and `depth` of them are under way."""
        self._handles = handles
        self._memory = target
        self._copier = copier
        self._span = Span(handles.span.file, offset, handles.span.length)
        self._moved = moved
        self._block = handles.whole_units(block)
        self._depth = depth
        self._pool = pool
        self._stopped = self._broken = self._any_moved = False

    def stop(self) -> None:
        """See Movement."""
        self._stopped = True

    async def run(self) -> None:
        """See Movement."""
        direct, buffered = self._handles.direct, self._handles.buffered
        try:
            head, body, tail = cut(self._span, self._handles.unit)
            if direct is None or not body.length:
                self.way, self.why = Way.BUFFERED, self._handles.why or _SMALL.format(unit=self._handles.unit)
                await (self._staged if self._memory.copier else self._straight)(buffered, self._span)
                return
            obstacle = self._obstacle(body) or await self._directly(direct, body)
            if obstacle:
                self.way, self.why = Way.STAGED, obstacle
                await self._staged(direct, body)
            for edge in (head, tail):
                await self._staged(buffered, edge)
        except OSError as error:
            raise self._handles.failed(error) from error

    def _obstacle(self, body: Span) -> str:
        """Return what is known to keep the device from the region's own pages; empty when nothing is."""
        if self._memory.copier is not None:
            return _NO_MAPPING
        unit = self._handles.memory_unit
        if (body.region - body.file) % unit:
            return _UNALIGNED.format(unit=unit)
        return ""

    # straight between the file and the region

    async def _directly(self, fd: int, body: Span) -> str:
        """Carry the body by direct I/O; return why no byte of it could be. Raises OSError."""
        self.way, self.why = Way.DIRECT, _STRAIGHT.format(path=self._handles.path)
        try:
            await self._straight(fd, body)
        except OSError as error:
            if self._any_moved or error.errno not in _NOT_DIRECT:
                raise
            self._broken = False
            return _REFUSED.format(path=self._handles.path, cause=error.strerror)
        return ""

    async def _straight(self, fd: int, span: Span) -> None:
        blocks = -(-span.length // self._block)
        threads = min(_THREADS, self._depth, blocks)
        size = self._block * min(self._depth // threads, -(-blocks // threads))
        starts = iter(range(0, span.length, size))
        await self._all([in_thread(lambda: self._carry_together(fd, span, starts, size, threads), self._pool)])

    def _carry_together(self, fd: int, span: Span, starts: Iterator[int], size: int, threads: int) -> None:
        """Carry blocks, of `size` bytes together, in so many threads, of which this is one."""
        others: list[Future[None]] = []
        try:
            for _ in range(threads - 1):
                others.append(self._pool.submit(self._carry_all, fd, span, starts, size))  # noqa: PERF401  # one may fail
            self._carry_all(fd, span, starts, size)
        finally:
            wait(others)
        for other in others:
            other.result()

    def _carry_all(self, fd: int, span: Span, starts: Iterator[int], size: int) -> None:
        """Carry blocks, in one of several threads that share them, until there are no more."""
        move = memory.read_file if self._handles.order is Order.LOAD else memory.write_file
        try:
            for start in starts:
                if self._stopped or self._broken:
                    break
                length = min(size, span.length - start)
                move(fd, span.file + start, self._memory, span.region + start, length)
                self._any_moved = True
                self._moved(length)
        except BaseException:
            self._broken = True
            raise

    # by way of host memory

    async def _staged(self, fd: int, span: Span) -> None:
        if not span.length:
            return
        slot, lanes, starts = min(self._block, span.length), self._lanes(span), self._starts(span)
        with closing(HostMemory(slot * len(lanes))) as buffer:
            await self._all([self._stage_all(fd, span, starts, buffer, lane * slot) for lane in lanes])

    async def _stage_all(self, fd: int, span: Span, starts: Iterator[int], buffer: HostMemory, at: int) -> None:
        """Carry blocks by way of a part of the buffer, beside others that have parts of their own."""
        try:
            for start in starts:
                if self._stopped or self._broken:
                    break
                block = span.part(start, min(self._block, span.length - start))
                await self._stage(fd, block, buffer, at)
                self._moved(block.length)
        except BaseException:
            self._broken = True
            raise

    async def _stage(self, fd: int, block: Span, buffer: HostMemory, at: int) -> None:
        pieces = [(block.region, at, block.length)]
        if self._handles.order is Order.LOAD:
            await in_thread(lambda: memory.read_file(fd, block.file, buffer, at, block.length), self._pool)
            await self._copier.store(buffer, pieces)
        else:
            await self._copier.load(buffer, pieces)
            await in_thread(lambda: memory.write_file(fd, block.file, buffer, at, block.length), self._pool)

    # the blocks

    def _lanes(self, span: Span) -> range:
        return range(min(self._depth, -(-span.length // self._block)))

    def _starts(self, span: Span) -> Iterator[int]:
        """Return where blocks begin, to be shared by threads: the interpreter lets one at a time take the next."""
        return iter(range(0, span.length, self._block))

    async def _all(self, lanes: Iterable[Awaitable[None]]) -> None:
        """Wait for all of them, whatever happens. Raises what the first that failed raised."""
        work = asyncio.gather(*lanes, return_exceptions=True)
        try:
            outcomes = await asyncio.shield(work)
        except asyncio.CancelledError:
            self.stop()
            await asyncio.wait([work])
            raise
        for outcome in outcomes:
            if outcome is not None:
                raise outcome


if TYPE_CHECKING:
    _: type[Movement] = BlockMovement
