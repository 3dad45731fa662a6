"""Devices on real kernel interfaces: the p2pmem pool of the NVMe controller, and a PCI BAR without a driver."""

from __future__ import annotations

import asyncio
import mmap
import os
import subprocess
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest

from peermem import memory
from peermem.core import errors
from peermem.device.base import Device, DeviceMemory
from peermem.device.p2pmem import P2pmemDevice, p2pmem_devices
from peermem.device.pci_resource import PciResourceDevice
from peermem.memory import HostMemory
from tests.descriptors import open_files, until
from tests.device.conformance import PAGE, DeviceConformance, read, write
from tests.lab.guest.conftest import Figures

DEVICES = Path("/sys/bus/pci/devices")
MIB = 1 << 20
BAR = 2
_COMMAND, _MEMORY_SPACE = 4, 2


@pytest.fixture(autouse=True)
def nothing_stays_open() -> Iterator[None]:
    before = open_files()
    yield
    assert open_files() == before


@pytest.fixture
def ivshmem() -> str:
    """Return the address of the function whose BAR 2 is memory without a driver, switched on."""
    (address,) = (entry.name for entry in DEVICES.iterdir() if (entry / "device").read_text() == "0x1110\n")
    (DEVICES / address / "enable").write_text("1")
    return address


@pytest.fixture
def nvme() -> str:
    (device,) = p2pmem_devices()
    return device.pci_address


def command(address: str, *, memory_on: bool) -> None:
    """Switch a function's memory on or off."""
    with (DEVICES / address / "config").open("r+b", buffering=0) as config:
        word = os.pread(config.fileno(), 1, _COMMAND)[0] & ~_MEMORY_SPACE | memory_on * _MEMORY_SPACE
        os.pwrite(config.fileno(), bytes([word]), _COMMAND)


class TestP2pmemConformance(DeviceConformance):
    @pytest.fixture
    def device(self, nvme: str) -> Iterator[Device]:
        """The pool with a mebibyte left, since the emulated memory is slow."""
        device = P2pmemDevice(nvme)
        with (DEVICES / nvme / "p2pmem/allocate").open("r+b") as file, mmap.mmap(file.fileno(), device.available - MIB):
            assert device.available == MIB
            yield device
            assert device.available == MIB


class TestPciResourceConformance(DeviceConformance):
    @pytest.fixture
    async def device(self, ivshmem: str) -> AsyncIterator[Device]:
        device = PciResourceDevice("bar0", ivshmem, BAR, MIB, 64 * PAGE)
        yield device
        assert device.available == device.size
        await device.close()


class TestP2pmem:
    async def test_the_pool_is_a_device(self, nvme: str) -> None:
        (device,) = p2pmem_devices()
        assert device.name == f"p2pmem-{nvme.replace(':', '-').replace('.', '-')}"
        assert device.size == 64 * MIB
        assert 0 < device.available <= device.size
        assert device.alive()

    async def test_other_users_take_of_the_same_pool(self, nvme: str) -> None:
        device = P2pmemDevice(nvme)
        free = device.available
        with (DEVICES / nvme / "p2pmem/allocate").open("r+b") as file, mmap.mmap(file.fileno(), free - MIB):
            with pytest.raises(errors.DeviceFull) as caught:
                await device.allocate(MIB + 1)
            assert caught.value.metadata["available"] == str(MIB)
        assert device.available == free

    async def test_a_driver_that_lets_go_and_comes_back(self, nvme: str) -> None:
        """Nobody dies, and nothing of the old pool is taken for the new one."""
        device, driver = P2pmemDevice(nvme), Path("/sys/bus/pci/drivers/nvme")
        made = await device.allocate(MIB)
        memory.write(made, 0, b"there")
        async with asyncio.timeout(60):
            await asyncio.to_thread((driver / "unbind").write_text, nvme)
        assert not device.alive()
        assert (device.size, device.available) == (0, 0)
        with pytest.raises(errors.DeviceLost):
            await device.allocate(PAGE)
        async with asyncio.timeout(60):
            await asyncio.to_thread((driver / "bind").write_text, nvme)
            await until(lambda: device.size > 0)
        assert not device.alive()
        for reach in (lambda: memory.read(made, 0, 5), lambda: memory.write(made, 0, b"x")):
            with pytest.raises(OSError, match="Bad address"):
                reach()
        with pytest.raises(errors.DeviceLost, match="regions of before are being closed"):
            await device.allocate(PAGE)
        made.close()
        assert device.alive()
        again = await device.allocate(PAGE)
        assert memory.read(again, 0, PAGE) == bytes(PAGE)
        again.close()


class TestPciResource:
    @pytest.fixture
    async def device(self, ivshmem: str) -> AsyncIterator[PciResourceDevice]:
        device = PciResourceDevice("bar0", ivshmem, BAR)
        yield device
        await device.close()

    async def test_the_bytes_are_in_the_bar(self, ivshmem: str, device: PciResourceDevice) -> None:
        first, made = await device.allocate(PAGE), await device.allocate(3 * PAGE)
        data = os.urandom(2 * PAGE + 5)
        await write(made, 3, data)
        with (
            (DEVICES / ivshmem / f"resource{BAR}").open("rb") as file,
            mmap.mmap(file.fileno(), 4 * PAGE, mmap.MAP_SHARED, mmap.PROT_READ) as mapped,
        ):
            assert mapped[:] == bytes(PAGE + 3) + data + bytes(PAGE - 8)
        assert await read(made, 3, len(data)) == data
        first.close()
        made.close()

    async def test_the_whole_bar_is_given_out(self, device: PciResourceDevice) -> None:
        assert device.size == 16 * MIB
        made = await device.allocate(16 * MIB)
        await write(made, 16 * MIB - 3, b"end")
        assert await read(made, 16 * MIB - 4, 4) == b"\0end"
        made.close()

    async def test_memory_that_is_switched_off(self, ivshmem: str, device: PciResourceDevice) -> None:
        made = await device.allocate(PAGE)
        command(ivshmem, memory_on=False)
        with pytest.raises(errors.RegionRevoked, match="does not answer"):
            await read(made, 0, 8)
        await self.expect_recovery(device, made, lambda: command(ivshmem, memory_on=True))

    async def test_a_function_that_is_removed(self, ivshmem: str, device: PciResourceDevice) -> None:
        made = await device.allocate(PAGE)
        await write(made, 0, b"there")
        (DEVICES / ivshmem / "remove").write_text("1")
        assert not device.alive()
        with pytest.raises(errors.RegionRevoked, match=r"vanished|does not answer"):
            await read(made, 0, 8)

        def bring_back() -> None:
            Path("/sys/bus/pci/rescan").write_text("1")
            (DEVICES / ivshmem / "enable").write_text("1")

        await self.expect_recovery(device, made, bring_back)

    async def expect_recovery(
        self, device: PciResourceDevice, made: DeviceMemory, bring_back: Callable[[], None]
    ) -> None:
        assert not device.alive()
        made.close()
        with pytest.raises(errors.DeviceLost):
            await device.allocate(PAGE)
        bring_back()
        again = await device.allocate(PAGE)
        assert device.alive()
        assert await read(again, 0, PAGE) == bytes(PAGE)
        again.close()

    async def test_a_bar_that_a_driver_holds(self, nvme: str) -> None:
        device = PciResourceDevice("bar0", nvme, 0, 0, PAGE)
        with pytest.raises(errors.BarClaimed) as caught:
            await device.allocate(PAGE)
        assert "driver nvme holds BAR 0" in caught.value.message
        assert f"echo {nvme} > /sys/bus/pci/drivers/nvme/unbind" in caught.value.message

    async def test_a_daemon_without_privilege(self, ivshmem: str, nvme: str) -> None:
        groups = os.getgroups()
        os.setgroups([])
        os.setegid(65534)
        os.seteuid(65534)
        try:
            for device in (PciResourceDevice("bar0", ivshmem, BAR), P2pmemDevice(nvme)):
                with pytest.raises(errors.DeviceForbidden):
                    await device.allocate(PAGE)
        finally:
            os.seteuid(0)
            os.setegid(0)
            os.setgroups(groups)

    @pytest.mark.parametrize("device", ["PciResourceDevice('bar0', '{ivshmem}', 2)", "P2pmemDevice('{nvme}')"])
    def test_a_sysfs_that_is_mounted_read_only(self, ivshmem: str, nvme: str, device: str) -> None:
        script = (
            "import asyncio\nfrom peermem.core.errors import PeermemError\n"
            "from peermem.device.p2pmem import P2pmemDevice\n"
            "from peermem.device.pci_resource import PciResourceDevice\n"
            f"try: asyncio.run({device.format(ivshmem=ivshmem, nvme=nvme)}.allocate(4096))\n"
            "except PeermemError as error: print(error.reason, error.message)"
        )
        read_only = 'mount -o remount,bind,ro /sys && exec python3 -c "$0"'
        done = subprocess.run(
            ["unshare", "--mount", "sh", "-c", read_only, script], capture_output=True, text=True, check=True
        )
        assert done.stdout.startswith("DEVICE_FORBIDDEN")
        assert "/sys for writing" in done.stdout

    async def test_how_fast_copies_are(self, nvme: str, device: PciResourceDevice, figures: Figures) -> None:
        speeds: dict[str, float] = {}
        with closing(HostMemory(MIB)) as buffer, closing(await device.allocate(MIB)) as made:
            assert made.copier is not None
            for name, copy in (("pci_resource_load", made.copier.load), ("pci_resource_store", made.copier.store)):
                begun = time.perf_counter()
                for _ in range(5):
                    await copy(buffer, [(0, 0, MIB)])
                speeds[name] = 5 * MIB / (time.perf_counter() - begun)
            with closing(await P2pmemDevice(nvme).allocate(MIB)) as pool:
                for name, source, target in (("p2pmem_load", pool, buffer), ("p2pmem_store", buffer, pool)):
                    begun = time.perf_counter()
                    memory.copy(source, 0, target, 0, MIB)
                    speeds[name] = MIB / (time.perf_counter() - begun)
        figures("copies_of_1MiB", {name: {"mb_per_s": round(speed / 1e6, 1)} for name, speed in speeds.items()})
        assert len(speeds) == 4
