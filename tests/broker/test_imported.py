"""Transfers from, to and between regions that NICs reach by their dma-buf and the CPU only by copies."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack

import pytest

from peermem.broker.broker import Broker
from peermem.core.transfer import State
from peermem.core.types import FabricKind, Path
from peermem.fabric.tcp import TcpFabric
from tests.broker.support import content, outcome, region, start, whole
from tests.doubles import MIB, Host
from tests.reach_doubles import ImportedDevice, NicFabric

LENGTH = 3 * MIB + 4099
DATA = random.Random(5).randbytes(LENGTH)


class GpuHost(Host):
    """A broker that also has the NIC port nic0/1, and gpu0, which has dma-bufs."""

    def __init__(self, node: str, brokers: dict[str, Broker]) -> None:
        self.nic = NicFabric(
            TcpFabric("127.0.0.1:0", on_link_lost=lambda link_id: brokers[node].serving.link_lost(link_id))
        )
        self.imported = ImportedDevice("gpu0", 64 * MIB)
        super().__init__(node, brokers, {}, self.nic, {"gpu0": self.imported})


@pytest.fixture
async def pair() -> AsyncIterator[list[GpuHost]]:
    brokers: dict[str, Broker] = {}
    made = [GpuHost(node, brokers) for node in ("a", "b")]
    async with AsyncExitStack() as stack:
        for host in made:
            await host.open(stack)
        yield made
    for host in made:
        assert host.imported.available == host.imported.size
        assert host.nic.registered == []


@pytest.mark.parametrize("pull", [False, True])
async def test_nics_reach_it_and_what_they_wrote_is_flushed(pair: list[GpuHost], pull: bool) -> None:
    a, b = pair
    source = await region(a, LENGTH, data=DATA, device="gpu0")
    sink = await region(b, LENGTH, device="gpu0")
    assert (source.path, source.facts.nics) == (Path.DMABUF, ("nic0/1",))
    copies = a.imported.copies + b.imported.copies
    facts = await outcome(await start(b if pull else a, whole(source, sink)))
    assert (facts.state, facts.fabric, facts.path) == (State.SUCCEEDED, FabricKind.VERBS, Path.DMABUF)
    assert a.imported.copies + b.imported.copies == copies
    assert (a.imported.flushes, b.imported.flushes) == (0, 1)
    assert await content(b, sink) == DATA


@pytest.mark.parametrize("pull", [False, True])
@pytest.mark.parametrize(("here", "there"), [("gpu0", "gpu0"), ("gpu0", "bar0"), ("bar0", "gpu0")])
async def test_over_tcp_it_is_staged(pair: list[GpuHost], pull: bool, here: str, there: str) -> None:
    a, b = pair
    source, sink = await region(a, LENGTH, data=DATA, device=here), await region(b, LENGTH, device=there)
    transfer = await start(b if pull else a, whole(source, sink), fabric=FabricKind.TCP, checksum=True)
    facts = await outcome(transfer)
    assert (facts.state, facts.fabric, facts.path) == (State.SUCCEEDED, FabricKind.TCP, Path.STAGED)
    assert b.imported.flushes == 0
    assert await content(b, sink) == DATA


async def test_inside_a_node_it_is_staged(pair: list[GpuHost]) -> None:
    a, _ = pair
    source, sink = await region(a, LENGTH, data=DATA, device="gpu0"), await region(a, LENGTH, device="gpu0")
    facts = await outcome(await start(a, whole(source, sink), checksum=True))
    assert (facts.state, facts.fabric, facts.path) == (State.SUCCEEDED, FabricKind.LOCAL, Path.STAGED)
    assert a.imported.flushes == 0
    assert await content(a, sink) == DATA


async def test_where_no_nic_imports_it_it_is_staged_and_says_why(pair: list[GpuHost]) -> None:
    a, b = pair
    a.nic.unreachable.add(Path.DMABUF)
    source, sink = await region(a, LENGTH, data=DATA, device="gpu0"), await region(b, LENGTH)
    assert source.path is Path.STAGED
    assert "No better path works" in source.why
    facts = await outcome(await start(a, whole(source, sink), checksum=True))
    assert (facts.state, facts.fabric, facts.path) == (State.SUCCEEDED, FabricKind.VERBS, Path.STAGED)
