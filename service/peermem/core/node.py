"""What a node is and has, as told to callers."""

from __future__ import annotations

from dataclasses import dataclass

from peermem.core.types import FabricKind, Path

ADOPTED = "adopted"
"""Name of the device that handed-in memory belongs to."""


@dataclass(frozen=True, slots=True)
class NodeFacts:
    """One node; all but the first two fields are empty for a node that was not asked."""

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


@dataclass(frozen=True, slots=True)
class DeviceFacts:
    """One device; `size` and `available` in bytes."""

    name: str
    kind: str
    size: int
    available: int
    path: Path
    region_count: int


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
