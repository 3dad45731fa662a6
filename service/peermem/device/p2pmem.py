"""BAR memory that a driver gave to the kernel's p2pdma allocator: sysfs `p2pmem`, such as an NVMe controller's CMB.

Rules of this file:

* Each pool on the node is a device. Others use it too: its size and what is free are asked of the kernel each time.
* A region is one mapping of `p2pmem/allocate`. Each mapping gets pages of its own, so no descriptor can pass a region's
  pages to a job.
* This process touches the pages only by kernel copies (`memory.py`): where the driver has let go of them, a load is
  SIGBUS. Unbinding the driver waits for no mapping (seen on Linux 7.3.4); when it is bound again, the pool is a new
  one, and is used only when all memory of the old one is closed.
* The pages may hold an earlier user's bytes: they are zeroed before anybody sees them.
"""

from __future__ import annotations

import errno
import mmap
import os
import threading
from collections.abc import Callable
from contextlib import closing
from pathlib import Path as FilePath
from typing import TYPE_CHECKING

from peermem import memory
from peermem.core.errors import (
    DeviceForbidden,
    DeviceFull,
    DeviceLost,
    KernelTooOld,
    LimitReached,
    NotMappable,
    NotSupported,
    PeermemError,
    ZeroLength,
)
from peermem.core.node import P2PMEM
from peermem.core.types import Path
from peermem.core.units import format_size
from peermem.device.base import Device, DeviceMemory
from peermem.device.plain import PlainMemory
from peermem.device.sysfs import SYSFS, p2pmem_pool, p2pmem_pools
from peermem.memory import HostMemory, whole_pages
from peermem.offload import made_in_thread

_ZEROS = 1 << 20
"""Bytes zeroed by one system call."""


class P2pmemMemory(PlainMemory):
    """One mapping of a pool's memory; a `DeviceMemory`."""

    fd = None
    copier = None

    def __init__(self, mapping: mmap.mmap, length: int, closed: Callable[[], None]) -> None:
        """Owns `mapping`; `closed` is called once, when it is unmapped."""
        self.length = length
        self._mapping = mapping
        self._closed = closed
        self._view: memoryview | None = None

    def view(self) -> memoryview:
        """See Memory."""
        self._check_open()
        if self._view is None:
            self._view = memoryview(self._mapping)[: self.length]
        return self._view

    def share(self) -> tuple[int, int]:
        """See DeviceMemory. Always raises NotMappable, or ValueError after `close`."""
        self._check_open()
        raise NotMappable(
            "A region of p2pmem can't be mapped by a job: the kernel gives each mapping of the pool pages of its own. "
            "Read and write the region through the daemon, or move it with a transfer."
        )

    def close(self) -> None:
        """See DeviceMemory.

        Raises BufferError while somebody holds a slice of the view: then the fence was missed, all stays
        as it is, and closing can be tried again.
        """
        if self._view is not None:
            self._view.release()
            self._view = None
        if not self._mapping.closed:
            self._mapping.close()
            self._closed()

    def _check_open(self) -> None:
        if self._mapping.closed:
            raise ValueError("the memory is closed")


class P2pmemDevice:
    """The pool of one PCI function."""

    kind = "p2pmem"
    path = Path.P2PDMA
    paths = (Path.P2PDMA, Path.STAGED)

    def __init__(self, address: str, root: FilePath = SYSFS) -> None:
        """`address` is of the PCI function, such as 0000:41:00.0."""
        self.name = f"{P2PMEM}{address.replace(':', '-').replace('.', '-')}"
        self.pci_address = address
        self._root = root
        self._lock = threading.Lock()
        self._held = 0
        """Mappings that are open."""
        self._pool = 0
        """The pool that they are of: the inode of its file, of which sysfs never uses one again."""

    @property
    def size(self) -> int:
        """See Device; 0 when the pool is gone."""
        pool = p2pmem_pool(self.pci_address, self._root)
        return pool.size if pool else 0

    @property
    def available(self) -> int:
        """See Device; what other users of the pool leave."""
        pool = p2pmem_pool(self.pci_address, self._root)
        return pool.available if pool else 0

    async def allocate(self, length: int) -> DeviceMemory:
        """See Device."""
        if length < 1:
            raise ZeroLength(f"Device {self.name} gives out at least 1 byte.", device=self.name)
        return await made_in_thread(lambda: self._make(length))

    async def adopt(self, fd: int, length: int) -> DeviceMemory:
        """See Device."""
        os.close(fd)
        raise NotSupported(f"Device {self.name} only allocates. Adopt a file descriptor without naming a device.")

    def alive(self) -> bool:
        """See Device."""
        pool = _inode(self._folder / "allocate")
        with self._lock:
            return bool(pool) and (not self._held or pool == self._pool)

    async def close(self) -> None:
        """See Device. Holds nothing that its memory doesn't."""

    @property
    def _folder(self) -> FilePath:
        return self._root / "bus/pci/devices" / self.pci_address / "p2pmem"

    def _make(self, length: int) -> P2pmemMemory:
        mapping = self._map(length)
        whole = P2pmemMemory(mapping, len(mapping), self._release)
        try:
            _zero(whole)
        except OSError as error:
            whole.close()
            raise self._refused(error, length) from error
        whole.view().release()
        return P2pmemMemory(mapping, length, self._release)

    def _map(self, length: int) -> mmap.mmap:
        pool = p2pmem_pool(self.pci_address, self._root)
        if pool and not pool.is_mappable:
            raise KernelTooOld(
                f"Device {self.name} can't be mapped: this kernel has no {self._folder}/allocate. Run Linux 6.2 or "
                "newer, with CONFIG_PCI_P2PDMA.",
                device=self.name,
            )
        if pool and length > pool.size:
            raise self._full(length)
        try:
            with open(self._folder / "allocate", "r+b", buffering=0) as file:
                self._hold(os.fstat(file.fileno()).st_ino)
                try:
                    return mmap.mmap(file.fileno(), whole_pages(length))
                except BaseException:
                    self._release()
                    raise
        except OSError as error:
            raise self._refused(error, length) from error

    def _hold(self, pool: int) -> None:
        """Count a mapping. Raises DeviceLost while there are mappings of an earlier pool."""
        with self._lock:
            if self._held and pool != self._pool:
                raise DeviceLost(
                    f"Device {self.name} went and came back, and regions of before are being closed. Try again when "
                    "they are.",
                    device=self.name,
                )
            self._held, self._pool = self._held + 1, pool

    def _release(self) -> None:
        with self._lock:
            self._held -= 1

    def _refused(self, error: OSError, length: int) -> PeermemError:
        """Return what an error of the kernel means."""
        number, device = error.errno, self.name
        if number == errno.ENOMEM:
            return self._full(length)
        if number in (errno.EACCES, errno.EPERM, errno.EROFS):
            return DeviceForbidden(
                f"Device {device}: the daemon may not open {self._folder}/allocate ({error.strerror}), which has mode "
                "0660 of root. Run it as root or with CAP_DAC_OVERRIDE, or change the file's group; in a container "
                "mount /sys for writing.",
                device=device,
            )
        if number == errno.EINVAL:
            return KernelTooOld(
                f"Device {device}: this kernel maps no {self._folder}/allocate. Run Linux 6.2 or newer, with "
                "CONFIG_PCI_P2PDMA.",
                device=device,
            )
        if number in (errno.EMFILE, errno.ENFILE):
            return LimitReached(
                f"Device {device} can't be mapped: {error.strerror}. Raise the daemon's limit of open files "
                "(LimitNOFILE), or delete regions.",
                device=device,
            )
        return DeviceLost(
            f"Device {device} is not there any more ({error.strerror}). Bind the driver of {self.pci_address} again.",
            device=device,
        )

    def _full(self, length: int) -> DeviceFull:
        available = self.available
        return DeviceFull(
            f"Device {self.name} has {format_size(available)} of {format_size(self.size)} left, and other drivers use "
            f"it too; {format_size(length)} were asked for in one piece. Delete regions, or use another device.",
            device=self.name,
            available=available,
            wanted=length,
        )


def p2pmem_devices(root: FilePath = SYSFS) -> list[P2pmemDevice]:
    """Return a device for each pool that is on the node now."""
    return [P2pmemDevice(pool.address, root) for pool in p2pmem_pools(root)]


def _inode(path: FilePath) -> int:
    """Return the number of a file's inode; 0 when there is none."""
    try:
        return path.stat().st_ino
    except OSError:
        return 0


def _zero(made: P2pmemMemory) -> None:
    """Fill it with zeros by the kernel. Raises OSError where the memory has vanished."""
    with closing(HostMemory(_ZEROS, "peermem-zeros")) as zeros:
        for start in range(0, made.length, _ZEROS):
            memory.copy(zeros, 0, made, start, min(_ZEROS, made.length - start))


if TYPE_CHECKING:
    _device: type[Device] = P2pmemDevice
    _memory: type[DeviceMemory] = P2pmemMemory
