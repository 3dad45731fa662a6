"""Where a watch goes on that was broken off, against an etcd that answers as a test says."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import cast

import pytest

from peermem.directory import etcd_nodes
from peermem.directory.base import Changes, Counts
from peermem.directory.etcd_connection import Connection, Fault
from peermem.directory.etcd_nodes import Nodes
from peermem.directory.records import Keys, Span
from peermem.etcd import rpc_pb2

KEYS = Keys("/peermem/v1", "x")
NEWEST = 2000
"""etcd's revision, which the header of each answer names."""
HEADER = rpc_pb2.ResponseHeader(cluster_id=1, revision=NEWEST)
CREATED = rpc_pb2.WatchResponse(header=HEADER, created=True)


def kv(node: str, revision: int) -> rpc_pb2.KeyValue:
    value = b'{"v": 1, "address": "10.0.0.3:1"}'
    return rpc_pb2.KeyValue(key=KEYS.node(node), value=value, mod_revision=revision)


def told(*revisions: int, fragment: bool = False) -> rpc_pb2.WatchResponse:
    events = [rpc_pb2.Event(type=rpc_pb2.Event.PUT, kv=kv(f"n{revision}", revision)) for revision in revisions]
    return rpc_pb2.WatchResponse(header=HEADER, events=events, fragment=fragment)


class _Etcd:
    """Breaks each watch off after some answers."""

    def __init__(self, *answers: rpc_pb2.WatchResponse) -> None:
        self._answers = answers
        self.asked: list[int] = []

    async def pages(self, span: Span) -> AsyncGenerator[rpc_pb2.RangeResponse]:
        yield rpc_pb2.RangeResponse(header=rpc_pb2.ResponseHeader(cluster_id=1, revision=10), kvs=[kv("a", 5)])

    async def watch(self, span: Span, revision: int) -> AsyncGenerator[rpc_pb2.WatchResponse]:
        self.asked.append(revision)
        for answer in self._answers:
            yield answer
        raise Fault("broken off")


@pytest.mark.parametrize(
    ("answers", "goes_on"),
    [
        ((CREATED,), 11),
        ((CREATED, told(12, 1011)), 1012),
        ((CREATED, told(12), told(13, fragment=True)), 13),
        ((CREATED, told(12), rpc_pb2.WatchResponse(header=HEADER)), NEWEST + 1),
    ],
    ids=["before any event", "among older events", "within a revision", "after all"],
)
async def test_a_watch_goes_on_after_the_last_event_that_came(
    answers: tuple[rpc_pb2.WatchResponse, ...], goes_on: int
) -> None:
    nodes, etcd = Nodes(KEYS, 60, Changes(), Counts(), lambda revision: None), _Etcd(*answers)
    connection = cast("Connection", etcd)
    await nodes.read(connection)
    for _ in range(2):
        with pytest.raises(Fault):
            async with asyncio.timeout(10):
                await nodes.follow(connection, lambda: None)
    assert etcd.asked == [11, goes_on]
    nodes.close()


async def test_who_may_not_watch_does_not_know_the_nodes() -> None:
    refused = rpc_pb2.WatchResponse(header=HEADER, created=True, canceled=True, cancel_reason="permission denied")
    nodes, etcd = Nodes(KEYS, 60, Changes(), Counts(), lambda revision: None), _Etcd(refused)
    known: list[bool] = []
    await nodes.read(cast("Connection", etcd))
    with pytest.raises(Fault, match="permission denied"):
        await nodes.follow(cast("Connection", etcd), lambda: known.append(True))
    assert not known
    nodes.close()


async def test_more_nodes_than_there_may_be_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(etcd_nodes, "MAX_NODES", 2)
    counts = Counts()
    nodes, etcd = Nodes(KEYS, 60, Changes(), counts, lambda revision: None), _Etcd(CREATED, told(12, 13), told(12))
    await nodes.read(cast("Connection", etcd))
    with pytest.raises(Fault):
        await nodes.follow(cast("Connection", etcd), lambda: None)
    assert (set(nodes.entries()), counts.garbage) == ({"a", "n12"}, 1)
    nodes.close()
