"""What a transfer's grants open, for how long, and that nothing which their holder has opens more."""

from __future__ import annotations

import asyncio
import random
from dataclasses import dataclass, field

import pytest

from peermem.broker.links import OutboundLink
from peermem.broker.serving import Serving
from peermem.broker.tenants import Share
from peermem.broker.traffic import Traffic
from peermem.core import errors
from peermem.core.grant import Wanted
from peermem.core.identity import ANONYMOUS
from peermem.core.segments import columns
from peermem.core.transfer import State
from peermem.core.types import FabricKind, Ranges, RemoteKey, Rights
from peermem.fabric.base import Opcode, Status, WorkRequest
from peermem.memory import HostMemory, Memory
from tests.broker.conftest import hosts
from tests.broker.support import content, eventually, failure, outcome, region, start, whole
from tests.doubles import MIB, CuedFabric, Host

LENGTH = 64 << 10
DATA = random.Random(5).randbytes(LENGTH)


def wanted(serving: Serving) -> list[tuple[Rights, int, int, bool]]:
    """Return what the grants that are alive open."""
    grants = [grant.wanted for grant in serving._grants.values()]
    return sorted((one.right, one.offset, one.length, one.staged) for one in grants)


@pytest.mark.parametrize("way", ["push", "pull"])
async def test_a_grant_opens_the_bytes_between_the_first_and_the_last_of_its_leg(pair: list[Host], way: str) -> None:
    a, b = pair
    source_host, sink_host = (a, b) if way == "push" else (b, a)
    source, sink = await region(source_host, LENGTH, data=DATA), await region(sink_host, LENGTH)
    a.tcp.hold = True
    transfer = await start(a, columns(source.name, sink.name, [900, 3000], [7000, 5000], [50, 60]))
    await eventually(lambda: a.tcp.held == 1)
    far = (Rights.WRITE, 5000, 2050, False) if way == "push" else (Rights.READ, 900, 2160, False)
    assert wanted(b.broker.serving) == [far]
    assert a.broker.links.grant_count == 1
    a.tcp.let_go()
    assert (await outcome(transfer)).state is State.SUCCEEDED
    assert a.broker.links.grant_count == 0
    await eventually(lambda: b.broker.serving.grant_count == 0)
    expected = bytearray(LENGTH)
    expected[7000:7050], expected[5000:5060] = DATA[900:950], DATA[3000:3060]
    assert await content(sink_host, sink) == expected


async def test_checksums_and_staged_copies_count_from_the_grants_first_byte(nic_pair: list[Host]) -> None:
    a, b = nic_pair
    source, sink = await region(a, LENGTH, data=DATA, device="bar1"), await region(b, LENGTH, device="bar1")
    for offset in (0, 4096, 12_345):
        entry = columns(source.name, sink.name, [100, 9000], [offset + 9000, offset], [700, 800])
        facts = await outcome(await start(a, entry, checksum=True))
        assert (facts.state, facts.error) == (State.SUCCEEDED, None)
        there = await content(b, sink)
        assert there[offset + 9000 : offset + 9700] + there[offset : offset + 800] == DATA[100:800] + DATA[9000:9800]


@dataclass(eq=False)
class Thief:
    """Posts one request with a key that it has from a transfer, over the link of that transfer."""

    share: Share
    opcode: Opcode
    memory: Memory
    key: RemoteKey
    ranges: Ranges
    ended: asyncio.Event = field(default_factory=asyncio.Event)
    status: Status | None = None
    posted: bool = False

    def next_request(self, wr_id: int) -> WorkRequest | None:
        if self.posted:
            return None
        self.posted = True
        return WorkRequest(wr_id, self.opcode, self.memory, self.key, self.ranges)

    def completed(self, request: WorkRequest, status: Status) -> None:
        self.status = status
        self.ended.set()


async def stolen(host: Host, link: OutboundLink, opcode: Opcode, key: RemoteKey, ranges: Ranges) -> Status | None:
    """Return how a request with a stolen key ends."""
    memory = HostMemory(4096)
    thief = Thief(Share(host.broker.tenants, ANONYMOUS), opcode, memory, key, ranges)
    link.want(thief)
    async with asyncio.timeout(5):
        await thief.ended.wait()
    memory.close()
    return thief.status


@pytest.mark.parametrize("kind", [FabricKind.TCP, FabricKind.LOCAL])
@pytest.mark.parametrize("way", ["push", "pull"])
async def test_a_stolen_key_opens_the_bytes_of_its_leg_and_nothing_after_it(
    pair: list[Host], kind: FabricKind, way: str
) -> None:
    a, b = pair if kind is FabricKind.TCP else (pair[0], pair[0])
    fabric: CuedFabric = a.tcp if kind is FabricKind.TCP else a.local
    source_host, sink_host = (a, b) if way == "push" else (b, a)
    source, sink = await region(source_host, LENGTH, data=DATA), await region(sink_host, LENGTH)
    fabric.hold = True
    transfer = await start(a, columns(source.name, sink.name, [100], [200], [50]))
    await eventually(lambda: fabric.held == 1)
    fabric.hold = False
    (request,) = fabric.links[0].held
    link = a.broker.links.kept(b.node, kind)
    assert link is not None
    other = Opcode.READ if request.opcode is Opcode.WRITE else Opcode.WRITE
    for opcode, ranges in (
        (request.opcode, Ranges.single(0, 50, 1)),
        (request.opcode, Ranges.single(0, 49, 2)),
        (request.opcode, Ranges.single(0, 2**64 - 1, 1)),
        (request.opcode, Ranges.single(0, 2**64 - 1, 2)),
        (request.opcode, Ranges((0, 9), (0, 50), (9, 1), 10)),
        (other, Ranges.single(0, 0, 1)),
    ):
        assert await stolen(a, link, opcode, request.key, ranges) is Status.REM_ACCESS_ERR
    fabric.let_go()
    assert (await outcome(transfer)).state is State.SUCCEEDED
    await eventually(lambda: b.broker.serving.grant_count == 0)
    assert await stolen(a, link, request.opcode, request.key, Ranges.single(0, 0, 1)) is Status.REM_ACCESS_ERR
    expected = bytearray(LENGTH)
    expected[200:250] = DATA[100:150]
    assert await content(sink_host, sink) == expected


async def test_a_grant_of_one_link_opens_nothing_for_another_one(pair: list[Host]) -> None:
    a, b = pair
    source, sink = await region(a, LENGTH, data=DATA), await region(b, LENGTH)
    a.tcp.hold = True
    transfer = await start(a, whole(source, sink))
    await eventually(lambda: a.tcp.held == 1)
    (request,) = a.tcp.links[0].held
    a.tcp.hold = False
    await outcome(await start(b, whole(sink, source)))  # opens a link from b, whose far end is a
    link = b.broker.links.kept("a", FabricKind.TCP)
    assert link is not None
    for opcode in Opcode:
        assert await stolen(b, link, opcode, request.key, Ranges.single(0, 0, 1)) is Status.REM_ACCESS_ERR
    first = a.broker.links.kept("b", FabricKind.TCP)
    assert first is not None
    second = OutboundLink("b", first.fabric, first.source, Traffic(first.fabric.limits, lambda: 0.0), lambda: 0.0)
    await second.open(1)
    for opcode in Opcode:
        assert await stolen(a, second, opcode, request.key, Ranges.single(0, 0, 1)) is Status.REM_ACCESS_ERR
    await second.close()
    a.tcp.let_go()
    assert (await outcome(transfer)).state is State.SUCCEEDED


async def test_a_replaced_grant_goes_back_with_the_last_slice_under_it(pair: list[Host]) -> None:
    a, b = pair
    source, sink = await region(a, 4 * MIB), await region(b, 4 * MIB)
    a.tcp.hold = True
    transfer = await start(a, whole(source, sink))
    await eventually(lambda: a.tcp.held == 4)
    a.tcp.statuses = [Status.REM_ACCESS_ERR]
    a.tcp.links[0].let_go(1)
    await eventually(lambda: a.broker.links.grant_count == 2)
    a.tcp.links[0].let_go(3)
    await eventually(lambda: a.broker.links.grant_count == 1)
    await eventually(lambda: b.broker.serving.grant_count == 1)
    assert not transfer.ended.is_set()
    a.tcp.let_go()
    assert (await outcome(transfer)).bytes_done == 4 * MIB


async def test_a_release_that_fails_is_left_to_the_grants_time() -> None:
    async with hosts("a", "b", grant_ttl=0.2) as (a, b):
        source, sink = await region(a, LENGTH), await region(b, LENGTH)
        a.cues.faults["give_back"] = errors.NodeUnreachable("No answer.")
        assert (await outcome(await start(a, whole(source, sink)))).state is State.SUCCEEDED
        assert a.broker.links.grant_count == 0
        assert a.cues.calls[-1] == "give_back"
        await eventually(lambda: b.broker.serving.grant_count == 0)


async def test_a_transfer_that_fails_gives_its_grants_back(pair: list[Host]) -> None:
    a, b = pair
    source, sink, small = await region(a, LENGTH), await region(b, LENGTH), await region(b, 10)
    error = await failure(await start(a, whole(source, sink), whole(source, small)))
    assert type(error) is errors.OutOfRange
    a.tcp.statuses = [Status.REM_INV_REQ_ERR]
    assert type(await failure(await start(a, whole(source, sink)))) is errors.Internal
    await eventually(lambda: b.broker.serving.grant_count == 0)
    assert a.broker.links.grant_count == 0


async def test_ranges_that_a_region_does_not_have_are_refused_by_its_owner(pair: list[Host]) -> None:
    a, b = pair
    source, sink = await region(a, LENGTH), await region(b, LENGTH)
    await outcome(await start(a, whole(source, sink)))
    link = a.broker.links.kept("b", FabricKind.TCP)
    assert link is not None
    for offset, length in ((0, LENGTH + 1), (LENGTH, 1), (LENGTH - 1, 2), (2**64 - 1, 2**64 - 1)):
        with pytest.raises(errors.OutOfRange, match=f"which has {LENGTH} bytes"):
            await link.grant(Wanted(sink.name, Rights.WRITE, ANONYMOUS, offset, length))
    await eventually(lambda: b.broker.serving.grant_count == 0)
