"""Directories on an etcd of three members: what they know when one fails, when most fail, and when its disk is full."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from peermem.core.errors import DirectoryUnreachable
from peermem.directory.etcd import Settings
from tests.directory.conformance import A, B, written
from tests.directory.etcd_server import PATIENCE, EtcdServer, etcd_members, etcd_server, needs_etcd
from tests.directory.support import opened, region, settings, until

pytestmark = needs_etcd
SPACE = 4 << 20
"""Bytes that a small etcd may hold."""


@pytest.fixture
def members(tmp_path: Path) -> Iterator[Sequence[EtcdServer]]:
    with etcd_members(tmp_path, 3) as made:
        yield made


def of_all(members: Sequence[EtcdServer], first: EtcdServer, lease: float) -> Settings:
    endpoints = [first.endpoint, *(each.endpoint for each in members if each is not first)]
    return settings("", "x", endpoints=endpoints, lease=lease)


async def leading(members: Sequence[EtcdServer]) -> None:
    """Wait until one of them leads: a write before that is given up by etcd after some seconds only."""
    async with asyncio.timeout(PATIENCE):
        while not any(each.leads() for each in members):  # noqa: ASYNC110 - etcd tells nobody
            await asyncio.sleep(0.02)


def fill(server: EtcdServer) -> None:
    for _ in range(4 * SPACE >> 20):  # it says that it is full a little later than it is
        server.put("/other", b"x" * (1 << 20))


@pytest.mark.parametrize("how", ["killed", "frozen"])
async def test_another_leader_is_nobodys_end(members: Sequence[EtcdServer], how: str) -> None:
    leader = next(each for each in members if each.leads())
    chosen = of_all(members, leader, lease=6)  # by a third of which a member that stands still is noticed
    async with opened(chosen, A) as a, opened(chosen, B) as b:
        b.publish(region("before", "b"))
        await written(b)
        leader.kill() if how == "killed" else leader.freeze()
        try:
            await leading([each for each in members if each is not leader])
            b.publish(region("after", "b"))
            await written(b)
            async with opened(of_all(members[::-1], members[-1], lease=600)) as newcomer:
                await until(newcomer, lambda: newcomer.status().away_for is None)
                assert set(newcomer.nodes()) == {"a", "b"}
                assert len((await newcomer.find({}, None, 10))[0]) == 2
            assert a.nodes() == {"a": A, "b": B}
        finally:
            if how == "frozen":
                leader.thaw()
        for each in (a, b):
            await until(each, lambda each=each: each.status().away_for is None)  # type: ignore[misc]
            assert each.status().counts.lost_leases == 0


async def test_without_most_members_nodes_stay_known_and_what_was_made_meanwhile_is_told_later(
    members: Sequence[EtcdServer],
) -> None:
    chosen = of_all(members, members[0], lease=600)
    async with opened(chosen, A) as a, opened(chosen, B) as b:
        for each in members[1:]:
            each.kill()
        await until(a, lambda: a.status().away_for is not None)
        await until(b, lambda: b.status().away_for is not None)
        b.publish(region("meanwhile", "b"))
        assert a.nodes() == {"a": A, "b": B}
        with pytest.raises(DirectoryUnreachable):
            await a.find({}, None, 10)
        for each in members[1:]:
            each.launch()
        await until(a, lambda: a.status().away_for is None)
        await until(b, lambda: b.status().away_for is None)
        await written(b)
        assert len((await a.find({}, None, 10))[0]) == 1
        assert [each.status().counts.lost_leases for each in (a, b)] == [0, 0]


async def test_an_etcd_without_space_keeps_nodes_and_is_told_of_regions_when_it_has_some(tmp_path: Path) -> None:
    with etcd_server(tmp_path / "etcd", (f"--quota-backend-bytes={SPACE}",)) as server:
        chosen = settings(server.endpoint, "x", lease=600)
        async with opened(chosen, A) as a, opened(chosen, B) as b:
            await until(a, lambda: "b" in a.nodes())
            with pytest.raises(AssertionError, match="database space exceeded"):
                fill(server)
            a.publish(region("x"))
            await until(a, lambda: a.status().unwritten == 1)
            async with opened(chosen) as reader:
                assert set(reader.nodes()) == {"a", "b"}
            assert a.status().away_for is None
            server.delete("/other")
            server.compact()
            server.ask("maintenance/defragment")
            for alarm in server.ask("maintenance/alarm")["alarms"]:
                server.ask("maintenance/alarm", action="DEACTIVATE", **alarm)
            await written(a)
            assert len((await b.find({}, None, 10))[0]) == 1
            assert a.status().counts.lost_leases == 0
