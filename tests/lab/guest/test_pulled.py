"""Devices that are pulled out of the machine in the middle of their work and put back: the NVMe with its memory buffer
and its blocks, and the function with the plain BAR."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest

from peermem import FabricKind, Region, StorageWay, errors
from peermem.client.facts import Progress
from tests.e2e.support import eventually, moving
from tests.lab.guest import nodes
from tests.lab.guest.nodes import HOST, MIB, PATIENCE, Lab, noise

pytestmark = pytest.mark.timeout(300)

BLOCKS = Path("/dev/nvme0n1")
CONFIG = f"""
[transfer]
link_idle = "1s"
[storage]
directories = [{{ path = "{BLOCKS}", write = true }}]
"""
LENGTH = 8 * MIB
SLOTS = {"p2pmem": "nvme", "staged": "ivshmem"}
"""What is pulled to take memory of a kind away."""

kinds = pytest.mark.parametrize("kind", SLOTS)


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    with nodes.lab(tmp_path_factory.mktemp("pulled"), CONFIG) as lab:
        yield lab


def is_there(lab: Lab, kind: str) -> bool:
    if kind == "staged" and nodes.has("ivshmem"):
        nodes.ivshmem()  # whoever puts such a function in has to switch its memory on
    devices = {device.name: device.available for device in lab.nodes["a"].devices()}
    return devices[lab.kinds[kind].device] > 0 and (kind != "p2pmem" or BLOCKS.exists())


@contextmanager
def comes_back(lab: Lab, kind: str) -> Iterator[None]:
    """Put back what a test has pulled out, and see that the daemon which was there all the time uses it again."""
    pid = lab.daemons["a"].pid
    try:
        yield
    finally:
        nodes.plug(SLOTS[kind])
        eventually(partial(is_there, lab, kind), "the device", 60)
    assert lab.daemons["a"].pid == pid
    a, b = lab.nodes["a"], lab.nodes["b"]
    with (
        a.create_region(device=lab.kinds[kind].device, length=MIB) as here,
        b.create_region(device=HOST, length=MIB) as there,
    ):
        here.write(noise(MIB))

        def goes_over_verbs() -> bool:
            info = a.transfer(here, there, checksum=True).wait(PATIENCE)
            assert there.read() == noise(MIB)
            return (info.fabric, info.path) == (FabricKind.VERBS, lab.kinds[kind].path)

        eventually(goes_over_verbs, "verbs again", 60)


def revoked(lab: Lab, region: Region) -> bool:
    return lab.nodes["a"].region(region.name).state == "REVOKED"


def sees_the_end(lab: Lab, kind: str, here: Region, sound: Region, there: Region) -> None:
    """Look at what is left once the device is gone: the region says so, and nothing else notices."""
    a = lab.nodes["a"]
    eventually(partial(revoked, lab, here), "the region's end", 60)
    eventually(lambda: not nodes.has(SLOTS[kind]), "the removal", 60)
    for touch in (partial(here.read, 0, 1), partial(here.write, b"x")):
        with pytest.raises(errors.RegionRevoked):
            touch()
    with pytest.raises(errors.RegionRevoked):
        a.transfer(here[:MIB], there[:MIB]).wait(PATIENCE)
    with pytest.raises(errors.DeviceLost):
        a.create_region(device=lab.kinds[kind].device, length=MIB)
    sound.write(noise(MIB))
    a.transfer(sound, there[:MIB], checksum=True).wait(PATIENCE)  # over tcp, while rails are rebuilt
    assert there.read(0, MIB) == noise(MIB)


@contextmanager
def regions(lab: Lab, kind: str, times: int) -> Iterator[tuple[Region, Region, Region]]:
    """Yield a region of a kind and one of host memory on a, and one on b that the first fits into so often."""
    a, b = lab.nodes["a"], lab.nodes["b"]
    nodes.until_idle(lab)
    before = {name: nodes.held(lab, name) for name in ("a", "b")}
    with (
        a.create_region(device=lab.kinds[kind].device, length=LENGTH) as here,
        a.create_region(device=HOST, length=MIB) as sound,
        b.create_region(device=HOST, length=times * LENGTH) as there,
    ):
        yield here, sound, there
    for name, held in before.items():
        nodes.until_held(lab, name, held)


@kinds
def test_in_the_middle_of_a_transfer_out_of_it(lab: Lab, kind: str) -> None:
    with comes_back(lab, kind), regions(lab, kind, 16) as (here, sound, there):
        doomed = lab.nodes["a"].transfer([here] * 16, there)
        moving(doomed)
        nodes.pull(SLOTS[kind])
        with pytest.raises(errors.RegionRevoked) as caught:
            doomed.wait(PATIENCE)
        assert 0 < int(caught.value.metadata["bytes_done"]) < there.length
        sees_the_end(lab, kind, here, sound, there)


@kinds
def test_in_the_middle_of_transfers_into_it(lab: Lab, kind: str) -> None:
    with comes_back(lab, kind), regions(lab, kind, 1) as (here, sound, there):
        first = lab.nodes["a"].transfer(there, here)
        moving(first)
        nodes.pull(SLOTS[kind])

        def until_it_fails() -> None:
            first.wait(PATIENCE)
            for _ in range(100):
                lab.nodes["a"].transfer(there, here).wait(PATIENCE)

        with pytest.raises(errors.RegionRevoked):
            until_it_fails()
        sees_the_end(lab, kind, here, sound, there)


@pytest.mark.parametrize("kind", ["memfd", "p2pmem"])
def test_in_the_middle_of_a_load_from_it(lab: Lab, kind: str) -> None:
    """Into host memory, which outlasts the disk, and into the disk's own memory buffer, which goes with it."""
    a = lab.nodes["a"]
    with comes_back(lab, "p2pmem"):
        pulled: list[Progress] = []

        def pull(progress: Progress) -> None:
            if not pulled:
                nodes.pull("nvme")
            pulled.append(progress)

        def until_it_fails(region: Region) -> None:
            for _ in range(1000):  # it may be quicker than the first progress
                region.load(str(BLOCKS), length=region.length, progress=pull)

        length = {"memfd": 192 * MIB, "p2pmem": 32 * MIB}[kind]
        with a.create_region(device=lab.kinds[kind].device, length=length) as region:
            # a disk that is being taken away has 0 bytes for a moment
            gone = (errors.StorageFailed, errors.FileUnusable, errors.FileNotFound, errors.FileTooShort)
            with pytest.raises((errors.RegionRevoked, *gone)):
                until_it_fails(region)
            eventually(lambda: not nodes.has("nvme"), "the removal", 60)
            with pytest.raises((errors.FileNotFound, errors.RegionRevoked)):
                region.load(str(BLOCKS), length=MIB)
            if kind == "p2pmem":
                eventually(partial(revoked, lab, region), "the region's end", 60)
    with a.create_region(device=lab.kinds[kind].device, length=MIB) as again:
        assert again.load(str(BLOCKS), length=MIB).way is StorageWay.DIRECT
