"""A node behind a real attach socket, and a job that writes its packets by hand."""

from __future__ import annotations

import array
import asyncio
import mmap
import os
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

from peermem.api.attach import AttachServer
from peermem.api.identity import Trust
from peermem.broker.sessions import Session, SessionTable
from peermem.client.attach import Attachment
from peermem.core.errors import RegionNotFound
from peermem.core.identity import Subject
from peermem.core.names import ChildName
from peermem.device.base import DeviceMemory
from peermem.device.memfd import MemfdDevice
from peermem.v1 import attach_pb2
from tests.descriptors import open_files, until

LENGTH = 3 * mmap.PAGESIZE + 1
REGION = "nodes/a/regions/r"
ME = Subject(f"uid:{os.getuid()}", tuple(f"gid:{gid}" for gid in dict.fromkeys((os.getgid(), *sorted(os.getgroups())))))


class Node:
    """What stands behind the socket: one region of a real device, and a table of sessions."""

    def __init__(self, path: Path, memory: DeviceMemory, max_sessions: int = 8) -> None:
        self.path = str(path)
        self.memory = memory
        self.sessions = SessionTable(max_sessions)
        self.ended: list[Session] = []
        self.sessions.on_close(self.ended.append)
        self.asked: list[tuple[str, Subject]] = []
        self.fault: Exception | None = None
        self.token_subject: Callable[[str], Awaitable[Subject]] = Trust().token_subject

    def map_region(self, name: ChildName, subject: Subject) -> DeviceMemory:
        self.asked.append((str(name), subject))
        if self.fault is not None:
            raise self.fault
        if name.id != "r":
            raise RegionNotFound(f"{name} does not exist on nodes/a.", region=name)
        return self.memory

    def server(self, hello_timeout: float = 5.0) -> AttachServer:
        return AttachServer(
            self.path, self.sessions, self.map_region, self.token_subject, "a", hello_timeout=hello_timeout
        )

    async def attach(self, token: str = "") -> Attachment:
        return await asyncio.to_thread(Attachment.open, self.path, token=token)

    async def quiet(self) -> None:
        """Wait until all sessions have ended."""
        await until(lambda: len(self.sessions) == 0)


@asynccontextmanager
async def serving(server: AttachServer) -> AsyncIterator[None]:
    server.listen()
    server.serve()
    try:
        yield
    finally:
        await server.close()


@asynccontextmanager
async def quiet_node(folder: Path) -> AsyncIterator[Node]:
    """Give a node; at the end no descriptor may be left over."""
    before = open_files()
    memory = await MemfdDevice("bar0", 1 << 20).allocate(LENGTH)
    yield Node(folder / "attach.sock", memory)
    memory.close()
    await until(lambda: open_files() <= before)  # fewer where another test's connection has closed meanwhile


class Raw:
    """A job that writes its packets by hand."""

    def __init__(self, path: str) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.sock.settimeout(10)
        self.sock.connect(path)

    def __enter__(self) -> Raw:
        return self

    def __exit__(self, *_: object) -> None:
        self.sock.close()

    def send(self, data: bytes, fds: Sequence[int] = ()) -> None:
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        self.sock.sendmsg([data], rights)

    def sends(self, data: bytes) -> bool:
        """Send without waiting for room; return whether the connection still stands."""
        try:
            self.sock.send(data, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return True
        except (BrokenPipeError, ConnectionResetError):
            return False
        return True

    async def answer(self) -> attach_pb2.AttachResponse | None:
        """Return the next answer, None when the daemon has ended the connection."""
        data = await asyncio.to_thread(self.sock.recv, 65536)
        return attach_pb2.AttachResponse.FromString(data) if data else None

    async def ask(self, data: bytes, fds: Sequence[int] = ()) -> attach_pb2.AttachResponse | None:
        self.send(data, fds)
        return await self.answer()

    async def is_refused(self, data: bytes, fds: Sequence[int] = ()) -> None:
        """Assert that a packet is answered as malformed and ends the connection."""
        answer = await self.ask(data, fds)
        assert answer is not None
        assert (answer.error.reason, answer.error.code) == ("MALFORMED_MESSAGE", 3)
        assert await self.answer() is None


HELLO = attach_pb2.AttachRequest(hello=attach_pb2.AttachHello()).SerializeToString()
MAP = attach_pb2.AttachRequest(map=attach_pb2.AttachMap(region=REGION)).SerializeToString()
HAND_IN = attach_pb2.AttachRequest(hand_in=attach_pb2.AttachHandIn()).SerializeToString()
