"""What every device has to do, whatever its memory is; a subclass of `DeviceConformance` runs it on one.

Memory with a copier is read and written through it. A device that gives no descriptor (`share` raises NotMappable)
overrides nothing: those checks end there.
"""

from __future__ import annotations

import asyncio
import mmap
import os
from contextlib import closing

import pytest

from peermem import memory
from peermem.core.errors import DeviceFull, NotMappable
from peermem.core.types import Path
from peermem.device.base import Device, DeviceMemory
from peermem.memory import HostMemory

PAGE = mmap.PAGESIZE


async def read(made: DeviceMemory, offset: int, length: int) -> bytes:
    """Return bytes of device memory, by whatever reaches it."""
    if made.copier is None:
        return bytes(memory.read(made, offset, length))
    with closing(HostMemory(length + 3)) as buffer:
        await made.copier.load(buffer, [(offset, 3, length)])
        return bytes(memory.read(buffer, 3, length))


async def write(made: DeviceMemory, offset: int, data: bytes) -> None:
    """Write bytes to device memory."""
    if made.copier is None:
        return memory.write(made, offset, data)
    with closing(HostMemory(len(data) + 5)) as buffer:
        memory.write(buffer, 5, data)
        await made.copier.store(buffer, [(offset, 5, len(data))])


def _is_mapped(device: Device) -> bool:
    """Whether its memory has a view, by which a NIC may be tried with it."""
    return not {Path.HOST, Path.P2PDMA}.isdisjoint(device.paths)


class DeviceConformance:
    """The tests. A subclass gives the fixture `device`, with room for 64 pages at least, and `obtain`."""

    async def obtain(self, device: Device, length: int) -> DeviceMemory:
        """Have the device make memory of `length` bytes; an adopting device brings the file."""
        return await device.allocate(length)

    @pytest.mark.parametrize("length", [1, PAGE - 1, PAGE, PAGE + 1, 33 * PAGE + 5])
    async def test_memory_has_the_length_asked_for_and_holds_bytes(self, device: Device, length: int) -> None:
        made = await self.obtain(device, length)
        assert made.length == length
        assert await read(made, 0, length) == bytes(length)
        data = os.urandom(length)
        await write(made, 0, data)
        assert await read(made, 0, length) == data
        await write(made, length - 1, b"\x07")
        assert await read(made, length - 1, 1) == b"\x07"
        made.close()

    async def test_what_reaches_the_memory_fits_its_path(self, device: Device) -> None:
        made = await self.obtain(device, PAGE + 1)
        assert device.path in device.paths
        if device.path in (Path.STAGED, Path.DMABUF):
            assert made.copier is not None
            assert made.fd is None
            if device.path is Path.DMABUF:
                assert made.dma_buf() is not None
            elif _is_mapped(device):
                assert len(made.view()) == made.length
            else:
                with pytest.raises(ValueError, match="copier"):
                    made.view()
        else:
            assert made.copier is None
            assert (made.fd is not None) == (device.path is Path.HOST)
            assert len(made.view()) == made.length
            made.view()[PAGE] = 7
            assert await read(made, PAGE, 1) == b"\x07"
        made.close()

    async def test_memory_is_zeroed_again(self, device: Device) -> None:
        length = device.available
        made = await self.obtain(device, length)
        for offset in range(0, length, PAGE):
            await write(made, offset, b"\xff" * 16)
        made.close()
        made = await self.obtain(device, length)
        assert await read(made, 0, length) == bytes(length)
        made.close()

    async def test_bytes_are_copied_between_memories(self, device: Device) -> None:
        source, target = await self.obtain(device, 3 * PAGE), await self.obtain(device, 2 * PAGE)
        data = os.urandom(3 * PAGE)
        await write(source, 0, data)
        if source.copier is None:
            memory.copy(source, 100, target, 50, PAGE + 11)
        else:
            await write(target, 50, await read(source, 100, PAGE + 11))
        assert await read(target, 0, 2 * PAGE) == bytes(50) + data[100 : PAGE + 111] + bytes(PAGE - 61)
        source.close()
        target.close()

    async def test_whole_pages_are_counted_and_come_back(self, device: Device) -> None:
        free = device.available
        one, other = await self.obtain(device, 1), await self.obtain(device, PAGE + 1)
        assert device.available == free - 3 * PAGE
        one.close()
        assert device.available == free - 2 * PAGE
        other.close()
        assert device.available == free

    async def test_a_full_device_says_so_and_takes_nothing(self, device: Device) -> None:
        free = device.available
        held = await self.obtain(device, PAGE)
        with pytest.raises(DeviceFull) as caught:
            await self.obtain(device, free)
        assert device.name in caught.value.message
        assert device.available == free - PAGE
        held.close()
        whole = await self.obtain(device, free)
        assert device.available == 0
        whole.close()

    async def test_callers_at_the_same_time_never_get_more_than_there_is(self, device: Device) -> None:
        free = device.available
        share = free // 4 // PAGE * PAGE
        results = await asyncio.gather(*(self.obtain(device, share) for _ in range(9)), return_exceptions=True)
        made = [result for result in results if not isinstance(result, BaseException)]
        assert len(made) == 4
        assert {type(result) for result in results if isinstance(result, BaseException)} == {DeviceFull}
        for one in made:
            one.close()
        assert device.available == free

    async def test_a_device_is_alive_while_its_memory_is_there(self, device: Device) -> None:
        assert device.alive()
        made = await self.obtain(device, PAGE)
        assert device.alive()
        made.close()

    async def test_closing_twice_is_no_error_and_gives_back_once(self, device: Device) -> None:
        free = device.available
        made = await self.obtain(device, PAGE)
        made.close()
        made.close()
        assert device.available == free

    async def test_nothing_is_reached_after_close(self, device: Device) -> None:
        unused, used = await self.obtain(device, PAGE), await self.obtain(device, PAGE)
        view = used.view() if _is_mapped(device) else None
        await write(used, 0, b"x")
        for made in (unused, used):
            made.close()
            assert made.fd is None
            for reach in (made.view, made.share, *([made.dma_buf] if device.path is Path.DMABUF else [])):
                with pytest.raises(ValueError, match="closed"):
                    reach()
            if made.copier is not None:
                with pytest.raises(ValueError, match="closed"):
                    await read(made, 0, 1)
        if view is not None:
            with pytest.raises(ValueError, match="released"):
                view[0]

    async def test_a_shared_descriptor_shows_the_same_bytes(self, device: Device) -> None:
        made = await self.obtain(device, PAGE + 1)
        try:
            fd, offset = made.share()
        except NotMappable:
            return made.close()
        with mmap.mmap(fd, made.length, offset=offset) as mapped:
            mapped[PAGE] = 5
            assert await read(made, PAGE, 1) == b"\x05"
            await write(made, 0, b"\x06")
            assert mapped[0] == 6
        made.close()

    async def test_a_shared_descriptor_can_not_shrink_the_memory(self, device: Device) -> None:
        made = await self.obtain(device, 2 * PAGE)
        try:
            fd, offset = made.share()
        except NotMappable:
            return made.close()
        with pytest.raises(OSError):  # noqa: PT011 - what a kernel driver answers is its own
            os.ftruncate(fd, offset)
        assert await read(made, 0, 2 * PAGE) == bytes(2 * PAGE)
        made.close()
