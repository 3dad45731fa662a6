"""Another daemon over gRPC: a whole daemon in this process, and ports where nothing, or nonsense, answers."""

from __future__ import annotations

import asyncio
import gc
import itertools
import socket
import weakref

import pytest

from peermem.core import errors
from peermem.core.grant import Wanted
from peermem.core.identity import ANONYMOUS, Subject
from peermem.core.names import ChildName
from peermem.core.segments import columns
from peermem.core.transfer import TransferRequest
from peermem.core.types import FabricKind, LinkAttributes, Rights
from peermem.remote.client import GrpcRemotes
from tests.remote.conftest import HERE, Other

NOWHERE = ChildName("b", "regions", "nowhere")


OFFER = LinkAttributes(FabricKind.TCP, 2)


async def test_every_call_arrives_and_every_fault_comes_back_typed(other: Other, remotes: GrpcRemotes) -> None:
    await other.start()
    b = remotes.get("b")
    assert remotes.get("b") is b, "connections are shared"
    facts = await b.node_facts()
    assert (facts.node, facts.link_count, facts.fabrics) == ("b", 0, (FabricKind.TCP, FabricKind.LOCAL))
    opened = await b.open_link(OFFER)
    link = opened.attributes
    assert (opened.epoch, link.rails, len(link.link_id), len(link.secret)) == (facts.epoch, 2, 16, 32)
    assert (await b.node_facts()).link_count == 1
    with pytest.raises(errors.RegionNotFound) as caught:
        await b.acquire_grant(link.link_id, opened.epoch, Wanted(NOWHERE, Rights.READ, Subject("uid:7"), 0, 1))
    assert caught.value.metadata["region"] == str(NOWHERE)
    with pytest.raises(errors.StaleEpoch):
        await b.acquire_grant(link.link_id, "old", Wanted(NOWHERE, Rights.WRITE, ANONYMOUS, 0, 1))
    with pytest.raises(errors.LinkNotFound):
        await b.acquire_grant(b"x" * 16, opened.epoch, Wanted(NOWHERE, Rights.READ, ANONYMOUS, 0, 1, staged=True))
    with pytest.raises(errors.GrantRefused):
        await b.checksum(link.link_id, 1, [0], [1], 0)
    with pytest.raises(errors.GrantRefused):
        await b.flush(link.link_id, 1)
    with pytest.raises(errors.FabricUnavailable):
        await b.open_link(LinkAttributes(FabricKind.VERBS, 1))
    with pytest.raises(errors.AccessDenied, match="no transfer of uid:7@b under way on nodes/a"):
        await b.confirm_runs("a", Subject("uid:7", ("gid:7",), "b"))
    await b.release_grants(link.link_id, [1, 2, 3])
    await b.close_link(link.link_id)
    await b.close_link(link.link_id)
    assert (await b.node_facts()).link_count == 0


async def test_transfers_are_started_watched_and_cancelled_for_their_client(other: Other, remotes: GrpcRemotes) -> None:
    await other.start()
    assert other.app is not None
    b = remotes.get("b")
    entry = columns(NOWHERE, ChildName("a", "regions", "x"), (0,), (0,), (1,))
    with pytest.raises(errors.RegionNotFound):
        await b.create_transfer(TransferRequest([entry]), "request", Subject("uid:7"))
    missing = ChildName("b", "transfers", "none")
    with pytest.raises(errors.TransferNotFound):
        await b.cancel_transfer(missing, Subject("uid:7"))
    with pytest.raises(errors.TransferNotFound):
        await anext(aiter(b.watch_transfer(missing, Subject("uid:7"))))


async def test_a_node_that_is_down_is_unreachable_at_once_and_reachable_when_it_is_back(
    other: Other, remotes: GrpcRemotes
) -> None:
    b = remotes.get("b")
    for _ in range(2):
        async with asyncio.timeout(3):
            with pytest.raises(errors.NodeUnreachable) as caught:
                await b.open_link(OFFER)
        facts = {"node": "b", "address": other.address, "code": "UNAVAILABLE", "listens": "no"}
        assert caught.value.metadata == facts
        await other.start()
        assert (await b.open_link(OFFER)).attributes.rails == 2
        await other.stop()


async def test_a_node_that_the_directory_does_not_know(remotes: GrpcRemotes) -> None:
    with pytest.raises(errors.NodeNotFound):
        remotes.get("nowhere")


async def test_nothing_is_kept_of_where_a_node_was_or_of_nodes_that_are_gone(other: Other) -> None:
    await other.start()
    ports = itertools.count(1)
    addresses = {"b": other.address}
    remotes = GrpcRemotes(HERE, "epoch", lambda node: known(addresses, node))
    held = remotes.get("b")
    opened = await held.open_link(OFFER)
    seen: list[weakref.ref[object]] = []
    for number in range(200):
        node = "b" if number < 100 else f"n{number}"
        addresses[node] = f"127.0.0.1:{next(ports)}"
        seen.append(weakref.ref(remotes.get(node)))
        with pytest.raises(errors.NodeUnreachable):
            await remotes.get(node).node_facts()
        if node != "b":
            del addresses[node]
    gc.collect()
    assert sum(each() is not None for each in seen) < 100
    await held.release_grants(opened.attributes.link_id, [1])
    await held.close_link(opened.attributes.link_id)
    assert (await held.node_facts()).link_count == 0
    await remotes.close()


def known(addresses: dict[str, str], node: str) -> str:
    if node not in addresses:
        raise errors.NodeNotFound(f"nodes/{node} is unknown.", node=node)
    return addresses[node]


async def test_a_port_that_talks_nonsense_is_unreachable(other: Other, remotes: GrpcRemotes) -> None:
    async def nonsense(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"220 nonsense.example ESMTP\r\n" * 10)
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(nonsense, "127.0.0.1", other.port)
    async with server, asyncio.timeout(10):
        with pytest.raises(errors.NodeUnreachable):
            await remotes.get("b").node_facts()


async def test_a_node_that_does_not_answer_is_unreachable(
    other: Other, remotes: GrpcRemotes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("peermem.remote.client._DEADLINE", 0.2)
    with socket.create_server(("127.0.0.1", other.port)), pytest.raises(errors.NodeUnreachable):
        await remotes.get("b").node_facts()


async def test_secrets_are_in_no_repr(other: Other, remotes: GrpcRemotes) -> None:
    await other.start()
    opened = await remotes.get("b").open_link(OFFER)
    assert opened.attributes.secret.hex() not in repr(opened)
    assert repr(opened.attributes.secret) not in repr(opened)
    assert repr(opened.attributes.link_id) not in repr(opened)
