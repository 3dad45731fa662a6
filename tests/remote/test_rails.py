"""Grants of another daemon on the rails of a tcp link: without a call while these carry, by a call when they don't."""

from __future__ import annotations

import asyncio
import gc
import weakref
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field

import pytest

from peermem import aio
from peermem.core import errors
from peermem.core.failpoints import turned_on
from peermem.core.grant import Wanted
from peermem.core.identity import ANONYMOUS
from peermem.core.names import parse_region
from peermem.core.types import LinkAttributes, Rights
from peermem.fabric.base import Completion, LinkEnd
from peermem.fabric.tcp import TcpFabric
from peermem.fabric.tcp_initiator import TcpLink
from peermem.remote.base import Ear, RemoteNode
from peermem.remote.client import GrpcRemotes
from peermem.remote.grants import GrantExchange, Lost
from peermem.v1 import link_pb2
from tests.doubles import PATIENCE
from tests.fabric.support import eventually, turns
from tests.remote.conftest import Other

LENGTH = 4096


@dataclass
class Linked:
    """A tcp link to node b on whose rails grants are asked for, and a region there; its `LinkEvents`."""

    b: RemoteNode
    other: Other
    fabric: TcpFabric
    link: TcpLink = field(init=False)
    link_id: bytes = b""
    epoch: str = ""
    wanted: Wanted = field(init=False)
    ear: Ear = field(init=False)
    deaf: bool = False
    """Whether what comes on the rails gets lost."""
    carried: list[link_pb2.GrantQuestion] = field(default_factory=list)
    """What was asked on the rails."""

    async def open(self) -> None:
        self.link = await self.fabric.connect(self._exchange, self, 2)
        self.ear = self.b.use_rails(self.link_id, self._carry)

    async def _exchange(self, offer: LinkAttributes) -> LinkAttributes:
        opened = await self.b.open_link(offer)
        self.link_id, self.epoch = opened.attributes.link_id, opened.epoch
        return opened.attributes

    def _carry(self, message: bytes) -> bool:
        is_carried = self.link.carry(message)
        if is_carried:
            self.carried += link_pb2.ExchangeGrantsRequest.FromString(message).questions
        return is_carried

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

    # LinkEvents

    def heard(self, message: bytes) -> None:
        if not self.deaf:
            self.ear.heard(message)

    def completed(self, completions: list[Completion]) -> None:
        raise AssertionError("nothing was posted")

    def rail_down(self, cause: str, pause: float) -> None:
        self.ear.broke()

    def rail_up(self) -> None:
        pass

    def down(self, end: LinkEnd, cause: str) -> None:
        self.ear.broke()


@pytest.fixture
async def linked(other: Other, remotes: GrpcRemotes) -> AsyncIterator[Linked]:
    await other.start()
    fabric = TcpFabric("127.0.0.1:0")
    async with await aio.connect(other.address) as node:
        region = await node.create_region(device="bar0", length=LENGTH)
        linked = Linked(remotes.get("b"), other, fabric)
        await linked.open()
        linked.wanted = Wanted(parse_region(region.name, "name"), Rights.READ, ANONYMOUS, 0, LENGTH)
        yield linked
        await fabric.close()


async def test_grants_come_and_go_without_a_call(linked: Linked) -> None:
    def no_call(*_: object) -> None:
        raise AssertionError("a call was made")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("peermem.remote.client.GrantCall", no_call)
        grants = [await linked.acquire() for _ in range(3)]
        for grant_id in grants[1:]:
            linked.b.give_back(linked.link_id, grant_id)
        await linked.come_to(1)
        last = await linked.acquire()
    await linked.b.release_grants(linked.link_id, [grants[0], last])
    assert await linked.grants() == 0
    kinds = [question.WhichOneof("question") for question in linked.carried]
    assert (kinds.count("acquire"), kinds.count("release")) == (4, 2)


async def test_what_is_given_back_goes_with_the_next_question(linked: Linked) -> None:
    for _ in range(20):
        linked.b.give_back(linked.link_id, await linked.acquire())
    await linked.come_to(0)
    assert len(linked.carried) == 40


async def test_many_ask_at_the_same_time(linked: Linked, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("peermem.remote.client._RAILS_DEADLINE", PATIENCE)
    grants = await asyncio.gather(*(linked.acquire() for _ in range(2000)))
    assert await linked.grants() == len(set(grants)) == len(linked.carried) == 2000
    for grant_id in grants:
        linked.b.give_back(linked.link_id, grant_id)
    await linked.come_to(0)


async def test_more_than_may_be_unanswered_are_answered_all_the_same(
    linked: Linked, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("peermem.remote.client._RAILS_DEADLINE", PATIENCE)
    gate, count = asyncio.Event(), 0

    async def wait() -> None:
        nonlocal count
        count += 1
        await gate.wait()

    with turned_on("grant.make", wait):
        asking = [asyncio.create_task(linked.acquire()) for _ in range(4000)]
        await eventually(lambda: count >= 1024)
        await turns(200)
        assert count < 4000, "they wait before they are read"
        gate.set()
    assert len(set(await asyncio.gather(*asking))) == 4000


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
    await linked.come_to(0)


async def test_what_was_on_a_rail_that_broke_is_asked_by_a_call_at_once(linked: Linked) -> None:
    gate, reached = asyncio.Event(), asyncio.Event()

    async def wait() -> None:
        reached.set()
        await gate.wait()

    with turned_on("grant.make", wait, times=1):
        asking = asyncio.create_task(linked.acquire())
        await reached.wait()
        linked.ear.broke()
        async with asyncio.timeout(1):  # well below the time that an answer has
            assert await asking
        gate.set()
    await linked.come_to(1)  # what is granted to nobody was given back


async def test_no_answer_on_the_rails_in_time(linked: Linked, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("peermem.remote.client._RAILS_DEADLINE", 0.05)
    linked.deaf = True
    assert await linked.acquire()
    await linked.come_to(2)
    linked.deaf = False
    await linked.acquire()
    assert len(linked.carried) == 2


async def test_a_question_that_is_never_answered_leaves_nothing_but_its_number() -> None:
    sent: list[link_pb2.GrantQuestion] = []

    class Silent:
        def send(self, questions: Sequence[link_pb2.GrantQuestion]) -> None:
            sent.extend(questions)

    async def ask() -> None:
        with pytest.raises(Lost):
            await exchange.acquire(link_pb2.AcquireGrant(link_id=b"link"), PATIENCE)

    exchange, cause = GrantExchange(Silent()), Lost()
    kept = weakref.ref(cause)
    asking = asyncio.create_task(ask())
    await eventually(lambda: len(sent) == 1)
    exchange.fail(cause)
    await asking
    del cause, asking
    gc.collect()
    assert kept() is None, "an error keeps what its callers were about"
    exchange.take([link_pb2.GrantAnswer(number=1, grant=link_pb2.Grant(grant_id=7))])
    exchange.flush()
    assert [list(question.release.grant_ids) for question in sent] == [[], [7]]
    exchange.close()


async def test_a_link_that_is_closed_carries_nothing(linked: Linked) -> None:
    await linked.link.close()
    await linked.b.close_link(linked.link_id)
    with pytest.raises(errors.LinkNotFound):
        await linked.acquire()
    assert linked.carried == []


async def test_this_daemon_shows_its_certificate_by_a_call_again_and_again(
    linked: Linked, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop = asyncio.get_running_loop()
    await linked.acquire()
    assert len(linked.carried) == 1
    now = loop.time
    monkeypatch.setattr(loop, "time", lambda: now() + 301)
    await linked.acquire()
    assert len(linked.carried) == 1
    await linked.acquire()
    assert len(linked.carried) == 2


async def test_a_certificate_that_was_shown_too_long_ago_is_shown_by_a_call(
    linked: Linked, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("peermem.api.identity.VOUCHED_FOR", -1.0)
    await linked.b.release_grants(linked.link_id, [7])  # a call that vouches for no time at all
    for count in (1, 2):
        assert await linked.acquire()
        assert len(linked.carried) == count, "which was refused"
    await linked.come_to(2)


async def test_a_rail_asks_only_for_its_own_link(linked: Linked) -> None:
    other = Linked(linked.b, linked.other, linked.fabric)
    await other.open()
    other.wanted = linked.wanted
    kept = await linked.acquire()
    mine, other.link_id, other.epoch = other.link_id, linked.link_id, linked.epoch
    other.ear = linked.b.use_rails(linked.link_id, other._carry)
    with pytest.raises(errors.AccessDenied):
        await other.acquire()
    other.b.give_back(linked.link_id, kept)
    with pytest.raises(errors.AccessDenied):
        await other.acquire()
    assert await linked.grants() == 1
    await linked.b.close_link(mine)
