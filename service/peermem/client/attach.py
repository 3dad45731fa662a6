"""A job's side of the attach socket: a session that lives as long as this object, and descriptors in and out.

Rules of this file:

* One request at a time, each answered by one packet; a lock makes it safe for threads.
* A conversation that fell out of step (no answer in time, an answer that makes no sense) is ended, and the
  session with it: a late answer must not be taken for another request's.
* A descriptor that was received is mapped and closed; the mapping keeps the memory.
"""

from __future__ import annotations

import array
import mmap
import os
import socket
import stat
import threading
from collections.abc import Collection, Iterable
from contextlib import suppress
from typing import Self

from google.protobuf.message import DecodeError

from peermem.client import errors
from peermem.core.errors import AccessDenied, MalformedMessage, NotAdoptable, NotMappable, Timeout
from peermem.core.names import parse_region
from peermem.v1 import attach_pb2

_TIMEOUT = 10.0
_MAX_ANSWER = 65536


class Attachment:
    """An open session. Its end, by `close` or with this process, frees what only this session held."""

    def __init__(self, path: str, connection: socket.socket, answer: attach_pb2.AttachSession) -> None:
        """Owns a `connection` on which the daemon gave this answer to hello."""
        self.node = answer.node
        """nodes/{node} of the daemon."""
        self.token = answer.token
        """What ties gRPC calls to this session; a secret."""
        self._path = path
        self._connection = connection
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        return f"<Attachment to {self.node} at {self._path}>"

    @classmethod
    def open(cls, path: str, timeout: float = _TIMEOUT, token: str = "") -> Self:
        """Open a session at the attach socket `path`; each request may take `timeout` seconds.

        With the `token` of a service account, the session is that account's instead of this user's.
        Raises NodeUnreachable, AccessDenied, LimitReached, Timeout, Unauthenticated, AuthorityUnreachable.
        """
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            connection.settimeout(timeout)
            _connect(connection, path)
            request = attach_pb2.AttachRequest(hello=attach_pb2.AttachHello(token=token))
            answer, _ = _ask(connection, path, request, "session")
            return cls(path, connection, answer.session)
        except BaseException:
            connection.close()
            raise

    def map(self, region: str) -> mmap.mmap:
        """Return a writable mapping of all bytes of nodes/{node}/regions/{region}, of the daemon on this host.

        It stays valid when the region or the session ends, but then is memory of this process only.
        Raises InvalidField, RegionNotFound, RegionDeleted, NotMappable, AccessDenied, NodeUnreachable, Timeout.
        """
        name = str(parse_region(region, "region"))  # a packet that is too long would end the session
        request = attach_pb2.AttachRequest(map=attach_pb2.AttachMap(region=name))
        with self._lock:
            answer, fds = _ask(self._connection, self._path, request, "mapped", answer_fds=1)
        try:
            return _map(fds[0], answer.mapped, region)
        finally:
            os.close(fds[0])

    def hand_in(self, fd: int) -> tuple[str, int]:
        """Hand in a memory file or a dma-buf to be adopted; return its token for CreateRegion and its size in bytes.

        The caller keeps its own descriptor. Raises NotAdoptable, LimitReached, NodeUnreachable, Timeout.
        """
        try:
            os.fstat(fd)
        except OSError as error:
            raise NotAdoptable(f"File descriptor {fd} can't be handed in: {error.strerror}.") from None
        request = attach_pb2.AttachRequest(hand_in=attach_pb2.AttachHandIn())
        with self._lock:
            answer, _ = _ask(self._connection, self._path, request, "handed_in", fds=[fd])
        return answer.handed_in.token, answer.handed_in.length

    def close(self) -> None:
        """End the session; a request of another thread fails. Closing twice is no error."""
        with suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)  # wakes that thread, which then lets go of the lock
        with self._lock:
            self._connection.close()


def _connect(connection: socket.socket, path: str) -> None:
    try:
        connection.connect(path)
    except PermissionError:
        raise AccessDenied(
            f"This user may not open the attach socket {path}. Ask the administrator of this node for access.",
            path=path,
        ) from None
    except OSError as error:
        raise errors.unreachable(path, error.strerror or str(error)) from None


def _ask(
    connection: socket.socket,
    path: str,
    request: attach_pb2.AttachRequest,
    outcome: str,
    *,
    fds: Collection[int] = (),
    answer_fds: int = 0,
) -> tuple[attach_pb2.AttachResponse, list[int]]:
    """Return the answer, which is `outcome`, and so many descriptors, which belong to the caller.

    Raises what the daemon answers instead; any other fault also closes the connection.
    """
    if connection.fileno() < 0:
        raise errors.closed(path)
    try:
        answer, received = _exchange(connection, path, request, fds)
    except BaseException:
        connection.close()
        raise
    told = answer.WhichOneof("outcome")
    if (told, len(received)) == (outcome, answer_fds):
        return answer, received
    _close_all(received)
    if told == "error":
        raise errors.from_proto(answer.error)
    connection.close()
    raise _nonsense(path)


def _exchange(
    connection: socket.socket, path: str, request: attach_pb2.AttachRequest, fds: Collection[int]
) -> tuple[attach_pb2.AttachResponse, list[int]]:
    received = array.array("i")
    try:
        socket.send_fds(connection, [request.SerializeToString()], list(fds))
        data, ancillary, flags, _ = connection.recvmsg(
            _MAX_ANSWER, socket.CMSG_SPACE(received.itemsize), socket.MSG_CMSG_CLOEXEC
        )
    except TimeoutError:
        raise Timeout(f"The daemon did not answer on {path} in time. Look at its health.", path=path) from None
    except OSError as error:
        raise errors.unreachable(path, error.strerror or str(error)) from None
    for _, _, payload in ancillary:
        received.frombytes(payload[: len(payload) - len(payload) % received.itemsize])
    try:
        return _parse(data, flags, path), received.tolist()
    except BaseException:
        _close_all(received)
        raise


def _parse(data: bytes, flags: int, path: str) -> attach_pb2.AttachResponse:
    if not data:
        raise errors.unreachable(path, "it closed the connection")
    if flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
        raise _nonsense(path)
    try:
        return attach_pb2.AttachResponse.FromString(data)
    except DecodeError:
        raise _nonsense(path) from None


def _map(fd: int, where: attach_pb2.AttachMapped, region: str) -> mmap.mmap:
    if where.length == 0:  # to mmap, zero means all
        raise NotMappable(f"{region} has no bytes to map; its daemon is defect.", region=region)
    facts = os.fstat(fd)
    if stat.S_ISREG(facts.st_mode) and where.offset + where.length > facts.st_size:
        raise NotMappable(
            f"{region} ends at byte {where.offset + where.length} of a file of {facts.st_size}; its daemon is defect.",
            region=region,
        )
    try:
        return mmap.mmap(fd, where.length, offset=where.offset)
    except (OSError, ValueError, OverflowError) as error:
        raise NotMappable(f"This process can't map {region}: {error}.", region=region) from None


def _nonsense(path: str) -> MalformedMessage:
    return MalformedMessage(
        f"What answers on {path} is no daemon of this version of peermem. Give the path of its attach socket.",
        path=path,
    )


def _close_all(fds: Iterable[int]) -> None:
    for fd in fds:
        os.close(fd)
