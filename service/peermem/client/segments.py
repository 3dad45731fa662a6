"""Which bytes a transfer moves: from what a program says to the packed columns of the contract.

Rules of this file:

* Pure: no call is made here. Where a length has to be asked for, `Plan.unknown` names the region.
* One `SegmentList` per pair of regions, however many ranges: ten thousand ranges are three columns.
* Totals are compared before anything is sent. Ranges are checked against regions by the daemon alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from operator import index
from typing import Protocol, SupportsIndex

from peermem.core.errors import InvalidField, SegmentsMismatch, ZeroLength
from peermem.core.names import parse_region
from peermem.v1 import transfer_pb2


class Named(Protocol):
    """Anything with the name of a region, such as a Region."""

    @property
    def name(self) -> str:
        """nodes/{node}/regions/{region}."""


class Sized(Named, Protocol):
    """A region whose length is known."""

    @property
    def length(self) -> int:
        """Bytes."""


@dataclass(frozen=True, slots=True)
class Slice:
    """A range of a region: what `region[0:4096]` gives, and what names a range of a remote region."""

    region: str
    """nodes/{node}/regions/{region}, or the last part alone for a region of the node that is asked."""
    offset: int
    length: int

    @staticmethod
    def of(region: Sized, key: slice) -> Slice:
        """Return the range that `region[key]` means. Raises ValueError for a step."""
        start, stop, step = key.indices(region.length)
        if step != 1:
            raise ValueError("A slice of a region takes no step; use peermem.Strided for regular distances.")
        return Slice(region.name, start, max(0, stop - start))


@dataclass(frozen=True, slots=True)
class Strided:
    """`count` ranges of `length` bytes at regular distances in both regions."""

    source: str | Named
    destination: str | Named
    length: int
    count: int
    source_stride: int
    destination_stride: int
    source_offset: int = 0
    destination_offset: int = 0


Operand = str | Sized | Slice
"""One thing to read or write: a region, a range of one, or a region's name."""

Side = Operand | Sequence[Operand]
"""All that a transfer reads, or all that it writes."""

Integers = Iterable[SupportsIndex]
"""Any column of integers: a list, a range, an array, a NumPy array."""

Columns = tuple[str | Named, Integers, str | Named, Integers, Integers | SupportsIndex]
"""(source region, offsets, destination region, offsets, lengths or one length for all)."""

Segments = Iterable[Columns | Strided]
"""Ranges given as columns or at regular distances, for each pair of regions."""


class Plan:
    """What a source side and a destination side come to, once the lengths of `unknown` are told.

    Raises InvalidField for what names no region, ZeroLength for an empty range.
    """

    def __init__(self, source: Side | None, destination: Side | None, node: str) -> None:
        self._node = node
        self._sources = [_part(operand, node) for operand in _listed(source)]
        self._destinations = [_part(operand, node) for operand in _listed(destination)]
        if not self._sources or not self._destinations:
            raise InvalidField("A transfer needs at least one source and one destination.", field="segments")

    @property
    def unknown(self) -> list[str]:
        """Names of the regions whose lengths have to be asked for.

        A side that is one name alone takes the other side's total; where both are, one on the node
        that is asked is preferred, because only its own node knows a region.
        """
        sources = [part for part in self._sources if isinstance(part, str)]
        destinations = [part for part in self._destinations if isinstance(part, str)]
        here = f"{self._node}/"
        only_destination_here = not any(name.startswith(here) for name in sources) and any(
            name.startswith(here) for name in destinations
        )
        if _is_open(self._destinations) and not (_is_open(self._sources) and only_destination_here):
            return sources
        return destinations if _is_open(self._sources) else sources + destinations

    def segments(self, lengths: Mapping[str, int]) -> list[transfer_pb2.SegmentList]:
        """Pair both sides up, given the lengths of the `unknown` regions.

        Raises SegmentsMismatch when the totals differ.
        """
        read, written = _total(self._sources, lengths), _total(self._destinations, lengths)
        read, written = written if read is None else read, read if written is None else written
        if read is None or read != written:
            raise SegmentsMismatch(
                f"The sources have {read} bytes in all and the destinations {written}; make both the same.",
                source_bytes=read,
                destination_bytes=written,
            )
        columns: dict[tuple[str, str], tuple[list[int], list[int], list[int]]] = {}
        sources = [_slice(part, lengths, read) for part in self._sources]
        for source, destination, length in _pieces(sources, [_slice(p, lengths, read) for p in self._destinations]):
            reads, writes, counts = columns.setdefault((source.region, destination.region), ([], [], []))
            reads.append(source.offset)
            writes.append(destination.offset)
            counts.append(length)
        with _unsigned():
            return [_packed(source, destination, *column) for (source, destination), column in columns.items()]


def explicit(segments: Segments, node: str) -> list[transfer_pb2.SegmentList]:
    """Return the packed form of ranges given as columns or at regular distances.

    Raises SegmentsMismatch for columns of different lengths, InvalidField for what is no column.
    """
    with _unsigned():
        return [_strided(item, node) if isinstance(item, Strided) else _columns(item, node) for item in segments]


def full_name(region: str | Named, node: str) -> str:
    """Return a region's name; the last part alone means a region of `node`. Raises InvalidField."""
    name = region if isinstance(region, str) else region.name
    return str(parse_region(name if "/" in name else f"{node}/regions/{name}", "region"))


_Part = Slice | str
"""A range, or the full name of a region whose length is not known yet."""


def _listed(side: Side | None) -> Sequence[Operand]:
    if isinstance(side, str) or not isinstance(side, Sequence):
        return [] if side is None else [side]
    return side


def _part(operand: Operand, node: str) -> _Part:
    if isinstance(operand, str):
        return full_name(operand, node)
    if isinstance(operand, Slice):
        operand = Slice(full_name(operand.region, node), operand.offset, operand.length)
    else:
        operand = Slice(operand.name, 0, operand.length)
    if operand.length < 1:
        raise ZeroLength(f"A range of {operand.region} is empty; give it at least one byte.", region=operand.region)
    return operand


def _is_open(parts: list[_Part]) -> bool:
    return len(parts) == 1 and isinstance(parts[0], str)


def _total(parts: list[_Part], lengths: Mapping[str, int]) -> int | None:
    """Return the bytes of a side; None where it is one name alone that takes the other side's."""
    if _is_open(parts):
        return lengths.get(str(parts[0]))
    return sum(part.length if isinstance(part, Slice) else lengths[part] for part in parts)


def _slice(part: _Part, lengths: Mapping[str, int], total: int) -> Slice:
    return part if isinstance(part, Slice) else Slice(part, 0, lengths.get(part, total))


def _pieces(sources: Sequence[Slice], destinations: Sequence[Slice]) -> Iterator[tuple[Slice, Slice, int]]:
    """Walk both sides at once and cut at each end of either: equal totals, whatever the shapes."""
    remaining = iter(destinations)
    target, written = next(remaining), 0
    for source in sources:
        read = 0
        while read < source.length:
            if written == target.length:
                target, written = next(remaining), 0
            step = min(source.length - read, target.length - written)
            yield (
                Slice(source.region, source.offset + read, step),
                Slice(target.region, target.offset + written, step),
                step,
            )
            read, written = read + step, written + step


def _columns(columns: Columns, node: str) -> transfer_pb2.SegmentList:
    if not isinstance(columns, tuple) or len(columns) != 5:
        raise InvalidField(
            "Each of `segments` must be peermem.Strided or (source, offsets, destination, offsets, lengths).",
            field="segments",
        )
    source, reads, destination, writes, lengths = columns
    if not isinstance(lengths, Iterable):
        lengths = [lengths]
    return _packed(full_name(source, node), full_name(destination, node), *map(_integers, (reads, writes, lengths)))


def _integers(column: Integers) -> Sequence[int]:
    # NumPy and array.array turn a whole column into ints at once; one by one is 20 times slower.
    whole: Callable[[], list[int]] | None = getattr(column, "tolist", None)
    return whole() if whole else [index(value) for value in column]


def _packed(
    source: str, destination: str, reads: Sequence[int], writes: Sequence[int], lengths: Sequence[int]
) -> transfer_pb2.SegmentList:
    if len(reads) != len(writes) or len(lengths) not in (1, len(reads)):
        raise SegmentsMismatch(
            f"Columns from {source} to {destination} have {len(reads)} source offsets, {len(writes)} destination "
            f"offsets and {len(lengths)} lengths; make them equal, or give one length for all.",
            source=source,
            destination=destination,
        )
    same = len(lengths) > 1 and lengths.count(lengths[0]) == len(lengths)
    return transfer_pb2.SegmentList(
        source=source,
        destination=destination,
        ranges=transfer_pb2.Ranges(
            source_offsets=reads, destination_offsets=writes, lengths=lengths[:1] if same else lengths
        ),
    )


def _strided(item: Strided, node: str) -> transfer_pb2.SegmentList:
    return transfer_pb2.SegmentList(
        source=full_name(item.source, node),
        destination=full_name(item.destination, node),
        strided=transfer_pb2.Strided(
            source_offset=item.source_offset,
            source_stride=item.source_stride,
            destination_offset=item.destination_offset,
            destination_stride=item.destination_stride,
            length=item.length,
            count=item.count,
        ),
    )


@contextmanager
def _unsigned() -> Iterator[None]:
    """Turn what operator.index and protobuf say about other numbers into a fault."""
    try:
        yield
    except (ValueError, TypeError) as error:
        raise InvalidField(
            f"Offsets, strides, lengths and counts are integers from 0 to 2^64-1 ({error}).", field="segments"
        ) from None
