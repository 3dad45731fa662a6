"""Devices as the configuration has them."""

from __future__ import annotations

from pathlib import Path

from peermem.config import BarRange, Name, PciResource, Udmabuf, Vfio, load
from peermem.config_values import BarOffset, BarSize, DeviceSize, PciAddress
from tests.test_config import write


def test_devices_in_bars_are_read(tmp_path: Path) -> None:
    file = write(
        tmp_path,
        """
        [[device]]
        kind = "pci_resource"
        name = "fpga0"
        address = "0000:41:00.0"
        bar = 2
        [[device]]
        kind = "pci_resource"
        name = "fpga1"
        address = "10000:e1:1f.7"
        bar = 0
        offset = "1MiB"
        size = "16MiB"
        [[device]]
        kind = "pci_resource"
        name = "fpga2"
        address = "10000:e1:1f.7"
        bar = 0
        offset = 0
        size = 0x100000
        """,
    )
    assert load(file, {}).devices == (
        PciResource(Name("fpga0"), PciAddress("0000:41:00.0"), 2, BarOffset(0), None),
        PciResource(Name("fpga1"), PciAddress("10000:e1:1f.7"), 0, BarOffset(1 << 20), BarSize(16 << 20)),
        PciResource(Name("fpga2"), PciAddress("10000:e1:1f.7"), 0, BarOffset(0), BarSize(1 << 20)),
    )


def test_devices_that_export_dma_bufs_are_read(tmp_path: Path) -> None:
    file = write(
        tmp_path,
        """
        [[device]]
        kind = "vfio"
        name = "accel0"
        address = "0000:41:00.0"
        bar = 2
        [[device]]
        kind = "vfio"
        name = "accel1"
        address = "0000:42:00.0"
        bar = 0
        bind = true
        ranges = [{ offset = "1MiB", size = "4KiB" }, { offset = 0, size = 8192 }]
        [[device]]
        kind = "udmabuf"
        name = "exports"
        size = "64MiB"
        """,
    )
    ranges = (BarRange(BarOffset("1MiB"), BarSize("4KiB")), BarRange(BarOffset(0), BarSize(8192)))
    assert load(file, {}).devices == (
        Vfio(Name("accel0"), PciAddress("0000:41:00.0"), 2),
        Vfio(Name("accel1"), PciAddress("0000:42:00.0"), 0, ranges, True),
        Udmabuf(Name("exports"), DeviceSize("64MiB")),
    )
