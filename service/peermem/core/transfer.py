"""The life of one transfer on the node that runs it: events in, work out.

Rules of this file:

* PENDING until the first slice may be posted, RUNNING while slices move, then one end. A transfer
  that fails or is cancelled is FENCING until no byte of it can be written late; only then it ends.
* `bytes_done` counts slices that completed with success: bytes known to be in place. A slice that the far end refused,
  or whose link broke, is taken again; no other is posted twice.
* After a failure no slice is posted. The first failure is the one that is reported.
* A leg whose slice was flushed needs a fence at the far end: whether its bytes land is not known.
* Nothing here knows links, clocks or sockets.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from peermem.core.errors import PeermemError, TransferCancelled
from peermem.core.names import ChildName
from peermem.core.plan import Direction
from peermem.core.segments import SegmentList
from peermem.core.types import FabricKind, Path, Ranges, Word


class State(Word):
    """Where a transfer is in its life; values are the contract's enum names."""

    PENDING = "PENDING"
    RUNNING = "RUNNING"
    FENCING = "FENCING"
    SUCCEEDED = "SUCCEEDED"
    FAILED = "FAILED"
    CANCELLED = "CANCELLED"

    @property
    def ended(self) -> bool:
        """Whether nothing changes any more."""
        return self in (State.SUCCEEDED, State.FAILED, State.CANCELLED)


class TransferMachine:
    """What has moved, what is in flight and what is left of one transfer."""

    def __init__(self, legs: int, total: int) -> None:
        """`legs` is how many there are, `total` the bytes of all."""
        self.state = State.PENDING
        self.error: PeermemError | None = None
        self.total = total
        self.done = 0
        self.unfenced: set[int] = set()
        """Legs that need a fence at the far end before the transfer may end."""
        self._work: list[Iterator[Ranges]] = [iter(())] * legs
        self._back: list[deque[Ranges]] = [deque() for _ in range(legs)]
        """Slices that are to be taken again."""
        self._in_flight = 0
        self._left = set(range(legs))
        """Legs that may have slices left."""

    def start(self, work: Sequence[Iterator[Ranges]]) -> None:
        """All links and grants are there: slices may be taken; `work` are those of each leg."""
        if self.state is State.PENDING:
            self.state = State.RUNNING
            self._work = list(work)

    def take(self, leg: int) -> Ranges | None:
        """Return the next slice of a leg to post, or None when the leg has none (any more)."""
        if self.state is not State.RUNNING:
            return None
        back = self._back[leg]
        piece = back.popleft() if back else next(self._work[leg], None)
        if piece is None:
            self._left.discard(leg)
        else:
            self._in_flight += 1
        return piece

    def completed(self, size: int) -> None:
        """A slice of `size` bytes is in place."""
        self._in_flight -= 1
        self.done += size

    def broken(self, leg: int, error: PeermemError, *, flushed: bool) -> None:
        """A slice failed; `flushed` when its bytes may land late unless the far end is fenced."""
        self._in_flight -= 1
        if flushed:
            self.unfenced.add(leg)
        self.fail(error)

    def refused(self, leg: int, ranges: Ranges) -> None:
        """The far end refused a slice, or the rest of it: it will be taken again, which does no harm twice."""
        self._in_flight -= 1
        self._back[leg].append(ranges)
        self._left.add(leg)

    def lost(self, leg: int, ranges: Ranges) -> None:
        """A slice's link broke: it will be taken again, when the leg has been `fenced`."""
        self.refused(leg, ranges)
        self.unfenced.add(leg)

    def fenced(self, leg: int) -> None:
        """Nothing that was posted for a leg so far can be written any more."""
        self.unfenced.discard(leg)

    def fail(self, error: PeermemError) -> None:
        """End the transfer for this reason, unless it has one already or has ended."""
        if not self.state.ended and self.error is None:
            self.error = error
            self.state = State.FENCING

    @property
    def drained(self) -> bool:
        """Whether nothing is in flight and nothing will be."""
        return self._in_flight == 0 and (self.error is not None or (self.state is State.RUNNING and not self._left))

    def finish(self) -> State:
        """Enter the final state; call when drained, fenced and verified. Returns it."""
        if not self.drained:
            raise AssertionError(f"a transfer can't end while {self._in_flight} slices are in flight")
        self._work, self._back = [], []
        if self.error is None:
            self.state = State.SUCCEEDED
        else:
            self.state = State.CANCELLED if isinstance(self.error, TransferCancelled) else State.FAILED
        return self.state


@dataclass(frozen=True, slots=True)
class TransferRequest:
    """What a caller asks for."""

    lists: Sequence[SegmentList]
    timeout: float | None = None
    """Seconds from acceptance until it fails with Timeout."""
    checksum: bool = False
    fabric: FabricKind | None = None
    """Insist on this fabric; None lets the daemon choose."""
    traceparent: str = ""
    """Of the work that it is a part of, if that is traced."""

    @property
    def total(self) -> int:
        """Bytes to move."""
        return sum(entry.total for entry in self.lists)

    @property
    def ends(self) -> tuple[ChildName, ChildName] | None:
        """Source and destination region of the first segments; None where there are none."""
        return (self.lists[0].source, self.lists[0].destination) if self.lists else None

    @property
    def weight(self) -> int:
        """Ranges that are kept for it: what it costs in time and memory."""
        return sum(len(entry.lengths) for entry in self.lists)

    @property
    def segment_count(self) -> int:
        """Segments asked for."""
        return sum(entry.count for entry in self.lists)


@dataclass(frozen=True, slots=True)
class TransferFacts:
    """A transfer as it stands, as told to callers."""

    name: ChildName
    state: State
    bytes_total: int
    bytes_done: int
    segment_count: int
    fabric: FabricKind | None
    direction: Direction
    owner: str
    error: PeermemError | None
    created_at: float
    """Unix time."""
    duration: float | None
    """Seconds from acceptance to the end; None before."""
    crc32c: int | None
    path: Path | None = None
    """How the memory of this node's region is reached; None for a relayed one."""
    executed_by: str = ""
    """Name of the transfer on the node that runs it, for a relayed one."""
    fabric_why: str = ""
    """Why the fabric was chosen, in words; empty for a relayed one."""
    ends: tuple[ChildName, ChildName] | None = None
    """Source and destination region of its first segments, as it was asked for here; None where that is not known."""
    trace_id: str = ""
    """Of the trace that it is kept in; empty for none."""
