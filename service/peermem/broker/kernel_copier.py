"""A copier for memory that this process maps: the kernel copies, so that memory that vanished is no signal.

Rules of this file:

* One copy at a time of a memory, in the order of the calls, small ones on the loop and others in a thread.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from peermem import memory
from peermem.core.errors import RegionRevoked
from peermem.device.base import Copier
from peermem.memory import Memory
from peermem.offload import in_thread

_INLINE = 64 << 10
"""Bytes that are copied on the loop: tens of microseconds."""

Piece = tuple[int, int, int]


class KernelCopier:
    """Copies into and out of one memory; a `Copier`."""

    def __init__(self, mapped: Memory) -> None:
        """`mapped` has a descriptor or a view."""
        self._memory = mapped
        self._lock = asyncio.Lock()

    async def load(self, buffer: Memory, pieces: Sequence[Piece]) -> None:
        """See Copier."""

        def copy() -> None:
            for offset, start, length in pieces:
                memory.copy(self._memory, offset, buffer, start, length)

        await self._run(copy, pieces)

    async def store(self, buffer: Memory, pieces: Sequence[Piece]) -> None:
        """See Copier."""

        def copy() -> None:
            for offset, start, length in pieces:
                memory.copy(buffer, start, self._memory, offset, length)

        await self._run(copy, pieces)

    async def _run(self, copy: Callable[[], None], pieces: Sequence[Piece]) -> None:
        async with self._lock:
            try:
                if sum(length for *_, length in pieces) <= _INLINE:
                    copy()
                else:
                    await in_thread(copy)
            except OSError as error:
                raise RegionRevoked(f"The memory can't be accessed any more ({error.strerror}).") from error


if TYPE_CHECKING:
    _: type[Copier] = KernelCopier
