"""What keeps a link's rails up: it opens them, rebuilds those that broke, and finds out when nothing moves any more.

Rules of this file:

* A rail is rebuilt by an exchange in which its end has a new PSN. An end that the remote node knows already changes
  nothing there: so an offer without new ends asks whether the link is still known, and whether both sides agree.
* The first attempt is made at once, further ones with backoff. A rail that is down is told of once, and when it is
  back; one that only a refused request broke is told of only where it does not come back at once.
* REMOTE_CLOSED needs an answer: of the remote node, which does not know the link, or of its host, where nobody
  listens any more. Silence is STALLED, and lasts for the stall timeout.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Sequence
from contextlib import suppress

from peermem.core.errors import LinkNotFound, NodeUnreachable, PeermemError, StaleEpoch
from peermem.core.types import FabricKind, LinkAttributes, QueuePair
from peermem.fabric.base import Exchange, LinkEnd, LinkEvents
from peermem.fabric.verbs_rail import Rail
from peermem.fabric.verbs_types import Settings, VerbsError
from peermem.fabric.verbs_work import is_sound_answer

_TICK = 0.25
_FIRST_DELAY = 0.05
_MAX_DELAY = 0.5
_MAX_CALM_DELAY = 8.0
"""While other rails of the link are up."""
_DEAD_AFTER = 0.5
"""Seconds for which the remote daemon's port has to refuse before the daemon counts as dead."""


class Mender:
    """The rails of one link, on its initiating side."""

    def __init__(
        self,
        rails: Sequence[Rail],
        exchange: Exchange,
        events: LinkEvents,
        settings: Settings,
        is_busy: Callable[[], bool],
        on_answer: Callable[[], None],
        on_down: Callable[[LinkEnd, str], None],
    ) -> None:
        """`events` is told of rails. `is_busy` tells whether the link has work outstanding. `on_answer` is called when
        the remote node has said that it still has the link, `on_down` when the link is to go down."""
        self._rails = rails
        self._exchange = exchange
        self._events = events
        self._settings = settings
        self._is_busy = is_busy
        self._on_answer = on_answer
        self._on_down = on_down
        self._loop = asyncio.get_running_loop()
        self._link_id = b""
        self.has_moved = False
        """To be set when something ended or begins."""
        self._moved_at = self._loop.time()
        self._refused_at: float | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._task: asyncio.Task[None] | None = None
        self._stopped = False
        self._causes: dict[Rail, str] = {}
        """Why rails broke of which it is not told yet."""
        self._told: set[Rail] = set()
        """Rails that were told to be down."""

    async def open(self) -> None:
        """Bring the rails up, at least one. Raises NodeUnreachable, and what the exchange raises."""
        rails = list(self._rails)
        try:
            offer = self._offer(rails)
        except VerbsError as error:
            raise NodeUnreachable(f"This node's NIC can't bring a link's queue pairs up: {error}.") from error
        answer = await self._exchange(offer)
        self._link_id = answer.link_id
        await self._connect(answer, rails, self._settings.connect_timeout)
        if not any(rail.up for rail in rails):
            raise NodeUnreachable(
                "The remote node's NIC does not answer this one's. Check that their networks reach each other, that "
                "UDP port 4791 (RoCE v2) is open between them, and that their MTUs are alike."
            )
        self.watch()

    def watch(self) -> None:
        """Look now and then, until the link has nothing to do and all its rails are up."""
        if self._timer is None and not self._stopped:
            self._timer = self._loop.call_later(_TICK, self._look)

    def broke(self, rail: Rail, cause: str) -> None:
        """Note why a rail broke by itself; `mend` tells of it."""
        self._causes[rail] = cause

    def mend(self) -> None:
        """Rebuild the rails that are down, or ask the remote node whether all is well."""
        if self._stopped or self._task is not None:
            return
        if not self._is_busy():
            self.has_moved = True
        self._task = self._loop.create_task(self._mend())
        self._task.add_done_callback(self._mended)
        self.watch()

    def stop(self) -> None:
        """Do no more."""
        self._stopped = True
        if self._timer is not None:
            self._timer.cancel()
        if self._task is not None and self._task is not asyncio.current_task():
            self._task.cancel()

    def _look(self) -> None:
        self._timer = None
        if not self._is_busy() and self._is_whole():
            return
        now = self._loop.time()
        if self.has_moved:
            self.has_moved, self._moved_at = False, now
        still = now - self._moved_at
        if still >= self._settings.stall_timeout:
            self._on_down(LinkEnd.STALLED, f"nothing moved for {self._settings.stall_timeout:g} s")
            return
        if still >= self._settings.ask_after or not self._is_whole():
            self.mend()
        self.watch()

    def _mended(self, task: asyncio.Task[None]) -> None:
        self._task = None
        if not task.cancelled() and not self._stopped:
            task.result()
            if not self._is_whole():  # one broke while the last one came up
                self.mend()

    def _is_whole(self) -> bool:
        """Whether all rails are up that ever can be again; at least one is, or the link is past mending."""
        return any(rail.up for rail in self._rails) and all(rail.up or rail.is_lost for rail in self._rails)

    async def _mend(self) -> None:
        delay = _FIRST_DELAY
        self._tell_broken(list(self._causes), 0.0)
        while not self._stopped:
            end = await self._attempt()
            if self._stopped:
                return
            if end is not None:
                self._on_down(*end)
                return
            self._tell_mended()
            is_whole = self._is_whole()
            self._tell_broken(list(self._causes) if is_whole else self._rails, delay)
            if is_whole:
                return
            await asyncio.sleep(delay)
            is_up = any(rail.up for rail in self._rails)
            delay = min(2 * delay, _MAX_CALM_DELAY if is_up else _MAX_DELAY)

    def _tell_broken(self, rails: Sequence[Rail], pause: float) -> None:
        for rail in rails:
            cause = self._causes.pop(rail, "it could not be brought up again")
            if not rail.up and rail not in self._told:
                self._told.add(rail)
                self._events.rail_down(cause, math.inf if rail.is_lost else pause)

    def _tell_mended(self) -> None:
        for rail in [rail for rail in self._told if rail.up]:
            self._told.discard(rail)
            self._events.rail_up()

    async def _attempt(self) -> tuple[LinkEnd, str] | None:
        """Try to bring up what is down; return why the link is to go down, if it is."""
        if all(rail.is_lost for rail in self._rails):
            return LinkEnd.BROKEN, "its NICs are gone"
        broken = [rail for rail in self._rails if not rail.up and not rail.is_lost]
        try:
            offer = self._offer(broken)
            async with asyncio.timeout(self._settings.stall_timeout):
                answer = await self._exchange(offer)
            self._refused_at = None
            if not self._stopped:
                self._on_answer()
                await self._connect(answer, broken, self._settings.ask_after)
        except (LinkNotFound, StaleEpoch):
            return LinkEnd.REMOTE_CLOSED, "the remote node does not have the link any more"
        except NodeUnreachable as error:
            return self._judge(error)
        except (TimeoutError, PeermemError, VerbsError):
            pass  # another attempt may do, until the link has stood still for too long
        return None

    def _judge(self, error: NodeUnreachable) -> tuple[LinkEnd, str] | None:
        """Tell a daemon that is dead, whose host refuses, from one that is out of reach."""
        if error.metadata.get("code") != "UNAVAILABLE":
            self._refused_at = None
            return None
        now = self._loop.time()
        if self._refused_at is None:
            self._refused_at = now
        if now - self._refused_at < _DEAD_AFTER:
            return None
        return LinkEnd.REMOTE_CLOSED, "nobody listens at the remote daemon's address any more"

    def _offer(self, broken: Sequence[Rail]) -> LinkAttributes:
        ends: list[QueuePair] = [rail.offer(False) if rail in broken else rail.here for rail in self._rails]
        return LinkAttributes(FabricKind.VERBS, len(ends), self._link_id, queue_pairs=ends)

    async def _connect(self, answer: LinkAttributes, broken: Sequence[Rail], patience: float) -> None:
        """Connect rails to what the remote node answered; those that are not heard in time are down again."""
        if not is_sound_answer(answer, len(self._rails)) or answer.link_id != self._link_id:
            raise NodeUnreachable("The remote node's answer to an offer of queue pairs makes no sense.")
        for rail, there in zip(list(self._rails), answer.queue_pairs, strict=True):
            if rail in broken and there.number:
                with suppress(VerbsError):  # there is no way to that address now
                    rail.connect(there)
            elif rail not in broken and rail.up and rail.there != there:
                rail.fail()
        answers = await asyncio.gather(*(rail.ask(patience) for rail in broken))
        for rail, has_answered in zip(broken, answers, strict=True):
            if not has_answered:
                rail.fail()
