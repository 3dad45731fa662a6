"""Which links there are: over a fabric that separates subjects one for each, with the same share for all together."""

from __future__ import annotations

import asyncio
import errno
from dataclasses import replace

import pytest

from peermem.broker import accepted, link_table
from peermem.broker.links import OutboundLink
from peermem.core import errors
from peermem.core.failpoints import turned_on
from peermem.core.grant import Wanted
from peermem.core.identity import ANONYMOUS, Subject
from peermem.core.segments import columns
from peermem.core.transfer import State, TransferRequest
from peermem.core.types import FabricKind, LinkAttributes, Rights
from peermem.fabric.base import LinkEnd
from peermem.memory import Memory
from tests.broker.conftest import NicHost, nic_hosts
from tests.broker.support import content, eventually, failure, outcome, region, start, whole
from tests.doubles import MIB
from tests.policies import policy, rule, tenant

ANN, BEN = Subject("uid:1", ("gid:1",)), Subject("uid:2")
VERBS, TCP = FabricKind.VERBS, FabricKind.TCP
EVERYTHING = rule("all", "anyone anyone@*", "read write manage create")


def link_of(host: NicHost, subject: Subject, kind: FabricKind = VERBS) -> OutboundLink:
    link = host.broker.links.kept("b", kind, subject)
    assert link is not None
    return link


async def test_each_subject_has_a_link_over_verbs_and_all_share_one_over_tcp(nic_pair: list[NicHost]) -> None:
    a, b = nic_pair
    source, sink = await region(a, 100, data=b"x" * 100), await region(b, 100)
    for kind in (VERBS, TCP):
        for subject in (ANN, BEN, ANN, replace(ANN, groups=("gid:7",))):
            assert (await outcome(await start(a, whole(source, sink), fabric=kind, subject=subject))).error is None
    assert await content(b, sink) == b"x" * 100
    assert a.broker.links.counts() == {VERBS: 2, TCP: 1, FabricKind.LOCAL: 0}
    assert b.broker.serving.link_counts() == {VERBS: 2, TCP: 1, FabricKind.LOCAL: 0}
    assert link_of(a, ANN) is not link_of(a, BEN)
    assert link_of(a, ANN, TCP) is link_of(a, BEN, TCP)
    assert [link_of(a, each).subject for each in (ANN, BEN)] == ["uid:1@a", "uid:2@a"]


async def test_a_link_of_which_no_rail_came_up_is_closed_at_its_far_end(nic_pair: list[NicHost]) -> None:
    a, b = nic_pair

    def refuse() -> None:
        raise ConnectionRefusedError(errno.ECONNREFUSED, "refused")

    with turned_on("tcp.dial", refuse), pytest.raises(errors.NodeUnreachable):
        await a.broker.links.get("b", TCP, ANN)
    async with asyncio.timeout(5):  # well before the far end gives up to wait for its rails
        await eventually(lambda: b.broker.serving.link_counts()[TCP] == 0)


async def test_memory_is_registered_for_whose_it_is(nic_pair: list[NicHost]) -> None:
    a, b = nic_pair
    source, sink = await region(a, MIB), await region(b, MIB, device="bar1")
    assert (await outcome(await start(a, whole(source, sink), subject=ANN))).error is None
    assert a.nic.owners == ["anonymous@a"]
    assert b.nic.owners == ["anonymous@b", "uid:1@a"]  # the region's staging buffer, and the grant's


async def test_over_a_subjects_link_there_is_no_grant_for_another_one(nic_pair: list[NicHost]) -> None:
    a, b = nic_pair
    source, sink = await region(a, 100), await region(b, 100)
    await outcome(await start(a, whole(source, sink), subject=ANN))
    link = link_of(a, ANN)
    for subject in (BEN, ANONYMOUS, ANN.vouched_for("c")):
        with pytest.raises(errors.AccessDenied, match="over a link of uid:1@a"):
            await link.grant(Wanted(sink.name, Rights.WRITE, subject, 0, 100))
    await eventually(lambda: b.broker.serving.grant_count == 0)
    link.release(await link.grant(Wanted(sink.name, Rights.WRITE, ANN, 0, 100)))


async def test_a_node_opens_links_for_its_own_clients_and_those_whose_transfers_it_runs() -> None:
    async with nic_hosts("a", "b", "c") as (a, b, c):
        x, y = await region(b, 100), await region(c, 100)
        request = TransferRequest([whole(x, y)])
        spoken = ANN.vouched_for("a")
        with pytest.raises(errors.AccessDenied, match="no transfer of uid:1@a under way on nodes/b"):
            await c.broker.vouching.check_link("b", spoken)
        with pytest.raises(errors.AccessDenied):
            await a.broker.vouching.check_link("b", spoken)
        with a.broker.vouching.relaying("b", ANN, request):
            await c.broker.vouching.check_link("b", replace(spoken, groups=()))
            await a.broker.vouching.check_link("b", spoken)
            for subject, node in ((BEN.vouched_for("a"), "b"), (spoken, "c")):
                with pytest.raises(errors.AccessDenied):
                    await a.broker.vouching.check_link(node, subject)
        await c.broker.vouching.check_link("a", spoken)
        relayed = await start(a, whole(x, y), subject=ANN)
        assert (await outcome(relayed)).error is None
        link = b.broker.links.kept("c", VERBS, spoken)
        assert link is not None
        assert link.subject == "uid:1@a"


async def test_a_link_names_a_subject_where_its_fabric_separates_them_and_keeps_it(nic_pair: list[NicHost]) -> None:
    a, b = nic_pair
    with pytest.raises(errors.FabricUnavailable, match="name the subject"):
        b.broker.serving.open_link("a", LinkAttributes(VERBS, 1))
    with pytest.raises(errors.FabricUnavailable, match="for all"):
        b.broker.serving.open_link("a", LinkAttributes(TCP, 1, subject="uid:1@a"))
    source, sink = await region(a, 100), await region(b, 100)
    await outcome(await start(a, whole(source, sink), subject=ANN))
    again = LinkAttributes(VERBS, 1, link_of(a, ANN)._link_id, subject="uid:2@a")
    with pytest.raises(errors.LinkNotFound):
        b.broker.serving.open_link("a", again)


async def test_the_link_that_was_idle_longest_makes_room(
    nic_pair: list[NicHost], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(link_table, "MAX_LINKS_TO_NODE", 2)
    a, b = nic_pair
    source, sink = await region(a, 100), await region(b, 100)
    for number in (1, 2, 3):
        await outcome(await start(a, whole(source, sink), subject=Subject(f"uid:{number}")))
    assert a.broker.links.kept("b", VERBS, Subject("uid:1")) is None
    await eventually(lambda: b.broker.serving.link_counts()[VERBS] == 2)


async def test_whoever_finds_all_links_in_use_goes_by_tcp(
    nic_pair: list[NicHost], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(link_table, "MAX_LINKS_TO_NODE", 1)
    a, b = nic_pair
    source, sink, other = await region(a, 100), await region(b, 100), await region(b, 100)
    a.nic.hold = True
    first = await start(a, whole(source, sink), subject=ANN)
    await eventually(lambda: a.nic.held == 1)
    facts = await outcome(await start(a, whole(source, other), subject=BEN))
    assert (facts.fabric, facts.error) == (TCP, None)
    assert "1 links to nodes/b over verbs, its limit" in facts.fabric_why
    error = await failure(await start(a, whole(source, other), subject=BEN, fabric=VERBS))
    assert type(error) is errors.LimitReached
    a.nic.let_go()
    assert (await outcome(first)).error is None
    assert a.broker.links.detours.why(other.name, VERBS, BEN) is not None
    assert a.broker.links.detours.why(other.name, VERBS, ANN) is None, "it is no reason for anybody else"


async def test_a_node_has_so_many_links_to_another_one(
    nic_pair: list[NicHost], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(accepted, "MAX_LINKS_OF_NODE", 2)
    _, b = nic_pair
    for number in (1, 2):
        b.broker.serving.open_link("a", LinkAttributes(VERBS, 1, subject=f"uid:{number}@a"))
    with pytest.raises(errors.LimitReached, match="nodes/a has 2 links to this node open"):
        b.broker.serving.open_link("a", LinkAttributes(VERBS, 1, subject="uid:3@a"))
    b.broker.serving.open_link("c", LinkAttributes(VERBS, 1, subject="uid:3@c"))


async def test_links_of_subjects_share_one_window_and_one_order_of_turns(nic_pair: list[NicHost]) -> None:
    a, b = nic_pair
    source, sink = await region(a, 48 * MIB), await region(b, 48 * MIB)
    half = 24 * MIB
    a.nic.hold = True
    first = await start(a, columns(source.name, sink.name, (0,), (0,), (half,)), subject=ANN)
    window, size = a.nic.limits.window_bytes, a.nic.limits.slice_bytes
    await eventually(lambda: a.nic.held == window // size)
    second = await start(a, columns(source.name, sink.name, (half,), (half,), (half,)), subject=BEN)
    await eventually(lambda: a.broker.links.kept("b", VERBS, BEN) is not None and a.broker.links.grant_count == 2)
    ann, ben = a.nic.links
    assert (len(ann.held), len(ben.held)) == (window // size, 0), "the window is full, whoever's link it is"
    ann.let_go(window // size)
    await eventually(lambda: (len(ann.held), len(ben.held)) == (2, 2))
    a.nic.let_go()
    for each in (first, second):
        assert (await outcome(each)).error is None


@pytest.mark.parametrize("kind", [VERBS, TCP])
async def test_what_waits_for_its_rate_learns_at_once_that_its_link_is_down(
    nic_pair: list[NicHost], kind: FabricKind
) -> None:
    a, b = nic_pair
    source, sink = await region(a, 3 * MIB), await region(b, 3 * MIB)
    await a.broker.go_by(policy(EVERYTHING + tenant("team", "uid:1 uid:2", "bytes_per_second = '1MiB'")))
    await outcome(await start(a, columns(source.name, sink.name, (0,), (0,), (9,)), fabric=kind, subject=BEN))
    a.broker.tenants.spend(ANN, 1000 * MIB)
    waiting = [await start(a, whole(source, sink), fabric=kind, subject=subject) for subject in (ANN, BEN)]
    await eventually(lambda: any(each.is_waiting for each in a.broker.links._traffic.values()))
    link = link_of(a, BEN, kind)
    link.down(LinkEnd.BROKEN, "a test said so")
    await eventually(lambda: a.broker.links.kept("b", kind, BEN) not in (None, link))
    for each in waiting:
        await a.broker.cancel_transfer(ANN if each.subject == ANN else BEN, each.facts.name)
        assert each.facts.state is State.CANCELLED


async def test_a_link_that_memory_is_made_ready_for_is_in_use(
    nic_pair: list[NicHost], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(link_table, "MAX_LINKS_TO_NODE", 1)
    a, b = nic_pair
    source, sink, other = await region(a, 100), await region(b, 100), await region(b, 100)
    await outcome(await start(a, whole(source, sink), subject=ANN))
    link, ready = link_of(a, ANN), asyncio.Event()
    inner = link._link
    assert inner is not None
    prepare = inner.prepare
    waiting = 0

    async def slow(memory: Memory, offset: int, length: int) -> None:
        nonlocal waiting
        waiting += 1
        await ready.wait()
        await prepare(memory, offset, length)

    monkeypatch.setattr(inner, "prepare", slow)
    first = await start(a, whole(source, sink), subject=ANN)
    await eventually(lambda: waiting == 1)
    assert (await outcome(await start(a, whole(source, other), subject=BEN))).fabric is TCP
    assert link_of(a, ANN) is link
    ready.set()
    facts = await outcome(first)
    assert (facts.fabric, facts.error) == (VERBS, None)
    assert link_of(a, ANN) is link
