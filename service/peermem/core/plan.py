"""Decides where a transfer runs, over which fabric, and in which slices.

Rules of this file:

* A transfer runs on a node that holds the source or the destination of every segment: here if this
  node does, else where the first source is, else where the first destination is.
* Where both regions are here the fabric is local. Where one is here: verbs first, then tcp, out of
  those that this node serves; which one it becomes shows when the far end has been asked. What the
  caller insists on is used or refused, never replaced.
* A leg's ranges at the far end count from the first byte that it touches there, as its grant does, which opens no more.
* A slice is one work request: at most so many bytes and so many pairs of ranges as the fabric likes. Ranges that
  begin at multiples of what their memory asks for are cut there, too.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from operator import add

from peermem.core.errors import FabricUnavailable, NoCommonNode
from peermem.core.names import ChildName
from peermem.core.segments import SegmentList, check_disjoint, merged
from peermem.core.types import FabricKind, Ranges, Word


class Direction(Word):
    """Which way bytes go, seen from the node that was asked; values are metric labels."""

    LOCAL = "local"
    PUSH = "push"
    PULL = "pull"
    RELAYED = "relayed"


@dataclass(frozen=True, slots=True)
class Leg:
    """The part of a transfer between one local region and one other region, on one link."""

    local: ChildName
    other: ChildName
    """The region at the far end: on a remote node, or here as well for the local fabric."""
    direction: Direction
    fabrics: Sequence[FabricKind]
    """What it may run over, the best first; at least one."""
    start: int
    """The first byte that it touches in `other`."""
    length: int
    """Bytes from `start` to behind the last one that it touches there."""
    local_start: int
    local_length: int
    """The same for `local`."""
    ranges: Ranges
    """`local` offsets are in `local`, `remote` offsets in `other` from `start`."""


def plan_transfer(
    lists: Sequence[SegmentList], here: str, served: Collection[FabricKind], wanted: FabricKind | None
) -> tuple[str, list[Leg]]:
    """Return the node that runs the transfer, and its legs if that is this one.

    Raises SegmentsOverlap, NoCommonNode, FabricUnavailable.
    """
    check_disjoint(lists)
    node = executing_node(lists, here)
    return node, legs(lists, here, served, wanted) if node == here else []


def executing_node(lists: Sequence[SegmentList], here: str) -> str:
    """Return the node that runs the transfer. Raises NoCommonNode."""
    candidates = set.intersection(*({entry.source.node, entry.destination.node} for entry in lists))
    for node in (here, lists[0].source.node, lists[0].destination.node):
        if node in candidates:
            return node
    raise NoCommonNode("No node holds the source or the destination of every segment. Make one transfer per pair.")


def legs(
    lists: Sequence[SegmentList], here: str, served: Collection[FabricKind], wanted: FabricKind | None
) -> list[Leg]:
    """Return the legs of a transfer that this node runs.

    `served` are the fabrics that this node can use towards remote nodes. Raises FabricUnavailable.
    """
    return [_leg(entry, here, served, wanted) for entry in lists]


def _leg(entry: SegmentList, here: str, served: Collection[FabricKind], wanted: FabricKind | None) -> Leg:
    source_here, destination_here = entry.source.node == here, entry.destination.node == here
    if source_here and destination_here:
        fabrics = _choose(entry, (FabricKind.LOCAL,), wanted)
        direction = Direction.LOCAL
    else:
        fabrics = _choose(entry, [kind for kind in (FabricKind.VERBS, FabricKind.TCP) if kind in served], wanted)
        direction = Direction.PUSH if source_here else Direction.PULL
    if source_here:
        ranges = merged(entry.source_offsets, entry.destination_offsets, entry.lengths)
        return Leg(entry.source, entry.destination, direction, fabrics, *_from_hull(ranges))
    ranges = merged(entry.destination_offsets, entry.source_offsets, entry.lengths)
    return Leg(entry.destination, entry.source, direction, fabrics, *_from_hull(ranges))


def _from_hull(ranges: Ranges) -> tuple[int, int, int, int, Ranges]:
    """Return the first byte and the length of the hull of the remote ranges, the same of the local ones, and the ranges
    with remote offsets from that first byte."""
    if len(ranges.lengths) == 1:  # most are so
        here, there, length = ranges.local[0], ranges.remote[0], ranges.total
        return there, length, here, length, Ranges.single(here, 0, length)
    (start, length), hull = (_hull(offsets, ranges.lengths) for offsets in (ranges.remote, ranges.local))
    if start:
        ranges = Ranges(ranges.local, [offset - start for offset in ranges.remote], ranges.lengths, ranges.total)
    return start, length, *hull, ranges


def _hull(offsets: Sequence[int], lengths: Sequence[int]) -> tuple[int, int]:
    start = min(offsets)
    return start, max(map(add, offsets, lengths)) - start


def _choose(entry: SegmentList, possible: Sequence[FabricKind], wanted: FabricKind | None) -> Sequence[FabricKind]:
    if possible and (wanted is None or wanted in possible):
        return (wanted,) if wanted else tuple(possible)
    names = " or ".join(kind.value for kind in possible) or "no fabric"
    raise FabricUnavailable(
        f"From {entry.source} to {entry.destination} this node has {names}, "
        f"not {wanted.value if wanted else 'any'}. Leave the choice to the daemon.",
        wanted=wanted.value if wanted else "",
    )


def slices(ranges: Ranges, slice_bytes: int, slice_ranges: int, alignment: int = 1) -> Iterator[Ranges]:
    """Cut `ranges` into pieces of at most `slice_bytes` bytes and `slice_ranges` pairs, in order.

    No range is cut but after a multiple of `alignment`, which `slice_bytes` is a multiple of as well.
    """
    if ranges.total <= slice_bytes and len(ranges.lengths) <= slice_ranges:
        yield ranges
        return
    local: list[int] = []
    remote: list[int] = []
    lengths: list[int] = []
    room = slice_bytes
    for start_here, start_there, length in zip(ranges.local, ranges.remote, ranges.lengths, strict=True):
        done = 0
        while done < length:
            size = min(length - done, room)
            if size < length - done and size % alignment:
                size -= size % alignment
                if not size:
                    yield Ranges(local, remote, lengths, slice_bytes - room)
                    local, remote, lengths, room = [], [], [], slice_bytes
                    continue
            local.append(start_here + done)
            remote.append(start_there + done)
            lengths.append(size)
            done += size
            room -= size
            if room == 0 or len(lengths) == slice_ranges:
                yield Ranges(local, remote, lengths, slice_bytes - room)
                local, remote, lengths, room = [], [], [], slice_bytes
    if lengths:
        yield Ranges(local, remote, lengths, slice_bytes - room)
