"""When to try again: pauses that grow, how long to go on, and which rail to leave alone for a while.

Rules of this file:

* Pauses double up to a bound, and are shortened by chance, so that many who wait do not come back together.
* Pure: times, in seconds of one clock, and chance, from 0 to 1, are passed in.
"""

from __future__ import annotations


class Backoff:
    """Pauses between attempts."""

    def __init__(self, shortest: float, longest: float) -> None:
        """The first pause is at most `shortest` seconds, none is above `longest`."""
        self._shortest = shortest
        self._longest = longest
        self._next = shortest

    def pause(self, chance: float) -> float:
        """Return the next pause, between half of its bound and all of it."""
        bound, self._next = self._next, min(self._next * 2, self._longest)
        return bound * (1 - chance / 2)

    def reset(self) -> None:
        """Begin with the first pause again."""
        self._next = self._shortest


class Patience:
    """How long to go on trying while nothing moves."""

    def __init__(self, limit: float) -> None:
        self.limit = limit
        """Seconds."""
        self._began: float | None = None

    def broke(self, now: float) -> None:
        """Something failed; the time counts from the first failure since something moved."""
        if self._began is None:
            self._began = now

    def moved(self) -> None:
        """Something moved: whatever fails next has all the time again."""
        self._began = None

    def left(self, now: float) -> float:
        """Return the seconds that are left, 0 where none are."""
        return self.limit if self._began is None else max(0.0, self._began + self.limit - now)


class RailHealth:
    """Whether a rail is of use: one that breaks again and again is set aside for longer each time."""

    SHORTEST, LONGEST = 0.05, 30.0
    PROVEN = 10.0
    """Seconds after which a rail that has come up again counts as sound."""

    def __init__(self) -> None:
        self._backoff = Backoff(self.SHORTEST, self.LONGEST)
        self._up_since: float | None = None

    def failed(self, now: float, chance: float) -> float:
        """It broke, or could not be brought up; return the seconds until it is tried again."""
        if self._up_since is not None and now - self._up_since >= self.PROVEN:
            self._backoff.reset()
        self._up_since = None
        return self._backoff.pause(chance)

    def came_up(self, now: float) -> None:
        """It is up."""
        self._up_since = now
