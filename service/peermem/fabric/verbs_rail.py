"""One end of a rail: a queue pair with its completion queue, its accounts, and the words that both ends exchange.

Rules of this file:

* What is posted is answered once: by its completion, or with WR_FLUSH_ERR when the rail breaks. A rail breaks as a
  whole, with the first failed completion, and is reset at once: after that nothing of it moves.
* The last work request of each post is signalled; a post takes no more slots than are free.
* An end says words of 32 bits, in messages without payload, which the connection keeps in order with everything
  else: so an ANSWER to an ASK proves that all that was posted before it has been executed or refused.
* A remote node can break its own rail and no other: what it floods is bounded, what it invents is ignored.
"""

from __future__ import annotations

import asyncio
import errno
import secrets
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import NamedTuple, Protocol

from peermem.core.gid import Gid
from peermem.core.types import QueuePair
from peermem.fabric import verbs
from peermem.fabric.verbs_domains import HeldDomain
from peermem.fabric.verbs_nic import Port
from peermem.fabric.verbs_poll import SMALL, Poller
from peermem.fabric.verbs_qp import QueuePair as Pair
from peermem.fabric.verbs_types import Access, Path, Piece, Settings, VerbsError, WcStatus, Word, WrOpcode

Done = Callable[[int], None]
"""Gets the WcStatus of a post."""

_RECEIVES = 32
"""Words that may come in before this end has looked."""
_WORDS = 32
"""Slots of the send queue that are kept for words."""
_MAX_WAITING_WORDS = 64
_RECEIVE = 0xFFFFFFFF
"""Number of all receives; posts count from 0 on."""
_FENCE = 1  # IBV_SEND_FENCE: after this end's READs
_MAX_WORDS_PER_SECOND = 10_000
_SUCCESS = int(WcStatus.SUCCESS)


class _Post(NamedTuple):
    wr_id: int
    slots: int
    """Of work requests; 0 for a word."""
    size: int
    at: float
    done: Done


_NOBODY = QueuePair("", 0, 0, b"", 0, 0, 0)


class RailOwner(Protocol):
    """What a rail tells its link; never from inside a call of the link's."""

    def heard(self, rail: Rail, word: Word) -> None:
        """The other end said something that shows that it is there, or BYE."""

    def broke(self, rail: Rail, status: int) -> None:
        """The rail is reset; all that was posted has been answered."""

    def turned(self, rail: Rail) -> None:
        """Some completions have been handled."""


class Rail:
    """A queue pair of a link. It begins down; `offer` and `connect` bring it up."""

    def __init__(self, port: Port, gid: Gid, domain: HeldDomain, owner: RailOwner, settings: Settings) -> None:
        """`domain` stays the caller's to release, after `close`. Raises VerbsError."""
        self.port, self.domain = port, domain
        self.up = self.is_heard = self.is_lost = self._closed = False
        """Whether it can be posted on; whether the other end has said something since; whether its NIC is gone."""
        self.posts: deque[_Post] = deque()
        """What was posted and has not been answered."""
        self.load = 0
        """Its bytes."""
        self.mtu = self.least_mtu = 0
        """Bytes of payload of one packet, as last connected; and with less than which it does not come up."""
        self._gid = gid
        self._owner = owner
        self._settings = settings
        self._loop = asyncio.get_running_loop()
        self._depth = max(1, min(settings.depth, port.nic.caps.max_wr - _WORDS))
        self.free = self._depth
        """Work requests that can be posted now."""
        self._queue = verbs.CompletionQueue(port.nic.device, self._depth + _WORDS + 2 * _RECEIVES)
        try:
            self._pair = Pair(domain, self._queue, self._depth + _WORDS, _RECEIVES, settings.extended)
        except VerbsError:
            self._queue.close()
            raise
        self._generation = self._sequence = 0
        self._words: deque[tuple[int, int, Done]] = deque()
        self._word_slots = _WORDS
        self._asked: dict[int, asyncio.Future[bool]] = {}
        self._ends = _NOBODY, _NOBODY
        self._second, self._words_heard = 0.0, 0
        self._poller = Poller(self._queue, self)

    @property
    def here(self) -> QueuePair:
        """This end, as last offered."""
        return self._ends[0]

    @property
    def there(self) -> QueuePair:
        """The other end, as last connected."""
        return self._ends[1]

    def offer(self, is_accepting: bool) -> QueuePair:
        """Reset, take a new random PSN, and return this end as the other one has to know it. Only an accepting end
        can be written and read. Raises VerbsError."""
        self.reset()
        port = self.port
        if self.is_lost:
            raise VerbsError(f"{port.name} is gone", errno.ENODEV)
        self._gid = port.gid_for(self.there.gid or None) or self._gid
        psn = self.here.psn
        while psn == self.here.psn:
            psn = secrets.randbits(24)
        access = Access.LOCAL_WRITE
        if is_accepting:
            access |= Access.REMOTE_READ | Access.REMOTE_WRITE
        self._pair.prepare(port.number, access)
        self._pair.post_receives(self._generation << 32 | _RECEIVE, _RECEIVES)
        mtu = min(port.state.mtu, self._settings.mtu)
        reads = max(1, min(port.nic.caps.reads_served, 255))
        here = QueuePair(port.name, self._pair.number, psn, self._gid.value, port.state.lid, mtu, reads)
        self._ends = here, self.there
        return here

    def connect(self, there: QueuePair) -> None:
        """Come up towards the other end, which is sound. Raises VerbsError."""
        here, port = self.here, self.port
        mtu, marks = min(here.mtu, there.mtu), self._settings.marks
        if mtu < self.least_mtu:
            raise VerbsError(f"packets of {mtu} bytes are too small: work is planned by {self.least_mtu}", errno.EINVAL)
        path = Path(port.number, self._gid.index, there.gid, there.lid, port.state.ethernet, mtu, marks)
        reads = here.reads, max(1, min(there.reads, port.nic.caps.reads_sent, 255))
        self._pair.connect(path, there.number, (here.psn, there.psn), reads, self._settings.timing)
        self._ends = here, there
        self.mtu = mtu
        self.up = True
        self._loop.call_soon(self._poller.sleep)

    def post(self, opcode: WrOpcode, pieces: Sequence[Piece], size: int, done: Done) -> None:
        """Post WRITEs or READs of `size` bytes in all, no more than `free`; the rail is up."""
        try:  # not `_takes`: this is called most
            self._pair.move(opcode, pieces, self._generation << 32 | self._sequence)
        except VerbsError:
            self._not_taken(done)
            return
        slots = len(pieces)
        self.free -= slots
        self.load += size
        self._taken(slots, size, done)

    def bind(
        self, window: verbs.Window, region: verbs.MemoryRegion, address: int, length: int, access: Access, done: Done
    ) -> None:
        """Post the bind of a window to a range of a region; `free` is not 0 and the rail is up."""
        if self._takes(done, self._pair.bind, window, region, address, length, access):
            self.free -= 1
            self._taken(1, 0, done)

    def say(self, word: Word, number: int = 0, done: Done = lambda _: None) -> None:
        """Send a word, now or when there is room; never when the rail is down."""
        if not self.up:
            self._loop.call_soon(done, WcStatus.WR_FLUSH_ERR)
            return
        self._words.append((word << 24 | number, _FENCE if word is Word.ANSWER else 0, done))
        self._send_words()

    async def ask(self, timeout: float) -> bool:
        """Return whether the other end answers in time; by then it has no more of what it posted before."""
        if not self.up:
            return False
        number = secrets.randbits(24)
        while number in self._asked:
            number = secrets.randbits(24)
        answered: asyncio.Future[bool] = self._loop.create_future()
        self._asked[number] = answered
        self.say(Word.ASK, number)
        try:
            async with asyncio.timeout(timeout):
                return await answered
        except TimeoutError:
            return False
        finally:
            self._asked.pop(number, None)

    async def farewell(self, timeout: float) -> None:
        """Tell the other end that this one is closed, if it can be told in time."""
        told: asyncio.Future[None] = self._loop.create_future()
        self.say(Word.BYE, 0, lambda _: None if told.done() else told.set_result(None))
        await asyncio.wait([told], timeout=timeout)

    def _takes(self, done: Done, post: Callable[..., None], *arguments: object) -> bool:
        """Post under the next number; what the queue pair does not take breaks it."""
        try:
            post(*arguments, self._generation << 32 | self._sequence)
            return True
        except VerbsError:
            self._not_taken(done)
            return False

    def _not_taken(self, done: Done) -> None:
        self._loop.call_soon(done, WcStatus.WR_FLUSH_ERR)
        self._loop.call_soon(self._break, WcStatus.LOC_QP_OP_ERR)

    def _taken(self, slots: int, size: int, done: Done) -> None:
        wr_id, now = self._generation << 32 | self._sequence, self._loop.time()
        self.posts.append(_Post(wr_id, slots, size, now, done))
        self._sequence = (self._sequence + 1) % _RECEIVE
        if self.load <= SMALL or size == 0:
            self._poller.spin(now)

    def _send_words(self) -> None:
        while self._words and self._word_slots:
            word, flags, done = self._words.popleft()
            if not self._takes(done, self._pair.tell, word, flags):
                return
            self._word_slots -= 1
            self._taken(0, 0, done)

    # Completions

    def handle(self, batch: Sequence[tuple[int, int, int | None]]) -> None:
        """See Polled."""
        for wr_id, status, word in batch:
            if wr_id >> 32 != self._generation:
                continue
            if status != _SUCCESS:
                self._break(status, wr_id)
            elif wr_id & 0xFFFFFFFF == _RECEIVE:
                self._receive(word or 0)
            else:
                self._succeed(wr_id)

    def handled(self) -> None:
        """See Polled."""
        self._owner.turned(self)

    def cannot_poll(self) -> None:
        """See Polled."""
        self._break(WcStatus.LOC_QP_OP_ERR)

    def _succeed(self, wr_id: int) -> None:
        posts = self.posts
        if not posts or posts[0][0] != wr_id:
            return  # every post is signalled, and they end in order
        _, slots, size, at, done = posts.popleft()
        self.load -= size
        self.free += slots
        if slots == 0:
            self._word_slots += 1
        if 0 < size <= SMALL and wr_id & 3 == 0:  # some are enough
            self._poller.took(self._loop.time() - at)
        done(_SUCCESS)
        if self._words and self.up:
            self._send_words()

    def _receive(self, word: int) -> None:
        self._pair.post_receives(self._generation << 32 | _RECEIVE, 1)
        kind, number = word >> 24, word & 0xFFFFFF
        if len(self._words) >= _MAX_WAITING_WORDS or self._is_flooded():
            self._break(WcStatus.RNR_RETRY_EXC_ERR)
            return
        if kind == Word.ASK:
            self.say(Word.ANSWER, number)
        elif kind == Word.ANSWER:
            answered = self._asked.get(number)
            if answered is not None and not answered.done():
                answered.set_result(True)
        elif kind != Word.BYE:
            return
        self.is_heard = True
        self._owner.heard(self, Word(kind))

    def _is_flooded(self) -> bool:
        now = self._loop.time()
        if now >= self._second + 1:
            self._second, self._words_heard = now, 0
        self._words_heard += 1
        return self._words_heard > _MAX_WORDS_PER_SECOND

    def fail(self) -> None:
        """Break it: the other end does not agree, or does not answer."""
        self._break(WcStatus.RETRY_EXC_ERR)

    def lose(self) -> None:
        """Its NIC is gone, for good."""
        self.is_lost = True
        self.fail()

    def _break(self, status: int, wr_id: int | None = None) -> None:
        """Reset; what the completion was for gets its status, everything else is flushed.

        Some failures don't say whether the request or the rail is at fault: a mere flush (rxe, for a WRITE from pages
        that are gone), or LOC_QP_OP_ERR (rxe, where there is no route now). Then the first post gets GENERAL_ERR, if
        the other end has been heard on this rail, and is flushed like the others if not.
        """
        if not self.up:
            return
        is_unclear = status in (WcStatus.WR_FLUSH_ERR, WcStatus.LOC_QP_OP_ERR)
        if self.posts and (is_unclear or self.posts[0].wr_id == wr_id):
            unclear = WcStatus.GENERAL_ERR if self.is_heard else WcStatus.WR_FLUSH_ERR
            self.posts.popleft().done(unclear if is_unclear else status)
        self.reset()
        self._owner.broke(self, status)

    def reset(self) -> None:
        """Take the rail down: nothing of it moves any more, and what was posted is flushed."""
        self.up = self.is_heard = False
        posts, self.posts = self.posts, deque()
        words, self._words = self._words, deque()
        self._generation = (self._generation + 1) & 0xFFFFFFFF
        self.free, self._word_slots, self.load = self._depth, _WORDS, 0
        for answered in self._asked.values():
            if not answered.done():
                answered.set_result(False)
        if not self.is_lost:
            try:
                self._pair.reset()
                while self._queue.poll(_RECEIVES):
                    pass
            except VerbsError:  # its driver fails, or the NIC is going: destroying is what is left
                self.is_lost = True
                with suppress(VerbsError):
                    self._pair.close()
        for done in [*(post.done for post in posts), *(done for *_, done in words)]:
            done(WcStatus.WR_FLUSH_ERR)

    def close(self) -> None:
        """Give everything back; what was posted is flushed. Windows that are bound to it are closed before.

        Raises VerbsError.
        """
        if self._closed:
            return
        self._closed = True
        self._poller.close()
        self.reset()
        self._pair.close()
        self._queue.close()
