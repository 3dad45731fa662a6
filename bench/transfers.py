"""What transfers through the client cost, shape by shape: from the request to the outcome in the caller's hands.

Rules of this file:

* As the engines' programs do it: one transfer at a time, two to warm up, and the bytes looked at afterwards.
* Each transfer is asked for anew, ranges and all; the engines' programs prepare theirs once.
* `contiguous` segments lie as the engines' do, back to back on both sides. `scattered` ones have a gap of a
  segment's size behind each on both sides: there is nothing to merge.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from time import perf_counter

import peermem
from bench.daemons import Daemon
from bench.figures import Measured, Sample, Shape, sample

_WARM_UP = 2
_TIMEOUT = 60.0
_CHUNK = 1 << 20
_LOOK = 8
"""Bytes compared at both ends of each segment."""


class Layout(StrEnum):
    """How segments lie in both regions."""

    CONTIGUOUS = "contiguous"
    SCATTERED = "scattered"

    def offsets(self, shape: Shape) -> range:
        """Return where the segments of a shape start."""
        step = shape.size * (1 if self is Layout.CONTIGUOUS else 2)
        return range(0, step * shape.segments, step)


@dataclass(frozen=True, slots=True)
class Pair:
    """Two regions of the same length, both mapped here."""

    node: peermem.Node
    source: peermem.Region
    target: peermem.Region
    read: memoryview
    written: memoryview

    def measure(self, iterations: Mapping[Shape, int], layout: Layout) -> Measured:
        """Measure each shape. Raises RuntimeError when the bytes at the destination are not the source's."""
        return {shape: self._sample(shape, layout, count) for shape, count in iterations.items()}

    def _sample(self, shape: Shape, layout: Layout, count: int) -> Sample:
        offsets = layout.offsets(shape)
        self._wipe(offsets, shape.size)
        columns = [(self.source, offsets, self.target, offsets, shape.size)]
        times = []
        for _ in range(_WARM_UP + count):
            began = perf_counter()
            self.node.transfer(segments=columns).wait(_TIMEOUT)
            times.append(perf_counter() - began)
        self._compare(offsets, shape.size)
        return sample(shape.total, times[_WARM_UP:])

    def _wipe(self, offsets: range, size: int) -> None:
        for offset in offsets:
            for at in (offset, offset + size - _LOOK):
                self.written[at : at + _LOOK] = bytes(_LOOK)

    def _compare(self, offsets: range, size: int) -> None:
        for offset in offsets:
            for at in (offset, offset + size - _LOOK):
                if self.read[at : at + _LOOK] != self.written[at : at + _LOOK]:
                    raise RuntimeError(f"Bytes at {at} of {self.target.name} are not those of {self.source.name}.")


@contextmanager
def pair(source: Daemon, target: Daemon, shapes: Mapping[Shape, int]) -> Iterator[Pair]:
    """Make two regions in which all these shapes fit in either layout, the first one full of random bytes."""
    length = room(shapes)
    with peermem.connect(source.target) as a, peermem.connect(target.target) as b:
        regions = a.create_region(device="bar0", length=length), b.create_region(device="bar0", length=length)
        with regions[0].map() as read, regions[1].map() as written:
            for start in range(0, length, _CHUNK):
                count = min(_CHUNK, length - start)
                read[start : start + count] = os.urandom(count)
                written[start : start + count] = bytes(count)
            yield Pair(a, *regions, read, written)


def room(shapes: Mapping[Shape, int]) -> int:
    """Return the bytes that one region of a pair needs."""
    return max(layout.offsets(shape)[-1] + shape.size for shape in shapes for layout in Layout)
