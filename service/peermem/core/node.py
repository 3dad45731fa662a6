"""What a node is and has, as told to callers."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from peermem.core.gid import Gid
from peermem.core.types import FabricKind, Path

ADOPTED = "adopted"
"""Name of the device that handed-in memory files belong to."""
ADOPTED_DMABUF = "adopted-dmabuf"
"""Name of the device that handed-in dma-bufs belong to."""
P2PMEM = "p2pmem-"
"""Begins the names of the devices that are p2pmem pools."""


class NodeState(Enum):
    """What is known of a node's being there; values are the contract's enum names."""

    UP = "UP"
    """The directory says so now, or it is this node."""
    UNCONFIRMED = "UNCONFIRMED"
    """The directory said so last, and can't be reached since."""
    GONE = "GONE"
    """It left the directory, or did not renew its lease there."""


@dataclass(frozen=True, slots=True)
class NodeDevice:
    """A device of a node, as the directory tells of it."""

    name: str
    kind: str
    size: int
    """Bytes."""


@dataclass(frozen=True, slots=True)
class NodeFacts:
    """One node; times and counts, but for `links_here`, are empty for a node that was not asked, and what a static
    directory does not tell is, too."""

    node: str
    address: str
    """host:port of its gRPC server."""
    epoch: str = ""
    version: str = ""
    fabrics: tuple[FabricKind, ...] = ()
    started_at: float = 0.0
    """Unix time; 0 when not known."""
    region_count: int = 0
    region_bytes: int = 0
    running_transfer_count: int = 0
    link_count: int = 0
    grant_count: int = 0
    nics: tuple[str, ...] = ()
    """NIC ports that its verbs fabric uses."""
    devices: tuple[NodeDevice, ...] = ()
    state: NodeState = NodeState.UP
    since: float = 0.0
    """Unix time from which it is UNCONFIRMED or GONE; 0 for UP."""
    links_here: int = 0
    """Links that the node that was asked has open to it."""


@dataclass(frozen=True, slots=True)
class DeviceFacts:
    """One device; `size` and `available` in bytes."""

    name: str
    kind: str
    size: int
    available: int
    path: Path
    region_count: int
    pci_address: str = ""
    """Of the PCI function that has the memory; empty for host memory."""
    nics: tuple[str, ...] = ()
    """NIC ports that its regions use, nearest first."""
    why: str = ""
    """Why these, or why none; a sentence."""


@dataclass(frozen=True, slots=True)
class OwnMemory:
    """Memory of the daemon's process, in bytes."""

    private: int
    """What is resident of its own, without shared memory such as regions and staging buffers."""
    pinned: int
    """What is pinned for NICs; memory registered on demand is not."""
    pin_limit: int | None
    """How much it may pin; None: any amount."""


@dataclass(frozen=True, slots=True)
class NicPort:
    """One port of an RDMA device."""

    name: str
    """Device and port, such as mlx5_0/1."""
    state: str
    """Such as ACTIVE or DOWN."""
    link_layer: str
    """InfiniBand or Ethernet."""
    rate: int
    """Bits per second; 0 where the kernel does not say."""
    numa_node: int
    """-1 where there is none, as for a software NIC."""
    pci_address: str = ""
    """Of its PCI function, such as 0000:18:00.0; empty for a software NIC."""
    phys_state: str = ""
    """Such as LinkUp or Polling."""
    netdev: str = ""
    """Network interface that a software NIC sits on, or the one that the first GID belongs to."""
    gids: tuple[Gid, ...] = ()
    """Its addresses, by index; empty slots are left out."""
    node_guid: str = ""
    """Such as b83f:d203:0012:3456."""
    firmware: str = ""
    """Version; empty for a software NIC."""
    uverbs: str = ""
    """File below /dev/infiniband, such as uverbs0."""

    @property
    def device(self) -> str:
        """The RDMA device, such as mlx5_0."""
        return self.name.rpartition("/")[0]

    @property
    def port(self) -> int:
        """Number of the port, from 1."""
        return int(self.name.rpartition("/")[2])

    @property
    def is_active(self) -> bool:
        """Whether it carries traffic."""
        return self.state == "ACTIVE"
