"""The initiator's end of the tcp fabric: dialling, and a link that posts requests on its rails.

Rules of this file:

* Responses come in the order of the requests of their rail; anything else breaks the link.
* A WRITE is answered when its payload has gone out, not earlier, so a completed request's memory is free.
* When one rail breaks the link goes down: all its requests are flushed, then `down` is called, once.
"""

from __future__ import annotations

import asyncio
import socket
from collections import deque
from collections.abc import Callable

from peermem.core.errors import MalformedMessage
from peermem.fabric import frames
from peermem.fabric.base import Completion, LinkClosed, LinkEnd, LinkEvents, Opcode, Status, WorkRequest
from peermem.fabric.grants import inside
from peermem.fabric.payload import Block, Bytes, Payload
from peermem.fabric.tcp_stream import LITTLE, Pace, Stream, prepare


async def dial(host: str, port: int, hello: bytes) -> socket.socket:
    """Return a connection whose hello was welcomed. Raises OSError."""
    loop = asyncio.get_running_loop()
    failure: OSError = OSError(f"{host} has no address")
    for family, kind, protocol, _, address in await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM):
        sock = socket.socket(family, kind, protocol)
        try:
            prepare(sock)
            await loop.sock_connect(sock, address)
            await _say_hello(sock, hello)
            return sock
        except OSError as error:
            sock.close()
            failure = error
        except BaseException:
            sock.close()
            raise
    raise failure


async def _say_hello(sock: socket.socket, hello: bytes) -> None:
    loop = asyncio.get_running_loop()
    await loop.sock_sendall(sock, hello)
    answer = b""
    while len(answer) < len(frames.WELCOME):
        piece = await loop.sock_recv(sock, len(frames.WELCOME) - len(answer))
        if not piece:
            raise ConnectionError("it ended the connection instead of a welcome")
        answer += piece
    if answer != frames.WELCOME:
        raise ConnectionError("what answers there is no tcp fabric of peermem")


class TcpLink:
    """A `Link` over one or more connections, to which it is bound until it is closed or down."""

    def __init__(
        self,
        socks: list[socket.socket],
        events: LinkEvents,
        pace: Pace,
        stall_timeout: float,
        on_end: Callable[[TcpLink], None],
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._events = events
        self._on_end = on_end
        self._stall_timeout = stall_timeout
        self._watchdog: asyncio.TimerHandle | None = None
        self._finished: list[Completion] = []
        self._pace = pace
        self._rails = [_Rail(self, sock, pace) for sock in socks]
        self._closed = False

    @property
    def packet(self) -> int:
        """See Link."""
        return 0

    def post(self, request: WorkRequest) -> None:
        """See Link. Raises ValueError for what no frame can carry, such as more than `frames.MAX_TOTAL` bytes."""
        if self._closed:
            raise LinkClosed
        ranges = request.ranges
        if not inside(ranges.local, ranges.lengths, request.memory.length):
            self.finish(Completion(request.wr_id, Status.LOC_PROT_ERR))
            self._loop.call_soon(self.report)
            return
        rails = self._rails
        if ranges.total > LITTLE and self._pace.is_short and len(rails) > 1:
            rails = rails[:-1]  # the last one is kept free for what is little
        min(rails, key=_load).post(request)
        if self._watchdog is None:
            self._watchdog = self._loop.call_later(self._stall_timeout, self._look)

    async def close(self) -> None:
        """See Link."""
        if not self._closed:
            self._end()

    def finish(self, completion: Completion) -> None:
        """A request ended; it is told of by the next `report`."""
        self._finished.append(completion)

    def report(self) -> None:
        """Tell what has ended."""
        if self._finished:
            finished, self._finished = self._finished, []
            self._events.completed(finished)

    def go_down(self, end: LinkEnd, cause: str) -> None:
        """End the link, because it can't go on."""
        if not self._closed:
            self._end()
            self._events.down(end, cause)

    def _end(self) -> None:
        self._closed = True
        self._on_end(self)
        if self._watchdog is not None:
            self._watchdog.cancel()
        for rail in self._rails:
            rail.flush()
        self.report()

    def _look(self) -> None:
        """Find a rail on which nothing has moved for too long, while it has work."""
        busy = [rail.stream.moved_at for rail in self._rails if rail.load]
        oldest = min(busy, default=None)
        self._watchdog = None
        if oldest is None:
            return
        left = oldest + self._stall_timeout - self._loop.time()
        if left <= 0:
            self.go_down(LinkEnd.STALLED, f"nothing moved for {self._stall_timeout:g} s")
        else:
            self._watchdog = self._loop.call_later(left, self._look)


class _Rail:
    """One connection of a link; a `StreamOwner`."""

    def __init__(self, link: TcpLink, sock: socket.socket, pace: Pace) -> None:
        self.load = 0
        """Bytes of requests that have not ended."""
        self._link = link
        self._loop = asyncio.get_running_loop()
        self._pending: deque[tuple[WorkRequest, Payload]] = deque()
        self._pace = pace
        self._response = Block(bytearray(frames.RESPONSE_SIZE))
        self._receiving_data = False
        self.stream = Stream(sock, self, pace, self._response)

    def post(self, request: WorkRequest) -> None:
        ranges = request.ranges
        self._pace.request(ranges.total)
        head = frames.RequestHead(request.opcode, len(ranges.lengths), request.wr_id, request.key.rkey, ranges.total)
        frame = Block(frames.encode_request(head, ranges.remote, ranges.lengths))
        reading = request.opcode is Opcode.READ
        payload = Payload(
            request.memory, ranges.local, ranges.lengths, ranges.total, incoming=reading, fault=Status.LOC_PROT_ERR
        )
        if not self._pending:
            self.stream.moved_at = self._loop.time()
        self._pending.append((request, payload))
        self.load += ranges.total
        if reading:
            self.stream.send(frame)
        else:
            self.stream.send(frame, payload)

    def flush(self) -> None:
        """Close the connection, then give up all requests."""
        self.stream.close()
        self.load = 0
        while self._pending:
            request, _ = self._pending.popleft()
            self._link.finish(Completion(request.wr_id, Status.WR_FLUSH_ERR))

    def filled(self) -> Bytes:
        """See StreamOwner."""
        if self._receiving_data:
            self._receiving_data = False
            return self._response.reset()
        response = frames.decode_response(self._response.data)
        self._response.reset()
        if not self._pending or self._pending[0][0].wr_id != response.wr_id:
            raise MalformedMessage("A response is to no request, or out of turn.")
        request, payload = self._pending[0]
        if response.length is not None:
            if request.opcode is not Opcode.READ or not response.length == payload.left == request.ranges.total:
                raise MalformedMessage("Data came that was not asked for.")
            self._receiving_data = True
            return payload
        if payload.left and (request.opcode is Opcode.WRITE or response.status is Status.SUCCESS):
            raise MalformedMessage("A request was answered before its payload had gone through.")
        self._pending.popleft()
        self.load -= request.ranges.total
        status = response.status if payload.status is Status.SUCCESS else payload.status
        self._link.finish(Completion(request.wr_id, status))
        return self._response

    def turn_ended(self) -> None:
        """See StreamOwner."""
        self._link.report()

    def lost(self, end: LinkEnd, cause: str) -> None:
        """See StreamOwner."""
        self._link.go_down(end, cause)


def _load(rail: _Rail) -> int:
    return rail.load
