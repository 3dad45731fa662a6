"""vfio's system calls: a PCI function in the hands of this process (linux/vfio.h).

Rules of this file:

* A function is opened by its own device file and iommufd where the kernel has both, else by its IOMMU group. Either
  way one process has it, and the kernel takes everything back when that ends, however it ends.
* The kernel waits with removing a function, or unbinding its driver, until this process lets go of it; it says so on
  an eventfd, which the owner has to watch.
* The function does no DMA for this process: its memory is what counts.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

_CHECK_EXTENSION, _SET_IOMMU, _GROUP_GET_STATUS, _SET_CONTAINER = 0x3B65, 0x3B66, 0x3B67, 0x3B68
_GET_DEVICE_FD, _GET_REGION_INFO, _GET_IRQ_INFO, _SET_IRQS = 0x3B6A, 0x3B6C, 0x3B6D, 0x3B6E
_DEVICE_FEATURE, _BIND_IOMMUFD = 0x3B75, 0x3B76
_TYPE1 = 3
"""VFIO_TYPE1v2_IOMMU."""
_VIABLE = 1
_REGION_MMAP = 4
_EVENTFD_TRIGGER = 1 << 2 | 1 << 5
"""VFIO_IRQ_SET_DATA_EVENTFD and VFIO_IRQ_SET_ACTION_TRIGGER."""
_ERRORS, _REQUESTS = 3, 4
"""Numbers of the interrupts that stand for a fatal PCIe error, and for the kernel's wish to have the function back."""
_GET_DMA_BUF = 1 << 16 | 11
"""VFIO_DEVICE_FEATURE_GET and VFIO_DEVICE_FEATURE_DMA_BUF."""

Ioctl = Callable[..., int]
Range = tuple[int, int]
"""Offset in a BAR and length."""


class NotViable(OSError):
    """The function's IOMMU group has functions that other drivers hold."""


@dataclass(frozen=True)
class BarWindow:
    """Where a BAR is in a function's descriptor."""

    offset: int
    size: int
    """Bytes; 0 for a BAR that the function does not have."""
    is_mappable: bool


class VfioFunction:
    """An open PCI function; used from any thread."""

    def __init__(self, fd: int, held: ExitStack, ioctl: Ioctl) -> None:
        """Owns `fd`; closes `held` after it. Raises OSError."""
        self.fd = fd
        self._ioctl = ioctl
        self._held = held
        self.wanted_back = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        """Readable when the kernel wants the function back, or has lost it."""
        held.callback(os.close, self.wanted_back)
        for interrupt in (_ERRORS, _REQUESTS):
            self._watch(interrupt)

    @classmethod
    def open(cls, address: str, sysfs: Path, dev: Path, ioctl: Ioctl = fcntl.ioctl) -> VfioFunction:
        """Open a function that vfio-pci holds. Raises NotViable, OSError."""
        folder = sysfs / "bus/pci/devices" / address
        with ExitStack() as held:
            own = next(iter((folder / "vfio-dev").glob("vfio*")), None)
            if own and (dev / "iommu").exists():
                fd = _open_by_file(dev / "vfio/devices" / own.name, dev / "iommu", held, ioctl)
            else:
                group = (folder / "iommu_group").resolve(strict=True).name
                fd = _open_by_group(dev / "vfio", group, address, held, ioctl)
            held.callback(os.close, fd)
            made = cls(fd, held, ioctl)
            made._held = held.pop_all()
            return made

    def bar(self, index: int) -> BarWindow:
        """Return where a BAR is. Raises OSError."""
        info = bytearray(struct.pack("=4I2Q", 32, 0, index, 0, 0, 0))
        self._ioctl(self.fd, _GET_REGION_INFO, info)
        _, flags, _, _, size, offset = struct.unpack("=4I2Q", info)
        return BarWindow(offset, size, bool(flags & _REGION_MMAP))

    def export(self, index: int, ranges: Sequence[Range]) -> int:
        """Return a dma-buf of ranges of a BAR, in whole pages, one behind the other; the caller owns it.

        Raises OSError.
        """
        header = struct.pack(
            "=6I", 24 + 16 * len(ranges), _GET_DMA_BUF, index, os.O_RDWR | os.O_CLOEXEC, 0, len(ranges)
        )
        request = bytearray(header + b"".join(struct.pack("=2Q", offset, length) for offset, length in ranges))
        return self._ioctl(self.fd, _DEVICE_FEATURE, request)

    def close(self) -> None:
        """Give the function back. Closing twice is no error."""
        self._held.close()

    def _watch(self, interrupt: int) -> None:
        """Have an interrupt told on the eventfd, where the function has it."""
        info = bytearray(struct.pack("=4I", 16, 0, interrupt, 0))
        with suppress(OSError):  # such as errors, of a function that is not PCI Express
            self._ioctl(self.fd, _GET_IRQ_INFO, info)
            if struct.unpack("=4I", info)[3]:
                request = struct.pack("=5Ii", 24, _EVENTFD_TRIGGER, interrupt, 0, 1, self.wanted_back)
                self._ioctl(self.fd, _SET_IRQS, bytearray(request))


def _open_by_file(file: Path, iommufd: Path, held: ExitStack, ioctl: Ioctl) -> int:
    iommu = os.open(iommufd, os.O_RDWR | os.O_CLOEXEC)
    held.callback(os.close, iommu)
    fd = os.open(file, os.O_RDWR | os.O_CLOEXEC)
    try:
        ioctl(fd, _BIND_IOMMUFD, bytearray(struct.pack("=2IiI", 16, 0, iommu, 0)))
    except BaseException:
        os.close(fd)
        raise
    return fd


def _open_by_group(folder: Path, group: str, address: str, held: ExitStack, ioctl: Ioctl) -> int:
    files = []
    for name in ("vfio", group):
        files.append(os.open(folder / name, os.O_RDWR | os.O_CLOEXEC))
        held.callback(os.close, files[-1])
    container, opened = files
    status = bytearray(struct.pack("=2I", 8, 0))
    ioctl(opened, _GROUP_GET_STATUS, status)
    if not struct.unpack("=2I", status)[1] & _VIABLE:
        raise NotViable(errno.EBUSY, os.strerror(errno.EBUSY))
    if not ioctl(container, _CHECK_EXTENSION, _TYPE1):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    ioctl(opened, _SET_CONTAINER, bytearray(struct.pack("=i", container)))
    ioctl(container, _SET_IOMMU, _TYPE1)
    return ioctl(opened, _GET_DEVICE_FD, bytearray(address.encode() + b"\0"))
