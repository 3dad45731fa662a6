"""The storage of this host: opens files and block devices in the places that the configuration allows.

Rules of this file:

* What may block runs in threads that only storage uses: a disk that hangs takes none from the rest of the daemon.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, TypeVar

import structlog

from peermem.core.storage import Order
from peermem.device.base import Copier, DeviceMemory
from peermem.offload import in_thread, made_in_thread
from peermem.storage.base import OpenFile, Storage
from peermem.storage.handles import Handles, open_source, open_target
from peermem.storage.movement import BlockMovement
from peermem.storage.places import Place, Places

log = structlog.get_logger(__name__)

T = TypeVar("T")


class LocalStorage:
    """A `Storage` of files and block devices."""

    def __init__(self, places: Sequence[Place], *, block: int, depth: int, limit: int) -> None:
        """`block` in bytes, of which `depth` are under way for each of up to `limit` loads and stores."""
        self.limit = limit
        self._places = Places(places)
        self._block = block
        self._depth = depth
        self._pool = ThreadPoolExecutor(limit * depth, "peermem-storage")

    async def open(self, order: Order, path: str, offset: int | None, length: int) -> OpenFile:
        """See Storage."""
        make: Callable[[], Handles]
        if order is Order.LOAD:
            make = partial(open_source, self._places, path, offset or 0, length)
        else:
            make = partial(open_target, self._places, path, offset, length)
        return LocalFile(await made_in_thread(make, self._pool), self._block, self._depth, self._pool)

    async def close(self) -> None:
        """See Storage."""
        self._pool.shutdown(wait=False, cancel_futures=True)


class LocalFile:
    """An `OpenFile` of this host."""

    def __init__(self, handles: Handles, block: int, depth: int, pool: ThreadPoolExecutor) -> None:
        """Owns `handles`."""
        self._handles = handles
        self._block = block
        self._depth = depth
        self._pool = pool

    @property
    def length(self) -> int:
        """See OpenFile."""
        return self._handles.span.length

    @property
    def aftermath(self) -> str:
        """See OpenFile."""
        return self._handles.aftermath

    def movement(
        self, memory: DeviceMemory, copier: Copier, offset: int, moved: Callable[[int], None]
    ) -> BlockMovement:
        """See OpenFile."""
        return BlockMovement(
            self._handles, memory, copier, offset, moved, block=self._block, depth=self._depth, pool=self._pool
        )

    async def commit(self) -> None:
        """See OpenFile."""
        if self._handles.order is Order.STORE:
            await self._do(self._handles.commit)

    async def crc32c(self, stopped: Callable[[], bool]) -> int:
        """See OpenFile."""
        return await self._do(partial(self._handles.crc32c, self._block, stopped))

    async def close(self) -> None:
        """See OpenFile."""
        try:
            await in_thread(self._handles.close, self._pool)
        except OSError as error:  # the outcome is decided: what was to last has been synced
            log.warning("file_not_closed", path=self._handles.path, cause=error.strerror)

    async def _do(self, work: Callable[[], T]) -> T:
        try:
            return await in_thread(work, self._pool)
        except OSError as error:
            raise self._handles.failed(error) from error


if TYPE_CHECKING:
    _storage: type[Storage] = LocalStorage
    _file: type[OpenFile] = LocalFile
