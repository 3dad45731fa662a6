"""Loads and stores of real files, by every way that the filesystem allows."""

from __future__ import annotations

import asyncio
import ctypes
import errno
import mmap
import os
import resource
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path

import google_crc32c
import pytest

from peermem.broker.kernel_copier import KernelCopier
from peermem.core import errors
from peermem.core.storage import Order, Way
from peermem.device.plain import PlainMemory
from peermem.memory import HostMemory, Memory
from peermem.storage.base import Storage
from tests.descriptors import limited, open_files
from tests.reach_doubles import StagedDevice
from tests.storage.support import BLOCK, DATA, MIB, SIZE, best_way, filled, move, storage


@pytest.fixture(autouse=True)
def nothing_stays_open() -> Iterator[None]:
    before = open_files()
    yield
    assert open_files() <= before


@pytest.fixture(params=["disk", "memory"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """Return a folder on a disk's filesystem, and one that knows no direct I/O."""
    if request.param == "disk":
        yield tmp_path
        return
    made = Path("/dev/shm") / f"peermem-test-{os.getpid()}"
    made.mkdir()
    yield made
    for left in made.iterdir():
        left.unlink()
    made.rmdir()


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


RANGES = [
    (0, 0, SIZE),
    (0, 0, 4096),
    (0, 1, SIZE - 1),
    (4096, 8192, BLOCK * 3),
    (512, 0, BLOCK * 3 + 512),
    (1, 1, SIZE - 1),
    (4095, 4095, 4098),
    (5, 5, 100),
    (100, 4096 * 3 + 4, SIZE - 100),
]
"""Offsets in the file and in the region, and lengths."""


@pytest.mark.parametrize(("file_offset", "at", "length"), RANGES)
async def test_every_range_is_loaded(folder: Path, file_offset: int, at: int, length: int) -> None:
    (folder / "x").write_bytes(DATA)
    async with filled() as memory:
        movement = await move(
            storage(folder), Order.LOAD, folder / "x", memory, at=at, file_offset=file_offset, length=length
        )
        seen = bytes(memory.view())
        assert seen[at : at + length] == DATA[file_offset : file_offset + length]
        assert seen[:at] + seen[at + length :] == bytes(len(seen) - length)
        assert movement.way is not None
        assert movement.why


@pytest.mark.parametrize(("file_offset", "at", "length"), RANGES)
async def test_every_range_is_stored_in_place(folder: Path, file_offset: int, at: int, length: int) -> None:
    before = bytes(reversed(DATA))
    (folder / "x").write_bytes(before)
    async with filled(data=DATA) as memory:
        length = min(length, SIZE - at, SIZE - file_offset)
        await move(storage(folder), Order.STORE, folder / "x", memory, at=at, file_offset=file_offset, length=length)
    expected = before[:file_offset] + DATA[at : at + length] + before[file_offset + length :]
    assert (folder / "x").read_bytes() == expected


async def test_the_way_is_the_best_that_the_filesystem_allows(folder: Path) -> None:
    (folder / "x").write_bytes(DATA)
    done: list[int] = []
    async with filled() as memory:
        movement = await move(storage(folder), Order.LOAD, folder / "x", memory, moved=done.append)
        assert movement.way is best_way(folder)
        word = "itself" if movement.way is Way.DIRECT else "page cache"
        assert word in movement.why
        movement = await move(storage(folder), Order.STORE, folder / "x", memory, length=MIB)
        assert movement.way is best_way(folder)
    assert sum(done) == SIZE
    assert max(done) == 2 * BLOCK  # of four under way, by one of two calls


async def test_a_range_smaller_than_a_block_of_the_disk(folder: Path) -> None:
    (folder / "x").write_bytes(DATA)
    async with filled() as memory:
        movement = await move(storage(folder), Order.LOAD, folder / "x", memory, at=1, file_offset=7, length=99)
        assert movement.way is Way.BUFFERED
        assert memory.view()[:101] == b"\0" + DATA[7:106] + b"\0"


@pytest.mark.parametrize("order", Order)
async def test_memory_that_only_a_copier_reaches(folder: Path, order: Order) -> None:
    device = StagedDevice("bar1", 64 * MIB)
    made = await device.allocate(2 * MIB)
    (folder / "x").write_bytes(DATA)
    movement = await move(storage(folder), Order.LOAD, folder / "x", made, at=3)
    if order is Order.STORE:
        movement = await move(storage(folder), order, folder / "y", made, at=3, length=SIZE)
        assert (folder / "y").read_bytes() == DATA
    assert movement.way is (Way.STAGED if best_way(folder) is Way.DIRECT else Way.BUFFERED)
    if movement.way is Way.STAGED:
        assert "copier" in movement.why
    made.close()
    assert device.available == device.size


@pytest.mark.parametrize("order", Order)
async def test_offsets_that_direct_io_can_not_address(tmp_path: Path, order: Order) -> None:
    (tmp_path / "x").write_bytes(DATA)
    async with filled(data=DATA, offset=1) as memory:
        movement = await move(storage(tmp_path), order, tmp_path / "x", memory, at=1, length=SIZE)
        assert bytes(memory.view()[1 : 1 + SIZE]) == DATA == (tmp_path / "x").read_bytes()
    if best_way(tmp_path) is Way.DIRECT:
        assert movement.way is Way.STAGED
        assert "multiple of" in movement.why


class Unpinnable(PlainMemory):
    """Memory that the CPU reaches but no device, as a BAR without pages: direct I/O on its view fails."""

    fd = None
    copier = None

    def __init__(self, inner: HostMemory, number: int) -> None:
        self.inner = inner
        self.length = inner.length
        self._number = number

    def view(self) -> memoryview:
        raise OSError(self._number, os.strerror(self._number))

    def share(self) -> tuple[int, int]:
        raise NotImplementedError

    def close(self) -> None:
        self.inner.close()


class UnpinnableCopier:
    """Reaches it all the same."""

    def __init__(self, memory: Unpinnable) -> None:
        self._memory = memory

    async def load(self, buffer: Memory, pieces: Sequence[tuple[int, int, int]]) -> None:
        for offset, start, length in pieces:
            buffer.view()[start : start + length] = self._memory.inner.view()[offset : offset + length]

    async def store(self, buffer: Memory, pieces: Sequence[tuple[int, int, int]]) -> None:
        for offset, start, length in pieces:
            self._memory.inner.view()[offset : offset + length] = buffer.view()[start : start + length]


@pytest.mark.parametrize("number", [errno.EFAULT, errno.EREMOTEIO, errno.EINVAL])
@pytest.mark.parametrize("order", Order)
async def test_memory_that_the_device_can_not_reach_is_staged(tmp_path: Path, order: Order, number: int) -> None:
    if best_way(tmp_path) is not Way.DIRECT:
        pytest.skip("The filesystem of temporary files knows no direct I/O.")
    (tmp_path / "x").write_bytes(DATA)
    memory = Unpinnable(HostMemory(2 * MIB), number)
    memory.inner.view()[: SIZE + 1] = DATA + b"\0"
    movement = await move(
        storage(tmp_path), order, tmp_path / "x", memory, length=SIZE, copier=UnpinnableCopier(memory)
    )
    assert movement.way is Way.STAGED
    assert "can't reach" in movement.why
    assert bytes(memory.inner.view()[:SIZE]) == DATA == (tmp_path / "x").read_bytes()
    memory.close()


class Mapped(PlainMemory):
    """Memory that is reached by its mapping alone, and can vanish."""

    fd = None
    copier = None

    def __init__(self, length: int) -> None:
        self.length = length
        self._mapping = mmap.mmap(-1, length)

    def view(self) -> memoryview:
        return memoryview(self._mapping)

    def vanish(self) -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        address = ctypes.addressof(ctypes.c_char.from_buffer(self._mapping))
        assert libc.mprotect(ctypes.c_void_p(address), ctypes.c_size_t(self.length), 0) == 0

    def share(self) -> tuple[int, int]:
        raise NotImplementedError

    def close(self) -> None:
        self._mapping.close()


@pytest.mark.parametrize("order", Order)
async def test_memory_that_has_vanished(folder: Path, order: Order) -> None:
    """The kernel says so, nobody dies, and what is known of the error does not keep the memory."""
    (folder / "x").write_bytes(DATA)
    memory = Mapped(2 * MIB)
    memory.vanish()
    with pytest.raises(errors.RegionRevoked) as kept:
        await move(storage(folder), order, folder / "x", memory)
    memory.close()
    assert "can't be accessed any more" in kept.value.message
    assert (folder / "x").read_bytes() == DATA
    assert names(folder) == ["x"]


# whole files


async def test_a_new_file_is_there_when_it_is_whole(folder: Path) -> None:
    seen: list[list[str]] = []
    async with filled(data=DATA) as memory:
        await move(
            storage(folder),
            Order.STORE,
            folder / "x",
            memory,
            length=SIZE,
            moved=lambda size: seen.append(names(folder)),
        )
    assert all("x" not in found and len(found) == 1 for found in seen)
    assert names(folder) == ["x"]
    assert (folder / "x").read_bytes() == DATA


async def test_a_replaced_file_keeps_its_permissions_and_nothing_else(folder: Path) -> None:
    (folder / "x").write_bytes(b"longer" * SIZE)
    (folder / "x").chmod(0o4750)
    reader = (folder / "x").open("rb")
    async with filled(data=DATA) as memory:
        await move(storage(folder), Order.STORE, folder / "x", memory, length=SIZE)
    assert reader.read(6) == b"longer"
    reader.close()
    assert (folder / "x").read_bytes() == DATA
    assert stat.S_IMODE((folder / "x").stat().st_mode) == 0o750


async def test_a_store_that_is_not_committed_leaves_everything_as_it_was(folder: Path) -> None:
    (folder / "x").write_bytes(b"before")
    for name in ("x", "y"):
        file = await storage(folder).open(Order.STORE, str(folder / name), None, SIZE)
        assert file.aftermath == f"{folder / name} is as it was before."
        await file.close()
    assert names(folder) == ["x"]
    assert (folder / "x").read_bytes() == b"before"


async def test_a_file_that_somebody_removes_meanwhile(folder: Path) -> None:
    file = await storage(folder).open(Order.STORE, str(folder / "x"), None, SIZE)
    os.unlink(folder / names(folder)[0])
    with pytest.raises(errors.FileNotFound):
        await file.commit()
    await file.close()
    assert names(folder) == []


async def test_a_place_may_be_a_single_file(folder: Path) -> None:
    (folder / "x").write_bytes(DATA)
    only = storage(folder / "x")
    async with filled() as memory:
        await move(only, Order.LOAD, folder / "x", memory)
        await move(only, Order.STORE, folder / "x", memory, length=4096)
        assert (folder / "x").read_bytes() == DATA[:4096]
        (folder / "y").touch()
        with pytest.raises(errors.StorageForbidden):
            await move(only, Order.LOAD, folder / "y", memory)


# ends


async def test_stopping_begins_no_further_block(folder: Path) -> None:
    (folder / "x").write_bytes(DATA)
    done: list[int] = []

    def stop_after(size: int) -> None:
        done.append(size)
        movement.stop()

    async with filled() as memory:
        file = await storage(folder, depth=1).open(Order.LOAD, str(folder / "x"), 0, 0)
        movement = file.movement(memory, KernelCopier(memory), 0, stop_after)
        await movement.run()
        await file.close()
    assert done == [BLOCK]


async def test_a_cancelled_movement_waits_for_its_threads(folder: Path) -> None:
    device = StagedDevice("bar1", 64 * MIB)
    made = await device.allocate(2 * MIB)
    device.gate = asyncio.Event()
    (folder / "x").write_bytes(DATA)
    task = asyncio.create_task(move(storage(folder), Order.LOAD, folder / "x", made))
    async with asyncio.timeout(10):
        while device.waiting < 4:  # noqa: ASYNC110  what is waited for is not an event
            await asyncio.sleep(0.001)
    task.cancel()
    await asyncio.sleep(0)
    assert not task.done()
    device.gate.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    made.close()


async def test_a_file_that_is_cut_while_it_is_read(folder: Path) -> None:
    (folder / "x").write_bytes(DATA)
    async with filled() as memory:
        file = await storage(folder).open(Order.LOAD, str(folder / "x"), 0, 0)
        os.truncate(folder / "x", 8192)
        with pytest.raises(errors.FileTooShort, match="was cut to 8192 bytes"):
            await file.movement(memory, KernelCopier(memory), 0, lambda size: None).run()
        await file.close()


@pytest.mark.parametrize("file_offset", [None, 0])
async def test_a_file_that_may_not_grow(tmp_path: Path, file_offset: int | None) -> None:
    (tmp_path / "x").write_bytes(b"before")
    async with filled(data=DATA) as memory:
        with limited(resource.RLIMIT_FSIZE, 4096), pytest.raises(errors.StorageFull, match="File too large"):
            await move(storage(tmp_path), Order.STORE, tmp_path / "x", memory, file_offset=file_offset)
    assert names(tmp_path) == ["x"]
    if file_offset is None:
        assert (tmp_path / "x").read_bytes() == b"before"


async def test_checksums_of_files(folder: Path) -> None:
    (folder / "x").write_bytes(DATA)
    file = await storage(folder).open(Order.LOAD, str(folder / "x"), 5, SIZE - 6)
    assert await file.crc32c(lambda: False) == google_crc32c.value(DATA[5:-1])
    os.truncate(folder / "x", 100)
    with pytest.raises(errors.FileTooShort):
        await file.crc32c(lambda: False)
    await file.close()


async def test_many_at_the_same_time(folder: Path) -> None:
    (folder / "x").write_bytes(DATA)
    shared: Storage = storage(folder)
    async with filled() as one, filled() as other:
        await asyncio.gather(*(move(shared, Order.LOAD, folder / "x", each) for each in (one, other) * 4))
        assert bytes(one.view()[:SIZE]) == bytes(other.view()[:SIZE]) == DATA
