"""A range of a PCI function's BAR that has no `struct page` (sysfs `resourceN`): no NIC reaches it, the CPU copies.

Rules of this file:

* Device memory is touched only through a copier (`copier.py`), which a region's memory has instead of a file. Its view
  is a mapping for NICs to be tried with, and nothing in this process touches it.
* The uncached file `resourceN` is mapped, never `resourceN_wc`: each word then reaches the device as it was written and
  in order. Write combining would win nothing, because a process can't make words faster than an uncached BAR takes
  them; and it speeds up no reads.
* What keeps the BAR from being used is found when memory is asked for, and told with its fix; nothing is switched on,
  unbound or resized here.
* A range that has vanished is mapped anew only when all memory of the old mapping is closed.
* Memory is zeroed when it is given out, at the speed of the BAR: some 100 MB/s.
"""

from __future__ import annotations

import asyncio
import errno
import mmap
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path as FilePath
from typing import TYPE_CHECKING

from peermem.core.errors import (
    BarClaimed,
    DeviceForbidden,
    DeviceLost,
    InvalidField,
    KernelLockedDown,
    NotMappable,
    NotSupported,
    PeermemError,
    ZeroLength,
)
from peermem.core.topology import PciFunction
from peermem.core.types import Path
from peermem.core.units import format_size
from peermem.device.bar_memory import take, zero
from peermem.device.base import Device, DeviceMemory
from peermem.device.copier import BarCopier, BarRange, SliceCopier
from peermem.device.free_ranges import FreeRanges
from peermem.device.plain import PlainMemory
from peermem.device.sysfs import SYSFS, lockdown, pci_function
from peermem.memory import whole_pages


class PciMemory(PlainMemory):
    """A part of a BAR range; a `DeviceMemory`."""

    fd = None

    def __init__(self, mapping: _Mapping, start: int, length: int, give_back: Callable[[], None]) -> None:
        """`give_back` is called when the memory is closed."""
        self.length = length
        self.copier = SliceCopier(mapping.copier, start, length)
        self._mapping = mapping
        self._start = start
        self._view: memoryview | None = None
        self._mapped: mmap.mmap | None = None
        self._give_back: Callable[[], None] | None = give_back

    def view(self) -> memoryview:
        """See Memory; not to be touched. Raises also OSError and what keeps the BAR from being mapped."""
        if not self._give_back:
            raise ValueError("the memory is closed")
        if self._view is None:
            self._mapped = self._mapping.map(self._start, self.length)
            self._view = memoryview(self._mapped)
        return self._view

    def share(self) -> tuple[int, int]:
        """See DeviceMemory. Always raises NotMappable, or ValueError after `close`."""
        if not self._give_back:
            raise ValueError("the memory is closed")
        raise NotMappable(
            "A region of a PCI BAR can't be mapped: a descriptor of the BAR's file would open the whole BAR. Read and "
            "write the region through the daemon, or move it with a transfer."
        )

    def close(self) -> None:
        """See DeviceMemory. Raises BufferError while somebody holds the view."""
        if self._view is not None and self._mapped is not None:
            self._view.release()
            self._mapped.close()
            self._view = self._mapped = None
        self.copier.close()
        if self._give_back:
            give_back, self._give_back = self._give_back, None
            give_back()


@dataclass(frozen=True)
class _Bar:
    """A range of a BAR as sysfs has it; a `BarRange`."""

    name: str
    address: str
    index: int
    offset: int
    size: int
    root: FilePath

    @property
    def folder(self) -> FilePath:
        """Of the function."""
        return self.root / "bus/pci/devices" / self.address

    @property
    def file(self) -> FilePath:
        """Of the BAR."""
        return self.folder / f"resource{self.index}"

    @property
    def inode(self) -> int:
        """Of the BAR's file, 0 where it is missing. sysfs uses none again: a function that went and came back has
        another."""
        try:
            return self.file.stat().st_ino
        except OSError:
            return 0

    def resolved(self) -> _Bar:
        """Return it with the size that it really has. Raises what keeps it from being used, as far as that shows."""
        function = pci_function(self.address, self.root)
        if function is None:
            raise self._lost(
                f"there is no PCI function {self.address}. Correct the address, or bring the function back"
            )
        return replace(self, size=self._size_of(function))

    def _size_of(self, function: PciFunction) -> int:
        length = _length(function, self.index)
        if not length:
            have = ", ".join(str(bar.index) for bar in function.bars if bar.is_memory) or "none"
            raise self._lost(f"{self.address} has no memory BAR {self.index}, but {have}. Name one that it has")
        if not function.is_enabled:
            raise self._lost(
                f"the memory of PCI function {self.address} is switched off. Switch it on: "
                f"echo 1 > /sys/bus/pci/devices/{self.address}/enable"
            )
        if self.offset + max(self.size, mmap.PAGESIZE) > length:
            raise InvalidField(
                f"Device {self.name} is to be {format_size(self.size or mmap.PAGESIZE)} at offset {self.offset} of BAR "
                f"{self.index} of {self.address}, which has {format_size(length)}. Correct offset and size in its "
                "[[device]] table.",
                device=self.name,
            )
        return self.size or (length - self.offset) // mmap.PAGESIZE * mmap.PAGESIZE

    def open(self) -> tuple[int, int]:
        """See BarRange."""
        files: list[int] = []
        try:
            for path, access in ((self.file, os.O_RDWR), (self.folder / "config", os.O_RDONLY)):
                files.append(os.open(path, access | os.O_CLOEXEC))
        except OSError as error:
            for file in files:
                os.close(file)
            if error.errno in (errno.EMFILE, errno.ENFILE):
                raise
            raise self._unreadable(error) from error
        return files[0], files[1]

    def refused(self, number: int) -> PeermemError:
        """See BarRange."""
        if number != errno.EINVAL:
            return self._unreadable(OSError(number, os.strerror(number)))
        function = pci_function(self.address, self.root)
        driver = function.driver if function else ""
        holder, fix = "something in the kernel", "Boot"
        if driver:
            holder = f"driver {driver}"
            fix = f"Unbind it (echo {self.address} > /sys/bus/pci/drivers/{driver}/unbind), or boot"
        return BarClaimed(
            f"Device {self.name} can't be mapped: {holder} holds BAR {self.index} of {self.address}. {fix} with "
            "iomem=relaxed.",
            device=self.name,
            driver=driver,
        )

    def _unreadable(self, error: OSError) -> PeermemError:
        level = lockdown(self.root)
        if error.errno == errno.EPERM and level != "none":  # it is unknown where securityfs is not mounted
            return KernelLockedDown(
                f"Device {self.name} can't be mapped: kernel lockdown ({level or 'of unknown level'}) forbids to map "
                "PCI BARs. Switch Secure Boot off, or boot without lockdown=.",
                device=self.name,
            )
        if error.errno in (errno.EACCES, errno.EPERM):
            return DeviceForbidden(
                f"Device {self.name}: the daemon may not open and map {self.file} ({error.strerror}), which is root's. "
                "Run it as root or with CAP_DAC_OVERRIDE, or change the file's owner.",
                device=self.name,
            )
        if error.errno == errno.EROFS:
            return DeviceForbidden(
                f"Device {self.name}: {self.file} is on a read-only mount. Mount /sys for writing in the container.",
                device=self.name,
            )
        return self._lost(f"{self.file} can't be opened or mapped: {error.strerror}. Look into the kernel's log")

    def _lost(self, why: str) -> DeviceLost:
        return DeviceLost(f"Device {self.name} is not there: {why}.", device=self.name)


class _Mapping:
    """One mapping of the range, from the first region until it vanishes."""

    def __init__(self, bar: _Bar) -> None:
        self._bar = bar
        self._inode = bar.inode
        self.free = FreeRanges(bar.size)
        self.copier = BarCopier(bar)

    @property
    def size(self) -> int:
        """Bytes."""
        return self._bar.size

    def map(self, start: int, length: int) -> mmap.mmap:
        """Return a mapping of a part. Raises OSError and what keeps the BAR from being mapped."""
        files = self._bar.open()
        try:
            return mmap.mmap(files[0], length, offset=self._bar.offset + start)
        finally:
            for file in files:
                os.close(file)

    @property
    def is_alive(self) -> bool:
        """Whether the BAR is still the one that was mapped."""
        return not self.copier.is_lost and self._bar.inode == self._inode

    @property
    def is_unused(self) -> bool:
        """Whether all its memory is closed."""
        return self.free.total == self.size


class PciResourceDevice:
    """A range of a BAR, given out in whole pages."""

    kind = "pci_resource"
    path = Path.STAGED
    paths = (Path.P2PDMA, Path.STAGED)

    def __init__(
        self, name: str, address: str, bar: int, offset: int = 0, size: int = 0, root: FilePath = SYSFS
    ) -> None:
        """`offset` and `size` are whole pages; `size` 0 is the rest of the BAR."""
        self.name = name
        self.pci_address = address
        self._bar = _Bar(name, address, bar, offset, size, root)
        self._mapping: _Mapping | None = None
        self._mapping_lock = asyncio.Lock()

    @property
    def size(self) -> int:
        """See Device; 0 while the BAR is not there and its rest was configured."""
        if self._mapping:
            return self._mapping.size
        function = None if self._bar.size else pci_function(self.pci_address, self._bar.root)
        rest = _length(function, self._bar.index) - self._bar.offset if function else 0
        return self._bar.size or max(0, rest // mmap.PAGESIZE * mmap.PAGESIZE)

    @property
    def available(self) -> int:
        """See Device."""
        return self._mapping.free.total if self._mapping else self.size

    async def allocate(self, length: int) -> DeviceMemory:
        """See Device. Raises InvalidField for a range that the BAR doesn't have."""
        if length < 1:
            raise ZeroLength(f"Device {self.name} gives out at least 1 byte.", device=self.name)
        mapping = await self._mapped()
        pages = whole_pages(length)
        start = take(self.name, mapping.free, mapping.size, pages)
        memory = PciMemory(mapping, start, length, lambda: mapping.free.give_back(start, pages))
        await zero(self.name, memory, SliceCopier(mapping.copier, start, pages), pages)
        return memory

    async def adopt(self, fd: int, length: int) -> DeviceMemory:
        """See Device."""
        os.close(fd)
        raise NotSupported(f"Device {self.name} only allocates. Adopt a file descriptor without naming a device.")

    def alive(self) -> bool:
        """See Device."""
        return self._mapping.is_alive if self._mapping else bool(self._bar.inode)

    async def close(self) -> None:
        """See Device. Ends the process that copies."""
        if self._mapping:
            await self._mapping.copier.close()

    async def _mapped(self) -> _Mapping:
        async with self._mapping_lock:
            if self._mapping and not self._mapping.is_alive:
                if not self._mapping.is_unused:
                    raise DeviceLost(
                        f"Device {self.name} went, and regions of before are being closed. Try again when they are.",
                        device=self.name,
                    )
                await self._mapping.copier.close()
                self._mapping = None
            if self._mapping is None:
                mapping = _Mapping(self._bar.resolved())
                await mapping.copier.start()
                self._mapping = mapping
            return self._mapping


def _length(function: PciFunction, index: int) -> int:
    """Return the bytes of a memory BAR; 0 where there is none."""
    return next((bar.size for bar in function.bars if bar.index == index and bar.is_memory), 0)


if TYPE_CHECKING:
    _device: type[Device] = PciResourceDevice
    _memory: type[DeviceMemory] = PciMemory
    _range: type[BarRange] = _Bar
