"""What of a tensor can become a region; the GPUs' driver libraries are compiled for it."""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Iterator

import numpy
import pytest

from peermem.client.dlpack import Kind
from peermem.client.tensors import GpuRange, HostFile, memory_of
from peermem.core.errors import NotAdoptable
from tests.client.tensors_double import Allocation, CudaArray, DlpackTensor
from tests.descriptors import memory_file
from tests.device.fake_gpu import ADDRESS, FakeGpu

PAGE = mmap.PAGESIZE


class TestHostMemory:
    @pytest.fixture
    def fd(self) -> Iterator[int]:
        fd = memory_file(2 * PAGE)
        yield fd
        os.close(fd)

    def test_the_start_of_a_memory_file(self, fd: int) -> None:
        with mmap.mmap(fd, 0) as mapping:
            array = numpy.frombuffer(mapping, dtype=numpy.float32)[:100]
            assert memory_of(array) == HostFile(fd, 400)
            del array

    @pytest.mark.parametrize(("map_offset", "first"), [(0, 1), (PAGE, 0)])
    def test_another_part_of_a_memory_file(self, fd: int, map_offset: int, first: int) -> None:
        with mmap.mmap(fd, PAGE, offset=map_offset) as mapping:
            array = numpy.frombuffer(mapping, dtype=numpy.float32)[first:]
            with pytest.raises(NotAdoptable, match=f"at byte {map_offset + 4 * first} of its memory file"):
                memory_of(array)
            del array

    @pytest.mark.parametrize("flags", [mmap.MAP_PRIVATE, mmap.MAP_SHARED | mmap.MAP_ANONYMOUS])
    def test_memory_that_is_shared_with_nobody(self, fd: int, flags: int) -> None:
        file = -1 if flags & mmap.MAP_ANONYMOUS else fd
        with mmap.mmap(file, PAGE, flags=flags) as mapping:
            array = numpy.frombuffer(mapping, dtype=numpy.uint8)
            with pytest.raises(NotAdoptable, match="of this process alone"):
                memory_of(array)
            del array

    def test_a_memory_file_that_was_closed(self) -> None:
        fd = memory_file(PAGE)
        libc = ctypes.CDLL(None)  # Python's own mappings keep a descriptor
        libc.mmap.restype, libc.mmap.argtypes = ctypes.c_void_p, (ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 4)
        address = libc.mmap(None, PAGE, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_SHARED, fd, 0)
        os.close(fd)
        with pytest.raises(NotAdoptable, match="stays open"):
            memory_of(DlpackTensor(Kind.HOST, address, [3]))
        libc.munmap(ctypes.c_void_p(address), ctypes.c_size_t(PAGE))

    def test_memory_of_the_heap(self) -> None:
        with pytest.raises(NotAdoptable, match="of this process alone"):
            memory_of(numpy.ones(1 << 16))

    def test_a_tensor_beyond_its_mapping(self, fd: int) -> None:
        with mmap.mmap(fd, PAGE) as mapping:
            array = numpy.frombuffer(mapping, dtype=numpy.uint8)
            with pytest.raises(NotAdoptable, match="several mappings"):
                memory_of(DlpackTensor(Kind.HOST, array.ctypes.data, [PAGE]))
            del array

    def test_memory_that_is_not_there(self) -> None:
        with pytest.raises(NotAdoptable, match="no memory at"):
            memory_of(DlpackTensor(Kind.HOST, 4096, [3]))


@pytest.mark.parametrize("vendor", ["cuda", "hip"])
class TestGpus:
    @pytest.fixture
    def gpu(self, vendor: str) -> FakeGpu:
        return FakeGpu(vendor)

    @pytest.fixture
    def memory(self, gpu: FakeGpu) -> Iterator[Allocation]:
        """A pool's large allocation."""
        memory = Allocation(gpu, 8 * PAGE)
        yield memory
        memory.free()

    @pytest.mark.parametrize("versioned", [False, True])
    def test_a_tensor_is_a_place_in_its_allocation(self, gpu: FakeGpu, memory: Allocation, versioned: bool) -> None:
        found = memory_of(memory.tensor(PAGE + 512, 100, versioned=versioned))
        assert isinstance(found, GpuRange)
        assert (found.kind, found.pci_address) == ("cuda" if gpu.vendor == "cuda" else "rocm", ADDRESS)
        assert (found.offset, found.length) == (PAGE + 512, 400)
        whole = memory_of(memory.tensor(0, 1))
        assert isinstance(whole, GpuRange)
        assert whole.handle == found.handle
        assert found.handle.hex() not in repr(found)

    def test_an_address_of_another_process(self, gpu: FakeGpu, memory: Allocation) -> None:
        for tensor in (memory.tensor(1 << 40, 1), memory.tensor(-4, 1), memory.tensor(8 * PAGE - 4, 2)):
            with pytest.raises(NotAdoptable, match="knows no memory"):
                memory_of(tensor)

    def test_an_allocation_without_a_handle(self, gpu: FakeGpu, memory: Allocation) -> None:
        gpu.fail("cuIpcGetMemHandle" if gpu.vendor == "cuda" else "hipIpcGetMemHandle", 1)
        with pytest.raises(NotAdoptable, match="no handle"):
            memory_of(memory.tensor(0, 1))

    def test_memory_of_a_pool(self, gpu: FakeGpu, memory: Allocation) -> None:
        if gpu.vendor == "hip":
            return  # HIP does not tell
        gpu.share(False)
        with pytest.raises(NotAdoptable, match="expandable_segments"):
            memory_of(memory.tensor(0, 1))

    def test_memory_that_moves(self, gpu: FakeGpu, memory: Allocation) -> None:
        with pytest.raises(NotAdoptable, match="CUDA_MANAGED"):
            memory_of(DlpackTensor(Kind.CUDA_MANAGED, memory.address, [3]))


def test_the_cuda_array_interface_leads_to_the_same_memory() -> None:
    memory = Allocation(FakeGpu("cuda"), PAGE)
    found = memory_of(CudaArray(shape=(3,), typestr="<f8", data=(memory.address + 64, False), version=3))
    assert isinstance(found, GpuRange)
    assert (found.offset, found.length) == (64, 24)
    memory.free()
