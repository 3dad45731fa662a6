"""A broker on a machine of `tests/machines`, with its page served over a real socket.

Rules of this file:

* The machine's PCI functions and NICs are read from its tree; which NIC reaches which device is what the test says,
  found out by the real proofs on a fabric whose NICs move bytes over TCP.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path as File

from peermem.api.http import Health, HttpServer
from peermem.api.page.document import Document
from peermem.api.page.door import Page
from peermem.broker.broker import Broker
from peermem.broker.preflight import Preflight
from peermem.core.errors import PortDown, ProbeFailed
from peermem.core.preflight import Capability, HostFacts
from peermem.core.topology import Distance, Machine, Topology
from peermem.core.types import FabricKind, Path
from peermem.fabric.base import Proof
from peermem.fabric.tcp import TcpFabric
from peermem.memory import Memory
from tests import machines
from tests.doubles import MIB, Host
from tests.reach_doubles import NicFabric, OnDemandDevice, StagedDevice

GPUS = ("0000:19:00.0", "0000:1a:00.0", "0000:3b:00.0", "0000:3c:00.0", "0000:9b:00.0", "0000:bd:00.0")
NVME = "0000:4a:00.0"
FASTEST = 42e9


class PlacedDevice(OnDemandDevice):
    """A device on a PCI function, whose memory NICs import."""

    def __init__(self, name: str, size: int, pci_address: str, kind: str, path: Path) -> None:
        super().__init__(name, size)
        self.pci_address = pci_address
        self.kind = kind
        self.path = path
        self.paths: Sequence[Path] = (path, Path.STAGED)


class PlacedNics(NicFabric):
    """NICs of a machine: the farther one is, the slower; the kernel lets those of another socket reach nothing."""

    def __init__(self, topology: Topology) -> None:
        super().__init__(TcpFabric("127.0.0.1:0", on_link_lost=lambda _: None))
        self.topology = topology
        self.ports = {
            nic.name: None if nic.is_active else PortDown(f"Port {nic.name} is {nic.state}. Bring its link up.")
            for nic in topology.nics.values()
        }
        self.trying = ""
        """PCI address of the device that is tried now."""

    async def probe(self, nic: str, memory: Memory, path: Path, *, keep: bool = False) -> Proof:
        await super().probe(nic, memory, path, keep=keep)
        if path is Path.HOST:
            return Proof(1.9e-6, 21e9, 20e9)
        distance = self.topology.distance(self.trying, nic)
        if distance > Distance.PHB:
            raise ProbeFailed(f"NIC port {nic} got no answer from the memory: the completion says REM_ACCESS_ERR.")
        return Proof(1.1e-6 * distance, FASTEST / (1 + max(0, distance - 3) * 1.7), FASTEST / (1 + distance / 4))


def good_host(files: Sequence[str]) -> HostFacts:
    return HostFacts("7.3.4", None, frozenset(Capability), "shared", dict.fromkeys(files, ""), "none", {}, True, "56.1")


class Shown:
    """A host and its page."""

    def __init__(self, host: Host, topology: Topology, nics: PlacedNics | None, health: list[Health]) -> None:
        self.host = host
        self.health = health
        """The last one counts."""
        self.page = Page()
        self.server = HttpServer("127.0.0.1:0", host.metrics, lambda: health[-1], self.page)
        broker = host.broker
        self.preflight = Preflight(
            broker.devices, broker.proofs, lambda: topology, good_host, broker.fabrics.get(FabricKind.VERBS)
        )
        self.page.facts = Document(broker, self.preflight, lambda: topology, host.metrics.history, lambda: health[-1])
        self._nics = nics

    @property
    def url(self) -> str:
        return f"http://{self.server.address}/"

    def refuse_everything(self) -> None:
        """Have no NIC reach anything from now on."""
        assert self._nics is not None
        self._nics.unreachable = set(Path)

    async def prove(self, *names: str) -> None:
        """Try these devices with all NICs, as a preflight does."""
        for name in names:
            device = self.host.devices[name]
            for path in device.paths:
                for nic in self.host.broker.proofs.nics:
                    if self._nics is not None:
                        self._nics.trying = device.pci_address
                    await self.host.broker.proofs.prove(device, path, nic)


@asynccontextmanager
async def shown(
    machine: str, folder: File, functions: Sequence[str] = GPUS, brokers: dict[str, Broker] | None = None
) -> AsyncIterator[Shown]:
    """Serve the page of a machine with GPUs on these PCI functions; an empty name is of one without NICs. `brokers` are
    those of its cluster, which it joins."""
    topology = machines.build(machine, folder).read() if machine else Topology(Machine(), {}, {})
    nics = PlacedNics(topology) if machine else None
    gpus = [PlacedDevice(f"gpu{at}", 64 * MIB, address, "cuda", Path.DMABUF) for at, address in enumerate(functions)]
    nvme = PlacedDevice("p2pmem-0000-4a-00-0", 64 * MIB, NVME, "p2pmem", Path.P2PDMA)
    devices = {device.name: device for device in [*gpus, nvme]} if machine == "gpu_server" else {}
    plain = {"fpga0": StagedDevice("fpga0", 64 * MIB)} if machine == "gpu_server" else {}
    host = Host("gpu-01", brokers if brokers is not None else {}, {}, nics, {**devices, **plain})
    async with AsyncExitStack() as stack:
        await host.open(stack)
        made = Shown(host, topology, nics, [Health(ready=True)])
        await made.server.start()
        stack.push_async_callback(made.server.close)
        yield made
