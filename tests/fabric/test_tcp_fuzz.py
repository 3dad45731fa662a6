"""Hostile bytes against a live port, and against a link; each time something honest has to go on."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from peermem.core.types import FabricKind, LinkAttributes, Ranges, Rights
from peermem.fabric import frames
from peermem.fabric.base import Opcode, Status, WorkRequest
from peermem.fabric.tcp import TcpFabric
from tests.fabric.carrying import Daemon
from tests.fabric.support import MIB, Connection, FileMemory, Recorder, eventually
from tests.fabric.test_tcp_initiator import KEY, impostor, leading_to
from tests.fabric.test_tcp_target import Raw
from tests.fuzzing import fuzz, tried

GUARDED = 4096
"""Bytes at both ends of the memory that no grant opens."""
lengths = st.lists(st.integers(0, 5000), min_size=1, max_size=5)
mutations = st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), max_size=6)


class Siege:
    """A fabric with an honest link, and a memory of which the middle is open to attackers."""

    async def set_up(self) -> None:
        self.daemon = Daemon()
        self.fabric = TcpFabric("127.0.0.1:0", handshake_timeout=0.5, on_met=self.daemon.met)
        await self.fabric.start()
        self.honest = await Connection(self.fabric, self.fabric).open()
        self.memory = FileMemory(MIB, 7)
        self.secret = self.memory.bytes()

    async def tear_down(self) -> None:
        await self.fabric.close()
        self.memory.close()

    async def garbage(self, data: bytes) -> None:
        """Send bytes instead of a hello."""
        raw = await Raw.open(self.fabric)
        await _say(raw, data)

    async def forged(self, opcode: Opcode, sizes: list[int], changes: list[tuple[int, int]]) -> bytes:
        """Send good frames of which some bytes are changed, and return what comes back."""
        answer = self.fabric.accept(LinkAttributes(FabricKind.TCP, 1))
        key = await self.fabric.grant(
            answer.link_id, self.memory, GUARDED, MIB - 2 * GUARDED, Rights.READ | Rights.WRITE, 100.0
        )
        offsets = [100 * index for index in range(len(sizes))]
        head = frames.RequestHead(opcode, len(sizes), 1, key.rkey, sum(sizes))
        frame = frames.encode_request(head, offsets, sizes)
        if opcode is Opcode.WRITE:
            frame += b"w" * sum(sizes)
        stream = bytearray(frame * 3)
        for position, value in changes:
            stream[position % len(stream)] = value
        raw = await Raw.open(self.fabric)
        await raw.join(answer)
        received = await _say(raw, bytes(stream))
        await self.fabric.hang_up(answer.link_id)
        return received

    async def tampered(self, messages: list[bytes], changes: list[tuple[int, int]]) -> list[bytes]:
        """Send messages for the daemon with some bytes changed, and return what it hears."""
        answer = self.fabric.accept(LinkAttributes(FabricKind.TCP, 1))
        raw = await Raw.open(self.fabric)
        await raw.join(answer)
        stream = bytearray(b"".join(map(raw.question, messages)))
        for position in {position % len(stream) for position, _ in changes}:
            stream[position] ^= changes[0][1]
        self.daemon.heard.clear()
        await _say(raw, bytes(stream))
        await self.fabric.hang_up(answer.link_id)
        return self.daemon.heard

    async def check(self) -> None:
        """The honest link works, and nothing was written where nobody was let in."""
        seen = self.memory.bytes()
        assert seen[:GUARDED] == self.secret[:GUARDED]
        assert seen[-GUARDED:] == self.secret[-GUARDED:]
        local, remote = FileMemory(8192, 1), FileMemory(8192)
        key = await self.honest.grant(remote)
        assert await self.honest.run(Opcode.WRITE, local, key, Ranges.single(0, 0, 8192)) is Status.SUCCESS
        assert local.bytes() == remote.bytes()
        await self.fabric.revoke(key)
        local.close()
        remote.close()
        assert self.fabric.accepted_count == 1


async def _say(raw: Raw, data: bytes) -> bytes:
    with contextlib.suppress(ConnectionError):
        raw.writer.write(data)
        raw.writer.write_eof()
    received = await raw.ended()
    await raw.close()
    return received


@pytest.fixture
def runner() -> Iterator[asyncio.Runner]:
    with asyncio.Runner() as runner:
        yield runner


@pytest.fixture
def siege(runner: asyncio.Runner) -> Iterator[Siege]:
    siege = Siege()
    runner.run(siege.set_up())
    yield siege
    runner.run(siege.tear_down())


@fuzz(80)
@given(data=st.one_of(st.binary(max_size=300), st.binary(max_size=60).map(lambda tail: b"PMHI\x02" + tail)))
def test_garbage_instead_of_a_hello(runner: asyncio.Runner, siege: Siege, data: bytes) -> None:
    tried("tcp hello")
    runner.run(siege.garbage(data))
    runner.run(siege.check())


@fuzz(80)
@given(opcode=st.sampled_from(Opcode), sizes=lengths, changes=mutations)
def test_changed_frames(
    runner: asyncio.Runner, siege: Siege, opcode: Opcode, sizes: list[int], changes: list[tuple[int, int]]
) -> None:
    tried("tcp requests")
    received = runner.run(siege.forged(opcode, sizes, changes))
    assert siege.secret[:64] not in received
    assert siege.secret[-64:] not in received
    runner.run(siege.check())


@fuzz(80)
@given(
    opcode=st.sampled_from(Opcode),
    answer=st.one_of(
        st.binary(max_size=200),
        st.builds(frames.encode_data, st.just(1), st.integers(0, 8192)),
        st.builds(frames.encode_ack, st.integers(0, 2), st.sampled_from([Status.SUCCESS, Status.REM_ACCESS_ERR])),
    ),
    tail=st.binary(max_size=5000),
)
def test_any_answer_ends_each_request_once(runner: asyncio.Runner, opcode: Opcode, answer: bytes, tail: bytes) -> None:
    tried("tcp responses")
    runner.run(_answered(opcode, answer + tail))


async def _answered(opcode: Opcode, answer: bytes) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readexactly(frames.HEAD_SIZE)
        writer.write(answer)
        writer.write_eof()
        await reader.read()

    fabric, events, memory = TcpFabric("127.0.0.1:0"), Recorder(), FileMemory(3 * 4096, 5)
    before = memory.bytes()
    async with impostor(serve) as address:
        link = await fabric.connect(leading_to(address), events)
        for wr_id in (1, 2):
            link.post(WorkRequest(wr_id, opcode, memory, KEY, Ranges.single(4096, 0, 4096)))
        await events.wait([1, 2])
        await eventually(lambda: len(events.ends) == 1)
    assert events.faults == []
    after = memory.bytes()
    memory.close()
    assert (after[:4096], after[-4096:]) == (before[:4096], before[-4096:])
    await fabric.close()


@fuzz(80)
@given(
    messages=st.lists(st.binary(min_size=1, max_size=200), min_size=1, max_size=4),
    changes=st.lists(st.tuples(st.integers(0, 10_000), st.integers(1, 255)), min_size=1, max_size=4),
)
def test_changed_messages(
    runner: asyncio.Runner, siege: Siege, messages: list[bytes], changes: list[tuple[int, int]]
) -> None:
    tried("tcp messages")
    assert messages[: len(heard := runner.run(siege.tampered(messages, changes)))] == heard
    assert len(heard) < len(messages)
    runner.run(siege.check())
