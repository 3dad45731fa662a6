"""A BAR range, on a tree of ordinary files: what differs from a real BAR is tested in the lab (`tests/lab/guest`)."""

from __future__ import annotations

import asyncio
import fcntl
import os
import resource
from collections.abc import AsyncIterator, Iterator
from contextlib import closing
from pathlib import Path

import pytest

from peermem.core import errors
from peermem.core.types import Path as NicPath
from peermem.device.base import Device
from peermem.device.pci_resource import PciResourceDevice
from tests.descriptors import limited, memory_file, open_files
from tests.device.conformance import PAGE, DeviceConformance
from tests.device.copying import MIB, processes
from tests.device.pci_tree import ADDRESS, PciTree


@pytest.fixture(autouse=True)
def nothing_stays() -> Iterator[None]:
    before = open_files()
    yield
    assert open_files() <= before
    assert processes() == []


class TestPciResourceDevice(DeviceConformance):
    @pytest.fixture
    async def device(self, device: PciResourceDevice) -> AsyncIterator[Device]:
        yield device
        assert device.available == device.size


class TestFacts:
    def test_what_it_says_of_itself(self, device: PciResourceDevice) -> None:
        assert (device.name, device.kind, device.path) == ("bar0", "pci_resource", NicPath.STAGED)
        assert (device.pci_address, device.size, device.available) == (ADDRESS, 64 * PAGE, 64 * PAGE)

    async def test_without_a_size_it_is_the_rest_of_the_bar(self, tree: PciTree) -> None:
        device = PciResourceDevice("bar0", ADDRESS, 2, MIB, root=tree.root)
        assert (device.size, device.available) == (3 * MIB, 3 * MIB)
        made = await device.allocate(3 * MIB)
        assert (device.size, device.available) == (3 * MIB, 0)
        made.close()
        await device.close()

    def test_without_the_bar_it_has_no_rest(self, tmp_path: Path) -> None:
        assert PciResourceDevice("bar0", ADDRESS, 2, root=tmp_path).size == 0
        assert not PciResourceDevice("bar0", ADDRESS, 2, root=tmp_path).alive()

    async def test_it_stays_inside_its_range(self, tree: PciTree, device: PciResourceDevice) -> None:
        tree.bar.write_bytes(b"\xaa" * tree.bar_size)
        made = await device.allocate(64 * PAGE)
        end = MIB + 64 * PAGE
        assert tree.bar.read_bytes() == b"\xaa" * MIB + bytes(64 * PAGE) + b"\xaa" * (tree.bar_size - end)
        made.close()

    async def test_it_adopts_nothing(self, device: PciResourceDevice) -> None:
        with pytest.raises(errors.NotSupported):
            await device.adopt(memory_file(PAGE), 0)

    async def test_a_daemon_without_descriptors_says_which_limit_to_raise(self, device: PciResourceDevice) -> None:
        (await device.allocate(PAGE)).close()
        with limited(resource.RLIMIT_NOFILE, 3), pytest.raises(errors.LimitReached, match=r"zeroed.*LimitNOFILE"):
            await device.allocate(PAGE)
        assert device.available == device.size

    async def test_no_byte_is_no_region(self, device: PciResourceDevice) -> None:
        with pytest.raises(errors.ZeroLength):
            await device.allocate(0)

    async def test_a_job_can_not_map_it(self, device: PciResourceDevice) -> None:
        with closing(await device.allocate(PAGE)) as made, pytest.raises(errors.NotMappable, match="whole BAR"):
            made.share()

    async def test_one_process_starts_with_the_first_region_and_ends_with_the_device(
        self, device: PciResourceDevice
    ) -> None:
        assert processes() == []
        one, other = await asyncio.gather(device.allocate(PAGE), device.allocate(PAGE))
        assert len(processes()) == 1
        one.close()
        other.close()
        await device.close()
        assert processes() == []


class TestRefusals:
    """What is wrong with the machine, each with its own reason and fix."""

    async def refusal(self, tree: PciTree, **options: int) -> errors.PeermemError:
        device = PciResourceDevice("bar0", ADDRESS, options.pop("bar", 2), root=tree.root, **options)
        with pytest.raises(errors.PeermemError) as caught:
            await device.allocate(PAGE)
        assert "bar0" in caught.value.message
        await device.close()
        return caught.value

    async def test_no_function(self, tree: PciTree) -> None:
        (tree.root / "bus/pci/devices" / ADDRESS).unlink()
        error = await self.refusal(tree)
        assert isinstance(error, errors.DeviceLost)
        assert f"no PCI function {ADDRESS}" in error.message

    async def test_no_such_bar(self, tree: PciTree) -> None:
        error = await self.refusal(tree, bar=0)
        assert isinstance(error, errors.DeviceLost)
        assert "no memory BAR 0, but 2" in error.message

    async def test_the_file_of_the_bar_is_missing(self, tree: PciTree) -> None:
        tree.bar.unlink()
        error = await self.refusal(tree)
        assert isinstance(error, errors.DeviceLost)
        assert "No such file" in error.message

    async def test_memory_is_switched_off(self, tree: PciTree) -> None:
        tree.switch_off()
        error = await self.refusal(tree)
        assert isinstance(error, errors.DeviceLost)
        assert f"echo 1 > /sys/bus/pci/devices/{ADDRESS}/enable" in error.message

    @pytest.mark.parametrize(
        "options", [{"offset": 4 * MIB}, {"offset": 3 * MIB, "size": 2 * MIB}, {"size": 4 * MIB + PAGE}]
    )
    async def test_a_range_that_the_bar_does_not_have(self, tree: PciTree, options: dict[str, int]) -> None:
        error = await self.refusal(tree, **options)
        assert isinstance(error, errors.InvalidField)
        assert "which has 4MiB. Correct offset and size" in error.message

    @pytest.mark.parametrize(("driver", "named"), [("nvme", "driver nvme holds BAR 2"), ("", "something in the")])
    async def test_the_kernel_maps_nothing_that_is_held(self, tree: PciTree, driver: str, named: str) -> None:
        if driver:
            tree.bind(driver)
        error = await self.refusal(tree, offset=512)  # EINVAL, as the kernel answers for a BAR that a driver holds
        assert isinstance(error, errors.BarClaimed)
        assert named in error.message
        assert "iomem=relaxed" in error.message
        assert error.metadata["driver"] == driver

    @pytest.mark.parametrize(
        ("levels", "kind"),
        [
            ("none [integrity] confidentiality", errors.KernelLockedDown),
            ("", errors.KernelLockedDown),  # securityfs is not mounted, as in a container
            ("[none]", errors.DeviceForbidden),
        ],
    )
    async def test_the_kernel_forbids_it(self, tree: PciTree, levels: str, kind: type[errors.PeermemError]) -> None:
        tree.lock_down(levels)
        fd = memory_file(tree.bar_size)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)  # mapping it is EPERM, as under lockdown
        tree.bar.unlink()
        tree.bar.symlink_to(f"/proc/{os.getpid()}/fd/{fd}")
        error = await self.refusal(tree)
        assert type(error) is kind
        os.close(fd)

    async def test_a_file_that_the_daemon_may_not_open(self, tree: PciTree, as_nobody: None) -> None:
        error = await self.refusal(tree)
        assert isinstance(error, errors.DeviceForbidden)
        assert "CAP_DAC_OVERRIDE" in error.message
