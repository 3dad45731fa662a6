"""What the broker needs of a device.

Rules:

* A device gives out memory and takes it back; it knows nothing of regions, owners or leases.
* Memory that a device gave out belongs to the broker until `close`; closing twice is no error.
* A shared file descriptor never lets a job reach memory beyond its region, nor shrink it under the
  daemon.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from peermem.core.types import Path
from peermem.memory import Memory


class Copier(Protocol):
    """Copies between device memory and host memory, for path STAGED.

    `pieces` are (offset in the device memory, offset in `buffer`, length) in bytes, any of them unaligned. Copies
    run one after the other, in the order of the calls; both raise RegionRevoked when the device has vanished, and
    ValueError for pieces outside.
    """

    async def load(self, buffer: Memory, pieces: Sequence[tuple[int, int, int]]) -> None:
        """Copy out of the device memory into `buffer`, which has a descriptor."""

    async def store(self, buffer: Memory, pieces: Sequence[tuple[int, int, int]]) -> None:
        """Copy out of `buffer`, which has a descriptor, into the device memory."""


class DeviceMemory(Memory, Protocol):
    """Memory of one region."""

    @property
    def copier(self) -> Copier | None:
        """What alone in this process touches memory whose `fd` is None and whose `view`, if it has any, is only for
        NICs to be tried with; None for memory that `peermem.memory` reaches."""

    @property
    def device_address(self) -> int | None:
        """Where the device itself finds the memory, which a vendor's kernel may resolve for a NIC (path
        LEGACY_PEER_MEMORY); None where there is no such address."""

    def dma_buf(self) -> tuple[int, int] | None:
        """Return (descriptor of a dma-buf, where the memory begins in it) for a NIC to import (path DMABUF); None where
        the memory has none. The descriptor stays the memory's and is closed with it.

        Raises ValueError after `close`.
        """

    @property
    def exporter(self) -> str:
        """Who exported the dma-buf that the memory is, such as vfio_pci_core; empty where it was not handed in as one
        nor made as one."""

    @property
    def is_reached_by_cpu(self) -> bool:
        """Whether this process reaches the bytes at all, by `fd`, `view` or `copier`; else only NICs do."""

    def alive(self) -> bool:
        """Whether it still is there, as far as is known without asking the device; see also Device."""

    @property
    def needs_flush(self) -> bool:
        """Whether what NICs wrote into the memory itself is visible to the device only after `flush`; what the copier
        wrote always is."""

    async def flush(self) -> None:
        """Make what NICs have written so far visible to the device. Raises RegionRevoked where it has vanished."""

    def share(self) -> tuple[int, int]:
        """Return (file descriptor, offset) for a local job to map; the caller does not own the
        descriptor, and must duplicate or send it before the memory is closed.

        Raises NotMappable where the kernel gives no such descriptor.
        """

    def close(self) -> None:
        """Unmap and give the memory back. Nothing may use it any more: the fence comes first."""


class Device(Protocol):
    """Memory that regions are made of."""

    @property
    def name(self) -> str:
        """Unique on the node."""

    @property
    def kind(self) -> str:
        """What it is, such as memfd; bounded, because it is a metric label."""

    @property
    def path(self) -> Path:
        """How NICs reach its memory as a rule."""

    @property
    def paths(self) -> Sequence[Path]:
        """How a NIC may reach its memory, `path` among them, the best first: to be tried in this order."""

    @property
    def pci_address(self) -> str:
        """Of the PCI function that has the memory, such as 0000:41:00.0; empty for host memory."""

    @property
    def size(self) -> int:
        """Bytes in all."""

    @property
    def available(self) -> int:
        """Bytes not given out."""

    async def allocate(self, length: int) -> DeviceMemory:
        """Return zeroed memory of `length` bytes.

        Raises DeviceFull; DeviceLost, DeviceForbidden, BarClaimed, KernelLockedDown, KernelTooOld for device memory;
        NotSupported where the device only adopts.
        """

    async def adopt(self, fd: int, length: int) -> DeviceMemory:
        """Return memory made of a file descriptor that a job handed in; owns `fd` from then on, also
        when it raises. `length` 0 means all of it.

        Raises NotAdoptable, DeviceFull; NotSupported where the device only allocates.
        """

    def alive(self) -> bool:
        """Whether it is there, and the memory that it gave out still is its memory; a cheap look.

        Once False, that memory is to be closed: a device that came back gives out no more before all of it is.
        """

    async def close(self) -> None:
        """End the device. Its memory has been closed before, or is being closed."""


@runtime_checkable
class AdoptsHandles(Protocol):
    """A device of which jobs have memory that another process opens by a handle of the vendor's driver."""

    async def adopt_handle(self, handle: bytes, offset: int, length: int) -> DeviceMemory:
        """Return memory made of a range of the allocation behind a handle; `length` 0 means all of it from `offset` on.

        Raises NotAdoptable, DeviceLost.
        """
