"""Preflight on a broker whose NICs and devices fail on cue."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace

import pytest

from peermem.broker.preflight import Preflight, Step
from peermem.core.errors import (
    DeviceFull,
    DeviceNotFound,
    FabricUnavailable,
    NicLost,
    NicNotFound,
    PortDown,
    ProbeFailed,
    ProbeMismatch,
)
from peermem.core.node import NicPort
from peermem.core.preflight import Capability, Check, HostFacts, Verdict
from peermem.core.topology import Machine, Topology
from peermem.core.types import FabricKind, Path
from tests.doubles import PATIENCE, Host

from .conftest import NicHost, hosts, nic_hosts
from .support import region

PORT = NicPort("nic0/1", "ACTIVE", "Ethernet", 10**11, -1, uverbs="uverbs7")
TOPOLOGY = Topology(Machine(), {}, {"nic0/1": PORT})


def good_host(files: Sequence[str]) -> HostFacts:
    return HostFacts("7.3.4", None, frozenset(Capability), "shared", dict.fromkeys(files, ""), "none", {}, True, "56.1")


def preflight(host: Host, topology: Topology = TOPOLOGY) -> Preflight:
    broker = host.broker
    return Preflight(broker.devices, broker.proofs, lambda: topology, good_host, broker.fabrics.get(FabricKind.VERBS))


async def verdicts(host: Host, *names: str, topology: Topology = TOPOLOGY) -> list[Verdict]:
    steps: list[Step] = [step async for step in preflight(host, topology).run(names)]
    assert [step.done for step in steps] == list(range(1, len(steps) + 1))
    assert {step.total for step in steps} == {len(steps)}
    return [step.verdict for step in steps]


@pytest.fixture
async def host() -> AsyncIterator[NicHost]:
    async with nic_hosts("a") as made:
        yield made[0]


async def test_the_node_then_its_nics_then_each_device_with_each_nic(host: NicHost) -> None:
    found = await verdicts(host)
    assert [verdict.check for verdict in found[: len(Check)]] == list(Check)
    nic, *tried = found[len(Check) :]
    assert (nic.nic, nic.device) == ("nic0/1", "")
    assert [(verdict.device, verdict.nic, verdict.path) for verdict in tried] == [
        ("adopted", "nic0/1", Path.HOST),
        ("bar0", "nic0/1", Path.HOST),
        ("bar1", "nic0/1", Path.STAGED),
        ("bar2", "nic0/1", Path.P2PDMA),
        ("bar2", "nic0/1", Path.STAGED),
    ]
    assert all(verdict.error is None for verdict in found)
    assert (tried[0].latency, tried[0].write_bandwidth, tried[0].read_bandwidth) == (1e-5, 1e9, 2e9)
    assert tried[2].write_bandwidth < 1e9


async def test_host_memory_is_tried_once_for_each_nic(host: NicHost) -> None:
    host.nic.ports["nic1/1"] = None
    await verdicts(host, "bar0", "adopted")
    assert host.nic.probed == [("nic0/1", Path.HOST), ("nic1/1", Path.HOST)]


async def test_some_devices_only(host: NicHost) -> None:
    assert [verdict.device for verdict in await verdicts(host, "bar1", "bar1")][-2:] == ["", "bar1"]
    with pytest.raises(DeviceNotFound, match="adopted, bar0, bar1"):
        await verdicts(host, "bar1", "none")


async def test_a_nic_that_reaches_nothing(host: NicHost) -> None:
    host.nic.unreachable = {Path.HOST, Path.P2PDMA}
    found = await verdicts(host)
    assert [type(verdict.error) for verdict in found if verdict.device] == [ProbeFailed] * 5
    assert [verdict.latency for verdict in found if verdict.device] == [0.0] * 5


async def test_a_path_that_does_not_work_beside_one_that_does(host: NicHost) -> None:
    host.nic.unreachable = {Path.P2PDMA}
    direct, staged = (await verdicts(host, "bar2"))[-2:]
    assert isinstance(direct.error, ProbeFailed)
    assert (staged.path, staged.error) == (Path.STAGED, None)
    await region(host, 4096, device="bar2")
    (facts,) = (each for each in await preflight(host).reach(host.broker.device_facts()) if each.name == "bar2")
    assert (facts.path, facts.nics) == (Path.STAGED, ("nic0/1",))


async def test_a_nic_that_misplaces_is_told(host: NicHost) -> None:
    host.nic.misplaces = True
    found = {verdict.path: verdict for verdict in await verdicts(host, "bar2") if verdict.device}
    assert found[Path.P2PDMA].error is None
    assert "multiples of 4096" in found[Path.P2PDMA].advice
    assert "multiples" not in found[Path.STAGED].advice


async def test_what_failed_is_tried_again(host: NicHost) -> None:
    host.nic.unreachable.add(Path.HOST)
    assert (await verdicts(host, "bar0"))[-1].error is not None
    host.nic.unreachable.clear()
    assert (await verdicts(host, "bar0"))[-1].error is None


async def test_a_nic_that_does_not_work_fails_with_its_reason(host: NicHost) -> None:
    down = PortDown("The port nic0/1 is not active.")
    host.nic.ports["nic0/1"] = down
    found = await verdicts(host)
    assert {verdict.error for verdict in found if verdict.nic} == {down}


async def test_a_nic_that_goes_away_meanwhile(host: NicHost) -> None:
    steps = preflight(host).run(["bar0"])
    seen = [await anext(steps) for _ in range(len(Check) + 1)]
    del host.nic.ports["nic0/1"]
    last = await anext(steps)
    assert isinstance(last.verdict.error, NicLost)
    assert last.done == last.total == len(seen) + 1


async def test_the_memory_of_regions_is_not_touched(host: NicHost) -> None:
    held = await host.staged.allocate(host.staged.size)
    assert isinstance((await verdicts(host, "bar1"))[-1].error, DeviceFull)
    held.close()
    made = await region(host, 4096, data=b"keep")
    await verdicts(host)
    assert bytes(made.memory.view()[:4]) == b"keep"


async def test_without_a_nic_no_device_is_tried(host: NicHost) -> None:
    host.nic.ports.clear()
    found = await verdicts(host, topology=replace(TOPOLOGY, nics={}))
    assert len(found) == len(Check)
    assert isinstance(found[-1].error, NicNotFound)


async def test_a_daemon_that_uses_no_nic() -> None:
    async with hosts("a") as made:
        found = await verdicts(made[0])
        assert len(found) == len(Check)
        assert isinstance(found[-1].error, FabricUnavailable)


async def test_a_bar_that_is_registers_and_not_memory(host: NicHost) -> None:
    host.staged.forgets = True
    assert isinstance((await verdicts(host, "bar1"))[-1].error, ProbeMismatch)


async def test_a_caller_that_does_not_read_holds_up_nobody(host: NicHost) -> None:
    one = preflight(host)
    slow = one.run()
    for _ in range(len(Check) + 3):
        await anext(slow)
    async with asyncio.timeout(PATIENCE):
        assert len([step async for step in one.run()]) == len(Check) + 6
    await slow.aclose()


async def test_one_trial_at_a_time(host: NicHost) -> None:
    host.staged.gate = asyncio.Event()
    one = preflight(host)

    async def last() -> Step:
        return [step async for step in one.run(["bar1"])][-1]

    tries = [asyncio.create_task(last()) for _ in range(2)]
    async with asyncio.timeout(PATIENCE):
        while not host.staged.waiting:  # noqa: ASYNC110  what is waited for is not an event
            await asyncio.sleep(0.001)
        assert host.staged.waiting == 1
        host.staged.gate.set()
        for step in await asyncio.gather(*tries):
            assert step.verdict.error is None


async def test_a_caller_that_gives_up_leaves_nothing_behind(host: NicHost) -> None:
    host.staged.gate = asyncio.Event()
    steps = preflight(host).run(["bar1"])

    async def read() -> None:
        async for _ in steps:
            pass

    reader = asyncio.create_task(read())
    async with asyncio.timeout(PATIENCE):
        while not host.staged.waiting:  # noqa: ASYNC110
            await asyncio.sleep(0.001)
    reader.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reader
    host.staged.gate.set()
    assert host.staged.available == host.staged.size


async def test_devices_tell_what_is_known_without_a_trial(host: NicHost) -> None:
    facts = {each.name: each for each in await preflight(host).reach(host.broker.device_facts())}
    assert (facts["bar0"].nics, facts["bar0"].why) == ((), "No NIC has been tried with it.")
    assert host.nic.probed == []
    await verdicts(host, "bar0")
    facts = {each.name: each for each in await preflight(host).reach(host.broker.device_facts())}
    assert facts["bar0"].nics == ("nic0/1",)
    assert facts["bar1"].nics == ()
    host.nic.ports["nic0/1"] = PortDown("The port nic0/1 is not active.")
    facts = {each.name: each for each in await preflight(host).reach(host.broker.device_facts())}
    assert facts["bar1"].why == "No NIC reaches it: The port nic0/1 is not active."
