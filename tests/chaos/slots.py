"""What jobs write into slots of regions, and how they tell what is in one."""

from __future__ import annotations

import random
import zlib

import numpy
from numpy.typing import NDArray

from tests.chaos.model import ZERO

SLOT = 256 << 10
"""Bytes of a slot."""
_BASE: NDArray[numpy.uint64] = numpy.frombuffer(random.Random(1).randbytes(SLOT), numpy.uint64)

Words = NDArray[numpy.uint64]


def words(view: memoryview) -> Words:
    """Return a region's memory in words, one row for each slot."""
    return numpy.frombuffer(view, numpy.uint64).reshape(-1, SLOT // 8)


def fill(memory: Words, first: int, count: int, value: str) -> None:
    """Write slots so that each byte tells which value it is of, and where in its slot it belongs."""
    memory[first : first + count] = _BASE ^ numpy.uint64(int(value, 16))


def look(memory: Words, first: int, count: int) -> tuple[str, ...]:
    """Return what each slot holds: the value that was filled in, ZERO, or a name for any other content."""
    return tuple(_value(row) for row in memory[first : first + count])


def _value(row: Words) -> str:
    seen = row.copy()  # one look: others may be writing
    if not seen.any():
        return ZERO
    value = seen[0] ^ _BASE[0]
    if (seen == _BASE ^ value).all():
        return f"{int(value):x}"
    return f"mixed:{zlib.crc32(seen.tobytes()):08x}"
