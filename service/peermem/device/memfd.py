"""Memory files (memfd_create(2)): host memory that stands in for a BAR, and memory that jobs hand in.

Rules of this file:

* Each region is a memory file of its own: its descriptor opens nothing of another region.
* No job can shrink a file under the daemon: F_SEAL_SHRINK is set before anybody else sees an allocated
  file, and on a handed-in one before it is used.
* All pages exist before a region does: touching them can't fail for want of memory.
* A BAR is page granular, so lengths count in whole pages; adopted memory counts in whole pages too.
"""

from __future__ import annotations

import asyncio
import fcntl
import mmap
import os
import stat
from typing import TYPE_CHECKING

from peermem.core.errors import DeviceFull, NotAdoptable, NotSupported
from peermem.core.types import Path
from peermem.core.units import format_size
from peermem.device.base import Device, DeviceMemory

_ALL_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
_SEAL_FUTURE_WRITE = 0x10  # linux/fcntl.h, since Linux 5.1


class Budget:
    """Bytes of a device that are given out, in whole pages."""

    def __init__(self, name: str, size: int) -> None:
        self.name = name
        self.size = size
        self.available = size

    def take(self, length: int) -> int:
        """Reserve `length` bytes; return what to give back. Raises DeviceFull."""
        taken = -(-length // mmap.PAGESIZE) * mmap.PAGESIZE
        if taken > self.available:
            raise DeviceFull(
                f"Device {self.name} has {format_size(self.available)} of {format_size(self.size)} left; "
                f"{format_size(taken)} were asked for. Delete regions or use another device.",
                device=self.name,
                available=self.available,
                wanted=taken,
            )
        self.available -= taken
        return taken

    def give_back(self, taken: int) -> None:
        """End a reservation."""
        self.available += taken


class MemfdMemory:
    """One memory file; a `DeviceMemory`."""

    def __init__(self, fd: int, length: int, budget: Budget, taken: int) -> None:
        """Owns `fd` and `taken` bytes of `budget`."""
        self.length = length
        self._fd: int | None = fd
        self._budget = budget
        self._taken = taken
        self._map: mmap.mmap | None = None
        self._view: memoryview | None = None

    @property
    def fd(self) -> int | None:
        """See Memory."""
        return self._fd

    def view(self) -> memoryview:
        """See Memory."""
        if self._view is None:
            if self._fd is None:
                raise ValueError("the memory is closed")
            self._map = mmap.mmap(self._fd, self.length)
            self._view = memoryview(self._map)
        return self._view

    def share(self) -> tuple[int, int]:
        """See DeviceMemory."""
        if self._fd is None:
            raise ValueError("the memory is closed")
        return self._fd, 0

    def close(self) -> None:
        """See DeviceMemory. A slice of the view that is still alive keeps the mapping until it is gone."""
        if self._fd is None:
            return
        os.close(self._fd)
        self._fd = None
        self._budget.give_back(self._taken)
        if self._view is not None:
            self._view.release()
        self._view = self._map = None


class MemfdDevice:
    """A stand-in BAR: gives out memory files until its size is used up."""

    def __init__(self, name: str, size: int) -> None:
        """`size` in bytes."""
        self._budget = Budget(name, size)

    @property
    def name(self) -> str:
        """See Device."""
        return self._budget.name

    @property
    def kind(self) -> str:
        """See Device."""
        return "memfd"

    @property
    def path(self) -> Path:
        """See Device."""
        return Path.HOST

    @property
    def size(self) -> int:
        """See Device."""
        return self._budget.size

    @property
    def available(self) -> int:
        """See Device."""
        return self._budget.available

    async def allocate(self, length: int) -> DeviceMemory:
        """See Device."""
        taken = self._budget.take(length)
        fd = -1
        try:
            fd = os.memfd_create(f"peermem-{self.name}", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
            await _populate(fd, length)
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _ALL_SEALS)
        except BaseException as error:
            if fd >= 0:
                os.close(fd)
            self._budget.give_back(taken)
            if isinstance(error, OSError):
                raise DeviceFull(
                    f"The host gives device {self.name} no {format_size(length)} of memory: {error.strerror}.",
                    device=self.name,
                ) from error
            raise
        return MemfdMemory(fd, length, self._budget, taken)

    async def adopt(self, fd: int, length: int) -> DeviceMemory:
        """See Device."""
        os.close(fd)
        raise NotSupported(f"Device {self.name} allocates; file descriptors are adopted without naming a device.")

    async def close(self) -> None:
        """See Device."""


class AdoptedMemory:
    """Memory files that jobs handed in, up to a number of bytes."""

    def __init__(self, name: str, limit: int) -> None:
        """`limit` in bytes."""
        self._budget = Budget(name, limit)

    @property
    def name(self) -> str:
        """See Device."""
        return self._budget.name

    @property
    def kind(self) -> str:
        """See Device."""
        return "adopted"

    @property
    def path(self) -> Path:
        """See Device."""
        return Path.HOST

    @property
    def size(self) -> int:
        """See Device."""
        return self._budget.size

    @property
    def available(self) -> int:
        """See Device."""
        return self._budget.available

    async def allocate(self, length: int) -> DeviceMemory:
        """See Device."""
        raise NotSupported(f"Device {self.name} holds handed-in memory only. Name another device.")

    async def adopt(self, fd: int, length: int) -> DeviceMemory:
        """See Device."""
        try:
            size = _check_adoptable(fd)
            if length > size:
                raise NotAdoptable(f"The file has {size} bytes, {length} were asked for.", size=size, wanted=length)
            wanted = length or size
            taken = self._budget.take(wanted)
            try:
                await _populate(fd, wanted)
            except BaseException:
                self._budget.give_back(taken)
                raise
        except OSError as error:
            os.close(fd)
            raise NotAdoptable(f"The file's memory can't be had: {error.strerror}.") from error
        except BaseException:
            os.close(fd)
            raise
        return MemfdMemory(fd, wanted, self._budget, taken)

    async def close(self) -> None:
        """See Device."""


def _check_adoptable(fd: int) -> int:
    """Return the file's size and seal it against shrinking. Raises NotAdoptable."""
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        raise NotAdoptable("The descriptor is no memory file. Make one with memfd_create and MFD_ALLOW_SEALING.")
    try:
        seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
    except OSError:
        raise NotAdoptable("The descriptor is a file on a disk, no memory file. Use memfd_create.") from None
    if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE != os.O_RDWR:
        raise NotAdoptable("The memory file is not open for reading and writing.")
    if seals & (fcntl.F_SEAL_WRITE | _SEAL_FUTURE_WRITE):
        raise NotAdoptable("The memory file is sealed against writing.")
    if not seals & fcntl.F_SEAL_SHRINK:
        if seals & fcntl.F_SEAL_SEAL:
            raise NotAdoptable(
                "The memory file could be shrunk under the daemon, and takes no seal. Make it with MFD_ALLOW_SEALING."
            )
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
    size = os.fstat(fd).st_size
    if size == 0:
        raise NotAdoptable("The memory file is empty. Give it a size with ftruncate first.")
    return size


async def _populate(fd: int, length: int) -> None:
    """Make all pages exist; in a thread where that takes long."""
    if length <= 1 << 20:
        os.posix_fallocate(fd, 0, length)
    else:
        await asyncio.to_thread(os.posix_fallocate, fd, 0, length)


if TYPE_CHECKING:
    _allocating: type[Device] = MemfdDevice
    _adopting: type[Device] = AdoptedMemory
    _memory: type[DeviceMemory] = MemfdMemory
