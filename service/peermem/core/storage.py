"""Loads and stores: what is asked for, how the bytes went, and how a range is cut at a file's alignment."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

from peermem.core.names import ChildName


class Order(Enum):
    """Which way the bytes go; values are metric labels."""

    LOAD = "load"
    """Out of a file into a region."""
    STORE = "store"
    """Out of a region into a file."""


class Way(Enum):
    """How the bytes went; values are the contract's enum names and metric labels."""

    DIRECT = "DIRECT"
    STAGED = "STAGED"
    BUFFERED = "BUFFERED"


@dataclass(frozen=True, slots=True)
class StorageRequest:
    """What a caller asks for; offsets and lengths in bytes."""

    order: Order
    region: ChildName
    region_offset: int
    path: str
    """Of the file or block device on the region's node."""
    file_offset: int | None
    """None: the file's start, and a file that is stored into is made or replaced as a whole."""
    length: int
    """0: up to the end of what the bytes come out of."""
    checksum: bool
    """Read both sides again afterwards, and compare."""
    traceparent: str = ""
    """Of the work that it is a part of, if that is traced."""


@dataclass(frozen=True, slots=True)
class StorageFacts:
    """A load or store as it stands."""

    bytes_total: int = 0
    """0 as long as the file has not been opened."""
    bytes_done: int = 0
    way: Way | None = None
    """None as long as no byte has moved."""
    why: str = ""
    """Why this way; a sentence."""
    duration: float | None = None
    """Seconds; None before the end."""
    crc32c: int | None = None


@dataclass(frozen=True, slots=True)
class Span:
    """A range of a file and the range of a region that belongs to it."""

    file: int
    region: int
    length: int

    def part(self, start: int, length: int) -> Span:
        """Return `length` bytes of it, from its byte `start` on."""
        return Span(self.file + start, self.region + start, length)


class Cut(NamedTuple):
    """A span in three parts, each of which may be empty."""

    head: Span
    body: Span
    """Begins and ends in the file at multiples of the unit."""
    tail: Span


def cut(span: Span, unit: int) -> Cut:
    """Cut a span where the file's unit asks for it. One that holds no whole unit is all head."""
    head = min(-span.file % unit, span.length)
    body = (span.length - head) // unit * unit
    if not body:
        head = span.length
    tail = span.length - head - body
    return Cut(span.part(0, head), span.part(head, body), span.part(head + body, tail))
