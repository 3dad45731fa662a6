"""Brokers over the verbs fabric, whose NIC is a stand-in: what subjects have of it, and that it goes with them."""

from __future__ import annotations

import errno
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack

import pytest

from peermem.broker.broker import Broker
from peermem.core.identity import ANONYMOUS, Subject
from peermem.core.types import FabricKind
from peermem.fabric.verbs_fabric import VerbsFabric
from tests.broker.support import content, eventually, outcome, region, start, whole
from tests.doubles import Host
from tests.fabric.nic_double import NICS
from tests.fabric.pyverbs_double import pyverbs

ANN, BEN = Subject("uid:1"), Subject("uid:2")
VERBS, TCP = FabricKind.VERBS, FabricKind.TCP
LENGTH = 100_000


class VerbsHost(Host):
    """A broker with the NIC port nic0/1."""

    def __init__(self, node: str, brokers: dict[str, Broker]) -> None:
        self.verbs = VerbsFabric(["nic0"], on_link_lost=lambda link_id: self.broker.serving.link_lost(link_id))
        super().__init__(node, brokers, {"link_idle": 0.0}, self.verbs)

    @property
    def objects(self) -> Counter[str]:
        """What is open of the NIC."""
        return +self.verbs.object_counts()


@pytest.fixture
async def pair() -> AsyncIterator[Sequence[VerbsHost]]:
    brokers: dict[str, Broker] = {}
    with pyverbs("nic0"):
        pair = [VerbsHost(node, brokers) for node in ("a", "b")]
        async with AsyncExitStack() as stack:
            for host in pair:
                await host.open(stack)
            yield pair
        assert [host.objects for host in pair] == [{}, {}]


async def test_a_region_is_used_by_two_subjects_in_turn(pair: Sequence[VerbsHost]) -> None:
    a, b = pair
    x, y = await region(a, LENGTH, data=b"first"), await region(b, LENGTH)
    assert [host.objects for host in pair] == [{"pd": 1, "mr": 1}] * 2, "its owner's"
    for number, subject in enumerate((ANN, BEN, ANN, BEN)):
        source, sink, there = (x, y, b) if number % 2 == 0 else (y, x, a)
        facts = await outcome(await start(a, whole(source, sink), checksum=True, subject=subject))
        assert (facts.error, facts.fabric) == (None, VERBS)
        assert (await content(there, sink)).startswith(b"first")
        await eventually(lambda: b.broker.serving.grant_count == 0)
    assert [host.objects for host in pair] == [{"pd": 3, "mr": 3, "qp": 2, "cq": 2}] * 2
    a.broker.links.tend()
    await eventually(lambda: [host.objects for host in pair] == [{"pd": 1, "mr": 1}] * 2)
    for host, made in ((a, x), (b, y)):
        await host.broker.delete_region(ANONYMOUS, made.name, force=False)
    assert [host.objects for host in pair] == [{}, {}]


async def test_an_owner_that_moves_its_own_region_needs_no_more_than_that(pair: Sequence[VerbsHost]) -> None:
    a, b = pair
    x, y = await region(a, LENGTH), await region(b, LENGTH)
    assert (await outcome(await start(a, whole(x, y)))).fabric is VERBS
    assert a.objects == {"pd": 1, "mr": 1, "qp": 1, "cq": 1}
    assert (b.objects["pd"], b.objects["qp"]) == (2, 1), "at b its owner is another one: a client of b"


async def test_a_node_that_may_lock_no_more_serves_further_subjects_over_tcp(pair: Sequence[VerbsHost]) -> None:
    a, b = pair
    x, y = await region(a, LENGTH), await region(b, LENGTH)
    NICS.fails["MR"] = errno.ENOMEM
    facts = await outcome(await start(a, whole(x, y), subject=ANN))
    assert (facts.error, facts.fabric) == (None, TCP)
    assert "one more subject" in facts.fabric_why
    NICS.fails.clear()


async def test_a_rail_that_breaks_is_counted_and_comes_back(pair: Sequence[VerbsHost]) -> None:
    a, b = pair
    x, y = await region(a, LENGTH, data=b"after"), await region(b, LENGTH)
    await outcome(await start(a, whole(x, y)))
    (link,) = a.verbs._links
    (rail,) = link.uses(lambda _: True)
    rail.fail()
    assert a.broker.links.rails_down()[VERBS] == 1
    await eventually(lambda: a.broker.links.rails_down()[VERBS] == 0)
    assert 'peermem_fabric_failures_total{fabric="verbs",what="rail"} 1.0' in a.metrics.render()[0].decode()
    assert (await outcome(await start(a, whole(x, y)))).error is None
    assert (await content(b, y)).startswith(b"after")
