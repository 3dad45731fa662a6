"""Memory that is registered with NICs: which, where, and under which local keys.

Rules of this file:

* Memory is registered in parts of at most PART bytes, with a turn of the loop after each: registering pins pages
  and holds the GIL. Pages that have yet to be made are made before, in a thread, which takes longer than pinning them.
* A registration gives no remote rights of its own. Grants give them, each to one link.
* The mapping is held until the last part is deregistered; who closes the memory before meets a BufferError.
"""

from __future__ import annotations

import asyncio
import ctypes
import errno
import resource
from collections.abc import Iterable, Sequence

from peermem.core.errors import MemlockTooSmall, NicNotFound, OnDemandMissing, PeermemError, RegistrationRefused
from peermem.core.types import Path
from peermem.core.units import format_size
from peermem.fabric import verbs
from peermem.fabric.verbs_nic import Nic, Port
from peermem.fabric.verbs_types import Access, VerbsError
from peermem.memory import Memory
from peermem.offload import in_thread

PART = 64 << 20
"""Bytes of one memory region of a NIC, at most."""


_LIBC = ctypes.CDLL(None)
_LIBC.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_MADV_POPULATE_WRITE = 23  # Linux 5.14, include/uapi/asm-generic/mman-common.h
_WORTH_A_THREAD = 1 << 20
"""Bytes: fewer pages are made in less than a millisecond."""


class Mapping:
    """A memory's address, held until `close`."""

    def __init__(self, memory: Memory) -> None:
        """Raises RegistrationRefused where the memory is closed."""
        try:
            view = memory.view()
            self._hold: ctypes.Array[ctypes.c_char] | None = (ctypes.c_char * memory.length).from_buffer(view)
        except (ValueError, OSError) as error:
            raise RegistrationRefused(f"The memory can't be mapped to be registered: {error}.") from error
        self.address = ctypes.addressof(self._hold)

    def close(self) -> None:
        """Let go of it."""
        self._hold = None


class Registration:
    """One memory with the NICs that reach it."""

    def __init__(self, memory: Memory, path: Path) -> None:
        """Raises RegistrationRefused where the memory is closed."""
        self.memory = memory
        self.path = path
        self.parts: dict[Nic, Sequence[verbs.MemoryRegion]] = {}
        """Consecutive, all but the last one of PART bytes."""
        self._mapping = Mapping(memory)
        self.address = self._mapping.address

    def tight(self, domain: verbs.Domain, offset: int, length: int, access: Access) -> verbs.MemoryRegion:
        """Register just a range, for a grant. The caller closes it. Raises VerbsError."""
        return verbs.MemoryRegion(domain, self.address + offset, length, access | access_for(self.path))

    async def add(self, port: Port) -> None:
        """Register with a port's NIC. Raises as `Fabric.register`."""
        check(port, self.memory, self.path)
        parts: list[verbs.MemoryRegion] = []
        self.parts[port.nic] = parts
        access = Access.LOCAL_WRITE | access_for(self.path)
        if port.nic.caps.windows:
            access |= Access.MW_BIND
        for start in range(0, self.memory.length, PART):
            length = min(PART, self.memory.length - start)
            await self._populate(start, length)
            try:
                parts.append(verbs.MemoryRegion(port.nic.domain, self.address + start, length, access))
            except VerbsError as error:
                raise refusal(error, port, self.memory, self.path) from error
            await asyncio.sleep(0)

    async def _populate(self, start: int, length: int) -> None:
        """Make pages of host memory. Where it fails, they are made when they are pinned, or that says why not."""
        if self.path is Path.HOST and length >= _WORTH_A_THREAD:
            await in_thread(lambda: _LIBC.madvise(self.address + start, length, _MADV_POPULATE_WRITE))

    async def close(self) -> None:
        """Deregister everywhere, with turns of the loop. Raises VerbsError."""
        every, self.parts = self.parts, {}
        try:
            for parts in every.values():
                for part in parts:
                    part.close()
                    await asyncio.sleep(0)
        except VerbsError:
            self.parts = every  # to be tried again
            raise
        self._mapping.close()


class MemoryTable:
    """All registered memory of a fabric."""

    def __init__(self) -> None:
        self._registrations: dict[int, Registration] = {}

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

    async def unregister(self, memory: Memory) -> None:
        """Deregister; unknown memory is no error. Raises VerbsError."""
        registration = self._registrations.pop(id(memory), None)
        if registration is not None:
            await registration.close()

    async def close(self) -> None:
        """Deregister everything. Raises VerbsError."""
        for registration in list(self._registrations.values()):
            await self.unregister(registration.memory)


def access_for(path: Path) -> Access:
    """Return what a path adds to the access of a registration."""
    return Access.ON_DEMAND if path is Path.P2PDMA else Access(0)


def check(port: Port, memory: Memory, path: Path) -> None:
    """See that a port can register memory of this path. Raises OnDemandMissing, RegistrationRefused."""
    if path not in (Path.HOST, Path.P2PDMA):
        raise RegistrationRefused(
            f"Memory of path {path.value} is not registered with NICs by this release.", nic=port.name, path=path.value
        )
    if path is Path.P2PDMA and not port.nic.caps.on_demand:
        raise _no_on_demand(port)


def refusal(error: VerbsError, port: Port, memory: Memory, path: Path) -> PeermemError:
    """Return the reason for which a registration failed."""
    if error.errno in (errno.ENOMEM, errno.EPERM):
        limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
        allowed = "no limit" if limit == resource.RLIM_INFINITY else format_size(limit)
        return MemlockTooSmall(
            f"The NIC {port.name} needs to lock {format_size(memory.length)} more, and the daemon may lock {allowed} "
            "in all. Set LimitMEMLOCK=infinity in its unit (ulimit -l unlimited), or give it CAP_IPC_LOCK.",
            nic=port.name,
            need=memory.length,
            limit=limit,
        )
    if error.errno == errno.EOPNOTSUPP and path is Path.P2PDMA:
        return _no_on_demand(port)
    if error.errno == errno.ENODEV:
        return NicNotFound(f"The NIC {port.name} is gone: {error}.", nic=port.name)
    return RegistrationRefused(
        f"The kernel or the NIC {port.name} refused to register {format_size(memory.length)} of path {path.value}: "
        f"{error}. Mappings of a PCI BAR without struct pages can't be registered; use path STAGED for them.",
        nic=port.name,
        errno=error.errno,
    )


def _no_on_demand(port: Port) -> OnDemandMissing:
    return OnDemandMissing(
        f"The NIC {port.name} can't register memory on demand, which is the only way to reach p2pmem. Use a NIC and a "
        "kernel that can (mlx5 since Linux 6.16, rxe since 6.15), or path STAGED.",
        nic=port.name,
    )
