"""Transfers through NICs that misplace what begins within a page of memory on demand."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

import pytest

from peermem.core.segments import SegmentList, columns
from peermem.core.transfer import State
from peermem.core.types import FabricKind, Path
from tests.broker.conftest import NicHost
from tests.broker.support import content, eventually, outcome, region, start, whole
from tests.doubles import MIB
from tests.reach_doubles import PAGE

LENGTH = 5 * MIB
DATA = random.Random(7).randbytes(LENGTH)
ENDS = [("bar2", "bar0"), ("bar0", "bar2"), ("bar2", "bar2")]
WITHIN = ([0, 100_001], [0, 200_003], [70_000, MIB + 5])
SHIFTED = ([0, 20 * PAGE], [3, 3 + 40 * PAGE], [5000, MIB + 7])
"""Nothing begins within a page of what a grant opens, but of the region."""
ALIGNED = ([0, 20 * PAGE], [PAGE, 40 * PAGE], [5000, MIB + 7])


@pytest.fixture
def misplacing(nic_pair: list[NicHost]) -> list[NicHost]:
    for host in nic_pair:
        host.nic.misplaces = True
    return nic_pair


async def moved(
    hosts: Sequence[NicHost], devices: tuple[str, str], lists: tuple[list[int], list[int], list[int]]
) -> tuple[Path | None, str]:
    """Move ranges, compare what arrived with what should, and return the path and why it was taken."""
    source_host, sink_host = hosts
    asked = next(host for host in hosts if host.node == "a")
    source = await region(source_host, LENGTH, data=DATA, device=devices[0])
    sink = await region(sink_host, LENGTH, device=devices[1])
    expected = bytearray(LENGTH)
    for read, write, length in zip(*lists, strict=True):
        expected[write : write + length] = DATA[read : read + length]
    segments: SegmentList = columns(source.name, sink.name, *lists)
    for _ in range(2):  # the second one finds the link and the buffers of the first
        facts = await outcome(await start(asked, segments, checksum=True))
        assert (facts.state, facts.error, facts.fabric) == (State.SUCCEEDED, None, FabricKind.VERBS)
    assert await content(sink_host, sink) == expected
    return facts.path, facts.fabric_why


@pytest.mark.parametrize("devices", ENDS)
@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("lists", [WITHIN, SHIFTED])
async def test_what_begins_within_a_page_is_staged(
    misplacing: list[NicHost],
    devices: tuple[str, str],
    order: int,
    lists: tuple[list[int], list[int], list[int]],
) -> None:
    path, why = await moved(misplacing[::order], devices, lists)
    assert path is Path.STAGED
    assert "within a page" in why


@pytest.mark.parametrize("devices", ENDS)
@pytest.mark.parametrize("order", [1, -1])
async def test_what_begins_at_pages_goes_directly(
    misplacing: list[NicHost], devices: tuple[str, str], order: int
) -> None:
    path, why = await moved(misplacing[::order], devices, ALIGNED)
    here = devices[0 if order == 1 else 1]  # the transfer is asked of node a, wherever its source is
    assert path is (Path.P2PDMA if here == "bar2" else Path.HOST)
    assert "within a page" not in why


async def test_packets_below_a_page_are_staged(misplacing: list[NicHost]) -> None:
    misplacing[0].nic.packet = 1024
    path, _ = await moved(misplacing, ("bar2", "bar2"), ALIGNED)
    assert path is Path.STAGED


async def test_only_a_nic_that_misplaces_makes_it_so(nic_pair: list[NicHost]) -> None:
    path, _ = await moved(nic_pair, ("bar2", "bar2"), WITHIN)
    assert path is Path.P2PDMA


async def test_what_has_no_packets_knows_no_alignment(
    misplacing: list[NicHost], monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b = misplacing
    source, sink = await region(a, LENGTH, data=DATA, device="bar0"), await region(b, LENGTH, device="bar2")
    way = replace(sink.reach.way, alignment=1 << 31)
    monkeypatch.setattr(sink, "reach", replace(sink.reach, way=way))
    facts = await outcome(await start(a, whole(source, sink), fabric=FabricKind.TCP))
    assert (facts.state, facts.error, facts.path) == (State.SUCCEEDED, None, Path.HOST)
    assert await content(b, sink) == DATA


async def test_a_grant_that_is_renewed_stays_staged(misplacing: list[NicHost]) -> None:
    a, b = misplacing
    source, sink = await region(a, LENGTH, data=DATA), await region(b, LENGTH + 1, device="bar2")
    await outcome(await start(a, columns(source.name, sink.name, [0], [1], [LENGTH])))
    a.nic.hold = True
    transfer = await start(a, columns(source.name, sink.name, [0], [1], [LENGTH]))
    await eventually(lambda: a.nic.held > 0)
    for grant in list(b.broker.serving._grants):
        link_id = b.broker.serving._grants[grant].link_id
        await b.broker.serving.release(link_id, [grant])
    a.nic.let_go()
    facts = await outcome(transfer)
    assert (facts.state, facts.error, facts.path) == (State.SUCCEEDED, None, Path.STAGED)
    assert (await content(b, sink))[1:] == DATA


async def test_a_device_is_staged_where_no_nic_reaches_it_on_demand(nic_pair: list[NicHost]) -> None:
    a, b = nic_pair
    for host in nic_pair:
        host.nic.unreachable = {Path.P2PDMA}
    source, sink = await region(a, LENGTH, data=DATA, device="bar2"), await region(b, LENGTH, device="bar2")
    assert source.facts.path is Path.STAGED
    assert source.facts.why.endswith("No better path works: The NIC does not reach it.")
    facts = await outcome(await start(a, whole(source, sink), checksum=True))
    assert (facts.state, facts.fabric, facts.path) == (State.SUCCEEDED, FabricKind.VERBS, Path.STAGED)
    assert await content(b, sink) == DATA
