"""A long life of one process: registrations, grants, links and operations without end, and nothing is left of them.

Rules of this file:

* The whole soak is 70,000 registrations (a NIC's driver once ran out of keys past 65,536) and 100,000 operations.
* Both ends are in this process, each a fabric of its own on the same NIC: what either of them lost would show.
* What is compared is counted after a warm-up and after the soak, with nothing outstanding.
"""

from __future__ import annotations

import asyncio
import ctypes
import gc
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, closing
from dataclasses import asdict, dataclass
from pathlib import Path as FilePath

import pytest

from peermem.core.types import LinkAttributes, Path, Ranges, RemoteKey, Rights
from peermem.device.p2pmem import p2pmem_devices
from peermem.fabric.base import Completion, Link, LinkEnd, Opcode, Status, WorkRequest
from peermem.fabric.verbs_fabric import VerbsFabric
from peermem.memory import HostMemory, Memory
from tests.lab.guest.conftest import Figures

pytestmark = pytest.mark.timeout(0)  # the suite's limit holds

REGISTRATIONS, OPERATIONS = 70_000, 100_000
IN_CYCLE = (7, 10)
"""Registrations and operations of one cycle, with one grant."""
LINK_CYCLES = 100
"""Cycles on one link."""
WARM_UP = 150
LENGTH = 256 << 10
SIZES = (1, 64, 1000, 4096, 65_536, LENGTH // 4)
NIC = "rxe1/1"

LOST_BYTES = 8
"""Of the C library's memory for each operation, at most: an object of pyverbs that is not given back costs 32."""
BLOCKS = 3000
"""Python's objects that may be more at the end, whatever the soak's length: caches, and what is about to be freed."""
RSS = 4 << 20
"""Bytes of the process that may be more at the end: what allocators hold on to."""


class _Mallinfo(ctypes.Structure):
    """struct mallinfo2 (glibc 2.33, malloc.h): ten numbers."""

    _fields_ = [("numbers", ctypes.c_size_t * 10)]


_MAPPED, _IN_USE = 4, 7
"""hblkhd and uordblks: bytes of what has a mapping of its own, and of all the rest that was given out."""
_LIBC = ctypes.CDLL(None)
_LIBC.mallinfo2.restype = _Mallinfo


@dataclass(frozen=True)
class Held:
    """What the process has: of the first three some more is no leak yet, the others are the same or are lost."""

    rss: int
    malloc: int
    """Bytes that the C library has given out."""
    blocks: int
    """Of Python's memory."""
    files: int
    objects: dict[str, int]
    kernel: list[dict[str, object]]


class Soak:
    """Two fabrics with a link between them that is opened anew now and then."""

    def __init__(
        self, fabrics: Sequence[VerbsFabric], ends: Sequence[Memory], registered: Sequence[tuple[Memory, Path]]
    ) -> None:
        """`ends` are what bytes move between; `registered` is registered, again and again."""
        self._near, self._far = fabrics
        self._local, self._target = ends
        self._memories = registered
        self._random = random.Random(11)
        self._link: Link
        self._link_id = b""
        self._news = asyncio.Event()
        self.registrations = self.operations = 0

    async def cycles(self, count: int) -> None:
        """Do so many cycles; at the end there is no link, no grant and no registration."""
        for cycle in range(count):
            if cycle % LINK_CYCLES == 0:
                self._link = await self._near.connect(self._exchange, self)
                await self._near.register(self._local, Path.HOST, [NIC])
            await self._cycle()
            if cycle % LINK_CYCLES == LINK_CYCLES - 1 or cycle == count - 1:
                await self._link.close()
                await self._far.hang_up(self._link_id)
                await self._near.unregister(self._local)

    async def _cycle(self) -> None:
        registrations, operations = IN_CYCLE
        for number in range(registrations - 1):
            memory, path = self._memories[number % len(self._memories)]
            await self._far.register(memory, path, [NIC])
            await self._far.unregister(memory)
        await self._far.register(self._target, Path.HOST, [NIC])
        self.registrations += registrations
        rights = Rights.READ | Rights.WRITE
        key = await self._far.grant(self._link_id, self._target, 0, LENGTH, rights, 1000.0)
        half = LENGTH // 2
        self._local.view()[:half] = self._random.randbytes(64) * (half // 64)
        for number in range(operations):
            size = SIZES[number % len(SIZES)]
            here, there = self._random.randrange(half - size + 1), self._random.randrange(LENGTH - size + 1)
            if number % 2:
                await self._run(Opcode.READ, key, Ranges.single(half + here, there, size))
                assert self._local.view()[half + here : half + here + size] == self._target.view()[there : there + size]
            else:
                await self._run(Opcode.WRITE, key, Ranges.single(here, there, size))
                assert self._local.view()[here : here + size] == self._target.view()[there : there + size]
        self.operations += operations
        await self._far.revoke(key)
        await self._far.unregister(self._target)

    async def _run(self, opcode: Opcode, key: RemoteKey, ranges: Ranges) -> None:
        self._news.clear()
        self._link.post(WorkRequest(self.operations, opcode, self._local, key, ranges))
        await self._news.wait()

    async def _exchange(self, offer: LinkAttributes) -> LinkAttributes:
        answer = self._far.accept(offer)
        self._link_id = answer.link_id
        return answer

    def completed(self, completions: list[Completion]) -> None:
        """See LinkEvents."""
        assert [each.status for each in completions] == [Status.SUCCESS]
        self._news.set()

    def heard(self, message: bytes) -> None:
        """See LinkEvents."""
        raise AssertionError("nothing was carried, and something came back")

    def rail_down(self, cause: str, pause: float) -> None:
        """See LinkEvents."""
        raise AssertionError(f"a rail went down: {cause}")

    def rail_up(self) -> None:
        """See LinkEvents."""

    def down(self, end: LinkEnd, cause: str) -> None:
        """See LinkEvents."""
        raise AssertionError(f"the link went down: {end}, {cause}")

    def held(self) -> Held:
        """Count everything."""
        gc.collect()
        _LIBC.malloc_trim(0)
        objects = self._near.object_counts() + self._far.object_counts()
        listed = subprocess.run(["rdma", "-j", "resource", "show"], capture_output=True, check=True).stdout
        pages = int(FilePath("/proc/self/statm").read_text().split()[1])
        malloc = _LIBC.mallinfo2().numbers
        return Held(
            rss=pages * os.sysconf("SC_PAGESIZE"),
            malloc=malloc[_MAPPED] + malloc[_IN_USE],
            blocks=sys.getallocatedblocks(),
            files=len(os.listdir("/proc/self/fd")),
            objects=dict(objects),
            kernel=json.loads(listed),
        )


@asynccontextmanager
async def soaking() -> AsyncIterator[Soak]:
    (device,) = p2pmem_devices()
    async with AsyncExitStack() as stack:
        bars = [stack.enter_context(closing(await device.allocate(length))) for length in (4096, LENGTH)]
        hosts = [stack.enter_context(closing(HostMemory(length, "soak"))) for length in (4096, 12_345, LENGTH)]
        ends = [stack.enter_context(closing(HostMemory(LENGTH, name))) for name in ("soak-near", "soak-far")]
        near, far = VerbsFabric([NIC]), VerbsFabric([NIC])
        for fabric in (near, far):
            stack.push_async_callback(fabric.close)
            await fabric.start()
        registered = [*((bar, Path.P2PDMA) for bar in bars), *((host, Path.HOST) for host in hosts)]
        yield Soak((near, far), ends, registered)


async def test_nothing_is_left(soak_share: float, figures: Figures) -> None:
    cycles = max(REGISTRATIONS // IN_CYCLE[0], OPERATIONS // IN_CYCLE[1])
    async with soaking() as soak:
        await soak.cycles(WARM_UP)
        before, done, began = soak.held(), (soak.registrations, soak.operations), time.monotonic()
        await soak.cycles(round(cycles * soak_share))
        seconds, after = time.monotonic() - began, soak.held()
        registrations, operations = soak.registrations - done[0], soak.operations - done[1]
    work = {"registrations": registrations, "operations": operations, "seconds": seconds}
    figures("soak", work | {"before": asdict(before), "after": asdict(after)})
    assert (registrations, operations) == (REGISTRATIONS * soak_share, OPERATIONS * soak_share)
    assert (after.files, after.objects, after.kernel) == (before.files, before.objects, before.kernel)
    assert after.malloc - before.malloc <= LOST_BYTES * operations
    assert after.blocks - before.blocks <= BLOCKS
    assert after.rss - before.rss <= RSS
