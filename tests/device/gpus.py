"""What every vendor's GPU device has to do beyond the conformance suite; a subclass of `GpuTests` runs it on one."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Iterator
from contextlib import closing

import pytest

from peermem import memory
from peermem.core import errors
from peermem.core.types import Path
from peermem.device import gpu_copier
from peermem.device.gpu import GpuDevice
from peermem.device.gpu_driver import GpuDriver
from peermem.memory import HostMemory
from tests.descriptors import memory_file, open_files, until
from tests.device.conformance import PAGE, DeviceConformance, read, write
from tests.device.copying import MIB, copier
from tests.device.fake_gpu import FakeGpu, Job
from tests.device.pci_tree import PciTree


class GpuTests(DeviceConformance):
    """The tests. A subclass gives the fixture `gpu` and `made_device`; names of entry points are the vendor's."""

    ALLOCATE, STORE, EXPORT, PIN = "", "", "", ""
    NO_MEMORY, FAILED, LOST = 0, 0, 0

    def made_device(self, tree: PciTree, size: int, *, adopts: bool = True) -> GpuDevice:
        raise NotImplementedError

    def made_driver(self, address: str) -> GpuDriver:
        raise NotImplementedError

    @pytest.fixture(autouse=True)
    def nothing_stays(self, gpu: FakeGpu) -> Iterator[None]:
        before = open_files()
        yield
        assert gpu.open_things == 0
        assert open_files() <= before  # those of earlier tests' calls may close late

    @pytest.fixture
    async def device(self, gpu: FakeGpu, tree: PciTree) -> AsyncIterator[GpuDevice]:
        device = self.made_device(tree, 64 * PAGE)
        yield device
        await device.close()

    # What it is

    async def test_it_says_how_its_memory_may_be_reached(self, device: GpuDevice) -> None:
        assert device.paths == (Path.DMABUF, Path.LEGACY_PEER_MEMORY, Path.STAGED)
        assert device.path is Path.STAGED
        assert (device.size, device.available) == (64 * PAGE, 64 * PAGE)

    async def test_nothing_is_opened_before_it_is_needed(self, gpu: FakeGpu, device: GpuDevice) -> None:
        assert gpu.open_things == 0
        made = await device.allocate(1)
        assert gpu.open_things > 0
        made.close()

    async def test_a_file_descriptor_is_not_adopted(self, device: GpuDevice) -> None:
        with pytest.raises(errors.NotSupported, match="handle"):
            await device.adopt(memory_file(PAGE), 0)

    # How NICs reach it

    async def test_its_dma_buf_has_its_bytes_where_it_says(self, device: GpuDevice) -> None:
        first, second = await device.allocate(PAGE + 1), await device.allocate(PAGE)
        await write(second, 0, b"second")
        here, there = first.dma_buf(), second.dma_buf()
        assert here is not None
        assert there is not None
        assert (here[1], there[1]) == (0, 2 * PAGE)
        assert os.pread(there[0], 6, there[1]) == b"second"
        assert first.device_address is not None
        assert second.device_address == first.device_address + 2 * PAGE
        first.close()
        second.close()
        with pytest.raises(ValueError, match="closed"):
            first.dma_buf()

    async def test_without_a_dma_buf_there_is_the_address(self, gpu: FakeGpu, device: GpuDevice) -> None:
        gpu.fail(self.EXPORT, self.FAILED)
        made = await device.allocate(PAGE)
        assert made.dma_buf() is None
        assert made.device_address is not None
        await write(made, 5, b"all the same")
        assert await read(made, 5, 12) == b"all the same"
        made.close()

    async def test_what_nics_wrote_is_flushed(self, gpu: FakeGpu, device: GpuDevice) -> None:
        made = await device.allocate(PAGE)
        assert made.needs_flush
        await made.flush()
        assert gpu.flushes() == 1
        made.close()

    # Copies

    async def test_large_buffers_are_pinned_once_and_small_ones_are_not(
        self, gpu: FakeGpu, tree: PciTree, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(gpu_copier, "PIN", MIB)
        device = self.made_device(tree, 2 * MIB)
        made = await device.allocate(MIB)
        with closing(HostMemory(MIB)) as large, closing(HostMemory(PAGE)) as small:
            open_before = gpu.open_things
            await copier(made).store(large, [(0, 0, MIB)])
            await copier(made).load(large, [(5, 9, 1), (7, 1, 2)])
            assert gpu.copies(pinned=True) == 3
            assert gpu.open_things == open_before + 1
            await copier(made).store(small, [(0, 0, PAGE)])
            assert (gpu.copies(pinned=True), gpu.copies(pinned=False)) == (0, 1)
        made.close()
        await device.close()

    async def test_what_can_not_be_pinned_is_copied_all_the_same(
        self, gpu: FakeGpu, tree: PciTree, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(gpu_copier, "PIN", PAGE)
        gpu.fail(self.PIN, self.FAILED)
        device = self.made_device(tree, MIB)
        made = await device.allocate(PAGE)
        await write(made, 0, bytes(PAGE - 5) + b"bytes")
        assert (await read(made, 0, PAGE))[-5:] == b"bytes"
        made.close()
        await device.close()

    async def test_copies_keep_their_order(self, device: GpuDevice) -> None:
        made = await device.allocate(PAGE)
        with closing(HostMemory(256)) as buffer:
            memory.write(buffer, 0, bytes(range(256)))
            await asyncio.gather(*(copier(made).store(buffer, [(turn % 8, turn, 1)]) for turn in range(256)))
        assert await read(made, 0, 8) == bytes(range(248, 256))
        made.close()

    async def test_the_loop_goes_on_while_the_gpu_copies(self, gpu: FakeGpu, device: GpuDevice) -> None:
        made = await device.allocate(PAGE)
        gpu.hold()
        with closing(HostMemory(PAGE)) as buffer:
            copies = [asyncio.create_task(copier(made).store(buffer, [(0, 0, PAGE)])) for _ in range(3)]
            await until(lambda: gpu.queued() == 3)
            assert not any(copy.done() for copy in copies)
            gpu.hold(False)
            await asyncio.gather(*copies)
        made.close()

    async def test_who_is_cancelled_waits_for_its_copy(self, gpu: FakeGpu, device: GpuDevice) -> None:
        made = await device.allocate(PAGE)
        gpu.hold()
        with closing(HostMemory(PAGE)) as buffer:
            copy = asyncio.create_task(copier(made).store(buffer, [(0, 0, PAGE)]))
            await until(lambda: gpu.queued() == 1)
            copy.cancel()
            done, _ = await asyncio.wait([copy], timeout=0.05)
            assert not done
            gpu.hold(False)
            with pytest.raises(asyncio.CancelledError):
                await copy
        made.close()

    @pytest.mark.parametrize("piece", [(-1, 0, 1), (0, -1, 1), (0, 0, -1), (PAGE, 0, 1), (0, PAGE, 1), (1, 0, PAGE)])
    async def test_pieces_outside_are_refused(self, device: GpuDevice, piece: tuple[int, int, int]) -> None:
        made = await device.allocate(PAGE)
        with closing(HostMemory(PAGE)) as buffer, pytest.raises(ValueError, match="outside"):
            await copier(made).store(buffer, [piece])
        made.close()

    async def test_nothing_to_copy_is_no_error(self, device: GpuDevice) -> None:
        made = await device.allocate(PAGE)
        with closing(HostMemory(PAGE)) as buffer, closing(HostMemory(0)) as empty:
            await copier(made).load(buffer, [])
            await copier(made).store(empty, [(0, 0, 0)])
        made.close()

    # Faults

    async def test_a_copy_that_the_driver_refuses_hurts_nothing_else(self, gpu: FakeGpu, device: GpuDevice) -> None:
        made = await device.allocate(PAGE)
        with closing(HostMemory(PAGE)) as buffer:
            gpu.fail(self.STORE, self.FAILED, after=1)
            with pytest.raises(errors.GpuFailed, match=device.name):
                await copier(made).store(buffer, [(0, 0, 1), (1, 1, 1)])
            gpu.fail(self.STORE, 0)
            assert device.alive()
            await copier(made).store(buffer, [(0, 0, PAGE)])
        made.close()

    async def test_a_gpu_that_is_lost_is_told_and_comes_back(self, gpu: FakeGpu, device: GpuDevice) -> None:
        made = await device.allocate(PAGE)
        gpu.lose()
        with pytest.raises(errors.RegionRevoked, match="lost"):
            await write(made, 0, b"x")
        assert not device.alive()
        with pytest.raises(errors.RegionRevoked):
            await made.flush()
        gpu.lose(False)
        with pytest.raises(errors.RegionRevoked):
            await read(made, 0, 1)
        with pytest.raises(errors.DeviceLost, match="being closed"):
            await device.allocate(PAGE)
        made.close()
        made = await device.allocate(PAGE)
        assert device.alive()
        assert await read(made, 0, PAGE) == bytes(PAGE)
        made.close()

    async def test_an_error_that_ends_all_is_a_lost_gpu(self, gpu: FakeGpu, device: GpuDevice) -> None:
        made = await device.allocate(PAGE)
        gpu.fail(self.STORE, self.LOST)
        with pytest.raises(errors.RegionRevoked):
            await write(made, 0, b"x")
        assert not device.alive()
        made.close()

    async def test_a_gpu_lost_while_memory_is_made(self, gpu: FakeGpu, device: GpuDevice) -> None:
        made = await device.allocate(PAGE)
        gpu.lose()
        with pytest.raises(errors.DeviceLost):
            await device.allocate(PAGE)
        made.close()
        assert device.available == device.size

    async def test_a_function_that_was_removed_is_not_alive(self, device: GpuDevice, tree: PciTree) -> None:
        (tree.root / "bus/pci/devices" / device.pci_address).unlink()
        assert not device.alive()

    async def test_no_gpu_at_the_address(self, gpu: FakeGpu, tree: PciTree) -> None:
        address = "0000:99:00.0"
        device = GpuDevice("any", "gpu9", address, MIB, lambda: self.made_driver(address), root=tree.root)
        with pytest.raises(errors.DeviceLost, match=address):
            await device.allocate(PAGE)
        assert not device.alive()
        await device.close()

    async def test_a_gpu_without_so_much_memory(self, gpu: FakeGpu, device: GpuDevice) -> None:
        gpu.fail(self.ALLOCATE, self.NO_MEMORY)
        with pytest.raises(errors.DeviceFull, match="configured to give out"):
            await device.allocate(PAGE)
        gpu.fail(self.ALLOCATE, 0)
        (await device.allocate(PAGE)).close()

    async def test_a_driver_that_refuses_to_open(self, gpu: FakeGpu, device: GpuDevice) -> None:
        gpu.fail(self.ALLOCATE, self.FAILED)
        with pytest.raises(errors.GpuFailed, match=self.ALLOCATE):
            await device.allocate(PAGE)

    # Memory of jobs

    async def test_memory_of_a_job_is_adopted(self, gpu: FakeGpu, device: GpuDevice) -> None:
        job = Job(gpu.vendor, 4 * PAGE)
        made = await device.adopt_handle(job.handle, PAGE + 100, 2 * PAGE)
        assert made.length == 2 * PAGE
        job.write(PAGE + 100, b"of the job")
        assert await read(made, 0, 10) == b"of the job"
        await write(made, 2 * PAGE - 3, b"end")
        assert job.read(3 * PAGE + 97, 3) == b"end"
        exported = made.dma_buf()
        assert exported is not None
        assert exported[1] == 100
        assert device.available == device.size
        made.close()
        job.end()

    async def test_all_behind_an_offset_of_a_job(self, gpu: FakeGpu, device: GpuDevice) -> None:
        job = Job(gpu.vendor, 4 * PAGE)
        made = await device.adopt_handle(job.handle, PAGE, 0)
        assert made.length == 3 * PAGE
        made.close()
        job.end()

    async def test_memory_of_a_job_that_ended_can_still_be_closed(self, gpu: FakeGpu, device: GpuDevice) -> None:
        job = Job(gpu.vendor, PAGE)
        made = await device.adopt_handle(job.handle, 0, 0)
        job.end()
        assert len(await read(made, 0, PAGE)) == PAGE
        made.close()

    @pytest.mark.parametrize(("offset", "length"), [(PAGE, 1), (PAGE, 0), (0, PAGE + 1), (1, PAGE), (1 << 63, 1 << 63)])
    async def test_ranges_outside_a_jobs_allocation(
        self, gpu: FakeGpu, device: GpuDevice, offset: int, length: int
    ) -> None:
        job = Job(gpu.vendor, PAGE)
        with pytest.raises(errors.NotAdoptable, match="4096 bytes"):
            await device.adopt_handle(job.handle, offset, length)
        job.end()

    @pytest.mark.parametrize("handle", [b"", bytes(64), os.urandom(64), bytes(65)], ids=["none", "zero", "any", "long"])
    async def test_bytes_that_are_no_handle(self, device: GpuDevice, handle: bytes) -> None:
        with pytest.raises(errors.NotAdoptable, match="does not open the handle"):
            await device.adopt_handle(handle, 0, 0)
        assert device.alive()

    async def test_a_handle_of_memory_that_was_freed(self, gpu: FakeGpu, device: GpuDevice) -> None:
        job = Job(gpu.vendor, PAGE)
        job.end()
        with pytest.raises(errors.NotAdoptable):
            await device.adopt_handle(job.handle, 0, 0)

    async def test_a_device_that_takes_nothing_of_jobs(self, gpu: FakeGpu, tree: PciTree) -> None:
        device = self.made_device(tree, MIB, adopts=False)
        with pytest.raises(errors.NotAdoptable, match="adopt = false"):
            await device.adopt_handle(bytes(64), 0, 0)
        await device.close()
