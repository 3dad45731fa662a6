"""How tenants share a link, step by step."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from peermem.broker.turns import Turns
from peermem.core.identity import ANONYMOUS
from peermem.core.quota import Tenant
from peermem.core.transfer import State
from tests.broker.support import eventually, outcome, region, start, whole
from tests.doubles import MIB, Host
from tests.policies import policy, rule, tenant

SLICE, WINDOW, SHARED = 100, 1600, 400


@dataclass(eq=False)
class Worker:
    """One transfer, with as many slices as it is given."""

    tenant: Tenant
    cost: int = SLICE
    waits: float = 0.0

    def wait(self) -> float:
        return self.waits


@dataclass
class Link:
    """Turns, and what is outstanding in the order of its posting."""

    now: float = 100.0
    outstanding: list[tuple[object, int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.turns = Turns[Worker](SLICE, WINDOW, SHARED, lambda: self.now)

    def post(self) -> Worker | None:
        """Post the next slice, of a worker that has more."""
        turn = self.turns.take()
        if turn is None:
            return None
        line, worker = turn
        self.turns.add(worker)
        self.turns.posted(line, worker.cost)
        self.outstanding.append((line, worker.cost))
        return worker

    def complete(self, count: int = 1) -> None:
        for line, cost in self.outstanding[:count]:
            self.turns.ended(line, cost)  # type: ignore[arg-type]
        del self.outstanding[:count]

    def run(self, steps: int) -> Counter[str]:
        """Post and complete in turn; return the bytes that each tenant posted."""
        posted = Counter[str]()
        for _ in range(steps):
            worker = self.post()
            if worker is not None:
                posted[worker.tenant.key] += worker.cost
            self.complete()
        return posted


def worker(key: str, cost: int = SLICE, weight: int = 1) -> Worker:
    return Worker(Tenant(key, weight=weight), cost)


def test_transfers_of_one_tenant_take_turns() -> None:
    link = Link()
    first, second = worker("a"), worker("a", 1)
    link.turns.add(first)
    link.turns.add(second)
    link.turns.add(first)
    assert [link.post() for _ in range(6)] == [first, second] * 3


def test_who_is_alone_has_the_whole_window() -> None:
    link = Link()
    link.turns.add(worker("a"))
    while link.post():
        pass
    assert sum(cost for _, cost in link.outstanding) == WINDOW
    link.complete()
    assert link.post()
    assert not link.post()


def test_beside_others_each_has_only_so_much_outstanding() -> None:
    link = Link()
    for key in ("a", "b"):
        link.turns.add(worker(key))
    while link.post():
        pass
    assert sum(cost for _, cost in link.outstanding) == 2 * SHARED
    link.complete(8)
    link.now += 2.0  # what b had is over, and its last use is long ago
    alone = Link(link.now)
    alone.turns.add(worker("a"))
    while alone.post():
        pass
    assert sum(cost for _, cost in alone.outstanding) == WINDOW


def test_a_tenant_that_was_there_a_moment_ago_still_counts() -> None:
    link = Link()
    link.turns.add(worker("small", 1))
    turn = link.turns.take()
    assert turn is not None
    link.turns.posted(turn[0], 1)
    link.turns.ended(turn[0], 1)
    link.turns.add(worker("greedy"))
    while link.post():
        pass
    assert sum(cost for _, cost in link.outstanding) == SHARED
    link.now += 1.5
    while link.post():
        pass
    assert sum(cost for _, cost in link.outstanding) == WINDOW


def test_who_asks_for_little_is_next() -> None:
    link = Link()
    for _ in range(50):
        link.turns.add(worker("greedy"))
    for _ in range(10):
        link.post()
    small = worker("small", 1)
    link.turns.add(small)
    link.complete(8)
    assert link.post() is small


@pytest.mark.parametrize(("weights", "costs"), [((1, 1), (100, 100)), ((1, 3), (100, 100)), ((1, 1), (100, 7))])
def test_bytes_are_shared_by_weight(weights: tuple[int, int], costs: tuple[int, int]) -> None:
    link = Link()
    for key, weight, cost, transfers in zip("ab", weights, costs, (40, 2), strict=True):
        for _ in range(transfers):
            link.turns.add(worker(key, cost, weight))
    posted = link.run(20_000)
    assert posted["b"] / posted["a"] == pytest.approx(weights[1] / weights[0], rel=0.05)


def test_who_has_to_wait_loses_no_turn_but_its_own() -> None:
    link = Link()
    slow, other = worker("slow"), worker("other")
    slow.waits = 0.25
    link.turns.add(slow)
    link.turns.add(other)
    assert [link.post() for _ in range(4)] == [other] * 4
    link.complete(4)
    assert link.turns.pause() == 0.25
    slow.waits = 0.0
    assert link.turns.pause() == 0.0
    assert link.post() is slow


def test_who_is_to_go_first_waits_for_no_other_of_its_tenant() -> None:
    link = Link()
    slow, other = worker("slow"), worker("slow")
    slow.waits = 100.0
    link.turns.add(slow)
    link.turns.add(other)
    assert link.turns.take() is None
    link.turns.advance(lambda each: each is other)
    assert link.post() is other


def test_tenants_that_are_gone_are_forgotten() -> None:
    link = Link()
    for number in range(3000):
        link.now += 0.01
        link.turns.add(worker(f"t{number}"))
        turn = link.turns.take()
        assert turn is not None
        link.turns.posted(turn[0], 1)
        link.turns.ended(turn[0], 1)
        assert link.turns.take() is None
    assert not link.turns
    assert len(link.turns._lines) < 200


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 3 * SLICE)), min_size=1, max_size=30))
def test_all_that_wait_get_turns(transfers: list[tuple[str, int]]) -> None:
    link = Link()
    workers = [worker(key, cost) for key, cost in transfers]
    for each in workers:
        link.turns.add(each)
    served = set()
    for _ in range(200 * len(workers)):
        served.add(link.post())
        link.complete()
    assert served >= set(workers)


async def test_bytes_above_a_rate_wait_and_arrive(pair: list[Host]) -> None:
    a, b = pair
    x, y = await region(a, 3 * MIB, data=b"hello"), await region(b, 3 * MIB)
    everything = rule("all", "anyone anyone@*", "read write manage create")
    await a.broker.go_by(policy(everything + tenant("team", "anonymous", "bytes_per_second = '16MiB'")))
    a.broker.tenants.spend(ANONYMOUS, 17 * MIB)
    running = await start(a, whole(x, y))
    await eventually(lambda: any(each.is_waiting for each in a.broker.links._traffic.values()))
    assert running.facts.bytes_done == 0
    assert (await outcome(running)).state is State.SUCCEEDED


async def test_what_waits_is_cancelled_at_once(pair: list[Host]) -> None:
    a, b = pair
    x, y = await region(a, 3 * MIB), await region(b, 3 * MIB)
    everything = rule("all", "anyone anyone@*", "read write manage create")
    await a.broker.go_by(policy(everything + tenant("team", "anonymous", "bytes_per_second = '1MiB'")))
    a.broker.tenants.spend(ANONYMOUS, 1000 * MIB)
    running = await start(a, whole(x, y))
    await eventually(lambda: any(each.is_waiting for each in a.broker.links._traffic.values()))
    assert (await a.broker.cancel_transfer(ANONYMOUS, running.facts.name)).state is State.CANCELLED
