"""A transfer between two other nodes: one of them runs it, this node relays its progress.

Rules of this file:

* The client's identity and the request_id travel along, so that asking twice starts it once. While it lasts, this node
  confirms to others that the node that runs it does so for that client.
* Contact that breaks is sought again for a while. If it stays lost, the transfer fails here and says
  that it may go on there: only the node that runs it can raise the fence.
* A report that is silent for a while is asked for anew: it begins with the transfer as it stands, so a daemon that
  answers pings and nothing else is found out.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing, suppress
from dataclasses import replace

import structlog

from peermem.broker.regions import Region
from peermem.broker.runs import begin_transfer
from peermem.broker.vouching import Vouching
from peermem.core.errors import Internal, NodeUnreachable, PeermemError, TransferCancelled, TransferNotFound
from peermem.core.failpoints import reach
from peermem.core.identity import Subject
from peermem.core.names import ChildName
from peermem.core.plan import Direction
from peermem.core.policy import Action
from peermem.core.transfer import State, TransferFacts, TransferRequest
from peermem.remote.base import RemoteNode

log = structlog.get_logger(__name__)

_PATIENCE = 10.0
"""Seconds without contact after which the transfer is given up."""
_RETRY = 0.5
_QUIET = 10.0
"""Seconds without a word after which a report is asked for anew."""


class Relay:
    """A transfer that another node runs; a `runs.Transfer`."""

    def __init__(
        self, name: ChildName, node: str, remote: RemoteNode, request: TransferRequest, subject: Subject
    ) -> None:
        """`remote` is the daemon of `node`, which runs the transfer for `subject`."""
        self.owner = str(subject)
        self.ended = asyncio.Event()
        self._span = begin_transfer(name, request)
        self.facts = TransferFacts(
            name=name,
            state=State.PENDING,
            bytes_total=request.total,
            bytes_done=0,
            segment_count=request.segment_count,
            fabric=None,
            direction=Direction.RELAYED,
            owner=self.owner,
            error=None,
            created_at=time.time(),
            duration=None,
            crc32c=None,
            ends=request.ends,
            trace_id=self._span.trace_id,
        )
        self._node = node
        self._remote = remote
        self._request = replace(request, traceparent=self._span.traceparent)
        self.subject = subject
        self._there: ChildName | None = None
        self._wish: PeermemError | None = None
        self._cancelling: asyncio.Task[None] | None = None
        self._began = time.monotonic()

    @property
    def uses(self) -> Sequence[tuple[Action, Region]]:
        """See Transfer: the nodes that own the regions decide."""
        return ()

    async def drive(self, vouching: Vouching) -> None:
        """Carry the transfer to its end; never raises."""
        with vouching.relaying(self._node, self.subject, self._request):
            await self._drive()

    async def _drive(self) -> None:
        try:
            facts = await self._create()
            self._there = facts.name
            self._take(facts)
            if self._wish is not None:
                self._cancel_there(facts.name)
            await self._follow(facts.name)
        except PeermemError as error:
            self.facts = replace(self.facts, state=State.FAILED, error=error)
        except Exception:
            log.exception("relay_defect", transfer=str(self.facts.name))
            defect = Internal(f"{self.facts.name} met a defect of the daemon; its log has the details.")
            self.facts = replace(self.facts, state=State.FAILED, error=defect)
        finally:
            self._end()

    def _end(self) -> None:
        if self._wish is not None and self.facts.state is State.CANCELLED:
            state = State.CANCELLED if isinstance(self._wish, TransferCancelled) else State.FAILED
            self.facts = replace(self.facts, state=state, error=self._wish)
        self.facts = replace(self.facts, duration=time.monotonic() - self._began)
        self._request = TransferRequest(())  # who remembers an ended transfer needs its facts only
        self._span.note(state=self.facts.state.value, done=self.facts.bytes_done, executed_by=self.facts.executed_by)
        self._span.end(self.facts.error)
        self.ended.set()

    def fail(self, error: PeermemError) -> None:
        """See Transfer: has the other node cancel; the outcome comes from there."""
        if self._wish is None:
            self._wish = error
            if self._there is not None:
                self._cancel_there(self._there)

    async def _create(self) -> TransferFacts:
        """Start it there. Asked again it is the same transfer, so a request without an answer is repeated; what is
        refused then, an earlier run of that daemon may have begun."""
        began = time.monotonic()
        lost: NodeUnreachable | None = None
        while True:
            try:
                await reach("relay.create")
                return await self._remote.create_transfer(self._request, self.facts.name.id, self.subject)
            except NodeUnreachable as error:
                if error.metadata.get("code") != "DEADLINE_EXCEEDED" and lost is None:
                    raise
                lost = error
                if self._wish is not None or time.monotonic() - began > _PATIENCE:
                    raise self._lost(error) from error
                await asyncio.sleep(_RETRY)
            except PeermemError as error:
                raise self._lost(lost, error) if lost is not None else error from None

    def _lost(self, error: NodeUnreachable, refusal: PeermemError | None = None) -> NodeUnreachable:
        there = f"{self._there}" if self._there else "the transfer that it was asked for"
        again = f" Asked again it refused: {refusal.message}" if refusal is not None else ""
        return NodeUnreachable(
            f"Contact to nodes/{self._node} is lost: {error.message}{again} If that daemon lives, {there} may go on "
            "there.",
            node=self._node,
            executed_by=self._there or "",
        )

    async def _follow(self, name: ChildName) -> None:
        lost_at: float | None = None
        while True:
            cause = NodeUnreachable(f"nodes/{self._node} broke off its report.", node=self._node)
            try:
                await reach("relay.follow")
                async with aclosing(self._remote.watch_transfer(name, self.subject)) as report:
                    while (facts := await _next(report)) is not None:
                        lost_at = None
                        self._take(facts)
            except TransferNotFound:
                raise NodeUnreachable(
                    f"nodes/{self._node} does not know {name} any more: it was restarted, or the transfer ended too "
                    "long ago. What came of it is not known.",
                    node=self._node,
                    executed_by=name,
                ) from None
            except NodeUnreachable as error:
                cause = error
            if self.facts.state.ended:
                return
            lost_at = lost_at or time.monotonic()
            if time.monotonic() - lost_at > _PATIENCE:
                raise self._lost(cause)
            await asyncio.sleep(_RETRY)
            if self._wish is not None:
                self._cancel_there(name)

    def _take(self, facts: TransferFacts) -> None:
        self.facts = replace(
            self.facts,
            state=facts.state,
            bytes_done=facts.bytes_done,
            fabric=facts.fabric,
            error=facts.error,
            crc32c=facts.crc32c,
            executed_by=str(facts.name),
        )

    def _cancel_there(self, name: ChildName) -> None:
        if self._cancelling is None or self._cancelling.done():
            self._cancelling = asyncio.get_running_loop().create_task(self._cancel(name))

    async def _cancel(self, name: ChildName) -> None:
        with suppress(PeermemError):  # asked again by _follow; the outcome, or the loss of contact, is seen there
            await self._remote.cancel_transfer(name, self.subject)


async def _next(report: AsyncGenerator[TransferFacts, None]) -> TransferFacts | None:
    """Return the next facts of a report, or None when it has ended or says nothing for too long."""
    with suppress(TimeoutError, StopAsyncIteration):
        async with asyncio.timeout(_QUIET):
            return await anext(report)
    return None
