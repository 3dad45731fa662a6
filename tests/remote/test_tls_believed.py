"""Whom a node believes at the other end, and how certificates are replaced while everything runs."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

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
    node_pb2,
    node_pb2_grpc,
)
from tests.certificates import HOUR, NOW, PATTERN, Authority, Certificate
from tests.trusting import Node, caller, nodes

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
