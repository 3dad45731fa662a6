"""What the broker needs of a device.

Rules:

* A device gives out memory and takes it back; it knows nothing of regions, owners or leases.
* Memory that a device gave out belongs to the broker until `close`; closing twice is no error.
* A shared file descriptor never lets a job reach memory beyond its region, nor shrink it under the
  daemon.
"""

from __future__ import annotations

from typing import Protocol

from peermem.core.types import Path
from peermem.memory import Memory


class DeviceMemory(Memory, Protocol):
    """Memory of one region."""

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
        """How a NIC reaches its memory."""

    @property
    def size(self) -> int:
        """Bytes in all."""

    @property
    def available(self) -> int:
        """Bytes not given out."""

    async def allocate(self, length: int) -> DeviceMemory:
        """Return zeroed memory of `length` bytes. Raises DeviceFull; NotSupported where the device only adopts."""

    async def adopt(self, fd: int, length: int) -> DeviceMemory:
        """Return memory made of a file descriptor that a job handed in; owns `fd` from then on, also
        when it raises. `length` 0 means all of it.

        Raises NotAdoptable, DeviceFull; NotSupported where the device only allocates.
        """

    async def close(self) -> None:
        """End the device; all its memory has been closed before."""
