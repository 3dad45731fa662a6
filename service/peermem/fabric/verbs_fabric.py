"""The verbs fabric: one-sided READ and WRITE by RDMA NICs, over reliable connections.

Rules of this file:

* Everything runs on one event loop, without threads: that is what keeps pyverbs' objects from being used twice at once.
* The fabric owns its NICs, its registrations, its accepted links (`Target`) and the links that it opened; they are
  closed in that order, backwards.
* A NIC that does not work is told by `nics`; the fabric serves with the others.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

from peermem.core.errors import FabricUnavailable, NodeUnreachable, PeermemError
from peermem.core.gid import Gid
from peermem.core.types import FabricKind, LinkAttributes, Path, RemoteKey, Rights
from peermem.fabric.base import Exchange, FabricLimits, LinkEvents, Proof
from peermem.fabric.grants import Clock
from peermem.fabric.verbs_link import VerbsLink
from peermem.fabric.verbs_memory import MemoryTable
from peermem.fabric.verbs_nic import Nic, NicTable, Port
from peermem.fabric.verbs_probe import probe
from peermem.fabric.verbs_rail import Rail
from peermem.fabric.verbs_target import Target
from peermem.fabric.verbs_types import Settings, VerbsError
from peermem.fabric.verbs_work import MAX_RAILS
from peermem.memory import Memory

_LIMITS = FabricLimits(slice_bytes=1 << 20, slice_ranges=256, window_bytes=16 << 20)


class VerbsFabric:
    """A `Fabric` over RDMA NICs."""

    def __init__(
        self,
        nics: Sequence[str] = (),
        *,
        settings: Settings | None = None,
        clock: Clock = time.monotonic,
        on_link_lost: Callable[[bytes], None] = lambda _: None,
    ) -> None:
        """`nics` names the ports to use, or devices for all their ports; empty means all. `clock` is what grants expire
        by. `on_link_lost` gets the ids of accepted links that end by themselves."""
        self._settings = settings or Settings()
        self._memories = MemoryTable()
        self._nics = NicTable(nics, self._lose, self._settings.gid_index)
        self._target = Target(self._nics, self._memories, self._settings, clock, on_link_lost)
        self._links: set[VerbsLink] = set()
        self._serving = False

    @property
    def kind(self) -> FabricKind:
        """See Fabric."""
        return FabricKind.VERBS

    @property
    def separates_subjects(self) -> bool:
        """See Fabric."""
        return True

    @property
    def limits(self) -> FabricLimits:
        """See Fabric."""
        return _LIMITS

    @property
    def nics(self) -> Mapping[str, PeermemError | None]:
        """See Fabric."""
        return self._nics.errors

    @property
    def unavailable(self) -> PeermemError | None:
        """See Fabric."""
        return self._nics.unavailable

    @property
    def accepted_count(self) -> int:
        """Links of remote nodes."""
        return len(self._target)

    @property
    def grant_count(self) -> int:
        """Grants that have not been revoked and whose link is open."""
        return self._target.grant_count

    def object_counts(self) -> Counter[str]:
        """Open verbs objects by kind: pd, mr, mw, cq, qp."""
        return self._nics.counts()

    async def start(self) -> None:
        """See Fabric."""
        self._nics.open()
        self._serving = True

    async def close(self) -> None:
        """See Fabric."""
        self._serving = False
        for link in list(self._links):
            await link.close()
        await self._target.close()
        await self._memories.close()
        await self._nics.close()

    # Memory

    async def register(self, memory: Memory, path: Path, nics: Sequence[str] = (), subject: str = "") -> None:
        """See Fabric. No name means all ports that work."""
        if not nics and (unavailable := self._nics.unavailable) is not None:
            raise unavailable.again()
        ports = [self._nics.get(name) for name in nics] or self._nics.usable()
        await self._memories.register(memory, path, ports, subject)

    async def unregister(self, memory: Memory) -> None:
        """See Fabric."""
        await self._target.unregistering(memory)
        await self._memories.unregister(memory)

    async def probe(self, nic: str, memory: Memory, path: Path, *, keep: bool = False) -> Proof:
        """See Fabric."""
        return await probe(self._nics.get(nic), memory, path, self._settings, keep=keep)

    # Links

    async def connect(self, exchange: Exchange, events: LinkEvents, rails: int = 1, subject: str = "") -> VerbsLink:
        """See Fabric. At least one rail for each port that works."""
        self._check()
        link = VerbsLink(exchange, events, self._memories, self._settings, self._links.discard)
        made: list[Rail] = []
        try:
            for port in self._ports_for(rails):
                gid = port.gid_for()
                if gid is not None:
                    made.append(_rail(port, gid, subject, link, self._settings))
        except VerbsError as error:
            for rail in made:
                rail.close()
                rail.domain.release()
            raise NodeUnreachable(f"This node's NIC has no queue pair for a link: {error}.") from error
        self._links.add(link)
        await link.open(made)
        if not self._serving:
            await link.close()
            raise NodeUnreachable("This node's verbs fabric was closed while a link was opened.")
        return link

    def _ports_for(self, rails: int) -> list[Port]:
        """Return the port of each rail: all ports take turns."""
        usable = self._nics.usable()
        count = min(MAX_RAILS, max(rails, len(usable) * self._settings.queue_pairs))
        return [usable[index % len(usable)] for index in range(count)]

    def accept(self, offer: LinkAttributes) -> LinkAttributes:
        """See Fabric."""
        if offer.fabric is not FabricKind.VERBS:
            raise FabricUnavailable(f"A link over {offer.fabric.value} was offered to the verbs fabric. Offer verbs.")
        if not offer.link_id:
            self._check()
        return self._target.accept(offer)

    async def hang_up(self, link_id: bytes) -> None:
        """See Fabric."""
        await self._target.hang_up(link_id)

    async def grant(
        self, link_id: bytes, memory: Memory, offset: int, length: int, rights: Rights, ttl: float
    ) -> RemoteKey:
        """See Fabric. The NIC knows no time: a timer revokes the grant when it expires."""
        return await self._target.grant(link_id, memory, offset, length, rights, ttl)

    async def revoke(self, key: RemoteKey) -> None:
        """See Fabric."""
        await self._target.revoke(key.rkey)

    async def expire(self) -> None:
        """Revoke now what has expired by the clock; the fabric's timer does so by itself, by the loop's time."""
        await self._target.expire()

    def _check(self) -> None:
        if not self._serving:
            raise FabricUnavailable("The verbs fabric of this node is not serving now. Try again later.")
        error = self._nics.unavailable
        if error is not None:
            raise FabricUnavailable(
                f"The verbs fabric of this node has no NIC that works: {error.message} Until then use tcp.",
                cause=error.reason,
            )

    def _lose(self, nic: Nic) -> None:
        """A NIC is gone: end what has no other one."""

        def is_gone(rail: Rail) -> bool:
            return rail.port.nic is nic

        self._target.lose(is_gone)
        for link in list(self._links):
            for rail in link.uses(is_gone):
                rail.lose()


def _rail(port: Port, gid: Gid, subject: str, link: VerbsLink, settings: Settings) -> Rail:
    """Return a new rail in its subject's domain. Raises VerbsError."""
    domain = port.nic.domains.of(subject)
    try:
        return Rail(port, gid, domain, link, settings)
    except VerbsError:
        domain.release()
        raise
