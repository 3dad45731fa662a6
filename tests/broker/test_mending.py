"""Transfers whose link breaks: those that can go on do, the others say why and how much is known to be in place."""

from __future__ import annotations

import asyncio
import errno
import gc
import os
import random

import pytest

from peermem.core import errors
from peermem.core.failpoints import turned_on
from peermem.core.identity import ANONYMOUS
from peermem.core.transfer import State, TransferFacts
from peermem.core.types import FabricKind
from peermem.fabric.base import LinkEnd, Status
from tests.broker.conftest import NicHost, hosts, nic_hosts
from tests.broker.support import content, eventually, failure, outcome, region, start, whole
from tests.doubles import MIB, Host

LENGTH = 12 * MIB + 4099
DATA = random.Random(8).randbytes(LENGTH)
GONE = errors.NodeUnreachable("It did not answer.", code="DEADLINE_EXCEEDED")
NOBODY = errors.NodeUnreachable("Nobody listens there.", code="UNAVAILABLE", listens="no")


def count(host: Host, what: str) -> float:
    """Return how often something broke on the way to other nodes."""
    wanted = f'peermem_fabric_failures_total{{fabric="tcp",what="{what}"}}'
    line = next(line for line in host.metrics.render()[0].decode().splitlines() if line.startswith(wanted))
    return float(line.rsplit(" ", 1)[1])


def reset() -> None:
    raise ConnectionResetError(errno.ECONNRESET, os.strerror(errno.ECONNRESET))


@pytest.mark.parametrize("way", ["push", "pull"])
async def test_slices_that_came_back_are_posted_again_behind_a_fence(pair: list[Host], way: str) -> None:
    a, b = pair
    source_host, sink_host = (a, b) if way == "push" else (b, a)
    source, sink = await region(source_host, LENGTH, data=DATA), await region(sink_host, LENGTH)
    a.tcp.statuses = [Status.WR_FLUSH_ERR] * 3
    facts = await outcome(await start(a, whole(source, sink), checksum=True))
    assert (facts.state, facts.error, facts.bytes_done) == (State.SUCCEEDED, None, LENGTH)
    assert await content(sink_host, sink) == DATA
    assert count(a, "slice") == 3
    await eventually(lambda: b.broker.serving.grant_count == 0)
    calls = [call for call in a.cues.calls if call != "checksum"]
    first = "release_grants" if way == "push" else "give_back"  # bytes that may land late are fenced
    assert calls == ["open_link", "acquire_grant", first, "acquire_grant", "give_back"]


async def test_a_transfer_goes_on_over_a_new_link(pair: list[Host]) -> None:
    a, b = pair
    source, sink = await region(a, LENGTH, data=DATA), await region(b, LENGTH)
    a.tcp.hold = True
    transfer = await start(a, whole(source, sink))
    await eventually(lambda: a.tcp.held > 3)
    a.tcp.links[0].let_go(3)
    await eventually(lambda: transfer.facts.bytes_done == 3 * MIB)
    a.tcp.hold = False
    link = a.broker.links.kept("b", FabricKind.TCP)
    assert link is not None
    a.broker.links.discard(link)
    facts = await outcome(transfer)
    assert (facts.state, facts.bytes_done) == (State.SUCCEEDED, LENGTH)
    assert await content(b, sink) == DATA
    assert a.cues.calls.count("open_link") == 2


async def test_a_far_end_that_can_not_be_fenced_is_waited_for() -> None:
    async with hosts("a", "b", grant_ttl=0.2) as (a, b):
        source, sink = await region(a, MIB, data=DATA[:MIB]), await region(b, MIB)
        a.cues.faults["release_grants"] = GONE
        a.tcp.statuses = [Status.WR_FLUSH_ERR]
        assert (await outcome(await start(a, whole(source, sink)))).state is State.SUCCEEDED
        assert await content(b, sink) == DATA[:MIB]
        assert "release_grants" in a.cues.calls


async def test_calls_that_get_no_answer_are_made_again(pair: list[Host]) -> None:
    a, b = pair
    source, sink = await region(a, MIB, data=DATA[:MIB]), await region(b, MIB)
    await outcome(await start(a, whole(source, sink)))
    for call, fault, links in (
        ("acquire_grant", GONE, 0),
        ("acquire_grant", errors.StaleEpoch("Another run."), 1),
        ("acquire_grant", errors.LinkNotFound("Not here."), 1),
        ("checksum", GONE, 0),
    ):
        opened = a.cues.calls.count("open_link")
        a.tcp.hold = True
        transfer = await start(a, whole(source, sink), checksum=True)
        await eventually(lambda: a.tcp.held == 1)
        a.tcp.statuses = [Status.WR_FLUSH_ERR]
        a.cues.once[call] = fault
        a.tcp.let_go()
        facts = await outcome(transfer)
        assert (facts.state, facts.error) == (State.SUCCEEDED, None)
        assert a.cues.once == {}
        assert a.cues.calls.count("open_link") == opened + links


async def test_a_break_while_a_grant_is_renewed_is_fenced_as_well() -> None:
    async with hosts("a", "b", grant_ttl=0.3) as (a, b):
        source, sink = await region(a, 32 * MIB), await region(b, 32 * MIB)
        a.tcp.hold = True
        transfer = await start(a, whole(source, sink))
        await eventually(lambda: a.tcp.held == 16)
        a.cues.gates["acquire_grant"] = gate = asyncio.Event()
        await asyncio.sleep(0.2)  # the grant grows old: it is the time that is tested
        a.cues.calls.clear()
        a.tcp.links[0].let_go(1)
        await eventually(lambda: a.cues.calls == ["acquire_grant"])
        a.tcp.statuses = [Status.WR_FLUSH_ERR]
        a.tcp.let_go()
        await eventually(lambda: count(a, "slice") == 1)
        gate.set()
        assert (await outcome(transfer)).state is State.SUCCEEDED
        assert "release_grants" in a.cues.calls
        assert "acquire_grant" in a.cues.calls[a.cues.calls.index("release_grants") :]


@pytest.mark.parametrize("retry_for", [0.0, 0.1])
async def test_a_transfer_that_can_not_go_on_says_why_and_what_is_in_place(retry_for: float) -> None:
    async with hosts("a", "b", retry_for=retry_for) as (a, b):
        source, sink = await region(a, 2 * MIB), await region(b, 2 * MIB)
        a.tcp.hold = True
        transfer = await start(a, whole(source, sink))
        await eventually(lambda: a.tcp.held == 2)
        a.tcp.links[0].let_go(1)
        await eventually(lambda: transfer.facts.bytes_done == MIB)
        a.cues.faults["acquire_grant"] = GONE
        a.tcp.statuses = [Status.WR_FLUSH_ERR]
        a.tcp.let_go()
        error = await failure(transfer)
        assert type(error) is errors.NodeUnreachable
        assert "tcp link to nodes/b went down" in error.message
        assert f"{MIB} of {2 * MIB} bytes are known to be in place" in error.message
        assert ("It did not answer." in error.message) is (retry_for > 0)
        assert a.broker.links.counts()[FabricKind.TCP] == 1


async def test_what_lands_while_a_fence_is_asked_for_in_vain_does_not_hide_the_cause() -> None:
    async with hosts("a", "b", retry_for=0.1) as (a, b):
        source, sink = await region(a, 3 * MIB), await region(b, 3 * MIB)
        a.cues.gates["release_grants"] = gate = asyncio.Event()
        a.tcp.hold = True
        transfer = await start(a, whole(source, sink))
        await eventually(lambda: a.tcp.held == 3)
        a.tcp.statuses = [Status.WR_FLUSH_ERR]
        a.tcp.let_go()
        await eventually(lambda: transfer.facts.state is State.FENCING)
        gate.set()
        error = await failure(transfer)
        assert type(error) is errors.NodeUnreachable
        assert "went down" in error.message
        assert f"{2 * MIB} of {3 * MIB} bytes" in error.message


async def test_a_daemon_that_died_is_given_up_early(pair: list[Host], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("peermem.broker.renewal._DEAD_AFTER", 0.05)
    a, b = pair
    source, sink = await region(a, MIB), await region(b, MIB)
    a.tcp.hold = True
    transfer = await start(a, whole(source, sink))
    await eventually(lambda: a.tcp.held == 1)
    a.cues.faults |= dict.fromkeys(("open_link", "acquire_grant", "release_grants"), NOBODY)
    link = a.broker.links.kept("b", FabricKind.TCP)
    assert link is not None
    a.tcp.statuses = [Status.WR_FLUSH_ERR]
    link.down(LinkEnd.REMOTE_CLOSED, "the remote side closed the connection")
    a.tcp.let_go()
    error = await failure(transfer)
    assert "Nobody listens there." in error.message
    a.cues.faults.clear()


async def test_nobody_listens_from_the_start(pair: list[Host]) -> None:
    a, b = pair
    source, sink = await region(a, MIB), await region(b, MIB)
    a.cues.faults["open_link"] = NOBODY
    assert await failure(await start(a, whole(source, sink))) is NOBODY
    assert a.cues.calls.count("open_link") == 1


async def test_a_region_that_was_deleted_meanwhile(pair: list[Host]) -> None:
    a, b = pair
    source, sink = await region(a, 2 * MIB), await region(b, 2 * MIB, "sink")
    a.tcp.hold = True
    transfer = await start(a, whole(source, sink))
    await eventually(lambda: a.tcp.held == 2)
    a.tcp.links[0].let_go(1)
    await eventually(lambda: transfer.facts.bytes_done == MIB)
    await b.broker.delete_region(ANONYMOUS, sink.name, force=False)
    await region(b, 2 * MIB, "sink")
    a.tcp.statuses = [Status.WR_FLUSH_ERR]
    a.tcp.let_go()
    assert type(await failure(transfer)) is errors.RegionDeleted


def cancel(host: Host, transfer: TransferFacts) -> asyncio.Task[TransferFacts]:
    return asyncio.create_task(host.broker.cancel_transfer(ANONYMOUS, transfer.name))


async def test_a_transfer_is_cancelled_while_its_break_is_mended(pair: list[Host]) -> None:
    a, b = pair
    source, sink = await region(a, MIB), await region(b, MIB)
    a.cues.gates["release_grants"] = gate = asyncio.Event()
    a.tcp.statuses = [Status.WR_FLUSH_ERR]
    transfer = await start(a, whole(source, sink))
    await eventually(lambda: "release_grants" in a.cues.calls)
    cancelling = cancel(a, transfer.facts)
    await asyncio.sleep(0)
    assert not cancelling.done(), "the fence is not up"
    gate.set()
    assert (await cancelling).state is State.CANCELLED
    assert b.broker.serving.grant_count == 0


@pytest.mark.parametrize(("source_device", "sink_device"), [("bar1", "bar0"), ("bar0", "bar1"), ("bar1", "bar1")])
@pytest.mark.parametrize("way", ["push", "pull"])
async def test_staged_slices_are_posted_again(
    nic_pair: list[NicHost], source_device: str, sink_device: str, way: str
) -> None:
    a, b = nic_pair
    source_host, sink_host = (a, b) if way == "push" else (b, a)
    source = await region(source_host, LENGTH, data=DATA, device=source_device)
    sink = await region(sink_host, LENGTH, device=sink_device)
    a.nic.statuses = [Status.WR_FLUSH_ERR] * 2
    a.cues.once["copy_staged"] = GONE
    facts = await outcome(await start(a, whole(source, sink), checksum=True))
    assert (facts.state, facts.error, facts.bytes_done) == (State.SUCCEEDED, None, LENGTH)
    assert await content(sink_host, sink) == DATA
    again = await outcome(await start(a, whole(source, sink)))
    assert again.state is State.SUCCEEDED, "all slots came back"


async def test_a_staged_transfer_that_can_not_go_on() -> None:
    async with nic_hosts("a", "b", retry_for=0.0) as (a, b):
        source, sink = await region(a, LENGTH, data=DATA, device="bar1"), await region(b, LENGTH)
        a.nic.statuses = [Status.WR_FLUSH_ERR]
        assert type(await failure(await start(a, whole(source, sink)))) is errors.NodeUnreachable
        assert (await outcome(await start(a, whole(source, sink)))).state is State.SUCCEEDED


@pytest.mark.parametrize("way", ["push", "pull"])
@pytest.mark.parametrize("point", ["tcp.send", "tcp.receive"])
async def test_a_rail_that_breaks_leaves_its_slices_to_the_others_and_comes_back(way: str, point: str) -> None:
    async with hosts("a", "b", rails=3) as (a, b):
        source_host, sink_host = (a, b) if way == "push" else (b, a)
        source, sink = await region(source_host, LENGTH, data=DATA), await region(sink_host, LENGTH)
        await outcome(await start(a, whole(source, sink)))
        sink.memory.view()[:] = bytes(LENGTH)
        with turned_on(point, reset, skip=7, times=1):
            facts = await outcome(await start(a, whole(source, sink), checksum=True))
        assert (facts.state, facts.error, facts.bytes_done) == (State.SUCCEEDED, None, LENGTH)
        assert await content(sink_host, sink) == DATA
        assert a.broker.links.counts()[FabricKind.TCP] == 1
        assert count(a, "link") == 0
        await eventually(lambda: count(a, "rail") >= 1)
        await eventually(lambda: a.broker.links.rails_down()[FabricKind.TCP] == 0)
        assert a.cues.calls.count("open_link") >= 2


async def test_the_last_rail_takes_the_link_with_it_and_the_transfer_finishes(pair: list[Host]) -> None:
    a, b = pair
    source, sink = await region(a, LENGTH, data=DATA), await region(b, LENGTH)
    with turned_on("tcp.send", reset, skip=9, times=1):
        facts = await outcome(await start(a, whole(source, sink), checksum=True))
    assert (facts.state, facts.error) == (State.SUCCEEDED, None)
    assert await content(b, sink) == DATA
    assert count(a, "link") == 1


async def test_links_that_break_again_and_again_do_not_keep_a_transfer_from_its_end() -> None:
    async with hosts("a", "b", rails=2) as (a, b):
        sources = [await region(a, LENGTH, data=DATA) for _ in range(3)]
        sinks = [await region(b, LENGTH) for _ in range(3)]
        broken = iter([True, *[False] * 6] * 12)

        def sometimes() -> None:
            if next(broken, False):
                reset()

        with turned_on("tcp.send", sometimes, skip=10):
            transfers = [await start(a, whole(*pair)) for pair in zip(sources, sinks, strict=True)]
            ends = [await outcome(transfer) for transfer in transfers]
        assert [(facts.state, facts.error) for facts in ends] == [(State.SUCCEEDED, None)] * 3
        for sink in sinks:
            assert await content(b, sink) == DATA


@pytest.mark.parametrize("call", ["open_link", "acquire_grant"])
async def test_a_call_that_fails_when_nobody_waits_for_it_any_more_is_no_defect(pair: list[Host], call: str) -> None:
    a, b = pair
    source, sink = await region(a, 10), await region(b, 10)
    unheard: list[object] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: unheard.append(context))
    a.cues.gates[call] = gate = asyncio.Event()
    a.cues.faults[call] = GONE
    transfer = await start(a, whole(source, sink))
    await eventually(lambda: call in a.cues.calls)
    assert (await cancel(a, transfer.facts)).state is State.CANCELLED
    gate.set()
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    gc.collect()
    assert unheard == []
    a.cues.faults.clear()
