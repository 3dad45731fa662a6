"""How many slices of a leg are on their way. It costs next to nothing until somebody waits."""

from __future__ import annotations

import asyncio


class Flight:
    """Slices that were taken and did not come back yet."""

    __slots__ = ("_count", "_empty")

    def __init__(self) -> None:
        self._count = 0
        self._empty: asyncio.Event | None = None

    def took_off(self) -> None:
        """One was taken."""
        self._count += 1

    def landed(self) -> None:
        """One came back, however it ended."""
        self._count -= 1
        if not self._count and self._empty is not None:
            self._empty.set()

    async def empty(self) -> None:
        """Wait until all came back. One at a time may wait, and nothing takes off meanwhile."""
        if self._count:
            self._empty = asyncio.Event()
            await self._empty.wait()
            self._empty = None
