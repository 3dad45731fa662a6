"""vfio as the kernel would have it, made of ordinary files: a function whose BAR is a memory file that can be mapped,
cut off, exported by ranges, and wanted back.

What stands for a dma-buf is a descriptor that can't be mapped, as on real kernels; a range that vfio does not export is
refused as it would be.
"""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Callable
from pathlib import Path

from peermem.device.vfio_function import VfioFunction
from tests.device.pci_tree import ADDRESS, PciTree

GROUP = "7"


class VfioKernel:
    """One function, in an IOMMU group of its own, that vfio-pci holds."""

    def __init__(self, tree: PciTree, dev: Path) -> None:
        self.tree = tree
        self.dev = dev
        self.asked: list[int] = []
        """Numbers of the ioctls, in order."""
        self.refuses: dict[int, int] = {}
        """What is answered to an ioctl instead, by its number: an errno."""
        self.exported: list[list[tuple[int, int]]] = []
        self.is_viable = True
        self.has_type1 = True
        self.interrupts = {4: 1}
        """How many there are of each kind, of those that count here."""
        self._wanted_back: list[int] = []
        self._group = tree.root / "kernel/iommu_groups" / GROUP
        (self._group / "devices").mkdir(parents=True)
        (self._group / "devices" / ADDRESS).symlink_to(tree.folder)
        (tree.folder / "iommu_group").symlink_to(self._group)
        (dev / "vfio/devices").mkdir(parents=True)
        for name in ("vfio/vfio", f"vfio/{GROUP}"):
            (dev / name).touch()
        tree.bind("vfio-pci")

    def give_files(self) -> None:
        """Have the function's own device file, and iommufd."""
        (self.tree.folder / "vfio-dev/vfio0").mkdir(parents=True)
        for name in ("iommu", "vfio/devices/vfio0"):
            (self.dev / name).touch()

    def want_back(self) -> None:
        """Ask who has the function to let go of it."""
        for event in self._wanted_back:
            os.eventfd_write(event, 1)

    def open(self, address: str, root: Path, dev: Path) -> VfioFunction:
        """What VfioFunction.open does on this kernel."""
        return VfioFunction.open(address, root, dev, self.ioctl)

    def ioctl(self, fd: int, number: int, argument: bytearray | int = 0) -> int:
        """What fcntl.ioctl does on this kernel."""
        self.asked.append(number)
        if number in self.refuses:
            raise OSError(self.refuses[number], os.strerror(self.refuses[number]))
        return self._answers[number](argument) if number in self._answers else 0

    @property
    def _answers(self) -> dict[int, Callable[..., int]]:
        return {
            0x3B65: lambda _: int(self.has_type1),
            0x3B67: self._status,
            0x3B6A: lambda _: os.open(self.tree.bar, os.O_RDWR),
            0x3B6C: self._region,
            0x3B6D: self._interrupt,
            0x3B6E: self._watch,
            0x3B75: self._export,
        }

    def _status(self, argument: bytearray) -> int:
        argument[4:8] = struct.pack("=I", int(self.is_viable))
        return 0

    def _region(self, argument: bytearray) -> int:
        if struct.unpack_from("=I", argument, 8)[0] == 2:
            struct.pack_into("=I", argument, 4, 7)
            struct.pack_into("=2Q", argument, 16, self.tree.bar_size, 0)
        return 0

    def _interrupt(self, argument: bytearray) -> int:
        struct.pack_into("=I", argument, 12, self.interrupts.get(struct.unpack_from("=I", argument, 8)[0], 0))
        return 0

    def _watch(self, argument: bytearray) -> int:
        self._wanted_back.append(struct.unpack("=5Ii", argument)[-1])
        return 0

    def _export(self, argument: bytearray) -> int:
        _, _, bar, _, flags, count = struct.unpack_from("=6I", argument)
        ranges = [struct.unpack_from("=2Q", argument, 24 + 16 * index) for index in range(count)]
        pages = all(offset % 4096 == 0 and length % 4096 == 0 and length for offset, length in ranges)
        inside = all(offset + length <= self.tree.bar_size for offset, length in ranges)
        if bar != 2 or flags or not ranges or not pages or not inside:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        self.exported.append([(offset, length) for offset, length in ranges])
        return os.eventfd(0, os.EFD_CLOEXEC)
