"""What one request, or one event at a bad moment, must not do to the whole daemon."""

import asyncio

import pytest

from peermem.core import errors
from peermem.core.grant import Wanted
from peermem.core.identity import ANONYMOUS, Subject
from peermem.core.segments import columns
from peermem.core.transfer import TransferRequest
from peermem.core.types import Rights
from tests.broker.conftest import hosts
from tests.broker.support import eventually, failure, outcome, region, start, whole
from tests.doubles import Host


async def test_what_was_relayed_here_is_not_relayed_on(pair: list[Host]) -> None:
    a, b = pair
    source, sink = await region(a, 10), await region(a, 10)
    with pytest.raises(errors.WrongNode, match="directory"):
        await b.broker.create_transfer(ANONYMOUS, TransferRequest([whole(source, sink)]), relayed=True)
    assert b.broker.transfers.running_count == 0


async def test_transfers_of_very_many_segments_do_not_add_up() -> None:
    async with hosts("a", "b", max_segments=10) as (a, b):
        source, sink = await region(a, 1000), await region(b, 1000)
        offsets = range(0, 800, 10)
        many = columns(source.name, sink.name, offsets, offsets, [1])
        a.tcp.hold = True
        first = await start(a, many)  # 80 segments: as many as eight transfers of ten
        await eventually(lambda: a.tcp.held > 0)
        with pytest.raises(errors.LimitReached, match="80 segments"):
            await start(a, whole(source, sink))
        a.tcp.let_go()
        await outcome(first)
        await outcome(await start(a, whole(source, sink)))


async def test_a_renewal_that_fails_is_not_tried_for_ever() -> None:
    async with hosts("a", "b", grant_ttl=0.2, retry_for=0.1) as (a, b):
        source, sink = await region(a, 64 << 20), await region(b, 64 << 20)
        a.tcp.hold = True
        transfer = await start(a, whole(source, sink))
        await eventually(lambda: a.tcp.held == 16)
        held_since = asyncio.get_running_loop().time()
        await eventually(lambda: asyncio.get_running_loop().time() > held_since + 0.2)
        a.cues.faults["acquire_grant"] = errors.NodeUnreachable("It is gone.")
        a.tcp.let_go()
        assert type(await failure(transfer)) in (errors.NodeUnreachable, errors.GrantRefused)
        tries = a.cues.calls.count("acquire_grant")
        for _ in range(100):
            await asyncio.sleep(0)
        assert a.cues.calls.count("acquire_grant") == tries


async def test_a_region_made_anew_and_larger_takes_a_larger_transfer(pair: list[Host]) -> None:
    a, b = pair
    source, sink = await region(a, 100, data=b"x" * 100), await region(b, 10, "inbox")
    await outcome(await start(a, columns(source.name, sink.name, (0,), (0,), (10,))))
    await b.broker.delete_region(ANONYMOUS, sink.name, force=False)
    sink = await region(b, 100, "inbox")
    facts = await outcome(await start(a, whole(source, sink)))
    assert (facts.error, bytes(sink.memory.view()[:])) == (None, b"x" * 100)


async def test_grants_do_not_outlive_their_transfers_on_a_link_that_stays(pair: list[Host]) -> None:
    a, b = pair
    source, sink = await region(a, 10), await region(b, 10)
    for number in range(20):
        await outcome(await start(a, whole(source, sink), subject=Subject(f"uid:{number}")))
        assert a.broker.links.grant_count == 0
    await eventually(lambda: b.broker.serving.grant_count == 0)
    assert a.cues.calls.count("open_link") == 1


@pytest.mark.parametrize(
    ("offsets", "lengths", "kind"),
    [
        ([0], [], errors.SegmentsMismatch),
        ([0, 45], [5, 6], errors.OutOfRange),
        ([0] * 262_145, [1] * 262_145, errors.InvalidField),
    ],
)
async def test_checksums_of_nonsense(
    pair: list[Host], offsets: list[int], lengths: list[int], kind: type[errors.PeermemError]
) -> None:
    a, b = pair
    source, sink = await region(a, 100), await region(b, 100)
    await outcome(await start(a, whole(source, sink)))
    link = a.broker.links.kept("b", next(kind for kind in a.broker.fabrics if kind.value == "tcp"))
    assert link is not None
    held = await link.grant(Wanted(sink.name, Rights.WRITE, ANONYMOUS, 20, 50))
    with pytest.raises(kind):
        await link.source.checksum(link._link_id, held.grant_id, offsets, lengths, 0)
    with pytest.raises(errors.GrantRefused):
        await link.source.checksum(b"x" * 16, held.grant_id, [0], [1], 0)
