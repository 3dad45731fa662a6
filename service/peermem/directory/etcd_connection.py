"""One connection to one member of an etcd cluster, over etcd's own gRPC.

Rules of this file:

* Whatever goes wrong is a Fault, with a cause for people; passwords and tokens are in none.
* What is read holds now, for the whole of etcd: a member that is late, or a proxy that keeps answers, may not say more.
* Every call has a deadline. A member that does not answer, or that has lost its cluster's leader, ends what runs on it.
* Certificates are read when a connection is made, and the password whenever a token is asked for, so that what was
  renewed is used. A token that etcd does not take any more is replaced by a new one, once for each call.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import grpc

from peermem.credentials.watched import read_small
from peermem.directory.records import Span
from peermem.etcd import rpc_pb2, rpc_pb2_grpc
from peermem.offload import in_thread

T = TypeVar("T")

DEADLINE = 5.0
"""Seconds for a call."""
_GOODBYE = 1.0
"""Seconds for the end of a renewal's stream, once it is answered."""
_SLOW_DEADLINE = 30.0
"""Seconds for a write: one that is given up may be made all the same, and making it again is no help to a busy etcd."""
MAX_OPERATIONS = 128
"""Of one transaction: etcd's default for --max-txn-ops."""
_PAGE = 1000
"""Keys read at once."""
_OPTIONS = (
    ("grpc.keepalive_time_ms", 10_000),  # etcd closes connections of who asks more often than every 5 s
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.keepalive_permit_without_calls", 0),
    ("grpc.max_receive_message_length", 64 << 20),
    ("grpc.enable_http_proxy", 0),
    ("grpc.use_local_subchannel_pool", 1),
)
_REFUSED = (
    grpc.StatusCode.UNAUTHENTICATED,
    grpc.StatusCode.PERMISSION_DENIED,
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.FAILED_PRECONDITION,
)
_OLD_TOKEN = ("invalid auth token", "revision of auth store is old")
"""What etcd says of a token that it does not take any more; the latter where tokens are signed, as JWT."""


class Fault(Exception):
    """A call failed, or a stream ended."""

    def __init__(self, cause: str, *, refused: bool = False) -> None:
        """`refused` where trying again is of no use until somebody changes something."""
        super().__init__(cause)
        self.cause = cause
        self.refused = refused


class LeaseLost(Exception):
    """There is no such lease any more."""


@dataclass(frozen=True, slots=True)
class Proof:
    """What is shown to etcd, and what etcd has to show."""

    ca: Path | None = None
    """PEM: the authorities of etcd's certificates; None for plain TCP."""
    certificate: Path | None = None
    key: Path | None = None
    user: str = ""
    password_file: Path | None = None


class Connection:
    """A channel and its stubs; made by `connect`, closed by `close`."""

    def __init__(self, channel: grpc.aio.Channel, user: str, password_file: Path | None) -> None:
        self._channel = channel
        self._user = user
        self._password_file = password_file
        self._token: tuple[tuple[str, str], ...] = ()
        self._kv = rpc_pb2_grpc.KVStub(channel)
        self._watch = rpc_pb2_grpc.WatchStub(channel)
        self._lease = rpc_pb2_grpc.LeaseStub(channel)
        self._auth = rpc_pb2_grpc.AuthStub(channel)

    async def authenticate(self) -> None:
        """Get a token where there is a user. Raises Fault."""
        if self._user:
            (password,) = await _read(self._password_file)
            text = (password or b"").decode("utf-8", "replace").strip()
            request = rpc_pb2.AuthenticateRequest(name=self._user, password=text)
            with _faults():
                answer = await self._auth.Authenticate(request, timeout=DEADLINE)
            self._token = (("token", answer.token),)

    async def range(self, span: Span, *, start: bytes = b"", limit: int = _PAGE, at: int = 0) -> rpc_pb2.RangeResponse:
        """Return keys and values of a span, from `start` on, at a revision (0: now)."""
        request = rpc_pb2.RangeRequest(key=start or span.start, range_end=span.end, limit=limit, revision=at)
        return await self._call(lambda: self._kv.Range(request, timeout=DEADLINE, metadata=self._token))

    async def count(self, span: Span) -> int:
        """Return how many keys a span has. Raises Fault."""
        return (await self._counted(span)).count

    async def header(self, span: Span) -> rpc_pb2.ResponseHeader:
        """Return which cluster this is, and its revision, as of now; `span` is one that may be read. Raises Fault."""
        return (await self._counted(span)).header

    async def _counted(self, span: Span) -> rpc_pb2.RangeResponse:
        request = rpc_pb2.RangeRequest(key=span.start, range_end=span.end, count_only=True)
        return await self._call(lambda: self._kv.Range(request, timeout=DEADLINE, metadata=self._token))

    async def pages(self, span: Span) -> AsyncGenerator[rpc_pb2.RangeResponse]:
        """Yield everything in a span, in parts, as of the revision in the header of the first. Raises Fault."""
        request = rpc_pb2.RangeRequest(key=span.start, range_end=span.end, limit=_PAGE)
        page = await self._call(lambda: self._kv.Range(request, timeout=DEADLINE, metadata=self._token))
        revision = page.header.revision
        yield page
        while page.more and page.kvs:
            page = await self.range(span, start=page.kvs[-1].key + b"\0", at=revision)
            yield page

    async def transact(self, request: rpc_pb2.TxnRequest) -> rpc_pb2.TxnResponse:
        """Make a transaction. Raises Fault, and LeaseLost where a put names a lease that is gone."""
        return await self._call(lambda: self._kv.Txn(request, timeout=_SLOW_DEADLINE, metadata=self._token))

    async def grant(self, ttl: int) -> int:
        """Return a new lease of some seconds."""
        request = rpc_pb2.LeaseGrantRequest(TTL=ttl)
        answer = await self._call(lambda: self._lease.LeaseGrant(request, timeout=DEADLINE, metadata=self._token))
        return answer.ID

    async def revoke(self, lease: int) -> None:
        """End a lease and what hangs on it. Raises Fault, LeaseLost."""
        request = rpc_pb2.LeaseRevokeRequest(ID=lease)
        await self._call(lambda: self._lease.LeaseRevoke(request, timeout=DEADLINE, metadata=self._token))

    async def renew(self, lease: int, deadline: float) -> None:
        """Have a lease last its whole time from now. Raises Fault, LeaseLost."""
        # a stream each time: in one that goes on, etcd's proxy answers when it renews by itself, as seldom as this
        with _faults():
            call = self._lease.LeaseKeepAlive(metadata=(*self._token, _HAS_LEADER))
            try:
                async with asyncio.timeout(deadline):
                    await call.write(rpc_pb2.LeaseKeepAliveRequest(ID=lease))
                    answer = await call.read()
                # awaiting its end, or etcd counts it as one that failed; that it is late changes nothing
                with suppress(grpc.aio.AioRpcError, TimeoutError):
                    async with asyncio.timeout(_GOODBYE):
                        await call.done_writing()
                        await call.read()
            finally:
                call.cancel()
        if not isinstance(answer, rpc_pb2.LeaseKeepAliveResponse):
            raise Fault("it ended the renewals")
        if answer.TTL <= 0:
            raise LeaseLost

    async def watch(self, span: Span, revision: int) -> AsyncGenerator[rpc_pb2.WatchResponse]:
        """Yield what happens in a span from a revision on. Raises Fault."""
        call = self._watch.Watch(metadata=(*self._token, _HAS_LEADER))
        wanted = rpc_pb2.WatchCreateRequest(
            key=span.start, range_end=span.end, start_revision=revision, progress_notify=True, fragment=True
        )
        try:
            with _faults():
                async with asyncio.timeout(DEADLINE):
                    await call.write(rpc_pb2.WatchRequest(create_request=wanted))
                    answer = await call.read()
                while isinstance(answer, rpc_pb2.WatchResponse):
                    yield answer
                    answer = await call.read()
        finally:
            call.cancel()
        raise Fault("it ended the watch")

    async def close(self) -> None:
        """Break what runs on it."""
        await self._channel.close()

    async def _call(self, call: Callable[[], Awaitable[T]]) -> T:
        try:
            with _faults():
                return await call()
        except _TokenForgotten:
            await self.authenticate()
            with _faults():
                return await call()


async def connect(endpoint: str, proof: Proof) -> Connection:
    """Return a connection to host:port on which calls may be made. Raises Fault."""
    ca, certificate, key = await _read(proof.ca, proof.certificate, proof.key)
    if ca is None:
        channel = grpc.aio.insecure_channel(endpoint, options=_OPTIONS)
    else:
        shown = grpc.ssl_channel_credentials(ca, key, certificate)
        channel = grpc.aio.secure_channel(endpoint, shown, options=_OPTIONS)
    connection = Connection(channel, proof.user, proof.password_file)
    try:
        await connection.authenticate()
    except BaseException:
        await connection.close()
        raise
    return connection


async def first_of(*works: Coroutine[Any, Any, None]) -> None:
    """Run several works until one ends, then end the others. Raises what that one raised."""
    # no TaskGroup: it swallows the end of this task where a part fails at the same moment
    tasks = [asyncio.ensure_future(work) for work in works]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _read(*files: Path | None) -> list[bytes | None]:
    try:
        return await in_thread(lambda: [read_small(path) if path is not None else None for path in files])
    except OSError as error:
        cause = f"{error.filename}: {error.strerror}" if error.filename else str(error)
        raise Fault(cause, refused=True) from None


class _TokenForgotten(Fault):
    """etcd does not know the token (any more), or its users and rights are others since."""


@contextmanager
def _faults() -> Iterator[None]:
    try:
        yield
    except grpc.aio.AioRpcError as error:
        raise _fault(error.code(), error.details() or "no details") from None
    except TimeoutError:
        raise Fault("no answer in time") from None
    except asyncio.CancelledError:
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            raise
        raise Fault("the connection was given up") from None  # not this task but its call was cancelled
    except asyncio.InvalidStateError as error:  # a write on a stream that has ended
        raise Fault(f"the stream ended: {error}") from None
    except grpc.aio.UsageError:  # a call on a channel that was closed
        raise Fault("the connection was given up") from None


def _fault(code: grpc.StatusCode, details: str) -> Exception:
    if "requested lease not found" in details:
        return LeaseLost()
    cause = f"{code.name}: {details}"
    refused = code in _REFUSED or "certificate" in details.lower()
    return (_TokenForgotten if any(each in details for each in _OLD_TOKEN) else Fault)(cause, refused=refused)


_HAS_LEADER = ("hasleader", "true")
