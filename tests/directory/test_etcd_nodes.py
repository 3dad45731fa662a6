"""Where a watch goes on that was broken off, against an etcd that answers as a test says."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from typing import cast

import pytest

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

    async def list(self, span: Span) -> tuple[Sequence[rpc_pb2.KeyValue], rpc_pb2.ResponseHeader]:
        return [kv("a", 5)], rpc_pb2.ResponseHeader(cluster_id=1, revision=10)

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
