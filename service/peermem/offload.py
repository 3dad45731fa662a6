"""Blocking work in a thread, for work on file descriptors and memory that has an owner.

A caller that is cancelled waits for the work all the same: what the work uses must not be closed, and
its descriptor's number not be used again, while the thread is at it.
"""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Callable
from concurrent.futures import Executor
from typing import Protocol, TypeVar

T = TypeVar("T")


class Closable(Protocol):
    """What has an end."""

    def close(self) -> None:
        """End it."""


C = TypeVar("C", bound=Closable)


async def in_thread(work: Callable[[], T], pool: Executor | None = None) -> T:
    """Return what `work` returns, in a thread of `pool` where one is given. Raises what it raises, and CancelledError
    after it is done."""
    thread = asyncio.get_running_loop().run_in_executor(pool, contextvars.copy_context().run, work)
    try:
        return await asyncio.shield(thread)
    except asyncio.CancelledError:
        await asyncio.wait([thread])
        if not thread.cancelled():
            thread.exception()  # the caller is gone; nobody else will ask for it
        raise


async def made_in_thread(make: Callable[[], C], pool: Executor | None = None) -> C:
    """Return what `make` makes, in a thread of `pool` where one is given. A caller that gives up meanwhile does not
    wait: it is closed when it is made."""
    making = asyncio.get_running_loop().run_in_executor(pool, make)
    try:
        return await asyncio.shield(making)
    except asyncio.CancelledError:
        making.add_done_callback(_discard)
        raise


def _discard(making: asyncio.Future[C]) -> None:
    if not making.cancelled() and making.exception() is None:
        making.result().close()
