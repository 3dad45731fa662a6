"""The target's end of the tcp fabric: connections that become rails of accepted links and serve requests.

Rules of this file:

* A connection is nobody's until its hello proves that it knows the secret of a link that was accepted and still wants
  rails (`tcp_proof`). What shows anything else, or nothing in time, is dropped without an answer, and counted; so is a
  rail on which something forged is carried.
* A request is checked against its grant before its payload is touched, and its grant is asked again before
  every system call: so revocation needs no waiting, and a process that was stopped past a grant's expiry
  moves nothing late.
* A link of which the last rail ends is over, with its grants. One that lost a rail may be asked to take another; the
  one on which nothing has moved for longest gives way, since this side may not know yet which one broke.
"""

from __future__ import annotations

import asyncio
import hmac
import secrets
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import structlog

from peermem.core.errors import LinkNotFound, MalformedMessage
from peermem.core.failpoints import chosen
from peermem.core.types import Rights
from peermem.fabric import frames, tcp_proof
from peermem.fabric.base import LinkEnd, Met, Opcode, Status
from peermem.fabric.grants import Grant, GrantTable
from peermem.fabric.payload import Block, Bytes, Payload
from peermem.fabric.tcp_proof import Proofs, Seal
from peermem.fabric.tcp_stream import Pace, Stream, prepare

log = structlog.get_logger(__name__)

_CONNECT_TIME = 2
"""Handshake timeouts from `accept` until all rails must be there."""
_MAX_BACKLOG = 8192
"""Answers and ranges of answers that may wait on one rail before it takes no more requests; of what is carried, each
256 bytes count as one."""
_RIGHTS = {Opcode.READ: Rights.READ, Opcode.WRITE: Rights.WRITE}


@dataclass(slots=True, eq=False)
class _AcceptedLink:
    link_id: bytes = field(repr=False)
    secret: bytes = field(repr=False)
    rail_limit: int
    wanted: int
    """Rails that may still connect."""
    timer: asyncio.TimerHandle
    """Until when they have to."""
    rails: list[_Rail] = field(default_factory=list)

    def want_no_more(self) -> None:
        """What was to connect did not come in time."""
        self.wanted = 0


class Target:
    """Accepted links of one fabric and the connections that want to be theirs."""

    def __init__(
        self,
        grants: GrantTable,
        pace: Pace,
        handshake_timeout: float,
        max_pending: int,
        on_link_lost: Callable[[bytes], None],
        on_met: Met | None,
    ) -> None:
        """`on_link_lost` is told of links that end by themselves, after their grants ended, `on_met` of rails on which
        something is carried here."""
        self.rejected = 0
        """Connections dropped before they belonged to a link, or because of what was carried on them."""
        self.on_met = on_met
        self._grants = grants
        self._pace = pace
        self._handshake_timeout = handshake_timeout
        self._max_pending = max_pending
        self._on_link_lost = on_link_lost
        self._links: dict[bytes, _AcceptedLink] = {}
        self._pending: dict[_Rail, asyncio.TimerHandle] = {}

    def __len__(self) -> int:
        return len(self._links)

    def accept(self, rails: int) -> tuple[bytes, bytes]:
        """Make ready for a link; return its id and the secret that each of its rails has to know."""
        link_id, secret = secrets.token_bytes(16), secrets.token_bytes(32)
        timer = asyncio.get_running_loop().call_later(_CONNECT_TIME * self._handshake_timeout, self._lose, link_id)
        self._links[link_id] = _AcceptedLink(link_id, secret, rails, rails, timer)
        self._grants.open_link(link_id)
        return link_id, secret

    def accept_again(self, link_id: bytes, rails: int) -> tuple[int, bytes]:
        """Make ready for more rails of a link, instead of broken ones; return how many, and the secret that each has
        to show. Raises LinkNotFound."""
        link = self._links.get(link_id)
        if link is None or not link.rails:
            raise LinkNotFound("The link to rebuild is not open here (any more). Open a new one.")
        link.timer.cancel()
        link.timer = asyncio.get_running_loop().call_later(_CONNECT_TIME * self._handshake_timeout, link.want_no_more)
        link.wanted = min(rails, link.rail_limit)
        link.secret = secrets.token_bytes(32)
        return link.wanted, link.secret

    def hang_up(self, link_id: bytes) -> None:
        """End a link, its grants and its rails. Unknown ids are no error."""
        link = self._links.pop(link_id, None)
        if link is None:
            return
        link.timer.cancel()
        self._grants.close_link(link_id)
        for rail in link.rails:
            rail.close()

    def close(self) -> None:
        """End all links and drop all connections."""
        for link_id in list(self._links):
            self.hang_up(link_id)
        for rail in list(self._pending):
            self._drop(rail)

    def connected(self, sock: socket.socket) -> None:
        """A connection came in; it may wait for its hello. The one that waits longest gives way to too many.

        Raises OSError when it is gone already; it is the caller's then.
        """
        prepare(sock)
        if len(self._pending) >= self._max_pending:
            self._reject(next(iter(self._pending)))
        rail = _Rail(self, self._grants, sock, self._pace)
        rail.greet()
        self._pending[rail] = asyncio.get_running_loop().call_later(self._handshake_timeout, self._reject, rail)

    def admit(self, rail: _Rail, greeting: bytes, hello: tcp_proof.Hello) -> Proofs | None:
        """Let the hello's sender join its link, and return what its secret proves there; None when it may not."""
        link = self._links.get(hello.link_id)
        proofs = Proofs(link.secret if link is not None else bytes(32), hello.link_id, greeting, hello.nonce)
        if not hmac.compare_digest(hello.proof, proofs.hello) or link is None or link.wanted == 0:
            return None
        self._pending.pop(rail).cancel()
        if len(link.rails) == link.rail_limit:
            oldest = min(link.rails, key=_moved_at)
            link.rails.remove(oldest)
            oldest.close()
        link.rails.append(rail)
        link.wanted -= 1
        if link.wanted == 0:
            link.timer.cancel()
        return proofs

    def rail_lost(self, rail: _Rail, end: LinkEnd, cause: str) -> None:
        """A connection ended by itself."""
        if rail in self._pending:
            self._reject(rail)
            return
        if end is LinkEnd.BROKEN:
            log.warning("rail_broken", remote=rail.remote, cause=cause)
            self.rejected += 1
        link = self._links.get(rail.link_id)
        if link is not None and rail in link.rails:
            link.rails.remove(rail)
            if not link.rails:
                self._lose(rail.link_id)

    def _reject(self, rail: _Rail) -> None:
        self.rejected += 1
        self._drop(rail)

    def _drop(self, rail: _Rail) -> None:
        self._pending.pop(rail).cancel()
        rail.close()

    def _lose(self, link_id: bytes) -> None:
        if link_id in self._links:
            self.hang_up(link_id)
            self._on_link_lost(link_id)


class _Rail:
    """One incoming connection; a `StreamOwner` and an `Asker`. `_next` is what to do with what is being read."""

    def __init__(self, target: Target, grants: GrantTable, sock: socket.socket, pace: Pace) -> None:
        """Raises OSError when the connection is gone already."""
        self.link_id = b""
        self.remote = _name_of(sock)
        self._target = target
        self._grants = grants
        self._block = Block(bytearray(tcp_proof.HELLO_SIZE))
        self._head = Block(bytearray(frames.HEAD_SIZE))
        self._next: Callable[[], Bytes] = self._on_hello
        self._pace = pace
        self._greeting = tcp_proof.fresh_nonce()
        self._questions: Seal
        self._answers: Seal
        self._take: Callable[[bytes], None] | None = None
        """Takes what is carried here, once something is."""
        self._stream = Stream(sock, self, pace, self._block, _MAX_BACKLOG)

    @property
    def moved_at(self) -> float:
        """When a byte moved last, by the loop's clock."""
        return self._stream.moved_at

    def greet(self) -> None:
        """Say what the hello has to be made of."""
        self._stream.send(Block(tcp_proof.encode_greeting(self._greeting)))

    def close(self) -> None:
        self._stream.close()

    def filled(self) -> Bytes:
        """See StreamOwner."""
        return self._next()

    def turn_ended(self) -> None:
        """See StreamOwner."""

    def lost(self, end: LinkEnd, cause: str) -> None:
        """See StreamOwner."""
        self._target.rail_lost(self, end, cause)

    def answer(self, message: bytes) -> None:
        """See Asker."""
        head = frames.answer_head(len(message))
        self._stream.send(Block(b"".join((head, self._answers.mac(head, message), message))))

    def hold(self, *, on: bool) -> None:
        """See Asker."""
        self._stream.hold(on=on)

    def _on_hello(self) -> Bytes:
        hello = tcp_proof.decode_hello(self._block.data)
        proofs = self._target.admit(self, self._greeting, hello)
        if proofs is None:
            raise MalformedMessage("The hello shows no link that wants this connection.")
        self.link_id = hello.link_id
        self._questions, self._answers = proofs.questions(), proofs.answers()
        self._stream.send(Block(tcp_proof.encode_welcome(proofs.welcome)))
        return self._await_head()

    def _await_head(self) -> Bytes:
        self._next = self._on_head
        return self._head.reset()

    def _on_head(self) -> Bytes:
        head = frames.decode_head(self._head.data)
        if isinstance(head, frames.Carried):
            return self._hear(head)
        self._pace.request(head.total)
        first = frames.first_range(self._head.data)
        if head.count == 1:
            return self._serve(head, first)
        rest = Block(bytearray(frames.RANGE_SIZE * (head.count - 1)))
        self._next = lambda: self._serve(head, first + rest.data)
        return rest

    def _hear(self, carried: frames.Carried) -> Bytes:
        message = Block(bytearray(carried.length))

        def received() -> Bytes:
            self._questions.check(carried.mac, carried.head, message.data)
            if self._take is None:
                if self._target.on_met is None:
                    raise MalformedMessage("Nobody here takes messages.")
                self._take = self._target.on_met(self)
            self._take(bytes(message.data))
            return self._await_head()

        self._next = received
        return message

    def _serve(self, head: frames.RequestHead, ranges: bytes | bytearray) -> Bytes:
        offsets, lengths = frames.decode_ranges(ranges)
        verdict = self._judge(head, offsets, lengths)
        reading = head.opcode is Opcode.READ
        if isinstance(verdict, Status):
            payload = Payload(None, offsets, lengths, head.total, incoming=not reading, fault=verdict)
        else:
            payload = Payload(
                verdict.memory,
                offsets,
                lengths,
                head.total,
                base=verdict.offset,
                incoming=not reading,
                fault=Status.REM_OP_ERR,
                usable=verdict.usable,
                trailer=partial(frames.encode_ack, head.wr_id) if reading else None,
            )
        return self._answer_read(head, payload) if reading else self._receive(head, payload)

    def _judge(self, head: frames.RequestHead, offsets: Sequence[int], lengths: Sequence[int]) -> Grant | Status:
        """Return the grant that allows the request, or why none does."""
        if min(lengths) == 0 or sum(lengths) != head.total:
            return Status.REM_INV_REQ_ERR
        grant = self._grants.find(self.link_id, head.rkey, _RIGHTS[head.opcode], offsets, lengths)
        return grant or Status.REM_ACCESS_ERR

    def _answer_read(self, head: frames.RequestHead, payload: Payload) -> Bytes:
        if payload.status is Status.SUCCESS:
            self._stream.send(Block(frames.encode_data(head.wr_id, head.total)), payload)
        else:
            self._stream.send(Block(frames.encode_ack(head.wr_id, payload.status)))
        return self._await_head()

    def _receive(self, head: frames.RequestHead, payload: Payload) -> Bytes:
        def received() -> Bytes:
            if chosen("tcp.corrupt"):
                payload.spoil()
            self._stream.send(Block(frames.encode_ack(head.wr_id, payload.status)))
            return self._await_head()

        self._next = received
        return payload if payload.left else received()


def _name_of(sock: socket.socket) -> str:
    """Return the other end as gRPC names it."""
    host, port = sock.getpeername()[:2]
    return f"ipv6:[{host}]:{port}" if sock.family == socket.AF_INET6 else f"ipv4:{host}:{port}"


def _moved_at(rail: _Rail) -> float:
    return rail.moved_at
