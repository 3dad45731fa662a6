"""Grants of another daemon over gRPC: asked for and given back on one call, whatever becomes of who asked."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass

import pytest

from peermem import aio
from peermem.core import errors
from peermem.core.failpoints import turned_on
from peermem.core.grant import Wanted
from peermem.core.identity import ANONYMOUS
from peermem.core.names import parse_region
from peermem.core.types import FabricKind, LinkAttributes, Rights
from peermem.remote.base import RemoteNode
from peermem.remote.client import GrpcRemotes
from tests.doubles import PATIENCE
from tests.remote.conftest import Other

OFFER = LinkAttributes(FabricKind.TCP, 1)
LENGTH = 4096


@dataclass
class Linked:
    """A link to node b, and a region there."""

    b: RemoteNode
    other: Other
    link_id: bytes
    epoch: str
    wanted: Wanted

    async def acquire(self) -> int:
        return (await self.b.acquire_grant(self.link_id, self.epoch, self.wanted)).grant_id

    async def grants(self) -> int:
        """Return how many there are at b."""
        return (await self.b.node_facts()).grant_count

    async def come_to(self, count: int) -> None:
        """Wait until so many grants are at b."""
        async with asyncio.timeout(PATIENCE):
            while await self.grants() != count:
                pass


@pytest.fixture
async def linked(other: Other, remotes: GrpcRemotes) -> AsyncIterator[Linked]:
    await other.start()
    async with await aio.connect(other.address) as node:
        region = await node.create_region(device="bar0", length=LENGTH)
        b = remotes.get("b")
        opened = await b.open_link(OFFER)
        wanted = Wanted(parse_region(region.name, "name"), Rights.READ, ANONYMOUS, 0, LENGTH)
        yield Linked(b, other, opened.attributes.link_id, opened.epoch, wanted)


async def test_grants_come_and_go(linked: Linked) -> None:
    grants = [await linked.acquire() for _ in range(3)]
    assert await linked.grants() == len(set(grants)) == 3
    await linked.b.release_grants(linked.link_id, grants[:1])
    assert await linked.grants() == 2
    linked.b.give_back(linked.link_id, grants[1])
    await linked.come_to(1)
    await linked.b.close_link(linked.link_id)
    assert await linked.grants() == 0


async def test_many_ask_at_the_same_time(linked: Linked) -> None:
    grants = await asyncio.gather(*(linked.acquire() for _ in range(1000)))
    assert await linked.grants() == len(set(grants)) == 1000
    for grant_id in grants:
        linked.b.give_back(linked.link_id, grant_id)
    await linked.come_to(0)


async def test_a_grant_whose_asker_is_gone_is_given_back(linked: Linked) -> None:
    gate, reached = asyncio.Event(), asyncio.Event()

    async def wait() -> None:
        reached.set()
        await gate.wait()

    with turned_on("grant.make", wait):
        asking = asyncio.create_task(linked.acquire())
        await reached.wait()
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
        gate.set()
    kept = await linked.acquire()
    await linked.come_to(1)
    await linked.b.release_grants(linked.link_id, [kept])
    assert await linked.grants() == 0


async def test_a_daemon_that_does_not_answer_in_time(linked: Linked, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("peermem.remote.client._DEADLINE", 0.05)
    gate = asyncio.Event()

    async def wait() -> None:
        await gate.wait()

    with turned_on("grant.make", wait):
        with pytest.raises(errors.NodeUnreachable) as caught:
            await linked.acquire()
        assert caught.value.metadata["code"] == "DEADLINE_EXCEEDED"
        gate.set()
    monkeypatch.undo()
    await linked.come_to(0)
    await linked.acquire()


async def test_a_daemon_that_goes_leaves_nobody_waiting(linked: Linked) -> None:
    gate, reached = asyncio.Event(), asyncio.Event()

    async def wait() -> None:
        reached.set()
        await gate.wait()

    with turned_on("grant.make", wait):
        asking = asyncio.create_task(linked.acquire())
        await reached.wait()
        stopping = asyncio.create_task(linked.other.stop())
        with pytest.raises((errors.NodeUnreachable, errors.ShuttingDown)):
            await asking
        gate.set()
        await stopping
    linked.b.give_back(linked.link_id, 7)
    with pytest.raises(errors.NodeUnreachable):
        await linked.acquire()
    await linked.other.start()
    with pytest.raises(errors.StaleEpoch):
        await linked.acquire()


async def test_a_defect_is_told_without_its_inside(linked: Linked, capsys: pytest.CaptureFixture[str]) -> None:
    def defect() -> None:
        raise RuntimeError("what nobody thought of")

    with turned_on("grant.make", defect), pytest.raises(errors.Internal) as caught:
        await linked.acquire()
    assert "nobody thought of" not in caught.value.message
    assert "nobody thought of" in "".join(capsys.readouterr())
    await linked.acquire()
