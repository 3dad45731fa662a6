"""A job's side of the attach socket: a session that lives as long as this object, and descriptors in and out.

Rules of this file:

* One request at a time, each answered by one packet; a lock makes it safe for threads.
* A descriptor that was received is mapped and closed; the mapping keeps the memory.
"""

from __future__ import annotations

import array
import mmap
import os
import socket
import threading
from typing import Self

from google.protobuf.message import DecodeError

from peermem.client.errors import from_proto
from peermem.core.errors import MalformedMessage, NodeUnreachable
from peermem.v1 import attach_pb2

_TIMEOUT = 10.0
_MAX_PACKET = 65536


class Attachment:
    """An open session. Closing it, or the end of this process, frees what only this session held."""

    def __init__(self, path: str, sock: socket.socket) -> None:
        self._path = path
        self._sock = sock
        self._lock = threading.Lock()
        self._token = ""
        self.node = ""

    def __repr__(self) -> str:
        return f"<Attachment to {self.node} at {self._path}>"

    @classmethod
    def open(cls, path: str) -> Self:
        """Connect to the attach socket at `path`. Raises NodeUnreachable, LimitReached."""
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        sock.settimeout(_TIMEOUT)
        attachment = cls(path, sock)
        try:
            sock.connect(path)
            answer, _ = attachment._ask(attach_pb2.AttachRequest(hello=attach_pb2.AttachHello()))
        except OSError as error:
            sock.close()
            raise attachment._unreachable(error) from None
        except BaseException:
            sock.close()
            raise
        attachment._token, attachment.node = answer.session.token, answer.session.node
        return attachment

    @property
    def token(self) -> str:
        """What ties gRPC calls to this session; a secret."""
        return self._token

    def map(self, region: str) -> mmap.mmap:
        """Return the writable mapping of a region of this host's daemon, exactly as long as the region.

        Raises RegionNotFound, NotMappable, AccessDenied, NodeUnreachable.
        """
        request = attach_pb2.AttachRequest(map=attach_pb2.AttachMap(region=region))
        answer, fds = self._ask(request)
        try:
            if len(fds) != 1:
                raise MalformedMessage(f"The daemon sent {len(fds)} file descriptors for {region}.")
            return mmap.mmap(fds[0], answer.mapped.length, offset=answer.mapped.offset)
        finally:
            for fd in fds:
                os.close(fd)

    def hand_in(self, fd: int) -> tuple[str, int]:
        """Hand in a memory file to be adopted; return its token for CreateRegion and its size in bytes.

        The caller keeps its own descriptor. Raises LimitReached, NodeUnreachable.
        """
        answer, _ = self._ask(attach_pb2.AttachRequest(hand_in=attach_pb2.AttachHandIn()), fd)
        return answer.handed_in.token, answer.handed_in.length

    def close(self) -> None:
        """End the session. Closing twice is no error."""
        self._sock.close()

    def _ask(
        self, request: attach_pb2.AttachRequest, fd: int | None = None
    ) -> tuple[attach_pb2.AttachResponse, list[int]]:
        rights = [] if fd is None else [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd]))]
        fds = array.array("i")
        try:
            with self._lock:
                self._sock.sendmsg([request.SerializeToString()], rights)
                data, ancillary, _, _ = self._sock.recvmsg(
                    _MAX_PACKET, socket.CMSG_SPACE(fds.itemsize), socket.MSG_CMSG_CLOEXEC
                )
        except OSError as error:
            raise self._unreachable(error) from None
        for _, _, payload in ancillary:
            fds.frombytes(payload[: len(payload) - len(payload) % fds.itemsize])
        try:
            if not data:
                raise self._unreachable(ConnectionResetError("it closed the connection"))
            answer = attach_pb2.AttachResponse.FromString(data)
            if answer.HasField("error"):
                raise from_proto(answer.error)
        except BaseException as error:
            for received in fds:
                os.close(received)
            if isinstance(error, DecodeError):
                raise MalformedMessage(f"What listens on {self._path} is no daemon of this version.") from None
            raise
        return answer, list(fds)

    def _unreachable(self, error: OSError) -> NodeUnreachable:
        return NodeUnreachable(
            f"The daemon's attach socket {self._path} does not answer: {error.strerror or error}. "
            "Check that peermemd runs on this host.",
            path=self._path,
        )
