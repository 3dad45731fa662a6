from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator

import pytest

from peermem.broker.sessions import MAX_HANDED_IN, MAX_HANDED_IN_ALL, SessionTable, close_apart
from peermem.core.errors import LimitReached, NotAdoptable, SessionNotFound
from peermem.core.identity import Subject
from tests.descriptors import lingering_socket, memory_file, open_files, until


@pytest.fixture
def fd() -> Iterator[int]:
    fd = memory_file(1)
    yield fd
    os.close(fd)


async def test_a_session_is_found_by_its_token_until_it_is_closed() -> None:
    table = SessionTable(8)
    session, other = table.open(Subject("uid:1"), 10), table.open(Subject("uid:1"), 10)
    assert session.token != other.token
    assert len(session.token) >= 32
    assert table.find(session.token) is session
    assert len(table) == 2
    table.close(session)
    assert (session.closed, other.closed, len(table)) == (True, False, 1)
    with pytest.raises(SessionNotFound):
        table.find(session.token)


def test_a_token_is_shown_nowhere() -> None:
    table = SessionTable(1)
    session = table.open(Subject("uid:1"), 10)
    shown = "Session(subject=Subject(name='uid:1', groups=(), node=''), pid=10, origin=Origin(slurm_job='', pod=''), "
    assert repr(session) == f"{shown}closed=False)"
    with pytest.raises(SessionNotFound) as caught:
        table.find(session.token + "x")
    assert session.token not in f"{caught.value} {caught.value.metadata}"


async def test_one_session_too_many_is_refused_until_another_ends() -> None:
    table = SessionTable(1)
    session = table.open(Subject("uid:1"), 10)
    with pytest.raises(LimitReached, match=r"attach\.max_sessions"):
        table.open(Subject("uid:2"), 11)
    table.close(session)
    table.open(Subject("uid:2"), 11)


async def test_who_waits_for_the_end_is_called_once() -> None:
    table = SessionTable(2)
    ended: list[object] = []
    table.on_close(ended.append)
    table.on_close(ended.append)
    session = table.open(Subject("uid:1"), 10)
    table.close(session)
    table.close(session)
    assert ended == [session, session]


def test_a_descriptor_is_taken_once_and_only_by_its_session(fd: int) -> None:
    table = SessionTable(2)
    session, other = table.open(Subject("uid:1"), 10), table.open(Subject("uid:1"), 10)
    token = table.hand_in(session, fd)
    for who, what in ((other, token), (session, "unknown"), (session, session.token)):
        with pytest.raises(SessionNotFound):
            table.take(who, what)
    assert table.take(session, token) == fd
    with pytest.raises(SessionNotFound):
        table.take(session, token)


async def test_what_was_not_adopted_is_closed_with_its_session() -> None:
    table = SessionTable(2)
    session, other = table.open(Subject("uid:1"), 10), table.open(Subject("uid:1"), 10)
    before = open_files()
    tokens = [table.hand_in(session, memory_file(1)) for _ in range(3)]
    kept = table.hand_in(other, memory_file(1))
    taken = table.take(session, tokens[1])
    table.close(session)
    await until(lambda: open_files() == before + 2)
    with pytest.raises(SessionNotFound):
        table.take(session, tokens[0])
    os.close(taken)
    os.close(table.take(other, kept))


def test_only_so_many_descriptors_wait_in_one_session(fd: int) -> None:
    table = SessionTable(2)
    session, other = table.open(Subject("uid:1"), 10), table.open(Subject("uid:1"), 10)
    tokens = [table.hand_in(session, fd) for _ in range(MAX_HANDED_IN)]
    with pytest.raises(LimitReached, match=f"{MAX_HANDED_IN} file descriptors of this session"):
        table.hand_in(session, fd)
    os.fstat(fd)  # it stayed the caller's
    table.hand_in(other, fd)
    table.take(session, tokens[0])
    table.hand_in(session, fd)


def test_only_so_many_descriptors_wait_in_all(fd: int) -> None:
    table = SessionTable(1000)
    for _ in range(MAX_HANDED_IN_ALL // MAX_HANDED_IN):
        session = table.open(Subject("uid:1"), 10)
        for _ in range(MAX_HANDED_IN):
            table.hand_in(session, fd)
    with pytest.raises(LimitReached, match="of all jobs"):
        table.hand_in(table.open(Subject("uid:1"), 10), fd)


def test_only_memory_files_are_taken_in() -> None:
    table = SessionTable(1)
    session = table.open(Subject("uid:1"), 10)
    reader, writer = os.pipe()
    with pytest.raises(NotAdoptable, match="memfd_create"):
        table.hand_in(session, writer)
    os.close(reader)
    os.close(writer)


async def test_a_descriptor_whose_closing_hangs_holds_nobody_up() -> None:
    lingering, end = lingering_socket()
    quick = memory_file(1)
    before = open_files()
    hanging = close_apart([lingering])
    await close_apart([quick])
    assert not hanging.done()
    end.close()
    async with asyncio.timeout(10):
        await hanging
    assert open_files() == before - 3


async def test_closing_nothing_is_done_at_once() -> None:
    assert close_apart([]).done()
