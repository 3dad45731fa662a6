"""What a trace holds of one leg of a transfer, and of a grant at the node that gives it.

Rules of this file:

* A slice has a span of its own if it is one of the first `FIRST`, or goes out again, up to `AGAIN` times: a transfer of
  a terabyte has as many spans as one of a gigabyte. The others are counted.
* A leg that is not traced costs one look for each slice.
"""

from __future__ import annotations

from peermem.broker.links import HeldGrant, OutboundLink
from peermem.core.errors import PeermemError
from peermem.core.grant import Wanted
from peermem.core.plan import Leg
from peermem.core.spans import Span, join
from peermem.core.types import FabricKind, Path
from peermem.fabric.base import Status, WorkRequest

FIRST, AGAIN = 8, 24


def grant_span(wanted: Wanted, fabric: FabricKind) -> Span:
    """Begin what a trace of whoever asks for a grant holds of it; it ends with the grant."""
    return join(
        "grant",
        wanted.traceparent,
        region=str(wanted.region),
        right=str(wanted.right.name).lower(),
        length=wanted.length,
        fabric=fabric.value,
    )


class LegTrace:
    """The span of a leg, and those of its parts."""

    def __init__(self, transfer: Span, leg: Leg) -> None:
        self._span = transfer.child(
            "leg", local=str(leg.local), other=str(leg.other), direction=leg.direction.value, length=leg.ranges.total
        )
        self._on = bool(self._span.trace_id)
        self._slices: dict[int, Span] = {}
        """Those that are out and have one, by the identity of their request."""
        self._posted = self._retried = 0
        self._waiting = 0
        """Slices that came back and go out again next."""

    async def grant(self, link: OutboundLink, wanted: Wanted) -> HeldGrant:
        """Return a grant, as `link.grant` does, whose far end's part is a part of this. Raises as that."""
        with self._span.child("grant.acquire", node=link.node, fabric=link.fabric.kind.value) as span:
            return await link.grant(wanted._replace(traceparent=span.traceparent))

    def posted(self, request: WorkRequest | None) -> WorkRequest | None:
        """A slice goes out; returns it."""
        if request is None or not self._on:
            return request
        again, self._waiting = self._waiting > 0, max(0, self._waiting - 1)
        self._posted += 1
        self._retried += again
        if self._posted <= FIRST or (again and self._retried <= AGAIN):
            ranges = request.ranges
            self._slices[id(request)] = self._span.child(
                "slice", operation=request.opcode.name, length=ranges.total, ranges=len(ranges.lengths), again=again
            )
        return request

    def completed(self, request: WorkRequest, status: Status) -> None:
        """A slice came back."""
        if not self._on:
            return
        self._waiting += status is not Status.SUCCESS
        span = self._slices.pop(id(request), None)
        if span is not None:
            span.note(status=status.value)
            span.end(None if status is Status.SUCCESS else _CameBack())

    def end(self, fabric: FabricKind, path: Path, error: PeermemError | None) -> None:
        """The leg is over."""
        self._span.note(fabric=fabric.value, path=path.value, slices=self._posted, retried=self._retried)
        self._span.end(error)


class _CameBack(Exception):
    """What the error of a slice's span is called; its status says more."""
