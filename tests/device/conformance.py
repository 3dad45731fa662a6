"""What every device has to do, whatever its memory is; a subclass of `DeviceConformance` runs it on one.

A device that gives no descriptor (`share` raises NotMappable) overrides nothing: those checks end there.
"""

from __future__ import annotations

import asyncio
import mmap
import os

import pytest

from peermem import memory
from peermem.core.errors import DeviceFull, NotMappable
from peermem.device.base import Device, DeviceMemory

PAGE = mmap.PAGESIZE


class DeviceConformance:
    """The tests. A subclass gives the fixture `device`, with room for 64 pages at least, and `obtain`."""

    async def obtain(self, device: Device, length: int) -> DeviceMemory:
        """Have the device make memory of `length` bytes; an adopting device brings the file."""
        return await device.allocate(length)

    @pytest.mark.parametrize("length", [1, PAGE - 1, PAGE, PAGE + 1, 33 * PAGE + 5])
    async def test_memory_has_the_length_asked_for_and_holds_bytes(self, device: Device, length: int) -> None:
        made = await self.obtain(device, length)
        assert made.length == len(made.view()) == length
        assert memory.read(made, 0, length) == bytes(length)
        data = os.urandom(length)
        memory.write(made, 0, data)
        assert memory.read(made, 0, length) == data == bytes(made.view())
        made.view()[length - 1] = 7
        assert memory.read(made, length - 1, 1) == b"\x07"
        made.close()

    async def test_bytes_are_copied_between_memories(self, device: Device) -> None:
        source, target = await self.obtain(device, 3 * PAGE), await self.obtain(device, 2 * PAGE)
        data = os.urandom(3 * PAGE)
        memory.write(source, 0, data)
        memory.copy(source, 100, target, 50, PAGE + 11)
        assert memory.read(target, 0, 2 * PAGE) == bytes(50) + data[100 : PAGE + 111] + bytes(PAGE - 61)
        source.close()
        target.close()

    async def test_whole_pages_are_counted_and_come_back(self, device: Device) -> None:
        assert device.available == device.size
        one, other = await self.obtain(device, 1), await self.obtain(device, PAGE + 1)
        assert device.available == device.size - 3 * PAGE
        one.close()
        assert device.available == device.size - 2 * PAGE
        other.close()
        assert device.available == device.size

    async def test_a_full_device_says_so_and_takes_nothing(self, device: Device) -> None:
        held = await self.obtain(device, PAGE)
        with pytest.raises(DeviceFull) as caught:
            await self.obtain(device, device.size)
        assert device.name in caught.value.message
        assert device.available == device.size - PAGE
        held.close()
        whole = await self.obtain(device, device.size)
        assert device.available == 0
        whole.close()

    async def test_callers_at_the_same_time_never_get_more_than_there_is(self, device: Device) -> None:
        share = device.size // 4
        results = await asyncio.gather(*(self.obtain(device, share) for _ in range(9)), return_exceptions=True)
        made = [result for result in results if not isinstance(result, BaseException)]
        assert len(made) == 4
        assert {type(result) for result in results if isinstance(result, BaseException)} == {DeviceFull}
        for one in made:
            one.close()
        assert device.available == device.size

    async def test_closing_twice_is_no_error_and_gives_back_once(self, device: Device) -> None:
        made = await self.obtain(device, PAGE)
        made.close()
        made.close()
        assert device.available == device.size

    async def test_nothing_is_reached_after_close(self, device: Device) -> None:
        unused, used = await self.obtain(device, PAGE), await self.obtain(device, PAGE)
        view = used.view()
        for made in (unused, used):
            made.close()
            with pytest.raises(ValueError, match="closed"):
                made.view()
            with pytest.raises(ValueError, match="closed"):
                made.share()
            assert made.fd is None
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
            assert memory.read(made, PAGE, 1) == b"\x05"
            memory.write(made, 0, b"\x06")
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
        assert memory.read(made, 0, 2 * PAGE) == bytes(2 * PAGE)
        made.close()
