"""An accepted link: the target's ends of its rails, and what keeps it from staying for ever.

Rules of this file:

* Nothing is known of the initiator but what comes in on its rails: it has to show itself in time, and is asked
  now and then whether it is still there.
* A rail that broke waits for the initiator's new offer. A link without a rail that is up is given up in time.
* A fence is an ASK after the last door is shut: its answer comes after everything that was sent before. A rail
  that does not answer is reset, which stops it as well.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace

from peermem.core.errors import FabricUnavailable
from peermem.core.gid import Gid
from peermem.core.types import QueuePair
from peermem.fabric.verbs_grants import Door, Grant
from peermem.fabric.verbs_nic import Port, nearest
from peermem.fabric.verbs_rail import Rail
from peermem.fabric.verbs_types import Settings, VerbsError, Word

_FAREWELL = 0.5


class AcceptedLink:
    """One link of a remote node; a `RailOwner`."""

    def __init__(
        self, link_id: bytes, subject: str, settings: Settings, on_lost: Callable[[AcceptedLink], None]
    ) -> None:
        """`subject` is whose link it is. `on_lost` is called once, when the initiator is gone; the owner closes the
        link."""
        self.link_id = link_id
        self.subject = subject
        self.rails: list[Rail] = []
        self.grants: dict[int, Grant] = {}
        """By the keys' names."""
        self.opening: set[Door] = set()
        """Of grants that are being made."""
        self.news = asyncio.Event()
        """Set whenever a rail comes up."""
        self._settings = settings
        self._on_lost = on_lost
        self._loop = asyncio.get_running_loop()
        self._offered: list[QueuePair] = []
        self._is_heard = False
        self._fences: dict[Rail, asyncio.Task[None]] = {}
        self._queued_fences: dict[Rail, asyncio.Task[None]] = {}
        self._keeper: asyncio.Task[None] | None = None
        self._deadline: asyncio.TimerHandle | None = None
        self._closed = False
        self._expect(settings.connect_timeout)

    def open(self, offered: Sequence[QueuePair], ports: Sequence[Port], *, windows: bool) -> list[QueuePair]:
        """Make this side's ends, each on the port nearest to what it is offered, in the subject's protection domains;
        without `windows`, or where a NIC has none, each in one of its own. Raises FabricUnavailable where none comes
        up; the caller closes the link then.
        """
        load: Counter[str] = Counter()
        failure: FabricUnavailable | None = None
        for there in offered:
            found = nearest(ports, there.gid, there.lid == 0, load)
            if found is None:
                raise FabricUnavailable(
                    f"No working NIC port of this node has an address that reaches the remote node's {there.nic[:64]}. "
                    "Give both ports addresses of one subnet, or use tcp."
                )
            port, gid = found
            load[port.name] += 1
            failure = self._add(port, gid, there, windows=windows and port.nic.caps.windows) or failure
        if failure is not None and not any(rail.up for rail in self.rails):
            raise failure
        self._offered = list(offered)
        return self._ends()

    def _ends(self) -> list[QueuePair]:
        """Return this side's ends; one that could not be connected now has no number, so that its initiator tries again
        soon."""
        return [rail.here if rail.up else replace(rail.here, number=0) for rail in self.rails]

    def _add(self, port: Port, gid: Gid, there: QueuePair, *, windows: bool) -> FabricUnavailable | None:
        domains, domain = port.nic.domains, None
        try:
            domain = domains.of(self.subject) if windows else domains.apart()
            rail = Rail(port, gid, domain, self, self._settings)
        except VerbsError as error:
            if domain is not None:
                domain.release()
            raise FabricUnavailable(f"The NIC port {port.name} has no queue pair for a link: {error}.") from error
        self.rails.append(rail)
        return _bring_up(rail, there)

    def reopen(self, offered: Sequence[QueuePair]) -> list[QueuePair]:
        """Reset and connect the rails whose other ends are new; the others stay. Raises FabricUnavailable."""
        if len(offered) != len(self.rails):
            raise FabricUnavailable("The rails of an open link can't become more or fewer. Open a new link.")
        for index, (rail, there) in enumerate(zip(self.rails, offered, strict=True)):
            if there != self._offered[index]:
                self._offered[index] = there
                _bring_up(rail, there)
        self.news.set()
        self.news.clear()
        self._expect(self._settings.stall_timeout)
        return self._ends()

    # Events of rails

    def heard(self, rail: Rail, word: Word) -> None:
        """See RailOwner."""
        if word is Word.BYE:
            self._give_up()
            return
        self._stop_expecting()
        if not self._is_heard:
            self._is_heard = True
            self._keeper = self._loop.create_task(self._keep())

    def broke(self, rail: Rail, status: int) -> None:
        """See RailOwner."""
        self._expect(self._settings.stall_timeout)

    def turned(self, rail: Rail) -> None:
        """See RailOwner."""

    async def _keep(self) -> None:
        """Ask now and then: a queue pair whose other end is gone breaks when it sends."""
        while True:
            await asyncio.sleep(self._settings.keepalive)
            await asyncio.gather(*(rail.ask(self._settings.keepalive) for rail in self.rails if rail.up))

    def _expect(self, seconds: float) -> None:
        """Give the link up unless the initiator is heard on some rail in time."""
        if self._deadline is None and not self._closed and not any(rail.is_heard for rail in self.rails):
            self._deadline = self._loop.call_later(seconds, self._give_up)

    def _stop_expecting(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _give_up(self) -> None:
        if not self._closed:
            self._on_lost(self)

    # Fences

    async def fence(self, rails: Sequence[Rail]) -> None:
        """Return when nothing that was sent on these rails before is being executed or will be."""
        await asyncio.gather(*(self._fence(rail) for rail in rails if rail.up))

    async def _fence(self, rail: Rail) -> None:
        """Fences of a rail that are asked for while one is running share the next one."""
        task = self._queued_fences.get(rail)
        if task is None:
            task = self._loop.create_task(self._run_fence(rail, self._fences.get(rail)))
            self._queued_fences[rail] = task
        await asyncio.shield(task)

    async def _run_fence(self, rail: Rail, before: asyncio.Task[None] | None) -> None:
        if before is not None:
            await asyncio.wait([before])
        self._fences[rail] = self._queued_fences.pop(rail)
        if not await rail.ask(self._settings.fence_timeout) and rail.up:
            with suppress(VerbsError):  # then it is only reset
                rail.offer(True)  # reset, with a PSN by which the initiator can tell
            self._expect(self._settings.stall_timeout)

    # Ends

    async def farewell(self) -> None:
        """Tell the initiator that the link is closed."""
        await asyncio.gather(*(rail.farewell(_FAREWELL) for rail in self.rails if rail.up))

    def close(self) -> None:
        """End the link and its grants at once: when this returns nothing of it moves. Raises VerbsError."""
        if self._closed:
            return
        self._closed = True
        self._stop_expecting()
        if self._keeper is not None:
            self._keeper.cancel()
        doors = [*self.opening, *(door for grant in self.grants.values() for door in grant.doors)]
        self.grants.clear()
        for door in doors:
            door.shut()
        for rail in self.rails:
            rail.close()
        for door in doors:
            door.close()
        for rail in self.rails:
            rail.domain.release()
        self.news.set()


def _bring_up(rail: Rail, there: QueuePair) -> FabricUnavailable | None:
    """Reset a rail and connect it; return why that failed."""
    try:
        rail.offer(True)
        rail.connect(there)
    except VerbsError as error:
        return FabricUnavailable(
            f"The NIC port {rail.port.name} can't connect to the remote node's {there.nic[:64]}: {error}. Check that "
            "both are in networks that reach each other.",
            nic=rail.port.name,
        )
    return None
