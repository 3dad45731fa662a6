"""The CUDA device on a real GPU; run by test_cuda_hardware.py in a process that has no fake driver."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from peermem.device.cuda import CudaDriver
from peermem.device.gpu import GpuDevice
from tests.device.conformance import PAGE, DeviceConformance

GPUS = sorted(folder.name for folder in Path("/proc/driver/nvidia/gpus").glob("*"))


class TestOnGpu(DeviceConformance):
    @pytest.fixture
    async def device(self) -> AsyncIterator[GpuDevice]:
        address = GPUS[0]
        device = GpuDevice("cuda", "gpu0", address, 64 * PAGE, lambda: CudaDriver(address))
        yield device
        await device.close()

    async def test_what_it_offers_to_nics_is_flushed(self, device: GpuDevice) -> None:
        made = await device.allocate(PAGE)
        await made.flush()
        exported = made.dma_buf()
        assert exported is None or exported[1] == 0
        made.close()
