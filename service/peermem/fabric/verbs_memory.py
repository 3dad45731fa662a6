"""Memory that is registered with NICs: which, where, in whose protection domains, and under which local keys.

Rules of this file:

* Memory is registered in parts of at most PART bytes, with a turn of the loop after each: registering pins pages
  and holds the GIL. Pages that have yet to be made are made before, in a thread, which takes longer than pinning them.
* Memory is registered for its owner as a whole, and stays so. For another subject it is registered when that one first
  needs it, as far as it does, in its own domain, with which it goes.
* A registration gives no remote rights of its own. Grants give them, each to one link.
* A mapping is held until the last part is deregistered; who closes the memory before meets a BufferError. A dma-buf
  is held by the kernel for as long as one of its parts is registered.
* What the NIC or the kernel refuses is told with its reason (`verbs_refusals.py`).
"""

from __future__ import annotations

import asyncio
import ctypes
import errno
from collections.abc import Iterable
from typing import Protocol, runtime_checkable

from peermem.core.errors import FabricUnavailable, PeermemError, RegionRevoked, RegistrationRefused
from peermem.core.types import Path, Ranges
from peermem.fabric import verbs
from peermem.fabric.verbs_domains import HeldDomain
from peermem.fabric.verbs_nic import Nic, Port
from peermem.fabric.verbs_rail import Rail
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


class Parts:
    """What of a memory is registered in one domain, in parts of PART bytes."""

    def __init__(self, length: int) -> None:
        count = -(-length // PART)
        self.regions: list[verbs.MemoryRegion | None] = [None] * count
        self.lkeys = [0] * count
        """Their keys; of no use where there is no region."""
        self._missing = count

    def add(self, index: int, region: verbs.MemoryRegion) -> None:
        """A part is registered."""
        self.regions[index], self.lkeys[index] = region, region.lkey
        self._missing -= 1

    def holds_all(self, ranges: Ranges) -> bool:
        """Whether all of the local ranges, which are inside, is registered."""
        return not self._missing or all(map(self.holds, ranges.local, ranges.lengths))

    def holds(self, offset: int, length: int) -> bool:
        """Whether all of a range is registered."""
        return not self._missing or None not in self.regions[offset // PART : -(-(offset + length) // PART)]


class Registration:
    """One memory with the NICs that reach it; a `Tenancy`."""

    def __init__(self, memory: Memory, path: Path) -> None:
        """Raises RegistrationRefused where the memory is closed, or not of this path."""
        self.memory = memory
        self.path = path
        self.ports: dict[Nic, Port] = {}
        """The NICs that reach it, each with a port of it."""
        self.is_closed = False
        """Whether it is used no more."""
        self._parts: dict[HeldDomain, Parts] = {}
        self._owners: list[HeldDomain] = []
        """The domains of whose memory it is; they stay with it."""
        self._lock = asyncio.Lock()
        """For who registers or deregisters parts."""
        self._backing = backing(memory, path)
        self.address = self._backing.address
        self.takes_windows = self._backing.dma_buf is None
        """Whether grants can be memory windows; else each is a registration in a domain of the rail's own."""

    def parts(self, domain: HeldDomain) -> Parts | None:
        """Return what is registered in a domain, and comes to be later; None where nothing ever was."""
        return self._parts.get(domain)

    def part(self, domain: HeldDomain, index: int) -> verbs.MemoryRegion:
        """Return a part that is registered in a domain. Raises VerbsError where it is not (any more)."""
        parts = self._parts.get(domain)
        region = parts.regions[index] if parts is not None else None
        if region is None:
            raise VerbsError("the memory is not registered for the link", errno.ENOENT)
        return region

    def tight(self, domain: verbs.Domain, offset: int, length: int, access: Access) -> verbs.MemoryRegion:
        """Register just a range, for a grant. The caller closes it. Raises VerbsError."""
        return self._backing.register(domain, offset, length, access)

    async def add(self, port: Port, subject: str) -> None:
        """Register all of it with a port's NIC, for its owner. Raises as `Fabric.register`."""
        check(port, self.path)
        try:
            domain = port.nic.domains.of(subject)
        except VerbsError as error:
            raise RegistrationRefused(
                f"The NIC {port.name} has no protection domain for memory: {error}.", nic=port.name
            ) from error
        self._owners.append(domain)
        self.ports[port.nic] = port
        await self._extend(port, domain, 0, self.memory.length)

    async def extend(self, rail: Rail, offset: int, length: int) -> None:
        """Have a range registered in a rail's domain, too, unless that ends or the memory is unregistered meanwhile.

        Raises FabricUnavailable, RegionRevoked.
        """
        parts = self._parts.get(rail.domain)
        if rail.is_lost or (parts is not None and parts.holds(offset, length)):
            return
        try:
            await self._extend(rail.port, rail.domain, offset, length)
        except RegionRevoked:
            raise
        except PeermemError as error:
            raise FabricUnavailable(
                f"The memory can't be registered for one more subject: {error.message} Until then use tcp for it.",
                cause=error.reason,
                **error.metadata,
            ) from error

    async def _extend(self, port: Port, domain: HeldDomain, offset: int, length: int) -> None:
        async with self._lock:
            for index in range(offset // PART, -(-(offset + length) // PART)):
                if self.is_closed or domain.is_ending:
                    return
                parts = self._parts.get(domain)
                if parts is None:
                    parts = self._parts[domain] = Parts(self.memory.length)
                    domain.tenancies[self] = None
                if parts.regions[index] is None:
                    parts.add(index, await self._register(port, domain, index))
                    await asyncio.sleep(0)

    async def _register(self, port: Port, domain: HeldDomain, index: int) -> verbs.MemoryRegion:
        start = index * PART
        length = min(PART, self.memory.length - start)
        access = Access.LOCAL_WRITE
        if port.nic.caps.windows and self.takes_windows:
            access |= Access.MW_BIND
        await self._populate(start, length)
        try:
            return self._backing.register(domain, start, length, access)
        except VerbsError as error:
            raise refusal(error, port, self.memory.length, self.path, self._backing.dma_buf) from error

    async def _populate(self, start: int, length: int) -> None:
        """Make pages of host memory. Where it fails, they are made when they are pinned, or that says why not."""
        if self.path is Path.HOST and length >= _WORTH_A_THREAD:
            await in_thread(lambda: _LIBC.madvise(self.address + start, length, _MADV_POPULATE_WRITE))

    async def leave(self, domain: HeldDomain) -> None:
        """See Tenancy."""
        async with self._lock:
            await self._deregister(domain)

    async def close(self) -> None:
        """Deregister everywhere, with turns of the loop. Raises VerbsError."""
        self.is_closed = True
        async with self._lock:
            for domain in list(self._parts):
                await self._deregister(domain)
        owners, self._owners = self._owners, []
        for domain in owners:
            domain.release()
        self._backing.close()

    async def _deregister(self, domain: HeldDomain) -> None:
        parts = self._parts.get(domain)
        if parts is not None:
            for index, region in enumerate(parts.regions):
                if region is not None:
                    region.close()
                    parts.regions[index] = None
                    await asyncio.sleep(0)
            del self._parts[domain]
        domain.tenancies.pop(self, None)


class MemoryTable:
    """All registered memory of a fabric."""

    def __init__(self) -> None:
        self._registrations: dict[int, Registration] = {}
        self.needs_domains = False
        """Whether memory without windows was ever registered: from then on accepted rails have domains of their own."""

    def __len__(self) -> int:
        return len(self._registrations)

    def find(self, memory: Memory) -> Registration | None:
        """Return the registration of a memory."""
        return self._registrations.get(id(memory))

    async def register(self, memory: Memory, path: Path, ports: Iterable[Port], subject: str = "") -> None:
        """Register with these ports' NICs, for `subject`, whose memory it is. Raises as `Fabric.register`, and has
        registered nothing then."""
        registration = Registration(memory, path)
        try:
            for port in ports:
                if port.nic not in registration.ports:
                    await registration.add(port, subject)
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
