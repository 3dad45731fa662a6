"""The verbs fabric between two nodes, with everything that a network and a remote node can do to it."""

from __future__ import annotations

import asyncio
import dataclasses
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path as FilePath

import pytest

from peermem.core.types import KeyPart, LinkAttributes, Path, Ranges, RemoteKey, Rights
from peermem.fabric.base import LinkEnd, Opcode, Status
from peermem.fabric.verbs_fabric import VerbsFabric
from peermem.fabric.verbs_types import Settings
from tests.fabric.support import MIB, FileMemory, eventually
from tests.lab.guest.fabric_node import LENGTH, FarNode, far_process
from tests.lab.guest.wires import QUICK, Wire, Wired, all_well, far_state


@pytest.fixture
def network() -> Iterator[Callable[[str], None]]:
    """Return what changes the network of both NICs: `tc qdisc` arguments, or `up` and `down`."""

    def change(what: str) -> None:
        for device in ("v1", "v1b"):
            if what in ("up", "down"):
                command = ["ip", "link", "set", device, what]
            else:
                command = ["tc", "qdisc", "replace", "dev", device, "root", *what.split()]
            subprocess.run(command, check=True)

    yield change
    change("up")
    for device in ("v1", "v1b"):
        subprocess.run(["tc", "qdisc", "del", "dev", device, "root"], check=False, stderr=subprocess.DEVNULL)


MODES = {
    "as it is": Settings(),
    "classic": Settings(extended=False),
    "no windows": Settings(windows=False),
    "small queue": Settings(depth=4, mtu=1024),
    "three queue pairs": Settings(queue_pairs=3),
}


@pytest.mark.parametrize("mode", MODES)
async def test_modes(wired: Wired, mode: str) -> None:
    async with wired(MODES[mode]) as wire:
        assert wire.link.packet == MODES[mode].mtu
        await all_well(wire)
        key = await wire.far.grant()
        count = 700
        at = [(index * 7919) % 4096 * 4096 for index in range(count)]
        ranges = Ranges([4096 * index for index in range(count)], at, [4000] * count, 4000 * count)
        assert await wire.wait([wire.post(Opcode.WRITE, key, ranges)]) == {Status.SUCCESS}
        far, local = await wire.far.content(), wire.local.bytes()
        assert all(far[there : there + 4000] == local[4096 * i : 4096 * i + 4000] for i, there in enumerate(at))


# Keys


def longer(key: RemoteKey, more: int) -> RemoteKey:
    """A key as if it opened more than it does."""
    rails = [[*parts[:-1], dataclasses.replace(parts[-1], length=parts[-1].length + more)] for parts in key.rails]
    return dataclasses.replace(key, length=key.length + more, rails=rails)


@pytest.mark.parametrize("opcode", list(Opcode))
@pytest.mark.parametrize(
    ("kind", "mode"),
    [
        ("longer", "as it is"),
        ("longer", "no windows"),
        ("shorter address", "as it is"),
        ("wrong rkey", "as it is"),
        ("revoked", "as it is"),
        ("revoked", "no windows"),
        ("other right", "as it is"),
    ],
)
async def test_the_nic_itself_refuses_forged_keys(wired: Wired, opcode: Opcode, kind: str, mode: str) -> None:
    async with wired(MODES[mode]) as wire:
        before = await wire.far.content(), wire.local.bytes()
        key = await wire.far.grant(MIB, MIB)
        ranges = Ranges.single(0, 0, 8192)
        if kind == "longer":
            key, ranges = longer(key, MIB), Ranges.single(0, MIB - 4096, 8192)
        elif kind == "shorter address":
            rails = [[KeyPart(p.rkey, p.address - MIB, p.length) for p in parts] for parts in key.rails]
            key = dataclasses.replace(key, rails=rails)
        elif kind == "wrong rkey":
            rails = [[dataclasses.replace(p, rkey=p.rkey ^ 0x5500) for p in parts] for parts in key.rails]
            key = dataclasses.replace(key, rails=rails)
        elif kind == "revoked":
            await wire.far.revoke(key)
        else:
            await wire.far.revoke(key)
            key = await wire.far.grant(MIB, MIB, Rights.READ if opcode is Opcode.WRITE else Rights.WRITE)
        assert await wire.wait([wire.post(opcode, key, ranges)]) == {Status.REM_ACCESS_ERR}
        if kind != "longer" or opcode is Opcode.WRITE:
            assert (await wire.far.content(), wire.local.bytes()) == before
        await all_well(wire)


@pytest.mark.parametrize("opcode", list(Opcode))
@pytest.mark.parametrize("mode", ["as it is", "no windows", "three queue pairs"])
async def test_a_stolen_key_is_refused_from_another_queue_pair_and_after_its_transfer(
    wired: Wired, far_socket: FilePath, opcode: Opcode, mode: str
) -> None:
    async with wired(MODES[mode]) as wire:
        thief = await Wire(wire.fabric, FarNode(far_socket), wire.local).open()
        before = await wire.far.content(), wire.local.bytes()
        key, ranges = await wire.far.grant(MIB + 4096, 8192), Ranges.single(0, 0, 8192)
        assert await thief.wait([thief.post(opcode, key, ranges)]) == {Status.REM_ACCESS_ERR}
        assert (await wire.far.content(), wire.local.bytes()) == before
        assert await wire.wait([wire.post(opcode, key, ranges)]) == {Status.SUCCESS}
        await wire.far.revoke(key)
        after = await wire.far.content(), wire.local.bytes()
        for each in (wire, thief):
            assert await each.wait([each.post(opcode, key, Ranges.single(16384, 0, 4096))]) == {Status.REM_ACCESS_ERR}
        assert (await wire.far.content(), wire.local.bytes()) == after
        await all_well(wire)
        await all_well(thief)
        await thief.link.close()
        assert thief.events.faults == []


@pytest.mark.parametrize("opcode", list(Opcode))
async def test_a_key_opens_no_byte_before_or_behind_its_range(wire: Wire, opcode: Opcode) -> None:
    before = await wire.far.content(), wire.local.bytes()
    key = await wire.far.grant(MIB + 100, 1000)
    for shift, length in ((-1, 1), (1000, 1), (-1, 1002), (999, 2)):
        rails = [[KeyPart(p.rkey, p.address + shift, length) for p in parts] for parts in key.rails]
        forged = dataclasses.replace(key, length=length, rails=rails)
        assert await wire.wait([wire.post(opcode, forged, Ranges.single(0, 0, length))]) == {Status.REM_ACCESS_ERR}
    assert (await wire.far.content(), wire.local.bytes()) == before


async def test_one_bad_request_among_many_hurts_no_other(wire: Wire) -> None:
    key, revoked = await wire.far.grant(), await wire.far.grant()
    await wire.far.revoke(revoked)
    good = []
    bad = []
    for index in range(64):
        good.append(wire.post(Opcode.WRITE, key, Ranges.single(index * 65536, index * 65536, 65536)))
        if index in (20, 21, 40):
            bad.append(wire.post(Opcode.READ, revoked, Ranges.single(0, 0, 100)))
    assert await wire.wait(good) == {Status.SUCCESS}
    assert await wire.wait(bad) == {Status.REM_ACCESS_ERR}
    assert await wire.far.content(0, 64 * 65536) == wire.local.bytes()[: 64 * 65536]


# Networks


@pytest.mark.parametrize("kind", ["netem loss 2%", "netem delay 5ms reorder 2%", "netem duplicate 5%"])
async def test_a_bad_network(wire: Wire, network: Callable[[str], None], kind: str) -> None:
    key = await wire.far.grant()
    network(kind)
    posted = [wire.post(Opcode.WRITE, key, Ranges.single(at, at, 65536)) for at in range(0, MIB, 65536)]
    assert await wire.wait(posted) == {Status.SUCCESS}
    assert await wire.far.content(0, MIB) == wire.local.bytes()[:MIB]
    posted = [wire.post(Opcode.READ, key, Ranges.single(at, at, 65536)) for at in range(0, MIB, 65536)]
    assert await wire.wait(posted) == {Status.SUCCESS}


async def test_an_outage_of_two_seconds_is_survived(wire: Wire, network: Callable[[str], None]) -> None:
    key = await wire.far.grant()
    posted = [number for _ in range(8) for number in wire.post_all(Opcode.WRITE, key)]
    await wire.wait(posted[:1])
    network("down")
    await asyncio.sleep(2)
    network("up")
    assert await wire.wait(posted) == {Status.SUCCESS}
    assert await wire.far.content() == wire.local.bytes()
    assert wire.events.ends == []
    await all_well(wire)
    await eventually(lambda: wire.link.rails_down == 0)
    told = wire.events.rails
    assert sum(each.startswith("down: ") for each in told) == told.count("up")


async def test_an_outage_for_good_ends_in_the_stall_timeout(wire: Wire, network: Callable[[str], None]) -> None:
    key = await wire.far.grant()
    posted = [number for _ in range(8) for number in wire.post_all(Opcode.WRITE, key)]
    await wire.wait(posted[:1])
    network("down")
    began = time.monotonic()
    assert await wire.wait(posted) <= {Status.SUCCESS, Status.WR_FLUSH_ERR}
    assert time.monotonic() - began < QUICK.stall_timeout + 2
    assert wire.events.ends == [LinkEnd.STALLED]
    network("up")
    await far_state(wire, lambda _lost, links, grants, objects: links == grants == objects["qp"] == objects["mw"] == 0)
    await wire.open()
    await all_well(wire)


async def test_an_initiator_that_does_not_answer_a_fence_is_reset_and_comes_back(wire: Wire) -> None:
    key, other = await wire.far.grant(), await wire.far.grant()
    revoking = asyncio.create_task(wire.far.revoke(other))
    await asyncio.sleep(0.1)  # it has been asked for
    time.sleep(2 * QUICK.fence_timeout)  # noqa: ASYNC251  a process that is stopped
    await revoking
    assert await wire.wait([wire.post(Opcode.WRITE, key, Ranges.single(0, 0, MIB))]) == {Status.SUCCESS}
    assert await wire.far.content(0, MIB) == wire.local.bytes()[:MIB]


async def test_a_rail_comes_back_with_no_smaller_packets(wire: Wire) -> None:
    """Requests may have been planned by those that there were."""
    mtus = [2048, 1024, 1024, 2048]

    async def exchange(offer: LinkAttributes) -> LinkAttributes:
        mtu = mtus.pop(0) if len(mtus) > 1 else mtus[0]

        def limited(attributes: LinkAttributes) -> LinkAttributes:
            ends = [dataclasses.replace(end, mtu=mtu) for end in attributes.queue_pairs]
            return dataclasses.replace(attributes, queue_pairs=ends)

        return limited(await wire.far.exchange(limited(offer)))

    await wire.link.close()
    wire.link = link = await wire.fabric.connect(exchange, wire.events)
    assert link.packet == 2048
    key = await wire.far.grant()
    for rail in link.uses(lambda _: True):
        rail.fail()
    assert await wire.wait([wire.post(Opcode.WRITE, key, Ranges.single(0, 0, MIB))]) == {Status.SUCCESS}
    assert mtus == [2048]
    assert {rail.mtu for rail in link.uses(lambda rail: rail.up)} == {2048}


# Ends


async def test_hanging_up_reaches_an_idle_initiator_at_once(wire: Wire) -> None:
    await wire.far.hang_up()
    await eventually(lambda: wire.events.ends == [LinkEnd.REMOTE_CLOSED])


async def test_an_initiator_that_dies_is_lost_at_the_target(wired: Wired) -> None:
    async with wired(QUICK) as wire:
        await wire.far.grant()
        for rail in wire.link.uses(lambda _: True):
            rail.offer(False)  # as a killed process does: its queue pairs are gone, and nobody is told
            rail.is_lost = True
        await far_state(wire, lambda lost, links, grants, _: lost == [wire.far.link_id] and links == grants == 0)


async def test_many_links_one_after_the_other_leave_nothing(wired: Wired) -> None:
    async with wired(QUICK) as wire:
        await wire.link.close()
        await far_state(wire, lambda _lost, links, _grants, _objects: links == 0)
        here, there = wire.fabric.object_counts(), (await wire.far.state())[3]
        for _ in range(10):
            await wire.open()
            key = await wire.far.grant()
            await wire.wait([wire.post(Opcode.WRITE, key, Ranges.single(0, 0, 4096))])
            await wire.link.close()
        assert wire.fabric.object_counts() == here
        await far_state(wire, lambda _lost, links, _grants, objects: links == 0 and objects == there)


@pytest.mark.parametrize("busy", [True, False])
async def test_a_killed_daemon_is_noticed(tmp_path: FilePath, busy: bool) -> None:
    with far_process(tmp_path) as (path, process):
        fabric, local, far = VerbsFabric(settings=QUICK), FileMemory(LENGTH, seed=1), FarNode(path)
        await far.restart(QUICK)
        await fabric.start()
        await fabric.register(local, Path.HOST)
        wire = await Wire(fabric, far, local).open()
        key = await far.grant()
        posted = wire.post_all(Opcode.WRITE, key) if busy else []
        await wire.wait(posted[:1])
        process.kill()
        process.wait()
        began = time.monotonic()
        if not busy:
            posted = [wire.post(Opcode.WRITE, key, Ranges.single(0, 0, 1))]
        assert await wire.wait(posted) <= {Status.SUCCESS, Status.WR_FLUSH_ERR}
        assert time.monotonic() - began < 3
        assert wire.events.ends == [LinkEnd.REMOTE_CLOSED]
        await fabric.close()
        local.close()
