"""What a broker tells the directory, and what it does when the directory tells of something."""

from __future__ import annotations

import time

import pytest

from peermem.broker import published
from peermem.broker.facts import known_nodes
from peermem.core import errors
from peermem.core.identity import ANONYMOUS, Subject
from peermem.core.names import ChildName
from peermem.core.node import NodeState
from peermem.core.policy import OWN
from peermem.core.region import PublishedRegion, RegionRequest
from peermem.core.types import FabricKind, Path
from peermem.directory.base import GoneNode, NodeEntry
from tests.broker.support import eventually, outcome, region, start, whole
from tests.directory.cued import CuedDirectory
from tests.doubles import MIB, Host

ANN = Subject("uid:1")
LABELS = {"model": "llama"}


def request(name: str, *, publish: bool = True) -> RegionRequest:
    return RegionRequest(name, MIB, "bar0", "", LABELS, None, publish=publish)


async def found(host: Host, subject: Subject = ANN) -> list[str]:
    regions, _ = await published.find(host.broker, subject, LABELS, None, 10)
    return [each.name.id for each in regions]


async def test_a_published_region_is_found_until_it_ends(pair: list[Host]) -> None:
    a, _ = pair
    made = await a.broker.create_region(ANN, None, request("x"))
    quiet = await a.broker.create_region(ANN, None, request("y", publish=False))
    assert (made.facts.published, quiet.facts.published) == (True, False)
    ((told,), last) = await published.find(a.broker, Subject("uid:2"), LABELS, None, 10)
    assert last is None
    assert told == PublishedRegion(ChildName("a", "regions", "x"), MIB, "memfd", Path.HOST, LABELS)
    await a.broker.delete_region(ANN, made.name, force=False)
    assert await found(a) == []


async def test_a_region_whose_device_is_lost_is_withdrawn(pair: list[Host]) -> None:
    a, _ = pair
    made = await a.broker.create_region(ANN, None, request("x"))
    a.device.gone = True
    a.broker.let_go_of_lost_devices()
    await eventually(lambda: not a.broker.directory.status().published)
    assert await found(a) == []
    assert not made.facts.published


async def test_a_region_that_can_not_be_published_is_not_made(pair: list[Host]) -> None:
    a, _ = pair
    a.broker.directory = directory = CuedDirectory()
    directory.full = True
    with pytest.raises(errors.LimitReached):
        await a.broker.create_region(ANN, None, request("x"))
    assert len(a.broker.regions) == 0
    await a.broker.create_region(ANN, None, request("x", publish=False))


async def test_who_is_nobody_finds_nothing_unless_the_daemon_is_open(pair: list[Host]) -> None:
    a, _ = pair
    await a.broker.create_region(ANN, None, request("x"))
    assert await found(a, ANONYMOUS) == ["x"]
    await a.broker.go_by(OWN)
    assert await found(a, Subject("uid:2")) == ["x"]
    with pytest.raises(errors.AccessDenied, match="Show who you are"):
        await found(a, ANONYMOUS)
    with pytest.raises(errors.RegionNotFound):
        a.broker.seen_region(Subject("uid:2"), ChildName("a", "regions", "x"))


async def test_a_link_to_a_run_that_has_ended_is_closed_once_the_directory_says_so(pair: list[Host]) -> None:
    a, b = pair
    a.broker.directory = directory = CuedDirectory(NodeEntry("b", "b.test:1", "an earlier run"))
    await outcome(await start(a, whole(await region(a, MIB), await region(b, MIB))))

    def links() -> int:
        a.broker.links.tend(a.broker.epoch_of)
        return a.broker.links.by_node()["b"]

    assert links() == 1, "the directory may be late"
    directory.tell(NodeEntry("b", "b.test:1", b.broker.epoch))
    assert links() == 1
    directory.tell(NodeEntry("b", "b.test:1"))
    assert links() == 1, "a static directory knows no runs"
    directory.tell(NodeEntry("b", "b.test:1", "the next run"))
    assert links() == 0


async def test_nodes_with_their_state_and_the_links_to_them(pair: list[Host]) -> None:
    a, b = pair
    gone = NodeEntry("c", "10.0.0.3:7470", "e3")
    a.broker.directory = directory = CuedDirectory(NodeEntry("b", "b.test:1", "e", "1", (FabricKind.TCP,), ("nic0/1",)))
    directory.left["c"] = GoneNode(gone, 7.0)
    await outcome(await start(a, whole(await region(a, MIB), await region(b, MIB))))
    here, there, left = known_nodes(a.broker)
    assert (here.node, here.state, [each.name for each in here.devices]) == ("a", NodeState.UP, ["bar0"])
    assert here.links_here == 0
    assert (there.node, there.state, there.since, there.links_here) == ("b", NodeState.UP, 0, 1)
    assert (there.epoch, there.version, there.fabrics, there.nics) == ("e", "1", (FabricKind.TCP,), ("nic0/1",))
    assert (left.node, left.state, left.address) == ("c", NodeState.GONE, gone.address)
    assert left.since == pytest.approx(time.time() - 7, abs=5)
    directory.away_for = 60.0
    here, there, left = known_nodes(a.broker)
    assert [each.state for each in (here, there, left)] == [NodeState.UP, NodeState.UNCONFIRMED, NodeState.GONE]
    assert there.since == pytest.approx(time.time() - 60, abs=5)
