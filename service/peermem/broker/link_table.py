"""All links of this node as initiator: opened on demand, shared by transfers, closed when idle.

Rules of this file:

* One link per remote node and fabric. One that goes down is forgotten, and opened anew on the next use, also by the
  transfers that it carried.
* A fabric that did not reach a node or a region is passed over for a while, longer each time it fails again.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from peermem.broker.links import Clock, OutboundLink
from peermem.broker.settings import Settings
from peermem.core.errors import PeermemError
from peermem.core.names import ChildName
from peermem.core.types import FabricKind
from peermem.fabric.base import Fabric
from peermem.remote.base import GrantSource
from peermem.telemetry.faults import Broken, FaultMetrics

_SHORTEST, _LONGEST = 1.0, 30.0
"""Seconds that a fabric is passed over after it failed once, and at most."""
_MAX_DETOURS = 4096


@dataclass(slots=True)
class _Detour:
    error: PeermemError
    pause: float
    until: float


class Detours:
    """Which fabrics did not reach which region lately."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._detours: dict[tuple[ChildName, FabricKind], _Detour] = {}

    def why(self, region: ChildName, kind: FabricKind) -> PeermemError | None:
        """Return why a fabric is passed over for a region now, or None."""
        detour = self._detours.get((region, kind))
        return detour.error if detour is not None and self._clock() < detour.until else None

    def failed(self, region: ChildName, kind: FabricKind, error: PeermemError) -> None:
        """A fabric did not reach a region."""
        before = self._detours.pop((region, kind), None)
        pause = min(before.pause * 2, _LONGEST) if before is not None else _SHORTEST
        if len(self._detours) >= _MAX_DETOURS:
            del self._detours[next(iter(self._detours))]
        self._detours[region, kind] = _Detour(error, pause, self._clock() + pause)

    def worked(self, region: ChildName, kind: FabricKind) -> None:
        """A fabric reached a region."""
        self._detours.pop((region, kind), None)


class LinkTable:
    """All links of this node as initiator."""

    def __init__(
        self,
        fabrics: Mapping[FabricKind, Fabric],
        source: Callable[[str], GrantSource],
        settings: Settings,
        faults: FaultMetrics,
        clock: Clock = time.monotonic,
    ) -> None:
        """`source(node)` returns the daemon of a node or raises NodeNotFound."""
        self.retry_for = settings.retry_for
        """Seconds in which nothing moves until a transfer gives up to go on after its link broke."""
        self.faults = faults
        self._fabrics = fabrics
        self._source = source
        self._rails = settings.rails
        self._idle = settings.link_idle
        self._clock = clock
        self._opening: dict[tuple[str, FabricKind], asyncio.Task[OutboundLink]] = {}
        self._links: dict[tuple[str, FabricKind], OutboundLink] = {}
        self._closing: set[asyncio.Task[None]] = set()
        self.detours = Detours(clock)

    def counts(self) -> dict[FabricKind, int]:
        """Open links by fabric."""
        counts = dict.fromkeys(self._fabrics, 0)
        for _, kind in self._links:
            counts[kind] += 1
        return counts

    @property
    def grant_count(self) -> int:
        """Grants held on regions of remote nodes."""
        return sum(link.grant_count for link in self._links.values())

    def __iter__(self) -> Iterator[OutboundLink]:
        return iter(self._links.values())

    def kept(self, node: str, kind: FabricKind) -> OutboundLink | None:
        """Return the open link to a node, if there is one."""
        return self._links.get((node, kind))

    async def get(self, node: str, kind: FabricKind) -> OutboundLink:
        """Return the link to a node, opened if need be. Raises NodeUnreachable, NodeNotFound."""
        key = (node, kind)
        link = self._links.get(key)
        if link is not None:
            return link
        task = self._opening.get(key)
        if task is None:
            task = asyncio.get_running_loop().create_task(self._open(node, kind))
            self._opening[key] = task
            task.add_done_callback(lambda done: self._opened(key, done))
        return await asyncio.shield(task)

    def _opened(self, key: tuple[str, FabricKind], task: asyncio.Task[OutboundLink]) -> None:
        self._opening.pop(key, None)
        if not task.cancelled():
            task.exception()  # who asked may have given up meanwhile

    async def _open(self, node: str, kind: FabricKind) -> OutboundLink:
        link = OutboundLink(node, self._fabrics[kind], self._source(node), self._clock)
        link.on_down = lambda: self._lost(link)
        link.on_rail_down = lambda: self.faults.broke(kind, Broken.RAIL)
        await link.open(self._rails)
        if link.down_cause is None:
            self._links[node, kind] = link
        return link

    def _lost(self, link: OutboundLink) -> None:
        self.faults.broke(link.fabric.kind, Broken.LINK)
        self.discard(link)

    def rails_down(self) -> dict[FabricKind, int]:
        """Rails that broke and are not up again, by fabric."""
        counts = dict.fromkeys(self._fabrics, 0)
        for link in self._links.values():
            counts[link.fabric.kind] += link.rails_down
        return counts

    def discard(self, link: OutboundLink) -> None:
        """Close a link and forget it: it is down, idle, or unknown at its far end."""
        key = (link.node, link.fabric.kind)
        if self._links.get(key) is link:
            del self._links[key]
            closing = asyncio.get_running_loop().create_task(link.close())
            self._closing.add(closing)
            closing.add_done_callback(self._closing.discard)

    def tend(self) -> None:
        """Close the links that had nothing to do for the idle time; call now and then."""
        limit = self._clock() - self._idle
        for link in list(self._links.values()):
            if link.idle and link.used_at < limit:
                self.discard(link)

    async def close(self) -> None:
        """Close all links."""
        opening = list(self._opening.values())
        for task in opening:
            task.cancel()
        await asyncio.gather(*opening, return_exceptions=True)
        for link in list(self._links.values()):
            self.discard(link)
        await asyncio.gather(*self._closing)
