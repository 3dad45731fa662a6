"""Real parts that fail, wait or vanish on cue, and brokers made of them that meet in one process.

Rules of this file:

* Nothing here pretends: bytes move through real fabrics into real memory files.
* Each double wraps the real part and is exactly it until a test gives the cue.
"""

from __future__ import annotations

import asyncio
import errno
import os
import threading
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING

from peermem.broker.broker import Broker
from peermem.broker.sessions import SessionTable
from peermem.core.errors import NotMappable, PeermemError
from peermem.core.node import ADOPTED, NicPort
from peermem.core.policy import OPEN, Rules
from peermem.core.topology import Machine, Topology
from peermem.core.types import FabricKind, LinkAttributes, Path, RemoteKey, Rights
from peermem.device.base import Copier, Device, DeviceMemory
from peermem.device.memfd import AdoptedMemory, MemfdDevice
from peermem.device.plain import PlainMemory
from peermem.directory.base import NodeEntry
from peermem.directory.static import StaticDirectory
from peermem.fabric.base import Completion, Exchange, Fabric, FabricLimits, Link, LinkEvents, Proof, Status, WorkRequest
from peermem.fabric.local import LocalFabric
from peermem.fabric.tcp import TcpFabric
from peermem.memory import Memory
from peermem.remote.base import Remotes
from peermem.storage.base import Storage
from peermem.storage.files import LocalStorage
from peermem.telemetry.metrics import Metrics
from tests.direct_remotes import Cues, DirectRemotes
from tests.policies import guard
from tests.settings import broker_settings

MIB = 1 << 20
PATIENCE = 20.0


class FragileMemory(PlainMemory):
    """Memory that its device can lose."""

    def __init__(self, inner: DeviceMemory, device: FragileDevice) -> None:
        self.length = inner.length
        self._inner = inner
        self._device = device

    @property
    def fd(self) -> int | None:
        self._device.touch()
        return self._inner.fd

    def view(self) -> memoryview:
        self._device.touch()
        return self._inner.view()

    @property
    def copier(self) -> Copier | None:
        return self._inner.copier

    def share(self) -> tuple[int, int]:
        if not self._device.mappable:
            raise NotMappable("The kernel gives no file descriptor for this memory.")
        return self._inner.share()

    def close(self) -> None:
        self._inner.close()


class FragileDevice(MemfdDevice):
    """A device whose memory can vanish, can't always be mapped, and whose touch can take long in a thread."""

    def __init__(self, name: str, size: int) -> None:
        super().__init__(name, size)
        self.vanished = False
        self.gone = False  # from the node
        self.mappable = True
        self.slow: threading.Event | None = None  # threads that touch memory wait for it
        self.touched = threading.Event()  # a thread waits

    async def allocate(self, length: int) -> DeviceMemory:
        return FragileMemory(await super().allocate(length), self)

    def alive(self) -> bool:
        return not self.gone

    def touch(self) -> None:
        if self.vanished:
            raise OSError(errno.EFAULT, os.strerror(errno.EFAULT))
        if self.slow is not None and threading.current_thread() is not threading.main_thread():
            self.touched.set()
            self.slow.wait(PATIENCE)


class CuedLink:
    """A link that holds posts back while its fabric says so."""

    def __init__(self, fabric: CuedFabric, link: Link, events: LinkEvents) -> None:
        self._fabric = fabric
        self._link = link
        self._events = events
        self.held: list[WorkRequest] = []

    @property
    def packet(self) -> int:
        return self._link.packet

    @property
    def rails_down(self) -> int:
        return self._link.rails_down

    async def prepare(self, memory: Memory, offset: int, length: int) -> None:
        await self._link.prepare(memory, offset, length)

    def post(self, request: WorkRequest) -> None:
        if self._fabric.hold:
            self.held.append(request)
        else:
            self._run(request)

    def _run(self, request: WorkRequest) -> None:
        status = self._fabric.statuses.pop(0) if self._fabric.statuses else None
        if status is None:
            self._link.post(request)
        else:
            asyncio.get_running_loop().call_soon(self._events.completed, [Completion(request.wr_id, status)])

    def let_go(self, count: int | None = None) -> None:
        """Run the first `count` requests that were held back, or all."""
        free, self.held = self.held[:count], self.held[len(self.held[:count]) :]
        for request in free:
            self._run(request)

    def carry(self, message: bytes) -> bool:
        return self._link.carry(message)

    async def close(self) -> None:
        held, self.held = self.held, []
        if held:
            self._events.completed([Completion(request.wr_id, Status.WR_FLUSH_ERR) for request in held])
        await self._link.close()


class CuedFabric:
    """A fabric whose links hold requests back, or end them with a given status without running them."""

    def __init__(self, inner: Fabric) -> None:
        self.hold = False
        self.statuses: list[Status] = []
        """What the next requests end with."""
        self.defect: Exception | None = None
        """Raised by `connect`."""
        self.refusal: PeermemError | None = None
        """Raised by `register`."""
        self.registered: list[Memory] = []
        self.revoked: list[RemoteKey] = []
        self.granting: asyncio.Event | None = None
        """Waited for by `grant` while it is here."""
        self.links: list[CuedLink] = []
        self._inner = inner

    @property
    def kind(self) -> FabricKind:
        return self._inner.kind

    @property
    def separates_subjects(self) -> bool:
        return self._inner.separates_subjects

    @property
    def limits(self) -> FabricLimits:
        return self._inner.limits

    @property
    def nics(self) -> Mapping[str, PeermemError | None]:
        return self._inner.nics

    @property
    def unavailable(self) -> PeermemError | None:
        return self._inner.unavailable

    async def register(self, memory: Memory, path: Path, nics: Sequence[str] = (), subject: str = "") -> None:
        if self.refusal is not None:
            raise self.refusal
        await self._inner.register(memory, path, nics, subject)
        self.registered.append(memory)

    async def unregister(self, memory: Memory) -> None:
        if memory in self.registered:
            self.registered.remove(memory)
        await self._inner.unregister(memory)

    async def probe(self, nic: str, memory: Memory, path: Path, *, keep: bool = False) -> Proof:
        return await self._inner.probe(nic, memory, path, keep=keep)

    async def start(self) -> None:
        await self._inner.start()

    async def close(self) -> None:
        await self._inner.close()

    async def connect(self, exchange: Exchange, events: LinkEvents, rails: int = 1, subject: str = "") -> Link:
        if self.defect is not None:
            raise self.defect
        link = CuedLink(self, await self._inner.connect(exchange, events, rails, subject), events)
        self.links.append(link)
        return link

    def let_go(self) -> None:
        """Run what was held back, and hold nothing back any more."""
        self.hold = False
        for link in self.links:
            link.let_go()

    @property
    def held(self) -> int:
        """Requests that are held back."""
        return sum(len(link.held) for link in self.links)

    def accept(self, offer: LinkAttributes) -> LinkAttributes:
        return self._inner.accept(offer)

    async def hang_up(self, link_id: bytes) -> None:
        await self._inner.hang_up(link_id)

    async def grant(
        self, link_id: bytes, memory: Memory, offset: int, length: int, rights: Rights, ttl: float
    ) -> RemoteKey:
        if self.granting is not None:
            await self.granting.wait()
        return await self._inner.grant(link_id, memory, offset, length, rights, ttl)

    async def revoke(self, key: RemoteKey) -> None:
        self.revoked.append(key)
        await self._inner.revoke(key)


class Host:
    """One broker and its parts."""

    def __init__(
        self,
        node: str,
        brokers: dict[str, Broker],
        settings: Mapping[str, float],
        verbs: Fabric | None = None,
        devices: Mapping[str, Device] | None = None,
        storage: Storage | None = None,
        rules: Rules = OPEN,
    ) -> None:
        """`verbs` and `devices` are there besides tcp, local, bar0 and adopted memory."""
        self.node = node
        self.cues = Cues()
        """For what this node asks of the others."""
        self.device = FragileDevice("bar0", 64 * MIB)
        self.sessions = SessionTable(max_sessions=16)
        self.local = CuedFabric(LocalFabric())
        tcp = TcpFabric("127.0.0.1:0", on_link_lost=lambda link_id: self.broker.serving.link_lost(link_id))
        self.tcp = CuedFabric(tcp)
        self.metrics = Metrics("0")
        self._fabrics: dict[FabricKind, Fabric] = {FabricKind.TCP: self.tcp, FabricKind.LOCAL: self.local}
        self._fabrics |= {FabricKind.VERBS: verbs} if verbs is not None else {}
        self.devices: dict[str, Device] = {"bar0": self.device, ADOPTED: AdoptedMemory(ADOPTED, MIB), **(devices or {})}
        self.directory = StaticDirectory({node: f"{node}.test:1"})
        self.broker = Broker(
            broker_settings(node, settings),
            f"epoch-{node}",
            self.devices,
            self._fabrics,
            DirectRemotes(node, brokers, self.cues),
            self.directory,
            guard(node, rules, self.metrics),
            self.sessions,
            self.metrics,
            lambda: Topology(Machine(), {}, {"nic0/1": NicPort("nic0/1", "ACTIVE", "Ethernet", 0, -1)}),
            storage or LocalStorage([], block=MIB, depth=1, limit=1),
        )
        brokers[node] = self.broker

    async def open(self, stack: AsyncExitStack) -> None:
        """Start the fabrics; the stack ends all in the daemon's order."""
        for fabric in self._fabrics.values():
            await fabric.start()
            stack.push_async_callback(fabric.close)
        await self.directory.join(NodeEntry(self.node, f"{self.node}.test:1"))
        stack.push_async_callback(self.broker.close)
        stack.push_async_callback(self.broker.drain, 0.0)


if TYPE_CHECKING:
    _remotes: type[Remotes] = DirectRemotes
