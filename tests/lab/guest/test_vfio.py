"""vfio on a real kernel, behind an emulated IOMMU: ranges of the ivshmem BAR as dma-bufs, staged to the other node;
taken away by the kernel in the middle of it, and back again."""

from __future__ import annotations

import ctypes
import mmap
import os
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from bench.daemons import Daemon, Place

from peermem import FabricKind, Region, errors
from peermem.core.errors import NotMappable
from peermem.core.types import Path as Way
from peermem.device.base import Device
from peermem.device.vfio import VfioDevice
from peermem.device.vfio_driver import VFIO, driver
from peermem.memory import dma_buf_exporter
from tests.descriptors import open_files
from tests.device.conformance import PAGE, DeviceConformance, read, write
from tests.e2e.support import eventually, moving
from tests.lab.guest import nodes
from tests.lab.guest.nodes import HOST, HOST_DEVICE, IVSHMEM, MIB, PATIENCE, Lab, noise

DEVICES, DRIVERS = Path("/sys/bus/pci/devices"), Path("/sys/bus/pci/drivers")
BAR = 2
EXPORTER = "vfio_pci_core"
REFUSED = f"can't import the dma-buf of exporter {EXPORTER}: its driver imports none (as rxe"
ONE = [(MIB, 64 * PAGE)]
SEVERAL = [(MIB, 16 * PAGE), (2 * MIB, 32 * PAGE), (4 * MIB, 16 * PAGE)]
SPLIT = 'ranges = [{ offset = "1MiB", size = "1MiB" }, { offset = "4MiB", size = "7MiB" }]'
"""What node a has of the BAR."""


@pytest.fixture(scope="module", autouse=True)
def modules() -> None:
    nodes.command("modprobe", "-a", "vfio-pci", "vfio_iommu_type1")


@pytest.fixture(scope="module")
def ivshmem() -> str:
    return nodes.function(IVSHMEM)


@pytest.fixture
def nothing_stays(ivshmem: str) -> Iterator[None]:
    """No descriptor, and the function is without a driver as before."""
    before = open_files()
    yield
    assert open_files() == before
    assert driver(DEVICES / ivshmem) == ""


@pytest.mark.usefixtures("nothing_stays")
class TestOneRange(DeviceConformance):
    @pytest.fixture
    async def device(self, ivshmem: str) -> AsyncIterator[Device]:
        device = VfioDevice("accel0", ivshmem, BAR, ONE, bind=True)
        yield device
        assert device.available == device.size == 64 * PAGE
        await device.close()


@pytest.mark.usefixtures("nothing_stays")
class TestSeveralRanges(DeviceConformance):
    @pytest.fixture
    async def device(self, ivshmem: str) -> AsyncIterator[Device]:
        device = VfioDevice("accel0", ivshmem, BAR, SEVERAL, bind=True)
        yield device
        assert device.available == device.size == 64 * PAGE
        await device.close()


def bar(address: str, offset: int, length: int) -> bytes:
    """Return bytes of the BAR, once no driver has the function."""
    (DEVICES / address / "enable").write_text("1")
    try:
        with (
            (DEVICES / address / f"resource{BAR}").open("r+b", buffering=0) as file,
            mmap.mmap(file.fileno(), 16 * MIB) as mapping,
        ):
            return mapping[offset : offset + length]
    finally:
        (DEVICES / address / "enable").write_text("0")


@pytest.mark.usefixtures("nothing_stays")
@pytest.mark.parametrize("ranges", [ONE, SEVERAL], ids=["one", "several"])
async def test_a_region_is_one_dma_buf_of_its_ranges(ivshmem: str, ranges: list[tuple[int, int]]) -> None:
    device = VfioDevice("accel0", ivshmem, BAR, ranges, bind=True)
    made = await device.allocate(64 * PAGE)
    found = made.dma_buf()
    assert found is not None
    assert dma_buf_exporter(found[0]) == made.exporter == EXPORTER
    assert os.lseek(found[0], 0, os.SEEK_END) == 64 * PAGE
    with pytest.raises(NotMappable, match="maps no dma-buf of one"):
        made.share()
    data = os.urandom(64 * PAGE)
    await write(made, 0, data)
    assert await read(made, 0, 64 * PAGE) == data
    made.close()
    await device.close()
    assert b"".join(bar(ivshmem, *each) for each in ranges) == data


@contextmanager
def bound(address: str, name: str) -> Iterator[None]:
    """Have a function with a driver."""
    (DEVICES / address / "driver_override").write_text(name)
    Path("/sys/bus/pci/drivers_probe").write_text(address)
    yield
    (DEVICES / address / "driver_override").write_text("\n")
    if driver(DEVICES / address):
        (DEVICES / address / "driver/unbind").write_text(address)


class TestRefusals:
    async def test_nobody_bound_it(self, ivshmem: str) -> None:
        with pytest.raises(errors.BarClaimed, match="no driver holds"):
            await VfioDevice("accel0", ivshmem, BAR).allocate(PAGE)

    async def test_another_process_has_it(self, ivshmem: str) -> None:
        with bound(ivshmem, VFIO):
            one, other = VfioDevice("accel0", ivshmem, BAR), VfioDevice("accel1", ivshmem, BAR)
            made = await one.allocate(PAGE)
            with pytest.raises(errors.BarClaimed, match="another process"):
                await other.allocate(PAGE)
            made.close()
            await one.close()
            (await other.allocate(PAGE)).close()
            await other.close()

    async def test_a_range_that_the_bar_does_not_have(self, ivshmem: str) -> None:
        with bound(ivshmem, VFIO):
            before = open_files()
            with pytest.raises(errors.InvalidField, match="16MiB"):
                await VfioDevice("accel0", ivshmem, BAR, [(16 * MIB, PAGE)]).allocate(PAGE)
            assert open_files() == before


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory, ivshmem: str) -> Iterator[Lab]:
    config = f'[[device]]\nkind = "vfio"\nname = "accel0"\naddress = "{ivshmem}"\nbar = {BAR}\nbind = true\n{SPLIT}\n'
    extra = {"a": config, "b": ""}
    places: dict[str, Place] = {
        node: replace(nodes.bare_place(node), config=HOST_DEVICE + extra[node]) for node in nodes.NAMESPACES
    }
    with nodes.lab(tmp_path_factory.mktemp("vfio"), '[transfer]\nlink_idle = "1s"\n', places) as lab:
        yield lab
    assert driver(DEVICES / ivshmem) in ("", VFIO)  # the latter where a daemon was killed


@contextmanager
def regions(lab: Lab, length: int) -> Iterator[tuple[Region, Region]]:
    with (
        lab.nodes["a"].create_region(device="accel0", length=length) as here,
        lab.nodes["b"].create_region(device=HOST, length=length) as there,
    ):
        yield here, there


@pytest.mark.parametrize("order", ["push", "pull"])
def test_it_is_staged_to_the_other_node(lab: Lab, order: str) -> None:
    """Also where the region lies in two ranges of the BAR."""
    with regions(lab, MIB + 5) as (here, there):
        assert here.path is Way.STAGED
        assert here.nics
        assert here.why.startswith(f"A dma-buf of exporter {EXPORTER}. ")
        assert REFUSED in here.why
        source, sink = (here, there) if order == "push" else (there, here)
        source.write(noise(source.length))
        info = lab.nodes["a"].transfer(source, sink, checksum=True).wait(PATIENCE)
        assert (info.fabric, info.path) == (FabricKind.VERBS, Way.STAGED)
        assert sink.read() == noise(source.length)
        with pytest.raises(errors.NotMappable):
            here.map()


def test_preflight_says_which_path_works_and_why_not_the_other(lab: Lab, ivshmem: str) -> None:
    verdicts = [verdict for verdict in lab.nodes["a"].preflight("accel0") if verdict.device]
    refused = [verdict.error for verdict in verdicts if verdict.path is Way.DMABUF]
    assert len(refused) == 2
    for error in refused:
        assert isinstance(error, errors.DmaBufUnsupported)
        assert REFUSED in error.message
    assert [verdict.error for verdict in verdicts if verdict.path is Way.STAGED] == [None, None]
    (facts,) = (device for device in lab.nodes["a"].devices() if device.name == "accel0")
    assert (facts.kind, facts.pci_address, facts.size) == ("vfio", ivshmem, 8 * MIB)
    assert nodes.sample(lab.daemons["a"], "peermem_path_works", device="accel0", path="DMABUF") == 0
    assert nodes.sample(lab.daemons["a"], "peermem_path_works", device="accel0", path="STAGED") == 2


def probe(address: str) -> None:
    Path("/sys/bus/pci/drivers_probe").write_text(address)


def revoked(lab: Lab, region: Region) -> bool:
    return lab.nodes["a"].region(region.name).state == "REVOKED"


def works(lab: Lab) -> None:
    with regions(lab, MIB) as (here, there):
        here.write(noise(MIB))
        lab.nodes["a"].transfer(here, there, checksum=True).wait(PATIENCE)
        assert there.read() == noise(MIB)


def take(ivshmem: str, how: str) -> None:
    """Take the function from whoever has it."""
    if how == "unbound":
        (DEVICES / ivshmem / "driver/unbind").write_text(ivshmem)
    elif how == "removed":
        (DEVICES / ivshmem / "remove").write_text("1")
    else:
        nodes.pull("ivshmem")


def put_back(ivshmem: str, how: str) -> None:
    """Undo `take`, but for the driver."""
    if how == "removed":
        Path("/sys/bus/pci/rescan").write_text("1")
    elif how == "pulled":
        nodes.plug("ivshmem")
        eventually((DEVICES / ivshmem).exists, "the function", 60)
    (DEVICES / ivshmem / "driver_override").write_text(VFIO)


@pytest.mark.parametrize("how", ["unbound", "removed", "pulled"])
def test_the_kernel_takes_it_in_the_middle_of_a_transfer(lab: Lab, ivshmem: str, how: str) -> None:
    """The region is revoked and its transfer fails with that reason; others go on; it comes back without a restart."""
    a, folder = lab.nodes["a"], DEVICES / ivshmem
    pid = lab.daemons["a"].pid
    with (
        a.create_region(device="accel0", length=8 * MIB) as here,
        a.create_region(device=HOST, length=MIB) as sound,
        lab.nodes["b"].create_region(device=HOST, length=128 * MIB) as there,
    ):
        doomed = a.transfer([here] * 16, there)  # takes longer than the daemon needs to see that it is wanted back
        moving(doomed)
        taking = threading.Thread(target=partial(take, ivshmem, how))
        taking.start()
        with pytest.raises(errors.RegionRevoked):
            doomed.wait(PATIENCE)
        eventually(partial(revoked, lab, here), "the region's end")
        taking.join(60)
        assert not taking.is_alive()
        eventually(lambda: driver(folder) != VFIO, "the removal", 60)
        with pytest.raises(errors.RegionRevoked):
            here.read(0, 1)
        sound.write(noise(MIB))
        assert a.transfer(sound, there[:MIB], checksum=True).wait(PATIENCE).state == "SUCCEEDED"
        with pytest.raises(errors.BarClaimed if how == "unbound" else errors.DeviceLost):
            a.create_region(device="accel0", length=PAGE)
    put_back(ivshmem, how)
    probe(ivshmem)
    assert driver(folder) == VFIO
    works(lab)
    assert lab.daemons["a"].pid == pid


def test_memory_that_is_switched_off(lab: Lab, ivshmem: str) -> None:
    with regions(lab, MIB) as (here, _):
        here.write(b"on")
        nodes.command("setpci", "-s", ivshmem, "COMMAND=0:2")
        with pytest.raises(errors.RegionRevoked):
            here.read(0, 2)
        eventually(partial(revoked, lab, here), "the region's end")
    nodes.command("setpci", "-s", ivshmem, "COMMAND=2:2")
    works(lab)


def test_a_reset_that_root_orders_takes_nothing_back(lab: Lab, ivshmem: str) -> None:
    """The kernel tells nobody of it: what the device keeps in its memory is still the region's."""
    with regions(lab, MIB) as (here, there):
        here.write(noise(MIB))
        (DEVICES / ivshmem / "reset").write_text("1")
        assert lab.nodes["a"].transfer(here, there, checksum=True).wait(PATIENCE).path is Way.STAGED
        assert there.read() == noise(MIB)
        assert not revoked(lab, here)


def test_one_that_a_job_exported_is_refused_with_both_reasons(lab: Lab, ivshmem: str) -> None:
    """No NIC here imports it, and vfio lets the CPU map nothing of it: so there is no way, and nothing stays behind."""
    fd = _exported(lab)
    try:
        nodes.until_idle(lab)
        before = nodes.held(lab, "a")
        with pytest.raises(errors.DmaBufUnsupported) as caught:
            lab.nodes["a"].adopt(fd)
        assert REFUSED in caught.value.message
        assert f"Nor can it be staged: exporter {EXPORTER} lets the CPU map nothing of it." in caught.value.message
        nodes.until_held(lab, "a", before)
    finally:
        os.close(fd)


def _exported(lab: Lab) -> int:
    """Return a dma-buf of a region of the daemon, taken from it as root may: it is the only one here that has any."""
    daemon: Daemon = lab.daemons["a"]
    with lab.nodes["a"].create_region(device="accel0", length=MIB):
        for entry in Path(f"/proc/{daemon.pid}/fd").iterdir():
            if os.readlink(entry).startswith("/dmabuf"):
                pidfd = os.pidfd_open(daemon.pid)
                try:
                    return _taken(pidfd, int(entry.name))
                finally:
                    os.close(pidfd)
    raise AssertionError("the daemon has no dma-buf")


def _taken(pidfd: int, fd: int) -> int:
    """Return a duplicate of another process's descriptor (pidfd_getfd(2))."""
    found = ctypes.CDLL(None, use_errno=True).syscall(438, pidfd, fd, 0)
    assert found >= 0, os.strerror(ctypes.get_errno())
    return int(found)


async def test_a_daemon_that_is_killed_leaves_the_function_free(lab: Lab, ivshmem: str) -> None:
    lab.nodes["a"].create_region(device="accel0", length=MIB)
    lab.daemons["a"].kill()
    device = VfioDevice("mine", ivshmem, BAR, ONE)
    made = await device.allocate(PAGE)
    made.close()
    await device.close()
    lab.restart("a")
    works(lab)
