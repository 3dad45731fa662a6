"""NodeService over a real channel, asked by both clients."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path as FilePath

import grpc
import pytest

import peermem
from peermem.client.states import NodeState
from peermem.core.errors import DeviceNotFound, FabricUnavailable, PortDown, ProbeFailed
from peermem.core.node import NodeDevice
from peermem.core.preflight import Check
from peermem.core.types import FabricKind, Path
from peermem.directory.base import GoneNode, NodeEntry
from peermem.v1 import node_pb2, node_pb2_grpc
from tests.broker.conftest import NicHost, hosts, nic_hosts
from tests.directory.cued import CuedDirectory
from tests.doubles import PATIENCE
from tests.serving import PORT, NodeFacts, node_service


@pytest.fixture
async def host() -> AsyncIterator[NicHost]:
    async with nic_hosts("a") as made:
        yield made[0]


@pytest.fixture
async def target(host: NicHost, tmp_path: FilePath) -> AsyncIterator[str]:
    async with node_service(host, tmp_path) as target:
        yield target


@pytest.fixture
async def node(target: str) -> AsyncIterator[peermem.aio.Node]:
    async with await peermem.aio.connect(target, attach=False) as node:
        yield node


async def test_preflight_crosses_the_wire(node: peermem.aio.Node, host: NicHost) -> None:
    verdicts = [verdict async for verdict in node.preflight()]
    assert [verdict.check for verdict in verdicts[: len(Check)]] == [check.value for check in Check]
    assert [verdict.done for verdict in verdicts] == list(range(1, len(verdicts) + 1))
    assert {verdict.total for verdict in verdicts} == {len(verdicts)}
    kernel, nic, last = verdicts[0], verdicts[len(Check)], verdicts[-1]
    assert (kernel.detail, kernel.works, kernel.fabric, kernel.nic) == ("Linux 7.3.4-amd64.", True, None, None)
    assert (nic.nic, nic.device, nic.fabric) == ("nic0/1", None, FabricKind.VERBS)
    assert "a software NIC, for tests" in nic.advice
    assert (last.device, last.nic, last.path, last.works, last.error) == ("bar2", "nic0/1", Path.STAGED, True, None)
    assert last.latency is not None
    assert last.write_bandwidth is not None
    assert last.read_bandwidth is not None
    assert nic.latency is nic.write_bandwidth is nic.read_bandwidth is None


async def test_a_failure_crosses_the_wire(node: peermem.aio.Node, host: NicHost) -> None:
    host.nic.unreachable.add(Path.HOST)
    last = [verdict async for verdict in node.preflight("bar0")][-1]
    assert (last.device, last.works, last.latency) == ("bar0", False, None)
    assert isinstance(last.error, ProbeFailed)


async def test_both_clients_tell_the_same(node: peermem.aio.Node, target: str) -> None:
    def ask() -> list[peermem.Verdict]:
        with peermem.connect(target, attach=False) as sync:
            return list(sync.preflight("bar0"))

    told = await asyncio.to_thread(ask)
    assert told[:-1] == [verdict async for verdict in node.preflight("bar0")][:-1]
    assert told[-1].works


async def test_an_unknown_device(node: peermem.aio.Node) -> None:
    with pytest.raises(DeviceNotFound, match="adopted, bar0, bar1"):
        _ = [verdict async for verdict in node.preflight("bar0", "none")]


async def test_who_has_enough_ends_the_call(node: peermem.aio.Node, host: NicHost) -> None:
    host.staged.gate = asyncio.Event()
    verdicts = node.preflight("bar1")
    for _ in range(len(Check) + 1):
        await anext(verdicts)
    async with asyncio.timeout(PATIENCE):
        while not host.staged.waiting:  # noqa: ASYNC110  what is waited for is not an event
            await asyncio.sleep(0.001)
        await verdicts.aclose()  # type: ignore[attr-defined]
        while host.staged.available != host.staged.size:  # noqa: ASYNC110
            await asyncio.sleep(0.001)


async def test_nics(node: peermem.aio.Node, host: NicHost) -> None:
    (nic,) = await node.nics()
    assert (nic.name, nic.state, nic.rate, nic.numa_node) == ("nic0/1", "ACTIVE", 2_500_000_000, None)
    assert (nic.pci_address, nic.gids, nic.error) == (None, ("::ffff:10.0.0.1",), None)
    host.nic.ports["nic0/1"] = PortDown("The port nic0/1 is not active.")
    (nic,) = await node.nics()
    assert isinstance(nic.error, PortDown)


async def test_a_nic_that_the_daemon_does_not_use(host: NicHost, tmp_path: FilePath) -> None:
    facts = NodeFacts()
    late = replace(PORT, name="nic1/1", pci_address="0000:41:00.0")
    facts.topology = replace(facts.topology, nics={"nic1/1": late})
    async with node_service(host, tmp_path, facts) as target, await peermem.aio.connect(target, attach=False) as node:
        (nic,) = await node.nics()
        assert nic.pci_address == "0000:41:00.0"
        assert isinstance(nic.error, FabricUnavailable)
        assert "restart" in nic.error.message


async def test_a_daemon_that_uses_no_nic(tmp_path: FilePath) -> None:
    async with (
        hosts("a") as (host,),
        node_service(host, tmp_path) as target,
        await peermem.aio.connect(target, attach=False) as node,
    ):
        (nic,) = await node.nics()
        assert isinstance(nic.error, FabricUnavailable)
        assert "configured" in nic.error.message
        last = [verdict async for verdict in node.preflight()][-1]
        assert (last.check, last.works) == ("nics", False)


async def test_devices_say_what_reaches_them(node: peermem.aio.Node) -> None:
    known = {device.name: device for device in await node.devices()}
    assert (known["bar0"].nics, known["bar0"].why) == ((), "No NIC has been tried with it.")
    assert known["bar0"].pci_address is None
    _ = [verdict async for verdict in node.preflight("bar0")]
    known = {device.name: device for device in await node.devices()}
    assert known["bar0"].nics == ("nic0/1",)
    assert known["bar0"].why.startswith("nic0/1 is software only")


async def test_nodes_with_what_the_directory_says_of_them(node: peermem.aio.Node, host: NicHost) -> None:
    device = NodeDevice("gpu0", "cuda", 1 << 36)
    there = NodeEntry("b", "10.0.0.2:7470", "e2", "9.9", (FabricKind.VERBS,), ("mlx5_0/1",), (device,))
    host.broker.directory = directory = CuedDirectory(there)
    directory.left["c"] = GoneNode(NodeEntry("c", "10.0.0.3:7470"), 5.0)
    here, b, c = await node.nodes()
    assert (here.name, here.state, here.state_time, here.nics) == ("nodes/a", NodeState.UP, None, ("nic0/1",))
    assert {each.kind for each in here.devices} >= {"memfd"}
    assert (b.name, b.address, b.epoch, b.version) == ("nodes/b", "10.0.0.2:7470", "e2", "9.9")
    assert (b.fabrics, b.nics, b.state) == ((FabricKind.VERBS,), ("mlx5_0/1",), NodeState.UP)
    assert b.devices == (peermem.NodeDevice("gpu0", "cuda", 1 << 36),)
    assert (c.state, c.links_here_count) == (NodeState.GONE, 0)
    assert c.state_time is not None
    directory.away_for = 30.0
    here, b, c = await node.nodes()
    assert [each.state for each in (here, b, c)] == [NodeState.UP, NodeState.UNCONFIRMED, NodeState.GONE]
    assert b.state_time is not None


async def test_nodes_come_in_pages(target: str, node: peermem.aio.Node, host: NicHost) -> None:
    others = [NodeEntry(f"n{number:04}", "10.0.0.2:7470") for number in range(2500)]
    host.broker.directory = CuedDirectory(*others)
    names = [info.name for info in await node.nodes()]
    assert names == ["nodes/a", *(f"nodes/{other.node}" for other in others)]

    async with grpc.aio.insecure_channel(target) as channel:
        stub = node_pb2_grpc.NodeServiceStub(channel)
        page = await stub.ListNodes(node_pb2.ListNodesRequest(page_size=2, page_token="a"))
        assert ([each.name for each in page.nodes], page.next_page_token) == (["nodes/n0000", "nodes/n0001"], "n0001")
        last = await stub.ListNodes(node_pb2.ListNodesRequest(page_token="n2498"))
        assert ([each.name for each in last.nodes], last.next_page_token) == (["nodes/n2499"], "")
        with pytest.raises(grpc.aio.AioRpcError, match="page_size"):
            await stub.ListNodes(node_pb2.ListNodesRequest(page_size=1001))
