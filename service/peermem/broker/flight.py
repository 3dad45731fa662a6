"""How many slices of a leg are on their way."""

from __future__ import annotations

import asyncio


class Flight:
    """Slices that were taken and did not come back yet."""

    def __init__(self) -> None:
        self._count = 0
        self._empty = asyncio.Event()
        self._empty.set()

    def took_off(self) -> None:
        """One was taken."""
        self._count += 1
        self._empty.clear()

    def landed(self) -> None:
        """One came back, however it ended."""
        self._count -= 1
        if not self._count:
            self._empty.set()

    async def empty(self) -> None:
        """Wait until all came back."""
        await self._empty.wait()
