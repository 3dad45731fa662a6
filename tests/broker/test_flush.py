"""Transfers into memory whose device sees what was written only after a flush."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING

import pytest

from peermem.broker.broker import Broker
from peermem.core import errors
from peermem.core.grant import Wanted
from peermem.core.identity import ANONYMOUS
from peermem.core.region import State as RegionState
from peermem.core.transfer import State
from peermem.core.types import FabricKind, Rights
from peermem.device.base import Device, DeviceMemory
from peermem.device.memfd import MemfdDevice
from peermem.device.plain import PlainMemory
from tests.broker.support import content, eventually, failure, outcome, region, start, whole
from tests.doubles import MIB, Host

DATA = bytes(range(256)) * (2 * MIB // 256)


class HiddenMemory(PlainMemory):
    """Memory of a device that sees what it held at the last flush."""

    needs_flush = True
    copier = None

    def __init__(self, inner: DeviceMemory, device: HiddenDevice) -> None:
        self.length, self.fd = inner.length, inner.fd
        self.view, self.share, self.close = inner.view, inner.share, inner.close
        self.device = device

    async def flush(self) -> None:
        self.device.flushes += 1
        if self.device.gate is not None:
            await self.device.gate.wait()
        if self.device.refusal is not None:
            raise self.device.refusal
        self.device.seen = bytes(self.view())


class HiddenDevice(MemfdDevice):
    def __init__(self, name: str, size: int) -> None:
        super().__init__(name, size)
        self.flushes = 0
        self.seen = b""
        self.gate: asyncio.Event | None = None
        self.refusal: errors.PeermemError | None = None

    async def allocate(self, length: int) -> DeviceMemory:
        return HiddenMemory(await super().allocate(length), self)


class HiddenHost(Host):
    def __init__(self, node: str, brokers: dict[str, Broker]) -> None:
        self.hidden = HiddenDevice("gpu0", 16 * MIB)
        super().__init__(node, brokers, {}, None, {"gpu0": self.hidden})


@pytest.fixture
async def pair() -> AsyncIterator[list[HiddenHost]]:
    brokers: dict[str, Broker] = {}
    made = [HiddenHost(node, brokers) for node in ("a", "b")]
    async with AsyncExitStack() as stack:
        for host in made:
            await host.open(stack)
        yield made
    for host in made:
        assert host.hidden.available == host.hidden.size


@pytest.mark.parametrize("way", ["push", "pull", "local"])
@pytest.mark.parametrize("checksum", [False, True])
async def test_success_is_told_when_the_device_sees_the_bytes(pair: list[HiddenHost], way: str, checksum: bool) -> None:
    a, b = pair
    here, there = (a, b) if way == "push" else (b, a) if way == "pull" else (a, a)
    source = await region(here, len(DATA), data=DATA)
    sink = await region(there, len(DATA), device="gpu0")
    there.hidden.gate = asyncio.Event()
    transfer = await start(there if way == "pull" else here, whole(source, sink), checksum=checksum)
    await eventually(lambda: there.hidden.flushes == 1)
    assert transfer.facts.state is State.RUNNING
    assert transfer.facts.bytes_done == len(DATA)
    there.hidden.gate.set()
    assert (await outcome(transfer)).state is State.SUCCEEDED
    assert there.hidden.seen == DATA
    assert there.hidden.flushes == 1


async def test_memory_that_needs_no_flush_costs_no_call(pair: list[HiddenHost]) -> None:
    a, b = pair
    source, sink = await region(a, MIB, device="gpu0"), await region(b, MIB)
    assert (await outcome(await start(a, whole(source, sink)))).state is State.SUCCEEDED
    assert (await outcome(await start(b, whole(source, sink)))).state is State.SUCCEEDED
    assert a.hidden.flushes == 0
    assert "flush" not in a.cues.calls + b.cues.calls


@pytest.mark.parametrize("way", ["push", "pull"])
@pytest.mark.parametrize("fault", [errors.RegionRevoked("The GPU was lost."), errors.GpuFailed("It refused.")])
async def test_a_flush_that_fails_fails_the_transfer(
    pair: list[HiddenHost], way: str, fault: errors.PeermemError
) -> None:
    a, b = pair
    source, sink = await region(a, MIB), await region(b, MIB, device="gpu0")
    b.hidden.refusal = fault
    assert await failure(await start(a if way == "push" else b, whole(source, sink))) is fault


async def test_a_far_end_that_does_not_answer(pair: list[HiddenHost]) -> None:
    a, b = pair
    source, sink = await region(a, MIB), await region(b, MIB, device="gpu0")
    a.cues.faults["flush"] = errors.NodeUnreachable("No answer.")
    a.broker.links.retry_for = 0.1
    assert isinstance(await failure(await start(a, whole(source, sink))), errors.NodeUnreachable)


async def test_a_transfer_is_cancelled_while_it_is_flushed(pair: list[HiddenHost]) -> None:
    a, b = pair
    source, sink = await region(a, MIB), await region(b, MIB, device="gpu0")
    b.hidden.gate = asyncio.Event()
    transfer = await start(a, whole(source, sink))
    await eventually(lambda: b.hidden.flushes == 1)
    await a.broker.cancel_transfer(ANONYMOUS, transfer.facts.name)
    assert (await outcome(transfer)).state is State.CANCELLED
    b.hidden.gate.set()
    await b.broker.delete_region(ANONYMOUS, sink.name, force=True)


async def test_a_region_ends_only_when_its_flush_has(pair: list[HiddenHost]) -> None:
    a, b = pair
    source, sink = await region(a, MIB), await region(b, MIB, device="gpu0")
    b.hidden.gate = asyncio.Event()
    transfer = await start(a, whole(source, sink))
    await eventually(lambda: b.hidden.flushes == 1)
    ending = asyncio.create_task(b.broker.delete_region(ANONYMOUS, sink.name, force=True))
    await eventually(lambda: sink.state is RegionState.DRAINING)
    assert not ending.done()
    b.hidden.gate.set()
    await ending
    assert (await outcome(transfer)).state in (State.SUCCEEDED, State.FAILED)


async def test_grants_that_are_nobodys(pair: list[HiddenHost]) -> None:
    a, b = pair
    source, sink = await region(a, MIB, data=DATA[:MIB]), await region(b, MIB, device="gpu0")
    await outcome(await start(a, whole(source, sink)))
    assert await content(b, sink) == DATA[:MIB]
    link = a.broker.links.kept("b", FabricKind.TCP)
    assert link is not None
    held = await link.grant(Wanted(sink.name, Rights.WRITE, ANONYMOUS.vouched_for("a"), 0, MIB))
    for link_id, grant_id in ((b"?" * 16, held.grant_id), (link._link_id, 7)):
        with pytest.raises(errors.GrantRefused):
            await b.broker.serving.flush(link_id, grant_id)


if TYPE_CHECKING:
    _device: type[Device] = HiddenDevice
    _memory: type[DeviceMemory] = HiddenMemory
