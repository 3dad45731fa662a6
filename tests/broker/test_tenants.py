"""Limits of tenants, where work is admitted: what is refused, what waits, and that all is given back."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from peermem.broker.regions import Region
from peermem.broker.storage import StorageRun
from peermem.broker.tenants import Tenants
from peermem.core import errors
from peermem.core.identity import ANONYMOUS, Subject
from peermem.core.policy import OPEN, Action
from peermem.core.quota import Resource
from peermem.core.region import RegionRequest
from peermem.core.storage import Order, StorageRequest
from peermem.core.transfer import State
from peermem.telemetry.metrics import Metrics
from tests.broker.support import eventually, outcome, region, start, whole
from tests.doubles import MIB, Host
from tests.policies import policy, rule, tenant

EVERYTHING = rule("all", "anyone anyone@*", "read write manage create load store", "files = ['/']")
ANN, BEN = Subject("uid:1"), Subject("uid:2")


async def limit(host: Host, limits: str) -> None:
    await host.broker.go_by(policy(EVERYTHING + tenant("team", "anonymous uid:1", limits)))


async def refused(host: Host, resource: Resource, ask: Callable[[], Awaitable[object]], told: str) -> None:
    before = rejections(host, resource)
    with pytest.raises(errors.QuotaExceeded, match=told) as caught:
        await ask()
    assert caught.value.metadata["resource"] == resource.value
    assert caught.value.metadata["tenant"] == "team"
    assert rejections(host, resource) == before + 1


def rejections(host: Host, resource: Resource) -> float:
    page = host.metrics.render()[0].decode()
    mark = f'peermem_quota_rejections_total{{resource="{resource.value}"}} '
    return float(page.partition(mark)[2].partition("\n")[0])


async def test_regions_and_their_bytes(pair: list[Host]) -> None:
    a, _ = pair
    await limit(a, "regions = 2\nbytes = '1MiB'")
    first = await region(a, MIB // 2)
    await refused(a, Resource.BYTES, lambda: region(a, MIB), "holds regions of 512KiB; 1MiB more")
    with pytest.raises(errors.RegionExists):
        await region(a, 4096, first.name.id)
    await region(a, 4096)
    await refused(a, Resource.REGIONS, lambda: region(a, 4096), "holds 2 regions; 1 region more")
    await a.broker.create_region(BEN, None, RegionRequest("", 4 * MIB, "bar0", "", {}, None))
    await a.broker.delete_region(ANONYMOUS, first.name, force=False)
    await region(a, MIB // 2)
    with pytest.raises(errors.DeviceFull):
        await a.broker.create_region(BEN, None, RegionRequest("", 1 << 40, "bar0", "", {}, None))


async def test_memory_that_is_handed_in_is_counted_by_its_own_length(pair: list[Host]) -> None:
    a, _ = pair
    await limit(a, "bytes = '8KiB'")
    session = a.sessions.open(ANN, 1)
    made: list[Region] = []
    for pages, fits in ((2, True), (1, False)):
        fd = os.memfd_create("x", os.MFD_ALLOW_SEALING)
        os.truncate(fd, pages * 4096)
        request = RegionRequest("", 0, "", a.sessions.hand_in(session, fd), {}, None)
        if fits:
            made.append(await a.broker.create_region(ANN, session, request))
        else:
            with pytest.raises(errors.QuotaExceeded, match="holds regions of 8KiB; 4KiB more"):
                await a.broker.create_region(ANN, session, request)
    await a.broker.delete_region(ANN, made[0].name, force=False)
    await region(a, 8192)
    a.sessions.close(session)


async def test_transfers_and_their_bytes(pair: list[Host]) -> None:
    a, b = pair
    x, y, z = await region(a, MIB), await region(b, MIB), await region(b, MIB)
    await limit(a, "transfers = 2\noutstanding = '1MiB'")
    a.tcp.hold = True
    running = await start(a, whole(x, y))
    await eventually(lambda: a.tcp.held > 0)
    await refused(a, Resource.OUTSTANDING, lambda: start(a, whole(x, z)), "has transfers running of 1MiB; 1MiB more")
    await limit(a, "transfers = 1")
    await refused(a, Resource.TRANSFERS, lambda: start(a, whole(x, z)), "runs 1 transfer; 1 transfer more")
    other = await start(a, whole(x, z), subject=BEN)
    a.tcp.let_go()
    for each in (running, other):
        assert (await outcome(each)).state is State.SUCCEEDED
    assert (await outcome(await start(a, whole(x, y)))).state is State.SUCCEEDED


async def test_loads_and_stores_count_as_transfers(pair: list[Host], tmp_path: Path) -> None:
    a, _ = pair
    made = await region(a, MIB)
    await limit(a, "transfers = 0")
    run = StorageRun(ANONYMOUS, StorageRequest(Order.LOAD, made.name, 0, str(tmp_path / "x"), None, 0, False))

    async def watch() -> None:
        with a.broker.storage.watched(run):
            pass

    await refused(a, Resource.TRANSFERS, watch, "runs 0 transfers; 1 transfer more")
    await limit(a, "bytes_per_second = '1MiB'")
    a.broker.tenants.spend(ANONYMOUS, 3 * MIB)
    await refused(a, Resource.BYTES_PER_SECOND, watch, "moves more than 1MiB a second, its limit. Try again in ")


async def test_what_begins_something_is_counted_and_what_ends_or_keeps_it_is_not(pair: list[Host]) -> None:
    a, _ = pair
    x, y = await region(a, 4096), await region(a, 4096)
    await limit(a, "requests_per_second = 1")
    a.broker.seen_region(ANONYMOUS, x.name)

    asks: list[Callable[[], object]] = [
        lambda: a.broker.seen_region(ANONYMOUS, x.name),
        lambda: a.broker.eyes(ANONYMOUS),
        lambda: a.broker.use_region(ANONYMOUS, x.name, Action.READ, 0, 1),
        lambda: a.broker.map_region(x.name, ANONYMOUS),
    ]
    for ask in asks:
        with pytest.raises(errors.QuotaExceeded, match=r"asks more than 1 time a second, its limit\. Try again in "):
            ask()
    await refused(a, Resource.REQUESTS_PER_SECOND, lambda: region(a, 4096), "asks more than 1 time a second")
    await refused(a, Resource.REQUESTS_PER_SECOND, lambda: start(a, whole(x, y)), "asks more than 1 time a second")
    await a.broker.delete_region(ANONYMOUS, x.name, force=False)
    await a.broker.delete_region(ANONYMOUS, y.name, force=False)


class Clock:
    """A clock that a test moves."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


async def test_bytes_of_a_stream_wait_for_their_turn() -> None:
    clock = Clock()
    rules = policy(EVERYTHING + tenant("team", "uid:1", "bytes_per_second = '1MiB'"))
    tenants = Tenants(rules, Metrics("0").policy, clock)
    for _ in range(3):
        clock.now += 1.0
        async with asyncio.timeout(1.0):
            await tenants.pace(ANN, MIB)
    async with asyncio.timeout(1.0):
        await tenants.pace(ANN, MIB)  # into debt, which the next one waits for
    waiting = asyncio.create_task(tenants.pace(ANN, 1))
    await asyncio.sleep(0)
    assert tenants.wait(ANN) == pytest.approx(1.0)
    assert not waiting.done()
    await tenants.pace(BEN, 1 << 40)
    tenants.go_by(OPEN)
    assert tenants.wait(ANN) == 0
    waiting.cancel()


async def test_who_has_little_to_wait_for_does_not_wait_for_who_has_much(pair: list[Host]) -> None:
    a, b = pair
    source, sink = await region(a, MIB), await region(b, MIB)
    limits = "bytes_per_second = '1MiB'"
    await a.broker.go_by(policy(EVERYTHING + tenant("one", "uid:1", limits) + tenant("two", "uid:2", limits)))
    a.broker.tenants.spend(ANN, 1000 * MIB)
    slow = await start(a, whole(source, sink), subject=ANN)
    await eventually(lambda: any(each.is_waiting for each in a.broker.links._traffic.values()))
    a.broker.tenants.spend(BEN, MIB + MIB // 10)
    assert a.broker.tenants.wait(BEN) > 0
    assert (await outcome(await start(a, whole(source, sink), subject=BEN))).state is State.SUCCEEDED
    assert a.broker.tenants.wait(ANN) > 900
    await a.broker.cancel_transfer(ANN, slow.facts.name)


async def test_a_policy_with_a_higher_rate_counts_for_who_waits_already(pair: list[Host]) -> None:
    a, b = pair
    source, sink = await region(a, MIB), await region(b, MIB)
    limits = "bytes_per_second = '1MiB'"
    await a.broker.go_by(policy(EVERYTHING + tenant("one", "uid:1", limits)))
    a.broker.tenants.spend(ANN, 1000 * MIB)
    transfer = await start(a, whole(source, sink), subject=ANN)
    await eventually(lambda: any(each.is_waiting for each in a.broker.links._traffic.values()))
    await a.broker.go_by(policy(EVERYTHING))
    assert (await outcome(transfer)).state is State.SUCCEEDED
