"""What tests of fabrics share: memories that can vanish, a recorder of completions, a clock to turn."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import mmap
import os
import random
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace

from peermem.core.types import LinkAttributes, Path, Ranges, RemoteKey, Rights
from peermem.fabric.base import Completion, Fabric, Link, LinkEnd, Opcode, Status, WorkRequest
from peermem.memory import Memory

MIB = 1 << 20
PATIENCE = 10.0
_LIBC = ctypes.CDLL(None, use_errno=True)


class FileMemory:
    """Memory in a memfd. `close` raises BufferError when somebody still holds a slice of its view."""

    def __init__(self, length: int, seed: int | None = None) -> None:
        self.length = length
        self.fd: int | None = os.memfd_create("test", os.MFD_CLOEXEC)
        os.ftruncate(self.fd, length)
        self._mapping = mmap.mmap(self.fd, length)
        self._view = memoryview(self._mapping)
        if seed is not None:
            block = random.Random(seed).randbytes(min(length, MIB - 1))
            self._mapping[:] = (block * (length // len(block) + 1))[:length]

    def view(self) -> memoryview:
        return self._view

    def bytes(self) -> bytes:
        return bytes(self._view)

    def close(self) -> None:
        self._view.release()
        self._mapping.close()
        if self.fd is not None:
            os.close(self.fd)
            self.fd = None


class VanishingMemory:
    """Memory that is only a mapping, and that the kernel can be told to refuse from then on."""

    fd: int | None = None

    def __init__(self, length: int) -> None:
        self.length = length
        self._mapping = mmap.mmap(-1, length)
        self._view = memoryview(self._mapping)
        self._address = ctypes.addressof(ctypes.c_char.from_buffer(self._mapping))

    def view(self) -> memoryview:
        return self._view

    def vanish(self) -> None:
        self._protect(0)

    def reappear(self) -> None:
        self._protect(mmap.PROT_READ | mmap.PROT_WRITE)

    def _protect(self, protection: int) -> None:
        result = _LIBC.mprotect(ctypes.c_void_p(self._address), ctypes.c_size_t(self.length), protection)
        assert result == 0, os.strerror(ctypes.get_errno())


class Clock:
    """The monotonic clock, which a test can put forward."""

    def __init__(self) -> None:
        self.ahead = 0.0

    def __call__(self) -> float:
        return time.monotonic() + self.ahead


@dataclass
class Recorder:
    """LinkEvents that remember."""

    statuses: dict[int, Status] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)
    ends: list[LinkEnd] = field(default_factory=list)
    rails: list[str] = field(default_factory=list)
    """What became of rails."""
    pauses: list[float] = field(default_factory=list)
    """Seconds for which rails were set aside."""
    messages: list[bytes] = field(default_factory=list)
    """What the far end's daemon answered."""
    posting: bool = False
    news: asyncio.Event = field(default_factory=asyncio.Event)

    def completed(self, completions: list[Completion]) -> None:
        if self.posting:
            self.faults.append("completed from inside post")
        if self.ends:
            self.faults.append("completed after down")
        for completion in completions:
            if completion.wr_id in self.statuses:
                self.faults.append(f"{completion} came twice")
            self.statuses[completion.wr_id] = completion.status
        self.news.set()

    def heard(self, message: bytes) -> None:
        if self.ends:
            self.faults.append("heard after down")
        self.messages.append(message)
        self.news.set()

    def rail_down(self, cause: str, pause: float) -> None:
        if self.posting or self.ends:
            self.faults.append("a rail that is down, from inside post or after down")
        self.rails.append(f"down: {cause}")
        self.pauses.append(pause)

    def rail_up(self) -> None:
        self.rails.append("up")

    def down(self, end: LinkEnd, cause: str) -> None:
        if self.posting:
            self.faults.append("down from inside post")
        self.ends.append(end)

    async def wait(self, wr_ids: Iterable[int]) -> list[Status]:
        wanted = list(wr_ids)
        async with asyncio.timeout(PATIENCE):
            while not all(wr_id in self.statuses for wr_id in wanted):
                self.news.clear()
                await self.news.wait()
        return [self.statuses[wr_id] for wr_id in wanted]


class Connection:
    """An open link with its recorder, as a test uses it. It registers what it is given, for both sides."""

    def __init__(self, initiator: Fabric, target: Fabric, subject: str = "") -> None:
        """`subject` is whose link it is."""
        self.subject = subject
        self.initiator = initiator
        self.target = target
        self.events = Recorder()
        self.link_id = b""
        self.link: Link
        self._registered: list[tuple[Fabric, Memory]] = []
        self._next_id = 0

    async def open(self, rails: int = 1) -> Connection:
        self.link = await self.initiator.connect(self._exchange, self.events, rails, self.subject)
        return self

    async def another(self) -> Connection:
        """Open a second link between the same fabrics, for the same memory."""
        other = Connection(self.initiator, self.target)
        other._registered = self._registered
        return await other.open()

    async def close(self) -> None:
        """Close the link, and release all memory."""
        await self.link.close()
        for fabric, memory in self._registered:
            await fabric.unregister(memory)
        self._registered.clear()

    async def _exchange(self, offer: LinkAttributes) -> LinkAttributes:
        answer = self.target.accept(replace(offer, subject=self.subject))
        self.link_id = answer.link_id
        return answer

    async def register(self, fabric: Fabric, memory: Memory, path: Path = Path.HOST) -> None:
        if not any(known is fabric and memory is other for known, other in self._registered):
            self._registered.append((fabric, memory))
            await fabric.register(memory, path)

    async def release(self, memory: Memory) -> None:
        """Nothing uses this memory any more."""
        for fabric in {self.initiator, self.target}:
            await fabric.unregister(memory)
        self._registered[:] = [entry for entry in self._registered if entry[1] is not memory]

    async def grant(
        self,
        memory: Memory,
        offset: int = 0,
        length: int | None = None,
        rights: Rights = Rights.READ | Rights.WRITE,
        ttl: float = 1000.0,
    ) -> RemoteKey:
        length = memory.length - offset if length is None else length
        await self.register(self.target, memory)
        return await self.target.grant(self.link_id, memory, offset, length, rights, ttl)

    def post(self, opcode: Opcode, memory: Memory, key: RemoteKey, ranges: Ranges) -> int:
        """Post with memory that is registered."""
        self._next_id += 1
        self.events.posting = True
        try:
            self.link.post(WorkRequest(self._next_id, opcode, memory, key, ranges))
        finally:
            self.events.posting = False
        return self._next_id

    async def run(self, opcode: Opcode, memory: Memory, key: RemoteKey, ranges: Ranges) -> Status:
        await self.register(self.initiator, memory)
        return (await self.events.wait([self.post(opcode, memory, key, ranges)]))[0]

    async def post_all(self, opcode: Opcode, memory: Memory, key: RemoteKey) -> list[int]:
        """Post requests for all of `memory`, at the same offsets on both sides."""
        await self.register(self.initiator, memory)
        size = self.initiator.limits.slice_bytes
        return [
            self.post(opcode, memory, key, Ranges.single(start, start, min(size, memory.length - start)))
            for start in range(0, memory.length, size)
        ]


def ranges_of(local: Sequence[int], remote: Sequence[int], lengths: Sequence[int]) -> Ranges:
    return Ranges(local, remote, lengths, sum(lengths))


async def eventually(condition: Callable[[], bool]) -> None:
    """Give the loop turns until a condition holds."""
    async with asyncio.timeout(PATIENCE):
        while not condition():  # noqa: ASYNC110  what is waited for is not an event
            await asyncio.sleep(0.0005)


async def turns(count: int = 50) -> None:
    """Let the loop turn: whatever is going to happen by itself has its chance."""
    for _ in range(count):
        await asyncio.sleep(0)


def open_sockets() -> Counter[str]:
    """Return how many sockets, pipes and other nameless files of each kind this process has open.

    Compare with `<=`: what other tests have left to gRPC's threads may be closed meanwhile."""
    kinds = []
    for number in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):
            kinds.append(os.readlink(f"/proc/self/fd/{number}").split(":")[0])
    return Counter(kind for kind in kinds if not kind.startswith("/"))
