"""Transfers from, to and between regions that only the CPU reaches."""

from __future__ import annotations

import asyncio
import random

import google_crc32c
import pytest

from peermem.broker.slots import SLOT, SLOTS, StagingBuffer
from peermem.core import errors
from peermem.core.grant import Wanted
from peermem.core.identity import ANONYMOUS
from peermem.core.policy import Action
from peermem.core.segments import columns
from peermem.core.transfer import State
from peermem.core.types import FabricKind, Path, Rights
from peermem.fabric.base import Status
from peermem.fabric.verbs_fabric import VerbsFabric
from tests.broker.conftest import NicHost
from tests.broker.support import content, eventually, failure, outcome, region, start, whole
from tests.doubles import MIB
from tests.fabric.pyverbs_double import pyverbs

LENGTH = 12 * MIB + 4099
DATA = random.Random(4).randbytes(LENGTH)
ENDS = [("bar1", "bar0"), ("bar0", "bar1"), ("bar1", "bar1")]


@pytest.mark.parametrize("fabric", [None, FabricKind.TCP])
@pytest.mark.parametrize(("source_device", "sink_device"), ENDS)
async def test_push_and_pull_move_the_bytes_and_verify_them(
    nic_pair: list[NicHost], source_device: str, sink_device: str, fabric: FabricKind | None
) -> None:
    a, b = nic_pair
    for source_host, sink_host in ((a, b), (b, a)):
        source = await region(source_host, LENGTH, data=DATA, device=source_device)
        sink = await region(sink_host, LENGTH, device=sink_device)
        facts = await outcome(await start(a, whole(source, sink), checksum=True, fabric=fabric))
        assert (facts.state, facts.error, facts.bytes_done) == (State.SUCCEEDED, None, LENGTH)
        assert facts.fabric is (fabric or FabricKind.VERBS)
        assert facts.crc32c == google_crc32c.value(DATA)
        assert await content(sink_host, sink) == DATA
        for made, host in ((source, source_host), (sink, sink_host)):
            await host.broker.delete_region(ANONYMOUS, made.name, force=False)


@pytest.mark.parametrize(("source_device", "sink_device"), ENDS)
async def test_between_two_regions_of_one_node(nic_pair: list[NicHost], source_device: str, sink_device: str) -> None:
    a, _ = nic_pair
    source = await region(a, LENGTH, data=DATA, device=source_device)
    sink = await region(a, LENGTH, device=sink_device)
    facts = await outcome(await start(a, whole(source, sink), checksum=True))
    assert (facts.state, facts.fabric) == (State.SUCCEEDED, FabricKind.LOCAL)
    assert facts.path is Path.STAGED
    assert await content(a, sink) == DATA


async def test_thousands_of_unaligned_segments(nic_pair: list[NicHost]) -> None:
    a, b = nic_pair
    source, sink = await region(a, LENGTH, data=DATA, device="bar1"), await region(b, LENGTH, device="bar1")
    count = 3000
    reads = [1 + 4001 * i for i in range(count)]
    writes = [3 + 4003 * i for i in range(count)]
    lengths = [1 + (37 * i) % 3999 for i in range(count)]
    expected = bytearray(LENGTH)
    for read, write, length in zip(reads, writes, lengths, strict=True):
        expected[write : write + length] = DATA[read : read + length]
    facts = await outcome(await start(a, columns(source.name, sink.name, reads, writes, lengths)))
    assert (facts.state, facts.error) == (State.SUCCEEDED, None)
    assert await content(b, sink) == expected


async def test_slices_are_copied_while_others_are_on_the_wire(nic_pair: list[NicHost]) -> None:
    a, b = nic_pair
    source, sink = await region(a, LENGTH, data=DATA, device="bar1"), await region(b, LENGTH)
    a.nic.hold = True
    transfer = await start(a, whole(source, sink))
    await eventually(lambda: a.nic.held == SLOTS)
    assert a.staged.copies >= SLOTS
    a.nic.let_go()
    assert (await outcome(transfer)).state is State.SUCCEEDED
    assert await content(b, sink) == DATA


async def test_bytes_count_when_they_are_in_the_region_not_in_the_buffer(nic_pair: list[NicHost]) -> None:
    a, b = nic_pair
    source, sink = await region(a, SLOT, data=DATA[:SLOT]), await region(b, SLOT, device="bar1")
    b.staged.gate = asyncio.Event()
    transfer = await start(a, whole(source, sink))
    await eventually(lambda: b.staged.waiting == 1)
    assert transfer.facts.bytes_done == 0
    b.staged.gate.set()
    assert (await outcome(transfer)).bytes_done == SLOT


@pytest.mark.parametrize("way", ["push", "pull"])
async def test_a_cancelled_transfer_waits_for_copies_and_starts_no_more(nic_pair: list[NicHost], way: str) -> None:
    a, b = nic_pair
    source_host, sink_host = (a, b) if way == "push" else (b, a)
    source = await region(source_host, LENGTH, data=DATA, device="bar1")
    sink = await region(sink_host, LENGTH, device="bar1")
    sink_host.staged.gate = gate = asyncio.Event()
    transfer = await start(a, whole(source, sink))
    await eventually(lambda: sink_host.staged.waiting > 0)
    cancelling = asyncio.create_task(a.broker.cancel_transfer(ANONYMOUS, transfer.facts.name))
    await asyncio.sleep(0)
    gate.set()
    assert (await cancelling).state is State.CANCELLED
    copies = a.staged.copies, b.staged.copies
    seen = await content(sink_host, sink)
    again = await outcome(await start(a, whole(source, sink)))
    assert again.state is State.SUCCEEDED, "all slots came back"
    assert copies <= (a.staged.copies, b.staged.copies)
    assert len(seen) == LENGTH


@pytest.mark.parametrize("end", ["source", "sink"])
async def test_memory_that_vanishes_fails_the_transfer_and_gives_the_slots_back(
    nic_pair: list[NicHost], end: str
) -> None:
    a, b = nic_pair
    source = await region(a, LENGTH, data=DATA, device="bar1")
    sink = await region(b, LENGTH, device="bar1")
    lost = a.staged if end == "source" else b.staged
    lost.vanished = True
    assert type(await failure(await start(a, whole(source, sink)))) is errors.RegionRevoked
    lost.vanished = False
    assert (await outcome(await start(a, whole(source, sink)))).state is State.SUCCEEDED


async def test_a_refused_slice_is_staged_again(nic_pair: list[NicHost]) -> None:
    a, b = nic_pair
    source, sink = await region(a, LENGTH, data=DATA, device="bar1"), await region(b, LENGTH, device="bar1")
    await outcome(await start(a, whole(source, sink)))
    a.nic.statuses = [Status.REM_ACCESS_ERR]
    a.cues.once["copy_staged"] = errors.GrantRefused("It has ended.")
    facts = await outcome(await start(a, whole(source, sink)))
    assert (facts.state, facts.bytes_done) == (State.SUCCEEDED, LENGTH)
    assert await content(b, sink) == DATA


async def test_a_copy_whose_answer_is_lost_is_fenced(nic_pair: list[NicHost]) -> None:
    a, b = nic_pair
    source, sink = await region(a, SLOT, data=DATA[:SLOT]), await region(b, SLOT, device="bar1")
    a.cues.faults["copy_staged"] = errors.NodeUnreachable("No answer.")
    a.broker.links.retry_for = 0.1
    transfer = await start(a, whole(source, sink))
    assert type(await failure(transfer)) is errors.NodeUnreachable
    assert a.cues.calls[-1] == "release_grants"
    assert b.broker.serving.grant_count == 0


async def test_transfers_share_the_slots(nic_pair: list[NicHost]) -> None:
    a, b = nic_pair
    source = await region(a, LENGTH, data=DATA, device="bar1")
    sinks = [await region(b, LENGTH, device=device) for device in ("bar1", "bar0", "bar1")]
    transfers = [await start(a, whole(source, sink)) for sink in (*sinks, sinks[0])]
    for transfer in transfers:
        assert (await outcome(transfer)).state is State.SUCCEEDED
    for sink in sinks:
        assert await content(b, sink) == DATA


async def test_a_deleted_region_ends_its_copies_first(nic_pair: list[NicHost]) -> None:
    a, b = nic_pair
    source, sink = await region(a, LENGTH, data=DATA), await region(b, LENGTH, device="bar1")
    b.staged.gate = asyncio.Event()
    transfer = await start(a, whole(source, sink))
    await eventually(lambda: b.staged.waiting > 0)
    deleting = asyncio.create_task(b.broker.delete_region(ANONYMOUS, sink.name, force=True))
    await asyncio.sleep(0.01)
    assert not deleting.done()
    b.staged.gate.set()
    await deleting
    assert type(await failure(transfer)) in (errors.RegionDeleted, errors.RegionNotFound)


async def test_copies_that_a_grant_does_not_allow_are_refused(nic_pair: list[NicHost]) -> None:
    a, b = nic_pair
    sink, plain = await region(b, SLOT, device="bar1"), await region(b, SLOT)
    source = await region(a, SLOT, data=DATA[:SLOT])
    await outcome(await start(a, whole(source, sink)))
    await outcome(await start(a, whole(source, plain)))
    link = a.broker.links.kept("b", FabricKind.VERBS)
    assert link is not None
    held = await link.grant(Wanted(sink.name, Rights.WRITE, ANONYMOUS, 4096, SLOT - 4096))
    bare = await link.grant(Wanted(plain.name, Rights.WRITE, ANONYMOUS, 0, SLOT))
    serving, link_id = b.broker.serving, link._link_id
    for grant, into, pieces, fault in (
        (held.grant_id, True, [(SLOT - 4096, 0, 1)], errors.OutOfRange),
        (held.grant_id, True, [(0, 0, SLOT - 4095)], errors.OutOfRange),
        (held.grant_id, True, [(0, SLOT, 1)], errors.OutOfRange),
        (held.grant_id, True, [(0, 0, 0)], errors.OutOfRange),
        (held.grant_id, False, [(0, 0, 1)], errors.GrantRefused),
        (bare.grant_id, True, [(0, 0, 1)], errors.GrantRefused),
        (12345, True, [(0, 0, 1)], errors.GrantRefused),
    ):
        with pytest.raises(fault):
            await serving.copy_staged(link_id, grant, pieces, into_region=into)
    with pytest.raises(errors.GrantRefused):
        await serving.copy_staged(b"?" * 16, held.grant_id, [(0, 0, 1)], into_region=True)
    with b.broker.use_region(ANONYMOUS, sink.name, Action.READ, 0, SLOT) as use:
        assert await use.read(0, SLOT) == DATA[:SLOT]


@pytest.mark.parametrize("gives_up", [False, True])
async def test_a_buffer_that_is_closed_twice_at_once_or_by_who_gives_up_is_freed(gives_up: bool) -> None:
    with pyverbs("nic0"):
        verbs = VerbsFabric()
        await verbs.start()
        buffer = await StagingBuffer.open([verbs], [], "uid:1@a")
        closing = [asyncio.create_task(buffer.close()) for _ in range(2)]
        await asyncio.sleep(0)
        if gives_up:
            for task in closing:
                task.cancel()
        await asyncio.gather(*closing, return_exceptions=gives_up)
        await buffer.close()
        assert buffer.memory.fd is None
        assert not any(verbs.object_counts().values())
        await verbs.close()
