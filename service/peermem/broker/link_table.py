"""All links of this node as initiator: opened on demand, shared by transfers, closed when idle.

Rules of this file:

* One link per remote node and fabric, and on a fabric that separates subjects for each of them. A subject goes by the
  name that all nodes give it, without its groups: its tenant is what this node's policy says, and the far end's may
  say something else, so that nothing could be held to it there.
* One that goes down is forgotten, and opened anew on the next use, also by the transfers that it carried.
* So many links lead to a node over a fabric, at most; then the one that was idle longest makes room.
* All links to a node over a fabric share what goes there (`traffic`).
* A fabric that did not reach a node or a region for a subject is passed over for it for a while, longer each time it
  fails again.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from weakref import WeakValueDictionary

from peermem.broker.links import OutboundLink
from peermem.broker.settings import Settings
from peermem.broker.traffic import Clock, Traffic
from peermem.core.errors import LimitReached, PeermemError
from peermem.core.identity import ANONYMOUS, Subject
from peermem.core.names import ChildName
from peermem.core.types import FabricKind
from peermem.fabric.base import Fabric
from peermem.remote.base import GrantSource
from peermem.telemetry.faults import Broken, FaultMetrics

_SHORTEST, _LONGEST = 1.0, 30.0
"""Seconds that a fabric is passed over after it failed once, and at most."""
_MAX_DETOURS = 4096
MAX_LINKS_TO_NODE = 256
"""Over one fabric: each has queue pairs on each NIC, at both ends."""
_Key = tuple[str, FabricKind, str]
"""Node, fabric, and subject where the fabric separates them."""


@dataclass(slots=True)
class _Detour:
    error: PeermemError
    pause: float
    until: float


class Detours:
    """Which fabrics did not reach which region lately, for whom: what a node may register is each subject's own."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._detours: dict[tuple[ChildName, FabricKind, Subject], _Detour] = {}

    def why(self, region: ChildName, kind: FabricKind, subject: Subject) -> PeermemError | None:
        """Return why a fabric is passed over for a region now, or None."""
        detour = self._detours.get((region, kind, subject))
        return detour.error if detour is not None and self._clock() < detour.until else None

    def failed(self, region: ChildName, kind: FabricKind, subject: Subject, error: PeermemError) -> None:
        """A fabric did not reach a region."""
        before = self._detours.pop((region, kind, subject), None)
        pause = min(before.pause * 2, _LONGEST) if before is not None else _SHORTEST
        if len(self._detours) >= _MAX_DETOURS:
            del self._detours[next(iter(self._detours))]
        self._detours[region, kind, subject] = _Detour(error.bare(), pause, self._clock() + pause)

    def worked(self, region: ChildName, kind: FabricKind, subject: Subject) -> None:
        """A fabric reached a region."""
        self._detours.pop((region, kind, subject), None)


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
        self._here = settings.node
        self._fabrics = fabrics
        self._source = source
        self._rails = settings.rails
        self._idle = settings.link_idle
        self._clock = clock
        self._opening: dict[_Key, asyncio.Task[OutboundLink]] = {}
        self._links: dict[_Key, OutboundLink] = {}
        self._traffic: WeakValueDictionary[tuple[str, FabricKind], Traffic] = WeakValueDictionary()
        """Each for as long as it has a link."""
        self._closing: set[asyncio.Task[None]] = set()
        self.detours = Detours(clock)

    def counts(self) -> dict[FabricKind, int]:
        """Open links by fabric."""
        counts = dict.fromkeys(self._fabrics, 0)
        for _, kind, _ in self._links:
            counts[kind] += 1
        return counts

    def by_node(self) -> Counter[str]:
        """Open links by the node that they lead to."""
        return Counter(node for node, _, _ in self._links)

    @property
    def grant_count(self) -> int:
        """Grants held on regions of remote nodes."""
        return sum(link.grant_count for link in self._links.values())

    def __iter__(self) -> Iterator[OutboundLink]:
        return iter(self._links.values())

    def _key(self, node: str, kind: FabricKind, subject: Subject) -> _Key:
        return node, kind, subject.named_by(self._here) if self._fabrics[kind].separates_subjects else ""

    def kept(self, node: str, kind: FabricKind, subject: Subject = ANONYMOUS) -> OutboundLink | None:
        """Return the open link to a node for a subject, if there is one."""
        return self._links.get(self._key(node, kind, subject))

    async def get(self, node: str, kind: FabricKind, subject: Subject) -> OutboundLink:
        """Return the link to a node for a subject, opened if need be. Raises NodeUnreachable, NodeNotFound,
        LimitReached, and what the far end's OpenLink raises."""
        key = self._key(node, kind, subject)
        link = self._links.get(key)
        if link is not None:
            return link
        task = self._opening.get(key)
        if task is None:
            self._make_room(node, kind)
            task = asyncio.get_running_loop().create_task(self._open(key))
            self._opening[key] = task
            task.add_done_callback(lambda done: self._opened(key, done))
        return await asyncio.shield(task)

    def _make_room(self, node: str, kind: FabricKind) -> None:
        """See that there may be one more link. Raises LimitReached."""
        links = [link for key, link in self._links.items() if key[:2] == (node, kind)]
        if len(links) + sum(key[:2] == (node, kind) for key in self._opening) < MAX_LINKS_TO_NODE:
            return
        idle = min((link for link in links if link.idle), key=lambda link: link.used_at, default=None)
        if idle is None:
            raise LimitReached(
                f"This node has {MAX_LINKS_TO_NODE} links to nodes/{node} over {kind.value}, its limit, and transfers "
                "use all of them. Try again when some have ended, or use tcp.",
                limit=MAX_LINKS_TO_NODE,
            )
        self.discard(idle)

    def _opened(self, key: _Key, task: asyncio.Task[OutboundLink]) -> None:
        self._opening.pop(key, None)
        if not task.cancelled():
            task.exception()  # who asked may have given up meanwhile

    async def _open(self, key: _Key) -> OutboundLink:
        node, kind, subject = key
        fabric = self._fabrics[kind]
        traffic = self._traffic.setdefault((node, kind), Traffic(fabric.limits, self._clock))
        link = OutboundLink(node, fabric, self._source(node), traffic, self._clock, subject)
        link.on_down = lambda: self._lost(link)
        link.on_rail_down = lambda: self.faults.broke(kind, Broken.RAIL)
        try:
            await link.open(self._rails)
        except BaseException:
            self._close_soon(link)  # the far end may have accepted it
            raise
        if link.down_cause is None:
            self._links[key] = link
        return link

    def _lost(self, link: OutboundLink) -> None:
        self.faults.broke(link.fabric.kind, Broken.LINK)
        self.discard(link)

    def look_again(self) -> None:
        """The limits of tenants have changed: nobody waits as the old ones would have it."""
        for traffic in list(self._traffic.values()):
            traffic.look_again()

    def rails_down(self) -> dict[FabricKind, int]:
        """Rails that broke and are not up again, by fabric."""
        counts = dict.fromkeys(self._fabrics, 0)
        for link in self._links.values():
            counts[link.fabric.kind] += link.rails_down
        return counts

    def discard(self, link: OutboundLink) -> None:
        """Close a link and forget it: it is down, idle, or unknown at its far end."""
        key = (link.node, link.fabric.kind, link.subject)
        if self._links.get(key) is link:
            del self._links[key]
            self._close_soon(link)

    def _close_soon(self, link: OutboundLink) -> None:
        closing = asyncio.get_running_loop().create_task(link.close())
        self._closing.add(closing)
        closing.add_done_callback(self._closing.discard)

    def tend(self, epochs: Callable[[str], str] = lambda node: "") -> None:
        """Close the links that had nothing to do for the idle time, and those to a run of a daemon that has ended; call
        now and then. `epochs` returns which run of a node the directory tells of; empty: it does not."""
        limit = self._clock() - self._idle
        for link in list(self._links.values()):
            if link.has_ended(epochs(link.node)) or (link.idle and link.used_at < limit):
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
