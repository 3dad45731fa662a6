"""The vfio device on a kernel of ordinary files (`vfio_kernel.py`); the lab has a real one."""

from __future__ import annotations

import asyncio
import errno
import os
import resource
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from peermem.core import errors
from peermem.device.base import Device
from peermem.device.vfio import VfioDevice
from tests.descriptors import limited, memory_file, open_files, until
from tests.device.conformance import PAGE, DeviceConformance, read, write
from tests.device.copying import MIB, processes
from tests.device.pci_tree import ADDRESS, PciTree
from tests.device.vfio_kernel import VfioKernel

SEVERAL = [(MIB, 16 * PAGE), (2 * MIB, 32 * PAGE), (2 * MIB + 32 * PAGE, 16 * PAGE)]
OPEN_DEVICE, EXPORT = 0x3B6A, 0x3B75


@pytest.fixture(autouse=True)
def nothing_stays_open() -> Iterator[None]:
    before = open_files()
    yield
    assert open_files() <= before
    assert processes() == []


@pytest.fixture
def kernel(tree: PciTree, tmp_path: Path) -> VfioKernel:
    return VfioKernel(tree, tmp_path / "dev")


def vfio(kernel: VfioKernel, *ranges: tuple[int, int], bar: int = 2) -> VfioDevice:
    return VfioDevice("accel0", ADDRESS, bar, ranges, root=kernel.tree.root, dev=kernel.dev, opener=kernel.open)


@pytest.fixture
async def device(kernel: VfioKernel) -> AsyncIterator[VfioDevice]:
    device = vfio(kernel, (MIB, 64 * PAGE))
    yield device
    await device.close()


class TestOneRange(DeviceConformance):
    @pytest.fixture
    async def device(self, kernel: VfioKernel) -> AsyncIterator[Device]:
        device = vfio(kernel, (MIB, 64 * PAGE))
        yield device
        assert device.available == device.size == 64 * PAGE
        await device.close()


class TestSeveralRanges(DeviceConformance):
    @pytest.fixture
    async def device(self, kernel: VfioKernel) -> AsyncIterator[Device]:
        device = vfio(kernel, *reversed(SEVERAL))
        yield device
        assert device.available == device.size == 64 * PAGE
        await device.close()


async def test_a_region_across_ranges_is_exported_as_what_it_has_of_each(kernel: VfioKernel) -> None:
    device = vfio(kernel, *SEVERAL)
    first, made = await device.allocate(8 * PAGE), await device.allocate(44 * PAGE + 1)
    assert kernel.exported == [
        [(MIB, 8 * PAGE)],
        [(MIB + 8 * PAGE, 8 * PAGE), (2 * MIB, 32 * PAGE), (2 * MIB + 32 * PAGE, 5 * PAGE)],
    ]
    data = os.urandom(44 * PAGE + 1)
    await write(made, 0, data)
    await write(made, 8 * PAGE - 3, b"across")
    data = data[: 8 * PAGE - 3] + b"across" + data[8 * PAGE + 3 :]
    assert await read(made, 0, made.length) == data
    with kernel.tree.bar.open("rb") as bar:
        assert os.pread(bar.fileno(), 8 * PAGE, MIB + 8 * PAGE) == data[: 8 * PAGE]
        assert os.pread(bar.fileno(), 36 * PAGE + 1, 2 * MIB) == data[8 * PAGE :]
        assert os.pread(bar.fileno(), 8 * PAGE, MIB) == bytes(8 * PAGE)
    for memory in (first, made):
        memory.close()
    await device.close()


async def test_all_of_the_bar(kernel: VfioKernel) -> None:
    device = vfio(kernel)
    assert (device.size, device.available) == (4 * MIB, 4 * MIB)
    made = await device.allocate(PAGE)
    assert (device.size, device.available) == (4 * MIB, 4 * MIB - PAGE)
    made.close()
    await device.close()


async def test_it_is_opened_once_and_given_back(kernel: VfioKernel, device: VfioDevice) -> None:
    before = open_files()
    assert kernel.asked == []
    made = [await device.allocate(PAGE) for _ in range(3)]
    assert kernel.asked.count(OPEN_DEVICE) == 1
    for memory in made:
        memory.close()
    await device.close()
    await device.close()
    assert open_files() <= before


async def test_by_the_functions_own_file_where_there_is_iommufd(kernel: VfioKernel, device: VfioDevice) -> None:
    kernel.give_files()
    kernel.dev.joinpath("vfio/devices/vfio0").unlink()
    kernel.dev.joinpath("vfio/devices/vfio0").symlink_to(kernel.tree.bar)
    made = await device.allocate(PAGE)
    assert kernel.asked[0] == 0x3B76
    assert OPEN_DEVICE not in kernel.asked
    await write(made, 0, b"by file")
    assert await read(made, 0, 7) == b"by file"
    made.close()


async def test_what_the_kernel_wants_back_is_given_back_when_its_regions_are_closed(
    kernel: VfioKernel, device: VfioDevice
) -> None:
    before = open_files()
    made = await device.allocate(PAGE)
    kernel.want_back()
    await until(lambda: not device.alive())
    with pytest.raises(errors.DeviceLost, match="being closed"):
        await device.allocate(PAGE)
    assert processes() != []
    await asyncio.to_thread(made.close)
    await until(lambda: processes() == [] and open_files() <= before)
    again = await device.allocate(PAGE)
    assert device.alive()
    again.close()


async def test_a_bar_that_vanishes_in_the_middle(kernel: VfioKernel, device: VfioDevice) -> None:
    made = await device.allocate(PAGE)
    kernel.tree.vanish()
    with pytest.raises(errors.RegionRevoked, match="vanished"):
        await read(made, 0, PAGE)
    assert not device.alive()
    made.close()
    os.truncate(kernel.tree.bar, kernel.tree.bar_size)
    (await device.allocate(PAGE)).close()


async def test_memory_that_was_switched_off(kernel: VfioKernel, device: VfioDevice) -> None:
    made = await device.allocate(PAGE)
    kernel.tree.switch_off()
    with pytest.raises(errors.RegionRevoked, match="does not answer"):
        await write(made, 0, b"x")
    made.close()
    with pytest.raises(errors.DeviceLost):
        await device.allocate(PAGE)
    kernel.tree.switch_on()
    (await device.allocate(PAGE)).close()


class TestWithoutExport:
    async def test_the_memory_is_there_and_says_why_it_is_no_dma_buf(
        self, kernel: VfioKernel, device: VfioDevice
    ) -> None:
        kernel.refuses[EXPORT] = errno.ENOTTY
        made = await device.allocate(PAGE)
        for ask in (made.dma_buf, made.share):
            with pytest.raises(errors.KernelTooOld, match=r"Linux 6\.19"):
                ask()
        await write(made, 0, b"staged")
        assert await read(made, 0, 6) == b"staged"
        made.close()


class TestRefusals:
    async def refused(self, device: VfioDevice, kind: type[errors.PeermemError], *words: str) -> None:
        before = open_files()
        with pytest.raises(kind) as caught:
            await device.allocate(PAGE)
        assert type(caught.value) is kind
        for word in words:
            assert word in caught.value.message
        assert open_files() <= before

    async def test_another_driver_has_it(self, kernel: VfioKernel, device: VfioDevice) -> None:
        (kernel.tree.folder / "driver").unlink()
        await self.refused(device, errors.BarClaimed, "no driver holds", "bind = true")
        kernel.tree.bind("nvme")
        await self.refused(device, errors.BarClaimed, "driver nvme holds", "driver_override", "bind = true")

    async def test_it_can_not_be_bound(self, kernel: VfioKernel) -> None:
        (kernel.tree.folder / "driver").unlink()
        device = VfioDevice("accel0", ADDRESS, 2, bind=True, root=kernel.tree.root, dev=kernel.dev, opener=kernel.open)
        await self.refused(device, errors.DeviceForbidden, "the kernel gave it to no driver")
        await device.close()

    async def test_there_is_no_such_function(self, kernel: VfioKernel) -> None:
        device = VfioDevice("accel0", "0000:43:00.0", 2, root=kernel.tree.root, dev=kernel.dev, opener=kernel.open)
        assert not device.alive()
        assert device.size == 0
        await self.refused(device, errors.DeviceLost, "no PCI function 0000:43:00.0")

    async def test_others_of_its_group_have_drivers(self, kernel: VfioKernel, device: VfioDevice) -> None:
        other = kernel.tree.root / "devices/other"
        other.mkdir(parents=True)
        (other / "driver").symlink_to("../../bus/pci/drivers/e1000e")
        (kernel.tree.folder / "iommu_group/devices/0000:41:00.1").symlink_to(other)
        kernel.is_viable = False
        await self.refused(device, errors.BarClaimed, "IOMMU group 7", "0000:41:00.1 (driver e1000e)")

    async def test_no_iommu_is_in_use(self, kernel: VfioKernel, device: VfioDevice) -> None:
        (kernel.tree.folder / "iommu_group").unlink()
        await self.refused(device, errors.KernelTooOld, "intel_iommu=on")

    async def test_the_module_for_the_iommu_is_missing(self, kernel: VfioKernel, device: VfioDevice) -> None:
        kernel.has_type1 = False
        await self.refused(device, errors.DeviceLost, "vfio_iommu_type1")

    @pytest.mark.parametrize(
        ("number", "kind", "word"),
        [
            (errno.EBUSY, errors.BarClaimed, "another process"),
            (errno.EPERM, errors.DeviceForbidden, "vfio/7"),
            (errno.EMFILE, errors.LimitReached, "LimitNOFILE"),
            (errno.EINVAL, errors.DeviceLost, "kernel's log"),
        ],
    )
    async def test_the_kernel_does_not_give_it(
        self, kernel: VfioKernel, device: VfioDevice, number: int, kind: type[errors.PeermemError], word: str
    ) -> None:
        kernel.refuses[OPEN_DEVICE] = number
        await self.refused(device, kind, word)

    @pytest.mark.usefixtures("kernel", "as_nobody")
    async def test_a_daemon_without_privilege(self, kernel: VfioKernel, device: VfioDevice) -> None:
        await self.refused(device, errors.DeviceForbidden, "vfio/7")

    async def test_a_bar_that_is_not_there(self, kernel: VfioKernel) -> None:
        await self.refused(vfio(kernel, bar=0), errors.DeviceLost, "no BAR 0")

    async def test_a_range_that_the_bar_does_not_have(self, kernel: VfioKernel) -> None:
        await self.refused(vfio(kernel, (4 * MIB, PAGE)), errors.InvalidField, "offset 4194304")

    async def test_a_daemon_without_descriptors(self, kernel: VfioKernel, device: VfioDevice) -> None:
        with limited(resource.RLIMIT_NOFILE, 3), pytest.raises(errors.LimitReached, match="LimitNOFILE"):
            await device.allocate(PAGE)
        assert kernel.asked == []

    async def test_no_byte_and_no_file(self, device: VfioDevice) -> None:
        with pytest.raises(errors.ZeroLength):
            await device.allocate(0)
        with pytest.raises(errors.NotSupported):
            await device.adopt(memory_file(PAGE), 0)
