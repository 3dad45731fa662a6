"""Connections that are slow, silent, or too many, before and after anybody has shown who it is."""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import AsyncIterator
from contextlib import ExitStack
from pathlib import Path

import grpc
import pytest

from peermem import errors
from peermem.config_values import Wait
from peermem.credentials.trial import context_of
from peermem.v1 import node_pb2, node_pb2_grpc, region_pb2, region_pb2_grpc
from tests.certificates import Authority
from tests.trusting import Node, caller, fault, nodes

AUTHORITY = Authority()
JOB = AUTHORITY.issue("spiffe://example.org/job/7")
CONNECTIONS = 8
MIB = 1 << 20


@pytest.fixture
async def a(tmp_path: Path) -> AsyncIterator[Node]:
    limits = {"handshake_timeout": Wait("500ms"), "max_connections": CONNECTIONS}
    async with nodes(tmp_path, ("a",), AUTHORITY, limits=limits) as (node,):
        yield node


def connect(node: Node) -> socket.socket:
    host, _, port = node.address.rpartition(":")
    return socket.create_connection((host, int(port)), timeout=20)


def half_a_hello() -> bytes:
    outgoing = ssl.MemoryBIO()
    connection = context_of(JOB.pair, ssl.PROTOCOL_TLS_CLIENT).wrap_bio(ssl.MemoryBIO(), outgoing)
    with pytest.raises(ssl.SSLWantReadError):
        connection.do_handshake()
    hello = outgoing.read()
    return hello[: len(hello) // 2]


def ends(connection: socket.socket) -> bool:
    """Wait until the daemon has ended a connection; what it says before does not matter."""
    try:
        while connection.recv(4096):
            pass
    except ConnectionResetError:
        pass
    return True


async def answers(node: Node, count: int = 1) -> None:
    """Ask the daemon as an honest job does, over TLS."""
    async with caller(node, JOB) as channel:
        stub: node_pb2_grpc.NodeServiceAsyncStub = node_pb2_grpc.NodeServiceStub(channel)
        for _ in range(count):
            await stub.GetNode(node_pb2.GetNodeRequest(), timeout=10)


@pytest.mark.parametrize("says", ["nothing", "half a hello", "nonsense"])
async def test_a_handshake_that_does_not_end_is_ended(a: Node, says: str) -> None:
    data = {"nothing": b"", "half a hello": half_a_hello(), "nonsense": b"GET / HTTP/1.1\r\n\r\n"}[says]
    with connect(a) as silent:
        silent.sendall(data)
        await answers(a)
        assert await asyncio.to_thread(ends, silent)


async def test_who_is_silent_after_the_handshake_is_dropped(a: Node) -> None:
    context = context_of(JOB.pair, ssl.PROTOCOL_TLS_CLIENT)

    def be_silent() -> bool:
        with connect(a) as plain, context.wrap_socket(plain, server_hostname="peermem.test") as silent:
            return ends(silent)

    assert await asyncio.to_thread(be_silent)


async def test_a_flood_of_connections_is_cut_and_hurts_no_other_door(a: Node) -> None:
    with ExitStack() as flood:
        flooding = [flood.enter_context(connect(a)) for _ in range(4 * CONNECTIONS)]
        async with grpc.aio.insecure_channel(a.target) as channel:
            local: node_pb2_grpc.NodeServiceAsyncStub = node_pb2_grpc.NodeServiceStub(channel)
            for _ in range(20):
                await local.GetNode(node_pb2.GetNodeRequest(), timeout=10)
        assert all(await asyncio.gather(*(asyncio.to_thread(ends, each) for each in flooding)))
    await answers(a)


async def test_connections_beyond_the_limit_are_refused_until_others_end(a: Node) -> None:
    async def ask(channel: grpc.aio.Channel) -> None:
        stub: node_pb2_grpc.NodeServiceAsyncStub = node_pb2_grpc.NodeServiceStub(channel)
        await stub.GetNode(node_pb2.GetNodeRequest(), timeout=10)

    open_ones = [caller(a, JOB) for _ in range(CONNECTIONS)]
    channels = [await each.__aenter__() for each in open_ones]
    for channel in channels:
        await ask(channel)
    async with caller(a, JOB) as late:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await ask(late)
        assert isinstance(fault(caught.value), errors.NodeUnreachable)
    for channel in channels:
        await ask(channel)
    for each in open_ones:
        await each.__aexit__(None, None, None)
    async with asyncio.timeout(20):
        while not await got_in(a):
            pass


async def got_in(node: Node) -> bool:
    try:
        await answers(node)
    except grpc.aio.AioRpcError:
        return False
    return True


async def test_readers_that_do_not_read_cost_a_bounded_buffer_and_hurt_nobody(a: Node) -> None:
    async with caller(a, JOB) as channel:
        stub: region_pb2_grpc.RegionServiceAsyncStub = region_pb2_grpc.RegionServiceStub(channel)
        made = await stub.CreateRegion(region_pb2.CreateRegionRequest(device="bar0", length=32 * MIB))
        streams = [stub.ReadRegion(region_pb2.ReadRegionRequest(name=made.name)) for _ in range(20)]
        for stream in streams:
            assert await stream.read() != grpc.aio.EOF
        await answers(a, count=20)
        await stub.DeleteRegion(region_pb2.DeleteRegionRequest(name=made.name, force=True), timeout=10)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await read_on(streams[0])
        assert isinstance(fault(caught.value), errors.RegionDeleted)
        for stream in streams:
            stream.cancel()


async def read_on(
    stream: grpc.aio.UnaryStreamCall[region_pb2.ReadRegionRequest, region_pb2.ReadRegionResponse],
) -> None:
    while await stream.read() != grpc.aio.EOF:
        pass


async def test_a_connection_does_not_outlive_what_it_was_let_in_by(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("peermem.api.server._AGE", 0.5)
    async with nodes(tmp_path, ("a",), AUTHORITY) as (a,), caller(a, JOB) as channel:
        stub: node_pb2_grpc.NodeServiceAsyncStub = node_pb2_grpc.NodeServiceStub(channel)
        await stub.GetNode(node_pb2.GetNodeRequest(), timeout=10)
        Authority("another authority").node("a").write(a.files)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await ask_on(stub)
        assert isinstance(fault(caught.value), errors.NodeUnreachable), "it would have to connect again, and can't"


async def ask_on(stub: node_pb2_grpc.NodeServiceAsyncStub) -> None:
    async with asyncio.timeout(20):
        while True:
            await stub.GetNode(node_pb2.GetNodeRequest(), timeout=10)
