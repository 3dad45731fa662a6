"""The task that keeps leases with a time to live alive, for an asyncio program.

Rules of this file:

* The same as in `peermem.client.renewal`, with one task in the place of its thread.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence

from peermem.client import leases
from peermem.core.errors import PeermemError


class Renewal:
    """Renews what was added, until it is dropped."""

    def __init__(self, renew: Callable[[Sequence[str]], Awaitable[object]]) -> None:
        self._renew = renew
        self._schedule = leases.Schedule()
        self._changed = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def add(self, name: str, ttl: float) -> None:
        """Keep the lease of region `name` alive."""
        self._schedule.add(name, ttl, time.monotonic())
        self._changed.set()
        if self._task is None:
            self._task = asyncio.create_task(self._run(), name="peermem-leases")

    def drop(self, name: str) -> None:
        """Let a lease end."""
        self._schedule.drop(name)

    async def close(self) -> None:
        """Renew no more."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _run(self) -> None:
        while True:
            self._changed.clear()
            try:
                async with asyncio.timeout(self._schedule.delay(time.monotonic())):
                    await self._changed.wait()
            except TimeoutError:
                await self._renew_all(self._schedule.take_due(time.monotonic()))

    async def _renew_all(self, names: list[str]) -> None:
        """Renew a batch; where one of it is lost, the daemon renews none, so each goes alone."""
        try:
            await self._renew(names)
        except PeermemError as fault:
            if not leases.is_lost(fault):
                return
            if len(names) == 1:
                self.drop(names[0])
                return
            for name in names:
                await self._renew_all([name])
