from __future__ import annotations

import asyncio
import contextlib
import os
import resource
import socket
from collections.abc import AsyncIterator, Callable

import pytest

from peermem.core.types import FabricKind, LinkAttributes, Ranges, RemoteKey, Rights
from peermem.fabric import frames, tcp_proof
from peermem.fabric.base import Opcode, Status
from peermem.fabric.tcp import TcpFabric, split_address
from peermem.fabric.tcp_proof import Proofs, Seal
from tests.fabric.support import MIB, Clock, Connection, FileMemory, eventually, ranges_of, turns


class Raw:
    """A connection to the fabric's port that says what it likes."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, greeting: bytes) -> None:
        self.reader = reader
        self.writer = writer
        self.greeting = greeting
        self.proofs: Proofs
        self.questions: Seal

    @staticmethod
    async def open(fabric: TcpFabric) -> Raw:
        """Connect, and take in the greeting."""
        reader, writer = await asyncio.open_connection(*split_address(fabric.address))
        greeting = tcp_proof.decode_greeting(await reader.readexactly(tcp_proof.GREETING_SIZE))
        return Raw(reader, writer, greeting)

    def hello(self, link_id: bytes, secret: bytes) -> bytes:
        """Return what shows that this connection knows the secret of a link."""
        nonce = tcp_proof.fresh_nonce()
        self.proofs = Proofs(secret, link_id, self.greeting, nonce)
        self.questions = self.proofs.questions()
        return tcp_proof.encode_hello(tcp_proof.Hello(link_id, nonce, self.proofs.hello))

    async def join(self, answer: LinkAttributes) -> None:
        """Become a rail of a link."""
        self.writer.write(self.hello(answer.link_id, answer.secret))
        tcp_proof.check_welcome(await self.reader.readexactly(tcp_proof.WELCOME_SIZE), self.proofs)

    def question(self, message: bytes) -> bytes:
        """Return the frame that carries the next message."""
        head = frames.question_head(len(message))
        return head + self.questions.mac(head, message) + message

    @staticmethod
    async def admitted(fabric: TcpFabric) -> tuple[Raw, bytes]:
        answer = fabric.accept(LinkAttributes(FabricKind.TCP, 1))
        raw = await Raw.open(fabric)
        await raw.join(answer)
        return raw, answer.link_id

    def request(self, opcode: Opcode, wr_id: int, key: RemoteKey, ranges: Ranges, total: int | None = None) -> None:
        head = frames.RequestHead(opcode, len(ranges.lengths), wr_id, key.rkey, ranges.total)
        frame = bytearray(frames.encode_request(head, ranges.remote, ranges.lengths))
        if total is not None:
            frame[24:32] = total.to_bytes(8, "little")
        self.writer.write(frame)

    async def response(self) -> frames.Response | frames.Carried:
        return frames.decode_response(await self.reader.readexactly(frames.RESPONSE_SIZE))

    async def ended(self) -> bytes:
        """Return what still comes, once the other side has closed."""
        try:
            async with asyncio.timeout(20):
                return await self.reader.read()
        except ConnectionResetError:
            return b""

    async def close(self) -> None:
        self.writer.transport.abort()


@pytest.fixture
async def fabric(clock: Clock, lost: list[bytes]) -> AsyncIterator[TcpFabric]:
    fabric = TcpFabric("127.0.0.1:0", clock=clock, on_link_lost=lost.append, handshake_timeout=0.5, max_pending=4)
    await fabric.start()
    yield fabric
    await fabric.close()


@pytest.fixture
async def honest(fabric: TcpFabric) -> AsyncIterator[Connection]:
    """A link that must not be hurt."""
    connection = await Connection(fabric, fabric).open()
    yield connection
    memory, remote = FileMemory(MIB, 1), FileMemory(MIB)
    status = await connection.run(Opcode.WRITE, memory, await connection.grant(remote), Ranges.single(0, 0, MIB))
    assert status is Status.SUCCESS
    assert remote.bytes() == memory.bytes()
    await connection.link.close()


# Who gets in


async def test_a_wrong_secret_is_dropped_without_a_word(fabric: TcpFabric, honest: Connection) -> None:
    answer = fabric.accept(LinkAttributes(FabricKind.TCP, 1))
    for link_id, secret in ((answer.link_id, b"x" * 32), (b"x" * 16, answer.secret)):
        raw = await Raw.open(fabric)
        raw.writer.write(raw.hello(link_id, secret))
        assert await raw.ended() == b""
        await raw.close()
    assert fabric.rejected_count == 2


async def test_a_secret_is_good_for_the_agreed_rails_only(fabric: TcpFabric, honest: Connection) -> None:
    answer = fabric.accept(LinkAttributes(FabricKind.TCP, 2))
    raws = [await Raw.open(fabric) for _ in range(3)]
    for raw in raws[:2]:
        await raw.join(answer)
    raws[2].writer.write(raws[2].hello(answer.link_id, answer.secret))
    assert await raws[2].ended() == b""
    assert fabric.rejected_count == 1
    for raw in raws:
        await raw.close()


async def test_a_secret_is_useless_after_hanging_up(fabric: TcpFabric, honest: Connection) -> None:
    answer = fabric.accept(LinkAttributes(FabricKind.TCP, 1))
    await fabric.hang_up(answer.link_id)
    raw = await Raw.open(fabric)
    raw.writer.write(raw.hello(answer.link_id, answer.secret))
    assert await raw.ended() == b""
    await raw.close()


async def test_who_says_nothing_is_dropped_in_time(fabric: TcpFabric, honest: Connection) -> None:
    raw = await Raw.open(fabric)
    raw.writer.write(b"PMHI")
    assert await raw.ended() == b""
    assert fabric.rejected_count == 1
    await raw.close()


async def test_too_many_silent_ones_do_not_lock_out_an_honest_one(fabric: TcpFabric, honest: Connection) -> None:
    raws = [await Raw.open(fabric) for _ in range(6)]
    late = await Connection(fabric, fabric).open()
    await eventually(lambda: fabric.rejected_count >= 2)
    await late.link.close()
    for raw in raws:
        await raw.close()


async def test_a_link_whose_rails_do_not_come_is_forgotten(lost: list[bytes]) -> None:
    fabric = TcpFabric("127.0.0.1:0", handshake_timeout=0.1, on_link_lost=lost.append)
    await fabric.start()
    answer = fabric.accept(LinkAttributes(FabricKind.TCP, 2))
    raw = await Raw.open(fabric)
    await raw.join(answer)
    assert await raw.ended() == b""
    assert lost == [answer.link_id]
    assert fabric.accepted_count == 0
    await raw.close()
    silent = await Raw.open(fabric)
    await turns()
    await fabric.close()
    assert await silent.ended() == b""
    await silent.close()


async def test_garbage_on_the_port(fabric: TcpFabric, honest: Connection) -> None:
    raw = await Raw.open(fabric)
    raw.writer.write(b"GET / HTTP/1.1\r\nHost: localhost\r\nUser-Agent: what\r\n\r\n" + os.urandom(100_000))
    assert await raw.ended() == b""
    await raw.close()


async def test_a_lost_rail_ends_its_link(
    fabric: TcpFabric, lost: list[bytes], memories: Callable[..., FileMemory]
) -> None:
    raw, link_id = await Raw.admitted(fabric)
    await fabric.grant(link_id, memories(), 0, 100, Rights.READ, 10.0)
    assert (fabric.accepted_count, fabric.grant_count) == (1, 1)
    await raw.close()
    await eventually(lambda: lost == [link_id])
    assert (fabric.accepted_count, fabric.grant_count) == (0, 0)


async def test_running_out_of_descriptors_only_pauses(fabric: TcpFabric, honest: Connection) -> None:
    client = socket.socket()
    client.setblocking(False)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    taken: list[int] = []
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (client.fileno() + 1, limits[1]))
        with contextlib.suppress(OSError):
            while True:
                taken.append(os.dup(client.fileno()))
        await asyncio.get_running_loop().sock_connect(client, split_address(fabric.address))
        await turns()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        for number in taken:
            os.close(number)
    client.close()
    late = await Connection(fabric, fabric).open()
    await late.link.close()


# What they may ask


@pytest.fixture
async def admitted(fabric: TcpFabric, honest: Connection) -> AsyncIterator[tuple[Raw, bytes]]:
    raw, link_id = await Raw.admitted(fabric)
    yield raw, link_id
    await raw.close()


async def test_a_refused_write_is_drained_and_the_next_one_served(
    fabric: TcpFabric, admitted: tuple[Raw, bytes], memories: Callable[..., FileMemory]
) -> None:
    raw, link_id = admitted
    memory = memories()
    key = await fabric.grant(link_id, memory, 0, MIB, Rights.WRITE, 10.0)
    raw.request(Opcode.WRITE, 1, RemoteKey(1, MIB), Ranges.single(0, 0, 2 * MIB))
    raw.writer.write(b"x" * 2 * MIB)
    raw.request(Opcode.WRITE, 2, key, Ranges.single(0, 5, 3))
    raw.writer.write(b"abc")
    assert await raw.response() == frames.Response(1, Status.REM_ACCESS_ERR, None)
    assert await raw.response() == frames.Response(2, Status.SUCCESS, None)
    assert memory.bytes() == (bytes(5) + b"abc").ljust(memory.length, b"\0")


@pytest.mark.parametrize("opcode", list(Opcode))
@pytest.mark.parametrize(("lengths", "total"), [([4, 0], 4), ([4, 4], 9), ([4, 4], 7), ([0], 0)])
async def test_a_malformed_request_is_answered(
    fabric: TcpFabric,
    admitted: tuple[Raw, bytes],
    memories: Callable[..., FileMemory],
    opcode: Opcode,
    lengths: list[int],
    total: int,
) -> None:
    raw, link_id = admitted
    memory = memories()
    key = await fabric.grant(link_id, memory, 0, MIB, Rights.READ | Rights.WRITE, 10.0)
    raw.request(opcode, 1, key, ranges_of([0] * len(lengths), [0] * len(lengths), lengths), total)
    if opcode is Opcode.WRITE:
        raw.writer.write(b"x" * total)
    assert await raw.response() == frames.Response(1, Status.REM_INV_REQ_ERR, None)
    raw.request(Opcode.READ, 2, key, Ranges.single(0, 0, 4))
    assert await raw.response() == frames.Response(2, Status.SUCCESS, 4)
    assert await raw.reader.readexactly(4) == bytes(4)
    assert await raw.response() == frames.Response(2, Status.SUCCESS, None)


async def test_what_can_not_be_framed_ends_the_link(admitted: tuple[Raw, bytes], lost: list[bytes]) -> None:
    raw, link_id = admitted
    raw.writer.write(os.urandom(1) * frames.HEAD_SIZE)
    assert await raw.ended() == b""
    await eventually(lambda: lost == [link_id])


@pytest.mark.parametrize("how", ["expiry", "revocation"])
async def test_a_write_stops_in_the_middle_of_its_payload(
    fabric: TcpFabric, admitted: tuple[Raw, bytes], memories: Callable[..., FileMemory], clock: Clock, how: str
) -> None:
    raw, link_id = admitted
    memory = memories()
    key = await fabric.grant(link_id, memory, 0, MIB, Rights.WRITE, 10.0)
    raw.request(Opcode.WRITE, 1, key, Ranges.single(0, 0, 2000))
    raw.writer.write(b"a" * 1000)
    await eventually(lambda: memory.bytes()[999:1000] == b"a")
    if how == "expiry":
        clock.ahead += 10.0
    else:
        await fabric.revoke(key)
    raw.writer.write(b"b" * 1000)
    assert await raw.response() == frames.Response(1, Status.REM_ACCESS_ERR, None)
    assert memory.bytes() == (b"a" * 1000).ljust(memory.length, b"\0")


async def test_many_refusals_and_many_ranges_go_out_together(
    fabric: TcpFabric, admitted: tuple[Raw, bytes], memories: Callable[..., FileMemory]
) -> None:
    raw, link_id = admitted
    memory = memories(seed=1)
    key = await fabric.grant(link_id, memory, 0, MIB, Rights.READ, 10.0)
    offsets = [1000 * index for index in range(frames.MAX_RANGES)]
    for wr_id in range(150):
        raw.request(Opcode.WRITE, wr_id, key, Ranges.single(0, 0, 1))
        raw.writer.write(b"x")
    raw.request(Opcode.READ, 150, key, ranges_of(offsets, offsets, [3] * len(offsets)))
    for wr_id in range(150):
        assert await raw.response() == frames.Response(wr_id, Status.REM_ACCESS_ERR, None)
    assert await raw.response() == frames.Response(150, Status.SUCCESS, 3 * len(offsets))
    expected = memory.bytes()
    assert await raw.reader.readexactly(3 * len(offsets)) == b"".join(expected[start : start + 3] for start in offsets)
    assert await raw.response() == frames.Response(150, Status.SUCCESS, None)


async def test_a_slow_reader_holds_up_nobody_and_gets_everything(
    fabric: TcpFabric, admitted: tuple[Raw, bytes], honest: Connection, memories: Callable[..., FileMemory]
) -> None:
    raw, link_id = admitted
    memory = memories(8192, 1)
    key = await fabric.grant(link_id, memory, 0, 8192, Rights.READ, 10.0)
    count = 9000
    for wr_id in range(count):
        raw.request(Opcode.READ, wr_id, key, Ranges.single(0, wr_id % 4096, 4096))
    local, remote = memories(MIB, 2), memories(MIB)
    assert await honest.run(Opcode.WRITE, local, await honest.grant(remote), Ranges.single(0, 0, MIB)) is Status.SUCCESS
    expected = memory.bytes()
    for wr_id in range(count):
        assert await raw.response() == frames.Response(wr_id, Status.SUCCESS, 4096)
        assert await raw.reader.readexactly(4096) == expected[wr_id % 4096 : wr_id % 4096 + 4096]
        assert await raw.response() == frames.Response(wr_id, Status.SUCCESS, None)


async def test_a_read_that_is_revoked_in_the_middle_shows_no_more(
    fabric: TcpFabric, admitted: tuple[Raw, bytes], memories: Callable[..., FileMemory]
) -> None:
    raw, link_id = admitted
    memory = memories(48 * MIB)
    memory.view()[:] = b"s" * memory.length
    key = await fabric.grant(link_id, memory, 0, memory.length, Rights.READ, 10.0)
    raw.request(Opcode.READ, 1, key, Ranges.single(0, 0, memory.length))
    assert await raw.response() == frames.Response(1, Status.SUCCESS, memory.length)
    assert await raw.reader.readexactly(1) == b"s"
    await fabric.revoke(key)
    rest = await raw.reader.readexactly(memory.length - 1)
    shown = rest.count(b"s")
    assert rest == b"s" * shown + bytes(len(rest) - shown)
    assert shown < len(rest)
    assert await raw.response() == frames.Response(1, Status.REM_ACCESS_ERR, None)
