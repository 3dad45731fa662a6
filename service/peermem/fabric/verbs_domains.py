"""Protection domains: on each NIC a subject has one of its own, at both ends of its links.

Rules of this file:

* What is made in one domain is of no use in another one; the NIC sees to that at each access. So no queue pair of one
  subject reaches what was registered or opened for another one.
* A domain is made when its subject first has a link or memory of its own on the NIC, and ends when the last of these
  is gone. What else is registered in it, others' memory that its subject uses, goes with it.
* It ends in order: by then it has no queue pair; what is registered in it is deregistered, with turns of the loop, and
  then it is closed. Whoever needs one meanwhile gets a new one.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Protocol

from peermem.fabric import verbs


class Tenancy(Protocol):
    """What is registered in domains."""

    async def leave(self, domain: HeldDomain) -> None:
        """Deregister what is registered in a domain, which ends. Raises VerbsError."""


class HeldDomain(verbs.Domain):
    """A protection domain that ends with its last hold."""

    def __init__(self, device: verbs.Device, on_end: Callable[[HeldDomain], None], *, is_apart: bool = False) -> None:
        """It has one hold. Raises VerbsError."""
        super().__init__(device)
        self.is_apart = is_apart
        """Whether it is one rail's alone, in which grants are registrations instead of windows."""
        self.is_ending = False
        """Whether nothing may be made in it any more."""
        self.tenancies: dict[Tenancy, None] = {}
        """What is, or is about to be, registered in it and goes with it."""
        self._on_end = on_end
        self._holds = 1

    def hold(self) -> None:
        """Have it stay until one more `release`."""
        self._holds += 1

    def release(self) -> None:
        """Give a hold back, when what it was for is closed. Raises VerbsError."""
        self._holds -= 1
        if self._holds == 0:
            self.is_ending = True
            self._on_end(self)


class Domains:
    """All domains of one NIC."""

    def __init__(self, device: verbs.Device) -> None:
        self._device = device
        self._of: dict[str, HeldDomain] = {}
        self._ending: set[asyncio.Task[None]] = set()

    def of(self, subject: str) -> HeldDomain:
        """Return a subject's domain, with a hold for the caller. Raises VerbsError."""
        domain = self._of.get(subject)
        if domain is not None:
            domain.hold()
            return domain

        def end(domain: HeldDomain) -> None:
            del self._of[subject]
            self._end(domain)

        self._of[subject] = domain = HeldDomain(self._device, end)
        return domain

    def apart(self) -> HeldDomain:
        """Return a new domain for one rail alone, with a hold for the caller. Raises VerbsError."""
        return HeldDomain(self._device, self._end, is_apart=True)

    def _end(self, domain: HeldDomain) -> None:
        if not domain.tenancies:
            domain.close()
            return
        task = asyncio.get_running_loop().create_task(_leave(domain))
        self._ending.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._ending.discard(task)
        if not task.cancelled():
            task.result()

    async def close(self) -> None:
        """Return when all that was released has ended."""
        if self._ending:
            await asyncio.wait(list(self._ending))


async def _leave(domain: HeldDomain) -> None:
    while domain.tenancies:
        await next(iter(domain.tenancies)).leave(domain)
    domain.close()
