"""The table of this node's regions: who owns each, what keeps it alive, and how it ends.

Rules of this file:

* A region ends in one order: no new work (DRAINING), its transfers fail and are fenced, its grants are
  revoked, its memory is unregistered and closed, its name is free again.
* Every region has an end: by hand, by its session, by its time to live, or with the daemon.
* A region whose device vanished is REVOKED and gives its memory back at once, which the kernel waits for; it stays
  in the table to say so until it is ended.
* Ending a region twice waits for the same end.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Awaitable, Callable, Collection, Iterator, Mapping
from typing import Protocol

import structlog

from peermem.broker.kernel_copier import KernelCopier
from peermem.broker.reach import Reach
from peermem.core.errors import LimitReached, PeermemError, RegionDeleted, RegionExists, RegionNotFound, RegionRevoked
from peermem.core.failpoints import chosen, reach
from peermem.core.names import ChildName
from peermem.core.origin import NOWHERE, Origin
from peermem.core.region import TRANSITIONS, Event, Lease, PublishedRegion, RegionFacts, State
from peermem.core.types import FabricKind, LeaseKind, Path
from peermem.device.base import Copier, Device, DeviceMemory
from peermem.offload import in_thread
from peermem.telemetry.metrics import LeaseEnd, Metrics

log = structlog.get_logger(__name__)

_SMALL = 64 << 10
"""Bytes up to which memory is freed on the loop: microseconds."""
_AT_ONCE = 64
"""Regions of a session that end in one turn of the loop."""


class RegionUser(Protocol):
    """Something that touches a region's memory: a running transfer or a stream of bytes."""

    def fail(self, error: PeermemError) -> None:
        """Stop for this reason."""

    async def settled(self) -> None:
        """Wait until it touches the memory no more."""


class Region:
    """One region of this node."""

    def __init__(
        self,
        name: ChildName,
        device: Device,
        memory: DeviceMemory,
        owner: str,
        labels: Mapping[str, str],
        lease: Lease,
        session: str,
        reach: Reach,
        origin: Origin = NOWHERE,
    ) -> None:
        """`session` is the token of the session that the region's lease is tied to, or empty; `origin` tells which job
        made it."""
        self.name = name
        self.reach = reach
        self.uid = secrets.randbits(64)
        """Another one for each region, also of the same name."""
        self.device = device
        self.memory = memory
        self._copier: Copier | None = None
        self.owner = owner
        self.labels = labels
        self.lease = lease
        self.session = session
        self.origin = origin
        self.state = State.READY
        self.created_at = time.time()
        self.expires_at: float | None = None
        self.users: set[RegionUser] = set()
        self.timer: asyncio.TimerHandle | None = None
        self.end: asyncio.Task[None] | None = None
        self.published = False
        """Whether the directory tells of it."""
        self.is_out_of_reach = False
        """Whether a NIC of this node could not access it although it had been registered: all that tells of a dma-buf
        that its exporter has taken back (Linux 7.3)."""
        self.on_gone: Callable[[], None] = lambda: None
        """Called once, when nothing holds its memory any more."""

    def advance(self, event: Event) -> None:
        """Follow the table of the core; an absent pair is a defect."""
        self.state = TRANSITIONS[self.state, event]

    def check_usable(self) -> None:
        """Raise RegionDeleted or RegionRevoked unless transfers may use the region."""
        if self.state is State.REVOKED:
            raise RegionRevoked(f"{self.name}: device {self.device.name} took its memory back.", region=self.name)
        if self.state is not State.READY:
            raise RegionDeleted(f"{self.name} is being deleted.", region=self.name)

    @property
    def path(self) -> Path:
        """How NICs reach it."""
        return self.reach.way.path

    @property
    def copier(self) -> Copier:
        """What copies between it and staging buffers."""
        if self._copier is None:
            self._copier = self.memory.copier or KernelCopier(self.memory)
        return self._copier

    @property
    def fabrics(self) -> Collection[FabricKind]:
        """What can move its bytes."""
        return self.reach.fabrics

    @property
    def why(self) -> str:
        """Why these NICs, or why none."""
        return self.reach.way.why

    @property
    def facts(self) -> RegionFacts:
        """The region as told to callers."""
        return RegionFacts(
            name=self.name,
            length=self.memory.length,
            device=self.device.name,
            owner=self.owner,
            labels=self.labels,
            lease=self.lease,
            expires_at=self.expires_at,
            path=self.path,
            state=self.state,
            created_at=self.created_at,
            nics=tuple(self.reach.way.nics),
            why=self.why,
            origin=self.origin,
            published=self.published,
        )

    @property
    def told(self) -> PublishedRegion:
        """The region as the directory tells of it."""
        return PublishedRegion(self.name, self.memory.length, self.device.kind, self.path, self.labels)


def region_not_found(name: ChildName, node: str) -> RegionNotFound:
    """Return what is told of a region that is not on a node, or that the caller may not see."""
    return RegionNotFound(f"{name} does not exist on nodes/{node}.", region=name)


class RegionTable:
    """All regions of this node by the last part of their names."""

    def __init__(self, node: str, limit: int, let_go: Callable[[Region], Awaitable[None]], metrics: Metrics) -> None:
        """`let_go` ends all grants on a region and has the fabrics forget its memory: no access runs any more."""
        self._node = node
        self._limit = limit
        self._let_go = let_go
        self._metrics = metrics
        self._regions: dict[str, Region] = {}
        self._reserved: set[str] = set()
        self._by_session: dict[str, set[Region]] = {}

    def __len__(self) -> int:
        return len(self._regions)

    def __iter__(self) -> Iterator[Region]:
        return iter(self._regions.values())

    def reserve(self, region_id: str) -> None:
        """Keep a name for `add`. Raises RegionExists, LimitReached."""
        if region_id in self._regions or region_id in self._reserved:
            name = ChildName(self._node, "regions", region_id)
            raise RegionExists(f"{name} exists already. Delete it or choose another name.", region=name)
        if len(self._regions) + len(self._reserved) >= self._limit:
            raise LimitReached(
                f"nodes/{self._node} holds {self._limit} regions, its limit. Delete some or raise region.max_regions.",
                limit=self._limit,
            )
        self._reserved.add(region_id)

    def release(self, region_id: str) -> None:
        """Give up a reserved name."""
        self._reserved.discard(region_id)

    def add(self, region: Region) -> None:
        """Enter a region under its reserved name and start its lease."""
        self._reserved.discard(region.name.id)
        self._regions[region.name.id] = region
        if region.lease.kind is LeaseKind.SESSION:
            self._by_session.setdefault(region.session, set()).add(region)
        if region.lease.kind is LeaseKind.TTL:
            self.renew(region)

    def find(self, name: ChildName) -> Region:
        """Return a region in whatever state. Raises RegionNotFound."""
        region = self._regions.get(name.id)
        if region is None or name.node != self._node:
            raise region_not_found(name, self._node)
        return region

    def page(
        self, after: str, size: int, labels: Mapping[str, str], seen: Callable[[Region], bool] = lambda region: True
    ) -> list[Region]:
        """Return up to `size` regions behind the id `after`, in order, that carry all `labels` and are `seen`."""
        wanted = labels.items()
        ids = sorted(key for key in self._regions if key > after)
        found = (self._regions[key] for key in ids if wanted <= self._regions[key].labels.items())
        return [region for region, _ in zip(filter(seen, found), range(size), strict=False)]

    def vanished(self) -> list[Region]:
        """Return the regions whose device or memory is not there any more."""
        lost = {name for name, device in self._devices().items() if not device.alive() or chosen("device.lost")}
        return [
            region
            for region in self
            if region.device.name in lost or not region.memory.alive() or region.is_out_of_reach
        ]

    def _devices(self) -> dict[str, Device]:
        return {region.device.name: region.device for region in self}

    def renew(self, region: Region) -> None:
        """Move the end of a TTL lease to its time to live from now."""
        if region.timer is not None:
            region.timer.cancel()
        region.timer = asyncio.get_running_loop().call_later(region.lease.ttl, self._expire, region)
        region.expires_at = time.time() + region.lease.ttl

    def _expire(self, region: Region) -> None:
        self._metrics.lease_ended(LeaseEnd.TTL)
        error = RegionDeleted(f"{region.name} was not renewed within its lease.", region=region.name)
        self.start_end(region, error)

    def start_end(self, region: Region, error: PeermemError) -> asyncio.Task[None]:
        """Begin to end a region for this reason; the task is done when it is gone."""
        if region.end is None:
            if region.state is not State.DRAINING:
                region.advance(Event.DELETE)
            region.end = asyncio.get_running_loop().create_task(self._end(region, error))
        return region.end

    async def end_session(self, session: str) -> None:
        """End all regions that only this session held."""
        held = list(self._by_session.pop(session, ()))
        for some in range(0, len(held), _AT_ONCE):
            ends = []
            for region in held[some : some + _AT_ONCE]:
                self._metrics.lease_ended(LeaseEnd.CLIENT_EXIT)
                error = RegionDeleted(f"{region.name} ended with the job that made it.", region=region.name)
                ends.append(self.start_end(region, error))
            await asyncio.gather(*ends, return_exceptions=True)

    async def revoke(self, region: Region) -> None:
        """Take note that a region's device vanished: its transfers fail, its memory is given back."""
        if region.state is not State.READY:
            return
        region.advance(Event.REVOKE)
        error = RegionRevoked(f"{region.name}: device {region.device.name} took its memory back.", region=region.name)
        log.warning("region_revoked", region=str(region.name), device=region.device.name)
        await self._take_back(region, error)

    async def close(self, error: PeermemError) -> None:
        """End all regions."""
        ends = [self.start_end(region, error) for region in list(self._regions.values())]
        await asyncio.gather(*ends, return_exceptions=True)

    async def _end(self, region: Region, error: PeermemError) -> None:
        try:
            await self._end_in_order(region, error)
        except BaseException:
            region.end = None  # the next deletion tries again
            log.exception("region_end_defect", region=str(region.name))
            raise

    async def _end_in_order(self, region: Region, error: PeermemError) -> None:
        if region.timer is not None:
            region.timer.cancel()
        await self._take_back(region, error)
        region.advance(Event.DRAINED)
        del self._regions[region.name.id]
        region.on_gone()
        if region.session:
            self._by_session.get(region.session, set()).discard(region)

    async def _take_back(self, region: Region, error: PeermemError) -> None:
        """Give a region's memory back, once nothing uses it. Doing so twice, or at the same time, does no harm."""
        await reach("region.end")
        for user in list(region.users):
            user.fail(error)
        while region.users:
            await asyncio.gather(*(user.settled() for user in list(region.users)))
        await reach("region.let_go")
        await self._let_go(region)
        await reach("region.close")
        if region.memory.length > _SMALL:
            await in_thread(region.memory.close)  # the kernel frees about 10 GiB a second
        else:
            region.memory.close()
