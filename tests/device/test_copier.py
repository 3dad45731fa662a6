"""Copies of a BAR range by a process, on a tree of ordinary files, and the ways in which that process ends."""

from __future__ import annotations

import asyncio
import mmap
import os
import resource
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest

from peermem import memory
from peermem.core import errors
from peermem.device.base import DeviceMemory
from peermem.device.pci_resource import PciResourceDevice
from peermem.memory import HostMemory
from tests.descriptors import limited, open_files, until
from tests.device.conformance import PAGE, read, write
from tests.device.copying import MIB, copier, processes, stopped
from tests.device.pci_tree import ADDRESS, PciTree


@pytest.fixture(autouse=True)
def nothing_stays() -> Iterator[None]:
    before = open_files()
    yield
    assert open_files() <= before
    assert processes() == []


class TestCopies:
    @pytest.fixture
    async def made(self, device: PciResourceDevice) -> AsyncIterator[DeviceMemory]:
        made = await device.allocate(8 * PAGE)
        yield made
        made.close()

    async def test_many_pieces_at_any_offset(self, made: DeviceMemory) -> None:
        data, expected = os.urandom(made.length), bytearray(made.length)
        pieces = [(offset, (offset * 7) % 4000, 1 + offset % 13) for offset in range(0, made.length - 16, 9)]
        with closing(HostMemory(made.length)) as buffer, closing(HostMemory(made.length)) as back:
            memory.write(buffer, 0, data)
            await copier(made).store(buffer, pieces)
            for offset, position, length in pieces:
                expected[offset : offset + length] = data[position : position + length]
            assert len(pieces) > 3000
            assert await read(made, 0, made.length) == expected
            await copier(made).load(back, [(offset, offset, length) for offset, _, length in pieces])
            for offset, _, length in pieces:
                assert memory.read(back, offset, length) == expected[offset : offset + length]

    async def test_copies_of_parts_of_one_word_keep_their_order(self, made: DeviceMemory) -> None:
        with closing(HostMemory(256)) as buffer:
            memory.write(buffer, 0, bytes(range(256)))
            await asyncio.gather(*(copier(made).store(buffer, [(turn % 8, turn, 1)]) for turn in range(256)))
        assert await read(made, 0, 8) == bytes(range(248, 256))

    async def test_more_than_one_request_holds(self, tree: PciTree) -> None:
        device = PciResourceDevice("bar0", ADDRESS, 2, root=tree.root)
        made = await device.allocate(4 * MIB)
        data = os.urandom(4 * MIB - 8)
        await write(made, 3, data)
        assert await read(made, 3, len(data)) == data
        made.close()
        await device.close()

    async def test_a_word_is_written_whole_and_once(self, tree: PciTree, made: DeviceMemory) -> None:
        """Who looks on all the time sees the old word or the new one, never a part and nothing between."""
        seen = set[int]()
        with (
            closing(HostMemory(2 * made.length)) as buffer,
            tree.bar.open("rb") as file,
            mmap.mmap(file.fileno(), made.length, mmap.MAP_SHARED, mmap.PROT_READ, offset=MIB) as mapped,
            memoryview(mapped) as view,
            view.cast("Q") as words,
        ):
            memory.write(buffer, 0, b"\x11" * made.length + b"\xee" * made.length)
            await copier(made).store(buffer, [(0, 0, made.length)])
            turns = [(0, turn % 2 * made.length, made.length) for turn in range(400)]
            storing = asyncio.create_task(copier(made).store(buffer, turns))
            while not storing.done():
                seen.update(words.tolist())
                await asyncio.sleep(0)
            await storing
        assert seen == {0x1111111111111111, 0xEEEEEEEEEEEEEEEE}

    @pytest.mark.parametrize("piece", [(0, 0, 8 * PAGE + 1), (-1, 0, 1), (0, -1, 1), (0, 0, -1), (0, PAGE, 1)])
    async def test_pieces_outside_are_refused(self, made: DeviceMemory, piece: tuple[int, int, int]) -> None:
        with closing(HostMemory(PAGE)) as buffer:
            for copy in (copier(made).load, copier(made).store):
                with pytest.raises(ValueError, match="outside"):
                    await copy(buffer, [(0, 0, 1), piece])

    async def test_a_buffer_without_a_file_is_refused(self, made: DeviceMemory) -> None:
        with pytest.raises(ValueError, match="no file"):
            await copier(made).load(made, [(0, 0, 1)])

    async def test_a_buffer_that_fails_fails_only_its_call(self, made: DeviceMemory) -> None:
        with closing(HostMemory(8 * PAGE)) as buffer:
            assert buffer.fd is not None
            os.ftruncate(buffer.fd, 0)
            with pytest.raises(OSError, match="No data"):
                await copier(made).store(buffer, [(0, 0, PAGE)] * 3000)
        assert await read(made, 0, 3) == bytes(3)

    async def test_a_closed_buffer_fails_only_its_call(self, made: DeviceMemory) -> None:
        class Closed(HostMemory):
            fd = 1 << 20

        with closing(Closed(PAGE)) as buffer, pytest.raises(OSError, match="Bad file descriptor"):
            await copier(made).store(buffer, [(0, 0, PAGE)])
        assert await read(made, 0, 3) == bytes(3)

    async def test_nothing_to_copy(self, made: DeviceMemory) -> None:
        with closing(HostMemory(PAGE)) as buffer:
            await copier(made).load(buffer, [])
            await copier(made).load(buffer, [(8, 8, 0)])

    async def test_a_caller_that_gives_up_waits_for_what_is_under_way(self, made: DeviceMemory) -> None:
        (pid,) = processes()
        await stopped(pid)
        with closing(HostMemory(MIB)) as buffer:
            memory.write(buffer, 0, b"x" * MIB)
            storing = asyncio.create_task(copier(made).store(buffer, [(0, 0, 8)] * 100_000))
            await asyncio.sleep(0)
            storing.cancel()
            await asyncio.wait([storing], timeout=0.01)
            assert not storing.done()
            os.kill(pid, signal.SIGCONT)
            with pytest.raises(asyncio.CancelledError):
                await storing
        assert await read(made, 0, 9) == b"x" * 8 + b"\0"

    async def test_signals_to_the_group_do_not_end_the_process(self, made: DeviceMemory) -> None:
        before = processes()
        for number in (signal.SIGINT, signal.SIGTERM):
            os.kill(before[0], number)
        await write(made, 5, b"on")
        assert await read(made, 5, 2) == b"on"
        assert processes() == before

    async def test_the_process_has_no_files_beyond_its_own(self, made: DeviceMemory) -> None:
        (pid,) = processes()
        files = [os.readlink(f"/proc/{pid}/fd/{number}") for number in os.listdir(f"/proc/{pid}/fd") if int(number) > 2]
        kinds = sorted("socket" if file.startswith("socket:") else os.path.basename(file) for file in files)
        assert kinds == ["config", "resource2", "socket"]  # the mapping has the BAR's


class TestDeath:
    @pytest.fixture
    async def made(self, device: PciResourceDevice) -> AsyncIterator[DeviceMemory]:
        made = await device.allocate(8 * PAGE)
        await write(made, 0, b"before")
        yield made
        made.close()

    async def test_a_killed_process_is_replaced_and_the_copy_is_made(
        self, device: PciResourceDevice, made: DeviceMemory
    ) -> None:
        (pid,) = processes()
        await stopped(pid)
        data = os.urandom(8 * PAGE)
        storing = [asyncio.create_task(write(made, at, data[at : at + PAGE])) for at in range(0, 8 * PAGE, PAGE)]
        await asyncio.sleep(0)
        os.kill(pid, signal.SIGKILL)
        await asyncio.gather(*storing)
        assert await read(made, 0, 8 * PAGE) == data
        assert device.alive()
        assert len(processes()) == 1
        assert processes() != [pid]

    async def test_a_process_killed_while_idle_is_replaced(self, made: DeviceMemory) -> None:
        (pid,) = processes()
        os.kill(pid, signal.SIGKILL)
        assert await read(made, 0, 6) == b"before"

    async def test_a_call_that_was_given_up_is_not_made_again(self, made: DeviceMemory) -> None:
        (pid,) = processes()
        await stopped(pid)
        storing = asyncio.create_task(write(made, 0, b"late"))
        await asyncio.sleep(0)
        storing.cancel()
        await asyncio.sleep(0)
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(asyncio.CancelledError):
            await storing
        assert await read(made, 0, 6) == b"before"

    async def test_a_bar_that_vanishes_ends_the_process_only(
        self, tree: PciTree, device: PciResourceDevice, made: DeviceMemory
    ) -> None:
        (pid,) = processes()
        await stopped(pid)
        calls = [asyncio.create_task(read(made, 0, 100)), asyncio.create_task(write(made, 0, b"x"))]
        await asyncio.sleep(0)
        tree.vanish()
        os.kill(pid, signal.SIGCONT)
        for result in await asyncio.gather(*calls, return_exceptions=True):
            assert isinstance(result, errors.RegionRevoked)
            assert "bar0 vanished" in result.message
        await self.expect_lost(tree, device, made)

    @pytest.mark.parametrize("how", [PciTree.switch_off, PciTree.silence])
    async def test_a_function_that_goes_silent_is_lost(
        self, tree: PciTree, device: PciResourceDevice, made: DeviceMemory, how: Callable[[PciTree], None]
    ) -> None:
        how(tree)
        for call in (read(made, 0, 100), write(made, 0, b"x")):
            with pytest.raises(errors.RegionRevoked, match="bar0 does not answer"):
                await call
        await self.expect_lost(tree, device, made)

    async def test_a_function_that_went_and_came_back_is_another_one(
        self, tree: PciTree, device: PciResourceDevice, made: DeviceMemory
    ) -> None:
        content = tree.bar.read_bytes()
        os.rename(tree.bar, f"{tree.bar}.before")
        assert not device.alive()
        tree.bar.write_bytes(content)
        await self.expect_replaced(device, made)

    async def expect_lost(self, tree: PciTree, device: PciResourceDevice, made: DeviceMemory) -> None:
        """The device takes up its work only when nobody holds memory of before."""
        assert not device.alive()
        with pytest.raises(errors.RegionRevoked):
            await read(made, 0, 1)
        os.truncate(tree.bar, tree.bar_size)
        tree.switch_on()
        with pytest.raises(errors.RegionRevoked):
            await read(made, 0, 1)
        await self.expect_replaced(device, made)

    async def expect_replaced(self, device: PciResourceDevice, made: DeviceMemory) -> None:
        assert not device.alive()
        with pytest.raises(errors.DeviceLost, match="regions of before are being closed"):
            await device.allocate(PAGE)
        made.close()
        again = await device.allocate(PAGE)
        assert device.alive()
        await write(again, 0, b"back")
        assert await read(again, 0, 4) == b"back"
        again.close()

    async def test_a_bar_that_vanishes_while_memory_is_zeroed(self, tree: PciTree, device: PciResourceDevice) -> None:
        first = await device.allocate(PAGE)
        first.close()
        tree.silence()
        with pytest.raises(errors.DeviceLost, match="does not answer"):
            await device.allocate(PAGE)
        assert device.available == device.size

    async def test_a_request_that_ends_every_process_is_given_up(
        self, device: PciResourceDevice, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        program = tmp_path / "python"
        program.write_text(
            f"#!{sys.executable}\nimport os, signal, socket, sys\n"
            "connection = socket.socket(fileno=int(sys.argv[-3]))\n"
            "connection.send(bytes(16))\nconnection.recv(1)\nos.kill(os.getpid(), signal.SIGKILL)\n"
        )
        program.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(program))
        with pytest.raises(errors.DeviceLost, match="3 processes that copied for it ended with status -9"):
            await device.allocate(PAGE)
        assert not device.alive()

    async def test_a_caller_that_gives_up_before_the_process_is_there(self, device: PciResourceDevice) -> None:
        asking = asyncio.create_task(device.allocate(PAGE))
        await until(lambda: bool(processes()) or asking.done())
        asking.cancel()
        await asyncio.wait([asking])
        (await device.allocate(PAGE)).close()
        assert len(processes()) == 1

    async def test_a_process_that_does_not_start(
        self, device: PciResourceDevice, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(sys, "executable", "/bin/false")
        with pytest.raises(errors.Internal, match="ended at once"):
            await device.allocate(PAGE)
        monkeypatch.setattr(sys, "executable", "/nonexistent")
        with pytest.raises(errors.LimitReached, match="can't be started: No such file"):
            await device.allocate(PAGE)

    async def test_a_daemon_without_descriptors_says_which_limit_to_raise(self, device: PciResourceDevice) -> None:
        with limited(resource.RLIMIT_NOFILE, open_files()), pytest.raises(errors.LimitReached, match="LimitNOFILE"):
            await device.allocate(PAGE)

    async def test_calls_that_are_open_when_the_device_is_closed(
        self, device: PciResourceDevice, made: DeviceMemory
    ) -> None:
        await stopped(*processes())
        reading = asyncio.create_task(read(made, 0, 1))
        await asyncio.sleep(0)
        await device.close()
        with pytest.raises(errors.RegionRevoked, match="shutting down"):
            await reading

    async def test_the_process_ends_with_a_killed_daemon(self, tree: PciTree) -> None:
        script = (
            "import asyncio, pathlib, sys; from peermem.device.pci_resource import PciResourceDevice\n"
            "async def main():\n"
            f"    device = PciResourceDevice('bar0', {ADDRESS!r}, 2, root=pathlib.Path({str(tree.root)!r}))\n"
            "    await device.allocate(4096); print('ready', flush=True); await asyncio.sleep(60)\n"
            "asyncio.run(main())"
        )
        path = os.pathsep.join(filter(None, sys.path))
        daemon = await asyncio.create_subprocess_exec(
            sys.executable, "-c", script, stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": path}
        )
        assert daemon.stdout is not None
        assert await daemon.stdout.readline() == b"ready\n"
        (pid,) = processes(daemon.pid)
        daemon.kill()
        await daemon.wait()
        await until(lambda: not Path(f"/proc/{pid}").exists() or "zombie" in Path(f"/proc/{pid}/status").read_text())
