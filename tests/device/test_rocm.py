"""ROCm devices on driver libraries that are compiled for it."""

from __future__ import annotations

import ctypes.util
import subprocess
import sys

import pytest

from peermem.device.gpu import GpuDevice
from peermem.device.gpu_driver import GpuDriver
from peermem.device.rocm import HipDriver
from tests.device.conformance import PAGE, read, write
from tests.device.fake_gpu import ADDRESS, FakeGpu
from tests.device.gpus import GpuTests
from tests.device.pci_tree import PciTree


@pytest.fixture
def gpu() -> FakeGpu:
    return FakeGpu("hip")


class TestRocm(GpuTests):
    ALLOCATE, STORE, EXPORT, PIN = (
        "hipMalloc",
        "hipMemcpyHtoDAsync",
        "hsa_amd_portable_export_dmabuf",
        "hipHostRegister",
    )
    NO_MEMORY, FAILED, LOST = 2, 1, 700

    def made_device(self, tree: PciTree, size: int, *, adopts: bool = True) -> GpuDevice:
        return GpuDevice(
            "rocm", "gpu0", ADDRESS, size, lambda: self.made_driver(ADDRESS), adopts=adopts, root=tree.root
        )

    def made_driver(self, address: str) -> GpuDriver:
        return HipDriver(address)

    async def test_no_nic_where_nothing_makes_its_writes_visible(self, gpu: FakeGpu, device: GpuDevice) -> None:
        gpu.is_like(flush=False)
        made = await device.allocate(PAGE)
        assert (made.dma_buf(), made.device_address, made.needs_flush) == (None, None, False)
        await write(made, 0, b"by copies")
        assert await read(made, 0, 9) == b"by copies"
        made.close()


_NO_LIBRARY = """
from peermem.core.errors import GpuDriverMissing
from peermem.device.rocm import HipDriver
try:
    HipDriver("0000:41:00.0").open()
except GpuDriverMissing as error:
    print(error.message)
"""


def test_without_the_runtime_it_says_so() -> None:
    if ctypes.util.find_library("amdhip64"):
        pytest.skip("AMD's runtime is installed")
    told = subprocess.run([sys.executable, "-c", _NO_LIBRARY], capture_output=True, text=True, check=True).stdout
    assert "libamdhip64.so" in told
