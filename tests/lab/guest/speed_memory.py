"""Memory that speed is measured on: the same for the fabric and for what it is compared with.

Rules of this file:

* Bytes are moved in slices of 1 MiB, each of segments that lie two of their own sizes apart on both sides: nothing can
  be merged.
* `mark` makes the ends of all segments new, so that it shows afterwards whether the right bytes moved.
"""

from __future__ import annotations

import os

from peermem import memory
from peermem.core.types import Path, Ranges
from peermem.device.p2pmem import p2pmem_devices
from peermem.memory import HostMemory, Memory

MIB = 1 << 20
SLICE = MIB
LENGTH = 16 * MIB
OUTSTANDING = 16
"""Slices on the way at the same time."""
_MARK = 8

PATHS = {"host": Path.HOST, "bar": Path.P2PDMA}
"""Kinds of memory: this process's own, or a device's BAR."""


async def allocate(kind: str) -> Memory:
    """Return memory of a kind; it is the process's until it ends."""
    if kind == "host":
        made = HostMemory(LENGTH, "speed")
        made.view()[:] = bytes(LENGTH)
        return made
    (device,) = p2pmem_devices()
    return await device.allocate(LENGTH)


def slices(segment: int) -> list[Ranges]:
    """Return what is moved, at the same offsets on both sides."""
    starts = range(0, LENGTH, 2 * segment)
    count = SLICE // segment
    chunks = [starts[at : at + count] for at in range(0, len(starts), count)]
    return [Ranges(chunk, chunk, [segment] * count, SLICE) for chunk in chunks]


def mark(where: Memory, segment: int) -> None:
    """Put new bytes at both ends of each segment."""
    for at in _ends(segment):
        memory.write(where, at, os.urandom(_MARK))


def marks(where: Memory, segment: int) -> bytes:
    """Return the bytes at both ends of each segment."""
    return b"".join(memory.read(where, at, _MARK) for at in _ends(segment))


def _ends(segment: int) -> list[int]:
    return [at for start in range(0, LENGTH, 2 * segment) for at in (start, start + segment - _MARK)]
