"""How other daemons are reached: one connection to each, renewed when it has to be, and proved to lead to that node.

Rules of this file:

* A connection whose last attempt failed is replaced before the next call: gRPC's pause between two attempts would
  refuse calls to a daemon that has come back.
* With credentials, the far end shows a certificate with the SPIFFE ID of the node that the directory names, or nothing
  is sent to it. gRPC for Python can't check that: a handshake of our own does, and gRPC then accepts that very
  certificate and no other.
* New credentials of this daemon make a new connection. Calls that run on an old one end there.
"""

from __future__ import annotations

import asyncio
import os
import ssl
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager

import grpc

from peermem.credentials.base import Credentials, InForce
from peermem.credentials.trial import Pair, Shown, context_of, shown_by
from peermem.v1 import link_pb2_grpc, node_pb2_grpc, transfer_pb2_grpc

_OPTIONS = (
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.keepalive_permit_without_calls", 0),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 5_000),  # how long one attempt to connect may take
    ("grpc.max_reconnect_backoff_ms", 2_000),
    ("grpc.max_receive_message_length", 8 << 20),
    ("grpc.enable_http_proxy", 0),
    ("grpc.use_local_subchannel_pool", 1),  # else a new channel to the same address inherits the pause
)
_PATIENCE = 5.0
"""Seconds for the handshake that looks at the far end's certificate."""


class NotThatNode(Exception):
    """What answers can't be believed to be the node, or nothing does; the text says why."""

    def __init__(self, cause: str, *, absent: bool = False) -> None:
        """`absent` where nothing answers at all."""
        super().__init__(cause)
        self.absent = absent


class Connection:
    """A channel and its stubs."""

    def __init__(self, channel: grpc.aio.Channel, mine: InForce | None = None, seen: Shown | None = None) -> None:
        """`mine` and `seen` are what this daemon shows and the far end has shown; None where TCP is plain."""
        self._channel = channel
        self._mine = mine
        self._seen = seen
        self._users = 0
        self._retired = False
        self.closing: asyncio.Task[None] | None = None
        self.links = link_pb2_grpc.LinkServiceStub(channel)
        self.transfers = transfer_pb2_grpc.TransferServiceStub(channel)
        self.nodes = node_pb2_grpc.NodeServiceStub(channel)

    def fit(self, now: InForce | None) -> bool:
        """Whether a call may begin on it: its last attempt to connect did not fail, it shows what is in force, and the
        far end's certificate counts."""
        if self._channel.get_state() is grpc.ChannelConnectivity.TRANSIENT_FAILURE:
            return False
        if now is None or self._mine is None or self._seen is None:
            return True
        denied = now.denied.holds(self._seen.spiffe_id, self._seen.fingerprint)
        return now.generation == self._mine.generation and not denied

    @contextmanager
    def used(self) -> Iterator[None]:
        """Keep it open for a call."""
        self._users += 1
        try:
            yield
        finally:
            self._users -= 1
            self._close_if_over()

    def retire(self) -> None:
        """Close it when the last call on it has ended."""
        self._retired = True
        self._close_if_over()

    def _close_if_over(self) -> None:
        if self._retired and not self._users and self.closing is None:
            self.closing = asyncio.get_running_loop().create_task(self.close())

    async def close(self) -> None:
        """Break what runs on it."""
        await self._channel.close()


class Door:
    """The way to one node."""

    def __init__(self, node: str, address: str, credentials: Credentials | None) -> None:
        """`credentials` are this daemon's own; None where TCP is plain."""
        self.address = address
        self._node = node
        self._credentials = credentials
        self._current: Connection | None = None
        self._old: set[Connection] = set()
        self._opening: asyncio.Task[Connection] | None = None

    @asynccontextmanager
    async def use(self) -> AsyncIterator[Connection]:
        """Give the connection to make a call on, which stays open for it. Raises NotThatNode."""
        connection = await self._connection()
        while connection.closing is not None:  # retired while this waited for its turn
            connection = await self._connection()
        with connection.used():
            yield connection

    async def _connection(self) -> Connection:
        now = self._credentials.now if self._credentials is not None else None
        if self._current is not None and self._current.fit(now):
            return self._current
        if now is None or self._credentials is None:
            return self._replace(Connection(grpc.aio.insecure_channel(self.address, options=_OPTIONS)))
        if self._opening is None:
            expected = self._credentials.pattern.spiffe_id(self._node)
            self._opening = asyncio.get_running_loop().create_task(self._open(now, expected))
            self._opening.add_done_callback(self._opened)
        return await asyncio.shield(self._opening)

    async def _open(self, now: InForce, expected: str) -> Connection:
        seen = await look(self.address, now.pair)
        if seen.spiffe_id != expected:
            raise NotThatNode(f"its certificate is of {seen.spiffe_id or 'no SPIFFE ID'}, and the node's is {expected}")
        if now.denied.holds(seen.spiffe_id, seen.fingerprint):
            raise NotThatNode(f"the list of tls.denied names its certificate, of {seen.spiffe_id}")
        if not seen.name:
            raise NotThatNode(f"its certificate, of {seen.spiffe_id}, has no DNS name, IP address or common name")
        shown = grpc.ssl_channel_credentials(seen.pem, now.pair.key, now.pair.certificate)
        options = (*_OPTIONS, ("grpc.ssl_target_name_override", seen.name))
        return self._replace(Connection(grpc.aio.secure_channel(self.address, shown, options=options), now, seen))

    def _opened(self, opening: asyncio.Task[Connection]) -> None:
        self._opening = None
        if not opening.cancelled():
            opening.exception()  # for those who waited, if they still do

    def _replace(self, connection: Connection) -> Connection:
        self.rest()
        self._current = connection
        return connection

    def rest(self) -> bool:
        """Keep no connection but for calls that run; the next one makes another. Return whether none is open now."""
        before, self._current = self._current, None
        self._old = {old for old in self._old if old.closing is None or not old.closing.done()}
        if before is not None:
            self._old.add(before)
            before.retire()
        return self._opening is None and not self._old

    async def close(self) -> None:
        """Break what runs on its connections."""
        if self._opening is not None:
            self._opening.cancel()
        current = [self._current] if self._current is not None else []
        await asyncio.gather(*(connection.close() for connection in (*current, *self._old)))


async def look(address: str, pair: Pair) -> Shown:
    """Return the certificate that is shown at host:port, which an authority of the pair signed. Raises NotThatNode."""
    host, _, port = address.rpartition(":")
    try:
        async with asyncio.timeout(_PATIENCE):
            _, writer = await asyncio.open_connection(
                host.strip("[]"), int(port), ssl=context_of(pair, ssl.PROTOCOL_TLS_CLIENT), server_hostname=""
            )
    except TimeoutError:
        raise NotThatNode(f"no handshake within {_PATIENCE:g} seconds") from None
    except ssl.SSLCertVerificationError as error:
        raise NotThatNode(f"its certificate does not count: {error.verify_message}") from None
    except ssl.SSLError as error:
        raise NotThatNode(f"no handshake: {error.reason or error}") from None
    except OSError as error:
        raise NotThatNode(os.strerror(error.errno) if error.errno else str(error), absent=True) from None
    connection = writer.get_extra_info("ssl_object")
    writer.transport.abort()
    return shown_by(connection)
