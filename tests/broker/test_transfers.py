"""Transfers that one broker runs between its own regions and another broker's: what arrives, and how they fail."""

from __future__ import annotations

import asyncio
import random

import google_crc32c
import pytest

from peermem.core import errors
from peermem.core.identity import ANONYMOUS
from peermem.core.names import ChildName
from peermem.core.plan import Direction
from peermem.core.segments import Stride, columns, strided
from peermem.core.transfer import State
from peermem.core.types import FabricKind
from peermem.fabric.base import Status
from tests.broker.conftest import hosts
from tests.broker.support import eventually, failure, outcome, region, start, whole
from tests.doubles import MIB, Host


def noise(length: int, seed: int = 1) -> bytes:
    return random.Random(seed).randbytes(length)


async def test_push_pull_and_local_move_the_bytes_and_verify_them(pair: list[Host]) -> None:
    a, b = pair
    data = noise(3 * MIB + 17)
    here, there, back = await region(a, len(data), data=data), await region(b, len(data)), await region(a, len(data))
    for host, source, sink, direction, fabric in (
        (a, here, there, Direction.PUSH, FabricKind.TCP),
        (a, there, back, Direction.PULL, FabricKind.TCP),
        (a, here, back, Direction.LOCAL, FabricKind.LOCAL),
    ):
        sink.memory.view()[:] = bytes(len(data))
        facts = await outcome(await start(host, whole(source, sink), checksum=True))
        assert (facts.state, facts.direction, facts.fabric) == (State.SUCCEEDED, direction, fabric)
        assert facts.bytes_done == facts.bytes_total == len(data)
        assert facts.crc32c == google_crc32c.value(data)
        assert bytes(sink.memory.view()) == data


async def test_several_region_pairs_in_one_transfer(pair: list[Host]) -> None:
    a, b = pair
    data = noise(64 << 10)
    one, two = await region(a, len(data), data=data), await region(b, len(data), data=data[::-1])
    sinks = [await region(b, len(data)), await region(a, len(data)), await region(a, 2 * len(data))]
    facts = await outcome(
        await start(a, whole(one, sinks[0]), whole(two, sinks[1]), whole(one, sinks[2]), checksum=True)
    )
    assert facts.state is State.SUCCEEDED
    assert [bytes(sink.memory.view()[: len(data)]) for sink in sinks] == [data, data[::-1], data]
    assert facts.crc32c == google_crc32c.value(data + data[::-1] + data)


async def test_a_strided_list_gathers_and_scatters(pair: list[Host]) -> None:
    a, b = pair
    data = noise(1000 * 96)
    source, sink = await region(a, len(data), data=data), await region(b, 1000 * 64)
    entry = strided(source.name, sink.name, Stride(32, 96), Stride(0, 64), 64, 1000, 1000)
    assert (await outcome(await start(a, entry))).state is State.SUCCEEDED
    assert bytes(sink.memory.view()) == b"".join(data[start + 32 : start + 96] for start in range(0, len(data), 96))


@pytest.mark.parametrize(
    ("status", "fault"),
    [
        (Status.LOC_PROT_ERR, errors.RegionRevoked),
        (Status.REM_OP_ERR, errors.RegionRevoked),
        (Status.REM_INV_REQ_ERR, errors.Internal),
    ],
)
async def test_a_request_that_ends_badly_fails_the_transfer(
    pair: list[Host], status: Status, fault: type[errors.PeermemError]
) -> None:
    a, b = pair
    source, sink = await region(a, MIB), await region(b, MIB)
    a.tcp.statuses = [status]
    transfer = await start(a, whole(source, sink))
    assert type(await failure(transfer)) is fault
    assert transfer.facts.bytes_done == 0
    assert (await outcome(await start(a, whole(source, sink)))).state is State.SUCCEEDED


async def test_a_defect_fails_the_transfer_and_is_logged(pair: list[Host], capsys: pytest.CaptureFixture[str]) -> None:
    a, b = pair
    source, sink = await region(a, 10), await region(b, 10)
    a.tcp.defect = RuntimeError("what nobody thought of")
    error = await failure(await start(a, whole(source, sink)))
    assert type(error) is errors.Internal
    assert "nobody thought of" not in error.message
    assert "nobody thought of" in "".join(capsys.readouterr())


async def test_access_that_is_refused_again_and_again_ends_with_grant_refused(pair: list[Host]) -> None:
    a, b = pair
    source, sink = await region(a, MIB), await region(b, MIB)
    a.tcp.statuses = [Status.REM_ACCESS_ERR] * 2
    assert type(await failure(await start(a, whole(source, sink)))) is errors.GrantRefused


async def test_a_region_that_goes_after_a_refusal_is_told_to_have_gone(pair: list[Host]) -> None:
    """A grant may have run out, and the one after it ended with its region."""
    a, b = pair
    source, sink = await region(a, MIB), await region(b, MIB)
    a.tcp.hold = True
    transfer = await start(a, whole(source, sink))
    for _ in range(2):
        await eventually(lambda: a.tcp.held == 1)
        a.tcp.statuses = [Status.REM_ACCESS_ERR]
        if a.cues.calls.count("acquire_grant") == 2:
            a.cues.once["acquire_grant"] = errors.RegionDeleted("It is being deleted.")
        a.tcp.links[0].let_go()
    assert type(await failure(transfer)) is errors.RegionDeleted


async def test_a_refusal_is_met_with_a_new_grant(pair: list[Host]) -> None:
    a, b = pair
    source, sink = await region(a, MIB, data=noise(MIB)), await region(b, MIB)
    a.tcp.statuses = [Status.REM_ACCESS_ERR]
    facts = await outcome(await start(a, whole(source, sink)))
    assert (facts.state, facts.bytes_done) == (State.SUCCEEDED, MIB)


async def test_memory_that_vanishes_here_or_there(pair: list[Host]) -> None:
    a, b = pair
    here, there = await region(a, MIB), await region(b, MIB)
    for lost, named in ((a, here), (b, there)):
        lost.device.vanished = True
        for entry in (whole(here, there), whole(there, here)):
            error = await failure(await start(a, entry))
            assert type(error) is errors.RegionRevoked
            assert error.metadata["region"] == str(named.name)
        lost.device.vanished = False


async def test_a_checksum_that_differs_fails_the_transfer(pair: list[Host]) -> None:
    a, b = pair
    source, sink = await region(a, MIB, data=noise(MIB)), await region(b, MIB)
    a.cues.gates["checksum"] = asyncio.Event()
    transfer = await start(a, whole(source, sink), checksum=True)
    await eventually(lambda: "checksum" in a.cues.calls)
    sink.memory.view()[5] ^= 1
    a.cues.gates["checksum"].set()
    error = await failure(transfer)
    assert type(error) is errors.ChecksumMismatch
    assert error.metadata == {"local": str(source.name), "remote": str(sink.name)}


async def test_a_transfer_can_end_while_the_other_side_computes_a_checksum(pair: list[Host]) -> None:
    a, b = pair
    source, sink = await region(a, MIB), await region(b, MIB)
    a.cues.gates["checksum"] = asyncio.Event()
    cancelled = await start(a, whole(source, sink), checksum=True)
    late = await start(a, whole(source, sink), checksum=True, timeout=0.05)
    await eventually(lambda: "checksum" in a.cues.calls)
    async with asyncio.timeout(5):
        assert (await a.broker.cancel_transfer(ANONYMOUS, cancelled.facts.name)).state is State.CANCELLED
        assert type(await failure(late)) is errors.Timeout


async def test_a_timeout_and_a_cancel_hold_for_requests_that_are_on_the_way(pair: list[Host]) -> None:
    a, b = pair
    source, sink = await region(a, 4 * MIB, data=noise(4 * MIB)), await region(b, 4 * MIB)
    a.tcp.hold = True
    transfer = await start(a, whole(source, sink), timeout=0.25)
    await eventually(lambda: transfer.facts.state is State.FENCING)
    assert not transfer.ended.is_set()
    a.tcp.let_go()
    error = await failure(transfer)
    assert type(error) is errors.Timeout
    before = bytes(sink.memory.view())
    await asyncio.sleep(0)
    assert bytes(sink.memory.view()) == before


async def test_a_region_is_not_given_back_before_its_transfer_is_fenced(pair: list[Host]) -> None:
    a, b = pair
    source, sink = await region(a, MIB), await region(b, MIB)
    a.tcp.hold = True
    transfer = await start(a, whole(source, sink))
    await eventually(lambda: a.tcp.held == 1)
    with pytest.raises(errors.RegionInUse):
        await a.broker.delete_region(ANONYMOUS, source.name, force=False)
    deletion = asyncio.create_task(a.broker.delete_region(ANONYMOUS, source.name, force=True))
    await eventually(lambda: transfer.facts.state is State.FENCING)
    assert not deletion.done()
    with pytest.raises(errors.RegionDeleted):
        await start(a, whole(source, sink))
    a.tcp.let_go()
    await deletion
    assert type(await failure(transfer)) is errors.RegionDeleted


async def test_a_region_deleted_at_the_far_end_fails_the_transfer_with_that_reason(pair: list[Host]) -> None:
    a, b = pair
    source, sink = await region(a, 2 * MIB), await region(b, 2 * MIB, "sink")
    a.tcp.hold = True
    transfer = await start(a, whole(source, sink))
    await eventually(lambda: a.tcp.held == 2)
    await b.broker.delete_region(ANONYMOUS, sink.name, force=False)
    a.tcp.let_go()
    assert type(await failure(transfer)) is errors.RegionDeleted


async def test_a_region_deleted_since_the_last_transfer_is_not_found(pair: list[Host]) -> None:
    a, b = pair
    source, sink = await region(a, MIB), await region(b, MIB)
    await outcome(await start(a, whole(source, sink)))
    await b.broker.delete_region(ANONYMOUS, sink.name, force=False)
    assert type(await failure(await start(a, whole(source, sink)))) is errors.RegionNotFound


async def test_a_region_made_anew_since_the_last_transfer_gets_all_the_bytes(pair: list[Host]) -> None:
    a, b = pair
    source, sink = await region(a, 4 * MIB, data=noise(4 * MIB)), await region(b, 4 * MIB, "sink")
    await outcome(await start(a, whole(source, sink)))
    await b.broker.delete_region(ANONYMOUS, sink.name, force=False)
    sink = await region(b, 4 * MIB, "sink")
    assert (await outcome(await start(a, whole(source, sink), checksum=True))).state is State.SUCCEEDED
    assert bytes(sink.memory.view()) == bytes(source.memory.view())


async def test_a_region_made_anew_and_smaller_is_out_of_range(pair: list[Host]) -> None:
    a, b = pair
    source, sink = await region(a, MIB), await region(b, MIB, "sink")
    await outcome(await start(a, whole(source, sink)))
    await b.broker.delete_region(ANONYMOUS, sink.name, force=False)
    await region(b, MIB - 1, "sink")
    assert type(await failure(await start(a, whole(source, sink)))) is errors.OutOfRange


async def test_bytes_never_end_up_in_two_regions_of_one_name(pair: list[Host]) -> None:
    a, b = pair
    source, sink = await region(a, 4 * MIB), await region(b, 4 * MIB, "sink")
    await outcome(await start(a, whole(source, sink)))  # leaves a link to reuse
    a.tcp.hold = True
    transfer = await start(a, whole(source, sink))
    await eventually(lambda: a.tcp.held == 4)
    a.tcp.links[0].let_go(1)
    await eventually(lambda: transfer.facts.bytes_done == MIB)
    await b.broker.delete_region(ANONYMOUS, sink.name, force=False)
    await region(b, 4 * MIB, "sink")
    a.tcp.let_go()
    assert type(await failure(transfer)) is errors.RegionDeleted
    assert transfer.facts.bytes_done == MIB


@pytest.mark.parametrize("retry_for", [0.0, 10.0])
async def test_grants_are_renewed_while_a_transfer_runs(retry_for: float) -> None:
    async with hosts("a", "b", grant_ttl=0.2, retry_for=retry_for) as (a, b):
        source, sink = await region(a, 32 * MIB, data=noise(1000)), await region(b, 32 * MIB)
        a.tcp.hold = True
        transfer = await start(a, whole(source, sink))
        await eventually(lambda: a.tcp.held == 16)
        first = a.cues.calls.count("acquire_grant")
        await eventually(lambda: b.broker.serving.grant_count == 0)
        a.tcp.let_go()
        assert (await outcome(transfer)).state is State.SUCCEEDED
        assert a.cues.calls.count("acquire_grant") > first
        assert bytes(sink.memory.view()[:1000]) == bytes(source.memory.view()[:1000])


async def test_a_link_that_the_far_end_forgot_is_opened_anew(pair: list[Host]) -> None:
    a, b = pair
    source, sink = await region(a, 100), await region(b, 100)
    await outcome(await start(a, whole(source, sink)))
    for fault in (errors.StaleEpoch("An earlier run."), errors.LinkNotFound("Not open.")):
        opened = a.cues.calls.count("open_link")
        a.cues.once["acquire_grant"] = fault
        other = await region(b, 100)
        assert (await outcome(await start(a, whole(source, other)))).state is State.SUCCEEDED
        assert a.cues.calls.count("open_link") == opened + 1


async def test_what_the_other_node_refuses_is_the_transfers_error(pair: list[Host]) -> None:
    a, b = pair
    source, sink = await region(a, 200), await region(b, 100)
    missing = columns(source.name, ChildName("b", "regions", "none"), (0,), (0,), (1,))
    assert type(await failure(await start(a, missing))) is errors.RegionNotFound
    error = await failure(await start(a, whole(source, sink)))
    assert type(error) is errors.OutOfRange
    assert error.metadata == {"region": str(sink.name), "reach": "200", "length": "100"}


async def test_what_this_node_refuses_at_once() -> None:
    async with hosts("a", "b", max_running=1) as (a, b):
        x, y, z = await region(a, 100), await region(a, 100), await region(b, 100)
        nowhere = ChildName("nowhere", "regions", "x")
        with pytest.raises(errors.NodeNotFound):
            await start(a, columns(x.name, nowhere, (0,), (0,), (1,)))
        with pytest.raises(errors.RegionNotFound):
            await start(a, columns(ChildName("a", "regions", "none"), x.name, (0,), (0,), (1,)))
        with pytest.raises(errors.OutOfRange):
            await start(a, columns(x.name, y.name, (2**64 - 1,), (0,), (2,)))
        with pytest.raises(errors.SegmentsOverlap):
            await start(a, columns(x.name, x.name, (0,), (50,), (51,)))
        with pytest.raises(errors.FabricUnavailable):
            await start(a, whole(x, y), fabric=FabricKind.TCP)
        with pytest.raises(errors.FabricUnavailable):
            await start(a, whole(x, z), fabric=FabricKind.VERBS)
        strangers = [
            columns(ChildName(source, "regions", "x"), ChildName(sink, "regions", "y"), (0,), (0,), (1,))
            for source, sink in (("a", "b"), ("c", "d"))
        ]
        with pytest.raises(errors.NoCommonNode):
            await start(a, *strangers)
        a.local.hold = True
        running = await start(a, whole(x, y))
        with pytest.raises(errors.LimitReached):
            await start(a, whole(x, z))
        await eventually(lambda: a.local.held == 1)
        a.local.let_go()
        await outcome(running)
