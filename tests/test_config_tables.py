"""Tables of the configuration: devices, and the places of loads and stores."""

from __future__ import annotations

from pathlib import Path

import pytest

from peermem.config import BarRange, Cuda, DeviceSize, Name, PciResource, Rocm, Udmabuf, Vfio, load
from peermem.config_values import BarOffset, BarSize, PciAddress
from tests.configs import problems, write


def test_places_for_loads_and_stores(tmp_path: Path) -> None:
    text = (
        'storage = { directories = [{ path = "/data/" }, { path = "/out", write = true }], block = "64KiB", depth = 1 }'
    )
    storage = load(write(tmp_path, text), {}).storage
    assert [(place.path, place.write) for place in storage.directories] == [("/data", False), ("/out", True)]
    assert (storage.block, storage.depth, storage.max_running) == (64 << 10, 1, 8)
    environ = {"PEERMEM_STORAGE_DIRECTORIES": '[{path = "/data"}]', "PEERMEM_STORAGE_BLOCK": "8MiB"}
    assert load(write(tmp_path, ""), environ).storage.directories[0].path == "/data"


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ('directories = [{ path = "data" }]', "directories[0].path is 'data': expected an absolute path without '..'."),
        ('directories = [{ path = "/a/../b" }]', "directories[0].path is '/a/../b': expected an absolute path"),
        ('directories = [{ path = "//a" }]', "directories[0].path is '//a': expected an absolute path"),
        ('directories = [{ path = "/a" }, { path = "/a/" }]', "directories has /a more than once. Leave one."),
        ('directories = ["/a"]', "directories[0] is '/a': expected a table."),
        ('block = "5000"', "block is '5000': expected a size from 4KiB to 64MiB"),
        ("depth = 0", "depth is 0: expected a whole number from 1 to 64."),
    ],
)
def test_places_that_are_wrong(tmp_path: Path, text: str, problem: str) -> None:
    (found,) = problems(write(tmp_path, f"[storage]\n{text}\n"))
    assert f"storage.{problem}" in found


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


def test_gpus_are_read(tmp_path: Path) -> None:
    file = write(
        tmp_path,
        """
        [[device]]
        kind = "cuda"
        name = "gpu0"
        address = "0000:41:00.0"
        size = "1GiB"
        [[device]]
        kind = "rocm"
        name = "gpu1"
        address = "0000:42:00.0"
        size = "2GiB"
        adopt = false
        """,
    )
    assert load(file, {}).devices == (
        Cuda(Name("gpu0"), PciAddress("0000:41:00.0"), DeviceSize(1 << 30), True),
        Rocm(Name("gpu1"), PciAddress("0000:42:00.0"), DeviceSize(2 << 30), False),
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
