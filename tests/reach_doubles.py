"""A fabric with NICs and a device that only the CPU reaches, for brokers that meet in one process.

Rules of this file:

* Nothing here pretends: the NIC's bytes move over TCP, the staged memory is a memory file that only a copier touches.
* Memory that was not registered can't be used by the NIC, neither locally nor by a grant.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from peermem import memory as memories
from peermem.core.errors import NicNotFound, PeermemError, ProbeFailed, RegionRevoked
from peermem.core.types import FabricKind, LinkAttributes, Path, RemoteKey, Rights
from peermem.device.base import Copier, DeviceMemory
from peermem.device.memfd import MemfdDevice
from peermem.device.plain import PlainMemory
from peermem.fabric.base import Exchange, Fabric, Link, LinkEvents, Proof, WorkRequest
from peermem.fabric.tcp import TcpFabric
from peermem.memory import Memory
from tests.doubles import CuedFabric, CuedLink

MIB = 1 << 20
PAGE = 4096
_MISPLACING: set[int] = set()
"""Keys of memory in which the far end's NIC misplaces bytes."""


class NicFabric(CuedFabric):
    """A fabric of kind verbs, with the NIC port nic0/1."""

    kind = FabricKind.VERBS
    separates_subjects = True

    def __init__(self, inner: TcpFabric) -> None:
        super().__init__(inner)
        self.ports: dict[str, PeermemError | None] = {"nic0/1": None}
        self.unreachable: set[Path] = set()
        """Paths that a probe finds not to work."""
        self.probed: list[tuple[str, Path]] = []
        self.hanging_up: asyncio.Event | None = None
        """Waited for by `hang_up` while it is here."""
        self.packet = 4096
        self.misplaces = False
        """Whether it takes every address in a page of memory on demand for the page's first one, as rxe does."""
        self.taken_back: list[Memory] = []
        """Memory whose exporter has let go of it: no NIC accesses it any more."""
        self.owners: list[str] = []
        """Whose memory was registered, in order."""
        self._on_demand: list[Memory] = []

    @property
    def nics(self) -> Mapping[str, PeermemError | None]:
        return self.ports

    @property
    def unavailable(self) -> PeermemError | None:
        if not self.ports:
            return NicNotFound("There is no NIC.")
        errors = [error for error in self.ports.values() if error is not None]
        return errors[0] if len(errors) == len(self.ports) else None

    async def probe(self, nic: str, memory: Memory, path: Path, *, keep: bool = False) -> Proof:
        self.probed.append((nic, path))
        if path in self.unreachable:
            raise ProbeFailed("The NIC does not reach it.")
        before = memories.read(memory, 0, 7)
        memories.write(memory, 0, b"pattern")
        assert memories.read(memory, 0, 7) == b"pattern"
        if keep:
            memories.write(memory, 0, before)
        return Proof(1e-5, 1e9, 2e9, PAGE if self.misplaces and path is Path.P2PDMA else 1)

    async def register(self, memory: Memory, path: Path, nics: Sequence[str] = (), subject: str = "") -> None:
        await super().register(memory, path, nics, subject)
        self.owners.append(subject)
        if path is Path.P2PDMA:
            self._on_demand.append(memory)

    def placed(self, request: WorkRequest) -> WorkRequest:
        """Return a request as the NICs of both ends carry it out."""
        local, remote = request.ranges.local, request.ranges.remote
        if self.misplaces and request.memory in self._on_demand:
            local = [start // PAGE * PAGE for start in local]
        if request.key.rkey in _MISPLACING:
            remote = [start // PAGE * PAGE for start in remote]
        if request.memory in self.taken_back:
            local = [request.memory.length] * len(local)
        ranges = replace(request.ranges, local=local, remote=remote)
        return replace(request, ranges=ranges)

    async def connect(self, exchange: Exchange, events: LinkEvents, rails: int = 1, subject: str = "") -> Link:
        async def relabelled(offer: LinkAttributes) -> LinkAttributes:
            return replace(await exchange(replace(offer, fabric=FabricKind.VERBS)), fabric=FabricKind.TCP)

        link = await super().connect(relabelled, events, rails, subject)
        assert isinstance(link, CuedLink)
        link._link = _NicLink(self, link._link)
        return link

    def accept(self, offer: LinkAttributes) -> LinkAttributes:
        return replace(super().accept(replace(offer, fabric=FabricKind.TCP)), fabric=FabricKind.VERBS)

    async def hang_up(self, link_id: bytes) -> None:
        if self.hanging_up is not None:
            await self.hanging_up.wait()
        await super().hang_up(link_id)

    async def grant(
        self, link_id: bytes, memory: Memory, offset: int, length: int, rights: Rights, ttl: float
    ) -> RemoteKey:
        assert memory in self.registered
        if memory in self.taken_back:
            raise RegionRevoked("The device behind the dma-buf has taken its memory back.")
        key = await super().grant(link_id, memory, offset, length, rights, ttl)
        if self.misplaces and memory in self._on_demand:
            _MISPLACING.add(key.rkey)
        return key


class _NicLink:
    """A link whose packets are those of a NIC."""

    def __init__(self, fabric: NicFabric, inner: Link) -> None:
        self._fabric = fabric
        self._inner = inner

    @property
    def packet(self) -> int:
        return self._fabric.packet

    @property
    def rails_down(self) -> int:
        return self._inner.rails_down

    async def prepare(self, memory: Memory, offset: int, length: int) -> None:
        assert memory in self._fabric.registered
        await self._inner.prepare(memory, offset, length)

    def post(self, request: WorkRequest) -> None:
        self._inner.post(self._fabric.placed(request))

    def carry(self, message: bytes) -> bool:
        return self._inner.carry(message)

    async def close(self) -> None:
        await self._inner.close()


class OnDemandDevice(MemfdDevice):
    """A device whose memory NICs reach on demand."""

    path = Path.P2PDMA
    paths: Sequence[Path] = (Path.P2PDMA, Path.STAGED)


class StagedMemory(PlainMemory):
    """Memory that only its copier touches."""

    fd = None

    def __init__(self, inner: DeviceMemory, device: StagedDevice) -> None:
        self.length = inner.length
        self.inner = inner
        self._device = device

    @property
    def copier(self) -> Copier | None:
        return self

    def view(self) -> memoryview:
        raise ValueError("nothing but the copier reaches it")

    def share(self) -> tuple[int, int]:
        return self.inner.share()

    def close(self) -> None:
        self.inner.close()

    async def load(self, buffer: Memory, pieces: Sequence[tuple[int, int, int]]) -> None:
        await self._device.turn()
        for offset, start, length in pieces:
            memories.copy(self.inner, offset, buffer, start, length)

    async def store(self, buffer: Memory, pieces: Sequence[tuple[int, int, int]]) -> None:
        await self._device.turn()
        for offset, start, length in () if self._device.forgets else pieces:
            memories.copy(buffer, start, self.inner, offset, length)


class ImportedMemory(StagedMemory):
    """Memory that NICs import as a dma-buf; the CPU reaches it by its copier, or not at all, and its device sees what a
    NIC wrote after a flush."""

    exporter = "gpu"
    is_revoked = False
    needs_flush = True

    def __init__(self, inner: DeviceMemory, device: ImportedDevice) -> None:
        super().__init__(inner, device)
        self.is_reached_by_cpu = device.lets_map

    @property
    def copier(self) -> Copier | None:
        return self if self.is_reached_by_cpu else None

    def view(self) -> memoryview:
        """For the NIC, which moves its bytes by the CPU here."""
        return self.inner.view()

    def alive(self) -> bool:
        return not self.is_revoked

    def dma_buf(self) -> tuple[int, int] | None:
        assert self.inner.fd is not None
        return self.inner.fd, 0

    async def flush(self) -> None:
        self._device.flushes += 1


class StagedDevice(MemfdDevice):
    """A device whose memory is staged; its copies can be held back, and its memory can vanish."""

    path = Path.STAGED
    paths: Sequence[Path] = (Path.STAGED,)

    def __init__(self, name: str, size: int) -> None:
        super().__init__(name, size)
        self.gate: asyncio.Event | None = None
        """Copies wait for it."""
        self.waiting = 0
        """Copies that wait."""
        self.copies = 0
        self.vanished = False
        self.flushes = 0
        self.forgets = False
        """What is written is not kept, as by registers."""

    async def allocate(self, length: int) -> DeviceMemory:
        return StagedMemory(await super().allocate(length), self)

    async def turn(self) -> None:
        self.copies += 1
        if self.gate is not None:
            self.waiting += 1
            await self.gate.wait()
            self.waiting -= 1
        if self.vanished:
            raise RegionRevoked(f"Device {self.name} has vanished.")


class ImportedDevice(StagedDevice):
    """A device whose memory is dma-bufs."""

    path = Path.DMABUF
    paths: Sequence[Path] = (Path.DMABUF, Path.STAGED)
    lets_map = True
    """Whether the CPU reaches its memory."""

    async def allocate(self, length: int) -> DeviceMemory:
        return ImportedMemory(await MemfdDevice.allocate(self, length), self)


if TYPE_CHECKING:
    _fabric: type[Fabric] = NicFabric
    _memory: type[DeviceMemory] = StagedMemory
    _link: type[Link] = _NicLink
