"""Makes regions: gets memory, has the fabrics know it, enters it in the table.

Rules of this file:

* The policy and the tenant's limits are asked before a name is looked up: whoever may make nothing learns nothing.
* A call that fails leaves nothing behind: no name reserved, no memory given out, nothing registered, nothing counted.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from functools import partial

from peermem.broker.guard import Guard
from peermem.broker.reach import Reach, Registry
from peermem.broker.regions import Region, RegionTable
from peermem.broker.sessions import Session, SessionTable
from peermem.broker.tenants import Tenants
from peermem.core.errors import DeviceNotFound, NotSupported, SessionNotFound, ZeroLength
from peermem.core.failpoints import reach
from peermem.core.identity import Subject
from peermem.core.names import ChildName, check_id
from peermem.core.node import ADOPTED, ADOPTED_DMABUF
from peermem.core.origin import NOWHERE
from peermem.core.quota import Hold, Resource
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
        policy: Guard,
        tenants: Tenants,
    ) -> None:
        self._node = node
        self._regions = regions
        self._sessions = sessions
        self._devices = devices
        self._registry = registry
        self._policy = policy
        self._tenants = tenants

    async def make(self, subject: Subject, session: Session | None, request: RegionRequest) -> Region:
        """Return a new region, in the table. Raises as RegionService.CreateRegion."""
        region_id = check_id(request.region_id, "region_id") if request.region_id else f"r-{secrets.token_hex(6)}"
        lease = request.lease or Lease(LeaseKind.SESSION if session else LeaseKind.NONE)
        if lease.kind is LeaseKind.SESSION and session is None:
            raise SessionNotFound("A lease of kind SESSION needs a call that carries a session of the attach socket.")
        device = self._device(session, request)
        self._policy.check_creation(subject, device.name, request)
        hold = self._tenants.hold(subject, {Resource.REGIONS: 1, Resource.BYTES: request.length})
        try:
            self._regions.reserve(region_id)
            try:
                memory, reach = await self._reached(session, request, device, hold)
            except BaseException:
                self._regions.release(region_id)
                raise
        except BaseException:
            self._tenants.release(hold)
            raise
        tied = session.token if session is not None and lease.kind is LeaseKind.SESSION else ""
        name = ChildName(self._node, "regions", region_id)
        origin = session.origin if session is not None else NOWHERE
        region = Region(name, device, memory, str(subject), request.labels, lease, tied, reach, origin)
        region.on_gone = partial(self._tenants.release, hold)
        self._regions.add(region)
        return region

    async def _reached(
        self, session: Session | None, request: RegionRequest, device: Device, hold: Hold
    ) -> tuple[DeviceMemory, Reach]:
        await reach("region.allocate")
        memory = await self._memory(session, request, device)
        try:
            if memory.length > request.length:  # all of what was handed in, whose length is known only now
                self._tenants.grow(hold, {Resource.BYTES: memory.length - request.length})
            await reach("region.register")
            return memory, await self._registry.register(device, memory, hold.subject.named_by(self._node))
        except BaseException:
            memory.close()
            raise

    def _device(self, session: Session | None, request: RegionRequest) -> Device:
        """Return the device that a region will be on. Raises SessionNotFound, DeviceNotFound."""
        if request.adopted:
            if session is None:
                raise SessionNotFound(
                    "A file descriptor can be adopted only by a call of the session that handed it in."
                )
            fd = self._sessions.handed_in(session, request.adopted)
            return self._devices[ADOPTED_DMABUF if dma_buf_exporter(fd) else ADOPTED]
        if request.device not in self._devices:
            names = ", ".join(sorted(self._devices)) or "none"
            raise DeviceNotFound(
                f"nodes/{self._node} has no device {request.device[:80]!r}; it has {names}.",
                device=request.device[:80],
            )
        return self._devices[request.device]

    async def _memory(self, session: Session | None, request: RegionRequest, device: Device) -> DeviceMemory:
        if request.adopted and session is not None:
            return await device.adopt(self._sessions.take(session, request.adopted), request.length)
        if request.handle:
            return await _adopted(session, device, request)
        if request.length == 0:
            raise ZeroLength("A region needs a length of at least 1 byte.")
        if device.name != ADOPTED_DMABUF:
            await self._registry.prepare(device)
        return await device.allocate(request.length)


async def _adopted(session: Session | None, device: Device, request: RegionRequest) -> DeviceMemory:
    """Return memory made of what a job has on a GPU."""
    if session is None:
        raise SessionNotFound("Memory of a GPU can be adopted only by a call of a session of the attach socket.")
    if not isinstance(device, AdoptsHandles):
        raise NotSupported(f"Device {device.name} is no GPU, and adopts nothing by a handle.", device=device.name)
    return await device.adopt_handle(request.handle, request.offset, request.length)
