"""dma-bufs: memory of any device behind a descriptor, which NICs import and which the CPU maps where its exporter
lets it.

Rules of this file:

* Nothing is asked of an exporter but the size, a mapping and its name. Whether it lets the CPU map is tried once, when
  the memory is made: many don't (vfio up to Linux 7.3), and their memory is reached by NICs alone.
* The CPU touches a mapping only by kernel copies (`memory.py`), which survive memory that was taken away, and only
  between the two halves of DMA_BUF_IOCTL_SYNC, which may wait for the device: in a thread, one copy after the other.
* A mapping that once failed is lost for good: its exporter has revoked it.
* A dma-buf can't be resized by anybody, so its size is believed. What a job hands in stays alive for as long as the
  region, whatever the job does.
"""

from __future__ import annotations

import asyncio
import errno
import fcntl
import os
import struct
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

from peermem import memory
from peermem.core.errors import NotAdoptable, NotMappable, NotSupported, RegionRevoked
from peermem.core.types import Path
from peermem.device.base import Copier, Device, DeviceMemory
from peermem.device.plain import PlainMemory
from peermem.device.room import Room
from peermem.memory import FileMemory, Memory, dma_buf_exporter
from peermem.offload import in_thread, made_in_thread

_SYNC = 0x40086200
"""DMA_BUF_IOCTL_SYNC (linux/dma-buf.h); its argument is the flags, 64 bits."""
_READ, _WRITE, _BEGIN, _END = 1, 2, 0, 4

Piece = tuple[int, int, int]


class DmaBufMemory(PlainMemory, FileMemory):
    """The first `length` bytes of a dma-buf; a `DeviceMemory`. Usable from any thread."""

    def __init__(self, fd: int, length: int, give_back: Callable[[int], None]) -> None:
        """Owns `fd`; `give_back` is called with `length` when the memory is gone. Takes system calls."""
        super().__init__(fd, length)
        self.exporter = dma_buf_exporter(fd)
        self._give_back = give_back
        self._no_mapping = ""
        try:
            self.view()
        except OSError as error:
            self._no_mapping = error.strerror or str(error)
        self.is_reached_by_cpu = not self._no_mapping
        self._copier = SyncedCopier(self) if self.is_reached_by_cpu else None

    @property
    def fd(self) -> None:
        """See Memory: a dma-buf has neither read(2) nor write(2)."""

    @property
    def copier(self) -> Copier | None:
        """See DeviceMemory."""
        return self._copier

    def view(self) -> memoryview:
        """See Memory. Raises NotMappable where the exporter does not let the CPU map."""
        if self._no_mapping:
            raise self._not_mappable()
        return super().view()

    def alive(self) -> bool:
        """See DeviceMemory."""
        return self._copier is None or not self._copier.is_lost

    def dma_buf(self) -> tuple[int, int]:
        """See DeviceMemory."""
        return self.open_fd(), 0

    def share(self) -> tuple[int, int]:
        """See DeviceMemory. Raises ValueError after `close`."""
        fd = self.open_fd()
        if self._no_mapping:
            raise self._not_mappable()
        return fd, 0

    def _not_mappable(self) -> NotMappable:
        return NotMappable(
            f"The CPU can't map this memory: exporter {self.exporter} does not let it ({self._no_mapping}). Move it "
            "with a transfer.",
            exporter=self.exporter,
        )

    def _closed(self) -> None:
        self._give_back(self.length)


class SyncedCopier:
    """Copies by the kernel, through the mapping of a dma-buf; a `Copier`."""

    def __init__(self, mapped: DmaBufMemory) -> None:
        self.is_lost = False
        """Whether the exporter has taken the memory back."""
        self._memory = mapped
        self._lock = asyncio.Lock()

    async def load(self, buffer: Memory, pieces: Sequence[Piece]) -> None:
        """See Copier."""

        def copy() -> None:
            for offset, start, length in pieces:
                memory.copy(self._memory, offset, buffer, start, length)

        await self._run(_READ, copy)

    async def store(self, buffer: Memory, pieces: Sequence[Piece]) -> None:
        """See Copier."""

        def copy() -> None:
            for offset, start, length in pieces:
                memory.copy(buffer, start, self._memory, offset, length)

        await self._run(_WRITE, copy)

    async def _run(self, direction: int, copy: Callable[[], None]) -> None:
        async with self._lock:
            fd = self._memory.open_fd()

            def work() -> None:
                _sync(fd, _BEGIN | direction)
                try:
                    copy()
                finally:
                    with suppress(OSError):  # the copy has failed before it, or nothing of it is lost
                        _sync(fd, _END | direction)

            try:
                await in_thread(work)
            except OSError as error:
                self.is_lost = error.errno in (errno.EFAULT, errno.ENODEV)
                raise RegionRevoked(
                    f"The memory of the dma-buf of exporter {self._memory.exporter} can't be accessed any more "
                    f"({error.strerror}). Export it anew when its device is back.",
                    exporter=self._memory.exporter,
                ) from error


def _sync(fd: int, flags: int) -> None:
    """Begin or end an access of the CPU. Raises OSError."""
    while True:
        with suppress(InterruptedError, BlockingIOError):  # both mean: again (dma_buf_ioctl)
            fcntl.ioctl(fd, _SYNC, struct.pack("=Q", flags))
            return


class AdoptedDmaBufs:
    """dma-bufs that jobs handed in, whatever exported them."""

    kind = "adopted"
    path = Path.DMABUF
    paths: Sequence[Path] = (Path.DMABUF, Path.STAGED)
    pci_address = ""

    def __init__(self, name: str, room: Room) -> None:
        """`room` is for all that jobs hand in."""
        self.name = name
        self._room = room

    @property
    def size(self) -> int:
        """See Device."""
        return self._room.size

    @property
    def available(self) -> int:
        """See Device."""
        return self._room.available

    async def allocate(self, length: int) -> DeviceMemory:
        """See Device."""
        raise NotSupported(f"Device {self.name} holds only dma-bufs that jobs handed in. Name another device.")

    async def adopt(self, fd: int, length: int) -> DeviceMemory:
        """See Device."""
        return await made_in_thread(lambda: self._adopt(fd, length))

    def alive(self) -> bool:
        """See Device. Each of its memories may vanish on its own."""
        return True

    async def close(self) -> None:
        """See Device. Holds nothing that its memory doesn't."""

    def _adopt(self, fd: int, length: int) -> DmaBufMemory:
        try:
            wanted = _check_length(_check(fd), length)
            self._room.take(wanted, self.name, "Delete adopted regions, or raise attach.adopt_limit.")
        except BaseException:
            os.close(fd)
            raise
        return DmaBufMemory(fd, wanted, self._room.give_back)


def _check(fd: int) -> int:
    """Return the size of a dma-buf that is fit to be adopted. Raises NotAdoptable."""
    exporter = dma_buf_exporter(fd)  # of anything else, even lseek could wait for the job
    if not exporter:
        raise NotAdoptable("The file descriptor is no dma-buf. Hand in one that a device's driver exported.")
    if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE != os.O_RDWR:
        raise NotAdoptable(
            f"The dma-buf of exporter {exporter} is not open for reading and writing. Export it with O_RDWR."
        )
    try:
        return os.lseek(fd, 0, os.SEEK_END)
    except OSError as error:
        raise NotAdoptable(f"The dma-buf of exporter {exporter} does not tell its size: {error.strerror}.") from error


def _check_length(size: int, length: int) -> int:
    """Return how many bytes of a dma-buf to adopt. Raises NotAdoptable."""
    if not 0 <= length <= size:
        raise NotAdoptable(
            f"The dma-buf has {size} bytes and {length} were asked for. Ask for at most its size.",
            size=size,
            wanted=length,
        )
    return length or size


if TYPE_CHECKING:
    _copier: type[Copier] = SyncedCopier
    _device: type[Device] = AdoptedDmaBufs
    _memory: type[DeviceMemory] = DmaBufMemory
