"""Node to node over mTLS: who is let in, and as which node."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc
import pytest

import peermem
from peermem import errors
from peermem.core.names import ChildName
from peermem.core.types import FabricKind, LinkAttributes
from peermem.fabric.base import LinkEnd
from peermem.fabric.tcp import TcpFabric
from peermem.v1 import (
    link_pb2,
    link_pb2_grpc,
    node_pb2,
    node_pb2_grpc,
    region_pb2,
    region_pb2_grpc,
    transfer_pb2,
    transfer_pb2_grpc,
)
from peermem.wire import error_from_proto
from peermem.wire_links import opened_from_proto
from tests.certificates import HOUR, NOW, Authority, Certificate
from tests.fabric.support import Recorder, eventually
from tests.trusting import Node, caller, fault, nodes

AUTHORITY = Authority()
OTHER = Authority("another authority")
JOB = AUTHORITY.issue("spiffe://example.org/job/7")
MIB = 1 << 20
OFFER = LinkAttributes(FabricKind.TCP, 1)
X = ChildName("a", "regions", "x")


@pytest.fixture
async def a(tmp_path: Path) -> AsyncIterator[Node]:
    async with nodes(tmp_path, ("a",), AUTHORITY) as (node,):
        yield node


async def ask(channel: grpc.aio.Channel) -> node_pb2.Node:
    stub: node_pb2_grpc.NodeServiceAsyncStub = node_pb2_grpc.NodeServiceStub(channel)
    return await stub.GetNode(node_pb2.GetNodeRequest(), timeout=5)


async def ask_on(channel: grpc.aio.Channel) -> None:
    """Ask until it is refused."""
    async with asyncio.timeout(20):
        while True:
            await ask(channel)


Call = Callable[[grpc.aio.Channel], Awaitable[object]]


async def refused(node: Node, shown: Certificate | None, call: Call = ask) -> errors.PeermemError:
    """Return why a call of who shows this is refused."""
    async with caller(node, shown) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call(channel)
        return fault(caught.value)


@pytest.mark.parametrize(
    "shown",
    [
        pytest.param(None, id="missing"),
        pytest.param(AUTHORITY.issue("spiffe://example.org/x", begin=NOW - 2 * HOUR, end=NOW - HOUR), id="expired"),
        pytest.param(AUTHORITY.issue("spiffe://example.org/x", begin=NOW + HOUR), id="not yet valid"),
        pytest.param(OTHER.node("b"), id="another authority"),
    ],
)
async def test_a_certificate_that_does_not_count_gets_no_connection(a: Node, shown: Certificate | None) -> None:
    assert isinstance(await refused(a, shown), errors.NodeUnreachable)


@pytest.mark.parametrize("ids", [(), ("spiffe://example.org/x", "spiffe://example.org/y"), ("https://example.org/x",)])
async def test_a_certificate_without_a_single_spiffe_id_is_nobodys(a: Node, ids: tuple[str, ...]) -> None:
    assert isinstance(await refused(a, AUTHORITY.issue(*ids)), errors.Unauthenticated)


async def test_a_remote_job_is_its_spiffe_id_and_owns_what_it_makes(a: Node) -> None:
    async with caller(a, JOB) as channel:
        regions: region_pb2_grpc.RegionServiceAsyncStub = region_pb2_grpc.RegionServiceStub(channel)
        made = await regions.CreateRegion(region_pb2.CreateRegionRequest(device="bar0", length=1))
        assert made.owner == "spiffe://example.org/job/7"
    another = AUTHORITY.issue("spiffe://example.org/job/8")

    async def delete(channel: grpc.aio.Channel) -> None:
        stub: region_pb2_grpc.RegionServiceAsyncStub = region_pb2_grpc.RegionServiceStub(channel)
        await stub.DeleteRegion(region_pb2.DeleteRegionRequest(name=made.name))

    assert isinstance(await refused(a, another, delete), errors.AccessDenied)


async def open_link(channel: grpc.aio.Channel, node: str = "b", subject: str = "") -> link_pb2.OpenLinkResponse:
    stub: link_pb2_grpc.LinkServiceAsyncStub = link_pb2_grpc.LinkServiceStub(channel)
    fabric = transfer_pb2.FABRIC_VERBS if subject else transfer_pb2.FABRIC_TCP
    request = link_pb2.OpenLinkRequest(node=f"nodes/{node}", fabric=fabric, rails=1, subject=subject)
    return await stub.OpenLink(request, timeout=5)


async def speak(channel: grpc.aio.Channel, subject: str = "uid:0@b") -> None:
    stub: transfer_pb2_grpc.TransferServiceAsyncStub = transfer_pb2_grpc.TransferServiceStub(channel)
    request = transfer_pb2.CancelTransferRequest(name="nodes/a/transfers/none")
    await stub.CancelTransfer(request, timeout=5, metadata=(("peermem-on-behalf-of", subject),))


async def test_only_a_node_opens_links_and_speaks_of_clients(a: Node) -> None:
    for call in (open_link, speak):
        assert isinstance(await refused(a, JOB, call), errors.AccessDenied)
    async with grpc.aio.insecure_channel(a.target) as channel:
        for call in (open_link, speak):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await call(channel)
            assert isinstance(fault(caught.value), errors.AccessDenied), "the unix socket is for local jobs"


async def test_a_node_is_the_one_that_its_certificate_says(a: Node) -> None:
    b = AUTHORITY.node("b")
    async with caller(a, b) as channel:
        assert (await open_link(channel)).link_id
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await speak(channel)
        assert isinstance(fault(caught.value), errors.TransferNotFound), "it was let in"
    assert (
        "its certificate that it is nodes/b" in (await refused(a, b, lambda channel: open_link(channel, "c"))).message
    )
    told = await refused(a, b, lambda channel: speak(channel, "uid:0@c"))
    assert (type(told), told.metadata["subject"]) == (errors.AccessDenied, "uid:0@c")


def wanted_by(subject: str, link: link_pb2.OpenLinkResponse) -> link_pb2.AcquireGrant:
    return link_pb2.AcquireGrant(
        link_id=link.link_id, epoch=link.epoch, region=str(X), right=link_pb2.RIGHT_READ, subject=subject, length=1
    )


async def answered(stub: link_pb2_grpc.LinkServiceAsyncStub, question: link_pb2.GrantQuestion) -> errors.PeermemError:
    """Return the error that a question is answered with, on an exchange of its own."""
    exchange = stub.ExchangeGrants()
    error = await answered_on(exchange, question)
    exchange.cancel()
    return error


async def answered_on(exchange: Any, question: link_pb2.GrantQuestion) -> errors.PeermemError:
    question.number = 1
    await exchange.write(link_pb2.ExchangeGrantsRequest(questions=[question]))
    (answer,) = (await exchange.read()).answers
    return error_from_proto(answer.error)


async def test_a_link_is_only_of_the_node_that_opened_it(a: Node) -> None:
    async with caller(a, AUTHORITY.node("b")) as channel:
        link = await open_link(channel)
    async with caller(a, AUTHORITY.node("c")) as channel:
        stub: link_pb2_grpc.LinkServiceAsyncStub = link_pb2_grpc.LinkServiceStub(channel)
        release = link_pb2.ReleaseGrants(link_id=link.link_id)
        for question in (
            link_pb2.GrantQuestion(acquire=wanted_by("uid:7@c", link)),
            link_pb2.GrantQuestion(release=release),
        ):
            assert isinstance(await answered(stub, question), errors.AccessDenied)
        for call in (
            lambda: stub.Flush(link_pb2.FlushRequest(link_id=link.link_id)),
            lambda: stub.Checksum(link_pb2.ChecksumRequest(link_id=link.link_id)),
            lambda: stub.CloseLink(link_pb2.CloseLinkRequest(link_id=link.link_id)),
        ):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await call()
            assert isinstance(fault(caught.value), errors.AccessDenied)


async def test_a_node_speaks_of_anothers_client_only_while_that_one_has_it_work_for_it(a: Node) -> None:
    async with caller(a, AUTHORITY.node("b")) as channel:
        link = await open_link(channel)
        stub: link_pb2_grpc.LinkServiceAsyncStub = link_pb2_grpc.LinkServiceStub(channel)
        for subject, wanted in (("uid:7@a", errors.AccessDenied), ("uid:7@nowhere", errors.NodeNotFound)):
            question = link_pb2.GrantQuestion(acquire=wanted_by(subject, link))
            assert isinstance(await answered(stub, question), wanted)


@pytest.mark.parametrize(
    ("subject", "fault_of_it"),
    [
        ("uid:7@b", errors.FabricUnavailable),  # it may: only that there is no NIC here
        ("uid:7@a", errors.AccessDenied),
        ("uid:7@nowhere", errors.NodeNotFound),
        ("uid:7", errors.InvalidField),
    ],
)
async def test_a_node_opens_links_for_those_only_of_whom_it_may_speak(
    a: Node, subject: str, fault_of_it: type[errors.PeermemError]
) -> None:
    told = await refused(a, AUTHORITY.node("b"), lambda channel: open_link(channel, subject=subject))
    assert type(told) is fault_of_it


async def test_a_certificate_that_is_denied_gets_no_more_grants_on_an_exchange_that_there_is(a: Node) -> None:
    node = AUTHORITY.node("b")
    async with caller(a, node) as channel:
        link = await open_link(channel)
        exchange = link_pb2_grpc.LinkServiceStub(channel).ExchangeGrants()
        question = link_pb2.GrantQuestion(acquire=wanted_by("uid:7@b", link))
        assert isinstance(await answered_on(exchange, question), errors.RegionNotFound)
        a.denied.write_text(f"{node.fingerprint}\n")
        async with asyncio.timeout(20):
            while isinstance(error := await answered_on(exchange, question), errors.RegionNotFound):
                pass
        assert isinstance(error, errors.Unauthenticated)
        exchange.cancel()


async def test_a_link_whose_certificate_is_denied_is_closed_when_it_asks_on_its_rails(a: Node) -> None:
    node = AUTHORITY.node("b")
    async with caller(a, node) as channel:
        link = await open_link(channel)
        tcp = TcpFabric("127.0.0.1:0")
        events = Recorder()

        async def exchange(offer: LinkAttributes) -> LinkAttributes:
            return opened_from_proto(FabricKind.TCP, link)

        rails = await tcp.connect(exchange, events)
        message = link_pb2.ExchangeGrantsRequest(
            questions=[link_pb2.GrantQuestion(number=1, acquire=wanted_by("uid:7@b", link))]
        ).SerializeToString()
        assert rails.carry(message)
        await eventually(lambda: events.messages != [])
        (answer,) = link_pb2.ExchangeGrantsResponse.FromString(events.messages[0]).answers
        assert isinstance(error_from_proto(answer.error), errors.RegionNotFound)
        a.denied.write_text(f"{node.fingerprint}\n")
        await eventually(lambda: not rails.carry(message))
        assert events.ends == [LinkEnd.REMOTE_CLOSED]
        await tcp.close()


async def test_a_certificate_that_is_denied_counts_no_more_also_on_a_connection_that_there_is(a: Node) -> None:
    async with caller(a, JOB) as channel:
        await ask(channel)
        a.denied.write_text(f"{JOB.fingerprint}\n")
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await ask_on(channel)
        told = fault(caught.value)
        assert (type(told), told.metadata["subject"]) == (errors.Unauthenticated, "spiffe://example.org/job/7")


async def test_transfers_cross_whoever_orders_them(tmp_path: Path) -> None:
    async with (
        nodes(tmp_path, ("a", "b", "c"), AUTHORITY) as (a, b, c),
        await peermem.aio.connect(a.target) as at_a,
        await peermem.aio.connect(b.target) as at_b,
        await peermem.aio.connect(c.target) as at_c,
    ):
        source = await at_a.create_region(device="bar0", length=MIB)
        sink = await at_b.create_region(device="bar0", length=MIB)
        back = await at_a.create_region(device="bar0", length=MIB)
        await source.write(b"x" * MIB)
        for node, here, there in ((at_c, source, sink), (at_b, sink, back)):
            transfer = await node.transfer(here, there, checksum=True)
            await transfer.wait(20)
        assert await back.read() == b"x" * MIB
