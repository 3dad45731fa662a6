"""Brokers of one process that call each other without gRPC between."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from dataclasses import dataclass, field

from peermem.broker.broker import Broker
from peermem.core.errors import NodeNotFound, PeermemError
from peermem.core.grant import Wanted
from peermem.core.identity import Subject
from peermem.core.names import ChildName
from peermem.core.node import NodeFacts
from peermem.core.transfer import TransferFacts, TransferRequest
from peermem.core.types import GrantedKey, LinkAttributes, Rights
from peermem.remote.base import Ear, OpenedLink, RemoteNode


@dataclass
class Cues:
    """What calls to another daemon do instead of reaching it, by the method's name."""

    faults: dict[str, PeermemError] = field(default_factory=dict)
    """Raised by each such call while it is here."""
    once: dict[str, PeermemError] = field(default_factory=dict)
    """Raised by the next such call."""
    gates: dict[str, asyncio.Event] = field(default_factory=dict)
    """Waited for by each such call while it is here."""
    calls: list[str] = field(default_factory=list)

    async def pass_through(self, method: str) -> None:
        self.calls.append(method)
        if method in self.gates:
            await self.gates[method].wait()
        if method in self.once:
            raise self.once.pop(method)
        if method in self.faults:
            raise self.faults[method]


class Deaf:
    """An `Ear` that nothing reaches: nothing is carried."""

    def heard(self, message: bytes) -> None:
        raise AssertionError("nothing was carried, and something came back")

    def broke(self) -> None:
        pass


class DirectRemote:
    """Another broker of this process, called without gRPC between; a `RemoteNode`."""

    def __init__(self, broker: Broker, here: str, cues: Cues) -> None:
        self.cues = cues
        self._broker = broker
        self._here = here

    async def open_link(self, offer: LinkAttributes) -> OpenedLink:
        await self.cues.pass_through("open_link")
        if offer.subject and not offer.link_id:
            await self._broker.vouching.check_link(self._here, Subject.parse_spoken(offer.subject))
        return self._broker.serving.open_link(self._here, offer)

    def use_rails(self, link_id: bytes, carry: Callable[[bytes], bool]) -> Ear:
        return Deaf()

    async def close_link(self, link_id: bytes) -> None:
        await self.cues.pass_through("close_link")
        await self._broker.serving.close_link(link_id)

    async def acquire_grant(self, link_id: bytes, epoch: str, wanted: Wanted) -> GrantedKey:
        await self.cues.pass_through("acquire_grant")
        wanted = wanted._replace(subject=wanted.subject.vouched_for(self._here))
        return await self._broker.serving.acquire(link_id, epoch, wanted)

    async def release_grants(self, link_id: bytes, grant_ids: Sequence[int]) -> None:
        await self.cues.pass_through("release_grants")
        await self._broker.serving.release(link_id, grant_ids)

    def give_back(self, link_id: bytes, grant_id: int) -> None:
        self.cues.calls.append("give_back")
        if "give_back" not in self.cues.faults:
            self._broker.serving.release_soon(link_id, grant_id)

    async def copy_staged(
        self, link_id: bytes, grant_id: int, pieces: Sequence[tuple[int, int, int]], *, into_region: bool
    ) -> None:
        await self.cues.pass_through("copy_staged")
        await self._broker.serving.copy_staged(link_id, grant_id, pieces, into_region=into_region)

    async def flush(self, link_id: bytes, grant_id: int) -> None:
        await self.cues.pass_through("flush")
        await self._broker.serving.flush(link_id, grant_id)

    async def checksum(
        self, link_id: bytes, grant_id: int, offsets: Sequence[int], lengths: Sequence[int], initial: int
    ) -> int:
        await self.cues.pass_through("checksum")
        return await self._broker.serving.checksum(link_id, grant_id, offsets, lengths, initial)

    async def create_transfer(self, request: TransferRequest, request_id: str, subject: Subject) -> TransferFacts:
        await self.cues.pass_through("create_transfer")
        return (await self._broker.create_transfer(subject.vouched_for(self._here), request, relayed=True)).facts

    async def watch_transfer(self, name: ChildName, subject: Subject) -> AsyncGenerator[TransferFacts, None]:
        await self.cues.pass_through("watch_transfer")
        running = self._broker.transfers.find_running(name)
        yield self._broker.seen_transfer(subject.vouched_for(self._here), name)
        if running is not None:
            await running.ended.wait()
            yield running.facts

    async def cancel_transfer(self, name: ChildName, subject: Subject) -> None:
        await self.cues.pass_through("cancel_transfer")
        await self._broker.cancel_transfer(subject.vouched_for(self._here), name)

    async def confirm_relay(self, node: str, subject: Subject, region: ChildName, right: Rights) -> None:
        await self.cues.pass_through("confirm_relay")
        self._broker.vouching.check_relayed(node, subject, region, right)

    async def confirm_runs(self, node: str, subject: Subject) -> None:
        await self.cues.pass_through("confirm_runs")
        self._broker.vouching.check_runs(node, str(subject))

    async def node_facts(self) -> NodeFacts:
        await self.cues.pass_through("node_facts")
        return self._broker.node_facts()

    async def close(self) -> None:
        pass


class DirectRemotes:
    """The brokers of this process; a `Remotes`."""

    def __init__(self, here: str, brokers: Mapping[str, Broker], cues: Cues) -> None:
        self._here = here
        self._brokers = brokers
        self._cues = cues

    def get(self, node: str) -> RemoteNode:
        if node not in self._brokers:
            raise NodeNotFound(f"nodes/{node} is not in the directory.", node=node)
        return DirectRemote(self._brokers[node], self._here, self._cues)

    async def close(self) -> None:
        pass
