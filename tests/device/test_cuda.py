"""CUDA devices on a driver library that is compiled for it. On a real GPU: tests/device/test_cuda_hardware.py."""

from __future__ import annotations

import ctypes.util
import subprocess
import sys

import pytest

from peermem.core import errors
from peermem.device.cuda import CudaDriver
from peermem.device.gpu import GpuDevice
from peermem.device.gpu_driver import GpuDriver
from tests.device.conformance import PAGE, read, write
from tests.device.fake_gpu import ADDRESS, FakeGpu
from tests.device.gpus import GpuTests
from tests.device.pci_tree import PciTree

pytest.importorskip("cuda.bindings", reason="the package cuda-bindings (peermem[cuda]) is not installed")


@pytest.fixture
def gpu() -> FakeGpu:
    return FakeGpu("cuda")


class TestCuda(GpuTests):
    ALLOCATE, STORE, EXPORT, PIN = (
        "cuMemAlloc",
        "cuMemcpyHtoDAsync",
        "cuMemGetHandleForAddressRange",
        "cuMemHostRegister",
    )
    NO_MEMORY, FAILED, LOST = 2, 1, 700

    def made_device(self, tree: PciTree, size: int, *, adopts: bool = True) -> GpuDevice:
        return GpuDevice(
            "cuda", "gpu0", ADDRESS, size, lambda: self.made_driver(ADDRESS), adopts=adopts, root=tree.root
        )

    def made_driver(self, address: str) -> GpuDriver:
        return CudaDriver(address)

    @pytest.mark.parametrize("pcie", [True, False])
    async def test_a_dma_buf_is_mapped_through_the_bar_where_the_driver_can(
        self, gpu: FakeGpu, device: GpuDevice, pcie: bool
    ) -> None:
        gpu.is_like(pcie=pcie)
        made = await device.allocate(PAGE)
        assert made.dma_buf() is not None
        assert gpu.library.fake_exported_with() == int(pcie)
        made.close()

    async def test_a_flush_that_fails_is_told(self, gpu: FakeGpu, device: GpuDevice) -> None:
        made = await device.allocate(PAGE)
        gpu.fail("cuFlushGPUDirectRDMAWrites", self.FAILED)
        with pytest.raises(errors.GpuFailed, match="cuFlushGPUDirectRDMAWrites"):
            await made.flush()
        assert device.alive()
        made.close()

    async def test_no_flush_where_writes_are_seen_at_once(self, gpu: FakeGpu, device: GpuDevice) -> None:
        gpu.is_like(ordering=200)
        made = await device.allocate(PAGE)
        assert not made.needs_flush
        await made.flush()
        assert gpu.flushes() == 0
        made.close()

    async def test_no_nic_where_nothing_makes_its_writes_visible(self, gpu: FakeGpu, device: GpuDevice) -> None:
        gpu.is_like(ordering=100, flush=False)
        made = await device.allocate(PAGE)
        assert (made.dma_buf(), made.device_address, made.needs_flush) == (None, None, False)
        await write(made, 0, b"by copies")
        assert await read(made, 0, 9) == b"by copies"
        made.close()

    async def test_a_driver_that_is_not_initialised(self, gpu: FakeGpu, device: GpuDevice) -> None:
        gpu.fail("cuInit", 802)
        with pytest.raises(errors.GpuFailed, match="SYSTEM_NOT_READY"):
            await device.allocate(PAGE)

    async def test_without_the_package_it_says_so(self, device: GpuDevice, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "cuda.bindings.driver", None)
        with pytest.raises(errors.GpuDriverMissing, match=r"peermem\[cuda\]"):
            await device.allocate(PAGE)
        assert device.available == device.size


_NO_LIBRARY = """
from peermem.core.errors import GpuDriverMissing
from peermem.device.cuda import CudaDriver
try:
    CudaDriver("0000:41:00.0").open()
except GpuDriverMissing as error:
    print(error.message)
"""


def test_without_the_drivers_library_it_says_so() -> None:
    if ctypes.util.find_library("cuda"):
        pytest.skip("NVIDIA's driver is installed")
    told = subprocess.run([sys.executable, "-c", _NO_LIBRARY], capture_output=True, text=True, check=True).stdout
    assert "libcuda.so.1" in told
