"""Staging buffers and their slots.

Rules of this file:

* A buffer is registered with the fabrics that use it before anybody sees it, and unregistered before it is closed.
* A slot is given to one slice at a time; whoever waits for one is told when one is free.
* What only some transfers need is made when the first of them does (`Staging`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Sequence

from peermem.core.failpoints import chosen
from peermem.core.types import Path
from peermem.fabric.base import Fabric
from peermem.memory import HostMemory, Memory, flip

SLOT = 1 << 20
"""Bytes of a slot: about a millisecond of copying out of a BAR's write-combining or uncached memory."""
SLOTS = 8
"""Of one buffer: a few on the wire, a few being copied."""


class Slots:
    """The free slots of a buffer, this node's or a remote one's."""

    def __init__(self, count: int) -> None:
        self._free = list(range(count))
        self._waiting: dict[Callable[[], None], None] = {}

    def take(self) -> int | None:
        """Return the number of a free slot, which is the caller's until `give`; or None."""
        return self._free.pop() if self._free else None

    def give(self, slot: int) -> None:
        """Take a slot back, and tell who waits."""
        self._free.append(slot)
        waiting, self._waiting = self._waiting, {}
        for tell in waiting:
            tell()

    def when_free(self, tell: Callable[[], None]) -> None:
        """Call `tell` once when a slot comes back."""
        self._waiting[tell] = None


def spoil(buffer: Memory, offset: int) -> None:
    """Pass the failpoint at which a byte of a staging buffer is changed."""
    if chosen("staging.corrupt"):
        flip(buffer, offset)


class StagingBuffer:
    """Host memory cut into slots."""

    def __init__(self, memory: HostMemory, fabrics: Collection[Fabric]) -> None:
        """See `open`."""
        self.memory = memory
        self.slots = Slots(memory.length // SLOT)
        self._fabrics = list(fabrics)
        self._closing: asyncio.Task[None] | None = None

    @staticmethod
    async def open(
        fabrics: Collection[Fabric], nics: Sequence[str], subject: str, length: int = SLOT * SLOTS
    ) -> StagingBuffer:
        """Return a new buffer for `length` bytes on their way, registered with `fabrics` on these NIC ports for
        `subject`. Raises as Fabric.register."""
        buffer = StagingBuffer(HostMemory(SLOT * min(SLOTS, -(-length // SLOT))), ())
        try:
            for fabric in fabrics:
                await fabric.register(buffer.memory, Path.HOST, nics, subject)
                buffer._fabrics.append(fabric)
        except BaseException:
            await buffer.close()
            raise
        return buffer

    async def close(self) -> None:
        """Unregister and free it, also where the caller is cancelled; nothing uses it any more. Who closes it while or
        after somebody else does waits for the same."""
        if self._closing is None:
            self._closing = asyncio.get_running_loop().create_task(self._close())
        await asyncio.shield(self._closing)

    async def _close(self) -> None:
        for fabric in self._fabrics:
            await fabric.unregister(self.memory)
        self.memory.close()


class Staging:
    """The staging buffer of a region, made for the first transfer that needs one."""

    def __init__(self, fabrics: Collection[Fabric], nics: Sequence[str], owner: str) -> None:
        """See StagingBuffer.open; `owner` is the region's."""
        self._fabrics = fabrics
        self._nics = nics
        self._owner = owner
        self._lock = asyncio.Lock()
        self._buffer: StagingBuffer | None = None

    @property
    def opened(self) -> StagingBuffer | None:
        """The buffer, if it has been made."""
        return self._buffer

    async def open(self) -> StagingBuffer:
        """Return the buffer. Raises as Fabric.register."""
        async with self._lock:
            if self._buffer is None:
                self._buffer = await StagingBuffer.open(self._fabrics, self._nics, self._owner)
            return self._buffer

    async def close(self) -> None:
        """Free the buffer, if there is one; nothing uses it any more."""
        async with self._lock:
            if self._buffer is not None:
                await self._buffer.close()
                self._buffer = None
