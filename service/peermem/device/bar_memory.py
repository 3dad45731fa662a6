"""What devices whose memory is a BAR have in common: giving out parts of it, zeroed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing

from peermem.core.errors import DeviceFull, DeviceLost, LimitReached, RegionRevoked
from peermem.core.units import format_size
from peermem.device.base import Copier, DeviceMemory
from peermem.device.free_ranges import FreeRanges
from peermem.memory import HostMemory

_ZEROS = 1 << 20

Range = tuple[int, int]
"""Offset and length."""


def take(device: str, free: FreeRanges, size: int, length: int) -> int:
    """Return where `length` free bytes of a device begin, in one piece, taken from now on. Raises DeviceFull."""
    start = free.take(length)
    if start is None:
        raise DeviceFull(
            f"Device {device} has {format_size(free.total)} of {format_size(size)} left, "
            f"{format_size(free.largest)} in one piece; {format_size(length)} were asked for. Delete regions, or use "
            "another device.",
            device=device,
            available=free.total,
            wanted=length,
        )
    return start


async def zero(device: str, memory: DeviceMemory, copier: Copier, length: int) -> None:
    """Fill new memory with zeros; where that fails, close it and raise DeviceLost or LimitReached."""
    pieces = [(start, 0, min(_ZEROS, length - start)) for start in range(0, length, _ZEROS)]
    try:
        with closing(HostMemory(min(length, _ZEROS), "peermem-zeros")) as zeros:
            await copier.store(zeros, pieces)
    except BaseException as error:
        memory.close()
        if isinstance(error, RegionRevoked):
            raise DeviceLost(error.message, device=device) from error
        if isinstance(error, OSError):
            raise LimitReached(
                f"Memory of device {device} can't be zeroed: {error.strerror}. Raise the daemon's limit of open files "
                "(LimitNOFILE), or delete regions.",
                device=device,
            ) from error
        raise


def parts(ranges: Sequence[Range], start: int, length: int) -> Iterator[Range]:
    """Yield what `length` bytes from `start` on are in ranges that are put one behind the other."""
    for offset, size in ranges:
        if length and start < size:
            taken = min(length, size - start)
            yield offset + start, taken
            length -= taken
            start = size
        start -= size
