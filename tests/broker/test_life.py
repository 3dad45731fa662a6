"""Regions, relays, limits and the end of a broker."""

from __future__ import annotations

import asyncio
import gc
import threading
import weakref

import pytest

from peermem.broker.relays import Relay
from peermem.core import errors
from peermem.core.failpoints import turned_on
from peermem.core.identity import ANONYMOUS, ROOT, Subject
from peermem.core.names import ChildName
from peermem.core.origin import Origin
from peermem.core.plan import Direction
from peermem.core.policy import Action
from peermem.core.region import Lease, RegionRequest
from peermem.core.region import State as RegionState
from peermem.core.segments import columns
from peermem.core.transfer import State
from peermem.core.types import LeaseKind
from peermem.wire import region_to_proto
from tests.broker.conftest import hosts
from tests.broker.support import eventually, failure, outcome, region, start, whole
from tests.doubles import MIB, Host


async def test_a_region_that_can_not_be_mapped(pair: list[Host]) -> None:
    a, _ = pair
    made = await region(a, 4096)
    assert a.broker.map_region(made.name, Subject("uid:1")).share()[1] == 0
    a.device.mappable = False
    with pytest.raises(errors.NotMappable):
        a.broker.map_region(made.name, Subject("uid:1")).share()


async def test_a_region_whose_device_took_its_memory_back(pair: list[Host]) -> None:
    a, _ = pair
    made = await region(a, 4096)
    a.device.vanished = True
    with a.broker.use_region(Subject("uid:1"), made.name, Action.READ, 0, 10) as use:
        with pytest.raises(errors.RegionRevoked):
            await use.read(0, 10)
        with pytest.raises(errors.RegionRevoked):
            await use.write(0, b"x" * 10)


async def test_a_deletion_waits_for_the_thread_that_touches_the_memory(pair: list[Host]) -> None:
    """Else its file descriptor's number could be another file's by the time the thread writes."""
    a, _ = pair
    made = await region(a, MIB)
    a.device.slow = threading.Event()

    async def write() -> None:
        with a.broker.use_region(Subject("uid:1"), made.name, Action.WRITE, 0, MIB) as use:
            await use.write(0, b"x" * MIB)

    writing = asyncio.create_task(write())
    await eventually(a.device.touched.is_set)
    writing.cancel()
    deletion = asyncio.create_task(a.broker.delete_region(ANONYMOUS, made.name, force=True))
    await eventually(lambda: made.state is RegionState.DRAINING)
    assert a.device.available < a.device.size
    a.device.slow.set()
    await deletion
    assert a.device.available == a.device.size
    assert writing.cancelled()


async def test_a_use_that_stands_still_does_not_hold_up_a_deletion(pair: list[Host]) -> None:
    a, _ = pair
    made = await region(a, MIB)
    with a.broker.use_region(Subject("uid:1"), made.name, Action.READ, 0, MIB) as use:
        await use.read(0, 4096)
        with pytest.raises(errors.RegionInUse):
            await a.broker.delete_region(ANONYMOUS, made.name, force=False)
        await a.broker.delete_region(ANONYMOUS, made.name, force=True)
        with pytest.raises(errors.RegionDeleted):
            await use.read(4096, 4096)


async def test_a_ttl_ends_a_region_and_its_transfer(pair: list[Host]) -> None:
    a, b = pair
    source, sink = await region(a, MIB, lease=Lease(LeaseKind.TTL, 0.05)), await region(b, MIB)
    a.tcp.hold = True
    transfer = await start(a, whole(source, sink))
    await eventually(lambda: source.state is RegionState.DRAINING)
    with pytest.raises(errors.RegionDeleted):
        a.broker.renew_leases(ANONYMOUS, [source.name])
    a.tcp.let_go()
    assert type(await failure(transfer)) is errors.RegionDeleted
    await eventually(lambda: len(a.broker.regions) == 0)


async def test_a_region_tells_which_job_made_it(pair: list[Host]) -> None:
    a = pair[0]
    session = a.sessions.open(Subject("uid:5"), 1, Origin(slurm_job="42"))
    request = RegionRequest("", 4096, "bar0", "", {}, Lease(LeaseKind.NONE))
    made = [await a.broker.create_region(Subject("uid:5"), who, request) for who in (session, None)]
    a.sessions.close(session)
    told = [region_to_proto(region.facts) for region in made]
    assert [(each.slurm_job, each.pod) for each in told] == [("42", ""), ("", "")]
    for one in made:
        await a.broker.delete_region(ROOT, one.name, force=False)


async def test_a_session_ends_its_regions_also_one_that_is_being_made(pair: list[Host]) -> None:
    a, _ = pair
    session = a.sessions.open(Subject("uid:5"), 1)
    await a.broker.create_region(Subject("uid:5"), session, RegionRequest("", 4096, "bar0", "", {}, None))
    making = asyncio.create_task(
        a.broker.create_region(Subject("uid:5"), session, RegionRequest("", 16 * MIB, "bar0", "", {}, None))
    )
    await asyncio.sleep(0)
    a.sessions.close(session)
    await making
    await eventually(lambda: len(a.broker.regions) == 0)


async def test_only_the_owner_manages(pair: list[Host]) -> None:
    a, _ = pair
    owned = await a.broker.create_region(
        Subject("uid:5"), None, RegionRequest("", 1, "bar0", "", {}, Lease(LeaseKind.TTL, 60))
    )
    for subject in (Subject("uid:6"), ANONYMOUS, Subject("uid:5", node="b"), Subject("uid:0", node="b")):
        with pytest.raises(errors.AccessDenied):
            await a.broker.delete_region(subject, owned.name, force=True)
        with pytest.raises(errors.AccessDenied):
            a.broker.renew_leases(subject, [owned.name])
    a.broker.renew_leases(Subject("uid:0", ("gid:0",)), [owned.name])
    await a.broker.delete_region(Subject("uid:5"), owned.name, force=False)


async def test_limits_of_regions_links_and_grants(monkeypatch: pytest.MonkeyPatch) -> None:
    async with hosts("a", "b", max_regions=2) as (a, b):
        source, sink = await region(a, 10), await region(b, 10)
        await region(a, 10)
        with pytest.raises(errors.LimitReached):
            await region(a, 10)
        monkeypatch.setattr("peermem.broker.accepted.MAX_GRANTS_OF_LINK", 0)
        assert type(await failure(await start(a, whole(source, sink)))) is errors.LimitReached
        monkeypatch.setattr("peermem.broker.accepted.MAX_LINKS", 0)
        assert type(await failure(await start(b, whole(source, sink)))) is errors.LimitReached


async def test_grants_that_are_being_made_count(pair: list[Host], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("peermem.broker.accepted.MAX_GRANTS_OF_LINK", 1)
    a, b = pair
    source, sink = await region(a, 10), await region(b, 10)
    gate, reached = asyncio.Event(), asyncio.Event()

    async def wait() -> None:
        reached.set()
        await gate.wait()

    with turned_on("grant.make", wait):
        first = await start(a, whole(source, sink))
        await reached.wait()
        assert type(await failure(await start(a, whole(source, sink)))) is errors.LimitReached
        gate.set()
        assert (await outcome(first)).error is None


async def test_an_ended_transfer_keeps_none_of_its_work(pair: list[Host]) -> None:
    class Column(tuple[int, ...]):
        pass

    a, b = pair
    source, sink = await region(a, MIB), await region(b, MIB)
    offsets = [Column(range(0, MIB, 1024)) for _ in range(2)]
    kept = []
    for host in (a, b):
        entry = columns(source.name, sink.name, offsets[0], Column(reversed(offsets[0])), [512] * 1024)
        kept.append(await start(host, entry))
        await outcome(kept[-1])
    names = [transfer.facts.name for transfer in kept]
    trace = weakref.ref(source)
    a_region = source.name
    del entry, source
    await a.broker.delete_region(ANONYMOUS, a_region, force=False)
    for _ in range(3):
        await asyncio.sleep(0)
    gc.collect()
    assert trace() is None
    assert [transfer.facts.name for transfer in kept] == names


async def test_a_relay_follows_the_node_that_runs_the_transfer() -> None:
    async with hosts("a", "b", "c") as (a, b, c):
        source, sink = await region(a, MIB, data=b"relayed"), await region(b, MIB)
        transfer = await start(c, whole(source, sink), checksum=True)
        facts = await outcome(transfer)
        assert (facts.state, facts.direction, facts.bytes_done) == (State.SUCCEEDED, Direction.RELAYED, MIB)
        assert facts.executed_by.startswith("nodes/a/transfers/")
        assert bytes(sink.memory.view()[:7]) == b"relayed"


async def test_a_relay_that_is_cancelled_or_out_of_time_before_it_began() -> None:
    async with hosts("a", "b", "c") as (a, b, c):
        source, sink = await region(a, MIB), await region(b, MIB)
        c.cues.gates["create_transfer"] = asyncio.Event()
        a.tcp.hold = True
        transfer = await start(c, whole(source, sink))
        await eventually(lambda: "create_transfer" in c.cues.calls)
        cancelling = asyncio.create_task(c.broker.cancel_transfer(ANONYMOUS, transfer.facts.name))
        await asyncio.sleep(0)
        c.cues.gates["create_transfer"].set()
        await eventually(lambda: "cancel_transfer" in c.cues.calls)
        a.tcp.let_go()
        facts = await cancelling
        assert facts.state is State.CANCELLED
        assert type(facts.error) is errors.TransferCancelled


async def test_a_relay_seeks_lost_contact_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("peermem.broker.relays._RETRY", 0.001)
    async with hosts("a", "b", "c") as (a, b, c):
        source, sink = await region(a, MIB), await region(b, MIB)
        c.cues.faults["watch_transfer"] = errors.NodeUnreachable("Nobody answers.")
        transfer = await start(c, whole(source, sink))
        await eventually(lambda: c.cues.calls.count("watch_transfer") > 3)
        assert not transfer.ended.is_set()
        del c.cues.faults["watch_transfer"]
        assert (await outcome(transfer)).state is State.SUCCEEDED
        monkeypatch.setattr("peermem.broker.relays._PATIENCE", 0.0)
        for fault in (errors.NodeUnreachable("Nobody answers."), errors.TransferNotFound("Not here.")):
            c.cues.faults["watch_transfer"] = fault
            assert type(await failure(await start(c, whole(source, sink)))) is errors.NodeUnreachable
        c.cues.faults["create_transfer"] = errors.NodeUnreachable("It did not answer.", code="DEADLINE_EXCEEDED")
        assert "may go on there" in (await failure(await start(c, whole(source, sink)))).message
        c.cues.faults["create_transfer"] = errors.LimitReached("Too many.")
        c.cues.once["create_transfer"] = errors.NodeUnreachable("It did not answer.", code="DEADLINE_EXCEEDED")
        monkeypatch.setattr("peermem.broker.relays._PATIENCE", 5.0)
        error = await failure(await start(c, whole(source, sink)))
        assert type(error) is errors.NodeUnreachable, "the first request may have been taken by a run that died"
        assert "may go on there" in error.message
        assert "Too many." in error.message
        assert type(await failure(await start(c, whole(source, sink)))) is errors.LimitReached
        assert isinstance(transfer, Relay)


async def test_a_report_that_is_silent_is_asked_for_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("peermem.broker.relays._QUIET", 0.02)
    monkeypatch.setattr("peermem.broker.relays._RETRY", 0.001)
    async with hosts("a", "b", "c") as (a, b, c):
        source, sink = await region(a, MIB), await region(b, MIB)
        a.tcp.hold = True
        transfer = await start(c, whole(source, sink))
        await eventually(lambda: c.cues.calls.count("watch_transfer") > 3)
        assert not transfer.ended.is_set()
        a.tcp.let_go()
        assert (await outcome(transfer)).state is State.SUCCEEDED
        a.tcp.hold = True
        c.cues.gates["watch_transfer"] = asyncio.Event()  # as a daemon that answers pings and nothing else
        monkeypatch.setattr("peermem.broker.relays._PATIENCE", 0.03)
        error = await failure(await start(c, whole(source, sink)))
        assert "may go on there" in error.message
        a.tcp.let_go()
        await eventually(lambda: a.broker.transfers.running_count == 0)


async def test_draining_refuses_new_work_and_then_fails_what_still_runs(pair: list[Host]) -> None:
    a, b = pair
    source, sink = await region(a, MIB), await region(b, MIB)
    a.tcp.hold = True
    transfer = await start(a, whole(source, sink))
    await eventually(lambda: a.tcp.held == 1)
    draining = asyncio.create_task(a.broker.drain(0.05))
    await asyncio.sleep(0)
    with pytest.raises(errors.ShuttingDown):
        await start(a, whole(source, sink))
    with pytest.raises(errors.ShuttingDown):
        await region(a, 1)
    await draining
    assert type(await failure(transfer)) is errors.ShuttingDown


async def test_a_link_to_a_node_that_shuts_down_is_refused(pair: list[Host]) -> None:
    a, b = pair
    source, sink = await region(a, 10), await region(b, 10)
    await b.broker.serving.close()
    assert type(await failure(await start(a, whole(source, sink)))) is errors.ShuttingDown


async def test_idle_links_are_closed() -> None:
    async with hosts("a", "b", link_idle=0.0) as (a, b):
        source, sink = await region(a, 10), await region(b, 10)
        await outcome(await start(a, whole(source, sink)))
        assert a.broker.node_facts().link_count == b.broker.node_facts().link_count == 1
        a.broker.links.tend()
        await eventually(lambda: a.broker.node_facts().link_count == b.broker.node_facts().link_count == 0)
        await eventually(lambda: b.broker.serving.grant_count == 0)
        assert (await outcome(await start(a, whole(source, sink)))).state is State.SUCCEEDED


async def test_a_link_is_not_idle_while_a_checksum_is_computed_at_its_far_end() -> None:
    async with hosts("a", "b", link_idle=0.0) as (a, b):
        source, sink = await region(a, 10), await region(b, 10)
        gate = a.cues.gates["checksum"] = asyncio.Event()
        transfer = await start(a, whole(source, sink), checksum=True)
        await eventually(lambda: "checksum" in a.cues.calls)
        a.broker.links.tend()
        assert a.broker.node_facts().link_count == 1
        gate.set()
        assert (await outcome(transfer)).state is State.SUCCEEDED
        a.broker.links.tend()
        assert a.broker.node_facts().link_count == 0


async def test_transfers_are_remembered_for_a_while(pair: list[Host]) -> None:
    async with hosts("x", keep_ended=2) as (x,):
        source, sink = await region(x, 10), await region(x, 10)
        ended = [(await outcome(await start(x, whole(source, sink)))).name for _ in range(3)]
        assert [facts.name for facts in x.broker.transfers.newest(running_only=False)] == [ended[2], ended[1]]
        assert x.broker.transfer(ended[2]).state is State.SUCCEEDED
        with pytest.raises(errors.TransferNotFound):
            x.broker.transfer(ended[0])
        assert (await x.broker.cancel_transfer(ANONYMOUS, ended[2])).state is State.SUCCEEDED
        with pytest.raises(errors.WrongNode):
            x.broker.transfer(ChildName("b", "transfers", "t"))
    async with hosts("x", keep_ended_for=0.0) as (x,):
        source, sink = await region(x, 10), await region(x, 10)
        name = (await outcome(await start(x, whole(source, sink)))).name
        await asyncio.sleep(0.001)
        with pytest.raises(errors.TransferNotFound):
            x.broker.transfer(name)
