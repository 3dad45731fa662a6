"""Whose slice is next on the links to a node over a fabric: tenants share them by bytes, and the transfers of one
tenant take turns.

Rules of this file:

* Deficit round robin: a tenant in turn posts until it has used up its credit, a quantum of bytes times its weight. It
  may end its turn in debt by one slice, which its next turns pay back.
* A tenant that had nothing to post is first in turn when it has something, with one credit: whoever asks for little
  waits for nobody's backlog.
* While several tenants use them, each has only so much outstanding on them that they keep busy: what is posted already
  can't be overtaken.
* A tenant whose bytes have to wait loses no turn but its own.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

from peermem.core.quota import Tenant

_RECENT = 1.0
"""Seconds for which a tenant counts as using the links."""


class Sharing(Protocol):
    """What takes turns."""

    @property
    def tenant(self) -> Tenant:
        """Whom it is counted for."""

    def wait(self) -> float:
        """Return for how many seconds its bytes have to wait."""


W = TypeVar("W", bound=Sharing)


@dataclass(slots=True, eq=False)
class Line(Generic[W]):
    """What one tenant has there."""

    key: str
    workers: deque[W] = field(default_factory=deque)
    credit: int = 0
    load: int = 0
    """What it has outstanding."""
    in_turn: bool = False


class Turns(Generic[W]):
    """The turns on all links to a node over a fabric."""

    def __init__(
        self, quantum: int, window: int, shared_window: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """`window` is what may be outstanding at all, `shared_window` what one tenant may have while there are others;
        all in bytes."""
        self._quantum = quantum
        self._window = window
        self._shared_window = shared_window
        self._clock = clock
        self._load = 0
        self._last = ""
        """Who used the links last, and when;"""
        self._last_at = -math.inf
        self._before_at = -math.inf
        """when somebody else did before."""
        self._lines: dict[str, Line[W]] = {}
        self._order: deque[Line[W]] = deque()
        self._queued: set[W] = set()

    def __bool__(self) -> bool:
        """Whether somebody waits for a turn."""
        return bool(self._queued)

    def add(self, worker: W) -> None:
        """Give `worker` turns until it has nothing to post; twice is once."""
        if worker in self._queued:
            return
        self._queued.add(worker)
        tenant = worker.tenant
        line = self._lines.get(tenant.key)
        if line is None:
            line = self._lines[tenant.key] = Line(tenant.key)
        line.workers.append(worker)
        self._use(line)
        if not line.in_turn:
            line.in_turn, line.credit = True, self._quantum * tenant.weight
            self._order.appendleft(line)

    def advance(self, is_first: Callable[[W], bool]) -> None:
        """Let some go before the others of their tenants."""
        for line in self._lines.values():
            line.workers = deque(sorted(line.workers, key=lambda worker: not is_first(worker)))

    def take(self) -> tuple[Line[W], W] | None:
        """Return who is next, or None when nobody may post now."""
        if self._load >= self._window:
            return None
        most = self._window if self._is_alone() else self._shared_window
        held_back = 0
        while held_back < len(self._order):
            line = self._order[0]
            if not line.workers:
                self._order.popleft()
                line.in_turn = False
                self._forget(line)
            elif line.load >= most or line.workers[0].wait() > 0:
                self._order.rotate(-1)
                held_back += 1
            elif line.credit <= 0:
                line.credit += self._quantum * line.workers[0].tenant.weight
                self._order.rotate(-1)
                held_back = 0
            else:
                worker = line.workers.popleft()
                self._queued.discard(worker)
                return line, worker
        return None

    def posted(self, line: Line[W], cost: int) -> None:
        """What was taken posted so much."""
        self._use(line)
        self._load += cost
        line.load += cost
        line.credit -= cost

    def ended(self, line: Line[W], cost: int) -> None:
        """What was posted has come back."""
        self._load -= cost
        line.load -= cost
        self._forget(line)

    def pause(self) -> float:
        """Return the seconds after which somebody may post who has to wait now; 0 where nobody waits for time."""
        if self._load >= self._window:
            return 0.0
        waits = [line.workers[0].wait() for line in self._order if line.workers]
        return min((wait for wait in waits if wait > 0), default=0.0)

    def _use(self, line: Line[W]) -> None:
        """Note that a tenant uses the links."""
        now = self._clock()
        if line.key != self._last:
            self._last, self._before_at = line.key, self._last_at
        self._last_at = now

    def _is_alone(self) -> bool:
        """Whether only one tenant has used the links lately."""
        return self._clock() - self._before_at > _RECENT

    def _forget(self, line: Line[W]) -> None:
        if not line.in_turn and not line.load:
            del self._lines[line.key]
