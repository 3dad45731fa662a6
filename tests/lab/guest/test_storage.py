"""Loads and stores on real kernel interfaces: the NVMe's blocks, its own memory buffer, a plain BAR, and filesystems.

Rules of this file:

* What a daemon calls direct is shown to be: the kernel counts the bytes that it asked for once, as reads, and as no
  writes; none of the blocks is in the page cache.
* Speed is told as the ratio to fio in the same boot, taking turns, round by round; the median of the rounds decides. A
  bar that is missed by less than FAR is written down as missed and fails no test: the guest's processors are threads
  of a host that may do something else in any round.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from statistics import median

import pytest
from bench.bars import Bar
from bench.daemons import Daemon, daemons

import peermem
from peermem import StorageWay, errors
from peermem.client.facts import Progress
from tests.e2e.support import eventually, holdings
from tests.lab.guest import fio, nodes
from tests.lab.guest.conftest import Figures
from tests.lab.guest.nodes import BAR, BAR_BYTES, HOST, MIB, check_log, command, noise

BLOCKS = Path("/dev/nvme0n1")
MOUNT, PLAIN = Path("/mnt/nvme"), Path("/mnt/plain")
LARGE = "large"
SIZES = {"memfd": 384 * MIB, "p2pmem": 48 * MIB}
"""Of what speed is measured with."""
ROUNDS, FAR = 21, 1.5
CONFIG = f"""
fabric = "tcp"
[storage]
directories = [
    {{ path = "{BLOCKS}", write = true }},
    {{ path = "{MOUNT}", write = true }},
    {{ path = "{PLAIN}", write = true }},
]
block = "{fio.BLOCK}"
depth = {fio.DEPTH}
{nodes.HOST_DEVICE}
[[device]]
name = "{LARGE}"
size = "{SIZES["memfd"] >> 20}MiB"
"""
WAYS = {"memfd": StorageWay.DIRECT, "p2pmem": StorageWay.DIRECT, "staged": StorageWay.STAGED}

kinds = pytest.mark.parametrize("kind", WAYS)


@pytest.fixture(scope="module")
def daemon(out: Path) -> Iterator[Daemon]:
    for folder in (MOUNT, PLAIN):
        folder.mkdir(parents=True, exist_ok=True)
    with daemons(out, ("a",), CONFIG + nodes.bar_device("a")) as running:
        yield running["a"]
        assert running["a"].stop() == 0
        check_log(running["a"])


@pytest.fixture(scope="module")
def node(daemon: Daemon) -> Iterator[peermem.Node]:
    with peermem.connect(daemon.target) as node:
        yield node


@pytest.fixture(autouse=True)
def nothing_is_left(daemon: Daemon, node: peermem.Node) -> Iterator[None]:
    before = holdings(daemon, node) | {"files": open_files(daemon)}
    yield
    eventually(lambda: holdings(daemon, node) | {"files": open_files(daemon)} == before, "the baseline")


def open_files(daemon: Daemon) -> list[str]:
    """Return what a daemon has open of the disk and the folders."""
    found = []
    for entry in Path(f"/proc/{daemon.pid}/fd").iterdir():
        with suppress(FileNotFoundError):
            found.append(os.readlink(entry))
    return sorted(name for name in found if name.startswith(("/dev/nvme", "/mnt/")))


def device(node: peermem.Node, kind: str) -> str:
    (pool,) = (device.name for device in node.devices() if device.kind == "p2pmem")
    return {"memfd": HOST, "p2pmem": pool, "staged": BAR}[kind]


def content(region: peermem.Region, kind: str) -> bytes:
    """Return a region's bytes: as the test's own mapping shows them, where it can have one."""
    if kind == "staged":
        return nodes.bar_bytes("a")[: region.length]
    return bytes(region.map()) if kind == "memfd" else region.read()


def blocks(offset: int, length: int) -> bytes:
    """Return what is on the disk, read past the page cache."""
    begin = offset // mmap.PAGESIZE * mmap.PAGESIZE
    room = -(-(offset + length - begin) // mmap.PAGESIZE) * mmap.PAGESIZE
    fd = os.open(BLOCKS, os.O_RDONLY | os.O_DIRECT)
    try:
        with mmap.mmap(-1, room) as buffer:
            assert os.preadv(fd, [buffer], begin) == room
            return buffer[offset - begin : offset - begin + length]
    finally:
        os.close(fd)


def write_blocks(data: bytes, offset: int = 0) -> None:
    """Write to the disk, and leave nothing of it in the page cache."""
    with BLOCKS.open("r+b") as disk:
        disk.seek(offset)
        disk.write(data)
        disk.flush()
        os.fsync(disk.fileno())
        os.posix_fadvise(disk.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def cached_pages(path: Path, length: int) -> int:
    """Return how many of a file's first pages are in the page cache."""
    libc = ctypes.CDLL(None, use_errno=True)
    with path.open("r+b") as file, mmap.mmap(file.fileno(), length) as mapping:
        states = ctypes.create_string_buffer(-(-length // mmap.PAGESIZE))
        address = ctypes.addressof(ctypes.c_char.from_buffer(mapping))
        assert libc.mincore(ctypes.c_void_p(address), ctypes.c_size_t(length), states) == 0
        return sum(state & 1 for state in states.raw)


def moved_by_calls(daemon: Daemon) -> tuple[int, int]:
    """Return the bytes that a process has read and written by system calls."""
    lines = Path(f"/proc/{daemon.pid}/io").read_text().splitlines()
    counts = {key: int(value) for key, value in (line.split(": ") for line in lines)}
    return counts["rchar"], counts["wchar"]


# the way


@kinds
def test_between_the_blocks_and_every_kind_of_memory(daemon: Daemon, node: peermem.Node, kind: str) -> None:
    length = min(4 * MIB, BAR_BYTES)
    data, other = noise(length, 1), noise(length, 2)
    write_blocks(data)
    with node.create_region(device=device(node, kind), length=length) as region:
        assert cached_pages(BLOCKS, length) == 0
        read, written = moved_by_calls(daemon)
        loaded = region.load(str(BLOCKS), length=length)
        read, written = (now - before for now, before in zip(moved_by_calls(daemon), (read, written), strict=True))
        assert content(region, kind) == data
        assert loaded.way is WAYS[kind]
        assert cached_pages(BLOCKS, length) == 0
        if loaded.way is StorageWay.DIRECT:
            assert length <= read < length + 256 * 1024
            assert written < 256 * 1024
        region.write(other)
        assert region.store(str(BLOCKS), file_offset=8 * MIB).way is WAYS[kind]
        assert blocks(8 * MIB, length) == other
        assert blocks(0, length) == data
        assert region.load(str(BLOCKS), file_offset=8 * MIB, length=length, checksum=True).crc32c is not None


@kinds
@pytest.mark.parametrize("order", ["load", "store"])
def test_ranges_of_every_shape(node: peermem.Node, kind: str, order: str) -> None:
    """Offsets and lengths that direct I/O can and can't address, on the disk and in the region."""
    shapes = [(0, 0, 512), (512, 4096, 3 * MIB - 512), (1, 1, MIB), (4095, 4095, 8193), (3, 5, 777), (0, 1, 4096 * 3)]
    length = BAR_BYTES
    with node.create_region(device=device(node, kind), length=length) as region:
        for number, (on_disk, at, size) in enumerate(shapes):
            disk, memory = bytearray(noise(length, 2 * number)), bytearray(noise(length, 2 * number + 1))
            write_blocks(bytes(disk))
            region.write(bytes(memory))
            if order == "load":
                region.load(str(BLOCKS), offset=at, file_offset=on_disk, length=size)
                memory[at : at + size] = disk[on_disk : on_disk + size]
            else:
                region.store(str(BLOCKS), offset=at, file_offset=on_disk, length=size)
                disk[on_disk : on_disk + size] = memory[at : at + size]
            assert content(region, kind) == memory
            assert blocks(0, length) == disk


# files


@contextmanager
def mounted(size: int) -> Iterator[None]:
    """Have a filesystem of `size` bytes on the disk."""
    command("mkfs.ext4", "-q", "-F", str(BLOCKS), str(size // 1024))
    command("mount", str(BLOCKS), str(MOUNT))
    try:
        yield
    finally:
        command("umount", str(MOUNT))


@kinds
def test_files_of_the_disks_filesystem(daemon: Daemon, node: peermem.Node, kind: str) -> None:
    data = noise(BAR_BYTES - 1001, 3)
    with mounted(128 * MIB), node.create_region(device=device(node, kind), length=BAR_BYTES) as region:
        (MOUNT / "x").write_bytes(data)
        os.sync()
        assert region.load(f"{MOUNT}/x", checksum=True).way is WAYS[kind]
        assert content(region, kind)[: len(data)] == data
        assert region.store(f"{MOUNT}/y", length=len(data), checksum=True).way is WAYS[kind]
        assert (MOUNT / "y").read_bytes() == data
        with pytest.raises(errors.FileUnusable, match="mounted"):
            region.store(str(BLOCKS), file_offset=0)
        (MOUNT / "link").symlink_to("/etc/passwd")
        with pytest.raises(errors.StorageForbidden, match="symbolic link"):
            region.load(f"{MOUNT}/link")


@kinds
def test_a_filesystem_without_direct_io(node: peermem.Node, kind: str) -> None:
    data = noise(MIB + 7, 4)
    with node.create_region(device=device(node, kind), length=2 * MIB) as region:
        (PLAIN / "x").write_bytes(data)
        loaded = region.load(f"{PLAIN}/x", offset=3)
        assert loaded.way is StorageWay.BUFFERED
        assert "page cache" in loaded.why
        assert content(region, kind)[3 : len(data) + 3] == data
        region.store(f"{PLAIN}/y", offset=3, length=len(data))
        assert (PLAIN / "y").read_bytes() == data
    for name in ("x", "y"):
        (PLAIN / name).unlink()


@pytest.mark.parametrize("filesystem", ["ext4", "tmpfs"])
@pytest.mark.parametrize("in_place", [False, True])
def test_a_full_disk(node: peermem.Node, filesystem: str, in_place: bool) -> None:
    if filesystem == "tmpfs":
        command("mount", "-t", "tmpfs", "-o", "size=8M", "tmpfs", str(PLAIN))
    place = {"ext4": MOUNT, "tmpfs": PLAIN}[filesystem]
    try:
        with mounted(32 * MIB), node.create_region(device=HOST, length=64 * MIB) as region:
            (place / "x").write_bytes(b"before")
            free = os.statvfs(place).f_bfree
            with pytest.raises(errors.StorageFull, match="No space left"):
                region.store(f"{place}/x", file_offset=0 if in_place else None)
            if not in_place:
                assert (place / "x").read_bytes() == b"before"
                os.sync()
                assert os.statvfs(place).f_bfree >= free - 16
            assert [path.name for path in place.iterdir() if path.name != "lost+found"] == ["x"]
    finally:
        if filesystem == "tmpfs":
            command("umount", str(PLAIN))


# speed


@pytest.mark.parametrize("kind", ["memfd", "p2pmem"])
@pytest.mark.parametrize("order", ["load", "store"])
def test_speed(node: peermem.Node, figures: Figures, kind: str, order: str) -> None:
    size = SIZES[kind]
    where = LARGE if kind == "memfd" else device(node, kind)
    pool = Path("/sys/bus/pci/devices") / nodes.function(nodes.NVME) / "p2pmem" if kind == "p2pmem" else None
    operation = {"load": "read", "store": "write"}[order]
    ours: list[float] = []
    theirs: list[float] = []
    with node.create_region(device=where, length=size) as region:
        getattr(region, order)(str(BLOCKS), length=size)  # pages are mapped by whoever comes first
        for _ in range(ROUNDS):
            theirs.append(fio.bandwidth(operation, BLOCKS, size, pool))
            info = getattr(region, order)(str(BLOCKS), length=size)
            assert info.way is StorageWay.DIRECT
            ours.append(info.bandwidth)
    ratios = sorted(each / other for each, other in zip(ours, theirs, strict=True))
    memory = {"memfd": "host memory", "p2pmem": "a BAR"}[kind]
    what = f"storage, {order} {'into' if order == 'load' else 'out of'} {memory}, 1 MiB, 8 deep"
    bar = Bar(what, "bytes/s", 0.9, True, "fio", median(ours), median(theirs))
    measured = {"rounds": (ratios[0], ratios[-1]), "ratio": bar.ratio, "met": bar.met, "ours": ours, "theirs": theirs}
    figures(f"storage_{order}_{kind}", asdict(bar) | measured)
    assert ratios[-1] >= bar.bound / FAR


# removal


@contextmanager
def driver_unbound() -> Iterator[None]:
    """Take the disk and its memory buffer away."""
    driver, address = Path("/sys/bus/pci/drivers/nvme"), nodes.function(nodes.NVME)
    (driver / "unbind").write_text(address)
    try:
        yield
    finally:
        (driver / "bind").write_text(address)
        eventually(BLOCKS.exists, "the disk")


@pytest.mark.parametrize("kind", ["memfd", "p2pmem"])
def test_a_disk_that_is_taken_away_in_the_middle(node: peermem.Node, kind: str) -> None:
    """The load fails and says so, the daemon lives, and goes on when the disk is back."""
    size = {"memfd": 192 * MIB, "p2pmem": 32 * MIB}[kind]
    region = node.create_region(device=device(node, kind), length=size)
    away = driver_unbound()

    def take_away(progress: Progress) -> None:
        if BLOCKS.exists():
            away.__enter__()

    def load_until_it_fails() -> None:
        for _ in range(100):  # it may be quicker than the first progress
            region.load(str(BLOCKS), length=size, progress=take_away)

    with pytest.raises((errors.StorageFailed, errors.RegionRevoked, errors.FileUnusable, errors.FileNotFound)):
        load_until_it_fails()
    away.__exit__(None, None, None)
    region.delete(force=True)
    eventually(lambda: any(each.kind == "p2pmem" and each.available for each in node.devices()), "the pool")
    with node.create_region(device=device(node, kind), length=MIB) as again:
        write_blocks(noise(MIB, 9))
        assert again.load(str(BLOCKS), length=MIB).way is StorageWay.DIRECT
        assert content(again, kind) == noise(MIB, 9)
