"""The initiator's end of the tcp fabric: dialling, and a link that posts requests on its rails.

Rules of this file:

* The serving end proves first that it knows the link's secret.
* Responses come in the order of the requests of their rail; anything else breaks the link.
* A WRITE is answered when its payload has gone out, not earlier, so a completed request's memory is free.
* When a rail breaks its requests are flushed, and the link goes on with the others. The rail is brought up again after
  a pause, which grows while it keeps breaking. When the last one breaks the link goes down: `down` is called, once.
* A rail on which nothing moves for the stall timeout, while it has work, is broken.
"""

from __future__ import annotations

import asyncio
import random
import socket
from collections import deque
from collections.abc import Awaitable, Callable, Iterable
from typing import NamedTuple

from peermem.core.errors import LinkNotFound, MalformedMessage, PeermemError, StaleEpoch
from peermem.core.failpoints import chosen, reach
from peermem.core.retries import RailHealth
from peermem.fabric import frames, tcp_proof
from peermem.fabric.base import CARRIED, Completion, LinkClosed, LinkEnd, LinkEvents, Opcode, Status, WorkRequest
from peermem.fabric.grants import inside
from peermem.fabric.payload import Block, Bytes, Payload
from peermem.fabric.tcp_proof import MAC_SIZE, Proofs
from peermem.fabric.tcp_stream import LITTLE, Pace, Stream, prepare
from peermem.memory import Memory


class Dialled(NamedTuple):
    """A connection whose hello was welcomed, and what both ends prove on it."""

    sock: socket.socket
    proofs: Proofs


async def dial(host: str, port: int, link_id: bytes, secret: bytes) -> Dialled:
    """Return a new rail of a link. Raises OSError."""
    await reach("tcp.dial")
    loop = asyncio.get_running_loop()
    failure: OSError = OSError(f"{host} has no address")
    for family, kind, protocol, _, address in await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM):
        sock = socket.socket(family, kind, protocol)
        try:
            prepare(sock)
            await loop.sock_connect(sock, address)
            return Dialled(sock, await _say_hello(sock, link_id, secret))
        except OSError as error:
            sock.close()
            failure = error
        except BaseException:
            sock.close()
            raise
    raise failure


async def _say_hello(sock: socket.socket, link_id: bytes, secret: bytes) -> Proofs:
    try:
        greeting = tcp_proof.decode_greeting(await _receive(sock, tcp_proof.GREETING_SIZE))
        nonce = tcp_proof.fresh_nonce()
        proofs = Proofs(secret, link_id, greeting, nonce)
        hello = tcp_proof.encode_hello(tcp_proof.Hello(link_id, nonce, proofs.hello))
        await asyncio.get_running_loop().sock_sendall(sock, hello)
        tcp_proof.check_welcome(await _receive(sock, tcp_proof.WELCOME_SIZE), proofs)
    except MalformedMessage as error:
        raise ConnectionError(error.message) from None
    return proofs


async def _receive(sock: socket.socket, size: int) -> bytes:
    answer = b""
    while len(answer) < size:
        piece = await asyncio.get_running_loop().sock_recv(sock, size - len(answer))
        if not piece:
            raise ConnectionError("it ended the connection instead of a welcome")
        answer += piece
    return answer


class TcpLink:
    """A `Link` over one or more connections, to which it is bound until it is closed or down."""

    def __init__(
        self,
        dialled: Iterable[Dialled],
        redial: Callable[[], Awaitable[Dialled]],
        events: LinkEvents,
        pace: Pace,
        stall_timeout: float,
        on_end: Callable[[TcpLink], None],
    ) -> None:
        """`redial` connects one more rail of this link; it raises OSError and PeermemError."""
        self._loop = asyncio.get_running_loop()
        self._redial = redial
        self._events = events
        self._pace = pace
        self._on_end = on_end
        self._stall_timeout = stall_timeout
        self._watchdog: asyncio.TimerHandle | None = None
        self._finished: list[Completion] = []
        self._rails: list[_Rail] = []
        self._resting: dict[RailHealth, asyncio.Task[None]] = {}
        """Rails that are down, and what brings them up again."""
        self._closed = False
        for each in dialled:
            self._begin(each, RailHealth())

    @property
    def packet(self) -> int:
        """See Link."""
        return 0

    @property
    def rails_down(self) -> int:
        """See Link."""
        return len(self._resting)

    async def prepare(self, memory: Memory, offset: int, length: int) -> None:
        """See Link. The CPU reaches all memory as it is."""

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

    def carry(self, message: bytes) -> bool:
        """See Link."""
        if self._closed or len(message) > CARRIED:
            return False
        min(self._rails, key=_load).carry(message)
        return True

    def heard(self, message: bytes) -> None:
        """The far end's daemon answers. Raises MalformedMessage."""
        self._events.heard(message)

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

    def rail_lost(self, rail: _Rail, end: LinkEnd, cause: str) -> None:
        """A rail can't go on; nor can the link, if it was the last one."""
        if self._closed:
            return
        if self._rails == [rail]:
            self._go_down(end, cause)
            return
        self._rails.remove(rail)
        rail.flush()
        self.report()
        self._rest(rail.health, cause)

    def _go_down(self, end: LinkEnd, cause: str) -> None:
        self._end()
        self._events.down(end, cause)

    def _end(self) -> None:
        self._closed = True
        self._on_end(self)
        if self._watchdog is not None:
            self._watchdog.cancel()
        resting, self._resting = self._resting, {}
        for task in resting.values():
            task.cancel()
        for rail in self._rails:
            rail.flush()
        self.report()

    def _begin(self, dialled: Dialled, health: RailHealth) -> None:
        health.came_up(self._loop.time())
        self._rails.append(_Rail(self, dialled, self._pace, health))

    def _rest(self, health: RailHealth, cause: str) -> None:
        """Leave a rail alone for its pause, then bring it up again."""
        pause = health.failed(self._loop.time(), random.random())
        self._events.rail_down(cause, pause)
        self._resting[health] = self._loop.create_task(self._bring_up(health, pause))

    async def _bring_up(self, health: RailHealth, pause: float) -> None:
        await asyncio.sleep(pause)
        try:
            dialled = await self._redial()
        except (LinkNotFound, StaleEpoch):
            del self._resting[health]
            self._go_down(LinkEnd.REMOTE_CLOSED, "the remote node does not have the link any more")
        except (OSError, PeermemError) as error:
            self._rest(health, f"it could not be brought up again: {error}")
        else:
            del self._resting[health]
            self._begin(dialled, health)
            self._events.rail_up()

    def _look(self) -> None:
        """Find rails on which nothing has moved for too long, while they have work."""
        self._watchdog = None
        now = self._loop.time()
        for rail in [rail for rail in self._rails if rail.load]:
            if rail.stream.moved_at + self._stall_timeout <= now:
                self.rail_lost(rail, LinkEnd.STALLED, f"nothing moved for {self._stall_timeout:g} s")
        busy = [rail.stream.moved_at for rail in self._rails if rail.load]
        if busy and not self._closed:
            self._watchdog = self._loop.call_later(min(busy) + self._stall_timeout - now, self._look)


class _Rail:
    """One connection of a link; a `StreamOwner`."""

    def __init__(self, link: TcpLink, dialled: Dialled, pace: Pace, health: RailHealth) -> None:
        self.health = health
        self.load = 0
        """Bytes of requests that have not ended."""
        self._link = link
        self._loop = asyncio.get_running_loop()
        self._pending: deque[tuple[WorkRequest, Payload]] = deque()
        self._pace = pace
        self._response = Block(bytearray(frames.RESPONSE_SIZE))
        self._receiving_data = False
        self._hearing: tuple[frames.Carried, Block] | None = None
        """What is carried here, its MAC in front, while it is read."""
        self._questions, self._answers = dialled.proofs.questions(), dialled.proofs.answers()
        self.stream = Stream(dialled.sock, self, pace, self._response)

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

    def carry(self, message: bytes) -> None:
        head = frames.question_head(len(message))
        self.stream.send(Block(b"".join((head, self._questions.mac(head, message), message))))

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
        if self._hearing is not None:
            return self._heard(*self._hearing)
        response = frames.decode_response(self._response.data)
        self._response.reset()
        if isinstance(response, frames.Carried):
            message = Block(bytearray(MAC_SIZE + response.length))
            self._hearing = response, message
            return message
        return self._answered(response)

    def _heard(self, carried: frames.Carried, block: Block) -> Bytes:
        self._hearing = None
        mac, message = block.data[:MAC_SIZE], bytes(block.data[MAC_SIZE:])
        self._answers.check(mac, carried.head, message)
        self._link.heard(message)
        return self._response

    def _answered(self, response: frames.Response) -> Bytes:
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
        if request.opcode is Opcode.READ and chosen("tcp.corrupt"):
            payload.spoil()
        self._link.finish(Completion(request.wr_id, status))
        return self._response

    def turn_ended(self) -> None:
        """See StreamOwner."""
        self._link.report()

    def lost(self, end: LinkEnd, cause: str) -> None:
        """See StreamOwner."""
        self._link.rail_lost(self, end, cause)


def _load(rail: _Rail) -> int:
    return rail.load
