"""Whether what one item costs depends on how many there are, and what a daemon's own memory comes to.

Rules of this file:

* A daemon with few regions and one with many are measured in turns, so that both meet the same machine.
* A cost is per item and the median of some rounds, measured through the client with its own time in it.
* A daemon's own memory is what /proc/PID/status calls RssAnon and RssFile; the regions are RssShmem.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from time import perf_counter

import peermem
from bench.daemons import Daemon
from bench.progress import say, steps

LENGTH = 4 << 10
_BATCH = 100
"""Regions made and deleted again in one round."""
_IN_FLIGHT = 512
_TIMEOUT = 60.0

Route = tuple[peermem.Region, peermem.Region]
"""Source and destination of a transfer."""


@dataclass(frozen=True, slots=True)
class Plan:
    """How much of everything."""

    few: int = 100
    many: int = 10_000
    concurrent: int = 1_000
    rounds: int = 5
    settle: int = 10_000
    """Transfers before memory is looked at."""
    transfers: int = 100_000
    """Transfers before it is looked at again."""

    @property
    def room(self) -> int:
        """Bytes that a node's regions need, and more."""
        return 2 * (self.many + _BATCH) * LENGTH


@dataclass(frozen=True, slots=True)
class Costs:
    """Seconds per item."""

    creation: float
    listing: float
    transfer: float


@dataclass(frozen=True, slots=True)
class Scale:
    """What was found; memory in bytes."""

    plan: Plan
    few: Costs
    many: Costs
    memory: int
    """A daemon's own, at most: with many regions, in the middle of concurrent transfers, after all of them."""
    settled: int
    """After the first transfers, of the daemon that runs them and the other one together."""
    after: int
    """After all transfers, of the same."""


def measure(nodes: Mapping[str, Daemon], plan: Plan) -> Scale:
    """Put few regions on the second daemon and many on the first, and measure on both."""
    daemons = list(nodes.values())
    with ExitStack() as stack:
        big, small = (_Node(daemon, stack.enter_context(peermem.connect(daemon.target))) for daemon in daemons)
        small.fill(plan.few)
        big.fill(plan.many)
        few, many = _costs(small, big, plan)
        routes = _mixed(big, small, plan)
        _churn(big.node, routes, plan.settle, "to settle")
        settled = sum(own_memory(daemon.pid) for daemon in daemons)
        _churn(big.node, routes, plan.transfers - plan.settle, "to see whether memory grows")
        after = [own_memory(daemon.pid) for daemon in daemons]
    return Scale(plan, few, many, max(big.memory, small.memory, *after), settled, sum(after))


def own_memory(pid: int) -> int:
    """Return the resident bytes of a process that are not shared memory."""
    status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return sum(int(status[name].removesuffix("kB")) << 10 for name in ("RssAnon", "RssFile"))


class _Node:
    """One daemon and its regions."""

    def __init__(self, daemon: Daemon, node: peermem.Node) -> None:
        self.node = node
        self.memory = 0
        self._pid = daemon.pid
        self._regions: list[peermem.Region] = []

    def fill(self, count: int) -> None:
        """Make regions."""
        self._regions += [self._create() for _ in steps(count, "regions")]
        self._weigh()

    def routes(self, count: int) -> list[Route]:
        """Return pairs of regions, each region the source of at most one, spread over all of them."""
        step = len(self._regions) // count
        sources = self._regions[:: step or 1][:count]
        return list(zip(sources, sources[count // 2 :] + sources[: count // 2], strict=True))

    def costs(self, routes: Sequence[Route], repeats: int) -> Costs:
        """Make and delete a batch of regions, list all of them, and have all routes in flight at once."""
        made: list[peermem.Region] = []
        creation = _seconds(lambda: made.extend(self._create() for _ in range(_BATCH)))
        for region in made:
            region.delete()
        repeats_listed = max(1, 2000 // len(self._regions))
        listing = _seconds(lambda: [list(self.node.regions()) for _ in range(repeats_listed)])
        transfer = _seconds(lambda: self._at_once(routes, repeats))
        return Costs(
            creation / _BATCH,
            listing / (repeats_listed * len(self._regions)),
            transfer / (repeats * len(routes)),
        )

    def _at_once(self, routes: Sequence[Route], repeats: int) -> None:
        for _ in range(repeats):
            flights = [self.node.transfer(*route) for route in routes]
            self._weigh()
            for flight in flights:
                flight.wait(_TIMEOUT)

    def _create(self) -> peermem.Region:
        return self.node.create_region(device="bar0", length=LENGTH)

    def _weigh(self) -> None:
        self.memory = max(self.memory, own_memory(self._pid))


def _costs(small: _Node, big: _Node, plan: Plan) -> tuple[Costs, Costs]:
    """Return what items cost on a node with few regions and on one with many."""
    few, many = small.routes(plan.few), big.routes(plan.concurrent)
    rounds = []
    for turn in range(1 + plan.rounds):
        say(f"costs per item, round {turn} of {plan.rounds}{'' if turn else ', to warm up'}")
        rounds.append((small.costs(few, plan.concurrent // plan.few), big.costs(many, 1)))
    return _median([costs for costs, _ in rounds[1:]]), _median([costs for _, costs in rounds[1:]])


def _mixed(big: _Node, small: _Node, plan: Plan) -> list[Route]:
    """Return routes inside the big node, and as many from there to the small one, in turns."""
    targets = [target for _, target in small.routes(plan.few)]
    inside = big.routes(plan.few)
    return [
        route
        for (source, here), there in zip(inside, targets, strict=True)
        for route in ((source, here), (source, there))
    ]


def _churn(node: peermem.Node, routes: Sequence[Route], count: int, why: str) -> None:
    flights: deque[peermem.Transfer] = deque()
    for index in steps(count, f"transfers, {why}"):
        if len(flights) == _IN_FLIGHT:
            flights.popleft().wait(_TIMEOUT)
        flights.append(node.transfer(*routes[index % len(routes)]))
    while flights:
        flights.popleft().wait(_TIMEOUT)


def _median(costs: Sequence[Costs]) -> Costs:
    return Costs(*(median(getattr(each, name) for each in costs) for name in ("creation", "listing", "transfer")))


def _seconds(work: Callable[[], object]) -> float:
    began = perf_counter()
    work()
    return perf_counter() - began
