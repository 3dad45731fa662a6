from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest

from peermem.core.errors import NodeUnreachable
from peermem.core.types import FabricKind, LinkAttributes, Ranges, RemoteKey
from peermem.fabric import frames, tcp_proof
from peermem.fabric.base import LinkEnd, Opcode, Status, WorkRequest
from peermem.fabric.tcp import TcpFabric
from peermem.fabric.tcp_proof import Proofs
from peermem.fabric.tcp_stream import Pace
from tests.fabric.support import MIB, Connection, FileMemory, Recorder, eventually, open_sockets

Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]
SECRET = b"s" * 32
KEY = RemoteKey(1, 64 * MIB)


@asynccontextmanager
async def impostor(
    serve: Serve, *, welcome: bytes | None = None, shown: Callable[[Proofs], None] = lambda _: None
) -> AsyncIterator[str]:
    """A server that greets and welcomes everybody and then does as it likes; `welcome` comes instead of its own, and
    `shown` gets what both ends prove."""

    over = asyncio.Event()

    async def converse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            nonce = tcp_proof.fresh_nonce()
            writer.write(tcp_proof.encode_greeting(nonce))
            hello = tcp_proof.decode_hello(await reader.readexactly(tcp_proof.HELLO_SIZE))
            proofs = Proofs(SECRET, hello.link_id, nonce, hello.nonce)
            shown(proofs)
            writer.write(tcp_proof.encode_welcome(proofs.welcome) if welcome is None else welcome)
            await serve(reader, writer)

    async def met(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        ends = [asyncio.create_task(work) for work in (converse(reader, writer), over.wait())]
        await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        for task in ends:
            task.cancel()
        writer.transport.abort()

    server = await asyncio.start_server(met, "127.0.0.1", 0)
    async with server:
        host, port = server.sockets[0].getsockname()[:2]
        yield f"{host}:{port}"
        over.set()


async def hold(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Neither read nor answer, until the other side ends."""
    writer.transport.pause_reading()  # type: ignore[attr-defined]
    await asyncio.Event().wait()


@pytest.fixture
async def fabric() -> AsyncIterator[TcpFabric]:
    before = open_sockets()
    fabric = TcpFabric("127.0.0.1:0", stall_timeout=0.2, handshake_timeout=0.3)
    yield fabric
    await fabric.close()
    await eventually(lambda: open_sockets() <= before)


def leading_to(address: str, rails: int = 1) -> Callable[[LinkAttributes], Awaitable[LinkAttributes]]:
    async def exchange(offer: LinkAttributes) -> LinkAttributes:
        return LinkAttributes(FabricKind.TCP, rails, b"i" * 16, address, SECRET)

    return exchange


async def nothing(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await asyncio.Event().wait()


# Opening


@pytest.mark.parametrize(
    "address", ["", "nonsense", "127.0.0.1:", "::1:80", "127.0.0.1:99999", "no-such-host.invalid:1"]
)
async def test_an_address_that_is_none(fabric: TcpFabric, address: str) -> None:
    with pytest.raises(NodeUnreachable):
        await fabric.connect(leading_to(address), Recorder())


async def test_nobody_there(fabric: TcpFabric) -> None:
    with socket.create_server(("127.0.0.1", 0)) as unused:
        port = unused.getsockname()[1]
    with pytest.raises(NodeUnreachable, match="refused"):
        await fabric.connect(leading_to(f"127.0.0.1:{port}"), Recorder())


async def test_somebody_else_there(fabric: TcpFabric) -> None:
    async with impostor(nothing, welcome=b"HTTP/1.1 400 Bad".ljust(tcp_proof.WELCOME_SIZE)) as address:
        with pytest.raises(NodeUnreachable, match="does not know the link's secret"):
            await fabric.connect(leading_to(address), Recorder())


async def test_a_connection_that_ends_instead_of_a_welcome(fabric: TcpFabric) -> None:
    async def leave(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write_eof()
        await reader.read()

    async with impostor(leave, welcome=b"PM") as address:
        with pytest.raises(NodeUnreachable, match="instead of a welcome"):
            await fabric.connect(leading_to(address), Recorder())


async def test_a_port_that_is_taken(fabric: TcpFabric) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        second = TcpFabric(f"127.0.0.1:{taken.getsockname()[1]}")
        with pytest.raises(OSError, match="in use"):
            await second.start()
        await second.close()


async def test_no_welcome_in_time(fabric: TcpFabric) -> None:
    async with impostor(nothing, welcome=b"") as address:
        with pytest.raises(NodeUnreachable, match="did not answer in time"):
            await fabric.connect(leading_to(address), Recorder())


@pytest.mark.parametrize("rails", [0, 3])
async def test_an_answer_with_other_rails_than_offered(fabric: TcpFabric, rails: int) -> None:
    async with impostor(nothing) as address:
        with pytest.raises(NodeUnreachable, match="rails"):
            await fabric.connect(leading_to(address, rails), Recorder(), rails=2)


async def test_a_cancelled_connect_leaves_nothing(fabric: TcpFabric) -> None:
    async with impostor(nothing, welcome=b"") as address:
        before = open_sockets()
        task = asyncio.create_task(fabric.connect(leading_to(address), Recorder()))
        await eventually(lambda: open_sockets().total() == before.total() + 2)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task


async def test_a_closed_fabric_does_not_connect(fabric: TcpFabric) -> None:
    await fabric.close()
    async with impostor(nothing) as address:
        with pytest.raises(NodeUnreachable, match="closed"):
            await fabric.connect(leading_to(address), Recorder())


@pytest.mark.parametrize("address", ["[::1]:0", "localhost:0"])
async def test_other_ways_to_write_an_address(address: str) -> None:
    fabric = TcpFabric(address)
    try:
        await fabric.start()
    except OSError as error:
        pytest.skip(f"this host has no {address}: {error}")
    assert fabric.address.startswith(address[:-1])
    assert not fabric.address.endswith(":0")
    connection = await Connection(fabric, fabric).open()
    await connection.link.close()
    await fabric.close()


async def test_what_is_advertised_is_told(fabric: TcpFabric) -> None:
    shown = TcpFabric("127.0.0.1:0", advertise="node.example:0")
    await shown.start()
    answer = shown.accept(LinkAttributes(FabricKind.TCP, 999))
    assert answer.address == f"node.example:{shown.address.rpartition(':')[2]}"
    assert 1 <= answer.rails <= 64
    await shown.close()


# What is little beside what is much


async def test_while_somebody_moves_little_one_connection_is_kept_free_of_what_is_much(fabric: TcpFabric) -> None:
    carried: list[list[int]] = []

    async def note(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        mine: list[int] = []
        carried.append(mine)
        while True:
            head = frames.decode_head(await reader.readexactly(frames.HEAD_SIZE))
            assert isinstance(head, frames.RequestHead)
            await reader.readexactly(head.total)
            mine.append(head.total)
            writer.write(frames.encode_ack(head.wr_id, Status.SUCCESS))

    async with impostor(note) as address:
        events, memory = Recorder(), FileMemory(MIB)
        link = await fabric.connect(leading_to(address, rails=2), events, rails=2)
        for wr_id in (1, 2):
            link.post(WorkRequest(wr_id, Opcode.WRITE, memory, KEY, Ranges.single(0, 0, MIB)))
        assert set(await events.wait([1, 2])) == {Status.SUCCESS}
        assert carried == [[MIB], [MIB]]
        for wr_id in range(3, 9):
            length = 4096 if wr_id % 2 else MIB
            link.post(WorkRequest(wr_id, Opcode.WRITE, memory, KEY, Ranges.single(0, 0, length)))
        assert set(await events.wait(range(3, 9))) == {Status.SUCCESS}
        assert sorted(carried, key=sum) == [[MIB, 4096, 4096], [MIB, 4096, MIB, MIB, MIB]]
        memory.close()


def test_turns_are_short_for_a_while_after_somebody_moved_little(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    pace = Pace()
    assert (pace.is_short, pace.call_bytes) == (False, MIB // 2)
    pace.request(MIB)
    assert not pace.is_short
    pace.request(64 << 10)
    assert pace.is_short
    now += 0.3
    assert not pace.is_short


async def test_who_comes_too_late_in_a_turn_is_first_in_the_next_one() -> None:
    pace, called = Pace(), ""

    def greedy(name: str) -> Callable[[], None]:
        def go_on() -> None:
            nonlocal called
            called += name
            pace.spend(8 * MIB)
            pace.came_late(go_on)

        return go_on

    first, second, third = greedy("a"), greedy("b"), greedy("c")
    for go_on in (first, second, third, first):
        pace.spend(8 * MIB)
        assert pace.spent
        pace.came_late(go_on)
    pace.forget(third)
    for _ in range(20):
        await asyncio.sleep(0)
    for go_on in (first, second):
        pace.forget(go_on)
    assert len(called) > 6
    assert called == ("ab" * 20)[: len(called)]


# A remote side that misbehaves


@pytest.mark.parametrize("opcode", list(Opcode))
async def test_a_remote_side_that_stands_still(fabric: TcpFabric, opcode: Opcode) -> None:
    async with impostor(hold) as address:
        events, memory = Recorder(), FileMemory(48 * MIB)
        link = await fabric.connect(leading_to(address), events)
        for wr_id in range(48):
            link.post(WorkRequest(wr_id, opcode, memory, KEY, Ranges.single(wr_id * MIB, 0, MIB)))
        assert set(await events.wait(range(48))) == {Status.WR_FLUSH_ERR}
        await eventually(lambda: events.ends == [LinkEnd.STALLED])
        assert events.faults == []
        memory.close()


async def test_an_idle_link_does_not_stall(fabric: TcpFabric) -> None:
    async def late(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for wr_id in (1, 2):
            await reader.readexactly(frames.HEAD_SIZE + 1)
            writer.write(frames.encode_ack(wr_id, Status.SUCCESS))
        await reader.read()

    async with impostor(late) as address:
        events, memory = Recorder(), FileMemory(4096)
        link = await fabric.connect(leading_to(address), events)
        for wr_id in (1, 2):
            link.post(WorkRequest(wr_id, Opcode.WRITE, memory, KEY, Ranges.single(0, 0, 1)))
            assert await events.wait([wr_id]) == [Status.SUCCESS]
            await asyncio.sleep(0.3)  # longer than the stall timeout: it is the time that is tested
        assert events.ends == []
        memory.close()


ANSWERS = {
    "garbage": b"\x17" * 64,
    "another request's": frames.encode_ack(99, Status.SUCCESS),
    "data for a write": frames.encode_data(1, 4096) + bytes(4096),
    "too early": frames.encode_ack(1, Status.SUCCESS),
    "a read without its data": frames.encode_ack(1, Status.SUCCESS),
    "too much data": frames.encode_data(1, 8192) + bytes(8192),
    "data twice": (frames.encode_data(1, 4096) + bytes(4096)) * 2,
}


@pytest.mark.parametrize("kind", ANSWERS)
async def test_an_answer_that_makes_no_sense_breaks_the_link(fabric: TcpFabric, kind: str) -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readexactly(frames.HEAD_SIZE)
        writer.write(ANSWERS[kind])
        writer.transport.pause_reading()  # type: ignore[attr-defined]
        await asyncio.Event().wait()

    async with impostor(answer) as address:
        events, memory = Recorder(), FileMemory(32 * MIB)
        link = await fabric.connect(leading_to(address), events)
        if kind in ("data for a write", "too early"):
            request = WorkRequest(1, Opcode.WRITE, memory, KEY, Ranges.single(0, 0, 32 * MIB))
        else:
            request = WorkRequest(1, Opcode.READ, memory, KEY, Ranges.single(0, 0, 4096))
        link.post(request)
        assert await events.wait([1]) == [Status.WR_FLUSH_ERR]
        await eventually(lambda: events.ends == [LinkEnd.BROKEN])
        assert events.faults == []
        memory.close()


async def test_a_request_that_no_frame_can_carry(fabric: TcpFabric) -> None:
    async with impostor(hold) as address:
        memory = FileMemory(4096)
        link = await fabric.connect(leading_to(address), Recorder())
        with pytest.raises(ValueError, match="beyond one frame"):
            link.post(WorkRequest(1, Opcode.READ, memory, KEY, Ranges([0] * 5000, [0] * 5000, [1] * 5000, 5000)))
        with pytest.raises(ValueError, match="said to have"):
            link.post(WorkRequest(1, Opcode.READ, memory, KEY, Ranges([0], [0], [1], 2)))
        await link.close()
        memory.close()
