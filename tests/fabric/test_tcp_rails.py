"""Rails of tcp links that break one by one, and come back."""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import AsyncIterator, Callable

import pytest

from peermem.core.errors import LinkNotFound
from peermem.core.failpoints import turned_on
from peermem.core.retries import RailHealth
from peermem.core.types import FabricKind, LinkAttributes, Ranges, Rights
from peermem.fabric import frames
from peermem.fabric.base import Exchange, LinkEnd, Opcode, Status, WorkRequest
from peermem.fabric.tcp import TcpFabric
from tests.fabric.support import MIB, Connection, FileMemory, Recorder, eventually
from tests.fabric.test_tcp_initiator import KEY, hold, impostor
from tests.fabric.test_tcp_target import Raw


@pytest.fixture
async def fabric(lost: list[bytes]) -> AsyncIterator[TcpFabric]:
    fabric = TcpFabric("127.0.0.1:0", stall_timeout=0.2, handshake_timeout=0.3, on_link_lost=lost.append)
    await fabric.start()
    yield fabric
    await fabric.close()


def reset() -> None:
    raise ConnectionResetError(errno.ECONNRESET, os.strerror(errno.ECONNRESET))


@pytest.mark.parametrize("opcode", list(Opcode))
@pytest.mark.parametrize("point", ["tcp.send", "tcp.receive"])
async def test_a_link_goes_on_without_a_rail_that_broke(
    fabric: TcpFabric, memories: Callable[..., FileMemory], lost: list[bytes], opcode: Opcode, point: str
) -> None:
    connection = await Connection(fabric, fabric).open(3)
    local, remote = memories(16 * MIB, 1), memories(16 * MIB, 2)
    key = await connection.grant(remote)
    with turned_on(point, reset, skip=5, times=1):
        statuses = await connection.events.wait(await connection.post_all(opcode, local, key))
    assert set(statuses) == {Status.SUCCESS, Status.WR_FLUSH_ERR}
    await eventually(lambda: connection.events.rails[-1:] == ["up"])
    assert connection.events.rails[0].startswith("down: ")
    assert await connection.run(opcode, local, key, Ranges.single(0, 0, 16 * MIB)) is Status.SUCCESS
    assert local.bytes() == remote.bytes()
    assert (connection.events.ends, connection.events.faults, lost) == ([], [], [])
    assert (connection.link.rails_down, fabric.accepted_count, fabric.grant_count) == (0, 1, 1)
    await connection.close()


async def test_a_rail_that_stands_still_is_given_up_alone(fabric: TcpFabric) -> None:
    met = 0

    async def first_holds(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal met
        met += 1
        if met == 1:
            await hold(reader, writer)
        while True:
            head = frames.decode_head(await reader.readexactly(frames.HEAD_SIZE))
            assert isinstance(head, frames.RequestHead)
            await reader.readexactly(head.total)
            writer.write(frames.encode_ack(head.wr_id, Status.SUCCESS))

    async with impostor(first_holds) as address:
        events, memory = Recorder(), FileMemory(4096)
        link = await fabric.connect(answering(address, 2), events, 2)
        for wr_id in (1, 2):
            link.post(WorkRequest(wr_id, Opcode.WRITE, memory, KEY, Ranges.single(0, 0, 4096)))
        assert await events.wait([1, 2]) == [Status.WR_FLUSH_ERR, Status.SUCCESS]
        await eventually(lambda: events.rails == ["down: nothing moved for 0.2 s", "up"])
        assert events.ends == []
        await link.close()
        memory.close()


def answering(address: str, rails: int, again: Exception | None = None) -> Exchange:
    """Return an exchange that leads to an address, and fails when a rail is to be rebuilt, if `again` is given."""

    async def exchange(offer: LinkAttributes) -> LinkAttributes:
        if offer.link_id and again is not None:
            raise again
        return LinkAttributes(FabricKind.TCP, 1 if offer.link_id else rails, b"i" * 16, address, b"s" * 32)

    return exchange


async def test_a_rail_that_breaks_again_and_again_is_set_aside_for_longer_each_time(
    fabric: TcpFabric, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(RailHealth, "SHORTEST", 0.001)
    met = 0

    async def first_stays(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal met
        met += 1
        if met == 1:
            await reader.read()

    async with impostor(first_stays) as address:
        events = Recorder()
        link = await fabric.connect(answering(address, 2), events, 2)
        await eventually(lambda: len(events.pauses) >= 6)
        for attempt, pause in enumerate(events.pauses):
            assert 0.0005 * 2**attempt <= pause <= 0.001 * 2**attempt
        assert events.ends == []
        await link.close()


@pytest.mark.parametrize("answer", ["none", "another link"])
async def test_a_link_that_the_far_end_forgot_goes_down(fabric: TcpFabric, answer: str) -> None:
    met = 0

    async def first_stays(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal met
        met += 1
        if met == 1:
            await reader.read()

    async def another(offer: LinkAttributes) -> LinkAttributes:
        link_id = b"j" * 16 if offer.link_id else b"i" * 16
        return LinkAttributes(FabricKind.TCP, offer.rails, link_id, address, b"s" * 32)

    async with impostor(first_stays) as address:
        events = Recorder()
        exchange = answering(address, 2, LinkNotFound("Not here.")) if answer == "none" else another
        await fabric.connect(exchange, events, 2)
        await eventually(lambda: events.ends == [LinkEnd.REMOTE_CLOSED])


async def test_a_link_that_closes_while_a_rail_rests_leaves_nothing(fabric: TcpFabric) -> None:
    connection = await Connection(fabric, fabric).open(2)
    with turned_on("tcp.dial", reset):
        memory = FileMemory(MIB)
        key = await connection.grant(memory)
        with turned_on("tcp.send", reset, times=1):
            await connection.run(Opcode.WRITE, memory, key, Ranges.single(0, 0, MIB))
        await eventually(lambda: len(connection.events.pauses) > 1)
        assert connection.link.rails_down == 1
    await connection.close()
    memory.close()
    assert connection.link.rails_down == 0


# The target's side


async def admitted(fabric: TcpFabric, answer: LinkAttributes) -> Raw:
    raw = await Raw.open(fabric)
    await raw.join(answer)
    return raw


async def test_a_new_rail_takes_the_place_of_the_one_that_was_silent_for_longest(
    fabric: TcpFabric, lost: list[bytes]
) -> None:
    first = fabric.accept(LinkAttributes(FabricKind.TCP, 2))
    silent, busy = [await admitted(fabric, first) for _ in range(2)]
    memory = FileMemory(4096)
    key = await fabric.grant(first.link_id, memory, 0, 4096, Rights.READ, 10.0)
    busy.request(Opcode.READ, 1, key, Ranges.single(0, 0, 4))
    assert await busy.response() == frames.Response(1, Status.SUCCESS, 4)
    anew = fabric.accept(LinkAttributes(FabricKind.TCP, 1, first.link_id))
    assert (anew.link_id, anew.rails) == (first.link_id, 1)
    assert anew.secret != first.secret
    third = await admitted(fabric, anew)
    assert await silent.ended() == b""
    third.request(Opcode.READ, 2, key, Ranges.single(0, 0, 4))
    assert await third.response() == frames.Response(2, Status.SUCCESS, 4)
    assert (fabric.accepted_count, lost) == (1, [])
    for raw in (silent, busy, third):
        await raw.close()
    await eventually(lambda: lost == [first.link_id])
    memory.close()


async def test_an_old_secret_and_a_late_rail_are_refused(fabric: TcpFabric) -> None:
    first = fabric.accept(LinkAttributes(FabricKind.TCP, 1))
    rail = await admitted(fabric, first)
    anew = fabric.accept(LinkAttributes(FabricKind.TCP, 1, first.link_id))
    forged = await Raw.open(fabric)
    forged.writer.write(forged.hello(first.link_id, first.secret))
    assert await forged.ended() == b""
    await asyncio.sleep(0.7)  # longer than twice the handshake timeout: it is the time that is tested
    late = await Raw.open(fabric)
    late.writer.write(late.hello(anew.link_id, anew.secret))
    assert await late.ended() == b""
    assert (fabric.accepted_count, fabric.rejected_count) == (1, 2)
    for raw in (rail, forged, late):
        await raw.close()


async def test_rails_for_a_link_that_is_not_open(fabric: TcpFabric) -> None:
    with pytest.raises(LinkNotFound):
        fabric.accept(LinkAttributes(FabricKind.TCP, 1, b"x" * 16))
    opened = fabric.accept(LinkAttributes(FabricKind.TCP, 1))
    with pytest.raises(LinkNotFound):
        fabric.accept(LinkAttributes(FabricKind.TCP, 1, opened.link_id))
    await fabric.hang_up(opened.link_id)
    with pytest.raises(LinkNotFound):
        fabric.accept(LinkAttributes(FabricKind.TCP, 1, opened.link_id))
