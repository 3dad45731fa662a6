"""When leases with a time to live have to be renewed.

Rules of this file:

* Pure: the time is a parameter; the shells wait and call.
* A lease is renewed at a third of its time to live, so that two renewals may fail before it ends.
"""

from __future__ import annotations

from peermem.core.errors import Code, PeermemError

BATCH = 1000
"""Regions of one RenewLease call, as many as the contract allows."""


class Schedule:
    """The leases that this program keeps alive."""

    def __init__(self) -> None:
        self._leases: dict[str, tuple[float, float]] = {}

    def add(self, name: str, ttl: float, now: float) -> None:
        """Keep the lease of region `name` alive from now on."""
        self._leases[name] = (now + ttl / 3, ttl / 3)

    def drop(self, name: str) -> None:
        """Forget a region."""
        self._leases.pop(name, None)

    def delay(self, now: float) -> float | None:
        """Return the seconds until the next renewal; None while there is nothing to renew."""
        return max(0.0, min(due for due, _ in self._leases.values()) - now) if self._leases else None

    def take_due(self, now: float) -> list[str]:
        """Return the regions to renew now, at most a batch, and plan their next renewals."""
        names = [name for name, (due, _) in self._leases.items() if due <= now][:BATCH]
        for name in names:
            self._leases[name] = (now + self._leases[name][1], self._leases[name][1])
        return names


def is_lost(fault: PeermemError) -> bool:
    """Return whether no later renewal can succeed, rather than the daemon being out of reach for now."""
    return fault.code in (Code.NOT_FOUND, Code.FAILED_PRECONDITION, Code.PERMISSION_DENIED, Code.INVALID_ARGUMENT)
