"""Makes regions: gets memory, has the fabrics know it, enters it in the table.

Rules of this file:

* A call that fails leaves nothing behind: no name reserved, no memory given out, nothing registered.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping

from peermem.broker.reach import Reach, Registry
from peermem.broker.regions import Region, RegionTable
from peermem.broker.sessions import Session, SessionTable
from peermem.core.errors import DeviceNotFound, NotSupported, SessionNotFound, ZeroLength
from peermem.core.failpoints import reach
from peermem.core.identity import Subject
from peermem.core.names import ChildName, check_id
from peermem.core.node import ADOPTED, ADOPTED_DMABUF
from peermem.core.region import Lease, RegionRequest
from peermem.core.types import LeaseKind
from peermem.device.base import AdoptsHandles, Device, DeviceMemory
from peermem.memory import dma_buf_exporter


class RegionMaker:
    """Makes the regions of one node."""

    def __init__(
        self,
        node: str,
        regions: RegionTable,
        sessions: SessionTable,
        devices: Mapping[str, Device],
        registry: Registry,
    ) -> None:
        self._node = node
        self._regions = regions
        self._sessions = sessions
        self._devices = devices
        self._registry = registry

    async def make(self, subject: Subject, session: Session | None, request: RegionRequest) -> Region:
        """Return a new region, in the table. Raises as RegionService.CreateRegion."""
        region_id = check_id(request.region_id, "region_id") if request.region_id else f"r-{secrets.token_hex(6)}"
        lease = request.lease or Lease(LeaseKind.SESSION if session else LeaseKind.NONE)
        if lease.kind is LeaseKind.SESSION and session is None:
            raise SessionNotFound("A lease of kind SESSION needs a call that carries a session of the attach socket.")
        self._regions.reserve(region_id)
        try:
            device, memory, reach = await self._reached(session, request)
        except BaseException:
            self._regions.release(region_id)
            raise
        tied = session.token if session is not None and lease.kind is LeaseKind.SESSION else ""
        name = ChildName(self._node, "regions", region_id)
        region = Region(name, device, memory, str(subject), request.labels, lease, tied, reach)
        self._regions.add(region)
        return region

    async def _reached(self, session: Session | None, request: RegionRequest) -> tuple[Device, DeviceMemory, Reach]:
        await reach("region.allocate")
        device, memory = await self._memory(session, request)
        try:
            await reach("region.register")
            return device, memory, await self._registry.register(device, memory)
        except BaseException:
            memory.close()
            raise

    async def _memory(self, session: Session | None, request: RegionRequest) -> tuple[Device, DeviceMemory]:
        if request.adopted:
            if session is None:
                raise SessionNotFound(
                    "A file descriptor can be adopted only by a call of the session that handed it in."
                )
            fd = self._sessions.take(session, request.adopted)
            device = self._devices[ADOPTED_DMABUF if dma_buf_exporter(fd) else ADOPTED]
            return device, await device.adopt(fd, request.length)
        if request.device not in self._devices:
            names = ", ".join(sorted(self._devices)) or "none"
            raise DeviceNotFound(
                f"nodes/{self._node} has no device {request.device[:80]!r}; it has {names}.",
                device=request.device[:80],
            )
        device = self._devices[request.device]
        if request.handle:
            return device, await _adopted(session, device, request)
        if request.length == 0:
            raise ZeroLength("A region needs a length of at least 1 byte.")
        if device.name != ADOPTED_DMABUF:
            await self._registry.prepare(device)
        return device, await device.allocate(request.length)


async def _adopted(session: Session | None, device: Device, request: RegionRequest) -> DeviceMemory:
    """Return memory made of what a job has on a GPU."""
    if session is None:
        raise SessionNotFound("Memory of a GPU can be adopted only by a call of a session of the attach socket.")
    if not isinstance(device, AdoptsHandles):
        raise NotSupported(f"Device {device.name} is no GPU, and adopts nothing by a handle.", device=device.name)
    return await device.adopt_handle(request.handle, request.offset, request.length)
