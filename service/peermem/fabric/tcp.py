"""The tcp fabric: one-sided READ and WRITE over plain TCP, where there is no RDMA.

Rules of this file:

* Everything runs on one event loop; the only threads are the resolver's.
* The fabric owns its listening socket, its accepted links (`Target`) and the links that it opened.
* Bytes on the wire are not encrypted, and but for what is carried for daemons not signed: a network that others can
  write to is no place for it.
"""

from __future__ import annotations

import asyncio
import errno
import os
import socket
import time
from collections.abc import Callable
from typing import Any

from peermem.core.errors import FabricUnavailable, LinkNotFound, NodeUnreachable
from peermem.core.types import FabricKind, LinkAttributes, RemoteKey, Rights
from peermem.fabric.base import Exchange, FabricLimits, LinkEvents, Met
from peermem.fabric.grants import Clock, GrantTable
from peermem.fabric.plain import NicLess
from peermem.fabric.tcp_initiator import Dialled, TcpLink, dial
from peermem.fabric.tcp_stream import Pace
from peermem.fabric.tcp_target import Target
from peermem.memory import Memory

MAX_RAILS = 16
"""Connections of one link."""
_BACKLOG = 256
_ACCEPTS_PER_TURN = 16
_ACCEPT_PAUSE = 0.2
"""Seconds without accepting after the process ran out of descriptors or memory."""
_EXHAUSTED = {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM}
_LIMITS = FabricLimits(slice_bytes=1 << 20, slice_ranges=512, window_bytes=16 << 20)


class TcpFabric(NicLess):
    """A `Fabric` over TCP."""

    def __init__(
        self,
        address: str,
        *,
        advertise: str | None = None,
        stall_timeout: float = 10.0,
        handshake_timeout: float = 5.0,
        max_pending: int = 64,
        clock: Clock = time.monotonic,
        on_link_lost: Callable[[bytes], None] = lambda _: None,
        on_met: Met | None = None,
    ) -> None:
        """`address` is host:port to serve on and `advertise` what remote nodes are told; port 0 means any.

        `stall_timeout` is how long an opened link with outstanding work may stand still. A connection has
        `handshake_timeout` seconds to prove its secret, and at most `max_pending` may be about to. `clock` is
        what grants expire by. `on_link_lost` gets the ids of accepted links that end by themselves, `on_met` the
        rails on which something is carried here; without it nothing is.

        Raises ValueError for what is no host:port.
        """
        self._host, self._port = split_address(address)
        self._advertise = split_address(advertise) if advertise else (self._host, 0)
        self._stall_timeout = stall_timeout
        self._handshake_timeout = handshake_timeout
        self._grants = GrantTable(clock)
        self._pace = Pace()
        self._target = Target(self._grants, self._pace, handshake_timeout, max_pending, on_link_lost, on_met)
        self._listener: socket.socket | None = None
        self._pause: asyncio.TimerHandle | None = None
        self._links: set[TcpLink] = set()
        self._closed = False

    @property
    def kind(self) -> FabricKind:
        """See Fabric."""
        return FabricKind.TCP

    @property
    def limits(self) -> FabricLimits:
        """See Fabric."""
        return _LIMITS

    @property
    def address(self) -> str:
        """The host:port that is served on; once started, the port is the real one."""
        return join_address(self._host, self._port)

    @property
    def accepted_count(self) -> int:
        """Links of remote nodes."""
        return len(self._target)

    @property
    def grant_count(self) -> int:
        """Grants that have not been revoked and whose link is open."""
        return len(self._grants)

    @property
    def rejected_count(self) -> int:
        """Connections that were dropped because they did not prove a good secret, or because of what was carried on
        them."""
        return self._target.rejected

    async def start(self) -> None:
        """See Fabric. A host name is served on the first address that it stands for."""
        found = await asyncio.get_running_loop().getaddrinfo(self._host, self._port, type=socket.SOCK_STREAM)
        family, *_, address = found[0]
        self._listener = _listen(family, address)
        self._port = self._listener.getsockname()[1]
        self._listen_again()

    async def close(self) -> None:
        """See Fabric."""
        self._closed = True
        self._stop_listening()
        self._target.close()
        for link in list(self._links):
            await link.close()

    async def connect(self, exchange: Exchange, events: LinkEvents, rails: int = 1, subject: str = "") -> TcpLink:
        """See Fabric."""
        answer = await exchange(LinkAttributes(FabricKind.TCP, rails))
        dialled = await self._dial(answer, rails)
        one_at_a_time = asyncio.Lock()  # each attempt has a secret of its own, and the next one ends it

        async def redial() -> Dialled:
            async with one_at_a_time:
                anew = await exchange(LinkAttributes(FabricKind.TCP, 1, answer.link_id))
                if anew.link_id != answer.link_id:
                    raise LinkNotFound("The remote node answered with another link than the one to rebuild.")
                return (await self._dial(anew, 1))[0]

        link = TcpLink(dialled, redial, events, self._pace, self._stall_timeout, self._links.discard)
        self._links.add(link)
        return link

    async def _dial(self, answer: LinkAttributes, wanted: int) -> list[Dialled]:
        """Return the connections that the remote side agreed to. Raises NodeUnreachable."""
        dialled: list[Dialled] = []
        try:
            async with asyncio.timeout(self._handshake_timeout):
                await self._fill(dialled, answer, wanted)
        except BaseException as error:
            for each in dialled:
                each.sock.close()
            if isinstance(error, (OSError, ValueError)):
                raise _unreachable(answer.address, error) from error
            raise
        return dialled

    async def _fill(self, dialled: list[Dialled], answer: LinkAttributes, wanted: int) -> None:
        if answer.fabric is not FabricKind.TCP or not 1 <= answer.rails <= wanted:
            raise ValueError(f"it answered with {answer.rails} rails over {answer.fabric.value}")
        host, port = split_address(answer.address)
        while len(dialled) < answer.rails:
            dialled.append(await dial(host, port, answer.link_id, answer.secret))
        if self._closed:
            raise ConnectionError("this node's tcp fabric is closed")

    def accept(self, offer: LinkAttributes) -> LinkAttributes:
        """See Fabric."""
        if self._listener is None:
            raise FabricUnavailable("The tcp fabric of this node is not serving now. Try again later.")
        if offer.fabric is not FabricKind.TCP or offer.rails < 1:
            raise FabricUnavailable(
                f"A link over {offer.fabric.value} with {offer.rails} rails was offered to the tcp fabric. "
                "Offer tcp and at least one rail."
            )
        rails = min(offer.rails, MAX_RAILS)
        if offer.link_id:
            link_id = offer.link_id
            rails, secret = self._target.accept_again(link_id, rails)
        else:
            link_id, secret = self._target.accept(rails)
        host, port = self._advertise
        address = join_address(host, port or self._port)
        return LinkAttributes(FabricKind.TCP, rails, link_id, address, secret)

    async def hang_up(self, link_id: bytes) -> None:
        """See Fabric."""
        self._target.hang_up(link_id)

    async def grant(
        self, link_id: bytes, memory: Memory, offset: int, length: int, rights: Rights, ttl: float
    ) -> RemoteKey:
        """See Fabric."""
        return self._grants.grant(link_id, memory, offset, length, rights, ttl)

    async def revoke(self, key: RemoteKey) -> None:
        """See Fabric. Memory is only touched between two turns of the loop that ask the grant: nothing to wait for."""
        self._grants.revoke(key)

    def _acceptable(self, listener: socket.socket) -> None:
        for _ in range(_ACCEPTS_PER_TURN):
            try:
                sock, _address = listener.accept()
            except OSError as error:
                if error.errno in _EXHAUSTED:
                    self._listen_later(listener)
                return
            try:
                self._target.connected(sock)
            except OSError:  # it is gone already
                sock.close()

    def _listen_later(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        loop.remove_reader(listener)
        self._pause = loop.call_later(_ACCEPT_PAUSE, self._listen_again)

    def _listen_again(self) -> None:
        if self._listener is not None:
            asyncio.get_running_loop().add_reader(self._listener, self._acceptable, self._listener)

    def _stop_listening(self) -> None:
        if self._pause is not None:
            self._pause.cancel()
        if self._listener is not None:
            asyncio.get_running_loop().remove_reader(self._listener)
            self._listener.close()
            self._listener = None


def split_address(text: str) -> tuple[str, int]:
    """Return host and port of `host:port`; an IPv6 address is in brackets. Raises ValueError."""
    host, colon, port = text.rpartition(":")
    bare = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    if not (colon and port.isascii() and port.isdigit() and int(port) < 65536) or (bare == host and ":" in host):
        raise ValueError(f"{text[:80]!r} is no host:port")
    return bare, int(port)


def join_address(host: str, port: int) -> str:
    """Return host:port; an IPv6 address gets brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _listen(family: int, address: tuple[Any, ...]) -> socket.socket:
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(_BACKLOG)
        listener.setblocking(False)
    except OSError:
        listener.close()
        raise
    return listener


def _unreachable(address: str, error: Exception) -> NodeUnreachable:
    if isinstance(error, TimeoutError):
        cause = "it did not answer in time"
    elif isinstance(error, ConnectionError) and error.errno:
        cause = os.strerror(error.errno).lower()
    else:
        cause = str(error)
    return NodeUnreachable(
        f"The tcp fabric at {address[:80]} can't be reached: {cause}. Check that the remote daemon runs and that "
        "its tcp.advertise address is right and not blocked.",
        address=address[:80],
    )
