"""Two brokers with real fabrics in one process."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager

import pytest

from peermem.broker.broker import Broker
from peermem.fabric.tcp import TcpFabric
from tests.doubles import MIB, Host
from tests.reach_doubles import NicFabric, OnDemandDevice, StagedDevice


@asynccontextmanager
async def hosts(*nodes: str, **settings: float) -> AsyncIterator[list[Host]]:
    """Run brokers that know each other, and check that they leave nothing behind."""
    brokers: dict[str, Broker] = {}
    made = [Host(node, brokers, settings) for node in nodes]
    async with _running(made):
        yield made


class NicHost(Host):
    """A broker that also has the NIC port nic0/1, the staged device bar1, and bar2, which NICs reach on demand."""

    def __init__(self, node: str, brokers: dict[str, Broker], settings: Mapping[str, float]) -> None:
        self.nic = NicFabric(
            TcpFabric("127.0.0.1:0", on_link_lost=lambda link_id: brokers[node].serving.link_lost(link_id))
        )
        self.staged = StagedDevice("bar1", 64 * MIB)
        self.on_demand = OnDemandDevice("bar2", 64 * MIB)
        super().__init__(node, brokers, settings, self.nic, {"bar1": self.staged, "bar2": self.on_demand})


@asynccontextmanager
async def nic_hosts(*nodes: str, **settings: float) -> AsyncIterator[list[NicHost]]:
    """Run brokers with NICs, and check that they leave nothing behind."""
    brokers: dict[str, Broker] = {}
    made = [NicHost(node, brokers, settings) for node in nodes]
    async with _running(made):
        yield made
    for host in made:
        assert host.staged.available == host.staged.size
        assert host.on_demand.available == host.on_demand.size
        assert host.nic.registered == []


@asynccontextmanager
async def _running(made: Sequence[Host]) -> AsyncIterator[None]:
    async with AsyncExitStack() as stack:
        for host in made:
            await host.open(stack)
        yield
    for host in made:
        assert host.device.available == host.device.size
        assert host.broker.serving.grant_count == 0
        assert host.broker.transfers.running_count == 0
        assert len(host.broker.regions) == 0


@pytest.fixture
async def pair() -> AsyncIterator[list[Host]]:
    async with hosts("a", "b") as made:
        yield made


@pytest.fixture
async def nic_pair() -> AsyncIterator[list[NicHost]]:
    async with nic_hosts("a", "b") as made:
        yield made
