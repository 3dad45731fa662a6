"""A GPU as a device: memory that the daemon allocates there, and memory that jobs have there and hand in.

Rules of this file:

* What the device may give out is taken from the GPU at once, with the first memory, and kept: what it says is left, is.
* How NICs reach the memory is for others to choose among `paths`: by its dma-buf where the driver exports one; by its
  address where the vendor's kernel modules resolve it, which only a trial shows; else not at all, and copies of the GPU
  through pinned host memory take its place.
* **Flush rule.** What the GPU copied itself (STAGED) is visible to its later work when the copy is complete. What a NIC
  wrote is so only after `flush`, because a write's completion says that it has left the NIC, not that the GPU's work
  will see it; unless the driver says that writes are visible to all at once. Where it offers no flush either, no NIC is
  let at the memory.
* A job's memory is opened by its driver's handle, never by an address, which means nothing in another process. The
  job's allocation is opened whole, and only the range that it named is ever touched or exported.
* Which memory a handle opens only the vendor's driver knows: who hands one in is believed as far as that believes it.
* A GPU that was lost is opened anew when all its memory is closed.
"""

from __future__ import annotations

import asyncio
import mmap
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path as FilePath
from typing import TYPE_CHECKING

import structlog

from peermem.core.errors import (
    DeviceFull,
    DeviceLost,
    GpuFailed,
    NotAdoptable,
    NotMappable,
    NotSupported,
    PeermemError,
    RegionRevoked,
    ZeroLength,
)
from peermem.core.types import Path
from peermem.core.units import format_size
from peermem.device.base import AdoptsHandles, Device, DeviceMemory
from peermem.device.free_ranges import FreeRanges
from peermem.device.gpu_copier import Gpu, GpuCopier
from peermem.device.gpu_driver import FaultKind, GpuDriver, GpuFault, Visibility
from peermem.device.gpu_threads import to_its_end
from peermem.device.sysfs import SYSFS
from peermem.memory import whole_pages

log = structlog.get_logger(__name__)


class GpuMemory:
    """A range of a GPU's memory; a `DeviceMemory`."""

    fd = None
    exporter = ""
    is_reached_by_cpu = True

    def __init__(
        self, gpu: Gpu, address: int, length: int, dma_buf: tuple[int, int] | None, give_back: Callable[[], None]
    ) -> None:
        """`give_back` is called when the memory is closed; it ends `dma_buf` too."""
        self.length = length
        self.copier = GpuCopier(gpu, address, length)
        self._gpu = gpu
        self._address = address
        self._dma_buf = dma_buf
        self._give_back: Callable[[], None] | None = give_back

    @property
    def device_address(self) -> int | None:
        """See DeviceMemory."""
        return None if self._gpu.driver.visibility is Visibility.NEVER else self._address

    @property
    def needs_flush(self) -> bool:
        """See DeviceMemory."""
        return self._gpu.driver.visibility is Visibility.BY_FLUSH

    def view(self) -> memoryview:
        """See Memory. Always raises ValueError."""
        raise ValueError("the memory has no view, only a copier" if self._give_back else "the memory is closed")

    def dma_buf(self) -> tuple[int, int] | None:
        """See DeviceMemory."""
        self._check_open()
        return self._dma_buf

    def alive(self) -> bool:
        """See DeviceMemory. It is as long as its device is."""
        return True

    async def flush(self) -> None:
        """See DeviceMemory."""
        if self.needs_flush:
            await self._gpu.flush()

    def share(self) -> tuple[int, int]:
        """See DeviceMemory. Always raises NotMappable, or ValueError after `close`."""
        self._check_open()
        raise NotMappable(
            "A region of a GPU can't be mapped: its memory has no mapping for the CPU. Read and write the region "
            "through the daemon, or move it with a transfer."
        )

    def close(self) -> None:
        """See DeviceMemory. The GPU does its part when its turn comes, before it makes other memory."""
        if self._give_back:
            give_back, self._give_back = self._give_back, None
            self.copier.close()
            give_back()

    def _check_open(self) -> None:
        if not self._give_back:
            raise ValueError("the memory is closed")


class _Opened:
    """The GPU, from its first memory until it is lost or the device is closed."""

    def __init__(self, gpu: Gpu) -> None:
        self.gpu = gpu
        self.base = 0
        """Address of what the device gives out; 0 until it has been taken from the GPU."""
        self.dma_buf: tuple[int, int] | None = None
        """Of all that."""
        self.free = FreeRanges(0)
        self.held: set[object] = set()
        """One thing for each memory that is open."""

    async def close(self) -> None:
        """Let go of the GPU."""
        _close(self.dma_buf)
        if self.base:
            with suppress(GpuFault):  # lost: its memory went with it
                await self.gpu.call(lambda: self.gpu.driver.free(self.base))
        await self.gpu.close()


class GpuDevice:
    """One GPU of a vendor's."""

    def __init__(
        self,
        kind: str,
        name: str,
        address: str,
        size: int,
        driver: Callable[[], GpuDriver],
        *,
        adopts: bool = True,
        root: FilePath = SYSFS,
    ) -> None:
        """`address` is of the PCI function, `size` what the device may allocate, in bytes. `adopts`: jobs may hand in
        memory of their own."""
        self.kind = kind
        self.name = name
        self.pci_address = address
        self.size = size // mmap.PAGESIZE * mmap.PAGESIZE
        self._driver = driver
        self._adopts = adopts
        self._folder = root / "bus/pci/devices" / address
        self._opened: _Opened | None = None
        self._lock = asyncio.Lock()

    @property
    def path(self) -> Path:
        """See Device: the one that needs no NIC."""
        return self.paths[-1]

    @property
    def paths(self) -> tuple[Path, ...]:
        """How its memory may be reached, in the order in which that is to be tried; the last one always works."""
        return (Path.DMABUF, Path.LEGACY_PEER_MEMORY, Path.STAGED)

    @property
    def available(self) -> int:
        """See Device."""
        return self._opened.free.total if self._opened and self._opened.base else self.size

    async def allocate(self, length: int) -> DeviceMemory:
        """See Device. Raises GpuDriverMissing, GpuFailed."""
        if length < 1:
            raise ZeroLength(f"Device {self.name} gives out at least 1 byte.", device=self.name)
        opened = await self._open(with_memory=True)
        pages = whole_pages(length)
        start = opened.free.take(pages)
        if start is None:
            raise DeviceFull(
                f"Device {self.name} has {format_size(opened.free.total)} of {format_size(self.size)} left, "
                f"{format_size(opened.free.largest)} in one piece; {format_size(length)} were asked for. Delete "
                "regions, or use another device.",
                device=self.name,
                available=opened.free.total,
                wanted=length,
            )
        dma_buf = (opened.dma_buf[0], opened.dma_buf[1] + start) if opened.dma_buf else None
        memory = self._memory(opened, opened.base + start, length, dma_buf, lambda: opened.free.give_back(start, pages))
        try:
            await memory.copier.zero()
        except BaseException as error:
            memory.close()
            if isinstance(error, RegionRevoked):
                raise DeviceLost(error.message, device=self.name) from error
            raise
        return memory

    async def adopt(self, fd: int, length: int) -> DeviceMemory:
        """See Device."""
        os.close(fd)
        raise NotSupported(
            f"Device {self.name} adopts memory by its driver's handle. Hand in a file descriptor without naming a "
            "device.",
            device=self.name,
        )

    async def adopt_handle(self, handle: bytes, offset: int, length: int) -> DeviceMemory:
        """See AdoptsHandles. Raises GpuDriverMissing, GpuFailed."""
        if not self._adopts:
            raise NotAdoptable(
                f"Device {self.name} takes no memory of jobs, as it is configured (adopt = false).", device=self.name
            )
        opened = await self._open(with_memory=False)
        return await to_its_end(self._adopt(opened, handle, offset, length), unwanted=GpuMemory.close)

    async def _adopt(self, opened: _Opened, handle: bytes, offset: int, length: int) -> GpuMemory:
        gpu, driver = opened.gpu, opened.gpu.driver
        try:
            base, size = await gpu.call(lambda: driver.open_handle(handle))
        except GpuFault as error:
            if error.kind is FaultKind.LOST:
                raise gpu.failed(error) from error
            raise NotAdoptable(
                f"The GPU of device {self.name} does not open the handle: {error}. It is of no allocation of another "
                "process that is alive, of another GPU, or of memory that can't be shared (such as of a pool or of "
                "expandable segments): allocate it with cudaMalloc or hipMalloc.",
                device=self.name,
            ) from error
        try:
            if offset + length > size or offset >= size:
                raise NotAdoptable(
                    f"The allocation has {size} bytes, and bytes {offset} to {offset + length} were asked for. Ask for "
                    "a range inside.",
                    size=size,
                    wanted=offset + length,
                )
            length = length or size - offset
            page = (base + offset) % mmap.PAGESIZE
            exported = await self._export(gpu, base + offset - page, whole_pages(page + length))
        except BaseException:
            gpu.submit(lambda: driver.close_handle(base))
            raise
        dma_buf = (exported[0], exported[1] + page) if exported else None

        def give_back() -> None:
            _close(exported)
            gpu.submit(lambda: driver.close_handle(base))

        return self._memory(opened, base + offset, length, dma_buf, give_back)

    def alive(self) -> bool:
        """See Device."""
        return self._folder.exists() and not (self._opened and self._opened.gpu.loss)

    async def close(self) -> None:
        """See Device."""
        if self._opened:
            opened, self._opened = self._opened, None
            await opened.close()

    def _memory(
        self,
        opened: _Opened,
        address: int,
        length: int,
        dma_buf: tuple[int, int] | None,
        give_back: Callable[[], None],
    ) -> GpuMemory:
        one = object()

        def closed() -> None:
            give_back()
            opened.held.discard(one)

        opened.held.add(one)
        return GpuMemory(opened.gpu, address, length, dma_buf, closed)

    async def _open(self, *, with_memory: bool) -> _Opened:
        """Return the open GPU. Raises GpuDriverMissing, GpuFailed, DeviceLost, DeviceFull."""
        async with self._lock:
            if self._opened and self._opened.gpu.loss:
                if self._opened.held:
                    raise DeviceLost(
                        f"Device {self.name} went, and regions of before are being closed. Try again when they are.",
                        device=self.name,
                    )
                await self.close()
            try:
                return await to_its_end(self._made(with_memory=with_memory))
            except GpuFault as error:
                raise self._not_opened(error) from error

    async def _made(self, *, with_memory: bool) -> _Opened:
        if not self._opened:
            gpu = Gpu(self.name, self._driver())
            try:
                await gpu.call(gpu.driver.open)
            except BaseException:
                await gpu.close()
                raise
            self._opened = _Opened(gpu)
        opened = self._opened
        if with_memory and not opened.base:
            driver = opened.gpu.driver
            opened.base = await opened.gpu.call(lambda: driver.allocate(self.size))
            opened.dma_buf = await self._export(opened.gpu, opened.base, self.size)
            opened.free = FreeRanges(self.size)
        return opened

    async def _export(self, gpu: Gpu, address: int, length: int) -> tuple[int, int] | None:
        if gpu.driver.visibility is Visibility.NEVER:
            log.warning("no_flush", device=self.name)
            return None
        try:
            return await gpu.call(lambda: gpu.driver.export(address, length))
        except GpuFault as error:
            log.info("no_dma_buf", device=self.name, cause=str(error))
            return None

    def _not_opened(self, error: GpuFault) -> PeermemError:
        if error.kind is FaultKind.NO_MEMORY:
            return DeviceFull(
                f"The GPU of device {self.name} has no {format_size(self.size)} free, which the device is configured "
                "to give out. Free some of it, or configure a smaller size.",
                device=self.name,
                wanted=self.size,
            )
        if error.kind is FaultKind.LOST:
            return DeviceLost(
                f"Device {self.name}: its driver has no GPU at {self.pci_address} that works ({error}). Correct the "
                "address, or see the kernel's log.",
                device=self.name,
            )
        return GpuFailed(
            f"The GPU of device {self.name} can't be opened: {error}. See the kernel's log.", device=self.name
        )


def _close(dma_buf: tuple[int, int] | None) -> None:
    if dma_buf:
        with suppress(OSError):
            os.close(dma_buf[0])


if TYPE_CHECKING:
    _device: type[Device] = GpuDevice
    _adopting: type[AdoptsHandles] = GpuDevice
    _memory: type[DeviceMemory] = GpuMemory
