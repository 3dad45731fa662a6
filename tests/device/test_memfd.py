from __future__ import annotations

import asyncio
import fcntl
import mmap
import os
import resource
import socket
import sys
from collections.abc import AsyncIterator, Callable, Iterator

import pytest

from peermem import memory
from peermem.core.errors import DeviceFull, LimitReached, NotAdoptable, NotSupported, ZeroLength
from peermem.core.types import Path
from peermem.device.base import Device, DeviceMemory
from peermem.device.memfd import AdoptedMemory, MemfdDevice
from tests.descriptors import limited, memory_file, open_files, until
from tests.device.conformance import PAGE, DeviceConformance

MIB = 1 << 20
SHRINK, GROW, SEAL, WRITE = fcntl.F_SEAL_SHRINK, fcntl.F_SEAL_GROW, fcntl.F_SEAL_SEAL, fcntl.F_SEAL_WRITE


@pytest.fixture(autouse=True)
def nothing_stays_open() -> Iterator[None]:
    before = open_files()
    yield
    assert open_files() <= before


def seals(fd: int) -> int:
    return fcntl.fcntl(fd, fcntl.F_GET_SEALS)


class TestMemfdDevice(DeviceConformance):
    @pytest.fixture(params=[64 * PAGE, 8 * MIB], ids=["small", "made in threads"])
    async def device(self, request: pytest.FixtureRequest) -> AsyncIterator[Device]:
        device = MemfdDevice("bar0", request.param)
        yield device
        assert device.available == device.size
        await device.close()


class TestAdoptedMemory(DeviceConformance):
    @pytest.fixture
    async def device(self) -> AsyncIterator[Device]:
        device = AdoptedMemory("adopted", 64 * PAGE)
        yield device
        assert device.available == device.size
        await device.close()

    async def obtain(self, device: Device, length: int) -> DeviceMemory:
        return await device.adopt(memory_file(length), 0)


def test_what_the_devices_say_of_themselves() -> None:
    for device, name, kind in (
        (MemfdDevice("bar0", 10 * PAGE + 1), "bar0", "memfd"),
        (AdoptedMemory("adopted", 10 * PAGE + 1), "adopted", "adopted"),
    ):
        assert (device.name, device.kind, device.path) == (name, kind, Path.HOST)
        assert device.size == device.available == 10 * PAGE


class TestAllocation:
    @pytest.mark.parametrize("length", [PAGE, 2 * MIB])
    async def test_a_file_is_sealed_for_good_and_not_inherited(self, length: int) -> None:
        made = await MemfdDevice("bar0", 4 * MIB).allocate(length)
        fd, offset = made.share()
        assert (seals(fd), offset) == (SHRINK | GROW | SEAL, 0)
        assert not os.get_inheritable(fd)
        for size in (0, length - 1, length + 1):
            with pytest.raises(PermissionError):
                os.ftruncate(fd, size)
        with pytest.raises(PermissionError):
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, WRITE)
        made.close()

    async def test_its_pages_exist(self) -> None:
        made = await MemfdDevice("bar0", 4 * MIB).allocate(2 * MIB)
        assert os.fstat(made.share()[0]).st_blocks * 512 >= 2 * MIB
        made.close()

    async def test_each_region_is_a_file_of_its_own(self) -> None:
        device = MemfdDevice("bar0", 2 * PAGE)
        one, other = await device.allocate(PAGE), await device.allocate(PAGE)
        assert os.fstat(one.share()[0]).st_ino != os.fstat(other.share()[0]).st_ino
        assert os.fstat(one.share()[0]).st_size == PAGE
        one.close()
        other.close()

    async def test_no_byte_is_no_region(self) -> None:
        with pytest.raises(ZeroLength):
            await MemfdDevice("bar0", PAGE).allocate(0)

    @pytest.mark.parametrize("length", [PAGE + 1, 1 << 62, 1 << 64])
    async def test_more_than_there_is(self, length: int) -> None:
        with pytest.raises(DeviceFull, match=r"4KiB of 4KiB left; .* Delete regions, or use another device\."):
            await MemfdDevice("bar0", PAGE).allocate(length)

    @pytest.mark.parametrize("length", [PAGE, 2 * MIB])
    async def test_a_host_without_memory_is_a_full_device(self, length: int) -> None:
        device = MemfdDevice("bar0", 4 * MIB)
        with limited(resource.RLIMIT_FSIZE, PAGE - 1), pytest.raises(DeviceFull, match="host has too little memory"):
            await device.allocate(length)
        assert device.available == device.size

    async def test_a_daemon_without_descriptors_says_which_limit_to_raise(self) -> None:
        device = MemfdDevice("bar0", 4 * MIB)
        with limited(resource.RLIMIT_NOFILE, 3), pytest.raises(LimitReached, match="LimitNOFILE"):
            await device.allocate(PAGE)
        assert device.available == device.size

    async def test_a_caller_that_gives_up_leaves_nothing(self) -> None:
        device = MemfdDevice("bar0", 64 * MIB)
        before = open_files()
        asking = asyncio.create_task(device.allocate(64 * MIB))
        await asyncio.sleep(0)
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
        await until(lambda: device.available == device.size and open_files() <= before)

    async def test_it_adopts_nothing(self) -> None:
        with pytest.raises(NotSupported):
            await MemfdDevice("bar0", PAGE).adopt(memory_file(PAGE), 0)


class TestMapping:
    async def test_it_is_made_on_first_use(self) -> None:
        made = await MemfdDevice("lazily", MIB).allocate(PAGE)
        assert "peermem-lazily" not in mappings()
        assert made.view() is made.view()
        assert mappings().count("peermem-lazily") == 1
        made.close()
        assert "peermem-lazily" not in mappings()

    async def test_while_a_slice_is_held_the_memory_stays_and_closing_can_be_tried_again(self) -> None:
        device = MemfdDevice("bar0", MIB)
        made = await device.allocate(PAGE)
        held = made.view()[:10]
        with pytest.raises(BufferError):
            made.close()
        held[0] = 9
        assert device.available == MIB - PAGE
        assert memory.read(made, 0, 1) == b"\x09"
        assert made.view()[0] == 9
        held.release()
        made.close()
        assert device.available == MIB

    async def test_it_can_be_closed_in_a_thread(self) -> None:
        device = MemfdDevice("bar0", 4 * MIB)
        made = await device.allocate(2 * MIB)
        made.view()
        await asyncio.to_thread(made.close)
        assert device.available == device.size


class TestAdoption:
    @pytest.fixture
    def device(self) -> Iterator[AdoptedMemory]:
        device = AdoptedMemory("adopted", 4 * MIB)
        yield device
        assert device.available == device.size

    async def test_the_job_and_the_daemon_see_the_same_bytes(self, device: AdoptedMemory) -> None:
        fd = memory_file(2 * PAGE + 3)
        made = await device.adopt(os.dup(fd), 0)
        os.pwrite(fd, b"job", 2 * PAGE)
        assert memory.read(made, 2 * PAGE, 3) == b"job"
        memory.write(made, 0, b"daemon")
        assert os.pread(fd, 6, 0) == b"daemon"
        made.close()
        assert os.pread(fd, 6, 0) == b"daemon"
        os.close(fd)

    async def test_a_part_of_the_file(self, device: AdoptedMemory) -> None:
        made = await device.adopt(memory_file(2 * MIB), 5)
        assert (made.length, len(made.view())) == (5, 5)
        assert device.available == device.size - PAGE
        made.close()

    @pytest.mark.parametrize("before", [0, GROW, SHRINK, SHRINK | SEAL])
    async def test_it_can_not_be_shrunk_nor_sealed_any_more(self, device: AdoptedMemory, before: int) -> None:
        fd = memory_file(PAGE)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, before)
        made = await device.adopt(os.dup(fd), 0)
        assert seals(fd) == before | SHRINK | SEAL
        with pytest.raises(PermissionError):
            os.ftruncate(fd, 0)
        with pytest.raises(PermissionError):
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, WRITE)
        made.close()
        os.close(fd)

    async def test_holes_are_filled(self, device: AdoptedMemory) -> None:
        fd = memory_file(MIB)
        assert os.fstat(fd).st_blocks == 0
        made = await device.adopt(os.dup(fd), 0)
        assert os.fstat(fd).st_blocks * 512 >= MIB
        made.close()
        os.close(fd)

    @pytest.mark.parametrize("length", [PAGE + 1, 1 << 62, 1 << 64])
    async def test_more_than_the_file_has(self, device: AdoptedMemory, length: int) -> None:
        with pytest.raises(NotAdoptable, match=f"has {PAGE} bytes and {length} were asked for"):
            await device.adopt(memory_file(PAGE), length)

    async def test_more_than_the_limit(self) -> None:
        with pytest.raises(DeviceFull, match=r"attach\.adopt_limit"):
            await AdoptedMemory("adopted", 0).adopt(memory_file(1), 0)

    async def test_it_allocates_nothing(self, device: AdoptedMemory) -> None:
        with pytest.raises(NotSupported):
            await device.allocate(PAGE)

    async def test_a_job_that_maps_the_file_does_not_hinder_it(self, device: AdoptedMemory) -> None:
        fd = memory_file(PAGE)
        with mmap.mmap(fd, PAGE) as mapped:
            made = await device.adopt(fd, 0)
            mapped[0] = 3
            assert made.view()[0] == 3
            made.close()


def empty() -> int:
    return memory_file(0)


def read_only() -> int:
    fd = memory_file(PAGE)
    try:
        return os.open(f"/proc/self/fd/{fd}", os.O_RDONLY)
    finally:
        os.close(fd)


def path_only() -> int:
    return os.open("/", os.O_PATH)


def sealed_against_writing() -> int:
    return sealed(WRITE)


def sealed_against_later_writing() -> int:
    return sealed(0x10)


def sealed_but_shrinkable() -> int:
    return sealed(SEAL)


def sealed(seal: int) -> int:
    fd = memory_file(PAGE)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seal)
    return fd


def without_sealing() -> int:
    return memory_file(PAGE, 0)


def huge_pages() -> int:
    try:
        return memory_file(2 * MIB, os.MFD_ALLOW_SEALING | os.MFD_HUGETLB)
    except OSError:
        pytest.skip("this kernel has no hugetlbfs")


def on_disk() -> int:
    return os.open(sys.executable, os.O_RDONLY)


def pipe() -> int:
    reader, writer = os.pipe()
    os.close(reader)
    return writer


def folder() -> int:
    return os.open("/", os.O_RDONLY)


def device_file() -> int:
    return os.open("/dev/zero", os.O_RDWR)


def connection() -> int:
    one, other = socket.socketpair()
    other.close()
    return one.detach()


@pytest.mark.parametrize(
    ("make", "cause"),
    [
        (empty, "empty"),
        (read_only, "not open for reading and writing"),
        (path_only, "no memory file"),
        (sealed_against_writing, "sealed against writing"),
        (sealed_against_later_writing, "sealed against writing"),
        (sealed_but_shrinkable, "can be shrunk"),
        (without_sealing, "can be shrunk"),
        (huge_pages, "MFD_HUGETLB"),
        (on_disk, "no memory file"),
        (pipe, "no memory file"),
        (folder, "no memory file"),
        (device_file, "no memory file"),
        (connection, "no memory file"),
    ],
)
async def test_a_file_that_is_not_fit_is_refused_with_the_cause_and_closed(make: Callable[[], int], cause: str) -> None:
    device = AdoptedMemory("adopted", 4 * MIB)
    with pytest.raises(NotAdoptable, match=cause):
        await device.adopt(make(), 0)
    assert device.available == device.size


def mappings() -> str:
    with open("/proc/self/maps") as file:
        return file.read()
