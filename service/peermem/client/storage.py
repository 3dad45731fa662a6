"""Loads and stores in the hands of a program: requests, progress and outcome; pure.

Rules of this file:

* The same for the synchronous and the asyncio client, whose channels carry the messages.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Self

from peermem.client.facts import Progress
from peermem.client.requests import request_id, size
from peermem.core.errors import Internal, InvalidField, OutOfRange, ZeroLength
from peermem.v1 import region_pb2

Watcher = Callable[[Progress], None]


class StorageWay(StrEnum):
    """How the bytes of a load or store went."""

    UNSPECIFIED = "UNSPECIFIED"
    DIRECT = "DIRECT"
    """The file's device read or wrote the region's memory itself."""
    STAGED = "STAGED"
    """It read or wrote host memory, and the CPU copied."""
    BUFFERED = "BUFFERED"
    """Through the page cache."""


_WAYS = dict(enumerate(StorageWay))


@dataclass(frozen=True, slots=True)
class StorageInfo:
    """A load or store that succeeded."""

    bytes_done: int
    duration: float
    """Seconds."""
    way: StorageWay
    why: str
    """Why this way."""
    crc32c: int | None
    """Of the bytes, where it was asked for."""

    @property
    def bandwidth(self) -> float | None:
        """Bytes per second."""
        return self.bytes_done / self.duration if self.duration else None

    @classmethod
    def from_proto(cls, outcome: region_pb2.StorageProgress) -> Self:
        """Return the facts of a call's last message."""
        return cls(
            bytes_done=outcome.bytes_done,
            duration=outcome.duration.ToNanoseconds() / 1e9,
            way=_WAYS.get(outcome.way, StorageWay.UNSPECIFIED),
            why=outcome.why,
            crc32c=outcome.crc32c if outcome.HasField("crc32c") else None,
        )


class Course:
    """The messages of one call, as they come."""

    def __init__(self, watcher: Watcher | None) -> None:
        """`watcher` is told of progress; what it raises ends the call."""
        self._watcher = watcher
        self._began = time.monotonic()
        self._last = region_pb2.StorageProgress()

    def take(self, message: region_pb2.StorageProgress) -> None:
        """Take the next message."""
        self._last = message
        if self._watcher is not None:
            elapsed = max(time.monotonic() - self._began, 1e-6)
            self._watcher(Progress(message.bytes_done, message.bytes_total, message.bytes_done / elapsed))

    def outcome(self) -> StorageInfo:
        """Return what the last message told."""
        if not self._last.HasField("duration"):
            raise Internal("The daemon ended the call without an outcome; its version may not fit.")
        return StorageInfo.from_proto(self._last)


def load_request(
    name: str,
    path: str,
    *,
    offset: int,
    length: int | None,
    file_offset: int | str,
    checksum: bool,
    request: str | None,
) -> region_pb2.LoadRegionRequest:
    """Return the request for a load. Raises InvalidField, OutOfRange, ZeroLength."""
    return region_pb2.LoadRegionRequest(
        name=name,
        request_id=request or request_id(),
        offset=offset,
        length=_length(name, offset, length),
        path=path,
        file_offset=_file_offset(file_offset),
        checksum=checksum,
    )


def store_request(
    name: str,
    path: str,
    *,
    offset: int,
    length: int | None,
    file_offset: int | str | None,
    checksum: bool,
    request: str | None,
) -> region_pb2.StoreRegionRequest:
    """Return the request for a store. Raises InvalidField, OutOfRange, ZeroLength."""
    return region_pb2.StoreRegionRequest(
        name=name,
        request_id=request or request_id(),
        offset=offset,
        length=_length(name, offset, length),
        path=path,
        file_offset=None if file_offset is None else _file_offset(file_offset),
        checksum=checksum,
    )


def _length(name: str, offset: int, length: int | None) -> int:
    """Return the contract's length, to which 0 means all."""
    if length == 0:
        raise ZeroLength(f"0 bytes of {name} were asked for. Ask for at least 1, or for None to have all.", region=name)
    if offset < 0 or (length or 0) < 0 or offset + (length or 0) >= 1 << 63:
        raise OutOfRange(f"{length} bytes from {offset} on are not inside {name}; count from 0.", region=name)
    return length or 0


def _file_offset(offset: int | str) -> int:
    value = size(offset, "file_offset")
    if not 0 <= value < 1 << 62:
        raise InvalidField(f"file_offset {value} must be 0 to 2^62-1.", field="file_offset")
    return value
