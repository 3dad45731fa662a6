"""Memory files (memfd_create(2)): host memory that stands in for a BAR, and memory that jobs hand in.

Rules of this file:

* Each region is a memory file of its own: its descriptor opens nothing of another region.
* No job can shrink a file under the daemon: F_SEAL_SHRINK is set before anybody else sees an allocated
  file, and on a handed-in one before its size is believed; F_SEAL_SEAL then keeps the seals as they are.
* All pages exist before a region does: touching them can't fail for want of memory.
* A BAR is page granular: sizes are rounded down and lengths up to whole pages, of adopted memory too.
* What takes long (making and freeing pages) may run in any thread; only small files are made on the
  event loop.
* A job that still maps an ended region keeps those pages alive by itself, outside of the device's size.
  A file that is handed in twice makes two regions of the same bytes.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

from peermem.core.errors import DeviceFull, LimitReached, NotAdoptable, NotSupported, ZeroLength
from peermem.core.types import Path
from peermem.core.units import format_size
from peermem.device.base import Device, DeviceMemory
from peermem.device.plain import PlainMemory
from peermem.device.room import Room
from peermem.memory import FileMemory
from peermem.offload import made_in_thread

_SEAL_FUTURE_WRITE = 0x10  # linux/fcntl.h, since Linux 5.1
_SEALED_READ_ONLY = fcntl.F_SEAL_WRITE | _SEAL_FUTURE_WRITE
_SMALL = 1 << 20
"""Bytes up to which making the pages takes less time than going to a thread and back, about 0.1 ms."""


class MemfdMemory(PlainMemory, FileMemory):
    """One memory file; a `DeviceMemory`. Usable from any thread."""

    copier = None

    def __init__(self, fd: int, length: int, give_back: Callable[[int], None]) -> None:
        """Owns `fd`; `give_back` is called with `length` when the memory is gone."""
        super().__init__(fd, length)
        self._give_back = give_back

    def share(self) -> tuple[int, int]:
        """See DeviceMemory. Raises ValueError after `close`."""
        return self.open_fd(), 0

    def _closed(self) -> None:
        self._give_back(self.length)


class _FileDevice:
    """What both kinds of device share: room for a number of bytes."""

    path = Path.HOST
    paths: Sequence[Path] = (Path.HOST,)
    pci_address = ""

    def __init__(self, name: str, size: int) -> None:
        self.name = name
        self.room = Room(size)

    @property
    def size(self) -> int:
        """See Device."""
        return self.room.size

    @property
    def available(self) -> int:
        """See Device."""
        return self.room.available

    def alive(self) -> bool:
        """See Device. The host's own memory does not vanish."""
        return True

    async def close(self) -> None:
        """See Device. Holds nothing that its memory doesn't."""

    def _fill(self, fd: int, length: int, fix: str) -> MemfdMemory:
        """Return memory of a file's first `length` bytes, with all its pages. Owns `fd`, also when it raises.

        Raises DeviceFull; where the device is, its message ends with `fix`.
        """
        try:
            self.room.take(length, self.name, fix)
            try:
                os.posix_fallocate(fd, 0, length)
            except OSError as error:
                self.room.give_back(length)
                raise DeviceFull(
                    f"The host has too little memory for {format_size(length)} of device {self.name}: "
                    f"{error.strerror}. Free some, raise the daemon's memory limit, or configure a smaller device.",
                    device=self.name,
                ) from error
        except BaseException:
            os.close(fd)
            raise
        return MemfdMemory(fd, length, self.room.give_back)


class MemfdDevice(_FileDevice):
    """A stand-in BAR: gives out memory files until its size is used up."""

    kind = "memfd"

    async def allocate(self, length: int) -> DeviceMemory:
        """See Device. Raises LimitReached when the daemon is out of descriptors."""
        if length < 1:
            raise ZeroLength(f"Device {self.name} gives out at least 1 byte.", device=self.name)
        if length <= _SMALL:
            return self._make(length)
        return await made_in_thread(lambda: self._make(length))

    async def adopt(self, fd: int, length: int) -> DeviceMemory:
        """See Device."""
        os.close(fd)
        raise NotSupported(f"Device {self.name} only allocates. Adopt a file descriptor without naming a device.")

    def _make(self, length: int) -> MemfdMemory:
        try:
            fd = os.memfd_create(f"peermem-{self.name}", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        except OSError as error:
            raise LimitReached(
                f"Device {self.name} can make no memory file: {error.strerror}. Raise the daemon's limit of open "
                "files (LimitNOFILE), or delete regions.",
                device=self.name,
            ) from error
        memory = self._fill(fd, length, "Delete regions, or use another device.")
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
        return memory


class AdoptedMemory(_FileDevice):
    """Memory files that jobs handed in, up to a number of bytes."""

    kind = "adopted"

    async def allocate(self, length: int) -> DeviceMemory:
        """See Device."""
        raise NotSupported(f"Device {self.name} holds only memory that jobs handed in. Name another device.")

    async def adopt(self, fd: int, length: int) -> DeviceMemory:
        """See Device. `length` need not be whole pages."""
        return await made_in_thread(lambda: self._adopt(fd, length))

    def _adopt(self, fd: int, length: int) -> MemfdMemory:
        try:
            wanted = _check_length(_check_file(fd), length)
        except BaseException:
            os.close(fd)
            raise
        return self._fill(fd, wanted, "Delete adopted regions, or raise attach.adopt_limit.")


def _check_file(fd: int) -> int:
    """Return the size of a file that is fit to be adopted, sealed for good. Raises NotAdoptable."""
    try:
        fcntl.fcntl(fd, fcntl.F_GET_SEALS)  # of anything else, even fstat could wait for the job
    except OSError:
        raise NotAdoptable(
            "The file descriptor is no memory file. Make one with memfd_create and MFD_ALLOW_SEALING."
        ) from None
    if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE != os.O_RDWR:
        raise NotAdoptable("The memory file is not open for reading and writing. Hand in one that is.")
    with suppress(PermissionError):  # F_SEAL_SEAL is set already; what counts is which seals came before it
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL)
    seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
    if seals & _SEALED_READ_ONLY:
        raise NotAdoptable("The memory file is sealed against writing. Hand in one without F_SEAL_WRITE.")
    if not seals & fcntl.F_SEAL_SHRINK:
        raise NotAdoptable(
            "The memory file can be shrunk and takes no seal against it. Make it with memfd_create and "
            "MFD_ALLOW_SEALING, or set F_SEAL_SHRINK before F_SEAL_SEAL."
        )
    try:
        os.pwrite(fd, b"", 0)
    except OSError as error:  # EINVAL for huge pages (hugetlbfs), which have no write(2)
        raise NotAdoptable(
            f"The kernel can't write to the memory file ({error.strerror}). Make it without MFD_HUGETLB."
        ) from error
    return os.fstat(fd).st_size


def _check_length(size: int, length: int) -> int:
    """Return how many bytes of the file to adopt. Raises NotAdoptable."""
    if size == 0:
        raise NotAdoptable("The memory file is empty. Give it a size with ftruncate before handing it in.")
    if not 0 <= length <= size:
        raise NotAdoptable(
            f"The memory file has {size} bytes and {length} were asked for. Ask for at most its size.",
            size=size,
            wanted=length,
        )
    return length or size


if TYPE_CHECKING:
    _allocating: type[Device] = MemfdDevice
    _adopting: type[Device] = AdoptedMemory
    _memory: type[DeviceMemory] = MemfdMemory
