"""The thread that keeps leases with a time to live alive, for a synchronous program.

Rules of this file:

* One thread for all leases of a node object, started by the first and ended by `close`.
* A daemon out of reach is tried again at the next third; a lease that is lost is dropped, and the job
  hears of it when it uses the region.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence

from peermem.client import leases
from peermem.core.errors import PeermemError


class Renewal:
    """Renews what was added, until it is dropped."""

    def __init__(self, renew: Callable[[Sequence[str]], object]) -> None:
        self._renew = renew
        self._schedule = leases.Schedule()
        self._changed = threading.Condition()
        self._closed = False
        self._thread: threading.Thread | None = None

    def add(self, name: str, ttl: float) -> None:
        """Keep the lease of region `name` alive."""
        with self._changed:
            self._schedule.add(name, ttl, time.monotonic())
            self._changed.notify()
            if self._thread is None and not self._closed:
                self._thread = threading.Thread(target=self._run, name="peermem-leases", daemon=True)
                self._thread.start()

    def drop(self, name: str) -> None:
        """Let a lease end."""
        with self._changed:
            self._schedule.drop(name)

    def close(self) -> None:
        """Renew no more."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        if self._thread is not None:
            self._thread.join()

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._closed and self._schedule.delay(time.monotonic()) != 0.0:
                    self._changed.wait(self._schedule.delay(time.monotonic()))
                if self._closed:
                    return
                due = self._schedule.take_due(time.monotonic())
            self._renew_all(due)

    def _renew_all(self, names: list[str]) -> None:
        """Renew a batch; where one of it is lost, the daemon renews none, so each goes alone."""
        try:
            self._renew(names)
        except PeermemError as fault:
            if not leases.is_lost(fault):
                return
            if len(names) == 1:
                self.drop(names[0])
                return
            for name in names:
                self._renew_all([name])
