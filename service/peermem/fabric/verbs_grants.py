"""Grants of the verbs fabric: what opens local memory to one accepted link.

Rules of this file:

* A grant is, for each rail and each part of the memory, one fresh memory window bound to the rail's queue pair, with
  exactly the right that was granted, in the protection domain of the link's subject; or, where the NIC or the memory (a
  dma-buf) has no windows, a registration in a domain of the rail's own. Either way the key is of no use to any other
  link.
* A key opens the granted range and no byte more. A software NIC checks a window's queue pair and right, but not its
  range; there, a range that is not a whole part is registered for itself first.
* A grant is closed in two steps: `shut`, after which no new access begins, and `close`, when none is running.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field

from peermem.core.types import KeyPart, RemoteKey, Rights
from peermem.fabric import verbs
from peermem.fabric.verbs_memory import PART, Registration
from peermem.fabric.verbs_rail import Rail
from peermem.fabric.verbs_types import Access, WcStatus
from peermem.memory import Memory

_BIND_TIME = 2.0
"""Seconds that a bind may take."""


@dataclass(slots=True, eq=False)
class Grant:
    """What one remote key stands for."""

    link_id: bytes = field(repr=False)
    memory: Memory
    expires_at: float
    """By the fabric's clock."""
    key: RemoteKey = field(repr=False)
    doors: Sequence[Door] = ()
    """One for each rail that reaches the memory."""


class Door:
    """A grant's windows or registrations on one rail."""

    def __init__(self, rail: Rail) -> None:
        self.rail = rail
        self.parts: list[KeyPart] = []
        self._windows: list[verbs.Window] = []
        self._regions: list[verbs.MemoryRegion] = []

    async def open(self, registration: Registration, offset: int, length: int, rights: Rights) -> bool:
        """Open a range, which is registered in the rail's domain unless that is apart. Return False when the rail
        broke.

        Raises VerbsError; the caller closes it then, too.
        """
        access, domain = _access(rights), self.rail.domain
        for index in range(offset // PART, -(-(offset + length) // PART)):
            if not self.rail.up:  # its link may be closed by now, and have closed this door as well
                return False
            start, end = max(offset, index * PART), min(offset + length, (index + 1) * PART)
            if domain.is_apart:
                region = registration.tight(domain, start, end - start, access | Access.LOCAL_WRITE)
                self._regions.append(region)
                rkey = region.rkey
                await asyncio.sleep(0)
            else:
                window = await self._bind(registration, index, start, end - start, access)
                if window is None:
                    return False
                rkey = window.rkey
            self.parts.append(KeyPart(rkey, registration.address + start, end - start))
        return True

    def _region(self, registration: Registration, index: int, start: int, length: int) -> verbs.MemoryRegion:
        """Return a memory region that a window of this range can be bound to. Raises VerbsError."""
        domain = self.rail.domain
        whole = registration.part(domain, index)
        if length == whole.length or self.rail.port.nic.caps.window_ranges:
            return whole
        region = registration.tight(domain, start, length, Access.LOCAL_WRITE | Access.MW_BIND)
        self._regions.append(region)
        return region

    async def _bind(
        self, registration: Registration, index: int, start: int, length: int, access: Access
    ) -> verbs.Window | None:
        rail = self.rail
        if not rail.free:
            return None
        region = self._region(registration, index, start, length)
        window = verbs.Window(rail.domain)
        self._windows.append(window)
        bound: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        address = registration.address + start
        rail.bind(
            window, region, address, length, access, lambda status: None if bound.done() else bound.set_result(status)
        )
        async with asyncio.timeout(_BIND_TIME):
            return window if await bound == WcStatus.SUCCESS else None

    def shut(self) -> None:
        """Let no new access begin. Raises VerbsError."""
        while self._windows:
            self._windows.pop().close()

    def close(self) -> None:
        """Give everything back; a running access to a registration of the grant's own is waited for.

        Raises VerbsError.
        """
        self.shut()
        while self._regions:
            self._regions.pop().close()


def _access(rights: Rights) -> Access:
    access = Access(0)
    if Rights.READ in rights:
        access |= Access.REMOTE_READ
    if Rights.WRITE in rights:
        access |= Access.REMOTE_WRITE
    return access
