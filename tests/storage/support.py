"""Files that are moved, and what tests of loads and stores share."""

from __future__ import annotations

import mmap
import os
import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, closing
from pathlib import Path

from peermem.broker.kernel_copier import KernelCopier
from peermem.core.storage import Order, Way
from peermem.device.base import Copier, DeviceMemory
from peermem.device.memfd import MemfdDevice
from peermem.storage.base import Movement, Storage
from peermem.storage.files import LocalStorage
from peermem.storage.places import Place

MIB = 1 << 20
BLOCK = 64 << 10
SIZE = 1 * MIB + 4099
DATA = random.Random(5).randbytes(SIZE)


def best_way(folder: Path) -> Way:
    """Return the best way that a folder's filesystem allows, found by direct I/O of the test's own."""
    probe = folder / "probe"
    probe.write_bytes(bytes(mmap.PAGESIZE))
    mounts = [line.split(" - ") for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    kinds = {mount.split()[4]: kind.split()[0] for mount, kind in mounts}
    mount = max((path for path in kinds if folder.is_relative_to(path)), key=len)
    try:
        fd = os.open(probe, os.O_RDONLY | os.O_DIRECT)
        with closing(mmap.mmap(-1, mmap.PAGESIZE)) as page, memoryview(page) as into:
            os.preadv(fd, [into], 0)
        os.close(fd)
    except OSError:
        return Way.BUFFERED
    finally:
        probe.unlink()
    return Way.BUFFERED if kinds[mount] in ("tmpfs", "ramfs") else Way.DIRECT  # which take O_DIRECT and don't mean it


def storage(*places: Path, write: bool = True, block: int = BLOCK, depth: int = 4, limit: int = 4) -> LocalStorage:
    return LocalStorage([Place(str(place), write) for place in places], block=block, depth=depth, limit=limit)


@asynccontextmanager
async def filled(length: int = 2 * MIB, data: bytes = b"", offset: int = 0) -> AsyncIterator[DeviceMemory]:
    """Yield memory with some bytes in it."""
    with closing(await MemfdDevice("bar0", 64 * MIB).allocate(length)) as made:
        made.view()[offset : offset + len(data)] = data
        yield made


async def move(
    storage: Storage,
    order: Order,
    path: Path,
    memory: DeviceMemory,
    *,
    at: int = 0,
    file_offset: int | None = None,
    length: int = 0,
    copier: Copier | None = None,
    moved: Callable[[int], None] = lambda size: None,
) -> Movement:
    """Carry one load or store to its end, and return how it went."""
    file = await storage.open(order, str(path), file_offset, length or (memory.length - at) * (order is Order.STORE))
    try:
        movement = file.movement(memory, copier or memory.copier or KernelCopier(memory), at, moved)
        await movement.run()
        await file.commit()
    finally:
        await file.close()
    return movement
