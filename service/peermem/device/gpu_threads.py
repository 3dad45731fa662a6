"""A thread for calls that may block, in order, which keeps neither the event loop nor the process's end waiting."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Any, TypeVar

T = TypeVar("T")


class Calls:
    """Calls that are made one after the other, in the order in which they were asked for, in a thread of their own.
    It is a daemon thread: a driver that hangs does not keep the process from ending."""

    def __init__(self, name: str) -> None:
        """The thread starts with the first call."""
        self._name = name
        self._asked: SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = SimpleQueue()
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()
        self._is_closed = False

    def submit(self, work: Callable[[], T]) -> Future[T]:
        """Have `work` called when its turn comes; what is asked for after `close` is cancelled. From any thread."""
        future: Future[T] = Future()
        with self._lock:
            if self._is_closed:
                future.cancel()
                return future
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name=self._name, daemon=True)
                self._thread.start()
            self._asked.put((future, work))
        return future

    def close(self) -> None:
        """End the thread when all calls have been made."""
        with self._lock:
            self._is_closed = True
            self._asked.put(None)

    def _run(self) -> None:
        while (asked := self._asked.get()) is not None:
            future, work = asked
            try:
                result = work()
            except BaseException as error:
                future.set_exception(error)
            else:
                future.set_result(result)
            del asked, future, work  # not to be kept alive until the next call


async def to_its_end(work: Coroutine[Any, Any, T], unwanted: Callable[[T], None] = lambda _: None) -> T:
    """Return what `work` returns. Who is cancelled meanwhile waits for its end all the same, because what it uses must
    not be closed before; what it returned is then given to `unwanted`."""
    task = asyncio.get_running_loop().create_task(work)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait([task])
        if not task.cancelled() and task.exception() is None:
            unwanted(task.result())
        raise


async def done(future: Future[T]) -> T:
    """Return the result of a call."""
    return await asyncio.wrap_future(future)
