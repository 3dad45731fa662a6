"""Memory that is registered with NICs: which, where, and under which local keys.

Rules of this file:

* Memory is registered in parts of at most PART bytes, with a turn of the loop after each: registering pins pages
  and holds the GIL. Pages that have yet to be made are made before, in a thread, which takes longer than pinning them.
* A registration gives no remote rights of its own. Grants give them, each to one link.
* A mapping is held until the last part is deregistered; who closes the memory before meets a BufferError. A dma-buf
  is held by the kernel for as long as one of its parts is registered.
* What the NIC or the kernel refuses is told with its reason (`verbs_refusals.py`).
"""

from __future__ import annotations

import asyncio
import ctypes
from collections.abc import Iterable, Sequence
from typing import Protocol, runtime_checkable

from peermem.core.errors import RegistrationRefused
from peermem.core.types import Path
from peermem.fabric import verbs
from peermem.fabric.verbs_nic import Nic, Port
from peermem.fabric.verbs_refusals import no_on_demand, refusal
from peermem.fabric.verbs_types import Access, VerbsError
from peermem.memory import Memory
from peermem.offload import in_thread

PART = 64 << 20
"""Bytes of one memory region of a NIC, at most."""
_NO_MORE = Access(0)


_LIBC = ctypes.CDLL(None)
_LIBC.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_MADV_POPULATE_WRITE = 23  # Linux 5.14, include/uapi/asm-generic/mman-common.h
_WORTH_A_THREAD = 1 << 20
"""Bytes: fewer pages are made in less than a millisecond."""


class Backing(Protocol):
    """Memory as the verbs take it, held until `close`."""

    @property
    def address(self) -> int:
        """Of its first byte, as the NIC is to count."""

    @property
    def dma_buf(self) -> tuple[int, int] | None:
        """The descriptor of the dma-buf that it is a range of, and where it begins there; no window can be bound to
        its registrations."""

    def register(self, domain: verbs.Domain, offset: int, length: int, access: Access) -> verbs.MemoryRegion:
        """Register a range. The caller closes it. Raises VerbsError."""

    def close(self) -> None:
        """Let go of the memory."""


class Addressed:
    """Memory at an address: of this process, or one that a vendor's kernel resolves."""

    dma_buf = None

    def __init__(self, address: int, access: Access = _NO_MORE, hold: object = None) -> None:
        """`access` is added to each registration; `hold` keeps the memory mapped."""
        self.address = address
        self._access = access
        self._hold = hold

    def register(self, domain: verbs.Domain, offset: int, length: int, access: Access) -> verbs.MemoryRegion:
        """See Backing."""
        return verbs.MemoryRegion(domain, self.address + offset, length, access | self._access)

    def close(self) -> None:
        """See Backing."""
        self._hold = None


class Imported:
    """Memory that is a range of a dma-buf, whose descriptor stays the memory's."""

    def __init__(self, dma_buf: tuple[int, int]) -> None:
        self.dma_buf = dma_buf
        self._fd, self.address = dma_buf

    def register(self, domain: verbs.Domain, offset: int, length: int, access: Access) -> verbs.MemoryRegion:
        """See Backing. What dma-bufs don't take is left out of `access`."""
        return verbs.DmaBufRegion(domain, self._fd, self.address + offset, length, access & ~Access.MW_BIND)

    def close(self) -> None:
        """See Backing."""


@runtime_checkable
class _HasDmaBuf(Protocol):
    def dma_buf(self) -> tuple[int, int] | None:
        """See DeviceMemory."""


@runtime_checkable
class _HasDeviceAddress(Protocol):
    @property
    def device_address(self) -> int | None:
        """See DeviceMemory."""


def backing(memory: Memory, path: Path) -> Backing:
    """Return memory as the verbs take it on this path. Raises RegistrationRefused where it is closed, or not of this
    path."""
    try:
        if path is Path.DMABUF:
            found = memory.dma_buf() if isinstance(memory, _HasDmaBuf) else None
            if found is None:
                raise ValueError("it has no dma-buf")
            return Imported(found)
        if path is Path.LEGACY_PEER_MEMORY:
            address = memory.device_address if isinstance(memory, _HasDeviceAddress) else None
            if address is None:
                raise ValueError("it has no device address")
            return Addressed(address)
        hold = (ctypes.c_char * memory.length).from_buffer(memory.view())
    except (ValueError, OSError) as error:
        raise RegistrationRefused(
            f"The memory can't be registered by path {path.value}: {error}.", path=path.value
        ) from error
    return Addressed(ctypes.addressof(hold), Access.ON_DEMAND if path is Path.P2PDMA else _NO_MORE, hold)


class Registration:
    """One memory with the NICs that reach it."""

    def __init__(self, memory: Memory, path: Path) -> None:
        """Raises RegistrationRefused where the memory is closed, or not of this path."""
        self.memory = memory
        self.path = path
        self.parts: dict[Nic, Sequence[verbs.MemoryRegion]] = {}
        """Consecutive, all but the last one of PART bytes."""
        self._backing = backing(memory, path)
        self.address = self._backing.address
        self.takes_windows = self._backing.dma_buf is None
        """Whether grants can be memory windows; else each is a registration in the link's own domain."""

    def tight(self, domain: verbs.Domain, offset: int, length: int, access: Access) -> verbs.MemoryRegion:
        """Register just a range, for a grant. The caller closes it. Raises VerbsError."""
        return self._backing.register(domain, offset, length, access)

    async def add(self, port: Port) -> None:
        """Register with a port's NIC. Raises as `Fabric.register`."""
        check(port, self.path)
        parts: list[verbs.MemoryRegion] = []
        self.parts[port.nic] = parts
        access = Access.LOCAL_WRITE
        if port.nic.caps.windows and self.takes_windows:
            access |= Access.MW_BIND
        for start in range(0, self.memory.length, PART):
            length = min(PART, self.memory.length - start)
            await self._populate(start, length)
            try:
                parts.append(self._backing.register(port.nic.domain, start, length, access))
            except VerbsError as error:
                raise refusal(error, port, self.memory.length, self.path, self._backing.dma_buf) from error
            await asyncio.sleep(0)

    async def _populate(self, start: int, length: int) -> None:
        """Make pages of host memory. Where it fails, they are made when they are pinned, or that says why not."""
        if self.path is Path.HOST and length >= _WORTH_A_THREAD:
            await in_thread(lambda: _LIBC.madvise(self.address + start, length, _MADV_POPULATE_WRITE))

    async def close(self) -> None:
        """Deregister everywhere, with turns of the loop. Raises VerbsError."""
        every, self.parts = self.parts, {}
        for parts in every.values():
            for part in parts:
                part.close()
                await asyncio.sleep(0)
        self._backing.close()


class MemoryTable:
    """All registered memory of a fabric."""

    def __init__(self) -> None:
        self._registrations: dict[int, Registration] = {}
        self.needs_domains = False
        """Whether memory without windows was ever registered: from then on accepted links have domains of their own."""

    def __len__(self) -> int:
        return len(self._registrations)

    def find(self, memory: Memory) -> Registration | None:
        """Return the registration of a memory."""
        return self._registrations.get(id(memory))

    async def register(self, memory: Memory, path: Path, ports: Iterable[Port]) -> None:
        """Register with these ports' NICs. Raises as `Fabric.register`, and has registered nothing then."""
        registration = Registration(memory, path)
        try:
            for port in ports:
                if port.nic not in registration.parts:
                    await registration.add(port)
        except BaseException:
            await registration.close()
            raise
        self._registrations[id(memory)] = registration
        self.needs_domains |= not registration.takes_windows

    async def unregister(self, memory: Memory) -> None:
        """Deregister; unknown memory is no error. Raises VerbsError."""
        registration = self._registrations.pop(id(memory), None)
        if registration is not None:
            await registration.close()

    async def close(self) -> None:
        """Deregister everything. Raises VerbsError."""
        for registration in list(self._registrations.values()):
            await self.unregister(registration.memory)


def check(port: Port, path: Path) -> None:
    """See that a port can register memory of this path. Raises OnDemandMissing, RegistrationRefused."""
    if path is Path.STAGED:
        raise RegistrationRefused(
            f"Memory of path {path.value} is reached by the CPU alone; its staging buffer is registered instead.",
            nic=port.name,
            path=path.value,
        )
    if path is Path.P2PDMA and not port.nic.caps.on_demand:
        raise no_on_demand(port)
