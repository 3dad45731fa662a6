"""The directory on a real etcd: what nodes see of each other, and whose a name is."""

from __future__ import annotations

import asyncio
import json
from base64 import b64encode
from collections.abc import AsyncIterator
from dataclasses import replace

import pytest

from peermem.core.errors import LimitReached, NodeNameTaken
from peermem.core.types import FabricKind
from peermem.directory import etcd as etcd_directory
from peermem.directory.base import Directory, NodeEntry
from tests.directory.conformance import A, B, DirectoryConformance, names, written
from tests.directory.etcd_server import PATIENCE, EtcdServer, needs_etcd
from tests.directory.support import FULL, opened, region, settings, until

pytestmark = needs_etcd


class TestEtcdDirectory(DirectoryConformance):
    @pytest.fixture
    async def directory(self, etcd: EtcdServer, cluster: str) -> AsyncIterator[Directory]:
        chosen = settings(etcd.endpoint, cluster)
        async with opened(chosen, B), opened(chosen) as directory:
            yield directory


A2 = replace(A, address="10.0.0.9:7470", epoch="e9")


async def test_nodes_see_each_other_come_and_go(etcd: EtcdServer, cluster: str) -> None:
    chosen = settings(etcd.endpoint, cluster)
    async with opened(chosen, FULL) as a:
        async with opened(chosen, B) as b:
            assert b.nodes() == {"a": FULL, "b": B}
            await until(a, lambda: "b" in a.nodes())
        await until(a, lambda: "b" not in a.nodes())
        assert a.gone()["b"].entry == B
        assert 0 <= a.gone()["b"].gone_for < PATIENCE
        async with opened(chosen, B):
            await until(a, lambda: "b" in a.nodes())
            assert a.gone() == {}


async def test_another_cluster_is_never_seen(etcd: EtcdServer, cluster: str) -> None:
    here = settings(etcd.endpoint, cluster)
    for other in (replace(here, cluster=f"{cluster}0"), replace(here, prefix="/elsewhere")):
        async with opened(here, B) as b, opened(other, FULL) as a:
            a.publish(region("x"))
            await written(a)
            assert (set(b.nodes()), set(a.nodes())) == ({"b"}, {"a"})
            assert await b.find({}, None, 10) == ([], None)
    assert etcd.keys(f"/peermem/v1/{cluster}/") == []


async def test_regions_of_all_nodes_are_found_from_each(etcd: EtcdServer, cluster: str) -> None:
    chosen = settings(etcd.endpoint, cluster)
    async with opened(chosen, A) as a, opened(chosen, B) as b, opened(chosen) as c:
        a.publish(region("x", "a", step="1"))
        b.publish(region("y", "b", step="1"))
        await written(a)
        await written(b)
        found, _ = await c.find({"step": "1"}, None, 10)
        assert [str(each.name) for each in found] == ["nodes/a/regions/x", "nodes/b/regions/y"]


async def test_many_regions_are_written_in_batches_and_few_are_limited(etcd: EtcdServer, cluster: str) -> None:
    chosen = settings(etcd.endpoint, cluster, max_published=300)
    async with opened(chosen, A) as a:
        for number in range(300):
            a.publish(region(f"r{number}", number=str(number)))
        with pytest.raises(LimitReached, match=r"300 regions .*max_published"):
            a.publish(region("one-more"))
        await written(a)
        assert len(etcd.keys(f"/peermem/v1/{cluster}/regions/a/")) == 300
        assert len(etcd.keys(f"/peermem/v1/{cluster}/labels/")) == 300
        assert len((await a.find({}, None, 1000))[0]) == 300
        for number in range(299):
            a.withdraw(region(f"r{number}").name)
        await written(a)
        assert etcd.keys(f"/peermem/v1/{cluster}/labels/") == [f"/peermem/v1/{cluster}/labels/number=299/a/r299"]


async def test_what_comes_and_goes_before_it_is_written_never_is(etcd: EtcdServer, cluster: str) -> None:
    async with opened(settings(etcd.endpoint, cluster)) as a:
        a.publish(region("x"))
        assert a.status().unwritten == 1
        a.withdraw(region("x").name)
        assert a.status().unwritten == 0


async def test_a_second_node_of_a_name_is_refused_until_the_first_one_leaves(etcd: EtcdServer, cluster: str) -> None:
    chosen = settings(etcd.endpoint, cluster)
    async with opened(chosen) as second:
        async with opened(chosen, A) as first:
            await second.join(A2)
            await until(second, lambda: second.status().refusal is not None)
            refusal = second.status().refusal
            assert isinstance(refusal, NodeNameTaken)
            assert (refusal.metadata["address"], refusal.metadata["other"]) == (A2.address, A.address)
            assert A2.address in refusal.message
            assert A.address in refusal.message
            assert second.status().lease_left is None
            assert (second.status().away_for, first.status().refusal) == (None, None)
            assert first.nodes()["a"] == A
        await until(second, lambda: second.status().lease_left is not None)
        assert second.status().refusal is None


@pytest.mark.parametrize("machine", ["m1", "m2"])
async def test_a_restarted_daemon_has_its_name_back_at_once_and_another_host_does_not(
    etcd: EtcdServer, cluster: str, machine: str
) -> None:
    chosen = settings(etcd.endpoint, cluster, lease=600)
    again = replace(A, epoch="e2")
    async with opened(chosen, A) as before, opened(chosen) as other:
        before.publish(region("x"))
        await written(before)
        async with opened(replace(chosen, machine=machine)) as after:
            await after.join(again)
            if machine == "m2":
                await until(after, lambda: after.status().refusal is not None)
                return
            await until(other, lambda: other.nodes()["a"] == again)
            await until(after, lambda: after.status().lease_left is not None)
            assert await other.find({}, None, 10) == ([], None), "of the run before"
            await until(before, lambda: before.status().refusal is not None)
            assert after.status().refusal is None, "the run before does not take it back"


async def test_a_node_that_leaves_while_it_joins_leaves_nothing_behind(etcd: EtcdServer, cluster: str) -> None:
    chosen = settings(etcd.endpoint, cluster, lease=600)
    async with opened(chosen) as other:
        for _ in range(30):
            async with opened(chosen) as a:
                await a.join(A)
                await until(other, lambda: "a" in other.nodes())  # before a knows it, now and then
            await until(other, lambda: "a" not in other.nodes())


async def test_a_name_under_which_something_else_is_is_taken(etcd: EtcdServer, cluster: str) -> None:
    key = f"/peermem/v1/{cluster}/nodes/a"
    etcd.put(key, b"{}")
    async with opened(settings(etcd.endpoint, cluster)) as a:
        await a.join(A)
        await until(a, lambda: a.status().refusal is not None)
        assert "makes no sense" in str(a.status().refusal)
        etcd.delete(key)
        await until(a, lambda: a.status().lease_left is not None)


async def test_an_entry_that_somebody_deletes_comes_back(etcd: EtcdServer, cluster: str) -> None:
    chosen = settings(etcd.endpoint, cluster, lease=600)
    async with opened(chosen, A) as a, opened(chosen) as other:
        a.publish(region("x"))
        await written(a)
        etcd.delete(f"/peermem/v1/{cluster}/nodes/a")
        await until(other, lambda: "a" not in other.nodes())
        await until(other, lambda: "a" in other.nodes())
        await written(a)
        assert len((await other.find({}, None, 10))[0]) == 1


GARBAGE = {
    "b": b"",
    "c": b"\xff\xfe",
    "d": b"[1]",
    "e": b'{"v": 2, "address": "10.0.0.3:1"}',
    "f": b'{"v": 1}',
    "g": b'{"v": 1, "address": "nowhere"}',
    "h": b'{"v": 1, "address": "10.0.0.3:1", "epoch": "\\u001b[2J"}',
    "i": b'{"v": 1, "address": "10.0.0.3:1", "fabrics": 7}',
    "j": b'{"v": 1, "address": "10.0.0.3:1", "more": "' + b"x" * 70_000 + b'"}',
    "UPPER": b'{"v": 1, "address": "10.0.0.3:1"}',
    "x/y": b'{"v": 1, "address": "10.0.0.3:1"}',
}


async def test_what_makes_no_sense_is_left_out_and_counted(etcd: EtcdServer, cluster: str) -> None:
    for node, value in GARBAGE.items():
        etcd.put(f"/peermem/v1/{cluster}/nodes/{node}", value)
    newer = b'{"v": 1, "address": "10.0.0.3:1", "fabrics": ["verbs", "photons"], "colour": {"any": [1]}}'
    etcd.put(f"/peermem/v1/{cluster}/nodes/newer", newer)
    async with opened(settings(etcd.endpoint, cluster)) as directory:
        assert directory.nodes() == {"newer": NodeEntry("newer", "10.0.0.3:1", fabrics=(FabricKind.VERBS,))}
        assert directory.status().counts.garbage == len(GARBAGE)
        etcd.put(f"/peermem/v1/{cluster}/nodes/newer", b"{}")
        etcd.put(f"/peermem/v1/{cluster}/nodes/last", newer)
        await until(directory, lambda: "last" in directory.nodes())
        assert set(directory.nodes()) == {"newer", "last"}, "what was known of it stays"
        assert directory.status().counts.garbage == len(GARBAGE) + 1


async def test_regions_that_make_no_sense_are_left_out(etcd: EtcdServer, cluster: str) -> None:
    for key, value in (
        ("a/bad", b"no"),
        ("a/b/c", b'{"v": 1, "length": 1, "device_kind": "memfd", "path": "HOST"}'),
        ("a/long", b'{"v": 1, "length": -1, "device_kind": "memfd", "path": "HOST"}'),
        ("a/way", b'{"v": 1, "length": 1, "device_kind": "memfd", "path": "MAGIC"}'),
        ("a/label", b'{"v": 1, "length": 1, "device_kind": "memfd", "path": "HOST", "labels": {"": "x"}}'),
        ("a/right", b'{"v": 1, "length": 1, "device_kind": "memfd", "path": "HOST", "x": 1}'),
    ):
        etcd.put(f"/peermem/v1/{cluster}/regions/{key}", value)
    async with opened(settings(etcd.endpoint, cluster)) as directory:
        assert await names(directory) == ["right"]
        assert directory.status().counts.garbage >= 5


async def test_more_that_makes_no_sense_than_one_answer_looks_through_hides_nothing(
    etcd: EtcdServer, cluster: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(etcd_directory, "_PAGES", 1)
    for first in range(0, 1100, 100):
        puts = [put(f"/peermem/v1/{cluster}/regions/a/r-{first + number:04}", b"no") for number in range(100)]
        etcd.ask("kv/txn", success=puts)
    async with opened(settings(etcd.endpoint, cluster), A) as a:
        a.publish(region("first"))
        a.publish(region("s-last"))
        await written(a)
        async with asyncio.timeout(PATIENCE):
            assert await names(a) == ["first", "s-last"]


def put(key: str, value: bytes) -> dict[str, dict[str, str]]:
    """An operation of a transaction, for etcd's JSON gateway."""
    fields = {"key": key.encode(), "value": value}
    return {"requestPut": {name: b64encode(field).decode() for name, field in fields.items()}}


async def test_no_key_and_no_secret_is_written(etcd: EtcdServer, cluster: str) -> None:
    async with opened(settings(etcd.endpoint, cluster), FULL) as a:
        a.publish(region("x", step="1"))
        await written(a)
        found = etcd.values(f"/peermem/v1/{cluster}/")
    fields = {field for value in found.values() for field in json.loads(value)}
    assert fields == {
        *("v", "address", "machine", "epoch", "version", "fabrics", "nics", "devices"),
        *("length", "device_kind", "path", "labels"),
    }
