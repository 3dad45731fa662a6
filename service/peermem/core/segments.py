"""What a transfer is asked to move: lists of paired ranges, kept as columns.

Rules of this file:

* A list has one source region and one destination region; entry i of its columns is segment i.
* Ten thousand segments are three columns, never ten thousand objects.
* Every number may come from a socket. Python's integers do not overflow, so `offset + length` is exact.
* Destinations of one transfer never overlap each other nor a source in the same region: the outcome
  would depend on the order in which slices land. Such a transfer is refused, not ordered.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from operator import add, le

from peermem.core.errors import InvalidField, OutOfRange, SegmentsMismatch, SegmentsOverlap, ZeroLength
from peermem.core.names import ChildName
from peermem.core.types import Ranges


@dataclass(frozen=True, slots=True)
class SegmentList:
    """Segments from one source region to one destination region."""

    source: ChildName
    destination: ChildName
    source_offsets: Sequence[int]
    destination_offsets: Sequence[int]
    lengths: Sequence[int]
    count: int
    """Segments that were asked for; the columns may hold fewer, where neighbours were one from the start."""
    total: int
    """Bytes."""

    def check_inside(self, name: ChildName, length: int) -> None:
        """Raise OutOfRange unless all ranges on the region `name` of `length` bytes are inside it."""
        for region, offsets in ((self.source, self.source_offsets), (self.destination, self.destination_offsets)):
            reach = _reach(offsets, self.lengths) if region == name else 0
            if reach > length:
                raise OutOfRange(
                    f"A segment reaches to byte {reach} of {name}, which has {length} bytes.",
                    region=name,
                    reach=reach,
                    length=length,
                )


def columns(
    source: ChildName,
    destination: ChildName,
    source_offsets: Sequence[int],
    destination_offsets: Sequence[int],
    lengths: Sequence[int],
) -> SegmentList:
    """Return the list of any ranges; a single length stands for all.

    Raises SegmentsMismatch when the columns differ in length, ZeroLength for an empty segment or list,
    OutOfRange for bytes that no memory can have.
    """
    count = len(source_offsets)
    if len(lengths) == 1 and count > 1:
        lengths = [lengths[0]] * count
    if not count == len(destination_offsets) == len(lengths):
        raise SegmentsMismatch(
            f"The list from {source} to {destination} has {count} source offsets, "
            f"{len(destination_offsets)} destination offsets and {len(lengths)} lengths; they must be as many.",
            source_offsets=count,
            destination_offsets=len(destination_offsets),
            lengths=len(lengths),
        )
    if count == 0 or min(lengths) == 0:
        raise ZeroLength(f"A segment from {source} to {destination} has no bytes; leave it out.")
    total = sum(lengths)
    check_possible(max(total, _reach(source_offsets, lengths), _reach(destination_offsets, lengths)))
    return SegmentList(source, destination, source_offsets, destination_offsets, lengths, count, total)


@dataclass(frozen=True, slots=True)
class Stride:
    """One side of a strided list: offsets `start`, `start + step`, ... in bytes."""

    start: int
    step: int


def strided(
    source: ChildName, destination: ChildName, read: Stride, write: Stride, length: int, count: int, limit: int
) -> SegmentList:
    """Return the list of `count` ranges of `length` bytes at regular distances.

    Ranges that touch on both sides become one. Raises ZeroLength, InvalidField for more than `limit`
    segments, SegmentsOverlap when the destinations overlap, OutOfRange for bytes that no memory can have.
    """
    if length == 0 or count == 0:
        raise ZeroLength(f"The strided list from {source} to {destination} has no bytes.")
    check_possible(max(read.start + read.step * count, write.start + write.step * count) + length * count)
    if count > 1 and write.step < length:
        raise SegmentsOverlap(
            f"The strided list to {destination} has a destination stride of {write.step} bytes "
            f"below its length of {length} bytes.",
            region=destination,
        )
    if count == 1 or read.step == write.step == length:
        return SegmentList(source, destination, (read.start,), (write.start,), (length * count,), count, length * count)
    check_count(count, limit)
    sources = range(read.start, read.start + read.step * count, read.step) if read.step else (read.start,) * count
    targets = range(write.start, write.start + write.step * count, write.step)
    return SegmentList(source, destination, sources, targets, (length,) * count, count, length * count)


def check_possible(reach: int) -> None:
    """Raise OutOfRange when a number of bytes is more than any memory has: offsets and sums fit 63 bits."""
    if reach >= _TOO_FAR:
        raise OutOfRange(f"The segments reach to byte {reach}, which no region has.", reach=reach)


_TOO_FAR = 1 << 63


def check_count(count: int, room: int) -> None:
    """Raise InvalidField when a list of `count` separate segments is more than a transfer may (still) have."""
    if count > room:
        raise InvalidField(
            f"A list of {count} segments is above the {room} that this node lets the transfer have. Split it.",
            field="segments",
            limit=room,
        )


def check_disjoint(lists: Sequence[SegmentList]) -> None:
    """Raise SegmentsOverlap when a destination overlaps another destination or a source in the same region."""
    if len(lists) == 1 and lists[0].source != lists[0].destination and _ascending(lists[0]):
        return
    written: dict[ChildName, list[tuple[int, int]]] = {}
    for entry in lists:
        written.setdefault(entry.destination, []).extend(_intervals(entry.destination_offsets, entry.lengths))
    read: dict[ChildName, list[tuple[int, int]]] = {}
    for entry in lists:
        if entry.source in written:
            read.setdefault(entry.source, []).extend(_intervals(entry.source_offsets, entry.lengths))
    for region, writes in written.items():
        writes.sort()
        for (_, end), (start, _) in pairwise(writes):
            if start < end:
                raise SegmentsOverlap(f"Two destinations overlap at byte {start} of {region}.", region=region)
        starts = [start for start, _ in writes]
        for start, end in read.get(region, ()):
            before = bisect_right(starts, end - 1) - 1
            if before >= 0 and writes[before][1] > start:
                raise SegmentsOverlap(
                    f"Bytes {start} to {end} of {region} are read and written by the same transfer. "
                    "Copy through another region.",
                    region=region,
                )


def merged(local: Sequence[int], remote: Sequence[int], lengths: Sequence[int]) -> Ranges:
    """Return the ranges with neighbours that touch on both sides made one; order is kept."""
    if len(lengths) == 1:
        return Ranges.single(local[0], remote[0], lengths[0])
    out_local: list[int] = []
    out_remote: list[int] = []
    out_lengths: list[int] = []
    end_local = end_remote = -1
    for here, there, length in zip(local, remote, lengths, strict=True):
        if here == end_local and there == end_remote:
            out_lengths[-1] += length
        else:
            out_local.append(here)
            out_remote.append(there)
            out_lengths.append(length)
        end_local = here + length
        end_remote = there + length
    return Ranges(out_local, out_remote, out_lengths, sum(out_lengths))


def _ascending(entry: SegmentList) -> bool:
    """Whether each destination starts behind the one before: the usual case, decided without sorting."""
    ends = map(add, entry.destination_offsets, entry.lengths)
    return all(map(le, ends, entry.destination_offsets[1:]))


def _reach(offsets: Sequence[int], lengths: Sequence[int]) -> int:
    reach: int = max(map(add, offsets, lengths))
    return reach


def _intervals(offsets: Sequence[int], lengths: Sequence[int]) -> Iterator[tuple[int, int]]:
    return zip(offsets, map(add, offsets, lengths), strict=True)
