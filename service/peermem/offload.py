"""Blocking work in a thread, for work on file descriptors and memory that has an owner.

A caller that is cancelled waits for the work all the same: what the work uses must not be closed, and
its descriptor's number not be used again, while the thread is at it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Protocol, TypeVar

T = TypeVar("T")


class Closable(Protocol):
    """What has an end."""

    def close(self) -> None:
        """End it."""


C = TypeVar("C", bound=Closable)


async def in_thread(work: Callable[[], T]) -> T:
    """Return what `work` returns. Raises what it raises, and CancelledError after it is done."""
    thread = asyncio.ensure_future(asyncio.to_thread(work))
    try:
        return await asyncio.shield(thread)
    except asyncio.CancelledError:
        await asyncio.wait([thread])
        if not thread.cancelled():
            thread.exception()  # the caller is gone; nobody else will ask for it
        raise


async def made_in_thread(make: Callable[[], C]) -> C:
    """Return what `make` makes. A caller that gives up meanwhile does not wait: it is closed when it is made."""
    making = asyncio.get_running_loop().run_in_executor(None, make)
    try:
        return await asyncio.shield(making)
    except asyncio.CancelledError:
        making.add_done_callback(_discard)
        raise


def _discard(making: asyncio.Future[C]) -> None:
    if not making.cancelled() and making.exception() is None:
        making.result().close()
