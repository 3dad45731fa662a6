"""What nodes know while etcd is killed, frozen, cut off, compacted and wiped, and how they find back."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from bench.daemons import free_ports
from structlog.testing import capture_logs

from peermem.core.errors import DirectoryUnreachable
from tests.chaos.proxy import Mode, Network, network
from tests.directory.conformance import A, B, written
from tests.directory.etcd_server import PATIENCE, EtcdServer, etcd_server, needs_etcd
from tests.directory.support import opened, region, settings, until

pytestmark = needs_etcd


@pytest.fixture
def mortal(tmp_path: Path) -> Iterator[EtcdServer]:
    """An etcd that a test may do anything to."""
    with etcd_server(tmp_path / "etcd") as server:
        yield server


@pytest.fixture(scope="module")
def wires() -> Iterator[Network]:
    with network() as made:
        yield made


async def test_nodes_stay_known_while_etcd_is_dead_and_are_followed_when_it_is_back(mortal: EtcdServer) -> None:
    chosen = settings(mortal.endpoint, "x", lease=600)
    async with opened(chosen, A) as a, opened(chosen, B) as b:
        b.publish(region("before", "b"))
        await written(b)
        mortal.kill()
        await until(a, lambda: a.status().away_for is not None)
        b.publish(region("meanwhile", "b"))
        assert a.nodes() == {"a": A, "b": B}
        assert isinstance(a.status().problem, DirectoryUnreachable)
        assert mortal.endpoint in str(a.status().problem)
        with pytest.raises(DirectoryUnreachable):
            await a.find({}, None, 10)
        mortal.start()
        await until(a, lambda: a.status().away_for is None)
        await until(b, lambda: b.status().away_for is None)
        await written(b)
        assert a.status().problem is None
        assert len((await a.find({}, None, 10))[0]) == 2
        assert a.nodes() == {"a": A, "b": B}
        counts = a.status().counts
        assert (counts.resumes, counts.listings, counts.lost_leases) == (1, 1, 0)


async def test_an_etcd_that_stands_still_is_noticed(mortal: EtcdServer) -> None:
    chosen = settings(mortal.endpoint, "x", lease=2)
    async with opened(chosen, A) as a:
        mortal.freeze()
        try:
            await until(a, lambda: a.status().away_for is not None)
            assert a.nodes() == {"a": A}
            assert a.status().counts.failed_renewals >= 1
        finally:
            mortal.thaw()
        await until(a, lambda: a.status().away_for is None)
        await until(a, lambda: (a.status().lease_left or 0) > 0)


async def test_a_node_that_is_cut_off_is_gone_for_the_others_and_comes_back_by_itself(
    etcd: EtcdServer, cluster: str, wires: Network
) -> None:
    wire = wires.wire(etcd.endpoint)
    chosen = settings(etcd.endpoint, cluster, lease=2)
    async with opened(replace(chosen, endpoints=[wire.address]), A) as cut_off, opened(chosen, B) as other:
        cut_off.publish(region("x"))
        await written(cut_off)
        wire.set(Mode.CUT)
        await until(cut_off, lambda: cut_off.status().away_for is not None)
        await until(other, lambda: "a" not in other.nodes())
        assert other.gone()["a"].entry == A
        assert await other.find({}, None, 10) == ([], None)
        assert cut_off.nodes() == {"a": A, "b": B}
        wire.set(Mode.OPEN)
        await until(other, lambda: "a" in other.nodes())
        await until(cut_off, lambda: cut_off.status().counts.lost_leases == 1)
        await written(cut_off)
        assert len((await other.find({}, None, 10))[0]) == 1


async def test_a_network_that_swallows_everything_is_noticed(etcd: EtcdServer, cluster: str, wires: Network) -> None:
    wire = wires.wire(etcd.endpoint)
    async with opened(settings(wire.address, cluster, lease=2), A) as a:
        wire.set(Mode.STALLED)
        await until(a, lambda: a.status().away_for is not None)
        wire.reset()
        await until(a, lambda: a.status().away_for is None)


async def test_what_was_missed_and_compacted_is_read_anew(mortal: EtcdServer, wires: Network) -> None:
    wire = wires.wire(mortal.endpoint)
    direct = settings(mortal.endpoint, "x", lease=600)
    async with opened(replace(direct, endpoints=[wire.address])) as behind:
        async with opened(direct, B):
            await until(behind, lambda: "b" in behind.nodes())
            wire.set(Mode.CUT)
            await until(behind, lambda: behind.status().away_for is not None)
        async with opened(direct, A):
            mortal.compact()
            wire.set(Mode.OPEN)
            await until(behind, lambda: "a" in behind.nodes())
            assert behind.status().counts.listings == 2
            await until(behind, lambda: behind.status().away_for is None)


async def test_an_etcd_that_lost_its_data_is_told_everything_again(mortal: EtcdServer) -> None:
    chosen = settings(mortal.endpoint, "x", lease=2)
    async with opened(chosen, A) as a, opened(chosen, B) as b:
        a.publish(region("x"))
        await written(a)
        mortal.put("/peermem/v1/x/nodes/c", b'{"v": 1, "address": "10.0.0.3:1"}')
        await until(b, lambda: "c" in b.nodes())
        mortal.wipe()
        await until(b, lambda: b.status().away_for is not None)
        mortal.start()
        await until(b, lambda: b.status().counts.listings == 2)
        assert set(b.nodes()) == {"a", "b", "c"}, "what is missing may be on its way"
        await until(b, lambda: "c" not in b.nodes())
        assert set(b.nodes()) == {"a", "b"}
        await written(a)
        assert len((await b.find({}, None, 10))[0]) == 1


async def test_an_etcd_that_is_not_there_at_the_start_is_waited_for(tmp_path: Path) -> None:
    server = EtcdServer(tmp_path / "etcd")
    async with opened(settings(server.endpoint, "x")) as a:
        assert isinstance(a.status().problem, DirectoryUnreachable)
        assert "refused" in str(a.status().problem)
        await a.join(A)
        assert a.nodes() == {"a": A}
        a.publish(region("x"))
        try:
            server.start()
            await until(a, lambda: a.status().away_for is None)
            await written(a)
            assert len((await a.find({}, None, 10))[0]) == 1
        finally:
            server.kill()


async def test_another_member_is_tried_when_one_is_dead(etcd: EtcdServer, cluster: str) -> None:
    (port,) = free_ports(1)
    chosen = settings(etcd.endpoint, cluster, endpoints=[f"127.0.0.1:{port}", etcd.endpoint])
    async with opened(chosen, A) as a, opened(chosen, B) as b:
        await until(a, lambda: "b" in a.nodes())
        await until(b, lambda: "a" in b.nodes())


async def test_a_clock_that_jumps_ends_no_lease(
    etcd: EtcdServer, cluster: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = time.time
    chosen = settings(etcd.endpoint, cluster, lease=4)
    async with opened(chosen, A) as a, opened(chosen, B) as b:
        await until(b, lambda: "a" in b.nodes())
        for jump in (-1e9, 1e6):
            monkeypatch.setattr(time, "time", lambda jump=jump: real() + jump)
            before = a.status().counts.renewals
            await until(a, lambda before=before: a.status().counts.renewals > before)  # type: ignore[misc]
            assert 0 < (a.status().lease_left or 0) <= 4
        assert set(b.nodes()) == {"a", "b"}
        counts = a.status().counts
        assert (counts.lost_leases, counts.failed_renewals, a.status().away_for) == (0, 0, None)


async def test_a_node_that_is_back_after_its_lease_ended_joins_once(
    etcd: EtcdServer, cluster: str, wires: Network
) -> None:
    wire = wires.wire(etcd.endpoint)
    chosen = settings(etcd.endpoint, cluster, lease=2)
    async with opened(replace(chosen, endpoints=[wire.address]), A) as cut_off, opened(chosen, B) as other:
        wire.set(Mode.CUT)
        await until(other, lambda: "a" not in other.nodes())
        with capture_logs() as told:
            wire.set(Mode.OPEN)
            await until(cut_off, lambda: cut_off.status().counts.lost_leases == 1)
            etcd.put(f"/peermem/v1/{cluster}/nodes/c", b'{"v": 1, "address": "10.0.0.3:1"}')
            await until(cut_off, lambda: "c" in cut_off.nodes())
            renewals = cut_off.status().counts.renewals
            await until(cut_off, lambda: cut_off.status().counts.renewals >= renewals + 2)
        assert [line["event"] for line in told].count("directory_joined") == 1, "its own end, seen late, ends nothing"


async def has_keys(etcd: EtcdServer, cluster: str, count: int, part: str = "") -> None:
    """Wait until etcd has so many keys of a cluster."""
    async with asyncio.timeout(PATIENCE):
        while len(etcd.keys(f"/peermem/v1/{cluster}/{part}")) != count:  # noqa: ASYNC110 - etcd tells nobody
            await asyncio.sleep(0.02)


async def test_what_a_write_without_an_answer_has_written_is_deleted_unless_it_is_wanted(
    etcd: EtcdServer, cluster: str, wires: Network
) -> None:
    wire = wires.wire(etcd.endpoint)
    async with opened(settings(wire.address, cluster, lease=600), A) as a:
        wire.set(Mode.MUTE)
        a.publish(region("gone", step="1"))
        a.publish(region("anew", step="1"))
        await has_keys(etcd, cluster, 2, "labels/")
        wire.set(Mode.CUT)
        await until(a, lambda: a.status().away_for is not None)
        a.withdraw(region("gone").name)
        a.withdraw(region("anew").name)
        a.publish(region("anew", step="2"))
        wire.set(Mode.OPEN)
        await until(a, lambda: a.status().away_for is None)
        await written(a)
        assert [each.name.id for each in (await a.find({}, None, 10))[0]] == ["anew"]
        assert etcd.keys(f"/peermem/v1/{cluster}/labels/") == [f"/peermem/v1/{cluster}/labels/step=2/a/anew"]


async def test_nodes_whose_leases_ended_while_nobody_reached_etcd_stay_known(
    etcd: EtcdServer, cluster: str, wires: Network
) -> None:
    first, second = (wires.wire(etcd.endpoint) for _ in range(2))
    chosen = settings(etcd.endpoint, cluster, lease=4)
    of_a, of_b = (replace(chosen, endpoints=[wire.address]) for wire in (first, second))
    async with opened(of_a, A) as a, opened(of_b, B) as b:
        await until(a, lambda: "b" in a.nodes())
        for wire in (first, second):
            wire.set(Mode.CUT)
        await has_keys(etcd, cluster, 0)
        first.set(Mode.OPEN)
        await until(a, lambda: a.status().away_for is None)
        etcd.put(f"/peermem/v1/{cluster}/nodes/c", b'{"v": 1, "address": "10.0.0.3:1"}')
        await until(a, lambda: "c" in a.nodes())  # and with it all that came before
        assert a.nodes()["b"] == B, "it may be on its way back"
        await until(a, lambda: "b" not in a.nodes())
        assert a.gone()["b"].entry == B
        second.set(Mode.OPEN)
        await until(a, lambda: "b" in a.nodes())
        assert b.status().counts.lost_leases == 1
