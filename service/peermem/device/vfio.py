"""Memory of a PCI function that vfio-pci holds: ranges of a BAR, exported as dma-bufs and copied by the CPU.

Rules of this file:

* The function is opened when memory is first asked for, and is this process's alone from then on. What the kernel
  wants back (its driver is unbound, it is removed) or has lost is given back as soon as its regions are closed: until
  then the kernel waits.
* A reset that the kernel carries out on an error is told like a loss, and one that leaves the memory off is seen by the
  next copy. One that root orders through sysfs restores everything: Linux 7.3.4 tells it to no holder, and takes no
  dma-buf back.
* A region is one dma-buf of exactly its bytes, also where they lie in several ranges of the BAR. Its descriptor opens
  nothing else; the function's own descriptor, which opens everything, leaves the daemon only for its copying process.
* The CPU touches the BAR only in that process (`copier.py`), because a load on a BAR that vanished is SIGBUS.
* Nothing is bound to vfio-pci unless the configuration says so, and then once, and given back at the end. A daemon that
  was killed leaves the function with vfio-pci, but not open.
* Memory is zeroed when it is given out.
"""

from __future__ import annotations

import asyncio
import mmap
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path as FilePath
from typing import TYPE_CHECKING

import structlog

from peermem.core.errors import DeviceLost, NotMappable, NotSupported, PeermemError, ZeroLength
from peermem.core.types import Path
from peermem.device import vfio_driver, vfio_refusals
from peermem.device.bar_memory import Range, parts, take, zero
from peermem.device.base import Copier, Device, DeviceMemory
from peermem.device.copier import BarCopier, BarRange, SliceCopier
from peermem.device.free_ranges import FreeRanges
from peermem.device.plain import PlainMemory
from peermem.device.sysfs import SYSFS, pci_function
from peermem.device.vfio_function import VfioFunction
from peermem.memory import Memory, dma_buf_exporter, whole_pages
from peermem.offload import in_thread

log = structlog.get_logger(__name__)

DEV = FilePath("/dev")

Opener = Callable[[str, FilePath, FilePath], VfioFunction]


class VfioMemory(PlainMemory):
    """A part of a function's ranges; a `DeviceMemory`."""

    fd = None

    def __init__(
        self,
        length: int,
        ranges: Sequence[Range],
        opened: _Opened,
        fd: int | PeermemError,
        give_back: Callable[[], None],
    ) -> None:
        """`ranges` are whole pages of the BAR, and `fd` the dma-buf of them, or why there is none. Owns `fd`;
        `give_back` is called when the memory is closed, in any thread."""
        self.length = length
        self.copier = RangesCopier(opened.copier, opened.first, ranges, length)
        self.exporter = dma_buf_exporter(fd) if isinstance(fd, int) else ""
        self._fd = fd
        self._give_back: Callable[[], None] | None = give_back

    def view(self) -> memoryview:
        """See Memory. Always raises ValueError."""
        self._check_open()
        raise ValueError("the memory has no view, only a copier")

    def dma_buf(self) -> tuple[int, int]:
        """See DeviceMemory. Raises why there is none."""
        self._check_open()
        if isinstance(self._fd, PeermemError):
            raise self._fd.again()
        return self._fd, 0

    def share(self) -> tuple[int, int]:
        """See DeviceMemory."""
        fd, offset = self.dma_buf()
        try:
            mmap.mmap(fd, self.length).close()
        except OSError as error:
            raise NotMappable(
                f"A region of a vfio device can't be mapped: this kernel maps no dma-buf of one ({error.strerror}). "
                "Read and write the region through the daemon, or move it with a transfer."
            ) from error
        return fd, offset

    def close(self) -> None:
        """See DeviceMemory."""
        self.copier.close()
        if self._give_back:
            give_back, self._give_back = self._give_back, None
            if isinstance(self._fd, int):
                os.close(self._fd)
            give_back()

    def _check_open(self) -> None:
        if not self._give_back:
            raise ValueError("the memory is closed")


class RangesCopier:
    """A part of a BAR that may lie in several ranges of it; a `Copier`."""

    def __init__(self, copier: BarCopier, mapped: int, ranges: Sequence[Range], length: int) -> None:
        """`mapped` is where in the BAR `copier` begins."""
        self._ranges = ranges
        self._length = length
        self._whole = SliceCopier(copier, 0, max(offset + size for offset, size in ranges) - mapped)
        self._mapped = mapped

    async def load(self, buffer: Memory, pieces: Sequence[tuple[int, int, int]]) -> None:
        """See Copier."""
        await self._whole.load(buffer, self._in_bar(pieces))

    async def store(self, buffer: Memory, pieces: Sequence[tuple[int, int, int]]) -> None:
        """See Copier."""
        await self._whole.store(buffer, self._in_bar(pieces))

    def close(self) -> None:
        """Refuse all copies from now on."""
        self._whole.close()

    def _in_bar(self, pieces: Sequence[tuple[int, int, int]]) -> list[tuple[int, int, int]]:
        """Return the same pieces by their offsets from where the mapping begins. Raises ValueError for one outside."""
        found = []
        for offset, position, length in pieces:
            if min(offset, length) < 0 or offset + length > self._length:
                raise ValueError(f"bytes {offset} to {offset + length} are outside a memory of {self._length} bytes")
            for start, size in parts(self._ranges, offset, length):
                found.append((start - self._mapped, position, size))
                position += size
        return found


class _Opened:
    """The function from the first region until it is given back; a `BarRange`."""

    def __init__(self, device: VfioDevice, function: VfioFunction, ranges: Sequence[Range]) -> None:
        """Owns `function`. `ranges` are whole pages, in order. Raises OSError."""
        self.name = device.name
        self.ranges = ranges
        self.first = ranges[0][0]
        """Where in the BAR the copying process's mapping begins."""
        self.free = FreeRanges(sum(size for _, size in ranges))
        self.total = self.free.total
        self.copier = BarCopier(self)
        self.function = function
        self._device = device
        self._loop = asyncio.get_running_loop()
        self._unused = asyncio.Event()
        self._wanted_back = asyncio.Event()
        self._return: asyncio.Task[None] | None = None
        self._listens = False

    @property
    def offset(self) -> int:
        """See BarRange; as the function's descriptor counts."""
        return self.function.bar(self._device.bar).offset + self.first

    @property
    def size(self) -> int:
        """See BarRange."""
        offset, size = self.ranges[-1]
        return offset + size - self.first

    @property
    def is_alive(self) -> bool:
        """Whether the function is still in this process's hands and answers."""
        return not self._wanted_back.is_set() and not self.copier.is_lost

    @property
    def is_unused(self) -> bool:
        """Whether all its memory is closed."""
        return self.free.total == self.total

    def open(self) -> tuple[int, int]:
        """See BarRange."""
        bar = os.dup(self.function.fd)
        try:
            return bar, os.open(self._device.folder / "config", os.O_RDONLY | os.O_CLOEXEC)
        except BaseException:
            os.close(bar)
            raise

    def refused(self, errno: int) -> PeermemError:
        """See BarRange."""
        return self._device.refused(OSError(errno, os.strerror(errno)))

    async def start(self) -> None:
        """Begin to copy, and to listen to what the kernel wants. Raises why the BAR can't be used."""
        await self.copier.start()
        self._loop.add_reader(self.function.wanted_back, self._is_wanted_back)
        self._listens = True

    def give_back(self, start: int, length: int) -> None:
        """Take memory back; in any thread."""
        self.free.give_back(start, length)
        if self.is_unused:
            with suppress(RuntimeError):  # the loop has ended, and the function with it
                self._loop.call_soon_threadsafe(self._unused.set)

    def _is_wanted_back(self) -> None:
        log.warning("vfio_function_wanted_back", device=self.name)
        self._stop_listening()
        self._wanted_back.set()
        self._return = self._loop.create_task(self._return_when_unused())

    async def _return_when_unused(self) -> None:
        while not self.is_unused:
            self._unused.clear()
            await self._unused.wait()
        await self._close()

    async def close(self) -> None:
        """Give the function back. Nothing uses its memory any more. Closing twice is no error."""
        if self._return is not None:
            self._return.cancel()
            await asyncio.gather(self._return, return_exceptions=True)
        self._stop_listening()
        await self._close()

    def _stop_listening(self) -> None:
        if self._listens:  # else the descriptor is closed, and its number may be somebody else's
            self._listens = False
            self._loop.remove_reader(self.function.wanted_back)

    async def _close(self) -> None:
        await self.copier.close()
        await in_thread(self.function.close)


class VfioDevice:
    """Ranges of a BAR, given out in whole pages."""

    kind = "vfio"
    path = Path.DMABUF
    paths: Sequence[Path] = (Path.DMABUF, Path.STAGED)

    def __init__(
        self,
        name: str,
        address: str,
        bar: int,
        ranges: Sequence[Range] = (),
        *,
        bind: bool = False,
        root: FilePath = SYSFS,
        dev: FilePath = DEV,
        opener: Opener = VfioFunction.open,
    ) -> None:
        """`ranges` are whole pages of the BAR, none for all of it. With `bind` the function is given to vfio-pci when
        it is first used."""
        self.name = name
        self.pci_address = address
        self.bar = bar
        self.folder = root / "bus/pci/devices" / address
        self._ranges = sorted(ranges)
        self._bind = bind
        self._root, self._dev, self._opener = root, dev, opener
        self._driver_before: str | None = None
        self._opened: _Opened | None = None
        self._lock = asyncio.Lock()

    @property
    def size(self) -> int:
        """See Device; 0 while the BAR is not there and all of it was configured."""
        return self._opened.total if self._opened else self._configured

    @property
    def available(self) -> int:
        """See Device."""
        return self._opened.free.total if self._opened else self.size

    @property
    def _configured(self) -> int:
        if self._ranges:
            return sum(size for _, size in self._ranges)
        function = pci_function(self.pci_address, self._root)
        bars = function.bars if function else ()
        return next((bar.size for bar in bars if bar.index == self.bar and bar.is_memory), 0)

    async def allocate(self, length: int) -> DeviceMemory:
        """See Device. Raises InvalidField for ranges that the BAR doesn't have."""
        if length < 1:
            raise ZeroLength(f"Device {self.name} gives out at least 1 byte.", device=self.name)
        opened = await self._usable()
        pages = whole_pages(length)
        start = take(self.name, opened.free, opened.total, pages)
        ranges = list(parts(opened.ranges, start, pages))
        memory = VfioMemory(
            length, ranges, opened, self._export(opened, ranges), lambda: opened.give_back(start, pages)
        )
        await zero(self.name, memory, RangesCopier(opened.copier, opened.first, ranges, pages), pages)
        return memory

    async def adopt(self, fd: int, length: int) -> DeviceMemory:
        """See Device."""
        os.close(fd)
        raise NotSupported(f"Device {self.name} only allocates. Adopt a file descriptor without naming a device.")

    def alive(self) -> bool:
        """See Device."""
        return self._opened.is_alive if self._opened else self.folder.exists()

    async def close(self) -> None:
        """See Device. Gives the function back to the driver from which it was taken."""
        if self._opened is not None:
            await self._opened.close()
        if self._driver_before is not None:
            before, self._driver_before = self._driver_before, None
            try:
                await in_thread(lambda: vfio_driver.give_back(self.folder, before))
            except OSError as error:
                log.warning("vfio_function_not_given_back", device=self.name, driver=before, cause=error.strerror)

    def refused(self, error: OSError) -> PeermemError:
        """Return what it means that the kernel does not give the function, or its BAR."""
        return vfio_refusals.refusal(self.name, self.folder, self._dev, error)

    async def _usable(self) -> _Opened:
        async with self._lock:
            if self._opened and not self._opened.is_alive:
                if not self._opened.is_unused:
                    raise DeviceLost(
                        f"Device {self.name} went, and regions of before are being closed. Try again when they are.",
                        device=self.name,
                    )
                await self._opened.close()
                self._opened = None
            if self._opened is None:
                self._opened = await self._open()
            return self._opened

    async def _open(self) -> _Opened:
        if self._bind and self._driver_before is None and vfio_driver.driver(self.folder) != vfio_driver.VFIO:
            try:
                self._driver_before = await in_thread(lambda: vfio_driver.bind(self.folder))
            except OSError as error:
                raise vfio_refusals.not_bound(self.name, self.folder, error) from error
        try:
            function = await in_thread(self._open_function)
        except OSError as error:
            raise self.refused(error) from error
        try:
            opened = _Opened(
                self, function, vfio_refusals.checked(self.name, self.folder, self.bar, function, self._ranges)
            )
            await opened.start()
        except BaseException:
            function.close()
            raise
        return opened

    def _open_function(self) -> VfioFunction:
        if vfio_driver.driver(self.folder) != vfio_driver.VFIO:
            raise vfio_refusals.not_with_vfio(self.name, self.folder)
        return self._opener(self.pci_address, self._root, self._dev)

    def _export(self, opened: _Opened, ranges: Sequence[Range]) -> int | PeermemError:
        """Return a dma-buf of ranges, or why the kernel makes none."""
        try:
            return opened.function.export(self.bar, ranges)
        except OSError as error:
            return vfio_refusals.not_exported(self.name, error)


if TYPE_CHECKING:
    _device: type[Device] = VfioDevice
    _memory: type[DeviceMemory] = VfioMemory
    _copier: type[Copier] = RangesCopier
    _range: type[BarRange] = _Opened
