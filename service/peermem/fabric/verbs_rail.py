"""One end of a rail: a queue pair with its completion queue, its accounts, and the words that both ends exchange.

Rules of this file:

* What is posted is answered once: by its completion, or with WR_FLUSH_ERR when the rail breaks. A rail breaks as a
  whole, with the first failed completion, and is reset at once: after that nothing of it moves.
* The last work request of each post is signalled; a post takes no more slots than are free.
* An end says words of 32 bits, in messages without payload, which the connection keeps in order with everything
  else: so an ANSWER to an ASK proves that all that was posted before it has been executed or refused.
* The queue is polled for a moment after small work, for as long as small work has been taking lately; then the
  loop sleeps until the channel's file is readable. An idle rail costs nothing.
* A remote node can break its own rail and no other: what it floods is bounded, what it invents is ignored.
"""

from __future__ import annotations

import asyncio
import secrets
from collections import deque
from collections.abc import Callable, Sequence
from enum import IntEnum
from functools import partial
from typing import NamedTuple, Protocol

from peermem.core.gid import Gid
from peermem.core.types import QueuePair
from peermem.fabric import verbs
from peermem.fabric.verbs_nic import Port
from peermem.fabric.verbs_qp import QueuePair as Pair
from peermem.fabric.verbs_types import Access, Path, Piece, Settings, VerbsError, WcStatus, WrOpcode

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
_BATCH = 64
_SMALL = 64 << 10
"""Bytes of a post that is worth waiting for."""
_MAX_SPIN = 0.001
"""Seconds of polling, at most: longer than that, being woken costs little."""


class Word(IntEnum):
    """What an end says, in the upper 8 bits of a word; the lower 24 are a number."""

    ASK = 1
    """Answer with the same number."""
    ANSWER = 2
    BYE = 3
    """This end is closed."""


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

    def __init__(self, port: Port, gid: Gid, domain: verbs.Domain, owner: RailOwner, settings: Settings) -> None:
        """Raises VerbsError."""
        self.port = port
        self.up = self.is_lost = False
        self.load = 0
        """Bytes posted that have not been answered."""
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
        self._generation = 0
        self._posts: deque[_Post] = deque()
        self._sequence = 0
        self._words: deque[tuple[int, int, Done]] = deque()
        self._word_slots = _WORDS
        self._asked: dict[int, asyncio.Future[bool]] = {}
        self._ends = _NOBODY, _NOBODY
        self._armed = self._spinning = self._closed = False
        self._spin_until = 0.0
        self._small_time = 0.0001
        self._loop.add_reader(self._queue.fd, self._wake)

    # Coming up

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
        psn = self.here.psn
        while psn == self.here.psn:
            psn = secrets.randbits(24)
        access = Access.LOCAL_WRITE
        if is_accepting:
            access |= Access.REMOTE_READ | Access.REMOTE_WRITE
        port = self.port
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
        path = Path(port.number, self._gid.index, there.gid, there.lid, port.state.ethernet, min(here.mtu, there.mtu))
        reads = here.reads, max(1, min(there.reads, port.nic.caps.reads_sent, 255))
        self._pair.connect(path, there.number, (here.psn, there.psn), reads, self._settings.timing)
        self._ends = here, there
        self.up = True
        self._loop.call_soon(self._sleep)

    # Posting

    def post(self, opcode: WrOpcode, pieces: Sequence[Piece], size: int, done: Done) -> None:
        """Post WRITEs or READs of `size` bytes in all, no more than `free`; the rail is up."""
        if self._accepts(partial(self._pair.move, opcode, pieces, self._next()), len(pieces), size, done):
            self.free -= len(pieces)
            self.load += size
            if size <= _SMALL:
                self._spin()

    def bind(self, window: verbs.Window, region: verbs.MemoryRegion, access: Access, done: Done) -> None:
        """Post the bind of a window; `free` is not 0 and the rail is up."""
        if self._accepts(partial(self._pair.bind, window, region, access, self._next()), 1, 0, done):
            self.free -= 1
            self._spin()

    def say(self, word: Word, number: int = 0, done: Done = lambda _: None) -> None:
        """Send a word, now or when there is room; never when the rail is down."""
        if not self.up:
            self._loop.call_soon(done, WcStatus.WR_FLUSH_ERR)
            return
        self._words.append((word << 24 | number, _FENCE if word is Word.ANSWER else 0, done))
        self._send_words()

    async def ask(self, timeout: float) -> bool:
        """Return whether the other end answers in time; by then it has no more of what it posted before."""
        number = secrets.randbits(24)
        while number in self._asked:
            number = secrets.randbits(24)
        answered: asyncio.Future[bool] = self._loop.create_future()
        if not self.up:
            return False
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

    def _next(self) -> int:
        return self._generation << 32 | self._sequence

    def _accepts(self, post: Callable[[], None], slots: int, size: int, done: Done) -> bool:
        """Post; what the queue pair does not take breaks the rail."""
        try:
            post()
        except VerbsError:
            self._loop.call_soon(done, WcStatus.WR_FLUSH_ERR)
            self._loop.call_soon(self._break, WcStatus.LOC_QP_OP_ERR)
            return False
        self._posts.append(_Post(self._next(), slots, size, self._loop.time(), done))
        self._sequence = (self._sequence + 1) % _RECEIVE
        return True

    def _send_words(self) -> None:
        while self._words and self._word_slots:
            word, flags, done = self._words.popleft()
            if not self._accepts(partial(self._pair.tell, word, self._next(), flags), 0, 0, done):
                return
            self._word_slots -= 1
            self._spin()

    # Completions

    def _wake(self) -> None:
        self._queue.acknowledge()
        self._armed = False
        self._drain()
        if not self._spinning:
            self._sleep()

    def _sleep(self) -> None:
        """Have the channel tell of the next completion, then look once more: one may have come in between."""
        if self._armed or self._closed:
            return
        self._armed = True
        try:
            self._queue.arm()
        except VerbsError:
            self._break(WcStatus.LOC_QP_OP_ERR)
        self._drain()

    def _spin(self) -> None:
        budget = 2 * self._small_time
        if budget <= _MAX_SPIN:
            self._spin_until = self._loop.time() + budget
            if not self._spinning:
                self._spinning = True
                self._loop.call_soon(self._spin_turn)

    def _spin_turn(self) -> None:
        if self._closed:
            return
        if self._drain():
            self._spin_until = self._loop.time() + 2 * self._small_time
        if self._loop.time() < self._spin_until:
            self._loop.call_soon(self._spin_turn)
        else:
            self._spinning = False
            self._sleep()

    def _drain(self) -> bool:
        """Handle what is complete, and return whether there was anything."""
        found = False
        try:
            while not self._closed:
                batch = self._queue.poll(_BATCH)
                for wr_id, status, word in batch:
                    if wr_id >> 32 == self._generation:
                        self._complete(wr_id, status, word)
                found = found or bool(batch)
                if len(batch) < _BATCH:
                    break
        except VerbsError:
            self._break(WcStatus.LOC_QP_OP_ERR)
        if found and not self._closed:
            self._owner.turned(self)
        return found

    def _complete(self, wr_id: int, status: int, word: int | None) -> None:
        if status != WcStatus.SUCCESS:
            self._break(status, wr_id)
        elif wr_id & 0xFFFFFFFF == _RECEIVE:
            self._receive(word or 0)
        else:
            self._succeed(wr_id)

    def _succeed(self, wr_id: int) -> None:
        if not self._posts or self._posts[0].wr_id != wr_id:
            return  # every post is signalled, and they end in order
        post = self._posts.popleft()
        self.load -= post.size
        self.free += post.slots
        if post.slots == 0:
            self._word_slots += 1
        if 0 < post.size <= _SMALL:
            self._small_time += (self._loop.time() - post.at - self._small_time) / 8
        post.done(WcStatus.SUCCESS)
        if self._words and self.up:
            self._send_words()

    def _receive(self, word: int) -> None:
        self._pair.post_receives(self._generation << 32 | _RECEIVE, 1)
        kind, number = word >> 24, word & 0xFFFFFF
        if kind == Word.ASK:
            if len(self._words) >= _MAX_WAITING_WORDS:
                self._break(WcStatus.RNR_RETRY_EXC_ERR)
                return
            self.say(Word.ANSWER, number)
        elif kind == Word.ANSWER:
            answered = self._asked.get(number)
            if answered is not None and not answered.done():
                answered.set_result(True)
        elif kind != Word.BYE:
            return
        self._owner.heard(self, Word(kind))

    # Ends

    def fail(self) -> None:
        """Break it: the other end does not agree, or does not answer."""
        self._break(WcStatus.RETRY_EXC_ERR)

    def lose(self) -> None:
        """Its NIC is gone, for good."""
        self.is_lost = True
        self.fail()

    def _break(self, status: int, wr_id: int | None = None) -> None:
        """Reset; what the completion was for gets its status, everything else is flushed.

        What breaks a rail can come as a mere flush (rxe, for a WRITE from pages that are gone): then the first post is
        suspected, and gets GENERAL_ERR.
        """
        if not self.up:
            return
        if self._posts and (status == WcStatus.WR_FLUSH_ERR or self._posts[0].wr_id == wr_id):
            suspect = self._posts.popleft()
            suspect.done(WcStatus.GENERAL_ERR if status == WcStatus.WR_FLUSH_ERR else status)
        self.reset()
        self._owner.broke(self, status)

    def reset(self) -> None:
        """Take the rail down: nothing of it moves any more, and what was posted is flushed."""
        self.up = False
        posts, self._posts = self._posts, deque()
        words, self._words = self._words, deque()
        self._generation = (self._generation + 1) & 0xFFFFFFFF
        self.free, self._word_slots, self.load = self._depth, _WORDS, 0
        for answered in self._asked.values():
            if not answered.done():
                answered.set_result(False)
        try:
            self._pair.reset()
            while self._queue.poll(_BATCH):
                pass
        except VerbsError:
            self.is_lost = True
            self._pair.close()  # the device is gone, or its driver fails: destroying is what is left
        for done in [*(post.done for post in posts), *(done for *_, done in words)]:
            done(WcStatus.WR_FLUSH_ERR)

    def close(self) -> None:
        """Give everything back; what was posted is flushed. Windows that are bound to it are closed before.

        Raises VerbsError.
        """
        if self._closed:
            return
        self._closed = True
        self._loop.remove_reader(self._queue.fd)
        self.reset()
        self._pair.close()
        self._queue.close()
