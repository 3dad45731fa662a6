"""Tests of dma-bufs of ordinary memory, for wherever the kernel makes them: here, or in the lab."""

from __future__ import annotations

import asyncio
import mmap
import os
import resource
from collections.abc import AsyncIterator, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from peermem import memory
from peermem.core.errors import DeviceFull, LimitReached, NotAdoptable, NotSupported, ZeroLength
from peermem.device.base import Device, DeviceMemory
from peermem.device.dmabuf import AdoptedDmaBufs, DmaBufMemory
from peermem.device.room import Room
from peermem.device.udmabuf import UdmabufDevice
from peermem.memory import HostMemory, dma_buf_exporter
from tests.descriptors import dma_buf, limited, memory_file, open_files, until
from tests.device.conformance import PAGE, DeviceConformance, read, write
from tests.device.copying import copier

MIB = 1 << 20
_LIMIT = Path("/sys/module/udmabuf/parameters/size_limit_mb")


@contextmanager
def most_of_one(length: int) -> Iterator[None]:
    """Have the driver make dma-bufs of so many bytes at most, in whole MiB."""
    before = _LIMIT.read_text()
    _LIMIT.write_text(str(length // MIB))
    yield
    _LIMIT.write_text(before)


class NothingStaysOpen:
    @pytest.fixture(autouse=True)
    def nothing_stays_open(self) -> Iterator[None]:
        before = open_files()
        yield
        assert open_files() <= before


class UdmabufTests(NothingStaysOpen, DeviceConformance):
    @pytest.fixture
    def device(self) -> Iterator[Device]:
        device = UdmabufDevice("udmabuf0", 64 * PAGE)
        yield device
        assert device.available == device.size

    async def test_a_region_is_a_dma_buf_of_its_own(self, device: Device) -> None:
        one, other = await device.allocate(PAGE + 1), await device.allocate(PAGE)
        found = one.dma_buf()
        assert found is not None
        assert found[1] == 0
        assert dma_buf_exporter(found[0]) == one.exporter == "udmabuf"
        assert os.lseek(found[0], 0, os.SEEK_END) == 2 * PAGE
        assert not os.get_inheritable(found[0])
        assert found != other.dma_buf()
        one.close()
        other.close()

    async def test_more_than_the_driver_makes_of_one(self) -> None:
        device = UdmabufDevice("udmabuf0", 1 << 40)
        with most_of_one(MIB), pytest.raises(LimitReached, match=str(_LIMIT)):
            await device.allocate(MIB + 1)
        assert device.available == device.size

    async def test_a_daemon_without_descriptors(self, device: Device) -> None:
        with limited(resource.RLIMIT_NOFILE, 3), pytest.raises(LimitReached, match="LimitNOFILE"):
            await device.allocate(PAGE)

    async def test_a_host_without_memory(self, device: Device) -> None:
        with limited(resource.RLIMIT_FSIZE, PAGE - 1), pytest.raises(DeviceFull, match="host has too little memory"):
            await device.allocate(PAGE)

    async def test_a_caller_that_gives_up_leaves_nothing(self, device: Device) -> None:
        before = open_files()
        asking = asyncio.create_task(device.allocate(64 * PAGE))
        await asyncio.sleep(0)
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
        await until(lambda: device.available == device.size and open_files() <= before)

    async def test_no_byte_and_no_file(self, device: Device) -> None:
        with pytest.raises(ZeroLength):
            await device.allocate(0)
        with pytest.raises(NotSupported):
            await device.adopt(memory_file(PAGE), 0)


class AdoptedTests(NothingStaysOpen, DeviceConformance):
    @pytest.fixture
    async def device(self) -> AsyncIterator[Device]:
        device = AdoptedDmaBufs("adopted-dmabuf", Room(64 * PAGE))
        yield device
        assert device.available == device.size

    async def obtain(self, device: Device, length: int) -> DeviceMemory:
        return await device.adopt(dma_buf(memory.whole_pages(length)), length)

    async def test_the_job_and_the_daemon_see_the_same_bytes(self, device: Device) -> None:
        fd = dma_buf(2 * PAGE)
        made = await device.adopt(os.dup(fd), 0)
        assert made.length == 2 * PAGE
        with mmap.mmap(fd, 2 * PAGE) as mapped:
            mapped[PAGE : PAGE + 3] = b"job"
            assert await read(made, PAGE, 3) == b"job"
            await write(made, 0, b"daemon")
            assert mapped[:6] == b"daemon"
            made.close()
            assert mapped[:6] == b"daemon"
        os.close(fd)

    async def test_it_outlives_the_jobs_descriptor(self, device: Device) -> None:
        made = await device.adopt(dma_buf(PAGE), 0)
        await write(made, 5, b"still there")
        assert await read(made, 5, 11) == b"still there"
        made.close()

    @pytest.mark.parametrize("length", [PAGE + 1, 1 << 62, 1 << 64])
    async def test_more_than_it_has(self, device: Device, length: int) -> None:
        with pytest.raises(NotAdoptable, match=f"has {PAGE} bytes and {length} were asked for"):
            await device.adopt(dma_buf(PAGE), length)

    async def test_more_than_the_limit(self, device: Device) -> None:
        with pytest.raises(DeviceFull, match=r"attach\.adopt_limit"):
            await device.adopt(dma_buf(65 * PAGE), 0)

    async def test_one_that_can_not_be_written_to(self, device: Device) -> None:
        fd = dma_buf(PAGE)
        try:
            read_only = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY)
        except OSError:  # dma-bufs can't be opened anew, so that an exporter alone makes one that is read-only
            os.close(fd)
            return
        os.close(fd)
        with pytest.raises(NotAdoptable, match="O_RDWR"):
            await device.adopt(read_only, 0)

    async def test_it_allocates_nothing(self, device: Device) -> None:
        with pytest.raises(NotSupported):
            await device.allocate(PAGE)

    async def test_copies_wait_for_each_other_and_survive_their_caller(self, device: Device) -> None:
        made = await self.obtain(device, 16 * PAGE)
        with closing(HostMemory(16 * PAGE)) as buffer:
            memory.write(buffer, 0, b"x" * 16 * PAGE)
            copies = [asyncio.create_task(copier(made).store(buffer, [(0, 0, 16 * PAGE)])) for _ in range(4)]
            await asyncio.sleep(0)
            copies[0].cancel()
            await asyncio.gather(*copies, return_exceptions=True)
            assert await read(made, 0, 16 * PAGE) == b"x" * 16 * PAGE
        made.close()

    async def test_what_the_cpu_reaches_is_told(self, device: Device) -> None:
        made = await self.obtain(device, PAGE)
        assert made.is_reached_by_cpu
        assert made.alive()
        assert isinstance(made, DmaBufMemory)
        made.close()
        with pytest.raises(ValueError, match="closed"):
            made.share()
