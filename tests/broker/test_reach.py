"""Which fabric moves a region's bytes: by the NICs that were proved, and by what the far end answers."""

from __future__ import annotations

import asyncio
import gc
import weakref

import pytest

from peermem.core import errors
from peermem.core.identity import ANONYMOUS
from peermem.core.region import State as RegionState
from peermem.core.transfer import State
from peermem.core.types import FabricKind, Path
from tests.broker.conftest import NicHost
from tests.broker.support import content, eventually, failure, outcome, region, start, whole
from tests.doubles import MIB

DATA = bytes(range(256)) * 4096


async def test_verbs_carries_what_both_nics_reach(nic_pair: list[NicHost]) -> None:
    a, b = nic_pair
    source, sink = await region(a, MIB, data=DATA), await region(b, MIB)
    assert source.facts.nics == ("nic0/1",)
    assert source.facts.why.startswith("nic0/1")
    facts = await outcome(await start(a, whole(source, sink), checksum=True))
    assert (facts.state, facts.fabric, facts.path) == (State.SUCCEEDED, FabricKind.VERBS, Path.HOST)
    assert facts.fabric_why == "verbs reaches both regions."
    assert await content(b, sink) == DATA


async def test_a_device_is_proved_once_per_nic(nic_pair: list[NicHost]) -> None:
    a, _ = nic_pair
    await asyncio.gather(*(region(a, MIB) for _ in range(5)))
    assert a.nic.probed == [("nic0/1", Path.HOST)]


async def test_a_device_that_one_region_takes_whole_is_tried_before(nic_pair: list[NicHost]) -> None:
    a, _ = nic_pair
    for device in (a.staged, a.on_demand):
        made = await region(a, device.size, device=device.name)
        assert (made.facts.nics, made.facts.path) == (("nic0/1",), device.path)


async def test_without_a_proof_tcp_carries_it_and_the_region_says_why(nic_pair: list[NicHost]) -> None:
    a, b = nic_pair
    a.nic.unreachable = {Path.HOST}
    source, sink = await region(a, MIB, data=DATA), await region(b, MIB)
    assert source.facts.nics == ()
    assert source.facts.why == "No NIC reaches device bar0: The NIC does not reach it."
    for entry in (whole(source, sink), whole(sink, source)):
        facts = await outcome(await start(a, entry))
        assert (facts.state, facts.fabric) == (State.SUCCEEDED, FabricKind.TCP)
        assert "No NIC reaches device bar0" in facts.fabric_why
    assert await content(b, sink) == DATA
    error = await failure(await start(a, whole(source, sink), fabric=FabricKind.VERBS))
    assert type(error) is errors.FabricUnavailable
    assert "not reached over verbs" in error.message


async def test_why_no_nic_reaches_regions_is_known_without_keeping_them(nic_pair: list[NicHost]) -> None:
    a, _ = nic_pair
    a.nic.unreachable = {Path.HOST}
    memories = []
    for _ in range(3):
        made = await region(a, MIB)
        memories.append(weakref.ref(made.memory))
        await a.broker.delete_region(ANONYMOUS, made.name, force=False)
        del made
    gc.collect()
    assert [memory() for memory in memories] == [None] * 3


async def test_a_region_there_that_no_nic_reaches_is_found_out_once(nic_pair: list[NicHost]) -> None:
    a, b = nic_pair
    b.nic.unreachable = {Path.HOST}
    source, sink = await region(a, MIB, data=DATA), await region(b, MIB)
    for _ in range(3):
        facts = await outcome(await start(a, whole(source, sink)))
        assert (facts.state, facts.fabric) == (State.SUCCEEDED, FabricKind.TCP)
        assert facts.fabric_why.startswith("verbs did not reach the region: ")
        assert "No NIC reaches device bar0" in facts.fabric_why
    assert a.cues.calls.count("acquire_grant") == 4, "one that was refused, and one for each transfer"
    error = await failure(await start(a, whole(source, sink), fabric=FabricKind.VERBS))
    assert type(error) is errors.FabricUnavailable


async def test_a_nic_that_cant_connect_is_passed_over(nic_pair: list[NicHost]) -> None:
    a, b = nic_pair
    a.nic.defect = errors.NodeUnreachable("The queue pairs do not connect.")
    a.broker.links.retry_for = 0.1
    source, sink = await region(a, MIB, data=DATA), await region(b, MIB)
    facts = await outcome(await start(a, whole(source, sink)))
    assert (facts.state, facts.fabric) == (State.SUCCEEDED, FabricKind.TCP)
    error = await failure(await start(a, whole(source, sink), fabric=FabricKind.VERBS))
    assert error.message == "The queue pairs do not connect."


@pytest.mark.parametrize("fault", [errors.PortDown, errors.MemlockTooSmall])
async def test_what_fails_is_tried_again_after_a_while(
    nic_pair: list[NicHost], monkeypatch: pytest.MonkeyPatch, fault: type[errors.PeermemError]
) -> None:
    a, _ = nic_pair
    a.nic.ports["nic0/1"] = fault("Not now.")
    assert "Not now." in (await region(a, MIB)).facts.why
    a.nic.ports["nic0/1"] = None
    assert (await region(a, MIB)).facts.nics == ("nic0/1",)
    a.nic.refusal = fault("Not this one.")
    assert "Not this one." in (await region(a, MIB)).facts.why


async def test_a_daemon_without_tcp_refuses_what_verbs_does_not_reach(nic_pair: list[NicHost]) -> None:
    a, _ = nic_pair
    a.broker.registry._insist = True
    a.nic.refusal = errors.MemlockTooSmall("Too little may be locked.")
    with pytest.raises(errors.MemlockTooSmall):
        await region(a, MIB, "mine")
    assert a.device.available == a.device.size
    a.nic.refusal = None
    a.nic.unreachable = {Path.HOST}
    a.nic.ports["nic0/1"] = errors.PortDown("The port is down.")
    with pytest.raises(errors.PortDown):
        await region(a, MIB, "mine")


async def test_a_region_that_ends_while_a_grant_on_it_is_made(nic_pair: list[NicHost]) -> None:
    a, b = nic_pair
    source, sink = await region(a, MIB), await region(b, MIB)
    b.nic.granting = asyncio.Event()
    transfer = await start(a, whole(source, sink))
    await eventually(lambda: sink in b.broker.serving._making)
    deleting = asyncio.create_task(b.broker.delete_region(ANONYMOUS, sink.name, force=False))
    await asyncio.sleep(0)
    assert sink.memory in b.nic.registered
    b.nic.granting.set()
    await deleting
    assert sink.memory not in b.nic.registered
    assert type(await failure(transfer)) in (errors.RegionDeleted, errors.RegionNotFound)


async def test_a_region_that_ends_while_a_link_that_has_a_grant_on_it_is_closed(nic_pair: list[NicHost]) -> None:
    a, b = nic_pair
    source, sink = await region(a, MIB), await region(b, MIB)
    await outcome(await start(a, whole(source, sink)))
    (link_id,) = b.broker.serving._links.ids()
    b.nic.hanging_up = asyncio.Event()
    closing = asyncio.create_task(b.broker.serving.close_link(link_id))
    await asyncio.sleep(0)
    await b.broker.delete_region(ANONYMOUS, sink.name, force=False)
    b.nic.hanging_up.set()
    await closing
    assert b.broker.serving.grant_count == 0


async def test_a_device_that_vanished_gets_its_memory_back_at_once(nic_pair: list[NicHost]) -> None:
    a, b = nic_pair
    source, sink = await region(a, MIB), await region(b, MIB)
    staged = await region(b, MIB, device="bar1")
    b.nic.hold = a.nic.hold = True
    transfer = await start(a, whole(source, sink))
    await eventually(lambda: a.nic.held > 0)
    b.device.gone = True
    b.broker.let_go_of_lost_devices()
    b.broker.let_go_of_lost_devices()
    await eventually(lambda: b.device.available == b.device.size)
    assert sink.facts.state is RegionState.REVOKED
    assert staged.facts.state is RegionState.READY
    assert sink.memory not in b.nic.registered
    a.nic.let_go()
    assert type(await failure(transfer)) is errors.RegionRevoked
    assert type(await failure(await start(a, whole(source, sink)))) is errors.RegionRevoked
    await b.broker.delete_region(ANONYMOUS, sink.name, force=False)
    b.device.gone = False
    assert (await region(b, MIB, sink.name.id)).facts.state is RegionState.READY
