"""What a daemon tells about nodes, devices, regions and transfers, as frozen values.

Rules of this file:

* Values only: one class per message of the contract, made by its `from_proto`.
* Sizes are bytes, durations are seconds, times are aware datetimes in UTC.
* A number that this version does not know (a newer daemon) becomes None or UNSPECIFIED, never a fault.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Self

from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp

from peermem.client import errors
from peermem.client.segments import Slice
from peermem.client.states import Direction as Direction
from peermem.client.states import NodeState as NodeState
from peermem.client.states import RegionState as RegionState
from peermem.client.states import TransferState as TransferState
from peermem.core.errors import MalformedMessage, PeermemError
from peermem.core.types import FabricKind, LeaseKind, Path
from peermem.v1 import node_pb2, region_pb2, transfer_pb2

_NODE_STATES = dict(enumerate(NodeState))
_REGION_STATES = dict(enumerate(RegionState))
_TRANSFER_STATES = dict(enumerate(TransferState))
_DIRECTIONS = dict(enumerate(Direction))
_FABRICS: dict[int, FabricKind] = {
    transfer_pb2.FABRIC_VERBS: FabricKind.VERBS,
    transfer_pb2.FABRIC_TCP: FabricKind.TCP,
    transfer_pb2.FABRIC_LOCAL: FabricKind.LOCAL,
}
_PATHS: dict[int, Path] = {
    region_pb2.PATH_P2PDMA: Path.P2PDMA,
    region_pb2.PATH_DMABUF: Path.DMABUF,
    region_pb2.PATH_LEGACY_PEER_MEMORY: Path.LEGACY_PEER_MEMORY,
    region_pb2.PATH_HOST: Path.HOST,
    region_pb2.PATH_STAGED: Path.STAGED,
}
_LEASES: dict[int, LeaseKind] = {
    region_pb2.LEASE_KIND_NONE: LeaseKind.NONE,
    region_pb2.LEASE_KIND_SESSION: LeaseKind.SESSION,
    region_pb2.LEASE_KIND_TTL: LeaseKind.TTL,
}


@dataclass(frozen=True, slots=True)
class NodeDevice:
    """A device of a node, as the directory tells of it."""

    name: str
    kind: str
    size: int


@dataclass(frozen=True, slots=True)
class NodeInfo:
    """A host that runs one daemon; counts are zero for a node that was not asked, but for `links_here_count`."""

    name: str
    address: str
    epoch: str
    version: str
    fabrics: tuple[FabricKind, ...]
    start_time: datetime | None
    region_count: int
    region_bytes: int
    running_transfer_count: int
    link_count: int
    grant_count: int
    nics: tuple[str, ...]
    """NIC ports that its verbs fabric uses."""
    devices: tuple[NodeDevice, ...]
    state: NodeState
    state_time: datetime | None
    """Since when it is UNCONFIRMED or GONE."""
    links_here_count: int
    """Links that the node that was asked has open to it."""

    @classmethod
    def from_proto(cls, node: node_pb2.Node) -> Self:
        """Return the message's facts."""
        return cls(
            name=node.name,
            address=node.address,
            epoch=node.epoch,
            version=node.version,
            fabrics=tuple(_FABRICS[number] for number in node.fabrics if number in _FABRICS),
            start_time=_time(node.start_time) if node.HasField("start_time") else None,
            region_count=node.region_count,
            region_bytes=node.region_bytes,
            running_transfer_count=node.running_transfer_count,
            link_count=node.link_count,
            grant_count=node.grant_count,
            nics=tuple(node.nics),
            devices=tuple(NodeDevice(device.name, device.kind, device.size) for device in node.devices),
            state=_NODE_STATES.get(node.state, NodeState.UNSPECIFIED),
            state_time=_time(node.state_time) if node.HasField("state_time") else None,
            links_here_count=node.links_here_count,
        )


@dataclass(frozen=True, slots=True)
class Device:
    """Something with BAR memory on a node, or its stand-in."""

    name: str
    kind: str
    size: int
    available: int
    path: Path | None
    region_count: int
    pci_address: str | None
    """None for host memory."""
    nics: tuple[str, ...]
    """NIC ports that its regions use, nearest first."""
    why: str
    """Why these, or why none."""

    @classmethod
    def from_proto(cls, device: node_pb2.Device) -> Self:
        """Return the message's facts."""
        return cls(
            name=device.name,
            kind=device.kind,
            size=device.size,
            available=device.available,
            path=_PATHS.get(device.path),
            region_count=device.region_count,
            pci_address=device.pci_address or None,
            nics=tuple(device.nics),
            why=device.why,
        )


@dataclass(frozen=True, slots=True)
class Nic:
    """An RDMA device port."""

    name: str
    state: str
    link_layer: str
    rate: int
    """Bits per second."""
    numa_node: int | None
    pci_address: str | None
    """None for a software NIC."""
    gids: tuple[str, ...]
    error: PeermemError | None
    """Why the daemon does not use it; None when it does."""

    @classmethod
    def from_proto(cls, nic: node_pb2.Nic) -> Self:
        """Return the message's facts."""
        return cls(
            name=nic.name,
            state=nic.state,
            link_layer=nic.link_layer,
            rate=nic.rate,
            numa_node=nic.numa_node if nic.numa_node >= 0 else None,
            pci_address=nic.pci_address or None,
            gids=tuple(nic.gids),
            error=errors.from_proto(nic.error) if nic.HasField("error") else None,
        )


@dataclass(frozen=True, slots=True)
class Verdict:
    """One finding of preflight: about the node, where `check` is set; about a NIC port, where only `nic` is; or about
    a device as a NIC port reaches it."""

    check: str | None
    """What was checked of the node, such as memlock."""
    nic: str | None
    device: str | None
    fabric: FabricKind | None
    path: Path | None
    works: bool
    error: PeermemError | None
    """Why it does not work."""
    detail: str
    """What was found, in words."""
    advice: str
    """What would make it better, or what else to try; empty when nothing would."""
    latency: float | None
    """Of a 4 KiB write, where a device works."""
    write_bandwidth: int | None
    """Bytes per second of 1 MiB writes into the memory, where a device works."""
    read_bandwidth: int | None
    """Bytes per second of 1 MiB reads out of the memory, where a device works."""
    done: int
    """Findings so far, this one included."""
    total: int
    """Findings that there will be."""

    @classmethod
    def from_proto(cls, verdict: node_pb2.PreflightVerdict) -> Self:
        """Return the message's facts."""
        measured = verdict.HasField("latency")
        return cls(
            check=verdict.check or None,
            nic=verdict.nic or None,
            device=verdict.device or None,
            fabric=_FABRICS.get(verdict.fabric),
            path=_PATHS.get(verdict.path),
            works=verdict.works,
            error=errors.from_proto(verdict.error) if verdict.HasField("error") else None,
            detail=verdict.detail,
            advice=verdict.advice,
            latency=_seconds(verdict.latency) if measured else None,
            write_bandwidth=verdict.write_bandwidth if measured else None,
            read_bandwidth=verdict.read_bandwidth if measured else None,
            done=verdict.done,
            total=verdict.total,
        )


@dataclass(frozen=True, slots=True)
class Lease:
    """What keeps a region alive, and until when."""

    kind: LeaseKind | None
    ttl: float | None
    expire_time: datetime | None

    @classmethod
    def from_proto(cls, lease: region_pb2.Lease) -> Self:
        """Return the message's facts."""
        return cls(
            kind=_LEASES.get(lease.kind),
            ttl=_seconds(lease.ttl) if lease.HasField("ttl") else None,
            expire_time=_time(lease.expire_time) if lease.HasField("expire_time") else None,
        )


@dataclass(frozen=True, slots=True)
class RegionInfo:
    """A region as it stood when the daemon was asked."""

    name: str
    length: int
    device: str
    owner: str
    labels: Mapping[str, str]
    lease: Lease
    path: Path | None
    state: RegionState
    create_time: datetime
    nics: tuple[str, ...]
    """NIC ports that it is registered with, nearest first."""
    why: str
    """Why these, or why none."""
    slurm_job: str
    """Number of the Slurm job that made it; empty where it was none, or is not known."""
    pod: str
    """UID of the pod, likewise."""
    published: bool
    """Whether it is found on all nodes."""

    def __getitem__(self, key: slice) -> Slice:
        """Return the range `[start:stop]`, counted as Python counts."""
        if not isinstance(key, slice):
            raise TypeError("A region is indexed by a slice of bytes, such as region[0:4096].")
        return Slice.of(self, key)

    @classmethod
    def from_proto(cls, region: region_pb2.Region, **bound: Any) -> Self:
        """Return the message's facts; `bound` are further fields of a subclass."""
        return cls(
            name=region.name,
            length=region.length,
            device=region.device,
            owner=region.owner,
            labels=dict(region.labels),
            lease=Lease.from_proto(region.lease),
            path=_PATHS.get(region.path),
            state=_REGION_STATES.get(region.state, RegionState.UNSPECIFIED),
            create_time=_time(region.create_time),
            nics=tuple(region.nics),
            why=region.why,
            slurm_job=region.slurm_job,
            pod=region.pod,
            published=region.published,
            **bound,
        )


@dataclass(frozen=True, slots=True)
class PublishedRegion:
    """What is known of a published region on all nodes."""

    name: str
    """nodes/{node}/regions/{region}."""
    length: int
    device_kind: str
    path: Path | None
    labels: Mapping[str, str]

    @classmethod
    def from_proto(cls, region: region_pb2.PublishedRegion) -> Self:
        """Return the message's facts."""
        return cls(region.name, region.length, region.device_kind, _PATHS.get(region.path), dict(region.labels))


@dataclass(frozen=True, slots=True)
class TransferInfo:
    """A transfer as it stood when the daemon reported it."""

    name: str
    state: TransferState
    bytes_total: int
    bytes_done: int
    segment_count: int
    fabric: FabricKind | None
    direction: Direction
    owner: str
    error: PeermemError | None
    create_time: datetime
    end_time: datetime | None
    duration: float | None
    crc32c: int | None
    executed_by: str
    path: Path | None
    """How the memory of the asked node's region is reached; None for a relayed transfer."""
    fabric_why: str
    """Why the fabric was chosen; empty for a relayed transfer."""

    @property
    def bandwidth(self) -> float | None:
        """Bytes per second from acceptance to the end; None before the end."""
        return self.bytes_done / self.duration if self.duration else None

    @classmethod
    def from_proto(cls, transfer: transfer_pb2.Transfer) -> Self:
        """Return the message's facts."""
        return cls(
            name=transfer.name,
            state=transfer_state(transfer),
            bytes_total=transfer.bytes_total,
            bytes_done=transfer.bytes_done,
            segment_count=transfer.segment_count,
            fabric=_FABRICS.get(transfer.fabric),
            direction=_DIRECTIONS.get(transfer.direction, Direction.UNSPECIFIED),
            owner=transfer.owner,
            error=errors.from_proto(transfer.error) if transfer.HasField("error") else None,
            create_time=_time(transfer.create_time),
            end_time=_time(transfer.end_time) if transfer.HasField("end_time") else None,
            duration=_seconds(transfer.duration) if transfer.HasField("duration") else None,
            crc32c=transfer.crc32c if transfer.HasField("crc32c") else None,
            executed_by=transfer.executed_by,
            path=_PATHS.get(transfer.path),
            fabric_why=transfer.fabric_why,
        )


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a transfer, load or store is."""

    bytes_done: int
    bytes_total: int
    rate: float
    """Bytes per second since it was asked for."""

    @property
    def fraction(self) -> float:
        """From 0 to 1."""
        return self.bytes_done / self.bytes_total if self.bytes_total else 0.0


def transfer_state(transfer: transfer_pb2.Transfer) -> TransferState:
    """Return the state of a transfer message."""
    return _TRANSFER_STATES.get(transfer.state, TransferState.UNSPECIFIED)


def _time(timestamp: Timestamp) -> datetime:
    try:
        return timestamp.ToDatetime(tzinfo=UTC)
    except (ValueError, OverflowError):
        raise MalformedMessage("The daemon sent a time that does not exist; its version may not fit.") from None


def _seconds(duration: Duration) -> float:
    return duration.seconds + duration.nanos / 1e9
