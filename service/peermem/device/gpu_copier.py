"""Copies into and out of a GPU's memory: queued on the GPU, which makes them by itself while others are on the wire.

Rules of this file:

* Copies of one memory run in the order of the calls, on a queue of its own.
* One thread of the GPU's queues copies, another waits for them: a copy is queued while the one before is being made.
* Large host memory, such as a staging buffer, is pinned when it is first used, and unpinned before it is unmapped; less
  is copied sooner than it is pinned. Memory that can't be pinned is copied all the same, more slowly.
* When a call returns, also by an error or because its caller was cancelled, nothing of it is running any more.
* A GPU that was lost raises RegionRevoked from then on.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError, Future
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, TypeVar

import structlog

from peermem.core.errors import GpuFailed, PeermemError, RegionRevoked
from peermem.device.base import Copier
from peermem.device.gpu_driver import FaultKind, GpuDriver, GpuFault
from peermem.device.gpu_threads import Calls, done, to_its_end
from peermem.memory import FileMemory, Memory

log = structlog.get_logger(__name__)
T = TypeVar("T")

PIN = 4 << 20
"""Bytes of host memory from which it is pinned."""
_UNPIN_TIME = 1.0
"""Seconds that who closes pinned memory waits for the GPU; pages of one that hangs stay locked."""


class Gpu:
    """An open GPU with its threads."""

    def __init__(self, name: str, driver: GpuDriver) -> None:
        """`name` is the device's."""
        self.name = name
        self.driver = driver
        self.loss = ""
        """Why nothing works any more; empty while it does."""
        self._calls = Calls(f"{name}-calls")
        self._waits = Calls(f"{name}-waits")
        self._pinned: set[int] = set()

    def submit(self, work: Callable[[], T]) -> Future[T]:
        """Have the driver called when its turn comes, whatever comes of it."""
        return self._calls.submit(work)

    async def call(self, work: Callable[[], T]) -> T:
        """Return what a call of the driver returns, or `GpuDriver.open` raises. Raises GpuFault; who is cancelled waits
        for the call."""
        return await to_its_end(done(self._calls.submit(work)))

    async def queued(self, work: Callable[[], object]) -> None:
        """Call `work`, which queues something and returns a mark, and wait until that was made. Raises RegionRevoked,
        GpuFailed; who is cancelled waits too."""

        async def both() -> None:
            waiting = await done(self._calls.submit(lambda: self._begin(work)))
            await done(waiting)

        with self._told():
            await to_its_end(both())

    async def flush(self) -> None:
        """Make visible to the GPU what NICs have written. Raises RegionRevoked, GpuFailed."""
        with self._told():
            await self.call(self.driver.flush)

    @contextmanager
    def _told(self) -> Iterator[None]:
        """Tell what a region is to know of a refusal. Raises RegionRevoked, GpuFailed."""
        if self.loss:
            raise RegionRevoked(self.loss, device=self.name)
        try:
            yield
        except GpuFault as error:
            raise self.failed(error) from error

    def _begin(self, work: Callable[[], object]) -> Future[None]:
        mark = work()
        return self._waits.submit(lambda: self.driver.wait(mark))

    def failed(self, error: GpuFault) -> PeermemError:
        """Return what a refusal means for a region, and take note of a GPU that is lost."""
        if error.kind is not FaultKind.LOST:
            return GpuFailed(f"The GPU of device {self.name} refused: {error}. See the kernel's log.", device=self.name)
        if not self.loss:
            log.error("device_lost", device=self.name, cause=str(error))
            self.loss = (
                f"The GPU of device {self.name} was lost ({error}), and with it what was in its memory. See the "
                "kernel's log, bring it back, and create the region anew."
            )
        return RegionRevoked(self.loss, device=self.name)

    def pin(self, buffer: Memory, host: int) -> None:
        """Pin host memory at `host`, if it is large and isn't yet. In the thread of calls."""
        if buffer.length < PIN or host in self._pinned or not isinstance(buffer, FileMemory):
            return
        try:
            self.driver.pin(host, buffer.length)
        except GpuFault as error:
            log.info("not_pinned", device=self.name, bytes=buffer.length, cause=str(error))
        else:
            self._pinned.add(host)
            buffer.before_unmap(lambda: self._unpin(host))

    def _unpin(self, host: int) -> None:
        def unpin() -> None:
            self._pinned.discard(host)
            with suppress(GpuFault):  # lost: nothing is pinned any more
                self.driver.unpin(host)

        try:
            with suppress(CancelledError):  # the GPU was closed, and has let go of all it had pinned
                self._calls.submit(unpin).result(_UNPIN_TIME)
        except TimeoutError:
            log.error("gpu_hangs", device=self.name)

    async def close(self) -> None:
        """Let go of the GPU, after all that was asked of it."""
        try:
            await self.call(self.driver.close)
        except GpuFault as error:
            log.warning("gpu_not_closed", device=self.name, cause=str(error))
        self._calls.close()
        self._waits.close()


class GpuCopier:
    """All copies of one memory; a `Copier`."""

    def __init__(self, gpu: Gpu, address: int, length: int) -> None:
        """`address` is the GPU's."""
        self._gpu = gpu
        self._address = address
        self._length = length
        self._queue: object = None

    async def load(self, buffer: Memory, pieces: Sequence[tuple[int, int, int]]) -> None:
        """See Copier."""
        await self._copy(self._gpu.driver.load, buffer, pieces)

    async def store(self, buffer: Memory, pieces: Sequence[tuple[int, int, int]]) -> None:
        """See Copier."""
        await self._copy(self._gpu.driver.store, buffer, pieces)

    async def zero(self) -> None:
        """Zero the memory. Raises RegionRevoked, GpuFailed."""
        await self._gpu.queued(self._zero)

    def close(self) -> None:
        """Refuse all copies from now on."""
        self._length = -1
        self._gpu.submit(self._end)

    def _end(self) -> None:
        if self._queue is not None:
            with suppress(GpuFault):  # lost: its queues went with it
                self._gpu.driver.end_queue(self._queue)

    async def _copy(
        self,
        copy: Callable[[object, int, int, int], None],
        buffer: Memory,
        pieces: Sequence[tuple[int, int, int]],
    ) -> None:
        if self._length < 0:
            raise ValueError("the memory is closed")
        if buffer.fd is None:
            raise ValueError("the buffer has no file")
        for offset, position, length in pieces:
            if min(offset, position, length) < 0 or offset + length > self._length:
                raise ValueError(f"bytes {offset} to {offset + length} are outside a memory of {self._length} bytes")
            if position + length > buffer.length:
                raise ValueError(f"bytes {position} to {position + length} are outside a buffer of {buffer.length}")
        if not any(length for _, _, length in pieces):
            return
        host = ctypes.addressof(ctypes.c_char.from_buffer(buffer.view()))

        def begin() -> object:
            self._gpu.pin(buffer, host)
            queue = self._made_queue()
            try:
                for offset, position, length in pieces:
                    copy(queue, self._address + offset, host + position, length)
            except GpuFault:
                self._gpu.driver.wait(self._gpu.driver.mark(queue))  # what was queued before
                raise
            return self._gpu.driver.mark(queue)

        await self._gpu.queued(begin)

    def _zero(self) -> object:
        queue = self._made_queue()
        self._gpu.driver.zero(queue, self._address, self._length)
        return self._gpu.driver.mark(queue)

    def _made_queue(self) -> object:
        if self._queue is None:
            self._queue = self._gpu.driver.make_queue()
        return self._queue


if TYPE_CHECKING:
    _copier: type[Copier] = GpuCopier
