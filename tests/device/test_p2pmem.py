"""p2pmem, on a tree of ordinary files: all but the kernel's allocator, which the lab has (`tests/lab/guest`)."""

from __future__ import annotations

import asyncio
import os
import resource
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from peermem import memory
from peermem.core import errors
from peermem.core.types import Path as NicPath
from peermem.device.p2pmem import P2pmemDevice, p2pmem_devices
from tests.descriptors import limited, memory_file, open_files, until
from tests.device.conformance import PAGE
from tests.device.pci_tree import ADDRESS, PciTree

MIB = 1 << 20
POOL = 4 * MIB


@pytest.fixture(autouse=True)
def nothing_stays_open() -> Iterator[None]:
    before = open_files()
    yield
    assert open_files() <= before


@pytest.fixture
def tree(tmp_path: Path) -> PciTree:
    return PciTree(tmp_path, PAGE)


@pytest.fixture
def pool(tree: PciTree) -> Path:
    return tree.add_pool(POOL)


@pytest.fixture
def device(tree: PciTree, pool: Path) -> P2pmemDevice:
    return P2pmemDevice(ADDRESS, tree.root)


def address_space() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * PAGE


class TestFacts:
    def test_each_pool_is_a_device(self, tree: PciTree, pool: Path) -> None:
        (device,) = p2pmem_devices(tree.root)
        assert (device.name, device.kind, device.path) == ("p2pmem-0000-41-00-0", "p2pmem", NicPath.P2PDMA)
        assert (device.pci_address, device.size, device.available) == (ADDRESS, POOL, POOL)

    def test_a_node_without_pools_has_no_device(self, tree: PciTree) -> None:
        assert p2pmem_devices(tree.root) == []

    def test_what_is_left_is_asked_of_the_kernel(self, pool: Path, device: P2pmemDevice) -> None:
        (pool / "available").write_text("12288\n")
        assert (device.size, device.available) == (POOL, 12288)

    def test_a_pool_that_is_gone_has_nothing(self, pool: Path, device: P2pmemDevice) -> None:
        assert device.alive()
        pool.rename(pool.with_name("gone"))
        assert (device.size, device.available, device.alive()) == (0, 0, False)

    async def test_a_pool_that_went_and_came_back_is_another_one(self, pool: Path, device: P2pmemDevice) -> None:
        made, other = await device.allocate(PAGE), await device.allocate(PAGE)
        os.rename(pool / "allocate", pool / "before")
        assert not device.alive()
        (pool / "allocate").write_bytes(bytes(POOL))
        made.close()
        assert not device.alive()
        with pytest.raises(errors.DeviceLost, match="regions of before are being closed"):
            await device.allocate(PAGE)
        other.close()
        other.close()
        assert device.alive()
        again = await device.allocate(PAGE)
        assert device.alive()
        again.close()

    async def test_it_adopts_nothing(self, device: P2pmemDevice) -> None:
        with pytest.raises(errors.NotSupported):
            await device.adopt(memory_file(PAGE), 0)


class TestMemory:
    @pytest.mark.parametrize("length", [1, PAGE, PAGE + 1, 2 * MIB + 5])
    async def test_all_its_pages_are_zeroed(self, pool: Path, device: P2pmemDevice, length: int) -> None:
        (pool / "allocate").write_bytes(b"\xaa" * POOL)
        made = await device.allocate(length)
        pages = memory.whole_pages(length)
        assert (made.length, len(made.view()), made.fd, made.copier) == (length, length, None, None)
        assert (pool / "allocate").read_bytes() == bytes(pages) + b"\xaa" * (POOL - pages)
        memory.write(made, length - 1, b"x")
        assert memory.read(made, 0, length) == bytes(length - 1) + b"x"
        made.close()

    async def test_a_job_can_not_map_it(self, device: P2pmemDevice) -> None:
        made = await device.allocate(PAGE)
        with pytest.raises(errors.NotMappable, match="pages of its own"):
            made.share()
        made.close()

    async def test_nothing_is_reached_after_close(self, device: P2pmemDevice) -> None:
        made = await device.allocate(PAGE)
        view = made.view()
        made.close()
        made.close()
        for reach in (made.view, made.share):
            with pytest.raises(ValueError, match="closed"):
                reach()
        with pytest.raises(ValueError, match="released"):
            view[0]

    async def test_while_a_slice_is_held_the_memory_stays_and_closing_can_be_tried_again(
        self, device: P2pmemDevice
    ) -> None:
        made = await device.allocate(PAGE)
        held = made.view()[:10]
        with pytest.raises(BufferError):
            made.close()
        held[0] = 9
        assert memory.read(made, 0, 1) == b"\x09"
        held.release()
        made.close()

    async def test_vanished_memory_is_an_error_and_no_signal(self, pool: Path, device: P2pmemDevice) -> None:
        made = await device.allocate(2 * PAGE)
        os.truncate(pool / "allocate", 0)
        for reach in (lambda: memory.read(made, 0, 1), lambda: memory.write(made, PAGE, b"x")):
            with pytest.raises(OSError, match="Bad address"):
                reach()
        made.close()

    async def test_a_caller_that_gives_up_leaves_nothing(self, device: P2pmemDevice) -> None:
        before = open_files()
        asking = asyncio.create_task(device.allocate(POOL))
        await asyncio.sleep(0)
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
        await until(lambda: open_files() <= before)


class TestRefusals:
    """What is wrong with the machine, each with its own reason and fix."""

    async def refusal(self, device: P2pmemDevice, length: int = PAGE) -> errors.PeermemError:
        with pytest.raises(errors.PeermemError) as caught:
            await device.allocate(length)
        assert device.name in caught.value.message
        return caught.value

    async def test_no_byte(self, device: P2pmemDevice) -> None:
        assert isinstance(await self.refusal(device, 0), errors.ZeroLength)

    @pytest.mark.parametrize("length", [POOL + 1, 1 << 50, 1 << 70])
    async def test_more_than_there_is(self, device: P2pmemDevice, length: int) -> None:
        error = await self.refusal(device, length)
        assert isinstance(error, errors.DeviceFull)
        assert error.metadata["available"] == str(POOL)

    async def test_more_than_the_kernel_has_in_one_piece(self, pool: Path, device: P2pmemDevice) -> None:
        os.truncate(pool / "allocate", 4 << 30)
        (pool / "size").write_text(f"{4 << 30}\n")
        with limited(resource.RLIMIT_AS, address_space() + (1 << 30)):
            error = await self.refusal(device, 3 << 30)
        assert isinstance(error, errors.DeviceFull)
        assert "4MiB of 4GiB left" in error.message

    async def test_a_kernel_that_maps_no_pools(self, pool: Path, device: P2pmemDevice) -> None:
        (pool / "allocate").unlink()
        error = await self.refusal(device)
        assert isinstance(error, errors.KernelTooOld)
        assert "Linux 6.2" in error.message

    async def test_no_pool(self, pool: Path, device: P2pmemDevice) -> None:
        os.rename(pool, pool.with_name("gone"))
        assert isinstance(await self.refusal(device), errors.DeviceLost)

    async def test_a_provider_that_is_going_away(self, pool: Path, device: P2pmemDevice) -> None:
        (pool / "allocate").unlink()
        (pool / "allocate").symlink_to("/dev/null")  # mapping it is ENODEV
        error = await self.refusal(device)
        assert isinstance(error, errors.DeviceLost)
        assert ADDRESS in error.message

    async def test_a_file_that_the_daemon_may_not_open(self, device: P2pmemDevice, as_nobody: None) -> None:
        error = await self.refusal(device)
        assert isinstance(error, errors.DeviceForbidden)
        assert "CAP_DAC_OVERRIDE" in error.message

    @pytest.mark.parametrize("left", [0, 1])
    async def test_a_daemon_without_descriptors(self, device: P2pmemDevice, left: int) -> None:
        (await device.allocate(PAGE)).close()  # it runs in a thread, which is there from now on
        held: list[int] = []
        with limited(resource.RLIMIT_NOFILE, 100):
            with suppress(OSError):
                while True:
                    held.append(os.dup(0))
            for _ in range(left):
                os.close(held.pop())
            error = await self.refusal(device)
        for fd in held:
            os.close(fd)
        assert isinstance(error, errors.LimitReached)
        assert "LimitNOFILE" in error.message
