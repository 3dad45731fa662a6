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
import errno
import secrets
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import NamedTuple, Protocol

from peermem.core.gid import Gid
from peermem.core.types import QueuePair
from peermem.fabric import verbs
from peermem.fabric.verbs_nic import Port
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
_BATCH = 64
_BATCHES = 4
"""Taken in one turn of the loop, at most."""
_MAX_WORDS_PER_SECOND = 10_000
_SMALL = 32 << 10
"""Bytes on the way that are worth waiting for."""
_LOOKS = 4
"""In one turn of the loop while polling: a turn costs more than a look."""
_MAX_SPIN = 0.002
"""Seconds of polling, at most: longer than that, being woken costs little."""


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
        self.up = self.is_heard = self.is_lost = False
        """Whether it can be posted on; whether the other end has said something since; whether its NIC is gone."""
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
        self._spin_until, self._small_time = 0.0, 0.0001
        self._second, self._words_heard = 0.0, 0
        self._loop.add_reader(self._queue.fd, self._wake)

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
        path = Path(port.number, self._gid.index, there.gid, there.lid, port.state.ethernet, mtu, marks)
        reads = here.reads, max(1, min(there.reads, port.nic.caps.reads_sent, 255))
        self._pair.connect(path, there.number, (here.psn, there.psn), reads, self._settings.timing)
        self._ends = here, there
        self.up = True
        self._loop.call_soon(self._sleep)

    def post(self, opcode: WrOpcode, pieces: Sequence[Piece], size: int, done: Done) -> None:
        """Post WRITEs or READs of `size` bytes in all, no more than `free`; the rail is up."""
        if self._takes(done, self._pair.move, opcode, pieces):
            self._taken(len(pieces), size, done)
            self.free -= len(pieces)
            self.load += size
            if self.load <= _SMALL:
                self._spin()

    def bind(self, window: verbs.Window, region: verbs.MemoryRegion, access: Access, done: Done) -> None:
        """Post the bind of a window; `free` is not 0 and the rail is up."""
        if self._takes(done, self._pair.bind, window, region, access):
            self._taken(1, 0, done)
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
            self._loop.call_soon(done, WcStatus.WR_FLUSH_ERR)
            self._loop.call_soon(self._break, WcStatus.LOC_QP_OP_ERR)
            return False

    def _taken(self, slots: int, size: int, done: Done) -> None:
        wr_id = self._generation << 32 | self._sequence
        self._posts.append(_Post(wr_id, slots, size, self._loop.time(), done))
        self._sequence = (self._sequence + 1) % _RECEIVE

    def _send_words(self) -> None:
        while self._words and self._word_slots:
            word, flags, done = self._words.popleft()
            if not self._takes(done, self._pair.tell, word, flags):
                return
            self._word_slots -= 1
            self._taken(0, 0, done)
            self._spin()

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
            self._stay_awake(budget)

    def _stay_awake(self, seconds: float) -> None:
        """Look again in the next turn of the loop, and in those of some time."""
        self._spin_until = self._loop.time() + seconds
        if not self._spinning:
            self._spinning = True
            self._loop.call_soon(self._spin_turn)

    def _spin_turn(self) -> None:
        if self._closed:
            return
        looks = _LOOKS
        while looks and not self._drain():
            looks -= 1
        now = self._loop.time()
        if looks and self.load <= _SMALL:
            self._spin_until = now + 2 * self._small_time
        if now < self._spin_until:
            self._loop.call_soon(self._spin_turn)
        else:
            self._spinning = False
            self._sleep()

    def _drain(self) -> bool:
        """Handle what is complete, and return whether there was anything."""
        found = is_full = False
        try:
            for _ in range(_BATCHES):
                batch = () if self._closed else self._queue.poll(_BATCH)
                is_full = len(batch) == _BATCH
                for wr_id, status, word in batch:
                    found = True
                    if wr_id >> 32 == self._generation:
                        self._complete(wr_id, status, word)
                if not is_full:
                    break
        except VerbsError:
            self._break(WcStatus.LOC_QP_OP_ERR)
        if is_full:
            self._stay_awake(0.0)
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
        if self._posts and (is_unclear or self._posts[0].wr_id == wr_id):
            unclear = WcStatus.GENERAL_ERR if self.is_heard else WcStatus.WR_FLUSH_ERR
            self._posts.popleft().done(unclear if is_unclear else status)
        self.reset()
        self._owner.broke(self, status)

    def reset(self) -> None:
        """Take the rail down: nothing of it moves any more, and what was posted is flushed."""
        self.up = self.is_heard = False
        posts, self._posts = self._posts, deque()
        words, self._words = self._words, deque()
        self._generation = (self._generation + 1) & 0xFFFFFFFF
        self.free, self._word_slots, self.load = self._depth, _WORDS, 0
        for answered in self._asked.values():
            if not answered.done():
                answered.set_result(False)
        if not self.is_lost:
            try:
                self._pair.reset()
                while self._queue.poll(_BATCH):
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
        self._loop.remove_reader(self._queue.fd)
        self.reset()
        self._pair.close()
        self._queue.close()
