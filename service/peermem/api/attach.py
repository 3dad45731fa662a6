"""The attach socket: local jobs prove who they are, and file descriptors go in and out.

Rules of this file:

* SOCK_SEQPACKET, one protobuf message a packet, answered in order (protos/peermem/v1/attach.proto).
* Who connects is what SO_PEERCRED says (unix(7)); the connection's end is the session's end.
* Every descriptor that is received is either handed to the session or closed here, whatever happened.
* A packet that is too long, holds more than one descriptor or is no message ends the connection after
  an answer that says so. A client that does not read its answers is dropped: nothing is queued for it.
"""

from __future__ import annotations

import array
import asyncio
import os
import socket
import struct
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import structlog
from google.protobuf.message import DecodeError

from peermem.api.sockets import free_socket_path
from peermem.broker.sessions import Session, SessionTable
from peermem.core.errors import MalformedMessage, PeermemError
from peermem.core.names import ChildName, parse_region
from peermem.device.base import DeviceMemory
from peermem.v1 import attach_pb2
from peermem.wire import error_to_proto

log = structlog.get_logger(__name__)

MAX_PACKET = 4096
_MAX_FDS = 8
"""Descriptors that are received, and closed, when a packet holds more than the one it may."""
_HELLO_TIMEOUT = 5.0

MapRegion = Callable[[ChildName, str], DeviceMemory]


class AttachServer:
    """Listens on one path."""

    def __init__(self, path: str, sessions: SessionTable, map_region: MapRegion, node: str) -> None:
        """`map_region(name, subject)` returns a region's memory or raises PeermemError."""
        self._path = Path(path)
        self._sessions = sessions
        self._map_region = map_region
        self._node = node
        self._listener: socket.socket | None = None
        self._connections: set[_Connection] = set()

    async def start(self) -> None:
        """Begin to listen. Raises OSError."""
        free_socket_path(self._path, socket.SOCK_SEQPACKET)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
        try:
            listener.bind(str(self._path))
            self._path.chmod(0o666)  # whoever may enter the folder may attach; what they may do is the policy's
            listener.listen(128)
        except BaseException:
            listener.close()
            raise
        self._listener = listener
        asyncio.get_running_loop().add_reader(listener, self._accept)

    async def close(self) -> None:
        """End all sessions and remove the socket. Closing twice is no error."""
        if self._listener is None:
            return
        asyncio.get_running_loop().remove_reader(self._listener)
        self._listener.close()
        self._listener = None
        self._path.unlink(missing_ok=True)
        for connection in list(self._connections):
            connection.end()

    def _accept(self) -> None:
        assert self._listener is not None
        try:
            sock, _ = self._listener.accept()
        except BlockingIOError:
            return
        except OSError as error:
            log.warning("attach_accept_failed", cause=error.strerror)
            return
        sock.setblocking(False)
        self._connections.add(
            _Connection(sock, self._sessions, self._map_region, self._node, self._connections.discard)
        )


class _Connection:
    """One job."""

    def __init__(
        self,
        sock: socket.socket,
        sessions: SessionTable,
        map_region: MapRegion,
        node: str,
        ended: Callable[[_Connection], None],
    ) -> None:
        self._sock = sock
        self._sessions = sessions
        self._map_region = map_region
        self._node = node
        self._ended = ended
        self._session: Session | None = None
        loop = asyncio.get_running_loop()
        self._timer = loop.call_later(_HELLO_TIMEOUT, self.end)
        loop.add_reader(sock, self._readable)

    def end(self) -> None:
        """Close the connection and its session."""
        if self._sock.fileno() < 0:
            return
        self._timer.cancel()
        asyncio.get_running_loop().remove_reader(self._sock)
        self._sock.close()
        if self._session is not None:
            self._sessions.close(self._session)
        self._ended(self)

    def _readable(self) -> None:
        descriptors = array.array("i")
        try:
            data, ancillary, flags, _ = self._sock.recvmsg(
                MAX_PACKET, socket.CMSG_SPACE(_MAX_FDS * descriptors.itemsize), socket.MSG_CMSG_CLOEXEC
            )
        except BlockingIOError:
            return
        except OSError:
            self.end()
            return
        for level, kind, payload in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                descriptors.frombytes(payload[: len(payload) - len(payload) % descriptors.itemsize])
        received = list(descriptors)
        try:
            if not data and not received:
                self.end()
                return
            self._packet(data, received, truncated=bool(flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC)))
        finally:
            for fd in received:
                os.close(fd)

    def _packet(self, data: bytes, received: list[int], *, truncated: bool) -> None:
        """Answer one packet; takes out of `received` what it keeps."""
        try:
            request = _parse(data, received, truncated)
            self._answer(request, received)
        except MalformedMessage as error:
            self._send(attach_pb2.AttachResponse(error=error_to_proto(error)))
            self.end()
        except PeermemError as error:
            self._send(attach_pb2.AttachResponse(error=error_to_proto(error)))

    def _answer(self, request: attach_pb2.AttachRequest, received: list[int]) -> None:
        command = request.WhichOneof("command")
        if (command == "hello") is (self._session is not None):
            raise MalformedMessage("hello must be the first packet, and only the first.")
        if (command == "hand_in") is not bool(received):
            raise MalformedMessage("A file descriptor belongs to hand_in, and to nothing else.")
        if self._session is None:
            self._open()
        elif command == "map":
            memory = self._map_region(parse_region(request.map.region, "region"), self._session.subject)
            fd, offset = memory.share()
            mapped = attach_pb2.AttachMapped(offset=offset, length=memory.length)
            self._send(attach_pb2.AttachResponse(mapped=mapped), fd)
        else:
            length = os.fstat(received[0]).st_size
            token = self._sessions.hand_in(self._session, received.pop())
            handed_in = attach_pb2.AttachHandedIn(token=token, length=length)
            self._send(attach_pb2.AttachResponse(handed_in=handed_in))

    def _open(self) -> None:
        credentials = self._sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
        pid, uid, _ = struct.unpack("3i", credentials)
        self._session = self._sessions.open(f"uid:{uid}", pid)
        self._timer.cancel()
        session = attach_pb2.AttachSession(token=self._session.token, node=f"nodes/{self._node}")
        self._send(attach_pb2.AttachResponse(session=session))

    def _send(self, response: attach_pb2.AttachResponse, fd: int | None = None) -> None:
        rights = [] if fd is None else [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd]))]
        try:
            self._sock.sendmsg([response.SerializeToString()], rights)
        except OSError:
            with suppress(OSError):
                self.end()


def _parse(data: bytes, received: list[int], truncated: bool) -> attach_pb2.AttachRequest:
    if truncated or len(received) > 1:
        raise MalformedMessage(f"A packet has at most {MAX_PACKET} bytes and one file descriptor.")
    try:
        request = attach_pb2.AttachRequest.FromString(data)
    except DecodeError:
        raise MalformedMessage("The packet is no AttachRequest.") from None
    if request.WhichOneof("command") is None:
        raise MalformedMessage("The packet has no command that this daemon knows.")
    return request
