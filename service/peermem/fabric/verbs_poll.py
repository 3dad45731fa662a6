"""When a completion queue is looked at: all the time for a moment after small work, else when its channel tells.

Rules of this file:

* Small work is polled for, as long as small work has been taking lately; then the loop sleeps until the channel's
  file is readable. An idle queue costs nothing.
* A turn of the loop is kept for no more than some looks in vain, a few tens of microseconds, and for some that find.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Sequence
from typing import Protocol

from peermem.fabric.verbs import CompletionQueue
from peermem.fabric.verbs_types import VerbsError

SMALL = 32 << 10
"""Bytes on the way that are worth waiting for."""
_BATCH = 64
_BATCHES = 4
"""Taken by one look, at most."""
_LOOKS = 64
"""In vain in one turn of the loop, at most, while small work is on its way: a turn costs more than many looks."""
_FINDS = 4
"""In one turn of the loop while polling."""
_MAX_SPIN = 0.002
"""Seconds of polling, at most: longer than that, being woken costs little."""


class Polled(Protocol):
    """Whose queue it is."""

    @property
    def posts(self) -> Collection[object]:
        """What is on the way."""

    @property
    def load(self) -> int:
        """Its bytes."""

    def handle(self, batch: Sequence[tuple[int, int, int | None]]) -> None:
        """Handle completions; more may follow."""

    def handled(self) -> None:
        """For now there are no more."""

    def cannot_poll(self) -> None:
        """The queue does not work."""


class Poller:
    """Looks at one queue. Both belong to a rail, which closes this one first."""

    def __init__(self, queue: CompletionQueue, polled: Polled) -> None:
        self._queue = queue
        self._polled = polled
        self._loop = asyncio.get_running_loop()
        self._armed = self._spinning = self._closed = False
        self._until, self._small_time = 0.0, 0.0001
        self._loop.add_reader(queue.fd, self._wake)

    def took(self, seconds: float) -> None:
        """Small work took so long."""
        self._small_time += (seconds - self._small_time) / 8

    def spin(self, now: float) -> None:
        """Small work was posted just now: poll for it."""
        budget = 2 * self._small_time
        if budget <= _MAX_SPIN:
            self._until = now + budget
            if not self._spinning:
                self._spinning = True
                self._loop.call_soon(self._spin_turn)

    def sleep(self) -> None:
        """Have the channel tell of the next completion, then look once more: one may have come in between."""
        if self._armed or self._closed:
            return
        self._armed = True
        try:
            self._queue.arm()
        except VerbsError:
            self._polled.cannot_poll()
        self._look()

    def close(self) -> None:
        """Look no more."""
        self._closed = True
        self._loop.remove_reader(self._queue.fd)

    def _wake(self) -> None:
        self._queue.acknowledge()
        self._armed = False
        self._look()
        if not self._spinning:
            self.sleep()

    def _stay_awake(self, until: float) -> None:
        """Look again in the next turn of the loop, and in those of some time."""
        self._until = until
        if not self._spinning:
            self._spinning = True
            self._loop.call_soon(self._spin_turn)

    def _spin_turn(self) -> None:
        polled, finds, looks = self._polled, 0, 0
        while not self._closed:
            if self._look():
                finds += 1
            else:
                looks += 1
            if finds == _FINDS or looks == _LOOKS or not polled.posts or polled.load > SMALL:
                break
        if self._closed:
            return
        now = self._loop.time()
        if finds and polled.load <= SMALL:
            self._until = now + 2 * self._small_time
        if now < self._until:
            self._loop.call_soon(self._spin_turn)
        else:
            self._spinning = False
            self.sleep()

    def _look(self) -> bool:
        """Have handled what is complete, and return whether there was anything."""
        found = is_full = False
        try:
            for _ in range(_BATCHES):
                batch = () if self._closed else self._queue.poll(_BATCH)
                if not batch:
                    break
                found = True
                self._polled.handle(batch)
                is_full = len(batch) == _BATCH
                if not is_full:
                    break
        except VerbsError:
            self._polled.cannot_poll()
        if is_full:
            self._stay_awake(0.0)
        if found and not self._closed:
            self._polled.handled()
        return found
