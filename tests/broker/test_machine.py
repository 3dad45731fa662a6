"""Any history of regions and transfers on two brokers, compared with a model of bytes."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from dataclasses import dataclass, field

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, multiple, rule

from peermem.broker.broker import Broker
from peermem.broker.regions import Region
from peermem.broker.runs import Transfer
from peermem.core import errors
from peermem.core.identity import ANONYMOUS
from peermem.core.region import Lease
from peermem.core.region import State as RegionState
from peermem.core.segments import columns
from peermem.core.transfer import State
from peermem.core.types import LeaseKind
from tests.broker.support import eventually, outcome, region, start
from tests.doubles import Host

SIZES = st.sampled_from([1, 4096, 10_000, 70_000])


@dataclass(eq=False)
class Modelled:
    """A region and what its bytes should be; None for bytes that are not known, because a transfer failed."""

    host: Host
    region: Region
    data: list[int | None] = field(default_factory=list)
    alive: bool = True


@dataclass(eq=False)
class Moving:
    """A transfer whose requests may be held back."""

    transfer: Transfer
    source: Modelled
    sink: Modelled
    offset: int
    carried: list[int | None]


class Brokers(RuleBasedStateMachine):
    regions = Bundle("regions")
    moving = Bundle("moving")

    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        self.stack = AsyncExitStack()
        self.all: list[Modelled] = []
        self.running: list[Moving] = []

    @initialize()
    def open(self) -> None:
        brokers: dict[str, Broker] = {}
        self.hosts = [Host(node, brokers, {}) for node in ("a", "b")]
        for host in self.hosts:
            self.runner.run(host.open(self.stack))

    @rule(target=regions, which=st.booleans(), size=SIZES)
    def create(self, which: bool, size: int) -> Modelled:
        host = self.hosts[which]
        made = Modelled(host, self.runner.run(region(host, size)), [0] * size)
        self.all.append(made)
        return made

    @rule(where=regions, byte=st.integers(0, 255), part=st.floats(0, 1))
    def write(self, where: Modelled, byte: int, part: float) -> None:
        if where.alive and not self.touching(where):
            length = int(part * len(where.data)) or 1
            where.region.memory.view()[:length] = bytes([byte]) * length
            where.data[:length] = [byte] * length

    @rule(target=moving, runner=st.booleans(), source=regions, sink=regions, part=st.floats(0, 1), hold=st.booleans())
    def transfer(self, runner: bool, source: Modelled, sink: Modelled, part: float, hold: bool) -> object:
        host = self.hosts[runner]
        length = min(int(part * len(source.data)) or 1, len(sink.data))
        offset = len(sink.data) - length
        entry = columns(source.region.name, sink.region.name, (0,), (offset,), (length,))
        if self.touching(sink) or self.touching(source):
            return multiple()
        for other in self.hosts:
            other.tcp.hold = other.local.hold = hold
        try:
            begun = self.runner.run(start(host, entry))
        except errors.SegmentsOverlap:
            return multiple()
        except errors.RegionNotFound:
            if source.alive and sink.alive:
                raise
            return multiple()
        moved = Moving(begun, source, sink, offset, source.data[:length])
        self.running.append(moved)
        self.runner.run(asyncio.sleep(0.001))
        if not hold:
            self.settle(moved)
        return moved

    @rule(moved=consumes(moving), cancel=st.booleans())
    def finish(self, moved: Moving, cancel: bool) -> None:
        if moved in self.running:
            if cancel:
                self.runner.run(self.cancel(moved.transfer))
            self.let_go()
            self.settle(moved)

    @rule(where=consumes(regions), force=st.booleans(), by_lease=st.booleans())
    def delete(self, where: Modelled, force: bool, by_lease: bool) -> None:
        if not where.alive:
            return
        used = bool(where.region.users)
        if by_lease:
            where.alive = False
            self.runner.run(self.expire(where))
            return
        if force:
            self.let_go()
        try:
            self.runner.run(where.host.broker.delete_region(ANONYMOUS, where.region.name, force=force))
        except errors.RegionInUse:
            assert used
            assert not force
        else:
            where.alive = False

    async def cancel(self, transfer: Transfer) -> None:
        transfer.fail(errors.TransferCancelled("No longer wanted."))

    async def expire(self, where: Modelled) -> None:
        where.region.lease = Lease(LeaseKind.TTL, 0.001)
        where.host.broker.regions.renew(where.region)
        await eventually(lambda: where.region.state is not RegionState.READY)
        for host in self.hosts:
            host.tcp.let_go()
            host.local.let_go()
        await eventually(lambda: where.region not in list(where.host.broker.regions))

    def touching(self, where: Modelled) -> bool:
        return any(where in (moved.source, moved.sink) for moved in self.running)

    def let_go(self) -> None:
        async def release() -> None:
            for host in self.hosts:
                host.tcp.let_go()
                host.local.let_go()

        self.runner.run(release())

    def settle(self, moved: Moving) -> None:
        facts = self.runner.run(outcome(moved.transfer))
        self.running.remove(moved)
        span = slice(moved.offset, moved.offset + len(moved.carried))
        if facts.state is State.SUCCEEDED:
            assert facts.bytes_done == len(moved.carried)
            moved.sink.data[span] = moved.carried
        else:
            assert type(facts.error) in (errors.TransferCancelled, errors.RegionDeleted, errors.RegionNotFound)
            moved.sink.data[span] = [None] * len(moved.carried)

    @invariant()
    def bytes_are_where_they_belong(self) -> None:
        for moved in list(self.running):
            if moved.transfer.ended.is_set():
                self.settle(moved)
        for known in self.all:
            if known.alive and not self.touching(known):
                seen = bytes(known.region.memory.view())
                wanted = bytes(seen[index] if byte is None else byte for index, byte in enumerate(known.data))
                assert seen == wanted

    def teardown(self) -> None:
        try:
            if self.all or hasattr(self, "hosts"):
                self.let_go()
                for moved in list(self.running):
                    self.settle(moved)
                assert all(not known.region.users for known in self.all)
                self.runner.run(self.stack.aclose())
                for host in self.hosts:
                    assert host.device.available == host.device.size
                    assert host.broker.serving.grant_count == 0
                    assert host.broker.transfers.running_count == 0
                    assert len(host.broker.regions) == 0
        finally:
            self.runner.close()


TestBrokers = Brokers.TestCase
TestBrokers.settings = settings(
    max_examples=25, stateful_step_count=25, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True
)
