"""The job's side of the attach socket against daemons that misbehave; a good one is in tests/api/test_attach.py."""

from __future__ import annotations

import asyncio
import mmap
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

import peermem
from peermem.client.attach import Attachment
from peermem.core.errors import (
    AccessDenied,
    Internal,
    MalformedMessage,
    NodeUnreachable,
    NotMappable,
    PeermemError,
    Timeout,
)
from peermem.v1 import attach_pb2, error_pb2
from tests.descriptors import memory_file, open_files

PAGE = mmap.PAGESIZE
REGION = "nodes/a/regions/r"
Answer = tuple[bytes, Sequence[int]]
"""Bytes and descriptors of one packet."""


def packet(**outcome: object) -> bytes:
    return attach_pb2.AttachResponse(**outcome).SerializeToString()  # type: ignore[arg-type]


WELCOME = packet(session=attach_pb2.AttachSession(token="token", node="nodes/a"))

UNKNOWN = b"\x7a\x00"
"""A field that this version does not know."""


def mapped(offset: int, length: int) -> bytes:
    return packet(mapped=attach_pb2.AttachMapped(offset=offset, length=length))


@pytest.fixture(autouse=True)
def nothing_stays_open() -> Iterator[None]:
    before = open_files()
    yield
    assert open_files() <= before  # fewer, when gRPC lets go of an earlier test's


@pytest.fixture
def fd() -> Iterator[int]:
    fd = memory_file(2 * PAGE)
    yield fd
    os.close(fd)


@contextmanager
def daemon(folder: Path, *answers: Answer) -> Iterator[str]:
    """Serve one connection that answers each request by the next of these, then hangs up; give its path."""
    path = str(folder / "attach.sock")
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(path)
        listener.listen()
        server = threading.Thread(target=serve, args=(listener, answers))
        server.start()
        yield path
        server.join(10)
        assert not server.is_alive()


def serve(listener: socket.socket, answers: Sequence[Answer]) -> None:
    connection, _ = listener.accept()
    with connection:
        for data, fds in answers:
            if not connection.recv(4096):
                return
            socket.send_fds(connection, [data], list(fds))


@pytest.mark.parametrize(
    "answer",
    [b"\xff", UNKNOWN, mapped(0, 1), UNKNOWN + b"\x7a\xff\xff\x03" + bytes((1 << 16) - 1)],
    ids=["garbage", "of the future", "another's", "too long"],
)
def test_an_answer_to_hello_that_is_none(tmp_path: Path, answer: bytes) -> None:
    with daemon(tmp_path, (answer, [])) as path, pytest.raises(MalformedMessage, match="no daemon of this version"):
        Attachment.open(path)


def test_an_error_in_answer_to_hello(tmp_path: Path) -> None:
    error = error_pb2.Error(code=13, reason="OF_THE_FUTURE", message="Full.", metadata={"limit": "1"})
    with daemon(tmp_path, (packet(error=error), [])) as path, pytest.raises(Internal, match="Full") as caught:
        Attachment.open(path)
    assert caught.value.metadata == {"limit": "1"}


def test_a_daemon_that_hangs_up(tmp_path: Path) -> None:
    with daemon(tmp_path) as path, pytest.raises(NodeUnreachable):
        Attachment.open(path)


def test_no_daemon(tmp_path: Path) -> None:
    with pytest.raises(NodeUnreachable, match="No such file"):
        Attachment.open(str(tmp_path / "attach.sock"))
    with pytest.raises(NodeUnreachable, match="too long"):
        Attachment.open(str(tmp_path / ("x" * 200)))


def test_a_socket_of_others(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        path = tmp_path / "attach.sock"
        listener.bind(str(path))
        listener.listen()
        path.chmod(0)
        if os.access(path, os.W_OK):
            pytest.skip("this user may open every socket")
        with pytest.raises(AccessDenied, match="may not open"):
            Attachment.open(str(path))


def test_a_silent_daemon_costs_the_session(tmp_path: Path) -> None:
    path = str(tmp_path / "attach.sock")
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(path)
        listener.listen()
        with pytest.raises(Timeout, match="in time"):
            Attachment.open(path, timeout=0.01)
        accepting = threading.Thread(target=lambda: greet_only(listener))
        accepting.start()
        with closing(Attachment.open(path, timeout=0.05)) as attachment:
            with pytest.raises(Timeout):
                attachment.map(REGION)
            with pytest.raises(NodeUnreachable):  # a late answer would be taken for this request's
                attachment.map(REGION)
        accepting.join(10)


def connect_aio(target: str, timeout: float) -> None:
    async def connect() -> None:
        async with await peermem.aio.connect(target, timeout=timeout):
            raise AssertionError("nobody answers")

    asyncio.run(connect())


@pytest.mark.parametrize("connect", [peermem.connect, connect_aio])
def test_a_silent_daemon_has_the_time_that_each_call_has(tmp_path: Path, connect: Callable[..., object]) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(str(tmp_path / "attach.sock"))
        listener.listen()
        began = time.monotonic()
        with pytest.raises(Timeout, match=r"attach\.sock in time"):
            connect(f"unix://{tmp_path}/peermem.sock", timeout=0.05)
        assert time.monotonic() - began < 5


def greet_only(listener: socket.socket) -> None:
    """Let the first connection, which was given up, go; answer the hello of the next, and wait for its end."""
    listener.accept()[0].close()
    connection, _ = listener.accept()
    with connection:
        connection.recv(4096)
        connection.send(WELCOME)
        while connection.recv(4096):
            pass


@pytest.mark.parametrize(
    ("answer", "count", "fault", "goes_on"),
    [
        (mapped(0, PAGE), 0, MalformedMessage, False),
        (mapped(0, PAGE), 2, MalformedMessage, False),
        (b"\xff", 1, MalformedMessage, False),
        (WELCOME, 1, MalformedMessage, False),
        (UNKNOWN, 0, MalformedMessage, False),
        (b"", 0, NodeUnreachable, False),
        (packet(error=error_pb2.Error(reason="NOT_MAPPABLE", message="No.")), 1, NotMappable, True),
        (mapped(0, 0), 1, NotMappable, True),
        (mapped(0, 2 * PAGE + 1), 1, NotMappable, True),
        (mapped(PAGE, PAGE + 1), 1, NotMappable, True),
        (mapped(1, PAGE), 1, NotMappable, True),
        (mapped((1 << 64) - PAGE, PAGE), 1, NotMappable, True),
        (mapped(0, (1 << 64) - 1), 1, NotMappable, True),
    ],
)
def test_an_answer_to_map_that_can_not_be_used(
    tmp_path: Path, fd: int, answer: bytes, count: int, fault: type[PeermemError], goes_on: bool
) -> None:
    last = [(mapped(PAGE, PAGE), [fd])] if goes_on else []
    script = [(WELCOME, []), (answer, [fd] * count), *last]
    with daemon(tmp_path, *script) as path, closing(Attachment.open(path)) as attachment:
        with pytest.raises(fault):
            attachment.map(REGION)
        if goes_on:
            mapping = attachment.map(REGION)
            assert len(mapping) == PAGE
            mapping.close()
        else:
            with pytest.raises(NodeUnreachable):
                attachment.map(REGION)


def test_closing_ends_a_request_of_another_thread(tmp_path: Path) -> None:
    path = str(tmp_path / "attach.sock")
    asked = threading.Event()

    def serve() -> None:
        connection, _ = listener.accept()
        with connection:
            connection.recv(4096)
            connection.send(WELCOME)
            connection.recv(4096)
            asked.set()
            connection.recv(4096)

    faults: list[BaseException] = []
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(path)
        listener.listen()
        serving = run(serve)
        attachment = Attachment.open(path)
        asking = run(lambda: faults.append(fault_of(lambda: attachment.map(REGION))))
        assert asked.wait(10)
        attachment.close()
        for thread in (asking, serving):
            thread.join(10)
            assert not thread.is_alive()
    assert [type(fault) for fault in faults] == [NodeUnreachable]
    with pytest.raises(NodeUnreachable, match="closed"):
        attachment.hand_in(0)


def run(work: Callable[[], object]) -> threading.Thread:
    thread = threading.Thread(target=work)
    thread.start()
    return thread


def fault_of(call: Callable[[], object]) -> BaseException:
    try:
        call()
    except PeermemError as error:
        return error
    raise AssertionError("the call did not fail")
