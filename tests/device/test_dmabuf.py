"""dma-bufs where the kernel makes them of ordinary memory; and what is none, everywhere."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from peermem.core.errors import DeviceForbidden, DeviceLost, NotAdoptable
from peermem.device.dmabuf import AdoptedDmaBufs
from peermem.device.room import Room
from peermem.device.udmabuf import UdmabufDevice
from tests.descriptors import UDMABUF, memory_file, open_files
from tests.device.conformance import PAGE
from tests.device.dmabufs import AdoptedTests, UdmabufTests

has_driver = pytest.mark.skipif(not UDMABUF.exists(), reason=f"this kernel has no {UDMABUF}; the lab's has")


@pytest.fixture(autouse=True)
def nothing_stays_open() -> Iterator[None]:
    before = open_files()
    yield
    assert open_files() <= before


@has_driver
class TestUdmabuf(UdmabufTests):
    pass


@has_driver
class TestAdopted(AdoptedTests):
    pass


def memfd() -> int:
    return memory_file(PAGE)


def pipe() -> int:
    reader, writer = os.pipe()
    os.close(reader)
    return writer


def folder() -> int:
    return os.open("/", os.O_RDONLY)


def path_only() -> int:
    return os.open("/", os.O_PATH)


def device_file() -> int:
    return os.open("/dev/zero", os.O_RDWR)


def connection() -> int:
    one, other = socket.socketpair()
    other.close()
    return one.detach()


@pytest.mark.parametrize("make", [memfd, pipe, folder, path_only, device_file, connection])
async def test_what_is_no_dma_buf_is_refused_and_closed(make: Callable[[], int]) -> None:
    room = Room(PAGE)
    with pytest.raises(NotAdoptable, match="no dma-buf"):
        await AdoptedDmaBufs("adopted-dmabuf", room).adopt(make(), 0)
    assert room.available == PAGE


async def test_a_kernel_without_the_driver_says_how_to_get_it(tmp_path: Path) -> None:
    device = UdmabufDevice("udmabuf0", PAGE, tmp_path / "udmabuf")
    with pytest.raises(DeviceLost, match="modprobe udmabuf"):
        await device.allocate(PAGE)
    assert device.available == PAGE


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A file in the driver's place."""
    file = tmp_path / "udmabuf"
    file.touch()
    return file


@pytest.mark.usefixtures("file", "as_nobody")
async def test_a_driver_that_only_root_may_use(file: Path) -> None:
    device = UdmabufDevice("udmabuf0", PAGE, file)
    with pytest.raises(DeviceForbidden, match=str(file)):
        await device.allocate(PAGE)


async def test_a_file_that_is_not_the_driver(file: Path) -> None:
    device = UdmabufDevice("udmabuf0", PAGE, file)
    with pytest.raises(DeviceLost, match=str(file)):
        await device.allocate(PAGE)
    assert device.available == PAGE
