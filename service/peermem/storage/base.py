"""What the broker needs of storage.

Rules:

* Storage knows the places that the configuration allows, files and memory; nothing of regions, owners or policies.
* A call that fails leaves nothing open, and nothing that was not there.
* Nothing here waits on the event loop: what may block runs in threads of the storage's own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from peermem.core.storage import Order, Way
from peermem.device.base import Copier, DeviceMemory


class Movement(Protocol):
    """Bytes on their way between a file and a memory."""

    @property
    def way(self) -> Way | None:
        """How they go; None before it is decided, and it may turn out to be another one after all."""

    @property
    def why(self) -> str:
        """Why this way; a sentence."""

    async def run(self) -> None:
        """Move all bytes, or less after `stop`. When it returns, also by an error or because its caller was cancelled,
        nothing of it is running any more.

        Raises RegionRevoked, FileTooShort, StorageFull, StorageFailed.
        """

    def stop(self) -> None:
        """Begin with no further block."""


class OpenFile(Protocol):
    """A file or block device that was opened for one load or store."""

    @property
    def length(self) -> int:
        """Bytes that the load or store is to move; at least 1."""

    @property
    def aftermath(self) -> str:
        """What is there if it fails now; a sentence, or empty where nothing was to be written."""

    def movement(self, memory: DeviceMemory, copier: Copier, offset: int, moved: Callable[[int], None]) -> Movement:
        """Return the movement between the file and the memory from `offset` on.

        `copier` copies between the memory and host memory. `moved` is told in any thread of bytes that are in place.
        """

    async def commit(self) -> None:
        """Make what was stored last: it is on the disk, under its name. Raises StorageFull, StorageFailed."""

    async def crc32c(self, stopped: Callable[[], bool]) -> int:
        """Read the range again, and return its CRC32C; of less once `stopped`. Raises FileTooShort, StorageFailed."""

    async def close(self) -> None:
        """Close it. What was not committed is undone, as far as it can be."""


class Storage(Protocol):
    """The files and block devices that loads and stores may use."""

    @property
    def limit(self) -> int:
        """Loads and stores at the same time."""

    async def open(self, order: Order, path: str, offset: int | None, length: int) -> OpenFile:
        """Open a file: for a load, `length` 0 means up to its end; for a store, `offset` None means the whole file.

        Raises InvalidField, StorageForbidden, FileNotFound, FileUnusable, FileTooShort, ZeroLength, StorageFull,
        StorageFailed, LimitReached, KernelTooOld.
        """

    async def close(self) -> None:
        """End it. No file is open any more."""
