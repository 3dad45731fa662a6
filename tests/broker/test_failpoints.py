"""Each failpoint, turned on, and what has to hold then. Whatever fails leaves nothing behind: the hosts check it."""

from __future__ import annotations

import asyncio
import errno
import os
import random
from collections.abc import Awaitable, Callable

import pytest

from peermem.broker.runs import Transfer
from peermem.core import errors
from peermem.core.failpoints import turned_on
from peermem.core.identity import ANONYMOUS, Subject
from peermem.core.region import RegionRequest
from peermem.core.region import State as RegionState
from peermem.core.transfer import State
from peermem.core.types import FabricKind
from tests.broker.conftest import NicHost, hosts
from tests.broker.support import content, eventually, failure, outcome, region, start, whole
from tests.doubles import MIB, Host

LENGTH = 3 * MIB
DATA = random.Random(9).randbytes(LENGTH)
FAULT = errors.LimitReached("The failpoint says so.")


def fail() -> None:
    raise FAULT


def reset() -> None:
    raise ConnectionResetError(errno.ECONNRESET, os.strerror(errno.ECONNRESET))


class Gate:
    """Stops whoever passes a point, until it is opened."""

    def __init__(self) -> None:
        self.reached = asyncio.Event()
        self._open = asyncio.Event()

    def __call__(self) -> Awaitable[None]:
        self.reached.set()
        return self._wait()

    async def _wait(self) -> None:
        await self._open.wait()

    def open(self) -> None:
        self._open.set()


async def moves(a: Host, b: Host) -> None:
    """All is well: bytes cross."""
    source, sink = await region(a, LENGTH, data=DATA), await region(b, LENGTH)
    assert (await outcome(await start(a, whole(source, sink), checksum=True))).state is State.SUCCEEDED
    assert await content(b, sink) == DATA


# Regions


@pytest.mark.parametrize("point", ["region.allocate", "region.register"])
async def test_a_region_that_fails_while_it_is_made_leaves_nothing(pair: list[Host], point: str) -> None:
    a, _ = pair
    with turned_on(point, fail), pytest.raises(errors.LimitReached):
        await region(a, MIB, "mine")
    assert a.device.available == a.device.size
    assert (await region(a, MIB, "mine")).name.id == "mine"


async def test_a_job_that_dies_before_it_is_told_of_its_region(pair: list[Host]) -> None:
    a, _ = pair
    session, gate = a.sessions.open(Subject("uid:5"), 1), Gate()
    with turned_on("region.made", gate):
        request = RegionRequest("", MIB, "bar0", "", {}, None)
        making = asyncio.create_task(a.broker.create_region(Subject("uid:5"), session, request))
        await gate.reached.wait()
        a.sessions.close(session)
        gate.open()
        await making
    await eventually(lambda: len(a.broker.regions) == 0)
    assert a.device.available == a.device.size


@pytest.mark.parametrize("point", ["region.end", "region.let_go", "region.close"])
async def test_a_region_whose_end_fails_is_ended_by_the_next_try(pair: list[Host], point: str) -> None:
    a, _ = pair
    made = await region(a, MIB)
    with turned_on(point, fail, times=1):
        with pytest.raises(errors.LimitReached):
            await a.broker.delete_region(ANONYMOUS, made.name, force=True)
        assert len(a.broker.regions) == 1
        await a.broker.delete_region(ANONYMOUS, made.name, force=True)
    assert len(a.broker.regions) == 0


async def test_nothing_new_begins_on_a_region_while_it_ends(pair: list[Host]) -> None:
    a, b = pair
    source, sink, gate = await region(a, MIB), await region(b, MIB), Gate()
    with turned_on("region.let_go", gate):
        ending = asyncio.create_task(a.broker.delete_region(ANONYMOUS, source.name, force=True))
        await gate.reached.wait()
        with pytest.raises(errors.RegionDeleted):
            await start(a, whole(source, sink))
        assert not ending.done()
        gate.open()
        await ending


async def test_a_device_that_vanishes_takes_its_regions_and_their_transfers(pair: list[Host]) -> None:
    a, b = pair
    source, sink = await region(a, LENGTH), await region(b, LENGTH)
    a.tcp.hold = True
    transfer = await start(a, whole(source, sink))
    await eventually(lambda: a.tcp.held > 0)
    with turned_on("device.lost"):
        a.broker.let_go_of_lost_devices()
    await eventually(lambda: source.state is RegionState.REVOKED)
    a.tcp.let_go()
    assert type(await failure(transfer)) is errors.RegionRevoked
    await eventually(lambda: a.device.available == a.device.size)


# Transfers


@pytest.mark.parametrize("point", ["transfer.begin", "transfer.prepared", "transfer.moved", "transfer.verify"])
async def test_a_transfer_that_fails_at_a_step_says_so_and_the_next_one_works(pair: list[Host], point: str) -> None:
    a, b = pair
    source, sink = await region(a, LENGTH, data=DATA), await region(b, LENGTH)
    with turned_on(point, fail):
        transfer = await start(a, whole(source, sink), checksum=True)
        assert await failure(transfer) is FAULT
    await eventually(lambda: not source.users)  # a thread may still compute a checksum
    await moves(a, b)


@pytest.mark.parametrize("point", ["transfer.begin", "transfer.prepared", "transfer.moved", "transfer.verify"])
async def test_a_transfer_that_stands_at_a_step_is_cancelled(pair: list[Host], point: str) -> None:
    a, b = pair
    source, sink, gate = await region(a, LENGTH, data=DATA), await region(b, LENGTH), Gate()
    with turned_on(point, gate):
        transfer = await start(a, whole(source, sink), checksum=True)
        await gate.reached.wait()
        assert not transfer.ended.is_set()
        cancelling = asyncio.create_task(a.broker.cancel_transfer(ANONYMOUS, transfer.facts.name))
        await asyncio.sleep(0)
        gate.open()
        assert (await cancelling).state is State.CANCELLED
    await eventually(lambda: not source.users)


async def test_slices_that_are_not_posted_are_posted_again(pair: list[Host]) -> None:
    a, b = pair
    source, sink = await region(a, LENGTH, data=DATA), await region(b, LENGTH)
    with turned_on("slice.post", times=2):
        facts = await outcome(await start(a, whole(source, sink)))
    assert (facts.state, facts.bytes_done) == (State.SUCCEEDED, LENGTH)
    assert await content(b, sink) == DATA


async def test_a_slice_is_counted_after_it_is_in_place(pair: list[Host]) -> None:
    a, b = pair
    source, sink = await region(a, LENGTH, data=DATA), await region(b, LENGTH)
    seen: list[bool] = []
    transfer: Transfer

    def look() -> None:
        landed = len(seen) + 1
        seen.append(transfer.facts.bytes_done < landed * MIB)
        seen[-1] &= bytes(sink.memory.view()).count(0) <= (3 - landed) * MIB + LENGTH // 100

    with turned_on("slice.landed", look):
        transfer = await start(a, whole(source, sink))
        await outcome(transfer)
    assert seen == [True] * 3


async def test_a_break_that_can_not_be_mended(pair: list[Host]) -> None:
    a, b = pair
    source, sink = await region(a, LENGTH), await region(b, LENGTH)
    with turned_on("slice.post", times=1), turned_on("slice.mend", fail):
        transfer = await start(a, whole(source, sink))
        assert await failure(transfer) is FAULT
    await moves(a, b)


# Checksums


@pytest.mark.parametrize("way", ["push", "pull"])
async def test_a_byte_that_changes_on_the_way_is_caught(pair: list[Host], way: str) -> None:
    a, b = pair
    source_host, sink_host = (a, b) if way == "push" else (b, a)
    source, sink = await region(source_host, LENGTH, data=DATA), await region(sink_host, LENGTH)
    with turned_on("tcp.corrupt", times=1):
        transfer = await start(a, whole(source, sink), checksum=True)
        assert type(await failure(transfer)) is errors.ChecksumMismatch
    seen = await content(sink_host, sink)
    assert sum(x != y for x, y in zip(seen, DATA, strict=True)) == 1


@pytest.mark.parametrize("way", ["push", "pull"])
@pytest.mark.parametrize(("source_device", "sink_device"), [("bar1", "bar0"), ("bar0", "bar1")])
async def test_a_byte_that_changes_in_staging_is_caught(
    nic_pair: list[NicHost], way: str, source_device: str, sink_device: str
) -> None:
    a, b = nic_pair
    source_host, sink_host = (a, b) if way == "push" else (b, a)
    source = await region(source_host, LENGTH, data=DATA, device=source_device)
    sink = await region(sink_host, LENGTH, device=sink_device)
    spoiled = (source_host is a and source_device == "bar1") or sink_device == "bar1"
    with turned_on("staging.corrupt", times=1):
        transfer = await start(a, whole(source, sink), checksum=True)
        facts = await outcome(transfer)
    if spoiled:
        assert type(facts.error) is errors.ChecksumMismatch
    else:
        assert facts.state is State.SUCCEEDED, "what the far end loads into its own buffer is not this point"


async def test_without_a_checksum_it_is_not_caught(pair: list[Host]) -> None:
    """What the option is for."""
    a, b = pair
    source, sink = await region(a, LENGTH, data=DATA), await region(b, LENGTH)
    with turned_on("tcp.corrupt", times=1):
        assert (await outcome(await start(a, whole(source, sink)))).state is State.SUCCEEDED
    assert await content(b, sink) != DATA


async def test_a_copy_into_staging_that_fails(nic_pair: list[NicHost]) -> None:
    a, b = nic_pair
    source = await region(a, LENGTH, data=DATA, device="bar1")
    sink = await region(b, LENGTH, device="bar1")
    with turned_on("staging.copy", fail, skip=2, times=1):
        assert await failure(await start(a, whole(source, sink))) is FAULT
    assert (await outcome(await start(a, whole(source, sink), checksum=True))).state is State.SUCCEEDED


# Relays


async def test_a_relay_whose_steps_fail() -> None:
    async with hosts("a", "b", "c") as (a, b, c):
        source, sink = await region(a, MIB), await region(b, MIB)
        for point in ("relay.create", "relay.follow"):
            with turned_on(point, fail):
                assert await failure(await start(c, whole(source, sink))) is FAULT
        await eventually(lambda: a.broker.transfers.running_count == 0)


# Links and grants


def refuse() -> None:
    raise errors.NodeUnreachable("The failpoint says so.")


@pytest.mark.parametrize("point", ["link.open", "link.accept", "grant.acquire", "grant.make", "tcp.dial"])
async def test_what_fails_before_the_first_slice_is_tried_again_for_a_while(point: str) -> None:
    async with hosts("a", "b", retry_for=0.3) as (a, b):
        source, sink = await region(a, MIB), await region(b, MIB)
        act: Callable[[], None] = reset if point == "tcp.dial" else refuse
        with turned_on(point, act, times=2):
            transfer = await start(a, whole(source, sink), fabric=FabricKind.TCP)
            assert (await outcome(transfer)).state is State.SUCCEEDED
        await b.broker.delete_region(ANONYMOUS, sink.name, force=False)
        sink = await region(b, MIB)
        link = a.broker.links.kept("b", FabricKind.TCP)
        assert link is not None
        a.broker.links.discard(link)
        with turned_on(point, act):
            transfer = await start(a, whole(source, sink), fabric=FabricKind.TCP)
            assert type(await failure(transfer)) is errors.NodeUnreachable
        await moves(a, b)


@pytest.mark.parametrize("point", ["link.accept", "grant.acquire", "grant.make", "tcp.dial", "link.fence"])
async def test_what_fails_while_a_break_is_mended_is_tried_again(pair: list[Host], point: str) -> None:
    a, b = pair
    source, sink = await region(a, LENGTH, data=DATA), await region(b, LENGTH)
    a.tcp.hold = True
    transfer = await start(a, whole(source, sink))
    await eventually(lambda: a.tcp.held == 3)
    link = a.broker.links.kept("b", FabricKind.TCP)
    assert link is not None
    with turned_on(point, reset if point == "tcp.dial" else refuse, times=2):
        a.tcp.hold = False
        a.broker.links.discard(link)
        assert (await outcome(transfer)).state is State.SUCCEEDED
    assert await content(b, sink) == DATA


async def test_a_fence_is_not_up_before_the_far_end_has_revoked(pair: list[Host]) -> None:
    a, b = pair
    source, sink, gate = await region(a, LENGTH), await region(b, LENGTH), Gate()
    with turned_on("slice.post", times=1), turned_on("grant.release", gate):
        transfer = await start(a, whole(source, sink))
        await gate.reached.wait()
        cancelling = asyncio.create_task(a.broker.cancel_transfer(ANONYMOUS, transfer.facts.name))
        await asyncio.sleep(0)
        assert not cancelling.done()
        gate.open()
        assert (await cancelling).state is State.CANCELLED


async def test_a_link_whose_closing_fails_is_closed_by_its_far_end(pair: list[Host]) -> None:
    a, b = pair
    await moves(a, b)
    link = a.broker.links.kept("b", FabricKind.TCP)
    assert link is not None
    with turned_on("link.close", refuse):
        a.broker.links.discard(link)
        await eventually(lambda: b.broker.node_facts().link_count == 0)
    await eventually(lambda: b.broker.serving.grant_count == 0)


@pytest.mark.parametrize("point", ["tcp.send", "tcp.receive"])
async def test_connections_that_fail_take_no_transfer_with_them(pair: list[Host], point: str) -> None:
    a, b = pair
    await moves(a, b)
    source, sink = await region(a, LENGTH, data=DATA), await region(b, LENGTH)
    with turned_on(point, reset, skip=3, times=1):
        facts = await outcome(await start(a, whole(source, sink), checksum=True))
    assert (facts.state, facts.error) == (State.SUCCEEDED, None)
    assert await content(b, sink) == DATA


# What runs of chaos plant, to see whether it is found


async def test_a_fence_that_is_skipped_asks_nobody(pair: list[Host]) -> None:
    a, b = pair
    source, sink = await region(a, LENGTH), await region(b, LENGTH)
    for fences, _ in enumerate(("skipped", "asked for")):
        a.cues.calls.clear()
        with turned_on("fence.skip", times=1 - fences), turned_on("slice.post", times=1):
            assert (await outcome(await start(a, whole(source, sink)))).state is State.SUCCEEDED
        assert a.cues.calls.count("release_grants") == fences


async def test_a_grant_that_is_kept_is_told_to_have_ended(pair: list[Host]) -> None:
    a, b = pair
    for revoked, _ in enumerate(("kept", "revoked")):
        with turned_on("grant.keep", times=1 - revoked):
            await moves(a, b)
            await eventually(lambda: b.broker.serving.grant_count == 0)
        assert len(b.tcp.revoked) == revoked


async def test_a_grant_that_is_forgotten_is_held_on(pair: list[Host]) -> None:
    a, b = pair
    with turned_on("grant.forget", times=1):
        await moves(a, b)
        await moves(a, b)
    assert a.broker.links.grant_count == 1
