"""A region in the hands of an asyncio program.

Rules of this file:

* A Region is a snapshot: its facts don't change; `refresh` asks again.
* Its bytes are reached by `map` (this host, no copy) by `read` and `write` (any host, for small amounts), or
  by `load` and `store` (files of the region's node).
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING, Self

from peermem.client.facts import Lease, RegionInfo
from peermem.client.storage import StorageInfo, Watcher
from peermem.core.errors import RegionNotFound

if TYPE_CHECKING:
    from typing_extensions import Buffer

    from peermem.client.aio.node import Node


@dataclass(frozen=True, slots=True)
class Region(RegionInfo):
    """A range of device memory that transfers can read and write. `region[0:4096]` is a range of it.

    As an asynchronous context manager it is deleted at the end.
    """

    _node: Node = field(repr=False, compare=False)

    async def map(self) -> memoryview:
        """Return all its bytes, writable and without a copy.

        Raises NotMappable where the daemon is not on this host or its attach socket is not open.
        """
        return await self._node.map_region(self.name)

    async def read(self, offset: int = 0, length: int | None = None) -> bytes:
        """Return `length` bytes from `offset` on; up to the region's end without a length."""
        return await self._node.read_region(self.name, offset, self.length - offset if length is None else length)

    async def write(self, data: Buffer, offset: int = 0) -> None:
        """Write `data` from `offset` on."""
        await self._node.write_region(self.name, offset, memoryview(data).cast("B"))

    async def load(
        self,
        path: str,
        *,
        offset: int = 0,
        length: int | None = None,
        file_offset: int | str = 0,
        checksum: bool = False,
        progress: Watcher | None = None,
    ) -> StorageInfo:
        """Load a file or block device of the region's node, from `file_offset` on, into the region from `offset` on.

        Without `length` all up to the file's end. With `checksum` both are read again and compared. `progress` is
        called as it goes on; what it raises ends the load. Raises StorageForbidden outside the directories that the
        daemon's configuration allows, FileNotFound, FileTooShort, OutOfRange.
        """
        return await self._node.load_region(
            self.name,
            path,
            offset=offset,
            length=length,
            file_offset=file_offset,
            checksum=checksum,
            progress=progress,
        )

    async def store(
        self,
        path: str,
        *,
        offset: int = 0,
        length: int | None = None,
        file_offset: int | str | None = None,
        checksum: bool = False,
        progress: Watcher | None = None,
    ) -> StorageInfo:
        """Store the region, from `offset` on, into a file or block device of its node; returns when it is on the disk.

        Without `file_offset` the file is made, or replaced when all bytes are there, and is as it was before where that
        fails; with it, an existing file or block device is written in place. The rest is as for `load`. Raises
        StorageForbidden, FileNotFound, FileUnusable, StorageFull.
        """
        return await self._node.store_region(
            self.name,
            path,
            offset=offset,
            length=length,
            file_offset=file_offset,
            checksum=checksum,
            progress=progress,
        )

    async def refresh(self) -> Region:
        """Return the region as it is now."""
        return await self._node.region(self.name)

    async def renew(self) -> Lease:
        """Move the end of a lease with a time to live into the future."""
        return (await self._node.renew_leases([self.name]))[0]

    async def delete(self, force: bool = False) -> None:
        """End the region; with `force` also when transfers use it, which then fail with RegionDeleted."""
        await self._node.delete_region(self.name, force=force)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with suppress(RegionNotFound):  # deleted inside the block, or its lease has ended
            await self.delete(force=error is not None)
