"""The attach socket: local jobs prove who they are, and file descriptors go in and out.

Rules of this file:

* Jobs can connect before the daemon answers (`listen`, `serve`), so that none is turned away while it starts.
* SOCK_SEQPACKET, one protobuf message a packet, answered in order (protos/peermem/v1/attach.proto).
* Who connects is what the kernel says (`job_process`), or the service account whose token it shows as it begins. The
  session ends with the connection, and with the process, also where a child of it keeps the connection.
* Every descriptor that is received is either handed to the session or closed here, whatever happened.
* A malformed packet ends the connection after an answer that says so; any other fault is only answered.
* A job that does not read its answers is dropped: nothing is queued for it.
* Closing a job's descriptor, or a connection with unread ones in it, can hang. It is done apart, and its
  connection waits for it and keeps its place meanwhile: whoever sends such things hurts nobody else.
"""

from __future__ import annotations

import array
import asyncio
import os
import socket
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import structlog
from google.protobuf.message import DecodeError

from peermem.api.job_process import JobProcess, read_job_process
from peermem.api.sockets import free_socket_path
from peermem.broker.sessions import Session, SessionTable, close_apart
from peermem.core.errors import Internal, MalformedMessage, PeermemError, SessionNotFound
from peermem.core.identity import Subject
from peermem.core.names import ChildName, parse_region
from peermem.device.base import DeviceMemory
from peermem.memory import dma_buf_exporter
from peermem.telemetry import audit
from peermem.v1 import attach_pb2
from peermem.wire import error_to_proto

log = structlog.get_logger(__name__)

MapRegion = Callable[[ChildName, Subject], DeviceMemory]
TokenSubject = Callable[[str], Awaitable[Subject]]

MAX_PACKET = 16384
"""Bytes of one request."""
_MAX_FDS = 253
"""SCM_MAX_FD of the kernel: all that a packet may hold are received, or the kernel would close the surplus here."""
_SEND_BUFFER = 16384
"""Bytes, doubled by the kernel: room for some tens of answers, each of which may hold a descriptor."""
_ACCEPT_PAUSE = 1.0
"""Seconds without accepting after the process ran out of descriptors or memory."""
_STRANGERS = 64
"""Connections beyond the limit of sessions, so that who comes too late is told so; the rest waits in the kernel."""
_END_WAIT = 0.5
"""Seconds that `close` waits for connections whose end hangs."""


class AttachServer:
    """Listens on one path."""

    def __init__(
        self,
        path: str,
        sessions: SessionTable,
        map_region: MapRegion,
        token_subject: TokenSubject,
        node: str,
        *,
        mode: int = 0o666,
        hello_timeout: float = 10.0,
    ) -> None:
        """`map_region(name, subject)` returns a region's memory and `token_subject(token)` whose token it is, or they
        raise PeermemError.

        By `mode` any user may attach; what they may do is the policy's. Who has no session after
        `hello_timeout` seconds, which is longer than the review of a token takes, is dropped.
        """
        self._path = Path(path)
        self._sessions = sessions
        self._map_region = map_region
        self._token_subject = token_subject
        self._node = node
        self._mode = mode
        self._hello_timeout = hello_timeout
        self._places = asyncio.Semaphore(sessions.max_sessions + _STRANGERS)
        self._tasks: set[asyncio.Task[None]] = set()
        self._listener: socket.socket | None = None
        self._owns_path = True

    def listen(self, handed_over: socket.socket | None = None) -> None:
        """Let jobs connect, at a socket that somebody else listens on already if one is `handed_over`; they are
        answered from `serve` on.

        Raises OSError, also when a daemon is listening there already.
        """
        self._owns_path = handed_over is None
        self._listener = handed_over or self._bound()

    def serve(self) -> None:
        """Answer those who have connected, and whoever does from now on."""
        assert self._listener is not None, "it listens"
        self._spawn(self._accept(self._listener))

    def _bound(self) -> socket.socket:
        free_socket_path(self._path, socket.SOCK_SEQPACKET)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
        try:
            listener.bind(str(self._path))
            self._path.chmod(self._mode)
            listener.listen(128)
        except BaseException:
            listener.close()
            raise
        return listener

    async def close(self) -> None:
        """End all sessions and remove the socket. Closing twice is no error."""
        if self._listener is None:
            return
        listener, self._listener = self._listener, None
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=_END_WAIT)
        listener.close()
        if self._owns_path:
            self._path.unlink(missing_ok=True)

    async def _accept(self, listener: socket.socket) -> None:
        while True:
            await self._places.acquire()
            await _readable(listener)
            try:
                connection, _ = listener.accept()
            except (BlockingIOError, ConnectionAbortedError):
                self._places.release()
            except OSError as error:
                self._places.release()
                log.warning("attach_accept_failed", cause=error.strerror)
                await asyncio.sleep(_ACCEPT_PAUSE)
            else:
                self._admit(connection)

    def _admit(self, connection: socket.socket) -> None:
        task = self._spawn(self._serve(connection))
        task.add_done_callback(lambda _: connection.close())  # for a task that was cancelled before it began

    async def _serve(self, connection: socket.socket) -> None:
        job = _Job(connection, self._sessions, self._map_region, self._token_subject, self._node)
        try:
            await job.serve(self._hello_timeout)
        except TimeoutError:
            log.debug("attach_without_hello", seconds=self._hello_timeout)
        except OSError as error:
            log.debug("attach_dropped", cause=error.strerror)
        finally:
            await job.end()
            self._places.release()

    def _spawn(self, work: Coroutine[None, None, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task


class _Packet(NamedTuple):
    """What one receive returned."""

    data: bytes
    fds: list[int]
    cut: bool


class _Job:
    """One connection, from accept to end."""

    def __init__(
        self,
        connection: socket.socket,
        sessions: SessionTable,
        map_region: MapRegion,
        token_subject: TokenSubject,
        node: str,
    ) -> None:
        connection.setblocking(False)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER)
        self._connection = connection
        self._sessions = sessions
        self._map_region = map_region
        self._token_subject = token_subject
        self._node = node
        self._session: Session | None = None
        self._process: JobProcess | None = None
        self._closing = close_apart([])

    async def serve(self, hello_timeout: float) -> None:
        """Answer until the job leaves or sends a malformed packet. Raises TimeoutError without a hello, OSError."""
        async with asyncio.timeout(hello_timeout) as patience:
            while await self._turn():
                if self._session is not None:
                    patience.reschedule(None)

    def _process_ended(self) -> None:
        """End the conversation, also where another process still holds its socket."""
        self._forget_process()
        with suppress(OSError):  # the other end may be closed already
            self._connection.shutdown(socket.SHUT_RDWR)

    def _forget_process(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            asyncio.get_running_loop().remove_reader(process.pidfd)
            process.close()

    async def end(self) -> None:
        """End the session, then close the connection and wait for what hangs."""
        self._forget_process()
        try:
            if self._session is not None:
                self._sessions.close(self._session)
        finally:
            await asyncio.gather(self._closing, close_apart([self._connection.detach()]))

    async def _turn(self) -> bool:
        """Answer one packet; return whether the conversation goes on."""
        await _readable(self._connection)
        packet = _receive(self._connection)
        try:
            return await self._answer(packet)
        finally:
            if packet.fds:
                self._closing = close_apart(packet.fds)
                await asyncio.shield(self._closing)

    async def _answer(self, packet: _Packet) -> bool:
        """Answer a packet; takes out of its `fds` what is kept. Raises OSError when the job can't be answered."""
        if not packet.data:
            return False  # the end of the connection; an empty packet looks the same
        shared: list[int] = []
        try:
            response = await self._obey(_parse(packet), packet.fds, shared)
        except PeermemError as error:
            response = attach_pb2.AttachResponse(error=error_to_proto(error))
        except Exception:
            log.exception("attach_defect")
            defect = Internal("The daemon failed on this request; its log says why.")
            response = attach_pb2.AttachResponse(error=error_to_proto(defect))
        socket.send_fds(self._connection, [response.SerializeToString()], shared)
        return response.error.reason != MalformedMessage.reason

    async def _obey(
        self, request: attach_pb2.AttachRequest, received: list[int], shared: list[int]
    ) -> attach_pb2.AttachResponse:
        """Do what the packet asks for; puts into `shared` what the answer carries."""
        command = request.WhichOneof("command")
        if (command == "hand_in") is not (len(received) == 1):
            raise MalformedMessage("A packet holds one file descriptor if it is hand_in, else none.")
        if (command == "hello") is (self._session is not None):
            raise MalformedMessage("hello must be the first packet, and only the first.")
        if self._session is None:
            return attach_pb2.AttachResponse(session=await self._open(request.hello.token))
        if command == "map":
            return attach_pb2.AttachResponse(mapped=self._map(request.map.region, self._session, shared))
        return attach_pb2.AttachResponse(handed_in=self._hand_in(self._session, received))

    async def _open(self, token: str) -> attach_pb2.AttachSession:
        try:
            process = read_job_process(self._connection)
        except OSError as error:
            raise SessionNotFound(
                f"The kernel does not know the process that connected any more ({error.strerror}). Connect again."
            ) from None
        try:
            subject = await self._token_subject(token) if token else process.subject
            self._session = self._sessions.open(subject, process.pid, process.origin)
        except BaseException:
            process.close()
            raise
        if process.pidfd >= 0:
            self._process = process
            asyncio.get_running_loop().add_reader(process.pidfd, self._process_ended)
        return attach_pb2.AttachSession(token=self._session.token, node=f"nodes/{self._node}")

    def _map(self, region: str, session: Session, shared: list[int]) -> attach_pb2.AttachMapped:
        audit.called("attach", "map")
        audit.of_process(session.pid, session.origin)
        memory = self._map_region(parse_region(region, "region"), session.subject)
        fd, offset = memory.share()
        shared.append(fd)
        return attach_pb2.AttachMapped(offset=offset, length=memory.length)

    def _hand_in(self, session: Session, received: list[int]) -> attach_pb2.AttachHandedIn:
        fd = received[0]
        token = self._sessions.hand_in(session, fd)
        received.clear()
        return attach_pb2.AttachHandedIn(token=token, length=_size(fd))


def _size(fd: int) -> int:
    """Return the bytes of a memory file, or of a dma-buf, which tells them by lseek(2)."""
    return os.lseek(fd, 0, os.SEEK_END) if dma_buf_exporter(fd) else os.fstat(fd).st_size


def _receive(connection: socket.socket) -> _Packet:
    """Return the next packet. Raises OSError."""
    fds = array.array("i")
    data, ancillary, flags, _ = connection.recvmsg(
        MAX_PACKET, socket.CMSG_SPACE(_MAX_FDS * fds.itemsize), socket.MSG_CMSG_CLOEXEC
    )
    for level, kind, payload in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            fds.frombytes(payload[: len(payload) - len(payload) % fds.itemsize])
    return _Packet(data, fds.tolist(), bool(flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC)))


def _parse(packet: _Packet) -> attach_pb2.AttachRequest:
    """Return the request. Raises MalformedMessage."""
    if packet.cut or len(packet.fds) > 1:
        raise MalformedMessage(f"A packet has at most {MAX_PACKET} bytes and one file descriptor; send less.")
    try:
        request = attach_pb2.AttachRequest.FromString(packet.data)
    except DecodeError:
        raise MalformedMessage("The packet is no AttachRequest of peermem.v1.") from None
    if request.WhichOneof("command") is None:
        raise MalformedMessage("The packet has no command that this daemon knows.")
    return request


async def _readable(sock: socket.socket) -> None:
    """Return when there is something to receive or accept."""
    loop = asyncio.get_running_loop()
    ready = loop.create_future()
    loop.add_reader(sock, _wake, ready)
    try:
        await ready
    finally:
        loop.remove_reader(sock)


def _wake(ready: asyncio.Future[None]) -> None:
    with suppress(asyncio.InvalidStateError):  # cancelled in the same turn of the loop
        ready.set_result(None)
