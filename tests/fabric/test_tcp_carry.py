"""What tcp links carry for the daemons at their ends: it comes as it was sent, or the rail breaks."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from functools import partial

import pytest

from peermem.core.errors import MalformedMessage
from peermem.core.types import FabricKind, LinkAttributes, Ranges, Rights
from peermem.fabric import frames, tcp_proof
from peermem.fabric.base import CARRIED, LinkEnd, Opcode, Status, WorkRequest
from peermem.fabric.tcp import TcpFabric
from peermem.fabric.tcp_proof import MAC_SIZE, Proofs, Seal
from tests.fabric.carrying import MARK, NONSENSE, Daemon
from tests.fabric.support import MIB, Connection, FileMemory, Recorder, eventually, turns
from tests.fabric.test_tcp_initiator import KEY, SECRET, impostor, leading_to
from tests.fabric.test_tcp_target import Raw


@pytest.fixture
def daemon() -> Daemon:
    return Daemon()


@pytest.fixture
async def fabric(daemon: Daemon, lost: list[bytes]) -> AsyncIterator[TcpFabric]:
    fabric = TcpFabric("127.0.0.1:0", on_link_lost=lost.append, on_met=daemon.met)
    await fabric.start()
    yield fabric
    await fabric.close()


async def joined(fabric: TcpFabric) -> Raw:
    raw = await Raw.open(fabric)
    await raw.join(fabric.accept(LinkAttributes(FabricKind.TCP, 1)))
    return raw


def told(messages: list[bytes]) -> list[bytes]:
    return [message + MARK for message in messages]


async def test_messages_cross_beside_bytes(fabric: TcpFabric, memories: Callable[..., FileMemory]) -> None:
    connection = await Connection(fabric, fabric).open(3)
    local, remote, fixed, back = (memories(16 * MIB, seed) for seed in (1, None, 2, None))
    key = await connection.grant(remote)
    posted = await connection.post_all(Opcode.WRITE, local, key)
    messages = [bytes([number]) * size for number, size in enumerate((1, 200, 5000, CARRIED - len(MARK)))]
    assert all(map(connection.link.carry, messages))
    posted += await connection.post_all(Opcode.READ, back, await connection.grant(fixed))
    assert set(await connection.events.wait(posted)) == {Status.SUCCESS}
    await eventually(lambda: len(connection.events.messages) == len(messages))
    assert sorted(connection.events.messages) == sorted(told(messages))
    assert (remote.bytes(), back.bytes()) == (local.bytes(), fixed.bytes())
    assert connection.events.faults == []
    await connection.close()


async def test_messages_of_a_rail_keep_their_order(fabric: TcpFabric, daemon: Daemon) -> None:
    connection = await Connection(fabric, fabric).open()
    messages = [b"%d" % number for number in range(2000)]
    assert all(map(connection.link.carry, messages))
    await eventually(lambda: len(connection.events.messages) == len(messages))
    assert connection.events.messages == told(messages)
    assert daemon.heard == messages
    (asker,) = daemon.askers
    assert asker.link_id == connection.link_id
    assert asker.remote.startswith("ipv4:127.0.0.1:")
    await connection.close()


async def test_what_is_too_large_or_too_late_is_not_carried(fabric: TcpFabric, daemon: Daemon) -> None:
    connection = await Connection(fabric, fabric).open()
    assert not connection.link.carry(bytes(CARRIED + 1))
    assert connection.link.carry(b"asked")
    await eventually(lambda: connection.events.messages != [])
    await connection.close()
    assert not connection.link.carry(b"asked")
    daemon.askers[0].answer(b"nobody hears it")
    assert daemon.heard == [b"asked"]


async def test_a_rail_that_is_held_takes_nothing_and_goes_on(fabric: TcpFabric, daemon: Daemon) -> None:
    connection = await Connection(fabric, fabric).open()
    assert connection.link.carry(b"1")
    await eventually(lambda: connection.events.messages != [])
    daemon.askers[0].hold(on=True)
    assert connection.link.carry(b"2")
    await turns()
    assert daemon.heard == [b"1"]
    daemon.askers[0].hold(on=False)
    await eventually(lambda: len(connection.events.messages) == 2)
    await connection.close()


async def test_who_reads_no_answers_is_asked_no_more_until_it_does(fabric: TcpFabric, daemon: Daemon) -> None:
    raw = await joined(fabric)
    message, count = b"x" * (32 << 10), 2000
    for _ in range(count):
        raw.writer.write(raw.question(message))
    await turns(400)  # of which 40 are enough for all
    assert 0 < len(daemon.heard) < count / 2, "more than two kernels' buffers and some MiB"
    answers = raw.proofs.answers()
    for _ in range(count):
        head = await raw.reader.readexactly(frames.RESPONSE_SIZE)
        mac = await raw.reader.readexactly(MAC_SIZE)
        answers.check(mac, head, await raw.reader.readexactly(len(message) + len(MARK)))
    assert len(daemon.heard) == count
    await raw.close()


# Who is on the way


def changed(at: int) -> Callable[[bytes, bytes, Raw, Raw], bytes]:
    def change(first: bytes, second: bytes, raw: Raw, other: Raw) -> bytes:
        return first[:at] + bytes([first[at] ^ 1]) + first[at + 1 :]

    return change


FORGERIES: dict[str, Callable[[bytes, bytes, Raw, Raw], bytes]] = {
    "made up": lambda first, second, raw, other: frames.question_head(4) + bytes(MAC_SIZE) + b"made",
    "changed": changed(frames.HEAD_SIZE),
    "changed at its end": changed(-1),
    "another mac": changed(frames.HEAD_SIZE - 1),
    "another head": changed(16),
    "repeated": lambda first, second, raw, other: first + first,
    "out of turn": lambda first, second, raw, other: second + first,
    "left out": lambda first, second, raw, other: second,
    "of another connection": lambda first, second, raw, other: other.question(b"first"),
    "as if it were an answer": lambda first, second, raw, other: (
        (head := frames.question_head(5)) + raw.proofs.answers().mac(head, b"first") + b"first"
    ),
}


@pytest.mark.parametrize("kind", FORGERIES)
async def test_a_forged_question_breaks_the_rail(
    fabric: TcpFabric, daemon: Daemon, lost: list[bytes], kind: str
) -> None:
    raw, other = await joined(fabric), await joined(fabric)
    first, second = raw.question(b"first"), raw.question(b"second")
    raw.writer.write(FORGERIES[kind](first, second, raw, other))
    await raw.ended()
    await eventually(lambda: len(lost) == 1)
    assert daemon.heard == ([b"first"] if kind == "repeated" else [])
    assert fabric.rejected_count == 1
    await raw.close()
    await other.close()


async def test_what_makes_no_sense_or_has_nobody_to_hear_it_breaks_the_rail(
    fabric: TcpFabric, daemon: Daemon, lost: list[bytes]
) -> None:
    raw = await joined(fabric)
    raw.writer.write(raw.question(NONSENSE))
    await raw.ended()
    await eventually(lambda: len(lost) == 1)
    await raw.close()
    deaf = TcpFabric("127.0.0.1:0")
    await deaf.start()
    raw = await joined(deaf)
    raw.writer.write(raw.question(b"hello?"))
    await raw.ended()
    assert deaf.accepted_count == 0
    await raw.close()
    await deaf.close()


ANSWERS: dict[str, Callable[[Proofs, bytes], bytes]] = {
    "made up": lambda proofs, question: frames.answer_head(4) + bytes(MAC_SIZE) + b"made",
    "changed": lambda proofs, question: sealed(proofs.answers(), b"answer")[:-1] + b"!",
    "repeated": lambda proofs, question: sealed(proofs.answers(), b"answer") * 2,
    "out of turn": lambda proofs, question: second_of(proofs.answers()),
    "the question": lambda proofs, question: (
        (head := frames.answer_head(8)) + proofs.questions().mac(head, question) + question
    ),
    "the question's frame": lambda proofs, question: (
        (head := frames.question_head(8)) + proofs.questions().mac(head, question) + question
    ),
    "of another connection": lambda proofs, question: sealed(
        Proofs(SECRET, b"i" * 16, tcp_proof.fresh_nonce(), tcp_proof.fresh_nonce()).answers(), b"answer"
    ),
    "of who knows another secret": lambda proofs, question: sealed(
        Proofs(b"x" * 32, b"i" * 16, tcp_proof.fresh_nonce(), tcp_proof.fresh_nonce()).answers(), b"answer"
    ),
    "too large": lambda proofs, question: frames.answer_head(1)[:4] + (CARRIED + 1).to_bytes(4, "little") + bytes(8),
}


def sealed(seal: Seal, message: bytes) -> bytes:
    head = frames.answer_head(len(message))
    return head + seal.mac(head, message) + message


def second_of(seal: Seal) -> bytes:
    sealed(seal, b"first")
    return sealed(seal, b"second")


@pytest.mark.parametrize("kind", ANSWERS)
async def test_a_forged_answer_breaks_the_rail(kind: str) -> None:
    """What is on the way sees everything, and here even knows the keys, so that each rule is tried alone."""
    seen: list[Proofs] = []

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readexactly(frames.HEAD_SIZE)
        writer.write(ANSWERS[kind](seen[0], await reader.readexactly(8)))
        writer.transport.pause_reading()  # type: ignore[attr-defined]
        await asyncio.Event().wait()

    fabric, events, memory = TcpFabric("127.0.0.1:0"), Recorder(), FileMemory(4096)
    async with impostor(answer, shown=seen.append) as address:
        link = await fabric.connect(leading_to(address), events)
        assert link.carry(b"question")
        link.post(WorkRequest(1, Opcode.READ, memory, KEY, Ranges.single(0, 0, 4096)))
        assert await events.wait([1]) == [Status.WR_FLUSH_ERR]
        await eventually(lambda: events.ends == [LinkEnd.BROKEN])
        assert events.messages == ([b"answer"] if kind == "repeated" else [])
        assert events.faults == []
        assert not link.carry(b"question")
    memory.close()
    await fabric.close()
    await turns()  # the impostor leaves


async def test_what_was_seen_of_one_connection_opens_no_other(fabric: TcpFabric) -> None:
    """A hello is good for one greeting: who saw one can't join the link with it."""
    answer = fabric.accept(LinkAttributes(FabricKind.TCP, 2))
    first = await Raw.open(fabric)
    hello = first.hello(answer.link_id, answer.secret)
    first.writer.write(hello)
    tcp_proof.check_welcome(await first.reader.readexactly(tcp_proof.WELCOME_SIZE), first.proofs)
    second = await Raw.open(fabric)
    second.writer.write(hello)
    assert await second.ended() == b""
    assert fabric.rejected_count == 1
    assert answer.secret not in hello
    await first.close()
    await second.close()


@pytest.mark.parametrize("make", [partial(Proofs, b"x" * 32), partial(Proofs, SECRET)])
def test_what_welcomes_has_to_know_the_secret(make: Callable[..., Proofs]) -> None:
    mine = Proofs(SECRET, b"i" * 16, b"g" * 32, b"h" * 32)
    theirs = make(b"i" * 16, b"g" * 32, b"H" * 32)
    for welcome in (theirs.welcome, mine.hello):
        with pytest.raises(MalformedMessage):
            tcp_proof.check_welcome(tcp_proof.encode_welcome(welcome), mine)
    tcp_proof.check_welcome(tcp_proof.encode_welcome(mine.welcome), mine)


async def test_a_reader_of_grants_is_not_held_up_by_a_link_that_asks(fabric: TcpFabric, daemon: Daemon) -> None:
    """A rail that is held holds up no other link."""
    raw = await joined(fabric)
    raw.writer.write(raw.question(b"1"))
    await eventually(lambda: daemon.heard == [b"1"])
    daemon.askers[0].hold(on=True)
    connection = await Connection(fabric, fabric).open()
    memory, remote = FileMemory(MIB, 1), FileMemory(MIB)
    key = await connection.grant(remote, rights=Rights.WRITE)
    assert await connection.run(Opcode.WRITE, memory, key, Ranges.single(0, 0, MIB)) is Status.SUCCESS
    await connection.close()
    await raw.close()
    memory.close()
    remote.close()
