"""Node to node over mTLS: who is let in as which node, whom a node believes at the other end, and new certificates."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from structlog.testing import capture_logs

import peermem
from peermem import errors
from peermem.app import App
from peermem.core.grant import Wanted
from peermem.core.identity import Subject
from peermem.core.names import ChildName
from peermem.core.spiffe import Denied, NodePattern
from peermem.core.types import FabricKind, LinkAttributes, Rights
from peermem.credentials.base import Credentials
from peermem.remote.client import GrpcRemotes
from peermem.remote.connection import look
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
from tests.certificates import HOUR, NOW, PATTERN, Authority, Certificate
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


@asynccontextmanager
async def remotes(address: str, shown: Certificate, *denied: str) -> AsyncIterator[GrpcRemotes]:
    """What node a uses to reach others, all of which are at one address."""
    credentials = Credentials("a", NodePattern(PATTERN), shown.pair, Denied(frozenset(denied)))
    made = GrpcRemotes("a", "epoch", lambda node: address, credentials)
    try:
        yield made
    finally:
        await made.close()


@asynccontextmanager
async def impostor(shown: Certificate) -> AsyncIterator[str]:
    """Serve as a node would, with another certificate; it must never see a call."""
    server = grpc.aio.server()

    async def called(request: bytes, context: object) -> bytes:
        raise AssertionError("something was sent to an impostor")

    methods = {name: grpc.unary_unary_rpc_method_handler(called) for name in ("OpenLink", "AcquireGrant")}  # type: ignore[var-annotated]
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("peermem.v1.LinkService", methods),))
    port = server.add_secure_port("127.0.0.1:0", grpc.ssl_server_credentials([(shown.key, shown.pem)]))
    await server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await server.stop(None)


@pytest.mark.parametrize(
    ("shown", "cause"),
    [
        pytest.param(AUTHORITY.node("c"), "its certificate is of spiffe://example.org/peermem/c", id="another node"),
        pytest.param(JOB, "its certificate is of spiffe://example.org/job/7", id="a job"),
        pytest.param(AUTHORITY.issue(), "its certificate is of no SPIFFE ID", id="no ID"),
        pytest.param(OTHER.node("b"), "unable to get local issuer certificate", id="another authority"),
        pytest.param(
            AUTHORITY.issue(PATTERN.format(node="b"), begin=NOW - 2 * HOUR, end=NOW - HOUR), "expired", id="expired"
        ),
        pytest.param(AUTHORITY.issue(PATTERN.format(node="b"), begin=NOW + HOUR), "not yet valid", id="not yet valid"),
        pytest.param(AUTHORITY.issue(PATTERN.format(node="b"), dns=None), "has no DNS name", id="no name"),
    ],
)
async def test_nothing_is_sent_to_what_is_not_the_node(shown: Certificate, cause: str) -> None:
    async with impostor(shown) as address, remotes(address, AUTHORITY.node("a")) as others:
        for call in (
            lambda: others.get("b").open_link(OFFER),
            lambda: others.get("b").acquire_grant(b"x", "e", Wanted(X, Rights.READ, Subject("uid:1"), 0, 1)),
        ):
            with pytest.raises(errors.NodeUnreachable, match=cause) as caught:
                await call()
            assert caught.value.metadata["code"] == "UNAUTHENTICATED"


async def test_nothing_is_sent_to_a_node_whose_certificate_is_denied(tmp_path: Path) -> None:
    async with nodes(tmp_path, ("b",), AUTHORITY) as (b,):
        for denied in (PATTERN.format(node="b"), await shown_at(b)):
            async with remotes(b.address, AUTHORITY.node("a"), denied) as others:
                with pytest.raises(errors.NodeUnreachable, match=r"the list of tls\.denied names its certificate"):
                    await others.get("b").node_facts()


async def test_a_node_that_is_back_with_another_certificate_is_reached_at_once(tmp_path: Path) -> None:
    async with nodes(tmp_path, ("b",), AUTHORITY) as (b,), remotes(b.address, AUTHORITY.node("a")) as others:
        assert b.app is not None
        assert (await others.get("b").node_facts()).node == "b"
        config = b.app.config
        await b.app.stop()
        with pytest.raises(errors.NodeUnreachable) as caught:
            await others.get("b").node_facts()
        assert (caught.value.metadata["code"], caught.value.metadata["listens"]) == ("UNAVAILABLE", "no")
        AUTHORITY.node("b").write(b.files)
        again = App(config)
        await again.start()
        try:
            assert (await others.get("b").node_facts()).node == "b"
        finally:
            await again.stop()


async def shown_at(node: Node, other_than: str = "") -> str:
    """Return the fingerprint of the certificate that a node shows, when it is another one."""
    async with asyncio.timeout(20):
        while (shown := await look(node.address, AUTHORITY.node("z").pair)).fingerprint == other_than:
            pass
    return shown.fingerprint


async def test_new_certificates_count_without_a_restart_and_without_failing_what_runs(tmp_path: Path) -> None:
    async with AsyncExitStack() as stack:
        a, b = await stack.enter_async_context(nodes(tmp_path, ("a", "b"), AUTHORITY))
        at_a, at_b = [await stack.enter_async_context(await peermem.aio.connect(each.target)) for each in (a, b)]
        source = await at_a.create_region(device="bar0", length=32 * MIB)
        sink = await at_b.create_region(device="bar0", length=32 * MIB)
        over = asyncio.Event()
        ended: list[peermem.TransferInfo] = []

        async def keep_on() -> None:
            while not over.is_set():
                transfer = await at_a.transfer(source, sink, checksum=True)
                ended.append(await transfer.wait(20))

        moving = asyncio.create_task(keep_on())
        async with caller(b, AUTHORITY.node("a")) as channel:
            watched: node_pb2_grpc.NodeServiceAsyncStub = node_pb2_grpc.NodeServiceStub(channel)
            running = watched.Preflight(node_pb2.PreflightRequest())
            for _ in range(2):
                before = [await shown_at(node) for node in (a, b)]
                for node in (a, b):
                    AUTHORITY.node(node.name).write(node.files)
                for node, old in zip((a, b), before, strict=True):
                    await shown_at(node, other_than=old)
            assert [verdict async for verdict in running], "a call that began under old certificates goes on"
        count = len(ended)
        while len(ended) < count + 2:
            await asyncio.wait([moving], timeout=0.01)
        over.set()
        await moving
        assert {info.state for info in ended} == {"SUCCEEDED"}


async def test_a_bad_new_certificate_is_refused_and_the_old_one_stays(a: Node) -> None:
    before = await shown_at(a)
    with capture_logs() as logs:
        for bad in (AUTHORITY.node("b"), OTHER.node("a")):
            logs.clear()
            Certificate(bad.pem, bad.key, AUTHORITY).write(a.files)
            async with asyncio.timeout(20):
                while not any(line["event"] == "certificate_refused" for line in logs):
                    assert await shown_at(a) == before
    assert await shown_at(a) == before
