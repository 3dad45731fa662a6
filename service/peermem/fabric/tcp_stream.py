"""One TCP connection of the tcp fabric on the event loop: what is read next, and what waits to be sent.

Rules of this file:

* Nothing blocks, and all streams of a fabric together move at most about so many bytes and frames in one turn
  of the loop (`Pace`), beyond what is little of each: a call of the control plane takes a few turns, however many
  streams are busy. Who comes too late in a turn is first in the next one.
* `lost` is called at most once, from the event loop, never from inside `send`; not after `close`.
* `close` throws away what is still queued here and in the kernel: nothing of it goes out afterwards.
* At most one payload goes into a system call, so that a fault of memory is known to be that payload's.
"""

from __future__ import annotations

import asyncio
import errno
import socket
import struct
import time
from collections import deque
from collections.abc import Callable
from typing import Protocol

from peermem.core.errors import MalformedMessage
from peermem.core.failpoints import hit
from peermem.fabric.base import LinkEnd
from peermem.fabric.payload import MAX_BLOCKS, Block, Bytes, Payload

_TURN_BYTES = 2 << 20
"""About half a millisecond of the kernel's copying."""
_SHORT_TURN_BYTES = 256 << 10
"""A turn while somebody moves little: measured, that one's p99 is a quarter beside somebody who moves much; half of it
gains nothing more."""
LITTLE = 64 << 10
"""Bytes of a request, at most, by which somebody moves little."""
_SHORT_FOR = 0.25
"""Seconds for which turns are short after that."""
_FREE_CALLS = 3
"""System calls that each stream has in a turn whatever the others moved, for what is little."""
_LEAST = 16 << 10
"""Bytes of one system call, at least, where there are so many; so many, at most, are little."""
_FRAME_BYTES = 16 << 10
"""What the handling of one read item counts towards a turn, so that a turn of tiny frames is as short."""
_CALL_BYTES = 512 << 10
"""Bytes of one system call, at most."""
_MUCH = 256 << 10
"""Bytes of a payload that are worth a wake-up: measured here, 16 MiB take 4.5 ms instead of 7; more gains nothing."""
_LINGER_NONE = struct.pack("ii", 1, 0)
_CLOSED_BY_REMOTE = {errno.ECONNRESET, errno.EPIPE, errno.ECONNREFUSED}
_SILENT = {errno.ETIMEDOUT, errno.EHOSTUNREACH, errno.ENETUNREACH, errno.EHOSTDOWN, errno.ENETDOWN}
_OPTIONS = (
    (socket.TCP_NODELAY, 1),
    (socket.TCP_KEEPIDLE, 30),
    (socket.TCP_KEEPINTVL, 10),
    (socket.TCP_KEEPCNT, 3),
    (socket.TCP_USER_TIMEOUT, 60_000),
)
"""A host that vanished is noticed within a minute, whether or not something was on its way to it."""


class StreamOwner(Protocol):
    """Who understands what a stream carries."""

    def filled(self) -> Bytes:
        """What was to be read is there: return what comes next. Raises MalformedMessage to end the stream."""

    def turn_ended(self) -> None:
        """All that was there, or a turn's worth, has been read."""

    def lost(self, end: LinkEnd, cause: str) -> None:
        """The connection ended by itself; the stream is closed already. `cause` is a clause for people."""


class Pace:
    """What the streams that share it may still move before the loop turns. Who comes too late is called first when it
    has turned: the selector may always name the same ones first. Turns are short while somebody moves little: the
    answer to that takes some turns of the loop, each of which would wait for a large turn of others."""

    def __init__(self) -> None:
        self._short_until = 0.0
        self._left = self._turn = _TURN_BYTES
        self._renew_below = _TURN_BYTES // 2
        self._renewing = False
        self._late: dict[Callable[[], None], None] = {}
        """Who came too late, in order."""

    def request(self, total: int) -> None:
        """Somebody is about to move so many bytes."""
        if total <= LITTLE:
            self._short_until = time.monotonic() + _SHORT_FOR
            self._turn = _SHORT_TURN_BYTES
            self._left = min(self._left, self._turn)

    @property
    def is_short(self) -> bool:
        """Whether somebody moves little."""
        return time.monotonic() < self._short_until

    @property
    def call_bytes(self) -> int:
        """Of one system call, at most."""
        if self._left > self._turn // 8:  # a little beyond the turn is better than a short call more
            return min(_CALL_BYTES, self._turn)
        return max(self._left, _LEAST)

    @property
    def spent(self) -> bool:
        """Whether nothing may be moved any more in this turn."""
        return self._left <= 0

    def spend(self, count: int) -> None:
        """Some bytes were moved."""
        self._left -= count
        if self._left < self._renew_below and not self._renewing:  # what is little is moved without this
            self._renewing = True
            asyncio.get_running_loop().call_soon(self._renew)

    def came_late(self, go_on: Callable[[], None]) -> None:
        """Have `go_on` called in the next turn; nothing is left of this one."""
        self._late[go_on] = None

    def forget(self, go_on: Callable[[], None]) -> None:
        """Call it no more."""
        self._late.pop(go_on, None)

    def _renew(self) -> None:
        self._left = self._turn = _SHORT_TURN_BYTES if self.is_short else _TURN_BYTES
        self._renew_below = self._left // 2
        self._renewing = False
        for go_on in list(self._late):
            if self.spent:
                break
            if go_on in self._late:  # not forgotten meanwhile
                del self._late[go_on]
                go_on()


class Stream:
    """A connected socket, owned until `close`."""

    def __init__(
        self, sock: socket.socket, owner: StreamOwner, pace: Pace, first: Bytes, max_backlog: int | None = None
    ) -> None:
        """`sock` has been prepared. `first` is what is read first. While more than `max_backlog` blocks and ranges
        wait to be sent, nothing is read."""
        self._pace = pace
        self._much = 1
        self._loop = asyncio.get_running_loop()
        self._sock = sock
        self._owner = owner
        self._incoming = first
        self._outgoing: deque[Block | Payload] = deque()
        self._max_backlog = max_backlog
        self._backlog = 0
        self._reading = self._writing = self._in_turn = self._failed = False
        self._closed = self._held = False
        self.moved_at = self._loop.time()
        """When a byte moved last, by the loop's clock."""
        self._watch()

    def send(self, *items: Block | Payload) -> None:
        """Queue items, and send at once what the kernel takes; nothing when it is closed."""
        if self._closed:
            return
        idle = not self._outgoing
        self._outgoing.extend(items)
        for item in items:
            self._backlog += item.cost
        if idle and not self._in_turn:
            self._flush()

    def hold(self, *, on: bool) -> None:
        """Read nothing while it is on."""
        self._held = on
        self._watch()

    def close(self) -> None:
        """End the connection. Closing twice is no error."""
        if self._closed:
            return
        self._closed = True
        self._watch()
        self._pace.forget(self._readable)
        self._pace.forget(self._flush)
        self._outgoing.clear()
        self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER_NONE)
        self._sock.close()

    def _readable(self) -> None:
        self._in_turn = True
        try:
            self._read_turn()
        except BlockingIOError:
            pass
        except OSError as error:
            self._lose_soon(error)
        except MalformedMessage as error:
            self._lose(LinkEnd.BROKEN, f"the remote side sent bytes that are not of the protocol: {error.message}")
        finally:
            self._in_turn = False
        if not self._closed:
            self._expect()
            self._flush()
            self._owner.turn_ended()

    def _expect(self) -> None:
        """Be woken in the middle of a payload only when much of it is there (SO_RCVLOWAT, which epoll
        honours since Linux 2.6.28, socket(7)): a wake-up for each segment costs both ends more than the copying."""
        much = min(self._incoming.left, _MUCH) if isinstance(self._incoming, Payload) else 1
        if much != self._much:
            self._much = much
            self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, much)

    def _read_turn(self) -> None:
        calls, pace = 0, self._pace
        while not self._closed and not self._full:
            incoming = self._incoming
            if pace.spent and (calls >= _FREE_CALLS or incoming.left > _LEAST):
                pace.came_late(self._readable)
                return
            calls += 1
            count = self._receive(incoming)
            if count == 0:
                self._lose(LinkEnd.REMOTE_CLOSED, "the remote side closed the connection")
                return
            if calls == 1:
                self.moved_at = self._loop.time()
            incoming.advance(count)
            if incoming.left:
                pace.spend(count)
            else:
                pace.spend(count + _FRAME_BYTES)
                self._incoming = self._owner.filled()

    def _receive(self, into: Bytes) -> int:
        buffers = into.buffers(self._pace.call_bytes)
        hit("tcp.receive")
        try:
            if len(buffers) == 1:
                return self._sock.recv_into(buffers[0])
            return self._sock.recvmsg_into(buffers)[0]
        except OSError as error:
            if error.errno != errno.EFAULT or not isinstance(into, Payload):
                raise
            into.fail()
        return self._receive(into)

    def _flush(self) -> None:
        try:
            calls, pace = 0, self._pace
            while self._outgoing and not self._failed:
                if pace.spent and (calls >= _FREE_CALLS or not self._is_little):
                    pace.came_late(self._flush)
                    break
                calls += 1
                pace.spend(self._send_some())
        except BlockingIOError:
            pass
        except OSError as error:
            self._lose_soon(error)
        self._watch()

    @property
    def _is_little(self) -> bool:
        """Whether what waits to be sent is."""
        return len(self._outgoing) <= _FREE_CALLS and sum(item.left for item in self._outgoing) <= _LEAST

    def _send_some(self) -> int:
        buffers: list[memoryview] = []
        payload: Payload | None = None
        limit = self._pace.call_bytes
        for item in self._outgoing:
            buffers += item.buffers(limit)
            if isinstance(item, Payload):
                payload = item
                break
            if len(buffers) == MAX_BLOCKS or item.left > limit:
                break
        hit("tcp.send")
        try:
            sent = self._sock.sendmsg(buffers)
        except OSError as error:
            if error.errno != errno.EFAULT or payload is None:
                raise
            payload.fail()
            return 0
        self.moved_at = self._loop.time()
        self._dequeue(sent)
        return sent

    def _dequeue(self, sent: int) -> None:
        while sent:
            item = self._outgoing[0]
            count = min(sent, item.left)
            item.advance(count)
            sent -= count
            if item.left == 0:
                self._outgoing.popleft()
                self._backlog -= item.cost
                if isinstance(item, Payload) and item.trailer is not None:
                    self._outgoing.appendleft(Block(item.trailer(item.status)))
                    self._backlog += 1

    @property
    def _full(self) -> bool:
        return self._held or (self._max_backlog is not None and self._backlog > self._max_backlog)

    def _watch(self) -> None:
        """Ask the loop for what is of use now."""
        reading = not self._closed and not self._failed and not self._full
        if reading != self._reading:
            self._reading = reading
            if reading:
                self._loop.add_reader(self._sock, self._readable)
            else:
                self._loop.remove_reader(self._sock)
        writing = bool(self._outgoing) and not self._closed and not self._failed
        if writing != self._writing:
            self._writing = writing
            if writing:
                self._loop.add_writer(self._sock, self._flush)
            else:
                self._loop.remove_writer(self._sock)

    def _lose_soon(self, error: OSError) -> None:
        """Report an error of the socket, on the next turn of the loop: `send` may be what met it."""
        if self._failed:
            return
        self._failed = True
        if error.errno in _CLOSED_BY_REMOTE:
            end = LinkEnd.REMOTE_CLOSED
        else:
            end = LinkEnd.STALLED if error.errno in _SILENT else LinkEnd.BROKEN
        self._loop.call_soon(self._lose, end, f"the connection failed: {error.strerror}")

    def _lose(self, end: LinkEnd, cause: str) -> None:
        if not self._closed:
            self.close()
            self._owner.lost(end, cause)


def prepare(sock: socket.socket) -> None:
    """Set a TCP socket's options. Buffer sizes are left to the kernel, which measures."""
    sock.setblocking(False)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in _OPTIONS:
        sock.setsockopt(socket.IPPROTO_TCP, option, value)
