"""Proof that a NIC port reaches memory: a pattern goes in and comes back, through two queue pairs of that port.

Rules of this file:

* A registration proves nothing: one on demand succeeds for a mapping that the NIC can never access. Only bytes count.
* The CPU does not touch the memory: what is compared has been read back by the NIC.
* Memory on demand is tried within a page, too: what a NIC misplaces there is told by the proof.
* Everything is made for one probe and closed after it, in a bounded time.
"""

from __future__ import annotations

import asyncio
import ctypes
import errno
import mmap
import secrets
import statistics
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import ExitStack, asynccontextmanager, nullcontext
from typing import TypeVar

from peermem.core.errors import NicLost, NoGid, ProbeFailed, ProbeMismatch
from peermem.core.types import Path
from peermem.core.units import format_size
from peermem.fabric import verbs
from peermem.fabric.base import Proof
from peermem.fabric.verbs_memory import backing, check
from peermem.fabric.verbs_nic import Port
from peermem.fabric.verbs_qp import QueuePair
from peermem.fabric.verbs_refusals import refusal
from peermem.fabric.verbs_types import Access, Marks, Settings, VerbsError, WcStatus, WrOpcode
from peermem.fabric.verbs_types import Path as Way
from peermem.memory import Memory

T = TypeVar("T", bound=verbs.Owned)

_TIME = 10.0
"""Seconds that a probe may take."""
_SPIN = 0.002
"""Seconds of polling before the loop sleeps."""
_SMALL, _LARGE = 4096, 1 << 20
_ROUNDS = 16
_PSN = 1
LOOPBACK_ACCESS = Access.LOCAL_WRITE | Access.REMOTE_READ | Access.REMOTE_WRITE


async def probe(port: Port, memory: Memory, path: Path, settings: Settings, *, keep: bool = False) -> Proof:
    """See Fabric."""
    check(port, path)
    length = min(_LARGE, memory.length)
    try:
        with ExitStack() as stack:
            loopback = _Loopback(port, settings, stack)
            tried = backing(memory, path)
            stack.callback(tried.close)
            try:
                target = loopback.kept(tried.register(loopback.domain, 0, length, LOOPBACK_ACCESS))
            except VerbsError as error:
                raise refusal(error, port, length, path, tried.dma_buf) from error
            return await _prove(loopback, target, path, keep)
    except VerbsError as error:
        if error.errno in (errno.ENOMEM, errno.EPERM):  # the probe's own buffers and queues are locked as well
            raise refusal(error, port, length, Path.HOST) from error
        raise NicLost(f"The NIC {port.name} can't make a connection to itself: {error}.", nic=port.name) from error


async def _prove(loopback: _Loopback, target: verbs.MemoryRegion, path: Path, keep: bool) -> Proof:
    length = target.length
    times: list[list[float]] = [[], []]
    try:
        async with asyncio.timeout(_TIME), _putting_back(loopback, target) if keep else nullcontext():
            for _ in range(2):  # one pattern could have been there before
                pattern = secrets.token_bytes(length)
                loopback.out[:length] = pattern
                times[0].append(await loopback.move(WrOpcode.RDMA_WRITE, target, length))
                loopback.back[:length] = bytes(length)
                times[1].append(await loopback.move(WrOpcode.RDMA_READ, target, length))
                if loopback.back[:length] != pattern:
                    raise _mismatch(loopback.port, length, path)
            alignment = (
                mmap.PAGESIZE if length >= _SMALL and path is Path.P2PDMA and await _misplaces(loopback, target) else 1
            )
            small = [await loopback.move(WrOpcode.RDMA_WRITE, target, min(_SMALL, length)) for _ in range(_ROUNDS)]
    except _Refused as error:
        raise _failed(loopback.port, path, str(error)) from None
    except TimeoutError:
        raise _failed(loopback.port, path, "it did not complete in time") from None
    write, read = (length / min(taken) for taken in times)
    return Proof(statistics.median(small), write, read, alignment)


@asynccontextmanager
async def _putting_back(loopback: _Loopback, target: verbs.MemoryRegion) -> AsyncIterator[None]:
    """Have the target's bytes at the end as they are now, if the NIC reads and writes it at all."""
    length = target.length
    await loopback.move(WrOpcode.RDMA_READ, target, length)
    before = loopback.back[:length]
    try:
        yield
    finally:
        async with asyncio.timeout(_TIME):
            loopback.out[:length] = before
            await loopback.move(WrOpcode.RDMA_WRITE, target, length)


async def _misplaces(loopback: _Loopback, target: verbs.MemoryRegion) -> bool:
    """Whether bytes that begin within a page of the target do not arrive there, or are read from elsewhere."""
    page, start, end = _SMALL, _SMALL // 4, _SMALL // 2
    before, inner = secrets.token_bytes(page), secrets.token_bytes(end - start)
    loopback.out[:page] = before
    await loopback.move(WrOpcode.RDMA_WRITE, target, page)
    loopback.out[: len(inner)] = inner
    await loopback.move(WrOpcode.RDMA_WRITE, target, len(inner), start)
    await loopback.move(WrOpcode.RDMA_READ, target, page)
    whole = loopback.back[:page]
    await loopback.move(WrOpcode.RDMA_READ, target, len(inner), start)
    return whole != before[:start] + inner + before[end:] or loopback.back[: len(inner)] != inner


class _Refused(Exception):
    """A WRITE or READ of a probe failed."""


class _Loopback:
    """Two queue pairs of one port that are connected to each other, and host memory to move from and to."""

    def __init__(self, port: Port, settings: Settings, stack: ExitStack) -> None:
        """What is made is closed by `stack`, last made first. Raises VerbsError, NoGid."""
        self.port = port
        self._stack = stack
        self.domain = self.kept(verbs.Domain(port.nic.device))
        self.out, self.back = mmap.mmap(-1, _LARGE), mmap.mmap(-1, _LARGE)
        self._out, self._back = (self._host(buffer) for buffer in (self.out, self.back))
        self._queue = self.kept(verbs.CompletionQueue(port.nic.device, 8))
        other = self.kept(verbs.CompletionQueue(port.nic.device, 8))
        pairs = [self.kept(QueuePair(self.domain, queue, 4, 1, settings.extended)) for queue in (self._queue, other)]
        self._pair = pairs[0]
        self._connect(pairs, settings)

    async def move(self, opcode: WrOpcode, target: verbs.MemoryRegion, length: int, offset: int = 0) -> float:
        """WRITE `out` to the target, or READ it into `back`; return the seconds that it took. Raises _Refused."""
        local = self._out if opcode is WrOpcode.RDMA_WRITE else self._back
        began = time.perf_counter()
        try:
            self._pair.move(opcode, [(local.address, length, local.lkey, target.address + offset, target.rkey)], 1)
            status = await self._completion()
        except VerbsError as error:
            raise _Refused(f"{opcode.name} can't be posted: {error}") from error
        taken = time.perf_counter() - began
        if status != WcStatus.SUCCESS:
            name = WcStatus(status).name if status in list(WcStatus) else f"status {status}"
            raise _Refused(f"{opcode.name} ended with {name}")
        return taken

    async def _completion(self) -> int:
        """Poll for a moment, then wait to be woken."""
        loop, queue = asyncio.get_running_loop(), self._queue
        until = loop.time() + _SPIN
        while loop.time() < until:
            if done := queue.poll(1):
                return done[0][1]
            await asyncio.sleep(0)
        readable = asyncio.Event()
        loop.add_reader(queue.fd, readable.set)
        try:
            queue.arm()
            while not (done := queue.poll(1)):
                await readable.wait()
                readable.clear()
                queue.acknowledge()
                queue.arm()
        finally:
            loop.remove_reader(queue.fd)
        return done[0][1]

    def _connect(self, pairs: Sequence[QueuePair], settings: Settings) -> None:
        port = self.port
        gid = port.gid_for()
        if gid is None:
            raise NoGid(f"The port {port.name} has no GID.", nic=port.name)
        state = port.state
        way = Way(port.number, gid.index, gid.value, state.lid, state.ethernet, state.mtu, Marks())
        for pair in pairs:
            self._stack.callback(pair.reset)
            pair.prepare(port.number, LOOPBACK_ACCESS)
        for pair, other in (pairs, pairs[::-1]):
            pair.connect(way, other.number, (_PSN, _PSN), (1, 1), settings.timing)

    def _host(self, buffer: mmap.mmap) -> verbs.MemoryRegion:
        hold = (ctypes.c_char * _LARGE).from_buffer(buffer)
        return self.kept(verbs.MemoryRegion(self.domain, ctypes.addressof(hold), _LARGE, Access.LOCAL_WRITE))

    def kept(self, thing: T) -> T:
        """Have `thing` closed with the probe."""
        self._stack.callback(thing.close)
        return thing


def _failed(port: Port, path: Path, cause: str) -> ProbeFailed:
    """Tell why; pages without a struct page are the usual reason on demand."""
    fix = (
        "The mapping was registered on demand and has no pages that the NIC can reach: it is likely PFN-mapped (a "
        "resource file of a PCI device, say). Use path STAGED for it."
        if path is Path.P2PDMA
        else "See the kernel's log, and whether an IOMMU or the port's network keeps the NIC from itself."
    )
    return ProbeFailed(
        f"The NIC {port.name} registered the memory and could not access it: {cause}. {fix}", nic=port.name
    )


def _mismatch(port: Port, length: int, path: Path) -> ProbeMismatch:
    return ProbeMismatch(
        f"The NIC {port.name} wrote {format_size(length)} to memory of path {path.value} without an error and read "
        "back other bytes. Do not use this path; report the NIC's firmware and the kernel's release.",
        nic=port.name,
    )
