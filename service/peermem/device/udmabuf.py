"""Ordinary memory as dma-bufs (/dev/udmabuf): every step of a device's dma-buf, on any machine.

Rules of this file:

* Each region is a memory file of its own, sealed as the kernel wants it and then exported; the dma-buf alone keeps its
  pages from then on.
* What the driver refuses is told before it is asked where that can be known: it answers EINVAL to everything.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from collections.abc import Sequence
from pathlib import Path as FilePath
from typing import TYPE_CHECKING

from peermem.core.errors import (
    DeviceForbidden,
    DeviceFull,
    DeviceLost,
    LimitReached,
    NotSupported,
    PeermemError,
    ZeroLength,
)
from peermem.core.types import Path
from peermem.core.units import format_size
from peermem.device.base import Device, DeviceMemory
from peermem.device.dmabuf import DmaBufMemory
from peermem.device.room import Room
from peermem.memory import whole_pages
from peermem.offload import made_in_thread

_FILE = FilePath("/dev/udmabuf")
_LIMIT = FilePath("/sys/module/udmabuf/parameters/size_limit_mb")
_CREATE = 0x40187542
"""UDMABUF_CREATE (linux/udmabuf.h); its argument is struct udmabuf_create."""
_CLOEXEC = 1


class UdmabufDevice:
    """Gives out dma-bufs of host memory until its size is used up."""

    kind = "udmabuf"
    path = Path.DMABUF
    paths: Sequence[Path] = (Path.DMABUF, Path.STAGED)
    pci_address = ""

    def __init__(self, name: str, size: int, file: FilePath = _FILE) -> None:
        """`file` is the driver's."""
        self.name = name
        self._file = file
        self._room = Room(size)

    @property
    def size(self) -> int:
        """See Device."""
        return self._room.size

    @property
    def available(self) -> int:
        """See Device."""
        return self._room.available

    async def allocate(self, length: int) -> DeviceMemory:
        """See Device. Raises also LimitReached, where a limit of the driver or of the daemon is too low."""
        if length < 1:
            raise ZeroLength(f"Device {self.name} gives out at least 1 byte.", device=self.name)
        return await made_in_thread(lambda: self._make(length))

    async def adopt(self, fd: int, length: int) -> DeviceMemory:
        """See Device."""
        os.close(fd)
        raise NotSupported(f"Device {self.name} only allocates. Adopt a file descriptor without naming a device.")

    def alive(self) -> bool:
        """See Device. The host's own memory does not vanish."""
        return True

    async def close(self) -> None:
        """See Device. Holds nothing that its memory doesn't."""

    def _make(self, length: int) -> DmaBufMemory:
        self._room.take(length, self.name, "Delete regions, or use another device.")
        try:
            return DmaBufMemory(self._export(length), length, self._room.give_back)
        except BaseException as error:
            self._room.give_back(length)
            if isinstance(error, OSError):
                raise self._refused(error, length) from error
            raise

    def _export(self, length: int) -> int:
        """Return the dma-buf of a new memory file. Raises OSError, DeviceFull, LimitReached."""
        pages = whole_pages(length)
        self._check_limit(pages)
        driver = os.open(self._file, os.O_RDWR | os.O_CLOEXEC)
        try:
            file = os.memfd_create(f"peermem-{self.name}", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
            try:
                self._fill(file, pages)
                fcntl.fcntl(file, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
                request = bytearray(struct.pack("=IIQQ", file, _CLOEXEC, 0, pages))
                return int(fcntl.ioctl(driver, _CREATE, request))  # of bytes, it would be a copy that is returned
            finally:
                os.close(file)
        finally:
            os.close(driver)

    def _fill(self, file: int, pages: int) -> None:
        try:
            os.posix_fallocate(file, 0, pages)
        except OSError as error:
            raise DeviceFull(
                f"The host has too little memory for {format_size(pages)} of device {self.name}: {error.strerror}. "
                "Free some, raise the daemon's memory limit, or configure a smaller device.",
                device=self.name,
            ) from error

    def _check_limit(self, pages: int) -> None:
        try:
            limit = int(_LIMIT.read_text()) << 20
        except (OSError, ValueError):
            return
        if pages > limit:
            raise LimitReached(
                f"Device {self.name} makes dma-bufs of at most {format_size(limit)}, the driver's limit; "
                f"{format_size(pages)} were asked for. Ask for less, or write more megabytes to {_LIMIT}.",
                device=self.name,
                limit=limit,
            )

    def _refused(self, error: OSError, length: int) -> PeermemError:
        """Return what an error of the kernel means."""
        what = f"Device {self.name} can't make a dma-buf of {format_size(length)}: {error.strerror}"
        if error.errno in (errno.EACCES, errno.EPERM):
            return DeviceForbidden(
                f"{what}. Give the daemon's user read and write access to {self._file}.", device=self.name
            )
        if error.errno in (errno.EMFILE, errno.ENFILE):
            return LimitReached(
                f"{what}. Raise the daemon's limit of open files (LimitNOFILE), or delete regions.", device=self.name
            )
        return DeviceLost(
            f"{what} ({self._file}). Load its driver, modprobe udmabuf, on a kernel with CONFIG_UDMABUF.",
            device=self.name,
        )


if TYPE_CHECKING:
    _device: type[Device] = UdmabufDevice
